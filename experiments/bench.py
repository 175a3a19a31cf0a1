# SPDX-License-Identifier: MIT
"""Time and memory of training and sampling, beside the authors' code.

    python experiments/bench.py --all       train and sample, 5 minutes at the paper's shape
    python experiments/bench.py train       an update of train.py's `distil`: masked, hard, soft
    python experiments/bench.py sample      texts of a generator: 16 steps masked, 4 steps uniform
    python experiments/bench.py scaling     masked updates over lengths, batch sizes, vocabularies
    python experiments/bench.py "train soft"    one case

Other flags go to every case: --vocab, the number of tokens (50,257, as GPT-2), and train.py's
--batch_size, --block_size, --size, --device, --no-compile. Networks are new and texts random. On a
CPU the default sizes are a toy's.

mfu is FLOPs / time / the chip's dense bfloat16 peak; the FLOPs are what torch counts in an
uncompiled round that computes nothing twice. The authors' times are of their released code, eager,
at the same shape (results/authors_h200.json). Their N steps are N + 1 passes, ours at most N:
compare ms_per_pass, too.
"""
import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch                                                         # noqa: E402
from torch._dynamo.utils import counters                             # noqa: E402
from torch.utils.flop_counter import FlopCounterMode                 # noqa: E402

import rows                                                          # noqa: E402
import train                                                         # noqa: E402
from checkpoint import Parser, number, prepare, provenance, run_script       # noqa: E402
from data import BadInput                                            # noqa: E402
from evaluate import append_records, read_records                    # noqa: E402
from generator import sample                                         # noqa: E402
from model import DiT, ModelConfig                                   # noqa: E402
from run import Run, Trainee                                         # noqa: E402
from teacher import Masked, Uniform                                  # noqa: E402

GPU = torch.cuda.is_available()
K = 50_257 if GPU else 1_000    # tokens
STEPS = {"mdlm": 16, "duo": 4}  # of the sampler
WARMUP, ITERS = (5, 60) if GPU else (1, 2)  # rounds; those of the warm-up may compile
PEAK = {"H100": 989e12, "H200": 989e12}     # dense bfloat16 FLOP/s; another device shows no mfu
AUTHORS = ROOT / "results/authors_h200.json"
SIZES = "--preset owt --batch_size 8"
if not GPU:
    SIZES = "--preset owt --batch_size 2 --block_size 32 --size 2x4x64 --no-compile"
CASES = [("train", "mdlm", "--process mdlm"),
         ("train", "hard", "--process duo --update hard"),
         ("train", "soft", "--process duo --update soft")]
CASES += [("sample", f"{process} {steps}", f"--process {process} --batch_size {B}")
          for process, steps in STEPS.items() for B in (8, 32)]
CASES += [("scaling", "mdlm", f"--block_size {L}") for L in (256, 512, 1024, 2048)]
CASES += [("scaling", "mdlm", f"--batch_size {B}") for B in (2, 4, 16, 32)]
CASES += [("scaling", "mdlm", f"--vocab {V}") for V in (256, 16_384, 131_072)]


# ---- what is measured: functions that build networks and return a function of one round ---------

def network(s, V, **config):
    layers, heads, width = (int(n) for n in s.size.split("x"))
    with s.device:
        net = DiT(ModelConfig(V, layers, heads, width, **config))
    for parameter in net.parameters():
        if not parameter.any():             # products with 0 are faster
            torch.nn.init.normal_(parameter, std=0.02)
    return net


class Synthetic(Run):
    """train.py's run, with new networks and random texts."""

    def __init__(self, s, process):
        self.s = s
        self.process = process
        self.step = 0
        new = partial(network, s, process.vocab_size, dropout=s.dropout)
        self.net, self.fake, self.teacher = new(), new(), new().eval()
        self.optim = Trainee(self.net, s.lr, s)
        self.fake_optim = Trainee(self.fake, s.fake_lr, s, averaged=False)
        self.prepare()

    def batch(self, split, B, rng, part):
        return torch.randint(self.process.K, (B, self.s.block_size), generator=rng)[part], None

    def note(self, step, values):
        pass


def training(s, process):
    run = Synthetic(s, process)

    def update():
        s.updates = run.step + 1
        train.distil(s, run, run)
        run.step += 1

    return update


def sampling(s, process):
    net = network(s, process.vocab_size).eval()
    if s.compile:
        net.compile_trunk()
    autocast = prepare(net, s.dtype)
    rng = torch.manual_seed(s.seed)

    def write():
        with autocast:
            texts = sample(net, process, s.batch_size, s.block_size, STEPS[s.process], rng,
                           ending="greedy")
        s.passes = texts.nfe.max().item()

    return write


# ---- the clock ----------------------------------------------------------------------------------

def measure(one_round, iters, cuda):
    """-> ms of each round after the warm-up; how many graphs were compiled in those"""
    marks, graphs = [], []
    for _ in range(WARMUP + iters + 1):
        if cuda:                            # the device notes the time, the host does not wait
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        graphs.append(counters["stats"]["unique_graphs"])
        one_round()
    if cuda:
        torch.cuda.synchronize()
    pairs = list(zip(marks, marks[1:]))[WARMUP:]
    times = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs]
    return times, graphs[-1] - graphs[WARMUP]


def count_flops(build, s, process):
    """Of one round, uncompiled (the counter does not see into compiled code), with no head row
    projected again for the backward pass: matrix products and attention."""
    uncompiled = argparse.Namespace(**{**vars(s), "compile": False})
    kept = rows.KEEP_ELEMENTS, rows.CHUNK_ELEMENTS
    rows.KEEP_ELEMENTS = rows.CHUNK_ELEMENTS = 2 ** 40
    with FlopCounterMode(display=False) as counter:
        build(uncompiled, process)()
    rows.KEEP_ELEMENTS, rows.CHUNK_ELEMENTS = kept
    return counter.get_total_flops()


def run_case(mode, label, flags):
    """-> record"""
    p = Parser()
    p.add_argument("--vocab", type=number(int, 2), default=K)
    own, flags = p.parse_known_args(flags)
    s = train.settings_of(train.parse_args([*SIZES.split(), *flags]), "idlm")
    s.micro_batch, s.num_micro = s.batch_size, 1
    process = Masked(own.vocab + 1) if s.process == "mdlm" else Uniform(own.vocab)
    build = sampling if mode == "sample" else training
    where = provenance(s.seed, s.device)
    peak = max(rate * (chip in where["device"]) for chip, rate in PEAK.items())
    rows.COMPILE = False
    flops = count_flops(build, s, process) if peak else 0
    rows.COMPILE = s.compile
    torch._dynamo.reset()
    cuda = s.device.type == "cuda"
    if cuda:
        gc.collect()                        # the networks so far
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, again = measure(build(s, process), ITERS, cuda)
    ms, tenths = median(times), quantiles(times, n=10, method="inclusive")
    record = {"name": f"{mode} {label} B{s.batch_size}", "code": "ours",
              "B": s.batch_size, "L": s.block_size, "V": own.vocab, "size": s.size,
              "median_ms": round(ms, 3), "p10_ms": round(tenths[0], 3),
              "p90_ms": round(tenths[-1], 3), "recompilations": again,
              "tokens_per_s": round(1e3 * s.batch_size * s.block_size / ms)}
    if mode == "sample":
        record |= {"passes": s.passes, "ms_per_pass": round(ms / s.passes, 2)}
    if cuda:
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    if flops:
        record |= {"tflop": round(flops / 1e12, 2), "mfu": round(1e3 * flops / ms / peak, 3)}
    return record | where


def show(record):
    shown = "median_ms", "ms_per_pass", "peak_gib", "tokens_per_s", "mfu"
    print(record["name"], *(f" {key} {record[key]}" for key in shown if key in record), flush=True)
    for theirs in read_records(AUTHORS):
        if all(theirs[key] == record[key] for key in ("name", "L", "size")):
            print("  the authors' code", *(f" {key} {theirs[key]}" for key in shown[:3]))


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--records", type=Path, default="out/bench.json", help="added to this list")
    args, rest = p.parse_known_args(argv)
    wanted, *rest = rest or ["--all"]
    names = {name for mode, label, _ in CASES for name in (mode, f"{mode} {label}")}
    if wanted not in names | {"--all"}:
        raise BadInput(f"{wanted} is no case: begin with --all, train, sample or scaling")
    if args.records.exists():
        read_records(args.records)          # a wrong file: before anything is measured
    again = []
    for mode, label, flags in CASES:
        if wanted in (mode, f"{mode} {label}") or (wanted == "--all" and mode != "scaling"):
            record = run_case(mode, label, flags.split() + rest)
            append_records(args.records, [record])
            show(record)
            again += [record["name"]] * (record["recompilations"] > 0)
    if again:
        raise BadInput(f"compiled again after warm-up: {again}; mark what varies as dynamic")


if __name__ == "__main__":
    run_script(main)
