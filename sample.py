# SPDX-License-Identifier: MIT
"""Write text with a trained generator or teacher.

    python sample.py --steps 16                        the generator, at most 16 network passes
    python sample.py --model teacher --steps 256       its teacher
    python sample.py --prompt "ROMEO:" --num_samples 4
    python sample.py --prompt "ROMEO:{40}\\nJULIET:"   {40}: 40 tokens for the model to fill in
    python sample.py --prompts FILE                    an answer for every line of a file
    python sample.py --steps 16 --watch                the masks fall away in the terminal

A prompt stays where it is and is never changed; the model writes everything else of the block. The
first line printed names passes, seconds, seed and checkpoint. Your own out/<process>/idlm.pt is
preferred; without one the small networks that come with the repository answer. Equal seeds give
equal texts for one --num_samples; another number draws other texts.
"""
import argparse
import re
import time
from itertools import groupby
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from checkpoint import number
from data import BadInput, encode, get_tokenizer
from generator import ENDINGS, ORDERS, sample

BATCH_TOKENS = 2 ** 17                      # written at once, whatever --num_samples


def parse_args(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--steps", type=number(int, 1, 2 ** 20), default=16, help="network passes at most")
    add("--model", choices=("idlm", "teacher", "dcd"), default="idlm")
    add("--process", choices=("mdlm", "duo"), help="default mdlm, or what --init_from says")
    add("--out", help="run folder, default out/<process>")
    add("--init_from", help="instead: a checkpoint, exported folder or hub name")
    add("--num_samples", type=number(int, 1, 2 ** 24), default=1)
    add("--length", type=number(int, 1, 2 ** 20), help="tokens per text, default that of training")
    add("--prompt", default="", help="text to keep; {N} leaves N tokens free")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line; prints prompt TAB answer")
    add("--temperature", type=number(float, 1e-3, 1e3), default=1.0)
    add("--top_p", type=number(float, 1e-3, 1), default=1.0,
        help="keep the likeliest tokens holding this share")
    add("--order", choices=ORDERS, default="random", help="of revealing, masked process")
    add("--ending", choices=ENDINGS, default="ancestral", help="last step, uniform process")
    add("--seed", type=number(int, 0, 2 ** 62), default=1)
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=checkpoint.DTYPES, help="bfloat16: by autocast")
    add("--watch", action="store_true", help="show every step")
    add("--export", metavar="FOLDER", help="write the model in the published layout and stop")
    return p.parse_args(argv)


def find_model(args):
    """The checkpoint to load: --init_from, the user's own run, or the one that is shipped."""
    own = Path(args.out or f"out/{args.process or 'mdlm'}", f"{args.model}.pt")
    shipped = Path(__file__).with_name("assets") / "shakespeare" / args.model
    use_shipped = args.process != "duo" and not args.out and shipped.exists() and not own.exists()
    return args.init_from or (shipped if use_shipped else own)


def parse_prompt(prompt, tokenizer, length):               # -> (length,) tokens, -1 where free
    """Text and {N} blanks by turns; what is not covered stays free."""
    tokens = []
    for i, part in enumerate(re.split(r"\{(\d+)\}", prompt.replace("\\n", "\n"))):
        tokens += [-1] * min(int(part), length + 1) if i % 2 else encode(tokenizer, part)
    if len(tokens) > length:
        raise BadInput(f"the prompt holds {len(tokens)} tokens, the text {length}: shorten it or "
                       "raise --length")
    return torch.tensor(tokens + [-1] * (length - len(tokens)))


def readable(tokens, tokenizer):
    """Decoded text; [MASK], which the tokenizer has not, as a middle dot."""
    text = ""
    for is_token, run in groupby(tokens.tolist(), lambda token: token < tokenizer.n_vocab):
        run = list(run)
        text += tokenizer.decode(run) if is_token else "·" * len(run)
    return text


def watcher(tokenizer, steps):
    """A callback that redraws the first text in place after every step."""
    def show(step, x):
        print(f"\033[H\033[J step {step + 1}/{steps}\n\n{readable(x[0], tokenizer)}", flush=True)
        time.sleep(min(0.25, 4 / steps))                   # for the eye
    return show


def main(argv=None):
    args = parse_args(argv)
    device = checkpoint.pick_device(args.device)
    name = find_model(args)
    net, meta = checkpoint.load_network(name, device, args.process)
    if args.export:
        checkpoint.export(net, meta, args.export)
        return print(f"wrote {args.export}: {net.num_params():,} parameters of {name}")
    process = checkpoint.make_process(meta)
    tokenizer = get_tokenizer(meta["tokenizer"])
    dtype = checkpoint.pick_dtype(args.dtype, device)
    autocast = checkpoint.prepare(net, dtype)
    length = args.length or meta["block_size"]
    prompts = [args.prompt] * args.num_samples
    if args.prompts:
        prompts = args.prompts.read_text(encoding="utf-8-sig").splitlines()
    rng = torch.Generator().manual_seed(args.seed)
    began = time.time()
    texts = []
    passes = 0
    size = max(1, BATCH_TOKENS // length)
    for i in tqdm(range(0, len(prompts), size), "batches", leave=False, disable=None):
        rows = [parse_prompt(prompt, tokenizer, length) for prompt in prompts[i:i + size]]
        with autocast:
            written = sample(
                net, process, len(rows), length, args.steps, rng, prompt=torch.stack(rows),
                temperature=args.temperature, top_p=args.top_p, order=args.order,
                ending=args.ending,
                callback=watcher(tokenizer, args.steps) if args.watch else None)
        texts += list(written.tokens)
        passes = max(passes, int(written.nfe.max()))
    print(f"{passes} passes, {time.time() - began:.2f} s, seed {args.seed}, {name} "
          f"({meta['process']}, {meta['stage']})")
    for prompt, text in zip(prompts, texts):
        written = readable(text, tokenizer)
        if args.prompts:                    # an answer ends at its padding
            answer = written[len(prompt):].split("<|endoftext|>")[0].rstrip("\n")
            print(f"{prompt}\t{answer}")
        else:
            print("-" * 60 + "\n" + written)


if __name__ == "__main__":
    checkpoint.run_script(main)
