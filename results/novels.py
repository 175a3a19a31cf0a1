"""What results/novels.sh cannot do in bash. RUNS: its OUT_DIR, RUN: the name of a folder there.

    python results/novels.py tokens FLAGS          tokenise once; flags as for train.py
    python results/novels.py chain train FLAGS -- evaluate FLAGS     both scripts in one process
    python results/novels.py rows RUNS RUN ...     does G concentrate? entropy of rows by t_tilde
    python results/novels.py text RUNS             teacher and generator in the same seconds
    python results/novels.py merge RUNS NOVELS     results/novels/*.json and the logs: NAME.json
    python results/novels.py plot                  NAME.json: assets/NAME.png

The environment's NAME: novels if not given.
"""
import gc
import glob
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("RESULTS") or ROOT / "results")
NAME = os.environ.get("NAME") or "novels"
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from data import TextData  # noqa: E402
from generator import draw_latent, sample  # noqa: E402
from idlm_loss import flat_rows, per_row, upcast  # noqa: E402

KEEP = {"sampler", "schedule", "steps", "passes", "temperature", "n_texts", "seconds", "process",
        "model"} | {
    name + ci for name in ("gen_ppl", "gen_ppl_matched", "entropy", "distinct4", "gm")
    for ci in ("", "_ci")} | evaluate.PROVENANCE
# The rows of README's table at most; the others carry "extra" and stand in novels.json alone
SHOWN = {("mdlm", "teacher"): (4, 16, 64, 256, 1024), ("mdlm", "idlm"): (4, 8, 16, 32),
         ("duo", "teacher"): (4, 16, 64, 256, 1024), ("duo", "dcd"): (4, 16, 64),
         ("duo", "idlm"): (2, 4, 8, 16)}


def load(runs, run):                                       # -> net, meta
    path = next(Path(runs, run).glob("*.pt"))
    return checkpoint.load_network(path, train.pick_device(None))


def describe(run):
    """What a run's name says: mdlm__teacher, duo__idlm__dcd__hard__1, mdlm__knob__lr__1e-4__1"""
    process, model, *rest = run.split("__")
    if model == "knob":
        knob = f"uniform {rest[0]}" if process == "duo" else rest[0]
        # a start that took its own time: start__dcd, update__soft_from_dcd
        start = {"start": "dcd"} if process == "duo" and rest[1].endswith("dcd") else {}
        return dict(process=process, model="idlm", knob=knob, value=rest[1], **start)
    names = dict(zip(("start", "update"), rest[:-1]))      # the last one is the seed
    return dict(process=process, model=model, **names)


def stages_of(runs, run):                                  # -> seconds, held-out loss or None
    """From a run's log.jsonl; seconds of training, with compilation, without loading."""
    lines = map(json.loads, Path(runs, run, "log.jsonl").read_text().splitlines())
    seconds, step, held_out = 0, 0, None
    for line in lines:
        seconds += line.get("ms", 0) / 1e3 * (line["step"] - step)
        step, held_out = line["step"], line.get("held_out", held_out)
    return seconds, held_out


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, evaluate.has_bfloat16(device))


def chain(*argv):
    commands = " ".join(argv).split(" -- ")                # no flag of theirs holds a space
    for script, *flags in map(str.split, commands):
        torch._dynamo.reset()
        gc.collect()
        sys.argv = [script + ".py", *flags]                # for the records
        {"train": train, "evaluate": evaluate}[script].main(flags)


# ---- does G concentrate? ------------------------------------------------------------------------

def row_entropy(logits):                                   # (N, K) -> (N,) nats
    log_p = upcast(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def rows(runs, *names):
    """Mean entropy of a network's rows, at masked positions (uniform process: at all), for 128
    held-out texts noised to t_tilde with the same draws for every network."""
    records = []
    for name in names:
        net, meta = load(runs, name)
        process = checkpoint.make_process(meta)
        data = TextData(meta["data"], meta["tokenizer"]["name"], meta["block_size"])
        for t_tilde in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            x_0, rng = data.val_blocks(128), torch.Generator().manual_seed(1)
            eps = draw_latent(net, process, x_0, torch.full((len(x_0),), t_tilde), rng)
            counts = eps.x == process.K                    # [MASK], which the uniform one has not
            counts = counts if meta["process"] == "mdlm" else torch.ones_like(counts)
            with autocast(net.device):
                h = net.hidden(*eps).flatten(0, 1)[flat_rows(counts, net.device)]
                mean = per_row(row_entropy, process.K, (net,), h).mean().item()
            records.append(checkpoint.provenance(1, net.device) | describe(name) |
                           dict(t_tilde=t_tilde, row_entropy=mean, n_texts=len(x_0)))
    evaluate.write_json(RESULTS / f"novels/rows.{meta['process']}.json", records)


# ---- the same seconds ---------------------------------------------------------------------------

def text(runs):
    """A text of each, unedited, seed 1: the generator in 16 passes, and the teacher in the most
    that take no longer. Seconds are the least of five batches of 16 texts."""
    def write(net, meta, steps):
        process, seconds = checkpoint.make_process(meta), []
        for _ in range(5):
            rng, began = torch.Generator().manual_seed(1), time.perf_counter()
            with autocast(net.device):
                found = sample(net, process, 16, meta["block_size"], steps, rng, schedule="linear")
            seconds.append(time.perf_counter() - began)    # the tokens are on the CPU: it is done
        return min(seconds), found

    pair = {"generator": load(runs, "mdlm__idlm__teacher__1"), "teacher": load(runs, "mdlm__teacher")}
    data, meta = None, pair["teacher"][1]
    data = TextData(meta["data"], meta["tokenizer"]["name"], meta["block_size"])
    write(*pair["generator"], 16)                          # warm
    limit, found = write(*pair["generator"], 16)
    best = {"generator": (16, limit, found)}
    for steps in range(8, 33):
        seconds, found = write(*pair["teacher"], steps)
        if seconds <= limit or "teacher" not in best:
            best["teacher"] = steps, seconds, found
    where = checkpoint.provenance(1, pair["teacher"][0].device)
    with open(RESULTS / "novels_samples.txt", "w") as file:
        print(f"16 texts of {meta['block_size']} tokens, seed 1, the first of them; "
              f"{where['device']}, commit {os.environ.get('COMMIT', where['commit'])}", file=file)
        for name, (steps, seconds, found) in best.items():
            print(f"\n==== {name}: {steps} steps, {found.nfe.double().mean():.1f} passes, "
                  f"{seconds:.3f} s ====\n\n{data.tokenizer.decode(found.tokens[0].tolist())}",
                  file=file)


# ---- one list of records ------------------------------------------------------------------------

def merge(runs, novels):
    documents = sorted(glob.glob(novels))
    real, records = None, []
    for path in sorted(Path(RESULTS, "novels").glob("*.json")):
        for r in json.loads(path.read_text()):
            if r.get("real"):
                real = r if real is None or r["n_texts"] > real["n_texts"] else real
            elif "row_entropy" in r:
                records.append(r)
            else:
                run = path.stem.partition("@")[0]
                source = run if Path(runs, run).exists() else "mdlm__teacher"
                r = {k: v for k, v in r.items() if k in KEEP} | describe(run)
                r["train_seconds"] = stages_of(runs, source)[0]
                if (begun := Path(runs, f"state/{source}.command")).exists():
                    command = begun.read_text().partition(" -- ")[0].strip()
                    r["train_command"] = command.replace("results/novels.py chain train",
                                                         "train.py")
                if r["model"] != "teacher":
                    stages = {f"{r['process']}__teacher", f"duo__{r.get('start', 'teacher')}"
                              if r["process"] == "duo" else "mdlm__teacher"}
                    r["teacher_seconds"] = sum(stages_of(runs, stage)[0] for stage in stages)
                ending = "ancestral" if r["process"] == "mdlm" or r["steps"] > 64 else "greedy"
                shown = SHOWN[r["process"], r["model"]] if r["sampler"] == ending \
                    and r["schedule"] == "linear" else ()
                records.append(r | ({} if "knob" in r or r["steps"] in shown else {"extra": True}))
    records.sort(key=lambda r: (
        "row_entropy" in r, "knob" in r, r["process"] == "duo", "teacher dcd idlm".find(r["model"]),
        *(r.get(k, "") for k in ("start", "update", "knob", "value")), r.get("sampler", ""),
        r.get("schedule", ""), r.get("steps", 0), r.get("temperature", r.get("t_tilde"))))
    for run in ("mdlm__teacher", "duo__teacher", "judge"):
        if not any(Path(runs, run).glob("*.pt")):          # it failed, or the time was up
            continue
        net, meta = load(runs, run)
        seconds, held_out = stages_of(runs, run)
        records.append({k: meta[k] for k in evaluate.PROVENANCE} | dict(
            process="ar" if run == "judge" else meta["process"], model=meta["stage"],
            held_out_nll=held_out, n_params=net.num_params(), updates=meta["updates"],
            train_seconds=seconds))
    real = {k: v for k, v in real.items() if k in KEEP or k in ("real", "block_size")} | dict(
        judge="same-size autoregressive model of the same novels",
        documents=[Path(p).name.split(".")[0] for p in documents[-int(0.04 * len(documents)):]])
    if commit := os.environ.get("COMMIT"):                 # where there is no git
        records = [r | {"commit": commit} for r in records]
        real["commit"] = commit

    def short(x):
        if isinstance(x, list):
            return [short(y) for y in x]
        return float(f"{x:.5g}") if isinstance(x, float) else x
    found = [{k: short(v) for k, v in r.items()} for r in [real, *records]]
    evaluate.write_json(RESULTS / f"{NAME}.json", found)
    print(f"{RESULTS / NAME}.json: {len(found)} records")


def plot():
    """evaluate.py's figure, without generators of which a run diverged: they are off any scale."""
    def kind(r):
        return tuple(r.get(k) for k in ("process", "model", "start", "update"))

    records = evaluate.load_records(RESULTS / f"{NAME}.json")
    diverged = {kind(r) for r in records if r.get("temperature") == 1 and "knob" not in r
                and r["gen_ppl"] > 5000 and r["steps"] >= 4}
    with tempfile.TemporaryDirectory() as folder:
        evaluate.plot([r | {"judge": "of the same size"} for r in records
                       if kind(r) not in diverged], folder)
        shutil.copy(Path(folder, "quality_vs_passes.png"), ROOT / f"assets/{NAME}.png")


if __name__ == "__main__":
    command, *argv = sys.argv[1:]
    if command == "tokens":
        s = train.settings_of(train.parse_args(argv), "teacher")
        TextData(s.data, s.tokenizer, s.block_size)
    else:
        {"chain": chain, "rows": rows, "text": text, "merge": merge, "plot": plot}[command](*argv)
