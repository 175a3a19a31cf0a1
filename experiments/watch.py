# SPDX-License-Identifier: MIT
"""Draw the README's animation: a text of the shipped generator, as its passes write it.

    python experiments/watch.py                   assets/watch.gif, ten seconds on a CPU
    python experiments/watch.py --order even --steps 8 --out out/even.gif

One frame a network pass: what the pass revealed is in colour, spaces too; a mask is a dot. Lines
break where the finished text breaks them, so no character moves from frame to frame. On a CPU in
float32, so `sample.py --device cpu --dtype float32 --init_from MODEL`, else the same, prints that
text.
"""
import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib                           # brings the font, and Pillow  # noqa: E402
import torch                                                         # noqa: E402
from PIL import Image, ImageDraw, ImageFont                          # noqa: E402

import checkpoint                                                    # noqa: E402
from checkpoint import number                                        # noqa: E402
from data import BadInput, get_tokenizer                             # noqa: E402
from generator import ORDERS, sample                                 # noqa: E402
from sample import readable                                          # noqa: E402

# A line of at most 64 columns ends at a newline or at the end, else before a word, else anywhere.
LINE = re.compile(r"[^\n]{0,63}(?:\n|\Z)|[^\n]{0,63} |[^\n]{64}")
SIZE = 26                                   # of letters: readable at half of the page's width
STEP_X = 16                                 # pixels from letter to letter
STEP_Y = 33
MARGIN = 28
PAPER = 22, 27, 34                          # its own, for light and dark pages
INK = 230, 237, 243
DOT = 140, 148, 160                         # of masks and caption
FRESH = 255, 190, 90                        # what a pass revealed
GLOW = 74, 54, 22                           # behind it, which shows spaces too
SHADES = 24                                 # of each colour, for smooth edges
PASS_MS = 500                               # that a frame stays
LAST_MS = 3000


def write(net, meta, steps, order, seed):
    """-> the text after every pass, a list of strings of equal length; masked: a middle dot."""
    tokenizer = get_tokenizer(meta["tokenizer"])
    texts = []

    def keep(step, x):
        text = readable(x[0], tokenizer)
        if text not in texts:               # a step that reveals nothing takes no pass
            texts.append(text)

    with checkpoint.prepare(net, "float32"):
        sample(net, checkpoint.make_process(meta), 1, meta["block_size"], steps,
               torch.manual_seed(seed), order=order, callback=keep)
    return texts


def places(text):                           # -> [(row, column)], one a character
    rows = LINE.findall(text)
    return [(row, column) for row, line in enumerate(rows) for column in range(len(line))]


def palette():
    """An image of the colours that a frame takes: letters have smooth edges."""
    colors = []
    for low, high in ((PAPER, INK), (PAPER, DOT), (GLOW, FRESH)):
        for shade in range(SHADES):
            colors += [round(a + (b - a) * shade / (SHADES - 1)) for a, b in zip(low, high)]
    image = Image.new("P", (1, 1))
    image.putpalette(colors)
    return image


def draw(texts):
    """-> images of equal size, one a text."""
    where = places(texts[-1])
    rows = 1 + max(row for row, _ in where)
    columns = 1 + max(column for _, column in where)
    shape = 2 * MARGIN + columns * STEP_X, 2 * MARGIN + (rows + 2) * STEP_Y
    file = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSansMono.ttf")
    font = ImageFont.truetype(file, SIZE)
    images = []
    earlier = "·" * len(where)
    for i, text in enumerate(texts):
        image = Image.new("RGB", shape, PAPER)
        pen = ImageDraw.Draw(image)
        for (row, column), old, new in zip(where, earlier, text):
            x = MARGIN + column * STEP_X
            y = MARGIN + row * STEP_Y
            color = DOT if new == "·" else INK
            if new != old:
                color = FRESH
                pen.rectangle((x, y, x + STEP_X - 1, y + STEP_Y - 3), GLOW)
            pen.text((x, y), new.replace("\n", " "), color, font)
        caption = f"pass {i + 1} of {len(texts)}"
        pen.text((MARGIN, MARGIN + (rows + 1) * STEP_Y), caption, DOT, font)
        images.append(image.quantize(palette=palette(), dither=Image.Dither.NONE))
        earlier = text
    return images


def main(argv=None):
    parser = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default=ROOT / "assets/shakespeare/idlm", help="checkpoint, folder or hub name")
    add("--steps", type=number(int, 1, 256), default=16)
    add("--order", choices=ORDERS, default="random")
    add("--seed", type=number(int, 0, 2 ** 62), default=1)
    add("--out", type=Path, default=Path("assets/watch.gif"), help="an earlier .gif is replaced")
    args = parser.parse_args(argv)
    if args.out.suffix != ".gif":           # so that no other kind of file is lost
        raise BadInput(f"--out {args.out}: give a name that ends in .gif")
    net, meta = checkpoint.load_network(args.model)
    if meta["process"] != "mdlm" or meta["tokenizer"]["name"] != "char":
        raise BadInput(f"{args.model} is a {meta['process']} network of "
                       f"{meta['tokenizer']['name']} tokens; give a masked one of characters")
    first, *others = draw(write(net, meta, args.steps, args.order, args.seed))
    stay = [PASS_MS] * len(others) + [LAST_MS]
    checkpoint.write_whole(args.out, lambda file: first.save(
        file, format="GIF", save_all=True, append_images=others, duration=stay, loop=0))
    print(f"wrote {args.out}: {len(stay)} passes, {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    checkpoint.run_script(main)
