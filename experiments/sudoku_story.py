# SPDX-License-Identifier: MIT
"""What sudoku.py makes of its examples: networks, table, two pictures."""
import copy
import json
import math
import random
from functools import partial
from itertools import islice, product

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import checkpoint
import train
from data import BadInput, Batch
from evaluate import append_records, records_table, write_texts
from experiments.measures import wilson
from generator import ORDERS, reveal_steps, sample
from model import DiT, ModelConfig
from run import Run, joined
from sudoku import NUM_GRIDS, Puzzles, as_text, score, solutions, units, write_examples
from teacher import Masked, Uniform, duo_loss, mdlm_loss

COLORS = "black", "tab:red", "tab:blue", "tab:green", "tab:orange"
DOT = 1                                     # its token
NUM_PUZZLES = 200                           # of each number of clues
CLUES = {4: [8, 6, 5], 9: [40, 32, 26]}
STEPS = {4: [1, 2, 4, 8, 16], 9: [1, 2, 4, 8, 16, 32, 81]}
PRESET = {4: "--preset laptop --no-compile --batch_size 256 --micro_batch 256",
          9: "--preset gpu --resume --dropout 0"}
# model -> flags; the first word is the stage, a second one names a variant. 4 x 4 has a small
# network of its own.
MODELS = {4: {"teacher": "--updates 2500 --lr 3e-3 --ema 0.998",
              "idlm": "--updates 700",
              "idlm independent": "--updates 700 --pairing independent"},
          9: {"teacher": "--updates 10000 --batch_size 512 --micro_batch 512 --lr 6e-4 "
                         "--size 8x8x512",
              "dcd": "--updates 1500 --batch_size 256 --micro_batch 256",
              "idlm": "--updates 1500 --lr 1e-4 --batch_size 256 --micro_batch 256"}}
# 9 x 9 --empty, masked, whose generator misses an aim of docs/sudoku.md: two remedies.
VARIANTS = {"idlm long": "--updates 3000 --lr 1e-4 --batch_size 256 --micro_batch 256",
            "idlm slow": "--updates 1500 --lr 3e-5 --batch_size 256 --micro_batch 256"}


# ---- data, with puzzles and without -------------------------------------------------------------

def examples_in(folder, n, seed):           # -> Puzzles, written where there are none
    path = folder / "examples.tsv"
    if not path.exists():
        write_examples(path, n, random.Random(seed))
    return Puzzles(str(path), "char", 2 * n * n, cache=folder)


class Grids:
    """Puzzles' grids behind one dot: no clues, and half of the length. The dot stays, as rotary
    positions need something to count from in an empty grid."""

    def __init__(self, puzzles):
        self.puzzles = puzzles
        self.cells = puzzles.block_size // 2
        self.block_size = 1 + self.cells
        self.key = f"{puzzles.key}-empty"

    def __getattr__(self, name):
        return getattr(self.puzzles, name)

    def behind_a_dot(self, x_0, free):
        x_0, free = x_0[:, self.cells - 1:], free[:, self.cells - 1:]
        x_0[:, 0] = DOT
        return Batch(x_0, free)

    def batch(self, *args):
        return self.behind_a_dot(*self.puzzles.batch(*args))

    def val_blocks(self, n):
        return self.behind_a_dot(*self.puzzles.val_blocks(n))


# ---- networks -----------------------------------------------------------------------------------

class GridNet(DiT):
    """4 x 4: an MLP over all cells in place of the blocks."""

    def __init__(self, vocab_size, length, width=16, inner=512):
        super().__init__(ModelConfig(vocab_size, 0, 1, width))
        self.mlp = nn.Sequential(nn.Linear(length * width, inner), nn.GELU(),
                                 nn.Linear(inner, inner), nn.GELU(),
                                 nn.Linear(inner, length * width))

    def trunk(self, h, sigma, **_):
        cond = nn.functional.silu(self.sigma_map(sigma))
        h = self.mlp(h.flatten(1) * self.config.width ** 0.5).view_as(h)
        return self.output_layer(h, cond)


class SmallRun(Run):
    """train.py's run with a GridNet, kept in memory."""

    def new_network(self):
        self.net = GridNet(self.process.vocab_size, self.s.block_size).to(self.s.device)

    def copy_of(self, net):
        return copy.deepcopy(net).requires_grad_(True)

    def save(self, step):
        pass

    show = save


def models_of(args):                        # -> {model: flags}
    models = MODELS[args.size]
    if args.size == 9 and args.empty and args.process == "mdlm":
        models = models | VARIANTS
    stages = train.STAGES[args.process]
    return {model: own for model, own in models.items() if model.split()[0] in stages}


def options_of(args, own, flags, *more):    # of a model with flags of its own
    return train.parse_args([f"--process={args.process}", f"--seed={args.seed}", *more,
                             *PRESET[args.size].split(), *own.split(), *flags])


def train_small(s, data, teacher=None):     # -> GridNet
    s.teacher = s.start = teacher
    s.sources = {}
    run = SmallRun(s, data)
    if s.stage == "idlm":
        train.distil(s, run, data)
    else:
        train.train(s, run, data)
    return run.optim.ema


def train_all(args, flags, data):           # -> {model: network}
    nets = {}
    for model, own in models_of(args).items():
        stage = model.split()[0]
        out, sources = args.out, []
        if args.size == 9 and model != stage:              # a variant, in a folder of its own
            out /= model.replace(" ", "-")
            teacher = args.out / "teacher.pt"
            sources = [f"--stage={stage}", f"--init_from={teacher}", f"--start_from={teacher}"]
        options = options_of(args, own, flags, f"--out={out}", f"--data={data.source}",
                             f"--block_size={data.block_size}", *sources)
        s = train.settings_of(options, stage)
        with joined(s):
            if args.size == 9:
                train.run_stage(options, stage, data)
                nets[model], _ = checkpoint.load_network(out / f"{stage}.pt", s.device)
            else:
                nets[model] = train_small(s, data, nets.get("teacher"))
    if args.size == 4:
        for net in nets.values():           # after --dtype float64, too
            net.float()
    return nets


# ---- table --------------------------------------------------------------------------------------

def puzzles_of(grid, n, rng):
    """{number of clues: puzzle with one solution}: cells are emptied in random order."""
    puzzle = list(grid)
    puzzles = {}
    for cell in rng.sample(range(n * n), n * n):
        puzzle[cell] = 0
        if len(list(islice(solutions(puzzle, n, rng), 2))) > 1:
            puzzle[cell] = grid[cell]
        puzzles.setdefault(n * n - puzzle.count(0), list(puzzle))
    return puzzles


def puzzles_to_solve(path, n, rng):         # -> {clues: (prompts, answers)}, (N, n * n) each
    """Written once: a line a puzzle."""
    if not path.exists():
        lines = []
        for _ in tqdm(range(NUM_PUZZLES), "puzzles with one solution", disable=None):
            grid = next(solutions([0] * n * n, n, rng))
            puzzles = puzzles_of(grid, n, rng)
            lines += [f"{as_text(puzzles[clues])}\t{as_text(grid)}\n"
                      for clues in CLUES[n] if clues in puzzles]
        checkpoint.write_whole(path, lambda file: file.write("".join(lines).encode("utf-8")))
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = [digits_of(text) for text in line.split("\t")]
        found.setdefault(np.count_nonzero(pair[0]), []).append(pair)
    return {clues: np.array(pairs).swapaxes(0, 1) for clues, pairs in found.items()}


def digits_of(text):
    return [int(digit) for digit in text.replace(".", "0")]


def prompts_of(puzzles):                    # (N, n * n) digits -> (N, 2 n * n) tokens, -1 free
    puzzles = torch.as_tensor(puzzles)
    return torch.cat([puzzles + DOT, torch.full_like(puzzles, -1)], 1)


def empty_prompts(data, num_texts, n):      # -> (N, L) tokens, -1 free
    prompts = torch.full((num_texts, data.block_size), -1)
    prompts[:, :-n * n] = DOT
    return prompts


def excess_of(net, process, data, n, rng, rounds=16):
    """NELBO of grids without clues less the entropy of a cell, nats a cell. -> record"""
    nelbo = mdlm_loss if isinstance(process, Masked) else duo_loss
    cells = n * n
    losses = []
    for _ in range(rounds):
        x_0, free = data.batch("val", 256, rng)
        x_0[:, :-cells] = DOT
        with torch.no_grad(), checkpoint.prepare(net, None):
            losses.append(nelbo(net, process, x_0, rng, free=free).item())
    excess = np.mean(losses) - math.log(NUM_GRIDS[n]) / cells
    half = 1.96 * np.std(losses) / math.sqrt(rounds)
    return {"excess": excess, "excess_ci": [excess - half, excess + half]}


def perfect_grids(num_texts, steps, order, rng):           # -> (N, 16) digits
    """4 x 4 by a denoiser that knows p*: what the order alone costs, as cells of one pass are drawn
    independently."""
    grids = torch.tensor(list(solutions([0] * 16, 4, random.Random(0))))
    one_hot = nn.functional.one_hot(grids - 1, 4).float()
    x = torch.zeros(num_texts, 16, dtype=torch.int64)
    step_of = reveal_steps(x == 0, steps, order, rng)
    for i in range(steps):
        written = nn.functional.one_hot(x, 5)[..., 1:].float()                  # 0: an empty cell
        agreeing = written.flatten(1) @ one_hot.flatten(1).T                    # cells, (N, 288)
        fits = agreeing == written.sum((1, 2))[:, None]
        fits |= ~fits.any(1, keepdim=True)                 # wrong already: any
        p = torch.einsum("ng,gcv->ncv", fits.float(), one_hot)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=rng).view_as(x) + 1
        x = torch.where(step_of == i, drawn, x)
    return x.numpy()


def evaluate(args, nets, process, data):    # -> records
    n = args.size
    rng = torch.Generator().manual_seed(args.seed)
    real = data.batch("val", args.num_texts, rng).x_0[:, -n * n:].numpy() - 1
    records = [{"model": "real grids"} | score(real, n)]
    puzzles = {}
    if not args.empty:
        puzzles = puzzles_to_solve(args.out / "puzzles.tsv", n, random.Random(args.seed))
    blank = empty_prompts(data, args.num_texts, n)
    choices = [{"order": order} for order in ORDERS]
    if args.process == "duo":
        choices = [{"ending": ending} for ending in ("ancestral", "map")]
    if n == 4 and args.process == "mdlm":
        for order, steps in product(("random", "even", "shuffled"), STEPS[n]):
            grids = perfect_grids(args.num_texts, steps, order, rng)
            records.append({"model": "perfect denoiser", "order": order, "steps": steps}
                           | score(grids, n))
    excess = excess_of(nets["teacher"], process, data, n, rng)
    settings = list(product(nets, choices, STEPS[n]))
    for model, choice, steps in tqdm(settings, "evaluation", disable=None):
        write = partial(write_texts, nets[model], process, steps=steps, seed=args.seed,
                        dtype=None, **choice)
        tokens, passes = write(blank)
        record = {"model": model, **choice, "steps": steps, "passes": passes}
        record |= score(tokens[:, -n * n:] - 1, n)
        for clues, (questions, answers) in puzzles.items():
            tokens, _ = write(prompts_of(questions))
            is_right = (tokens[:, n * n:] - 1 == answers).all(1)
            name = f"solved_{clues}"
            record[name], record[name + "_ci"] = wilson(int(is_right.sum()), len(is_right))
        if model == "teacher":
            record |= excess
        records.append(record)
    return records


# ---- pictures -----------------------------------------------------------------------------------

def draw_rules(records, path):
    """Against passes, real grids dashed: share of the rules kept, and beside it what the rules do
    not see: JS of 4 x 4, share of grids valid of 9 x 9. Readable without colour."""
    names = {"rules": "share of rules kept"}
    if "js" in records[0]:
        names["js"] = "JS to the flat law, nats"
    else:
        names["valid"] = "share of grids valid"
    figure = Figure((12, 4.2), layout="constrained")
    axes = figure.subplots(1, len(names))
    lines = {}
    for record in records:
        if "passes" not in record:          # of no network
            continue
        choice = record.get("order") or record.get("ending")
        lines.setdefault((record["model"], choice), []).append(record)
    models = list(dict.fromkeys(["teacher", "idlm", *(model for model, _ in lines)]))
    choices = list(dict.fromkeys(choice for _, choice in lines))
    ticks = sorted({record["steps"] for record in records if "steps" in record})
    for name, axis in zip(names, axes):
        axis.axhline(records[0][name], color="gray", linestyle="--", linewidth=1)
        for (model, choice), points in lines.items():
            if " " in model and choice != choices[0]:      # of variants one line is enough
                continue
            axis.plot([r["passes"] for r in points], [r[name] for r in points],
                      color=COLORS[models.index(model)],
                      linestyle=["-", "--", "-.", ":"][choices.index(choice)],
                      marker="osD^v"[models.index(model)], label=f"{model}, {choice}")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="network passes", ylim=(0, None), ylabel=names[name])
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=4,
                    title="gray, dashed: real grids")
    save(figure, path)


def draw_filling(nets, process, prompt, n, path, seed, steps=(4, 16), frames=4):
    """One grid being written: teacher above generator, few passes left and many right. A digit that
    stands twice in a row, column or box is red."""
    figure = Figure((12, 3.6), layout="constrained")
    axes = figure.subplots(2, len(steps) * frames)
    for row, model in enumerate(("teacher", "idlm")):
        shown = []
        for number in steps:
            states = []
            with checkpoint.prepare(nets[model], None):
                sample(nets[model], process, *prompt.shape, number, torch.manual_seed(seed),
                       prompt=prompt, callback=lambda _, x: states.append(x[0, -n * n:].tolist()))
            every = number // frames
            shown += [(f"step {i + 1} of {number}", states[i])
                      for i in range(every - 1, number, every)]
        for axis, (title, tokens) in zip(axes[row], shown):
            axis.set_title("" if row else title, fontsize=11)
            draw_grid(axis, np.array(tokens) - 1, n)
        axes[row, 0].set_ylabel(model, fontsize=13)
    save(figure, path)


def draw_grid(axis, digits, n):             # (n * n,): what is no digit stays empty
    is_digit = (digits >= 1) & (digits <= n)
    b = math.isqrt(n)
    for cell in range(n * n):
        if is_digit[cell]:
            same = (digits[units(n)] == digits[cell]).sum(1)
            is_twice = (same[(units(n) == cell).any(1)] > 1).any()
            axis.text(cell % n + 0.5, cell // n + 0.5, str(digits[cell]), ha="center", va="center",
                      fontsize=18 if n == 4 else 9, weight="bold" if is_twice else "normal",
                      color="red" if is_twice else "black")
    for i in range(n + 1):
        axis.axhline(i, color="black", linewidth=0.4 if i % b else 1.5, clip_on=False)
        axis.axvline(i, color="black", linewidth=0.4 if i % b else 1.5, clip_on=False)
    axis.set(xlim=(0, n), ylim=(n, 0), xticks=[], yticks=[], aspect="equal")


def save(figure, path):
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=130))
    print(f"wrote {path}")


def refuse(args, flags):
    """Bad input, before anything is written or trained."""
    if args.empty and args.puzzle:
        raise BadInput("--empty learns no puzzles: leave --puzzle out")
    if args.puzzle == "":
        raise BadInput(f"--puzzle is empty: give {args.size ** 2} cells, or leave it out")
    digits = np.array(digits_of(args.puzzle or "." * args.size ** 2))
    for unit in units(args.size):
        values, counts = np.unique(digits[unit][digits[unit] > 0], return_counts=True)
        if (counts > 1).any():
            raise BadInput(f"--puzzle has the digit {values[counts > 1][0]} twice in a row, column "
                           "or box: no grid solves it")
    if args.size == 4 and next(solutions(digits.tolist(), 4, random.Random(0)), None) is None:
        raise BadInput(f"--puzzle {args.puzzle}: no grid solves it, so change a clue")
    given = train.parse_args([f"--process={args.process}", *flags])
    if given.process != args.process:
        raise BadInput(f"--process {given.process} is not for this script, which is of "
                       f"{args.process}: leave it out")
    for name in "stage data tokenizer block_size init_from start_from resume".split():
        if getattr(given, name):
            raise BadInput(f"--{name} {getattr(given, name)} is not for this script, which sets it "
                           "itself: leave it out")
    for model, own in models_of(args).items():
        train.settings_of(options_of(args, own, flags), model.split()[0])


def claim(args):
    """A folder holds one story: the grids of one size, process and seed, which settings.json says.
    A story that was cut short goes on; one that was told, and another program's run, are kept."""
    mine = {"size": args.size, "process": args.process, "empty": args.empty, "seed": args.seed}
    path = args.out / "settings.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != mine:
            raise BadInput(f"{args.out} was begun with {theirs}, not {mine}: choose another folder "
                           "with --out")
        if (args.out / "sudoku.json").exists():
            raise BadInput(f"{args.out} holds a finished story, sudoku.json and its pictures: "
                           "choose another folder with --out, or move sudoku.json away to tell it "
                           "again")
    elif (args.out / "log.jsonl").exists():
        raise BadInput(f"{args.out} holds a run of another script, log.jsonl: choose another "
                       "folder with --out")
    else:
        checkpoint.write_json(path, mine)


def story(args, flags):
    refuse(args, flags)
    with checkpoint.lock_folder(args.out / "story"):       # train.py locks args.out itself
        claim(args)
        data = examples_in(args.out, args.size, args.seed)
        try:
            tell(args, flags, Grids(data) if args.empty else data)
        except KeyboardInterrupt:
            if args.size == 9:
                raise
            raise BadInput("stopped by Ctrl-C: networks of 4 x 4 are not kept, so start it "
                           "again") from None


def tell(args, flags, data):
    n = args.size
    process = Masked(data.K + 1) if args.process == "mdlm" else Uniform(data.K)
    nets = train_all(args, flags, data)
    records = evaluate(args, nets, process, data)
    solved = " ".join(f"solved_{clues}" for clues in CLUES[n])
    print(records_table(records, "model order ending steps passes excess rules valid entropy "
                                 f"agreement js kl seen {solved}"))
    where = checkpoint.provenance(args.seed, nets["teacher"].device) | {"size": n}
    where |= {"process": args.process, "empty": args.empty}
    append_records(args.out / "sudoku.json", [where | record for record in records])
    draw_rules(records, args.out / "rules.png")
    draw_filling(nets, process, empty_prompts(data, 1, n), n, args.out / "filling.png", args.seed)
    if args.puzzle:
        tokens, _ = write_texts(nets["idlm"], process, prompts_of([digits_of(args.puzzle)]), 16,
                                args.seed, None)
        grid = tokens[:, n * n:] - 1
        rules = score(grid, n)["rules"]
        written = as_text(np.where((grid[0] >= 1) & (grid[0] <= n), grid[0], 0))
        clues = np.array(digits_of(args.puzzle))
        changed = int(((clues > 0) & (clues != grid[0])).sum())
        print(f"{args.puzzle}\n{written}  {rules:.0%} of the rules kept, {changed} clues changed")
    print(f"wrote {args.out / 'sudoku.json'}")
