# SPDX-License-Identifier: MIT
"""Time and memory of training and sampling, beside an autoregressive rival of the same size.

    python bench.py                          all cases: the paper's shape on a GPU, a toy on a CPU
    python bench.py train --process duo --update soft
    python bench.py sample --process mdlm --steps 16 --batch_size 32
    python bench.py rival                    our causal model with a KV cache writes L tokens
    python bench.py scaling --process mdlm   a training iteration over L, B and V

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
             width=(768, 64), vocab=(50258, 1025), iters=(20, 3), steps=(16, 16))  # GPU, CPU
PEAK = {"H100": 989e12, "H200": 989e12}     # dense bfloat16 FLOP/s; another device shows no MFU
# (weights, attention, head) forwards of an iteration: 3 to update a network, 1 to run the generator
# or (soft inputs: 2) fake or teacher. Masked head: only where masked at t, t_tilde or both.
UNITS = {"mdlm": (9, 9, 3.5), "hard": (9, 9, 9), "marginal": (9, 9, 9), "soft": (11, 13, 11)}
# The authors' released code, eager, same shape: measured, H200: ms, GiB
AUTHORS = {"train mdlm B8": (315.8, 17.7), "train soft B8": (490.3, 66.2),
           "sample mdlm 16 B8": (591,), "sample mdlm 16 B32": (1549, 23.4),
           "sample greedy 4 B8": (212,), "sample greedy 4 B32": (790, 59.1)}
TRAIN = [f"--process {case}" for case in ("mdlm", *(f"duo --update {u}" for u in list(UNITS)[1:]))]
ALL = [f"train {case}" for case in TRAIN] + [
    f"sample --process {case} --batch_size {B}" for case in ("mdlm --steps 16", "duo --steps 4")
    for B in (8, 32)] + [f"rival --batch_size {B}" for B in (1, 8, 32)]
SCALING = [f"scaling --{size}" for size in (
    "block_size 256", "block_size 512", "block_size 1024", "block_size 2048", "batch_size 2",
    "batch_size 4", "batch_size 16", "vocab 1026", "vocab 8194", "vocab 131074")]


def measure(args, name, V, parts, units=(0, 0, 0), warmup=5):
    """Call the functions `parts` in turn, again and again. -> median ms of each, record"""
    cuda, wait, graphs, marks = args.device.type == "cuda", getattr(torch, args.device.type).synchronize, [], []
    for part in [wait, *parts * (warmup + args.iters)]:
        part()                              # on CUDA the device notes the time, nobody waits
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(
            enable_timing=True)) if cuda else wait() or time.perf_counter())
        graphs.append(counters["stats"]["unique_graphs"])
    wait()
    times = torch.tensor([a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks)],
                         dtype=torch.float64).view(-1, len(parts))
    warm, times = times[:warmup], times[warmup:]
    low, ms, high = (round(times.sum(1).quantile(q).item(), 3) for q in (0.1, 0.5, 0.9))
    B, L, D, layers = args.batch_size, args.block_size, args.width, args.num_layers
    flops = B * L * D * (layers * (24 * units[0] * D + 4 * units[1] * L) + 2 * units[2] * V)
    peak = next((PEAK[chip] for chip in PEAK if chip in args.where["device"]), None)
    return times.median(0).values.tolist(), dict(
        name=f"{name} B{B}", process=args.process, B=B, L=L, V=V, layers=layers, width=D,
        median_ms=ms, p10_ms=low, p90_ms=high, tokens_per_s=round(1e3 * B * L / ms),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if cuda else None,
        mfu=round(1e3 * flops / ms / peak, 4) if peak and flops else None, iters=args.iters,
        compile_s=round(max(0, warm.sum().item() - warmup * ms) / 1e3, 1), compiled=args.compile,
        recompilations=graphs[-1] - graphs[warmup * len(parts)], **args.where,
        authors=AUTHORS.get(f"{name} B{B}") if (D, layers, L) == (768, 12, 1024) else None)


def network(args, V, **config):
    with args.device:
        net = DiT(ModelConfig(V, args.num_layers, args.num_heads, args.width, **config))
    for zeros in (p for p in net.parameters() if not p.any()):     # products with 0 are faster
        torch.nn.init.normal_(zeros, std=0.02)
    return net.compile_trunk() if args.compile else net


def iteration(args, process, rng):
    """train.py's, in parts: loss and AdamW of the fake, of the generator, then EMA."""
    B, L = args.batch_size, args.block_size
    generator, fake, teacher = (network(args, process.vocab_size, dropout=args.dropout) for _ in "123")
    teacher.eval().requires_grad_(False)
    settings = argparse.Namespace(process=args.process, uniform_update=args.update, latent="state")
    weights = [p.detach() for p in generator.parameters()]
    ema = [w.clone() for w in weights] if args.ema else []

    def loss(which):
        fake.train(which == "fake").requires_grad_(which == "fake")
        x_0 = torch.randint(process.K, (B, L), generator=rng)
        t, t_tilde = stratified_times(B, rng), stratified_times(B, rng)[torch.randperm(B)]
        args.amp(idlm_step)(which, settings, process, generator, fake, teacher, x_0, t, t_tilde,
                            rng).backward()

    def update(adam):
        adam.step()
        adam.zero_grad()

    adams = [torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True) for net in (fake, generator)]
    return [partial(loss, "fake"), partial(update, adams[0]), partial(loss, "generator"),
            partial(update, adams[1]), lambda: ema and torch._foreach_lerp_(ema, weights, 1e-4)]


def train_case(args, process, rng):
    kind = "mdlm" if args.process == "mdlm" else args.update
    (fake, fake_adam, generator, adam, ema), record = measure(
        args, f"{args.mode} {kind}", process.vocab_size, iteration(args, process, rng), UNITS[kind])
    if args.mode == "train":
        # With 128 words there is next to no head: what the losses still cost is the trunks'.
        trunk = sum(measure(args, "", 129, iteration(args, type(process)(129), rng))[0][:3:2])
        record["parts_ms"] = {part: round(ms, 2) for part, ms in dict(
            fake=fake + fake_adam, generator=generator + adam + ema, trunk=trunk, ema=ema,
            head_and_loss=fake + generator - trunk, optimiser=fake_adam + adam).items()}
    return record


def sample_case(args, process, rng):
    net, n, B = network(args, process.vocab_size).eval(), args.steps, args.batch_size
    name, units = args.ending, (n, n, n)
    if args.process == "mdlm":              # the pass over all-[MASK] texts serves all B of them
        name, units = "mdlm", (n - 1 + 1 / B, n - 1 + 1 / B, 1)
    write = partial(args.amp(sample), net, process, B, args.block_size, n, rng, ending=args.ending)
    return measure(args, f"sample {name} {n}", process.vocab_size, [write], units)[1]


def remember(keys, values, position, k, v):                # k, v (B, H, 1, d): one position's
    keys[:, :, position], values[:, :, position] = k, v
    return keys, values, (torch.arange(keys.shape[2], device=k.device) <= position)[None]


def cached_writer(net, tokens, u):
    """A function that continues column 0 of tokens (B, L + 1), one a pass; u (L, B): for the draws.

    A pass is the network's own on one token, its blocks given a cache of full length. On CUDA it
    is a CUDA graph: launching its many small kernels would take longer than running them.
    """
    (L, B), H, position, graph = u.shape, net.config.num_heads, tokens.new_zeros(1), None
    empty = net.vocab_embed.embedding.new_zeros(B, H, L, net.config.width // H)
    for block in net.blocks:
        cache = partial(remember, empty.clone(), empty.clone(), position)
        block.forward = partial(block.forward, cache=cache)
    net.rotary_emb.forward = partial(net.rotary_emb.forward, start=position)
    draw = idlm_loss.sample_categorical
    draw = torch.compile(draw) if idlm_loss.COMPILE else draw

    @torch.no_grad()
    def write_one():
        # not net.project, which would copy the weights of the head at every token to align them
        h = net.hidden(tokens[:, position], u.new_zeros(B))[:, 0]
        tokens[:, position + 1] = draw(net.output_layer.linear(h), u[position][0])[:, None]
        position.add_(1)

    def write():
        nonlocal graph
        position.zero_()
        for i in range(L):
            if net.device.type == "cuda" and i == 3 and graph is None:     # all is compiled by now
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):                # records, runs nothing
                    write_one()
            graph.replay() if graph else write_one()

    return write


def rival_case(args, process, rng):
    net = network(args, process.K, causal=True).eval()
    if args.device.type == "cuda":          # weights in bfloat16: a pass's cost is reading them
        for parameter in net.parameters():
            parameter.data = parameter.data.bfloat16()
    B, L, args.process = args.batch_size, args.block_size, "ar"
    u = torch.rand(L, B, generator=rng).to(args.device)
    tokens = torch.zeros(B, L + 1, dtype=torch.int64, device=args.device)
    return measure(args, "rival", process.K, [cached_writer(net, tokens, u)], warmup=2)[1]


def main(argv=None):
    gpu, onoff = torch.cuda.is_available(), argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    p.add_argument("mode", nargs="?", choices=("train", "sample", "rival", "scaling"))
    p.add_argument("--all", action="store_true", help="all cases, as without a mode")
    p.add_argument("--process", choices=("mdlm", "duo"), default="mdlm")
    p.add_argument("--update", choices=("marginal", "hard", "soft"), default="hard")
    p.add_argument("--ending", choices=("ancestral", "greedy"), default="greedy")
    for name, sizes in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=sizes[not gpu])
    p.add_argument("--dropout", type=float, default=0.1)
    p.add_argument("--ema", action=onoff, default=True)
    p.add_argument("--compile", action=onoff, default=gpu)
    p.add_argument("--device", help="default: the first that is there")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--records", type=Path, help="JSON file, written after every case")
    args = p.parse_args(argv)
    if min(getattr(args, name) for name in SIZES) < 1:
        raise BadInput("a size, --steps or --iters is below 1; give whole numbers from 1 up")
    args.device, idlm_loss.COMPILE = pick_device(args.device), args.compile
    args.where, cuda = provenance(args.seed, args.device), args.device.type == "cuda"
    args.amp = torch.autocast(args.device.type, torch.bfloat16, enabled=cuda)
    torch.set_float32_matmul_precision("high")
    todo, records = {None: ALL, "scaling": SCALING}.get(args.mode, [args.mode]), []
    for case in ALL if args.all else todo:
        a = p.parse_args(case.split(), argparse.Namespace(**vars(args)))
        gc.collect()                        # the networks of the case before
        torch._dynamo.reset()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(a.seed)
        run = {"sample": sample_case, "rival": rival_case}.get(a.mode, train_case)
        process = Masked(a.vocab) if a.process == "mdlm" else Uniform(a.vocab - 1)
        records.append(run(a, process, torch.Generator().manual_seed(a.seed)))
        print({key: records[-1][key] for key in SHOWN}, records[-1].get("parts_ms", ""), flush=True)
        if args.records:
            args.records.write_text(json.dumps(records, indent=1) + "\n")
    print(json.dumps(records))
    if again := [r["name"] for r in records if r["recompilations"]]:
        raise BadInput(f"compiled again after warm-up: {again}; mark what varies as dynamic")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"bench.py: {error}")
