# SPDX-License-Identifier: MIT
"""4 x 4: generators trained at the states that an order visits.

    python experiments/visited.py --seed 1            five minutes of a CPU core

In training each cell of x_tilde is [MASK] with probability t_tilde: `random`, as published.
Sampling in another order visits other states. So here ceil(16 t_tilde) cells are [MASK], those
that an order uncovers last: `shuffled`, `even`, or `confident`, where at each of eight passes the
cells are uncovered of whose own digit the frozen teacher is surest. Any law of the latent is
allowed (the loss holds at p_theta whatever eps is), so nothing else changes. Grids without puzzles.
"""
import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch                                                         # noqa: E402
from tqdm import tqdm                                                # noqa: E402

import checkpoint                                                    # noqa: E402
import train                                                         # noqa: E402
from evaluate import append_records, records_table, write_texts      # noqa: E402
from experiments.sudoku_story import MODELS, Grids, empty_prompts    # noqa: E402
from experiments.sudoku_story import examples_in, options_of         # noqa: E402
from experiments.sudoku_story import train_small                     # noqa: E402
from generator import Latent, draw_latent, reveal_steps              # noqa: E402
from sudoku import score                                             # noqa: E402
from teacher import Masked                                           # noqa: E402

CELLS = 16
PASSES = 8
DUE = CELLS // PASSES                       # cells a pass
STEPS = 4, 8, 16


def surest_first(teacher, x_0, mask_id):                   # (B, L) -> rank of each cell, (B, 16)
    """Which cell is uncovered when: at each pass those of whose own digit the teacher is surest."""
    x = x_0.clone()
    x[:, -CELLS:] = mask_id
    rank = torch.full((len(x), CELLS), CELLS)
    for i in range(PASSES):
        log_p = teacher(x, torch.zeros(len(x)))[..., :mask_id].log_softmax(-1)
        own = log_p.gather(-1, x_0[..., None])[:, -CELLS:, 0]
        own = own.masked_fill(rank < CELLS, -torch.inf)
        first = own.topk(DUE).indices
        rank.scatter_(1, first, torch.arange(DUE).expand_as(first) + i * DUE)
        x[:, -CELLS:] = torch.where(rank < CELLS, x_0[:, -CELLS:], mask_id)
    return rank


def latent_of(order, teacher):
    """-> a function in place of generator.draw_latent, for grids behind a dot, masked process"""
    @torch.no_grad()
    def draw(process, x_0, t_tilde, rng, soft=False, free=None):
        if order == "confident":
            rank = surest_first(teacher, x_0, process.mask_id)
        else:
            every = torch.ones(len(x_0), CELLS, dtype=torch.bool)
            rank = reveal_steps(every, CELLS, order, rng)
        left = (t_tilde * CELLS).ceil()[:, None]           # cells that are [MASK]
        x_tilde = x_0.clone()
        x_tilde[:, -CELLS:] = torch.where(rank >= CELLS - left, process.mask_id, x_0[:, -CELLS:])
        return Latent(x_tilde, process.sigma(t_tilde))
    return draw_latent if order == "random" else draw


def main(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--seed", type=checkpoint.number(int, 0, 2 ** 32 - 1), default=1)
    p.add_argument("--num_texts", type=checkpoint.number(int, 16), default=5000)
    p.add_argument("--records", type=Path, default="out/visited.json")
    args = p.parse_args(argv)
    args.size, args.process = 4, "mdlm"
    folder = Path(f"out/visited/{args.seed}")
    data = Grids(examples_in(folder, 4, args.seed))
    process = Masked(data.K + 1)

    def settings(stage):
        options = options_of(args, MODELS[4][stage], ["--device=cpu"], f"--out={folder}",
                             f"--data={data.source}", f"--block_size={data.block_size}")
        return train.settings_of(options, stage)

    teacher = train_small(settings("teacher"), data)
    nets = {}
    for order in "random", "shuffled", "even", "confident":
        train.draw_latent = latent_of(order, teacher)
        nets[order] = train_small(settings("idlm"), data, teacher)
    train.draw_latent = draw_latent
    blank = empty_prompts(data, args.num_texts, 4)
    where = checkpoint.provenance(args.seed, teacher.device)
    records = []
    for states, order, steps in tqdm(list(product(nets, ("shuffled", "even", "confident"), STEPS)),
                                     disable=None):
        tokens, _ = write_texts(nets[states], process, blank, steps, args.seed, None, order=order)
        records.append(where | {"states": states, "order": order, "steps": steps}
                       | score(tokens[:, -CELLS:] - 1, 4))
    print(records_table(records, "states order steps rules valid entropy js seen"))
    append_records(args.records, records)


if __name__ == "__main__":
    checkpoint.run_script(main)
