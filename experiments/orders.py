# SPDX-License-Identifier: MIT
"""In which order should [MASK] be revealed? Rules for choosing positions, compared on Sudoku.

    python experiments/orders.py --num_texts 4000               4 x 4, trained here
    python experiments/orders.py --num_texts 1000 --out FOLDER  9 x 9: out/sudoku9-mdlm or -empty
    python experiments/orders.py --num_texts 128 --text out/mdlm    text, by the character 6-gram

At each pass as many positions as are due, those with the largest score:
    random       a time for each at random, as published: some passes reveal more than others
    shuffled     at random, as many as are due
    even         every n-th one (generator.py)
    token        log-probability of the token drawn there: LLaDA's and MaskGIT's
    token_ties   the same in float32, where sure tokens are level and the first of them goes first
    token_any    the same in float32, and any of the sure tokens goes first
    entropy      minus the entropy of the row: looks at the state, not at the draw
    gumbel       `entropy` plus Gumbel noise
    apart        `entropy`, one of each of as many stretches of the text as are due
    exclusive    `entropy`; what is chosen lowers rows that put mass on the same tokens
    units        `entropy`, no two of a row, column or box: an oracle's, for comparison
"""
import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch                                                         # noqa: E402
from tqdm import tqdm                                                # noqa: E402

import checkpoint                                                    # noqa: E402
from data import BadInput                                            # noqa: E402
from evaluate import Measure, append_records, held_out, load_models  # noqa: E402
from evaluate import ngram_of, parse_args, records_table             # noqa: E402
from experiments.sudoku_story import examples_in, prompts_of         # noqa: E402
from experiments.sudoku_story import refuse, train_all               # noqa: E402
from generator import ORDERS, reveal_steps                           # noqa: E402
from rows import sample_categorical                                  # noqa: E402
from sudoku import score, units                                      # noqa: E402
from teacher import Masked                                           # noqa: E402

RULES = ("random shuffled even token token_ties token_any entropy gumbel apart exclusive "
         "units").split()
STEPS = {4: [4, 8, 16], 9: [4, 8, 16, 32, 81]}


def top(scores, due):                       # (B, L), (B,) -> (B, L) bool
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    return ranking.argsort(-1) < due[:, None]


def greedy(scores, due, lower):
    """One after another; lower(scores, chosen position (B,)) -> the scores that follow."""
    B, L = scores.shape
    is_chosen = torch.zeros(B, L, dtype=torch.bool, device=scores.device)
    for i in range(int(due.max())):
        best = scores.argmax(-1)
        is_chosen[torch.arange(B), best] |= due > i
        scores = lower(scores, best)
        scores[torch.arange(B), best] = -torch.inf
    return is_chosen


def choose(rule, log_p, tokens, left, due, n):             # -> (B, L) bool
    B, L, K = log_p.shape
    p = log_p.exp()
    scores = (p * log_p).sum(-1)                           # -entropy
    if rule.startswith("token"):
        scores = log_p.gather(-1, tokens[..., None])[..., 0]
    if rule == "token_any":                 # far less than one step of float32 sets them apart
        scores = scores.double() + 1e-9 * torch.rand_like(scores)
    if rule == "gumbel":
        scores = scores - torch.rand_like(scores).log().neg().log()
    scores = scores.masked_fill(~left, -torch.inf)
    if rule == "apart":
        rank = left.cumsum(-1) - 1                         # 0, 1, ... of those that are left
        stretch = rank * due[:, None] // left.sum(-1, keepdim=True).clamp(min=1)
        stretch = stretch.masked_fill(~left, -1)
        is_chosen = torch.zeros_like(left)
        for i in range(int(due.max())):
            within = scores.masked_fill(stretch != i, -torch.inf)
            is_chosen |= top(within, (due > i).long()) & (stretch == i)
        return is_chosen
    if rule == "exclusive":
        def lower(scores, best):
            shared = torch.einsum("bk,blk->bl", p[torch.arange(B), best], p)
            return scores - 4 * shared
        return greedy(scores, due, lower)
    if rule == "units":
        cells = torch.full((n * n, L), False)
        for unit in torch.as_tensor(units(n)):
            cells[unit[:, None], L - n * n + unit] = True
        cells = cells.to(scores.device)

        def lower(scores, best):
            return scores - 100.0 * cells[best - (L - n * n)]
        return greedy(scores, due, lower)
    return top(scores, due)


@torch.no_grad()
def write(net, process, prompt, steps, rule, n, seed):
    rng = torch.manual_seed(seed)           # one generator: two of one seed draw the same numbers
    prompt = prompt.to(net.device)
    left = prompt < 0
    x = prompt.masked_fill(left, process.mask_id)
    if rule in ORDERS:
        step_of = reveal_steps(left.cpu(), steps, rule, rng).to(net.device)
    for i in range(steps):
        logits = net(x, torch.zeros(len(x)))[..., :process.K].double()
        u = torch.rand(x.numel(), device=net.device, dtype=torch.float64)
        tokens = sample_categorical(logits.flatten(0, 1), u).view_as(x)
        if rule in ORDERS:
            is_chosen = left & (step_of == i)
        else:
            if rule in ("token_ties", "token_any"):
                logits = logits.float()
            log_p = logits - logits.logsumexp(-1, keepdim=True)
            due = left.sum(1) // (steps - i)
            is_chosen = choose(rule, log_p, tokens, left, due, n)
        x = torch.where(is_chosen, tokens, x)
        left = left & ~is_chosen
    assert not left.any()
    return x.cpu().numpy()


def score_grids(n, tokens):
    return score(tokens[:, -n * n:] - 1, n)


def read_text_models(args, flags):          # -> {model: network}, scores(tokens), prompt
    options = parse_args([f"--out={args.text}", *flags])
    models, data = load_models(options, checkpoint.pick_device(None))
    _, reference, prompt = held_out(data, args.num_texts)
    base = {"seed": args.seed, "judge": "ngram"}
    measure = Measure(data, {"": ngram_of(data)}, reference, base, ["known_words"])
    nets = {name: net for name, (net, _) in models.items()}
    return nets, lambda tokens: measure(tokens, kind="model")[0], prompt


def main(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--text", type=Path)
    p.add_argument("--num_texts", type=checkpoint.number(int, 16), default=512)
    p.add_argument("--seed", type=checkpoint.number(int, 0, 2 ** 32 - 1), default=1)
    p.add_argument("--rules", nargs="+", choices=RULES, help="default: all but ties",
                   default=[rule for rule in RULES if "_" not in rule])
    p.add_argument("--records", type=Path, default="out/orders.json")
    args, flags = p.parse_known_args(argv)
    if args.out and args.text:
        p.error("--out is of 9 x 9 grids, --text of texts: give one of the two")
    if flags and args.out:
        p.error(f"unrecognized arguments: {' '.join(flags)}: nothing is trained here")
    n = 9 if args.out else 4
    steps, rules = STEPS[n], args.rules
    prompt = prompts_of(torch.zeros(args.num_texts, n * n, dtype=torch.int64))
    scores = partial(score_grids, n)
    if args.text:
        rules = [rule for rule in rules if rule != "units"]
        nets, scores, prompt = read_text_models(args, flags)
        process = Masked(next(iter(nets.values())).config.vocab_size)
    elif args.out:
        nets = {}
        if not (args.out / "idlm.pt").exists():
            raise BadInput(f"{args.out} holds no idlm.pt: run python sudoku.py --size 9 first, and "
                           "name its folder")
        for model in "teacher", "idlm":
            nets[model], meta = checkpoint.load_network(args.out / f"{model}.pt",
                                                        checkpoint.pick_device(None))
        if meta["block_size"] not in (1 + n * n, 2 * n * n):
            raise BadInput(f"{args.out} is of texts of {meta['block_size']} tokens, not of 9 x 9 "
                           "grids: name a folder of sudoku.py --size 9")
        process = checkpoint.make_process(meta)
        prompt = prompt[:, -meta["block_size"]:]           # --empty: one dot before the grid
    else:
        args.out, args.size, args.process = Path(f"out/orders/{args.seed}"), 4, "mdlm"
        args.empty, args.puzzle = False, None
        refuse(args, flags)
        data = examples_in(args.out, 4, args.seed)
        nets = train_all(args, flags, data)
        del nets["idlm independent"]
        process = Masked(data.K + 1)
    records = []
    for model, rule, number in tqdm(list(product(nets, rules, steps)), disable=None):
        with checkpoint.prepare(nets[model], None):
            tokens = write(nets[model], process, prompt, number, rule, n, args.seed)
        records.append({"model": model, "order": rule, "steps": number} | scores(tokens))
    print(records_table(records, "model order steps bits_per_char rules valid entropy distinct4 "
                                 "repetition known_words agreement js kl seen"))
    where = checkpoint.provenance(args.seed, nets[model].device)
    if not args.text:
        where["size"] = n
    append_records(args.records, [where | record for record in records])


if __name__ == "__main__":
    checkpoint.run_script(main)
