# SPDX-License-Identifier: MIT
"""Write text with a trained generator or teacher.

    python sample.py --steps 16                        the generator, at most 16 network passes
    python sample.py --model teacher --steps 256       its teacher
    python sample.py --prompt "ROMEO:" --num_samples 4
    python sample.py --prompt "ROMEO:{40}\\nJULIET:"   {40}: 40 tokens for the model to fill in
    python sample.py --prompts FILE                    of a prompt a line; prints prompt TAB answer,
                                                       whose newlines stay
    python sample.py --steps 16 --watch                the masks fall away in the terminal
    python sample.py --order shuffled                  masked: random positions, equally many a pass;
                                                       even: every n-th one; confident: the surest
    python sample.py --process duo --ending greedy     uniform: how the last step ends
    python sample.py --temperature 0.9 --top_p 0.95    the likeliest tokens that hold this share
    python sample.py --length 512 --device cpu --dtype float32

A prompt stays where it is and is never changed; the model writes everything else of the block. The
first line printed names passes, seconds, seed and checkpoint. Your own out/<process>/idlm.pt is
preferred; without one the small networks that come with the repository answer. Equal seeds give
equal texts for one --num_samples, device and --dtype; another number draws other texts.
"""
import argparse
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from checkpoint import number
from data import BadInput, encode, get_tokenizer
from generator import ENDINGS, ORDERS, sample

BATCH = 128                                 # texts written at once, whatever --num_samples


def parse_args(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    count = number(int, 1, 1_000_000)
    add("--steps", type=count, default=16)
    add("--model", choices=("idlm", "teacher", "dcd"), default="idlm")
    add("--process", choices=("mdlm", "duo"), help="default mdlm, or what --init_from says")
    add("--out", help="run folder, default out/<process>")
    add("--init_from", help="instead: a checkpoint, exported folder or hub name")
    add("--num_samples", type=count, default=1)
    add("--length", type=count)
    add("--prompt", default="")
    add("--prompts", type=Path)
    add("--temperature", type=number(float, 1e-3, 1e3), default=1.0)
    add("--top_p", type=number(float, 1e-3, 1), default=1.0)
    add("--order", choices=ORDERS, default="random")
    add("--ending", choices=ENDINGS, default="ancestral")
    add("--seed", type=number(int, 0, 2 ** 62), default=1)
    add("--device")
    add("--dtype", choices=checkpoint.DTYPES)
    add("--watch", action="store_true")
    add("--export", help="folder to write the model to, in the published layout and --dtype")
    return p.parse_args(argv)


def find_model(args):
    """The checkpoint to load: --init_from, the user's own run, or the one that is shipped."""
    own = Path(args.out or f"out/{args.process or 'mdlm'}", f"{args.model}.pt")
    shipped = Path(__file__).parent / f"assets/shakespeare/{args.model}"
    if args.out or args.process == "duo" or own.exists() or not shipped.exists():
        shipped = own
    return args.init_from or shipped


def parse_prompt(prompt, tokenizer, length):               # -> (length,) tokens, -1 where free
    """Text and {N} blanks by turns; what is not covered stays free."""
    tokens = []
    for i, part in enumerate(re.split(r"\{(\d{1,9})\}", prompt.replace("\\n", "\n"))):
        tokens += [-1] * min(int(part), length + 1) if i % 2 else encode(tokenizer, part)
    if len(tokens) > length:
        raise BadInput(f"the prompt holds {len(tokens)} tokens, the text {length}: shorten it or "
                       "raise --length")
    return torch.tensor(tokens + [-1] * (length - len(tokens)))


def readable(tokens, tokenizer):
    """Decoded text; [MASK], which the tokenizer has not, as a middle dot."""
    parts = [tokenizer.decode_single_token_bytes(token) if token < tokenizer.n_vocab
             else b"\xc2\xb7" for token in tokens.tolist()]
    return b"".join(parts).decode(errors="replace")


def main(argv=None):
    args = parse_args(argv)
    name = find_model(args)
    device = checkpoint.pick_device(args.device)
    net, meta = checkpoint.load_network(name, device, args.process)
    if args.export:
        checkpoint.export(net, meta, args.export, args.dtype and getattr(torch, args.dtype))
        return print(f"wrote {args.export}, the weights of {name}")
    process = checkpoint.make_process(meta)
    tokenizer = get_tokenizer(meta["tokenizer"])
    length = args.length or meta["block_size"]
    prompts = [args.prompt] * args.num_samples
    if args.prompts:
        prompts = args.prompts.read_text(encoding="utf-8-sig").splitlines()

    def watch(step, x):                     # redraws the first text in place after every step
        print(f"\033[H\033[J step {step + 1}/{args.steps}\n\n{readable(x[0], tokenizer)}")
        time.sleep(min(0.25, 4 / args.steps))              # for the eye

    rng = torch.manual_seed(args.seed)
    began = time.time()
    rows = [parse_prompt(prompt, tokenizer, length) for prompt in prompts or [""]]
    texts = []
    passes = 0
    with checkpoint.prepare(net, args.dtype):
        for batch in tqdm(torch.stack(rows).split(BATCH), leave=False, disable=None):
            written = sample(
                net, process, len(batch), length, args.steps, rng, prompt=batch,
                temperature=args.temperature, top_p=args.top_p, order=args.order,
                ending=args.ending, callback=watch if args.watch else None)
            texts += written.tokens
            passes = max(passes, written.nfe.max())
    print(f"{passes} passes, {time.time() - began:.2f} s, seed {args.seed}, {name} "
          f"({meta['process']}, {meta['stage']})")
    for prompt, row, text in zip(prompts, rows, texts):
        if args.prompts:                    # an answer ends at its padding
            answer = readable(text[row < 0], tokenizer).split("<|endoftext|>")[0].rstrip("\n")
            print(f"{prompt}\t{answer}")
        else:
            print(f"{'-' * 60}\n{readable(text, tokenizer)}")


if __name__ == "__main__":
    checkpoint.run_script(main)
