# SPDX-License-Identifier: MIT
"""Sudoku: a text is right or wrong, and the law of all right ones is known. No metric to please.

    python sudoku.py                4 x 4, three minutes on two CPU cores: examples, table and
                                    pictures in out/sudoku4-mdlm
    python sudoku.py --size 9       9 x 9, twenty minutes on a GPU
    python sudoku.py --empty        grids alone: no puzzles, half of the length
    python sudoku.py --process duo  the uniform process; flags that are not ours go on to train.py
    python sudoku.py --puzzle 12..............     train, then solve this one, too
    python sudoku.py --out FOLDER   a folder keeps one finished story

An example is a puzzle, the prompt, and the grid that solves it, the answer; a dot is an empty cell.
There are 288 grids of 4 x 4; those of 9 x 9 come from a randomised solver. A training batch takes
symmetries of the grids (digits, rows in bands, bands, columns, stacks, transposition) and clues
anew: none in half of the puzzles, any number in the others. Of grids without clues the table shows

    rules, valid   share of rows, columns and boxes that are right; of grids in which all are
    entropy        of the digit of a cell over the grids, 1 where all digits are as frequent
    agreement      equal cells of two grids: 1 / size where they are independent
    js, kl, seen   4 x 4, counted: JS of the 288 grids to the flat law (0 ... 0.693 nats), KL of the
                   valid ones to it, share of the 288 that is written
    excess         of a teacher: its NELBO less log(grids) / cells, which bounds its KL; nats a cell

and of puzzles with one solution the share solved, by the number of clues.
"""
import argparse
import math
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from checkpoint import number
from data import BadInput, Batch, TextData
from evaluate import bootstrap, summary
from train import STAGES

NUM_GRIDS = {4: 288, 9: 6_670_903_752_021_072_936_960}
NUM_EXAMPLES = {4: 25 * 288, 9: 50_000}
# ---- grids: lists of digits 1 ... n, 0 in an empty cell -----------------------------------------

@cache
def units(n):                               # (3n, n): the cells of each row, column and box
    b = math.isqrt(n)
    cells = np.arange(n * n).reshape(n, n)
    boxes = cells.reshape(b, b, b, b).swapaxes(1, 2).reshape(n, n)
    return np.concatenate([cells, cells.T, boxes])


def solutions(grid, n, rng):
    """Yields every completion of a grid, in random order: first the cell with the fewest digits
    left, its digits shuffled."""
    grid = list(grid)
    where = [np.nonzero((units(n) == cell).any(1))[0].tolist() for cell in range(n * n)]
    used = [0] * 3 * n                      # a bit for each digit that a unit holds

    def mark(cell, digit):
        for unit in where[cell]:
            used[unit] ^= 1 << digit

    def search(empty):
        if not empty:
            yield list(grid)
            return
        most = -1
        for cell in empty:
            row, column, box = where[cell]
            bits = used[row] | used[column] | used[box]
            if bits.bit_count() > most:
                most, best, taken = bits.bit_count(), cell, bits
                if most >= n - 1:
                    break
        rest = [cell for cell in empty if cell != best]
        for digit in rng.sample(range(1, n + 1), n):
            if not taken >> digit & 1:
                grid[best] = digit
                mark(best, digit)
                yield from search(rest)
                mark(best, digit)

    empty = []
    for cell, digit in enumerate(grid):
        if digit:
            mark(cell, digit)
        else:
            empty.append(cell)
    return search(empty)


def as_text(grid):
    return "".join(str(digit or ".") for digit in grid)


def write_examples(path, n, rng):
    """Puzzles with any number of clues. All 288 grids of 4 x 4 stand equally often."""
    empty = [0] * n * n
    all_grids = list(solutions(empty, n, rng)) if n == 4 else []
    lines = []
    for i in tqdm(range(NUM_EXAMPLES[n]), "grids", disable=None):
        grid = all_grids[i % 288] if all_grids else next(solutions(empty, n, rng))
        clues = set(rng.sample(range(n * n), rng.randint(0, n * n)))
        puzzle = [digit * (cell in clues) for cell, digit in enumerate(grid)]
        lines.append(f"{as_text(puzzle)}\t{as_text(grid)}\n")
    checkpoint.write_whole(path, lambda file: file.write("".join(lines).encode("utf-8")))


# ---- a batch ------------------------------------------------------------------------------------

class Puzzles(TextData):
    """Examples, of which a batch holds random symmetries with new clues. Tokens: newline, dot, 1,
    2, ..., so a digit's token is the digit + 1."""

    def batch(self, split, B, rng, part=slice(None)):
        x_0, free = super().batch(split, B, rng)
        cells = x_0.shape[1] // 2
        grid = symmetric(x_0[:, cells:] - 2, math.isqrt(cells), rng) + 2
        share = torch.rand(B, 1, generator=rng).mul(2).sub(1)        # of clues: none in half
        is_clue = torch.rand(B, cells, generator=rng) < share
        puzzle = torch.where(is_clue, grid, 1)
        return Batch(torch.cat([puzzle, grid], 1)[part], free[part])


def symmetric(grid, n, rng):                # (B, n * n) digits 0 ... n - 1 -> the same
    B = len(grid)
    b = math.isqrt(n)

    def orders(*shape):                     # random permutations
        return torch.rand(B, *shape, generator=rng).argsort(-1)

    rows = (orders(b)[..., None] * b + orders(b, b)).view(B, n, 1).expand(B, n, n)
    columns = (orders(b)[..., None] * b + orders(b, b)).view(B, 1, n).expand(B, n, n)
    grid = grid.view(B, n, n).gather(1, rows).gather(2, columns)
    is_turned = torch.rand(B, 1, 1, generator=rng) < 0.5
    grid = torch.where(is_turned, grid.transpose(1, 2), grid)
    return orders(n).gather(1, grid.flatten(1))


# ---- scores -------------------------------------------------------------------------------------

def score(grids, n):                        # (N, n * n) digits -> record
    N = len(grids)
    right = (np.sort(grids[:, units(n)]) == np.arange(1, n + 1)).all(-1)         # (N, 3n)
    counts = (grids[..., None] == np.arange(1, n + 1)).sum(0)                    # (n * n, n)
    record = {"entropy": 0 - xlogx(counts / N).sum() / (n * n * math.log(n)),
              "agreement": (counts * (counts - 1)).sum() / (n * n * N * max(1, N - 1))}
    record |= summary("rules", bootstrap(right.mean(1)))
    record |= summary("valid", bootstrap(right.all(1)))
    if n == 4:
        written = Counter(map(tuple, grids.tolist()))
        every = solutions([0] * 16, 4, random.Random(0))
        q = np.array([written[tuple(grid)] / N for grid in every])
        mixed = (q + 1 / 288) / 2
        js = (math.log(1 / 288) + xlogx(q).sum() + (1 - q.sum()) * math.log(2)) / 2
        record["js"] = js - xlogx(mixed).sum()
        if q.any():
            record["kl"] = math.log(288) + xlogx(q / q.sum()).sum()
        record["seen"] = (q > 0).mean()
    return record


def xlogx(p):
    return p * np.log(np.maximum(p, 1e-300))


# ---- command line -------------------------------------------------------------------------------

def main(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--size", type=int, choices=NUM_GRIDS, default=4)
    add("--process", choices=STAGES, default="mdlm")
    add("--out", type=Path, help="default out/sudoku<size>-<process>")
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=1)
    add("--num_texts", type=number(int, 16), default=5000, help="grids a row")
    add("--puzzle", help="one more to solve: digits and dots")
    add("--empty", action="store_true", help="no puzzles, half of the length")
    args, flags = p.parse_known_args(argv)
    n = args.size
    default = f"out/sudoku{n}-{args.process}" + "-empty" * args.empty
    args.out = args.out or Path(default + f"-{args.seed}" * (args.seed != 1))
    if args.puzzle and not re.fullmatch(f"[.1-{n}]{{{n * n}}}", args.puzzle):
        raise BadInput(f"--puzzle {args.puzzle} has {len(args.puzzle)} cells: give {n * n}, each a "
                       f"dot or a digit up to {n}, or another --size")
    from experiments.sudoku_story import story
    story(args, flags)


if __name__ == "__main__":
    checkpoint.run_script(main)
