# SPDX-License-Identifier: MIT
"""One pass: what lets the masked generator write a text in one pass, and how good is that text?

    python results/onepass.py first axes --jobs 5 --seconds 500     tasks, runs in order
    python results/onepass.py best --set scale=4 updates=3600 --length 64 256
    python results/onepass.py best --tokenizer gpt2 --length 256 --compile
    python results/onepass.py merge table          a row a variant, the best one-pass text first
    python results/onepass.py merge plot           results/onepass.json and assets/onepass.png
    python results/onepass.py merge plot --pick "a name: gaussian scale=3.0" "latent-free"
    python results/onepass.py first axes uniform best --tiny             all of it, on a CPU

Teachers and judges are trained where missing, in out/onepass/DATA_L/ (with GPT-2's words
out/onepass/DATA-gpt2_L/); your own teacher.pt, judge.pt or duo/teacher.pt there are taken as they
are. A run is a process of its own, forked off with the text in memory: it may change the program
for a variant. It trains, samples, and writes results/onepass/NAME.json at once and whole; a NAME
that is there is not run again. SIGTERM stops it all and leaves nothing half-written.

merge adds the runs to results/onepass.json: README's table has the variants of --pick, each by its
LABEL; the others of as many updates as BASE says, with 1 or 16 steps, are "screen", a table of its
own, the rest is "extra".
Temperatures as in evaluate.py: as many as bracket the entropy of held-out text, at most 6.

overlap         share of equal tokens at equal positions, over all pairs of texts of a batch
overlap_excess  that less the same of held-out text: 0 where different z give different texts
copied          share of a text's 20-grams (of GPT-2's words 5-grams, which are about as long) that
                stand in the training text; held-out text beside it
gap_1 ... gap_4 the training gap, mean of each quarter of the run: does it still fall?
"""
import argparse
import atexit
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):     # many processes, few cores
    os.environ.setdefault(name, "1" if name[0] == "O" else "3")
import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock               # comes with torch
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

BASE = dict(process="mdlm", latent="gaussian", where="embedding", dim=64, scale=1.0, share=0.25,
            beside="none", told="sigma", start="teacher", uniform_update="hard", lr=1e-4,
            fake_lr=2e-4, fake_updates=1, t_min=0.01, dropout=0.1, clip=1.0, dtype="bfloat16",
            pairing="matched", batch=128, updates=1200, beta=1.0, beta_at="all", every=4,
            full_t_min=0.0, law="as it is", ema=0.99, visible_beta=1.0)
# The program since; BASE has what the first runs had, and told=sigma what it has of gaussian.
# law=fitted: for one pass at temperature 0.85; cold: at 0.5; passes: for each number of passes
NOW = {"told": "blank", "law": "passes", "ema": 0.998}
FREE = {"latent": "state", "t_min": EPS}
TEACHER, DUO = FREE | {"updates": 0}, FREE | {"process": "duo"}
TASKS = {                                # most important first; a run without "seed" has seed 1
    "first": [TEACHER, {}, FREE, {"beta": 1.1}, {"beta": 1.1, "fake_updates": 2}, {"beta": 1.2},
              {"beside": "fresh"}, {"fake_updates": 2}, {"t_min": EPS},
              {"pairing": "independent"}, {"share": 0.5}, {"dropout": 0.0}, {"scale": 3.0},
              {"where": "embedding+adaLN"}, {"told": "none"}, {"share": 0.1}, {"share": 1.0},
              {"latent": "words"}, {"lr": 2e-4, "fake_lr": 4e-4}],
    "axes": [{"beside": "fixed"}, {"scale": 0.35}, {"lr": 5e-5}, {"where": "adaLN"},
             {"lr": 3e-4, "fake_lr": 6e-4}, {"fake_lr": 4e-4}, {"fake_updates": 4}, {"scale": 8.0},
             {"start": "latent-free"}, {"dim": 16}, {"dim": 256}, {"where": "text"},
             {"clip": 100.0}, {"share": 1.0, "told": "none"}, {"dtype": "float32"},
             {"updates": 3600}, {"seed": 2}, FREE | {"seed": 2}, FREE | {"pairing": "independent"},
             {"beside": "fresh", "seed": 2}, {"fake_updates": 2, "seed": 2},
             {"t_min": EPS, "seed": 2}, {"dropout": 0.0, "seed": 2}],
    # with --set fake_updates=2 dropout=0 beta=1.1: which of these is worth a long run?
    "screen": [TEACHER, {}, {"beta": 1.0}, {"beta": 1.3, "beta_at": "full"}, {"t_min": 0.1},
               {"share": 0.5}, {"fake_updates": 4}, FREE, {"scale": 3.0},
               {"lr": 2e-4, "fake_lr": 4e-4}, {"fake_lr": 6e-4}, {"t_min": 0.3},
               {"beta": 1.2, "beta_at": "full"}, {"dim": 256}, {"share": 1.0}],
    "uniform": [DUO | {"updates": 0}, DUO | {"pairing": "matched:1"},
                DUO | {"pairing": "matched:4"},
                DUO | {"pairing": "matched:1", "uniform_update": "marginal"}],
    "teacher": [TEACHER], "plain": [{}], "one": [{"more": True}], "free": [FREE],  # what --set says
    "best": [TEACHER, {"more": True}, FREE, {"more": True, "seed": 2}, FREE | {"seed": 2}],
}
STEPS, DUO_STEPS = (1, 2, 4, 8, 16), (1, 4, 8, 16, 32, 64)               # DUO: its teacher
TEACHER_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHOWN = {"teacher": (8, 16, 32, 128, 256), "others": (1, 4, 8, 16)}      # passes, in README
SET, BLANK = "fake_updates=2 dropout=0.0", "beta=1.25 beta_at=full"
FAST, AUTO = "lr=0.0002 fake_lr=0.001", "beta=auto beta_at=full {}full_t_min=0.3"
NOVELS = "fake_lr=0.0003 fake_updates=2 {}dropout=0.0 batch=64 updates=1500"
LAW = "law=passes ema=0.998"
EVERY = f"beta_at=full every=8 full_t_min=0.3 {LAW}"
WORDS = f"words share={{}} told=blank {FAST} t_min=0.001 dropout=0.0"
PICK = [f"latent-free, from [MASK]: latent-free {FAST} dropout=0.0 every=0 {LAW}",
        f"latent-free, from [MASK]: latent-free {FAST} dropout=0.0 updates=1500 every=0 {LAW}",
        f"latent-free, from [MASK]: latent-free {NOVELS.format('')} every=0 {LAW}",
        f"latent-free, from [MASK]: latent-free {FAST} t_min=0.3 dropout=0.0 updates=5000",
        f"latent-free, from [MASK]: latent-free {SET} updates=3500",
        f"latent-free, from [MASK]: latent-free {SET} batch=64 updates=2000",
        f"latent-free, from [MASK]: latent-free {FAST} dropout=0.0 beta=auto",
        f"words, not trained for: latent-free {FAST} dropout=0.0 every=8 {LAW}",
        f"words, not trained for: latent-free {FAST} dropout=0.0 updates=1500 every=8 {LAW}",
        f"words, not trained for: latent-free {NOVELS.format('')} {LAW}",
        f"words: {WORDS.format(0.05)} {EVERY} visible_beta=0.9",
        f"words: {WORDS.format(0.05)} updates=1500 {EVERY} visible_beta=0.9",
        f"words: words share=0.1 told=blank {NOVELS.format('t_min=0.001 ')} {AUTO.format('')} {LAW}",
        f"words, beta 1 in all: {WORDS.format(0.1)} {EVERY}",
        f"gaussian: gaussian {SET} updates=4500 {BLANK}",       # 64, then 256 characters,
        f"gaussian: gaussian {SET} updates=3500 {BLANK}",
        f"gaussian: gaussian {SET} batch=64 updates=2000",      # then GPT-2's words
        f"uniform marginal: uniform marginal {FAST} dropout=0.0 pairing=matched:1 beta=auto"]
COPY = {"char": 20, "gpt2": 5}
METRICS = {"char": "gen_ppl bits_per_char entropy known_words distinct4 gm".split(),
           "gpt2": "gen_ppl entropy distinct4 gm".split()}
TINY = dict(size="2x2x16", updates=4, batch=8, texts=8, warm=4)
FULL = dict(size="8x6x384", texts=512, warm=6000)


# ---- what a variant changes in the program ------------------------------------------------------

class Network(DiT):
    """Where z enters: of 2 x dim numbers of a position, the first half are its own, the second
    half the text's (the same at every [MASK]).

    embedding  own, projected, added to the embedding: the program's        text  the text's, so
    adaLN      the text's, projected, added to the noise level's embedding  +     both

    In texts that are all [MASK]; with beside=fresh at every [MASK], with fixed the same z at every
    pass over a text.
    """
    where, start, z_scale = "embedding", None, 1.0

    def init_latent(self):
        super().init_latent()
        if not self.where.endswith("adaLN"):
            return
        cond = self.sigma_map(torch.zeros(1, device=self.device))
        self.to_cond = nn.Linear(self.config.latent_dim, cond.shape[1], bias=False).to(cond)
        std = cond.std().item() * self.config.latent_scale / self.config.latent_dim ** 0.5
        nn.init.normal_(self.to_cond.weight, std=std)

    def load_state_dict(self, state, *args):
        start = self.start if self.config.latent_dim and self.start else {}
        start = {k: v for k, v in start.items() if k in state}       # not the words it begins with
        return super().load_state_dict(state | start, *args)

    def hidden(self, x, sigma, z=None):
        if z is None:
            return super().hidden(x, sigma)
        x, z, d = to_device(x, self.device), to_device(z, self.device) * self.z_scale, z.shape[-1]
        h, own = self.vocab_embed(x), z[..., :self.config.latent_dim]
        if d > self.config.latent_dim:                     # the text's: of its first [MASK]
            at = (z != 0).any(-1).float().argmax(1)
            text = z[torch.arange(len(z), device=z.device), at, self.config.latent_dim:]
        if self.where == "text":
            h = h + self.latent_proj(text)[:, None] * (own != 0).any(-1, keepdim=True)
        if self.where.startswith("embedding"):
            h = h + self.latent_proj(own)
        extra = (self.to_cond(text),) if self.where.endswith("adaLN") else ()
        sigma = to_device(sigma, self.device).to(h.dtype)
        return self.trunk(h, sigma, *self.drawn(h), *extra)

    def trunk(self, h, sigma, cos, sin, keep, extra=0):    # DiT's, with `extra`
        cond = F.silu(self.sigma_map(sigma) + extra)
        for i, block in enumerate(self.blocks):
            h = block(h, cond, cos, sin, None if keep is None else keep[i])
        return self.output_layer(h, cond)


def patch(run, start=None):
    """Called in the run's own process: nothing leaks into the next."""
    train.CLIP, train.FULL_NOISE = run["clip"], {run["latent"]: run["share"]}
    train.PRESETS["gpu"]["mdlm idlm"]["ema"] = run["ema"]
    train.VISIBLE_BETA = {run["latent"]: run["visible_beta"]} if run["latent"] != "state" else {}
    train.FULL_NOISE_T_MIN = run["full_t_min"]
    train.stratified_times = lambda B, rng: stratified_times(B, rng, run["t_min"])
    if run["latent"] == "gaussian":
        train.DiT = checkpoint.DiT = Network
        Network.where, Network.start = run["where"], start and checkpoint.load(start)["ema"]
    if run["latent"] != "state" and run["beta_at"] == "all":        # also beside visible words
        gap = idlm_loss.masked_generator_loss
        idlm_loss.masked_generator_loss = lambda *a, beta: gap(*a, beta=run["beta"])
    own, first = generator.added_latent, None

    def own_and_texts(net, x, mask_id, rng):
        nonlocal first
        z = own(net, x, mask_id, rng)
        if z is None:
            return z
        if run["beside"] != "none":                        # at every [MASK], beside words too
            z = own(net, torch.full_like(x, mask_id), mask_id, rng)
            first = z if (x == mask_id).all() or first is None else first
            if run["beside"] == "fixed" and not net.training and len(first) == len(z):
                z = first                                  # of the pass that began these texts
            z = z * to_device(x == mask_id, z.device)[..., None]
        if run["where"] == "embedding":
            return z
        texts = torch.randn(len(z), 1, z.shape[2], device=z.device,
                            generator=idlm_loss.device_rng(rng, z.device))
        return torch.cat([z, texts * (z != 0).any(-1, keepdim=True)], -1)

    generator.added_latent = own_and_texts
    if run["law"] == "as it is":
        train.fit_words = lambda *args: 1.0
    if run["latent"] != "state" and run["told"] == "none":
        fake, loss = idlm_loss.masked_fake_loss, idlm_loss.masked_generator_loss
        idlm_loss.masked_fake_loss = lambda *a: fake(*a[:5], 0 * a[5], *a[6:])
        idlm_loss.masked_generator_loss = lambda *a, **how: loss(*a[:6], 0 * a[6], *a[7:], **how)


# ---- one run ------------------------------------------------------------------------------------

def variant_of(run):
    kind = "latent-free" if run["latent"] == "state" else run["latent"]
    kind = kind if run["process"] == "mdlm" else f"uniform {run['uniform_update']}"
    if not run["updates"]:
        return "teacher" if run["process"] == "mdlm" else "uniform teacher"
    skip = ["process", "latent", "uniform_update"]         # the others only where they matter
    skip += ["where", "dim", "scale", "beside", "start"] * (run["latent"] != "gaussian")
    skip += ["share", "told", "beta_at", "full_t_min", "visible_beta"] * (run["latent"] == "state")
    skip += ["every", "law"] * (run["latent"] == "gaussian" or run["process"] == "duo")
    skip += ["ema"] * (run["process"] == "duo")
    skip += ["t_min"] * (run["latent"] == "state" and run["t_min"] == EPS)
    found = {k: run[k] for k, v in BASE.items() if k not in skip and run[k] != v}
    if "beta" in found:
        found["beta"] = run["beta"] or "auto"
    return " ".join([kind, *(f"{k}={v}" for k, v in found.items())])


def name_of(run):
    return f"{run['data']}_{run['length']}_{variant_of(run)}_{run['seed']}".replace(" ", "_")


def folder_of(run):
    return Path("out/onepass", f"{run['data']}_{run['length']}")


def needs_of(run):
    """Files: teacher, judge, and perhaps the latent-free generator that a run goes on from."""
    folder, goes_on = folder_of(run), run["start"] == "latent-free" and run["latent"] == "gaussian"
    found = [folder / ("duo" * (run["process"] == "duo")) / "teacher.pt", folder / "judge.pt"]
    return found + [folder / name_of(run | FREE | {"seed": 1}) / "idlm.pt"] * goes_on


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


def train_run(run, out, args, data):
    """-> what its records say of the training"""
    began, (teacher, _, *start) = time.time(), needs_of(run)
    patch(run, *start)
    flags = {k: run[k] for k in ("process", "latent", "uniform_update", "lr", "fake_lr", "dropout",
                                 "fake_updates", "dtype", "pairing", "updates", "seed")}
    flags |= dict(init_from=teacher, out=out, block_size=run["length"], data=args.data,
                  batch_size=run["batch"], micro_batch=run["batch"], tokenizer=args.tokenizer,
                  device=args.device)
    if run["latent"] == "gaussian":
        flags["latent"] = f"gaussian:{run['dim']}:{run['scale']}:{run['beta'] or 'auto'}"
    elif run["latent"] == "words":
        flags["latent"] = f"words:{run['every']}:{run['beta'] or 'auto'}"
    elif run["process"] == "mdlm":
        flags["latent"] = f"state:{run['every']}:{run['beta'] or 'auto'}"
    if run["uniform_update"] == "marginal":
        flags["uniform_update"] = f"marginal:{run['beta'] or 'auto'}"
    train.PRESETS["gpu"]["save_every"] = 10 ** 9
    train.run_stage(train.parse_args(["--preset", "gpu", "--stage", "idlm", args.compile,
                                      *(f"--{k}={v}" for k, v in flags.items())]), "idlm", data)
    idlm_loss.COMPILE, Network.start = False, None         # sampling: as evaluate.py, as it is
    rows = [json.loads(row) for row in (out / "log.jsonl").read_text().splitlines()]
    trained = {k: run[k] for k in BASE} | {"train_seconds": time.time() - began}
    for i, quarter in enumerate(np.array_split(rows, 4), 1):
        trained |= {f"{k}_{i}": float(np.mean([row[k] for row in quarter] or [math.nan]))
                    for k in ("gap", "fake", "grad", *(k for k in rows[0] if k.startswith("beta")))}
    return trained


def work(run, sizes, args, data, gpu):
    """Train and evaluate one run; a process of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if args.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)      # before this process first asks for it
    torch.set_float32_matmul_precision("high")
    device, out = torch.device(args.device), folder_of(run) / name_of(run)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with redirect_stdout(open(out / "log.txt", "w", buffering=1)):
        trained = train_run(run, out, args, data) if run["updates"] else {}
        teacher, judge, *_ = needs_of(run)
        path = out / "idlm.pt" if trained else teacher
        net, meta = checkpoint.load_network(path, device, run["process"])
        judge = evaluate.find_judge(str(judge), data, device, out, meta)
        model, steps, endings = "idlm" if trained else "teacher", STEPS, ["ancestral"]
        if run["process"] == "duo":
            steps = DUO_STEPS if not trained else (1,) if run["pairing"] == "matched:1" else STEPS
            endings = ["ancestral", "greedy"]
        elif not trained:
            steps = [n for n in TEACHER_STEPS if n <= run["length"]]
        steps = args.steps or steps
        evaluate.RESAMPLES = 200
        data.train_text = lambda: args.known
        sampler, found, texts = generator.sample, [], [data.val_blocks(2 * sizes["texts"])[::2]]
        real, n = overlap(texts[0].numpy()), COPY[args.tokenizer]
        ways = [("fresh z", 1.0, steps, net.config.latent_words)] + [
            ("1.25 z", 1.25, (1, 4), 0), ("1.5 z", 1.5, (1,), 0)] * bool(
                run.get("more") and run["latent"] == "gaussian")
        words = trained and run["process"] == "mdlm" and run["latent"] != "gaussian" and run["every"]
        if words:
            ways.append(("fresh z", 1.0, [n for n in steps if n > 1], 0))        # from [MASK], too
        for drawn, Network.z_scale, steps, net.config.latent_words in ways:
            del texts[1:]

            def stash(*args, **kwargs):
                made = sampler(*args, **kwargs)
                texts.append(made.tokens)
                return made

            evaluate.sample = stash
            records = evaluate.evaluate_models(
                {model: (net, checkpoint.make_process(meta), endings)}, data, judge, steps=steps,
                num_texts=sizes["texts"], seed=run["seed"], metrics=METRICS[args.tokenizer],
                judge_name="ar", schedules=["linear"] if run["process"] == "duo" else args.schedule)
            for record, tokens in zip(records, texts, strict=True):
                x = tokens.numpy()
                code = grams(x, n)
                at = np.searchsorted(args.grams, code).clip(max=len(args.grams) - 1)
                record |= {"overlap": overlap(x), "overlap_excess": overlap(x) - real,
                           "copied": float((args.grams[at] == code).mean())}
                if not record["real"]:
                    record |= {"variant": variant_of(run), "drawn": drawn} | trained
                    if words and not net.config.latent_words:
                        record |= {"every": 0, "variant": variant_of(run | {"every": 0})}
            found += records[bool(found):]
    provenance = checkpoint.provenance(run["seed"], device)
    provenance["commit"] = args.commit or provenance["commit"]
    evaluate.write_json(args.records / (name_of(run) + ".json"), [
        provenance | {"data": run["data"], "real": False} | record for record in found])


# ---- all runs -----------------------------------------------------------------------------------

def runs_of(sizes, args):
    """The runs of the tasks that have no records yet, in order."""
    base, chosen = {"seed": 1} | BASE | NOW, {}
    for key, _, value in (pair.partition("=") for pair in args.set):
        if key not in base:
            raise BadInput(f"--set {key}: no such setting, choose from {' '.join(base)}")
        base[key] = type(base[key])(value)
    for key, there, commit in (("told", ("none", "blank"), "689c284"),
                               ("law", ("as it is", "passes"), "81552f9")):
        if base[key] not in there:
            raise BadInput(f"--set {key}={base[key]}: choose from {', '.join(there)}; commit "
                           f"{commit} has the rest")
    for length in args.length:
        for change in (change for task in args.tasks for change in TASKS[task]):
            run = base | {"data": args.name, "length": length} | change
            run |= {k: min(run[k], sizes.get(k, run[k])) for k in ("updates", "batch")}
            if run["latent"] == "gaussian" and run["told"] == "blank":   # there the program tells all
                run["told"] = "sigma"
            if not (args.records / (name_of(run) + ".json")).exists():
                chosen.setdefault(name_of(run), run)
    return [*chosen.values()]


def prepare(runs, sizes, args):
    """Start to train the teachers and judges that are missing. -> their paths and processes"""
    wanted, started = {}, {}
    for run in runs:
        wanted |= zip(needs_of(run), (("teacher", run), ("judge", run)))
    for path, (stage, run) in wanted.items():
        found = checkpoint.load(path) if path.exists() else {"step": -1, "updates": 0}
        if found["step"] < found["updates"]:               # missing, or killed halfway
            path.parent.mkdir(parents=True, exist_ok=True)
            batch = sizes.get("batch", BASE["batch"])
            flags = dict(stage=stage, preset="gpu", process=run["process"], out=path.parent,
                         data=args.data, tokenizer=args.tokenizer, block_size=run["length"], seed=1,
                         size=sizes["size"], batch_size=batch, micro_batch=batch,
                         device=args.device, updates=sizes["warm"] // (1 + (stage == "judge")))
            command = [sys.executable, ROOT / "train.py", args.compile, "--resume",
                       *(f"--{k}={v}" for k, v in flags.items())]
            env = os.environ | {"CUDA_VISIBLE_DEVICES": str(args.gpu[len(started) % len(args.gpu)])}
            with open(f"{path}.log", "w") as log:
                started[path] = subprocess.Popen(command, env=env, stdout=log, stderr=log)
                atexit.register(started[path].terminate)
    return started


def remember(args, data):
    """The known words, and the hashes of all n-grams, of the training text; found once (20 s)."""
    path, known = Path("out/onepass", f"{args.name}_{len(data.train)}.npz"), ""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            if args.tokenizer == "char":           # every word once: a text whose words are few
                known = f" {' '.join(sorted(set(evaluate.whole_words(data.train_text()))))} "
            codes = np.sort(grams(np.asarray(data.train), COPY[args.tokenizer]))
            checkpoint.write_whole(path, lambda file: np.savez(file, known=known, grams=codes))
        with np.load(path) as found:
            args.known, args.grams = str(found["known"]), found["grams"]


def go(args):
    began, sizes = time.time(), TINY if args.tiny else FULL | {"texts": args.texts}
    if not (runs := runs_of(sizes, args)):
        return print(f"nothing to run: all of it is in {args.records}")
    source = {length: TextData(args.data, args.tokenizer, length) for length in args.length}
    torch.set_num_threads(1)             # forked processes must not find threads that are not there
    training = prepare(runs, sizes, args)
    remember(args, next(iter(source.values())))
    print(f"{len(runs)} runs; text ready after {time.time() - began:.0f} s, {len(training)} "
          "teachers or judges in training", flush=True)
    slots, longest = dict.fromkeys(range(args.jobs * len(args.gpu))), 0
    while runs or any(slots.values()):
        for path in [path for path, process in training.items() if process.poll() is not None]:
            failed = training.pop(path).returncode
            print(f"{time.time() - began:.0f} s: {path} {'FAILED' if failed else 'trained'}",
                  flush=True)
            runs = [run for run in runs if not failed or path not in needs_of(run)]
        for slot, busy in slots.items():
            if busy and not busy[0].is_alive():
                process, run, since = busy
                took, slots[slot] = time.time() - since, None
                longest = max(longest, took)
                print(f"{time.time() - began:.0f} s: {name_of(run)}, {took:.0f} s, "
                      f"{'done' if process.exitcode == 0 else 'FAILED'}", flush=True)
            ready = [run for run in runs if all(path.exists() and path not in training
                                                for path in needs_of(run))]
            late = time.time() - began + longest > args.seconds      # it would be cut off
            if slots[slot] is None and ready and not late:
                runs.remove(run := ready[0])
                process = multiprocessing.get_context("fork").Process(
                    target=work, daemon=True, args=(run, sizes, args, source[run["length"]],
                                                    args.gpu[slot % len(args.gpu)]))
                process.start()
                slots[slot] = process, run, time.time()
        if not any(slots.values()) and not training and runs:   # late, or a start that never came
            return print(f"{len(runs)} runs left: {', '.join(map(name_of, runs))}")
        time.sleep(0.1)


# ---- tables and a figure ------------------------------------------------------------------------

def merged_before(path):
    """The records of a merged file as their runs wrote them, less what merge left out."""
    for record in evaluate.load_records(path) if path.exists() else []:
        r = {k: v for k, v in record.items() if k not in ("settings", "screen", "extra")}
        r["variant"] = record.get("settings", r["variant"])
        yield r | {"updates": BASE["updates"]} if "screen" in record else r


def merge(args):
    """All runs, of this file too, in one list; held-out text once for each text and length. What
    README's table leaves out is "extra", and of that the own temperature alone is kept, for the
    size of the file. A picked variant of a LABEL goes by that, and is then its "settings"."""
    found, real = [], {}
    files = [evaluate.load_records(path) for path in sorted(args.records.glob("*.json"))]
    for record in chain(merged_before(args.merged), *files):
        r = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in record.items()
             if not k.endswith("_ci") or k == "gen_ppl_matched_ci"}
        if r["real"]:
            real.setdefault((r["data"], r["block_size"]), r | {"variant": "held-out text"})
            continue
        r["own_temperature"] = evaluate.at_own_temperature(r)
        name, plain = r["variant"], (r["drawn"], r["sampler"]) == ("fresh z", "ancestral")
        picked = plain and (name == "teacher" or name in args.pick)
        if plain and name in args.pick:
            r |= {"variant": args.pick[name], "settings": name}
        if not picked or r["steps"] not in SHOWN.get(r["variant"], SHOWN["others"]):
            first = plain and r["steps"] in (1, 16) and not picked
            r["screen" if first and r.get("updates") == BASE["updates"] else "extra"] = True
        if picked or r["own_temperature"]:                 # else the variant says all
            whole = picked and r["own_temperature"]
            r = {k: v for k, v in r.items() if whole or k not in BASE}
            found += [r] * (r not in found)                # its run's file may be here still
    found = [*real.values(), *found]
    found.sort(key=lambda r: ("gpt2" in r["data"], r["data"], r["block_size"], not r["real"],
                              r["variant"] != "teacher", r["variant"], r["seed"],
                              r.get("steps", 0)))
    evaluate.write_json(args.merged, found)


def groups(args):
    """For each text and length: title, held-out row, {(variant, drawn, sampler, schedule): {steps:
    row}} at their own temperature, seeds averaged: the teacher, then the best one-pass text first."""
    def one_pass(line):
        first = line[1].get(1, {})
        matched = first.get("gen_ppl_matched")
        return ("teacher" not in line[0][0], not matched,
                matched or first.get("gen_ppl") or math.inf)

    rows = [r for r in evaluate.average(evaluate.load_records(args.merged))
            if evaluate.at_own_temperature(r)]
    for key in dict.fromkeys((r["data"], r["block_size"]) for r in rows):
        lines, here = {}, [r for r in rows if (r["data"], r["block_size"]) == key]
        for r in here:
            if not r["real"]:
                how = r["sampler"], r.get("schedule", "linear")
                lines.setdefault((r["variant"], r["drawn"], *how), {})[r["steps"]] = r
        yield "{}, {} tokens".format(*key), next(r for r in here if r["real"]), dict(
            sorted(lines.items(), key=one_pass))


def table(args):
    """A row a variant, at each number of passes its matched gen_ppl, or (gen_ppl at its entropy)
    where no temperature reaches that of held-out text."""
    for title, real, lines in groups(args):
        print(f"\n{title}: held-out text has gen_ppl {real['gen_ppl']:.4g}, entropy "
              f"{real['entropy']:.2f}, copied {real['copied']:.2g}")
        found, steps = [], sorted({n for line in lines.values() for n in line})
        for (variant, drawn, sampler, schedule), line in lines.items():
            how = f" {drawn}" * (drawn != "fresh z") + " greedy" * (sampler == "greedy")
            how += f" {schedule}" * (schedule != "linear")
            row = next(iter(line.values())) | {"variant": variant + how}
            for n in steps:
                r = line.get(n, {})
                row[str(n)] = f"{r['gen_ppl_matched']:.3g}" if r.get("gen_ppl_matched") else \
                    f"({r['gen_ppl']:.3g} at {r['entropy']:.2f})" if r else ""
            found.append({k: v for k, v in row.items() if not k.endswith("_ci")})
        print(evaluate.records_table(found, f"variant runs {' '.join(map(str, steps))} entropy "
                                     "overlap_excess copied gap_1 gap_4 train_seconds"))


def plot(args):
    """Matched gen_ppl against passes; where that is not reached hollow: gen_ppl at sampling's own
    temperature, beside it the entropy where that is 0.02 or more off."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    found = [*groups(args)]
    figure, colors = Figure((5.5 * len(found), 4.2), dpi=180, layout="constrained"), {}
    for ax, (title, real, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        drawn = [key for key in lines if key[1:3] == ("fresh z", "ancestral") and
                 key[0] in ("teacher", *args.pick.values())]
        for variant, *how, schedule in drawn:
            line = [*lines[variant, *how, schedule].values()]
            variant += ", even steps" * (schedule == "even")
            color = colors.setdefault(variant, f"C{len(colors)}")
            x, y = [r["passes"] for r in line], [r["gen_ppl_matched"] or r["gen_ppl"] for r in line]
            ax.plot(x, y, "o-", color=color, ms=4, lw=1.3, label=variant)
            for r, *at in zip(line, x, y):
                if not r["gen_ppl_matched"]:
                    ax.plot(*at, "o", color=color, ms=4, mfc="white")
                if not r["gen_ppl_matched"] and abs(r["entropy"] - real["entropy"]) >= 0.02:
                    ax.annotate(f"{r['entropy']:.2f}", at, (5, 3), color=color, fontsize=7,
                                textcoords="offset points")
        ax.axhline(real["gen_ppl"], color="black", ls="--", lw=1,
                   label=f"held-out text, entropy {real['entropy']:.2f}")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=title, yscale="log", ylabel="gen_ppl at the entropy of held-out text",
               xlabel="network passes (hollow: at another entropy, beside it if 0.02 off)")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(args.figure)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("tasks", nargs="+", choices=[*TASKS, "merge", "table", "plot"])
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help=f"of all runs: {' '.join(BASE)}")
    add("--length", nargs="+", type=int, default=[64])
    add("--steps", nargs="+", type=int, help="passes to sample in, else as many as a row has")
    add("--schedule", nargs="+", default=["even"], choices=generator.SCHEDULES)
    add("--data", default=os.environ.get("NOVELS") or "data/shakespeare.txt", help="or set NOVELS")
    add("--tokenizer", choices=("char", "gpt2"), default="char")
    add("--compile", action="store_const", const="--compile", default="--no-compile",
        help="training only: pays for long runs of large networks")
    add("--jobs", type=int, default=1, help="runs at once on a GPU")
    add("--gpu", nargs="+", type=int, default=[0])
    add("--seconds", type=float, default=math.inf, help="start no run that would end later")
    add("--device", default="cuda")
    add("--texts", type=int, default=FULL["texts"], help="to write and to hold out")
    add("--commit", help="where git is missing")
    add("--pick", nargs="+", default=PICK, metavar="[LABEL: ]VARIANT",
        help="what README and the plot show; runs of one LABEL, text and length are its seeds")
    add("--tiny", action="store_true", help="on a CPU, networks of no use, in out/onepass/tiny")
    args = p.parse_args()
    args.records, args.merged = Path("results/onepass"), Path("results/onepass.json")
    args.figure = Path("assets/onepass.png")
    if args.tiny:
        args.records = Path("out/onepass/tiny")
        args.merged, args.figure = Path("out/onepass/tiny.json"), Path("out/onepass/tiny.png")
        args.device, args.data, args.length = "cpu", "data/shakespeare.txt", [32]
    args.pick = {variant: label or variant for label, _, variant in (
        pick.rpartition(": ") for pick in args.pick)}
    args.name = "novels" if "novel" in args.data else Path(args.data).stem
    args.name += "-gpt2" * (args.tokenizer == "gpt2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("onepass.py: stopped"))   # its runs with it
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
