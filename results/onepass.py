# SPDX-License-Identifier: MIT
"""One pass: what lets the masked generator write a text in one pass, and how good is that text?

    python results/onepass.py first axes --jobs 5 --seconds 500     tasks, runs in order
    python results/onepass.py best --set scale=4 t_min=0.01 --updates 3600 --length 64 256
    python results/onepass.py merge                results/onepass/*.json -> results/onepass.json
    python results/onepass.py table                one row a variant, best one-pass text first
    python results/onepass.py plot --pick "gaussian" "latent-free"       -> assets/onepass.png
    python results/onepass.py first axes uniform best --tiny             all of it, on a CPU

Teachers and judges are trained where missing, in out/onepass/DATA_L/; put your own teacher.pt or
duo/teacher.pt there to start from it. A run is a process of its own, forked off with text, word
list and 20-grams in memory: it may change the program for a variant. It trains (eager: compiling
takes longer than a small network's run), samples, and writes results/onepass/NAME.json; a NAME
that is there is not run again.

overlap         share of equal tokens at equal positions, over all pairs of texts of a batch
overlap_excess  that less the same of held-out text: 0 where different z give different texts
copied20        share of a text's 20-grams that stand in the training text; held-out text beside it
gap_1 ... gap_4 the training gap, mean of each quarter of the run: does it still fall?
"""
import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
import evaluate
import generator
import idlm_loss
import train
from data import BadInput, TextData
from model import DiT, to_device
from teacher import EPS, stratified_times

BASE = dict(process="mdlm", latent="gaussian", where="embedding", dim=64, scale=1.0, share=0.5,
            told="sigma", start="teacher", uniform_update="hard", lr=1e-4, fake_lr=2e-4,
            fake_updates=1, t_min=EPS, dropout=0.1, clip=1.0, dtype="bfloat16",
            pairing="independent", updates=1200)
FREE, DUO = {"latent": "state"}, {"latent": "state", "process": "duo"}
TEACHER, DUO_TEACHER = {"latent": "state", "updates": 0}, DUO | {"updates": 0}
TASKS = {                                # most important first; a run without "seed" has seed 1
    "first": [TEACHER, {}, FREE, {"dropout": 0.0}, {"t_min": 0.01}, {"scale": 8.0}, {"scale": 3.0},
              {"scale": 0.35}, {"t_min": 0.01, "dropout": 0.0, "scale": 3.0}, {"told": "none"},
              {"fake_updates": 2}, {"where": "adaLN"}, {"where": "embedding+adaLN"},
              {"where": "tokens"}, {"share": 1.0}, {"lr": 2e-4, "fake_lr": 4e-4},
              {"seed": 2}, FREE | {"seed": 2}],
    "axes": [{"share": "annealed"}, {"share": 0.25}, {"lr": 5e-5}, {"lr": 3e-4, "fake_lr": 6e-4},
             {"fake_lr": 4e-4}, {"fake_updates": 4}, {"start": "latent-free"}, {"dim": 16},
             {"dim": 256}, {"scale": 0.5}, {"where": "text"}, {"told": "t"}, {"clip": 100.0},
             {"dtype": "float32"}, {"pairing": "matched"}, {"share": 1.0, "told": "none"},
             {"dropout": 0.0, "seed": 2}, {"t_min": 0.01, "seed": 2}, {"scale": 3.0, "seed": 2},
             {"where": "embedding+adaLN", "seed": 2}, {"updates": 3600}],
    "uniform": [DUO_TEACHER, DUO, DUO | {"uniform_update": "marginal"}, DUO | {"lr": 3e-5},
                DUO | {"uniform_update": "marginal", "lr": 3e-5}, DUO | {"seed": 2},
                DUO | {"uniform_update": "marginal", "seed": 2}],
    "best": [TEACHER, {"more": True}, FREE, {"more": True, "seed": 2}, FREE | {"seed": 2}],
}
STEPS, TEMPERATURES, COPY = (1, 2, 4, 8, 16), (0.9, 1.0, 1.1, 1.25, 1.6), 20
TEACHER_STEPS = (1, 2, 4, 8, 16, 32, 64, 256)
TINY = dict(size="2x2x16", updates=4, batch=8, texts=8, warm=4)
FULL = dict(size="8x6x384", updates=None, batch=128, texts=512, warm=6000)
COLUMNS = ("variant drawn steps temperature bits_per_char entropy known_words distinct4 "
           "gen_ppl_matched ngram_bits overlap_excess copied20 gap_1 gap_4 train_seconds")


# ---- what a variant changes in the program ------------------------------------------------------

class Network(DiT):
    """Where z enters: of 2 x dim numbers of a position, the first half are its own, the second
    half the text's (the same at every [MASK]).

    embedding  own, projected, added to the embedding: the program's        text  the text's, so
    adaLN      the text's, projected, added to the noise level's embedding  +     both
    tokens     own, as a random word at every second [MASK], its embedding added to that of [MASK]
    """
    where, start, z_scale, extra = "embedding", None, 1.0, 0

    def init_latent(self):
        super().init_latent()
        cond = self.sigma_map(torch.zeros(1, device=self.device))
        self.to_cond = nn.Linear(self.config.latent_dim, cond.shape[1], bias=False).to(cond)
        std = cond.std().item() * self.config.latent_scale / self.config.latent_dim ** 0.5
        nn.init.normal_(self.to_cond.weight, std=std)

    def load_state_dict(self, state, *args):
        start = self.start if self.config.latent_dim and self.start else {}
        return super().load_state_dict(state | start, *args)

    def hidden(self, x, sigma, z=None):
        self.extra = 0
        if z is None:
            return super().hidden(x, sigma)
        x, z, d = to_device(x, self.device), to_device(z, self.device) * self.z_scale, z.shape[-1]
        h, own = self.vocab_embed(x), z[..., :self.config.latent_dim]
        if d > self.config.latent_dim:                     # the text's: of its first [MASK]
            at = (z != 0).any(-1).float().argmax(1)
            text = z[torch.arange(len(z), device=z.device), at, self.config.latent_dim:]
        if self.where == "tokens":
            K = self.config.vocab_size - 1
            word = (torch.special.ndtr(own[..., 0]) * K).long().clamp(max=K - 1)
            h = h + self.vocab_embed(word) * (own[..., 1:2] > 0)
        if self.where == "text":
            h = h + self.latent_proj(text)[:, None] * (own != 0).any(-1, keepdim=True)
        if self.where.startswith("embedding"):
            h = h + self.latent_proj(own)
        if self.where.endswith("adaLN"):
            self.extra = self.to_cond(text)
        sigma = to_device(sigma, self.device).to(h.dtype)
        return self.trunk(h, sigma, *self.rotary_emb(h.shape[1]))

    def trunk(self, h, sigma, *rotary):                    # DiT's, with `extra`
        cond = F.silu(self.sigma_map(sigma) + self.extra)
        for block in self.blocks:
            h = block(h, cond, *rotary)
        return self.output_layer(h, cond)


def patch(run, start):
    """Called in the run's own process: nothing leaks into the next."""
    train.CLIP, train.FULL_NOISE = run["clip"], run["share"]
    train.stratified_times = partial(stratified_times, t_min=run["t_min"])
    if run["latent"] == "gaussian":
        train.DiT = checkpoint.DiT = Network
        Network.where, Network.start = run["where"], start and checkpoint.load(start)["ema"]
    own, update = generator.gaussian_latent, train.Trainee.update

    def own_and_texts(net, x, mask_id, rng):
        z = own(net, x, mask_id, rng)
        if z is None or run["where"] in ("embedding", "tokens"):
            return z
        texts = torch.randn(len(z), 1, z.shape[2], device=z.device,
                            generator=idlm_loss.device_rng(rng, z.device))
        return torch.cat([z, texts * (z != 0).any(-1, keepdim=True)], -1)

    def annealed(self, step, part, loss_of):
        train.FULL_NOISE = 1 - 0.75 * step / self.s.updates
        return update(self, step, part, loss_of)

    generator.gaussian_latent = own_and_texts
    if run["share"] == "annealed":
        train.Trainee.update = annealed
    if run["latent"] == "gaussian" and run["told"] != "sigma":
        say = {"none": torch.zeros_like, "t": lambda sigma: (1 - (-sigma).exp()) / (1 - EPS)}
        fake, gap = idlm_loss.masked_fake_loss, idlm_loss.masked_generator_loss
        tell = say[run["told"]]
        idlm_loss.masked_fake_loss = lambda *a: fake(*a[:5], tell(a[5]), *a[6:])
        idlm_loss.masked_generator_loss = lambda *a: gap(*a[:6], tell(a[6]), *a[7:])


# ---- one run ------------------------------------------------------------------------------------

def variant_of(run):
    kind = "latent-free" if run["latent"] == "state" else "gaussian"
    kind = kind if run["process"] == "mdlm" else f"uniform {run['uniform_update']}"
    if not run["updates"]:
        return "teacher" if run["process"] == "mdlm" else "uniform teacher"
    skip = ["process", "latent", "uniform_update"]         # the others only where they matter
    skip += ["where", "dim", "scale", "share", "told"] * (run["latent"] == "state")
    return " ".join([kind, *(f"{k}={run[k]}" for k, v in BASE.items() if k not in skip
                             and run[k] != v)])


def name_of(run):
    return f"{run['data']}_{run['length']}_{variant_of(run)}_{run['seed']}".replace(" ", "_")


def folder_of(run, process=""):
    return Path("out/onepass", f"{run['data']}_{run['length']}", process)


def teacher_of(run):
    return folder_of(run, "" if run["process"] == "mdlm" else "duo") / "teacher.pt"


def start_of(run):                       # the latent-free generator that a run goes on from
    free = run | FREE | {"start": "teacher", "seed": 1}
    return run["start"] == "latent-free" and folder_of(run) / name_of(free) / "idlm.pt"


def overlap(tokens):                                       # (N, L) -> float
    n, same = len(tokens), 0.0
    for column in tokens.T:
        count = np.unique(column, return_counts=True)[1]
        same += (count * (count - 1)).sum() / (n * (n - 1))
    return float(same / tokens.shape[1])


def grams(tokens, n):                                      # (..., L) -> (..., L - n + 1) hashes
    code, at = np.zeros(1, np.uint64), tokens.shape[-1] - n + 1
    for j in range(n):                                     # modulo 2^64: two collide once in 10^19
        code = code * np.uint64(0x9E3779B97F4A7C15) + tokens[..., j:j + at].astype(np.uint64)
    return code


def work(run, sizes, args, data, words, known, gpu):
    """Train and evaluate one run; a process of its own."""
    if args.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)      # before this process first asks for it
    torch.set_float32_matmul_precision("high")
    device, out = torch.device(args.device), folder_of(run) / name_of(run)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    log, path, trained = open(out / "log.txt", "w", buffering=1), teacher_of(run), {}
    with redirect_stdout(log):
        if run["updates"]:
            patch(run, start_of(run))
            began, path = time.time(), out / "idlm.pt"
            flags = {k: run[k] for k in ("process", "latent", "lr", "fake_lr", "fake_updates",
                                         "dropout", "dtype", "pairing", "updates", "seed")}
            flags |= dict(uniform_update=run["uniform_update"], init_from=teacher_of(run), out=out,
                          block_size=run["length"], batch_size=sizes["batch"], data=args.data,
                          micro_batch=sizes["batch"], tokenizer="char", device=args.device)
            if run["latent"] == "gaussian":
                flags["latent"] = f"gaussian:{run['dim']}:{run['scale']}"
            train.PRESETS["gpu"]["save_every"] = 10 ** 9
            train.run_stage(train.parse_args(["--preset", "gpu", "--stage", "idlm", "--no-compile",
                                              *(f"--{k}={v}" for k, v in flags.items())]),
                            "idlm", data)
            rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
            trained = {"train_seconds": time.time() - began, "start": run["start"]}
            for i, quarter in enumerate(np.array_split(rows, 4), 1):
                trained |= {f"{k}_{i}": float(np.mean([row[k] for row in quarter] or [math.nan]))
                            for k in ("gap", "fake", "grad")}
        Network.start = None                               # a trained generator is loaded as it is
        net, meta = checkpoint.load_network(path, device, run["process"])
        judge = evaluate.find_judge(str(folder_of(run) / "judge.pt"), data, device, out, meta)
        endings = ["ancestral", "greedy"] if run["process"] == "duo" else ["ancestral"]
        model = "idlm" if run["updates"] else "teacher"
        steps = STEPS if run["updates"] else [n for n in TEACHER_STEPS if n <= run["length"]]
        evaluate.RESAMPLES, evaluate.ngram_judge = 200, lambda data: words   # built once, before
        data.train_text = lambda: known
        sampler, found, texts = generator.sample, [], [data.val_blocks(2 * sizes["texts"])[::2]]
        real = overlap(texts[0].numpy())
        ways = [("fresh z", {}, 1.0, steps)] + [
            ("fixed z", {"fixed_z": True}, 1.0, (4, 16)), ("1.25 z", {}, 1.25, (1, 4)),
            ("1.5 z", {}, 1.5, (1,))] * bool(run.get("more") and run["latent"] == "gaussian")
        for drawn, how, Network.z_scale, steps in ways:
            del texts[1:]

            def stash(*args, **kwargs):
                made = sampler(*args, **kwargs, **how)
                texts.append(made.tokens)
                return made

            evaluate.sample = stash
            records = evaluate.evaluate_models(
                {model: (net, checkpoint.make_process(meta), endings)}, data, judge, steps=steps,
                temperatures=TEMPERATURES, num_texts=sizes["texts"], seed=run["seed"],
                judge_name="ar")
            for record, tokens in zip(records, texts, strict=True):
                x = tokens.numpy()
                code, train_codes = grams(x, COPY), args.grams
                at = np.searchsorted(train_codes, code).clip(max=len(train_codes) - 1)
                record |= {"overlap": overlap(x), "overlap_excess": overlap(x) - real,
                           "copied20": float((train_codes[at] == code).mean())}
                if not record["real"]:
                    record |= {"variant": variant_of(run), "drawn": drawn} | trained | (
                        {k: run[k] for k in BASE} if run["updates"] else {})
            found += records[bool(found):]
    provenance = checkpoint.provenance(run["seed"], device)
    provenance["commit"] = args.commit or provenance["commit"]
    evaluate.write_json(args.records / (name_of(run) + ".json"), [
        provenance | {"data": run["data"], "real": False} | record for record in found])


# ---- all runs -----------------------------------------------------------------------------------

def runs_of(args):
    """The runs of the tasks that have no records yet, in order."""
    base, chosen = BASE | {"updates": args.updates or BASE["updates"]}, {}
    for key, _, value in (pair.partition("=") for pair in args.set):
        if key not in BASE:
            raise BadInput(f"--set {key}: no such setting, choose from {' '.join(BASE)}")
        base[key] = value if value == "annealed" else type(BASE[key])(value)
    for length in args.length:
        for change in (change for task in args.tasks for change in TASKS[task]):
            run = {"seed": 1} | base | {"data": args.name, "length": length} | change
            run["updates"] = min(run["updates"], TINY["updates"] if args.tiny else 10 ** 9)
            if not (args.records / (name_of(run) + ".json")).exists():
                chosen.setdefault(name_of(run), run)
    return [*chosen.values()]


def prepare(runs, sizes, args):
    """Teachers and judges that are missing, all at once."""
    wanted, started = {}, []
    for run in runs:
        wanted[teacher_of(run)] = ("teacher", run)
        wanted[folder_of(run) / "judge.pt"] = ("judge", run)
    for path, (stage, run) in wanted.items():
        found = checkpoint.load(path) if path.exists() else {"step": -1, "updates": 0}
        if found["step"] < found["updates"]:               # missing, or killed halfway
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = dict(stage=stage, preset="gpu", process=run["process"], out=path.parent,
                         data=args.data, tokenizer="char", block_size=run["length"], seed=1,
                         size=sizes["size"], batch_size=sizes["batch"], device=args.device,
                         micro_batch=sizes["batch"],
                         updates=sizes["warm"] // (2 if stage == "judge" else 1))
            command = [sys.executable, ROOT / "train.py", "--no-compile", "--resume",
                       *(f"--{k}={v}" for k, v in flags.items())]
            env = os.environ | {"CUDA_VISIBLE_DEVICES": str(args.gpu[len(started) % len(args.gpu)])}
            started.append((path, subprocess.Popen(command, env=env, stderr=subprocess.STDOUT,
                                                   stdout=open(f"{path}.log", "w"))))
    return started


def go(args):
    began, sizes = time.time(), TINY if args.tiny else FULL
    if not (runs := runs_of(args)):
        return print(f"nothing to run: all of it is in {args.records}")
    source = {length: TextData(args.data, "char", length) for length in args.length}
    started, data = prepare(runs, sizes, args), next(iter(source.values()))
    torch.set_num_threads(1)             # forked processes must not find threads that are not there
    # Every word once, a text of which the known words are found as fast as it is short
    known = " " + " ".join(set(evaluate.whole_words(data.train_text()))) + " "
    words, args.grams = evaluate.ngram_judge(data), np.sort(grams(np.asarray(data.train), COPY))
    for path, process in started:
        if process.wait():
            raise BadInput(f"training {path} failed: see {path}.log")
    print(f"{len(runs)} runs; teachers and judges there after {time.time() - began:.0f} s")
    slots = dict.fromkeys(range(args.jobs * len(args.gpu)))
    while runs or any(slots.values()):
        for slot, busy in slots.items():
            if busy and not busy[0].is_alive():
                process, run, since = busy
                print(f"{time.time() - began:.0f} s: {name_of(run)}, {time.time() - since:.0f} s, "
                      f"{'done' if process.exitcode == 0 else 'FAILED'}", flush=True)
                slots[slot] = None
            late = time.time() - began > args.seconds
            ready = [run for run in runs if not start_of(run) or start_of(run).exists()]
            if slots[slot] is None and ready and not late:
                runs.remove(run := ready[0])
                process = multiprocessing.get_context("fork").Process(target=work, args=(
                    run, sizes, args, source[run["length"]], words, known,
                    args.gpu[slot % len(args.gpu)]))
                process.start()
                slots[slot] = process, run, time.time()
        if not any(slots.values()) and runs:               # too late, or a start that never came
            return print(f"{len(runs)} runs left: {', '.join(map(name_of, runs))}")
        time.sleep(0.1)


# ---- tables and a figure ------------------------------------------------------------------------

def merge(args):
    """All runs in one list; held-out text once for each text and length; intervals of the bits
    and of the matched gen_ppl alone, for the size of the file."""
    found, real = [], {}
    for path in sorted(args.records.glob("*.json")):
        for record in evaluate.load_records(path):
            record = {k: v for k, v in record.items() if not k.endswith("_ci")
                      or k in ("bits_per_char_ci", "gen_ppl_matched_ci")}
            if not record["real"]:
                found.append(record)
            elif record["seed"] == 1:
                real.setdefault((record["data"], record["block_size"]), record)
    evaluate.write_json(args.merged, [*real.values(), *found])


def groups(args):
    """For each text and length: rows at temperature 1, seeds averaged, best one-pass text first."""
    rows = [r for r in evaluate.average(evaluate.load_records(args.merged))
            if r.get("temperature") in (None, 1)]
    first = {r.get("variant", ""): r["bits_per_char"] for r in rows[::-1] if r.get("steps", 1) == 1}
    rows.sort(key=lambda r: (first[r.get("variant", "")], *(
        r.get(key, "") for key in ("variant", "sampler", "drawn")), r.get("steps", 0)))
    for key in dict.fromkeys((r["data"], r["block_size"]) for r in rows):
        yield "{}, {} characters".format(*key), [r for r in rows if (
            r["data"], r["block_size"]) == key]


def table(args):
    for title, rows in groups(args):
        print(f"\n{title}\n{evaluate.records_table(rows, COLUMNS)}")


def plot(args):
    """Bits per character against passes, its entropy beside each point."""
    from matplotlib.figure import Figure
    found = [*groups(args)]
    figure = Figure((5.5 * len(found), 4.2), dpi=180, layout="constrained")
    for ax, (title, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        for i, variant in enumerate(["teacher", *args.pick]):
            line = [r for r in rows if r.get("variant") == variant and r["drawn"] == "fresh z"
                    and r["sampler"] == "ancestral"]
            x, y = ([r[key] for r in line] for key in ("passes", "bits_per_char"))
            ax.plot(x, y, "o-", color=f"C{i}", ms=4, lw=1.3, label=variant)
            for r, *at in zip(line, x, y):
                ax.annotate(f"{r['entropy']:.2f}", at, (4, 3), color=f"C{i}", fontsize=7,
                            textcoords="offset points")
        real = next(r for r in rows if r["real"])
        ax.axhline(real["bits_per_char"], color="black", ls="--", lw=1,
                   label=f"held-out text, entropy {real['entropy']:.2f}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=title, xlabel="network passes (beside a point: entropy)",
               ylabel="bits per character, autoregressive judge")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(args.figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("tasks", nargs="+", choices=[*TASKS, "merge", "table", "plot"])
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help=f"of all runs: {' '.join(BASE)}")
    add("--updates", type=int, help=f"default {BASE['updates']}")
    add("--length", nargs="+", type=int, default=[64])
    add("--data", default=os.environ.get("NOVELS") or "data/shakespeare.txt", help="or set NOVELS")
    add("--jobs", type=int, default=1, help="runs at once on a GPU")
    add("--gpu", nargs="+", type=int, default=[0])
    add("--seconds", type=float, default=math.inf, help="start no run after that")
    add("--device", default="cuda")
    add("--commit", help="where git is missing")
    add("--pick", nargs="+", default=["latent-free", "gaussian"], help="plot: variants")
    add("--tiny", action="store_true", help="on a CPU, networks of no use, in out/onepass/tiny")
    args = p.parse_args()
    args.name = "novels" if "novel" in args.data else Path(args.data).stem
    args.records, args.merged = Path("results/onepass"), Path("results/onepass.json")
    args.figure = Path("assets/onepass.png")
    if args.tiny:
        args.records = Path("out/onepass/tiny")
        args.merged, args.figure = Path("out/onepass/tiny.json"), Path("out/onepass/tiny.png")
        args.device, args.data, args.name, args.length = "cpu", "README.md", "README", [32]
    then = [task for task in args.tasks if task not in TASKS]
    args.tasks = [task for task in args.tasks if task in TASKS]
    if args.tasks:
        go(args)
    for task in then:
        {"merge": merge, "table": table, "plot": plot}[task](args)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"onepass.py: {error}")
