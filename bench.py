# SPDX-License-Identifier: MIT
"""Time and memory of training and sampling, beside an autoregressive rival of the same size.

    python bench.py                    all cases: at the paper's shape on a GPU, at a toy's on a CPU
    python bench.py train|scaling      an iteration of train.py; the same over L, B and V
    python bench.py sample|rival       texts from a generator; from a causal model with a KV cache

MFU = FLOPs of the formulas (none recomputed) / time / dense bfloat16 peak; a forward is
24 D^2 layers B L (weights) + 4 L D layers B L (attention) + 2 D V B L (head at all positions), a
backward one more for the inputs and one more for the weights (attention: two more).
"""
import argparse
import gc
import json
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import idlm_loss
from checkpoint import provenance
from data import BadInput
from generator import sample
from model import DiT, ModelConfig
from teacher import Masked, Uniform, stratified_times
from train import idlm_step, pick_device

SIZES = dict(batch_size=(8, 2), block_size=(1024, 32), num_layers=(12, 2), num_heads=(12, 4),
             width=(768, 64), vocab=(50258, 1025), iters=(20, 3), steps=(16, 16))  # on GPU, on CPU
PEAK = {"H100": 989e12, "H200": 989e12}     # dense bfloat16 FLOP/s; another device shows no MFU
# (weights, attention, head) forwards of an iteration: 3 to update a network, 1 to run another (soft
# inputs: with a backward); the masked head where t, t_tilde or both mask
UNITS = {"mdlm": (9, 9, 3.5), "hard": (9, 9, 9), "marginal": (9, 9, 9), "soft": (11, 13, 11)}
AUTHORS = {name: dict(authors_ms=ms, authors_gib=gib) for name, ms, gib in (
    # their released code, eager, same shape: measured, H200
    ("train mdlm B8", 315.8, 17.7), ("train soft B8", 490.3, 66.2), ("sample mdlm 16 B8", 591, None),
    ("sample mdlm 16 B32", 1549, 23.4), ("sample greedy 4 B8", 212, None),
    ("sample greedy 4 B32", 790, 59.1))}
ALL = [f"train --process {case}" for case in (
    "mdlm", "duo --update hard", "duo --update marginal", "duo --update soft")] \
    + [f"sample --process {case} --batch_size {B}" for case in ("mdlm --steps 16", "duo --steps 4")
       for B in (8, 32)] + [f"rival --batch_size {B}" for B in (1, 8, 32)]
SCALING = [f"scaling --block_size {L}" for L in (256, 512, 1024, 2048)] \
    + [f"scaling --batch_size {B}" for B in (2, 4, 16)] \
    + [f"scaling --vocab {V}" for V in (1026, 8194, 131074)]


def measure(args, name, V, parts, units=(0, 0, 0), warmup=5):
    """Call the functions `parts` in turn, again and again. -> median ms of each, record"""
    wait, marks, graphs = getattr(torch, args.device.type).synchronize, [], []
    for part in [wait, *parts * (warmup + args.iters)]:
        part()                              # on CUDA the device notes the time, nobody waits
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(
            enable_timing=True)) if args.cuda else wait() or time.perf_counter())
        graphs.append(counters["stats"]["unique_graphs"])
    wait()
    times = [a.elapsed_time(b) if args.cuda else 1e3 * (b - a) for a, b in pairwise(marks)]
    times = torch.tensor(times, dtype=torch.float64).view(-1, len(parts))
    warm, times = times[:warmup].sum().item(), times[warmup:]
    low, ms, high = (round(times.sum(1).quantile(q).item(), 3) for q in (0.1, 0.5, 0.9))
    B, L, D, layers = args.batch_size, args.block_size, args.width, args.num_layers
    flops = B * L * D * (layers * (24 * units[0] * D + 4 * units[1] * L) + 2 * units[2] * V)
    peak = next((rate for chip, rate in PEAK.items() if chip in args.where["device"]), 0)
    return times.median(0).values.tolist(), dict(
        name=f"{name} B{B}", process=args.process, B=B, L=L, V=V, layers=layers, width=D,
        median_ms=ms, p10_ms=low, p90_ms=high, tokens_per_s=round(1e3 * B * L / ms),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if args.cuda else None,
        mfu=round(1e3 * flops / ms / peak, 4) if peak and flops else None, iters=args.iters,
        compile_s=round(max(0, warm - warmup * ms) / 1e3, 1), compiled=args.compile,
        recompilations=graphs[-1] - graphs[warmup * len(parts)], **args.where,
        **AUTHORS.get(f"{name} B{B}", {}) if (D, layers, L) == (768, 12, 1024) else {})


def network(args, V, **config):
    with args.device:
        net = DiT(ModelConfig(V, args.num_layers, args.num_heads, args.width, **config))
    for zeros in (p for p in net.parameters() if not p.any()):     # products with 0 are faster
        torch.nn.init.normal_(zeros, std=0.02)
    return net.compile_trunk() if args.compile else net


def iteration(args, process, rng):
    """train.py's, in parts: loss and AdamW of the fake, loss and AdamW of the generator, EMA."""
    B, L, V = args.batch_size, args.block_size, process.vocab_size
    generator, fake, teacher = (network(args, V, dropout=args.dropout) for _ in range(3))
    nets = generator, fake, teacher.eval().freeze(torch.bfloat16 if args.cuda else None)
    weights = [p.detach() for p in generator.parameters()]
    ema = [w.clone() for w in weights] if args.ema else []

    def loss(which):
        torch.compiler.cudagraph_mark_step_begin()
        fake.train(which == "fake").requires_grad_(which == "fake")
        (fake if which == "fake" else generator).zero_grad()
        x_0 = torch.randint(process.K, (B, L), generator=rng)
        t, t_tilde = stratified_times(B, rng), stratified_times(B, rng)[torch.randperm(B)]
        args.amp(idlm_step)(which, args, process, *nets, x_0, t, t_tilde, rng).backward()

    adams = [torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True) for net in (fake, generator)]
    return [partial(loss, "fake"), adams[0].step, partial(loss, "generator"), adams[1].step,
            lambda: ema and torch._foreach_lerp_(ema, weights, 1e-4)]


def cached_writer(net, tokens, u):
    """A function that continues tokens (B, L + 1) from column 0, one a pass. u (L, B): the draws.
    The cache is of full length, so that all passes are one; on CUDA that one is a CUDA graph."""
    (L, B), position, graph = u.shape, tokens.new_zeros(1), None
    shape = B, net.config.num_heads, L, net.config.width // net.config.num_heads

    def remember(keys, values, k, v):       # (B, H, L, d) x2, (B, H, 1, d) x2
        keys[:, :, position], values[:, :, position] = k, v
        return keys, values, (torch.arange(L, device=k.device) <= position)[None]

    for block in net.blocks:                # the network's own pass, over one token
        cache = [net.vocab_embed.embedding.new_zeros(shape) for _ in range(2)]
        block.forward = partial(block.forward, cache=partial(remember, *cache))
    net.rotary_emb.forward = partial(net.rotary_emb.forward, start=position)

    def write_one():
        h = net.hidden(tokens[:, position], u.new_zeros(B))[:, 0]
        logits = net.output_layer.linear(h)                  # `project` would copy it to align it
        tokens[:, position + 1] = idlm_loss.sample_categorical(logits, u[position][0])[:, None]
        position.add_(1)

    one = torch.compile(write_one) if idlm_loss.COMPILE else write_one

    @torch.no_grad()
    def write():
        nonlocal graph
        position.zero_()
        for i in range(L):
            if net.device.type == "cuda" and i == 3 and not graph:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):                # records, runs nothing
                    one()
            graph.replay() if graph else one()

    return write


def run(args):
    """-> the record of one case"""
    n, B, L, rng = args.steps, args.batch_size, args.block_size, torch.manual_seed(args.seed)
    masked = args.process == "mdlm"
    process = Masked(args.vocab) if masked else Uniform(args.vocab - 1)
    V = process.vocab_size
    if args.mode == "sample":               # a pass over all-[MASK] texts serves all B of them
        name, passes, heads = ("mdlm", n - 1 + 1 / B, 1) if masked else (args.ending, n, n)
        net = network(args, V).freeze(torch.bfloat16 if args.cuda else None)
        write = partial(args.amp(sample), net, process, B, L, n, rng, ending=args.ending)
        return measure(args, f"sample {name} {n}", V, [write], (passes, passes, heads))[1]
    if args.mode == "rival":                # in bfloat16: a pass's cost is reading the weights
        V, args.process = process.K, "ar"
        net = network(args, V, causal=True).eval().to(torch.bfloat16 if args.cuda else torch.float)
        tokens = torch.zeros(B, L + 1, dtype=torch.int64, device=args.device)
        writer = cached_writer(net, tokens, torch.rand(L, B, device=args.device))
        return measure(args, "rival", V, [writer], warmup=2)[1]
    kind = "mdlm" if masked else args.uniform_update
    (fake, fake_adam, generator, adam, ema), record = measure(
        args, f"{args.mode} {kind}", V, iteration(args, process, rng), UNITS[kind])
    if args.mode == "train":
        # With 128 words there is next to no head: what the losses still cost is the trunks'.
        trunk = sum(measure(args, "", 129, iteration(args, type(process)(129), rng))[0][:3:2])
        record["parts_ms"] = {part: round(ms, 2) for part, ms in dict(
            fake=fake + fake_adam, generator=generator + adam + ema, trunk=trunk, ema=ema,
            head_and_loss=fake + generator - trunk, optimiser=fake_adam + adam).items()}
    return record


def main(argv=None):
    p = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    add, onoff, gpu = p.add_argument, argparse.BooleanOptionalAction, torch.cuda.is_available()
    add("mode", nargs="?", choices=("train", "sample", "rival", "scaling"), help="default: all")
    add("--all", action="store_true", help="all cases")
    add("--process", choices=("mdlm", "duo"), default="mdlm")
    add("--update", dest="uniform_update", choices=("hard", "marginal", "soft"), default="hard")
    add("--ending", choices=("greedy", "ancestral"), default="greedy", help="of --process duo")
    for name, sizes in SIZES.items():
        add(f"--{name}", type=int, default=sizes[not gpu], help="%d, without a GPU %d" % sizes)
    add("--dropout", type=float, default=0.1)
    add("--ema", action=onoff, default=True)
    add("--compile", action=onoff, default=gpu)
    add("--device", help="default: the first that is there")
    add("--seed", type=int, default=1)
    add("--records", type=Path, help="JSON file for the records, written after every case")
    args = p.parse_args(argv)
    if min(getattr(args, name) for name in SIZES) < 1:
        raise BadInput("a size, --steps or --iters is below 1; give whole numbers from 1 up")
    args.device, idlm_loss.COMPILE = pick_device(args.device), args.compile
    args.latent, args.betas, args.own_token = "state", (1.0, 1.0), "weighed"
    args.where, args.cuda = provenance(args.seed, args.device), args.device.type == "cuda"
    args.amp = torch.autocast(args.device.type, torch.bfloat16, args.cuda, cache_enabled=False)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64               # newer name: recompile_limit
    todo, records = {None: ALL, "scaling": SCALING}.get(args.mode, [args.mode]), []
    for case in ALL if args.all else todo:
        gc.collect()                        # the networks of the case before
        torch._dynamo.reset()
        if args.cuda:
            torch.cuda.reset_peak_memory_stats()
        records.append(run(p.parse_args(case.split(), argparse.Namespace(**vars(args)))))
        print(json.dumps(records[-1]), flush=True)
        if args.records:
            args.records.write_text(json.dumps(records, indent=1) + "\n")
    print(json.dumps(records))
    if again := [record["name"] for record in records if record["recompilations"]]:
        raise BadInput(f"compiled again after warm-up: {again}; mark what varies as dynamic")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"bench.py: {error}")
