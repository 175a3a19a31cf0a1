# SPDX-License-Identifier: MIT
"""Write text with a trained generator or teacher.

    python sample.py --steps 16                        the generator, at most 16 network passes
    python sample.py --model teacher --steps 256       its teacher
    python sample.py --prompt "ROMEO:" --num_samples 4
    python sample.py --prompt "ROMEO:{40}\\nJULIET:"   {40}: 40 tokens for the model to fill in
    python sample.py --steps 16 --watch                the masks fall away in the terminal

A prompt stands where it is and is never changed; the model writes everything else of the block.
The first line printed names passes, seconds, seed and checkpoint. Your own out/<process>/idlm.pt is
preferred; without one the small generator that comes with the repository answers.
"""
import argparse
import math
import os
import re
import sys
import time
from itertools import groupby
from pathlib import Path

import torch

import checkpoint
from data import BadInput, encode, get_tokenizer
from generator import SCHEDULES, sample
from train import has_bfloat16, pick_device


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--steps", type=int, default=16, help="network passes at most")
    add("--model", choices=("idlm", "teacher", "dcd"), default="idlm")
    add("--process", choices=("mdlm", "duo"), help="default mdlm, or what --init_from says")
    add("--out", help="run folder, default out/<process>")
    add("--init_from", help="instead: a checkpoint, exported folder or hub name")
    add("--num_samples", type=int, default=1)
    add("--length", type=int, help="tokens per text, default the length of training")
    add("--prompt", default="", help="text to keep; {N} leaves N tokens free")
    add("--temperature", type=float, help="default: 1; where texts begin with words 0.5 in one pass,\n"
        "0.75 in four, 0.88 in 16")
    add("--top_p", type=float, default=1.0, help="keep the likeliest words holding this share")
    add("--ending", choices=("ancestral", "greedy", "greedy-published"), default="greedy",
        help="last step of the uniform process")
    add("--schedule", choices=SCHEDULES,
        help="even: equal steps, of the masked process each at every n-th position, begun with words\n"
             "by frequency; linear: at random positions, as published; cosine: small steps first,\n"
             "also random. Default: what the model's config.json says, else even")
    add("--seed", type=int, default=1)
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--watch", action="store_true", help="show every step")
    add("--export", metavar="FOLDER", help="write the model in the official layout and stop")
    args = p.parse_args(argv)
    for name in ("steps", "num_samples", "length", "temperature", "top_p"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= (1 if name == "top_p" else math.inf):
            raise BadInput(f"--{name} {value} is out of range: see --help")
    return args


def find_model(args):
    """The checkpoint to load: --init_from, the user's own run, or the one that is shipped."""
    own = Path(args.out or f"out/{args.process or 'mdlm'}", f"{args.model}.pt")
    usual = args.model == "idlm" and args.process != "duo" and not args.out
    shipped = Path(__file__).with_name("assets") / "shakespeare"
    return args.init_from or (shipped if usual and shipped.exists() and not own.exists() else own)


def parse_prompt(prompt, tokenizer, length):               # -> (length,) tokens, -1 where free
    """Text and {N} blanks in turn; what is not covered stays free."""
    tokens = []
    for i, part in enumerate(re.split(r"\{(\d+)\}", prompt.replace("\\n", "\n"))):
        tokens += [-1] * int(part) if i % 2 else encode(tokenizer, part)
    if len(tokens) > length:
        raise BadInput(f"the prompt holds {len(tokens)} tokens, the text {length}: shorten it or "
                       "raise --length")
    return torch.tensor(tokens + [-1] * (length - len(tokens)))


def readable(tokens, tokenizer):
    """Decoded text; [MASK], which is no word of the tokenizer, as a middle dot."""
    runs = groupby(tokens.tolist(), lambda token: token < tokenizer.n_vocab)
    return "".join(tokenizer.decode([*run]) if known else "·" * len([*run]) for known, run in runs)


def watcher(tokenizer, steps):
    """A callback that redraws the first text in place after every step."""
    def show(step, x):
        print(f"\033[H\033[J step {step + 1}/{steps}\n\n{readable(x[0], tokenizer)}", flush=True)
        time.sleep(min(0.25, 4 / steps))                   # for the eye
    return show


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    name = find_model(args)
    net, meta = checkpoint.load_network(name, device, args.process)
    if args.export:
        checkpoint.export(net, meta, args.export)
        return print(f"wrote {args.export}: {net.num_params():,} parameters of {name}")
    process, tokenizer = checkpoint.make_process(meta), get_tokenizer(meta["tokenizer"])
    half = has_bfloat16(device)
    net.freeze(torch.bfloat16 if half else None)
    length = args.length or meta["block_size"]
    prompt = parse_prompt(args.prompt, tokenizer, length)
    rng, began = torch.Generator().manual_seed(args.seed), time.time()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        texts = sample(net, process, args.num_samples, length, args.steps, rng, prompt=prompt,
                       temperature=args.temperature, top_p=args.top_p, ending=args.ending,
                       schedule=args.schedule or meta.get("schedule", "even"),
                       callback=watcher(tokenizer, args.steps) if args.watch else None)
    shown = os.path.relpath(name) if os.path.exists(name) else name
    print(f"{int(texts.nfe.max())} passes, {time.time() - began:.2f} s, seed {args.seed}, {shown} "
          f"({meta['process']}, {meta['stage']})")
    for text in texts.tokens:
        print("-" * 60 + "\n" + readable(text, tokenizer))


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"sample.py: {error}")
