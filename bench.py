# SPDX-License-Identifier: MIT
"""Time and memory of training and sampling, beside an autoregressive rival of the same size.

    python bench.py                          all cases: the paper's shape on a GPU, a toy on a CPU
    python bench.py train --process duo --update soft
    python bench.py sample --process mdlm --steps 16 --batch_size 32
    python bench.py rival                    our causal model with a KV cache writes L tokens
    python bench.py scaling --process mdlm   a training iteration over L, B and V

A training iteration is train.py's: fake and generator step with AdamW, then EMA; random tokens.
Medians after warm-up, compile time apart. Last line: JSON, a record a case.
MFU = FLOPs of the formulas (none recomputed) / time / dense bfloat16 peak; a forward is
24 D^2 layers B L (weights) + 4 L D layers B L (attention) + 2 D V B L (head at all positions), a
backward one more for the inputs and one more for the weights (attention: two more).
"""
import argparse
import gc
import json
import sys
import time
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

# on a GPU the paper's sizes, on a CPU a toy
SIZES = dict(batch_size=(8, 2), block_size=(1024, 32), num_layers=(12, 2), num_heads=(12, 4),
             width=(768, 64), vocab=(50258, 1025), iters=(20, 3))
PEAK = {"H100": 989e12, "H200": 989e12}     # dense bfloat16 FLOP/s; another device shows no MFU
# (weights, attention, head) forwards of an iteration: 3 for a network's own update, and a pass of
# the generator (fake step), of fake and teacher (generator step; soft inputs: with a backward).
# Masked head: 9 at the quarter masked at t and t_tilde, 3 and 2 where masked at one alone.
UNITS = {"mdlm": (9, 9, 3.5), "hard": (9, 9, 9), "marginal": (9, 9, 9), "soft": (11, 13, 11)}
# The authors' released code, eager, same shape: measured, H200.  ms, GiB, fake ms, generator ms
AUTHORS = {"train mdlm B8": (315.8, 17.7, 139.6, 176.2),
           "train soft B8": (490.3, 66.2, 147.7, 342.6),
           "sample mdlm 16 B8": (591,), "sample mdlm 16 B32": (1549, 23.4),
           "sample greedy 4 B8": (212,), "sample greedy 4 B32": (790, 59.1)}
ALL = ["train --process mdlm"] + [f"train --process duo --update {u}" for u in list(UNITS)[1:]] \
    + [f"sample --process {case} --batch_size {B}" for case in ("mdlm --steps 16", "duo --steps 4")
       for B in (8, 32)] + [f"rival --batch_size {B}" for B in (1, 8, 32)]
SCALING = [f"scaling --{flag} {size}" for flag, sizes in (
    ("block_size", (256, 512, 1024, 2048)), ("batch_size", (2, 4, 16)),
    ("vocab", (1026, 8194, 131074))) for size in sizes]


def measure(args, name, V, step, units=None, warmup=5):
    """Time step(mark), which may mark points between its parts. -> median ms of each, record"""
    cuda, stats, runs = args.device.type == "cuda", counters["stats"], []
    wait = getattr(torch, args.device.type).synchronize

    def mark():                             # on CUDA the device notes the time, nobody waits
        runs[-1].append(torch.cuda.current_stream().record_event(torch.cuda.Event(
            enable_timing=True)) if cuda else wait() or time.perf_counter())

    began = time.perf_counter()
    for i in range(warmup + args.iters):
        if i == warmup:
            wait()
            warm, graphs = time.perf_counter() - began, stats["unique_graphs"]
        runs.append([])
        mark(), step(mark), mark()
    wait()
    parts = torch.tensor([[a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(run)]
                          for run in runs[warmup:]], dtype=torch.float64)
    low, ms, high = (round(parts.sum(1).quantile(q).item(), 3) for q in (0.1, 0.5, 0.9))
    B, L, D, layers = args.batch_size, args.block_size, args.width, args.num_layers
    peak = next((rate for chip, rate in PEAK.items() if chip in args.where["device"]), None)
    flops = units and B * L * D * (
        layers * (24 * units[0] * D + 4 * units[1] * L) + 2 * units[2] * V)
    return parts.median(0).values.tolist(), dict(
        name=f"{name} B{B}", process=args.process, B=B, L=L, V=V, layers=layers, width=D,
        median_ms=ms, p10_ms=low, p90_ms=high, tokens_per_s=round(1e3 * B * L / ms),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if cuda else None,
        mfu=round(1e3 * flops / ms / peak, 4) if peak and units else None, iters=args.iters,
        compile_s=round(max(0, warm - warmup * ms / 1e3), 1), compiled=args.compile,
        recompilations=stats["unique_graphs"] - graphs, **args.where,
        authors=AUTHORS.get(f"{name} B{B}") if (D, layers, L) == (768, 12, 1024) else None)


def network(args, V, **config):
    with args.device:
        net = DiT(ModelConfig(V, args.num_layers, args.num_heads, args.width, **config))
    for zeros in (p for p in net.parameters() if not p.any()):     # products with 0 are faster
        torch.nn.init.normal_(zeros, std=0.02)
    return net.compile_trunk() if args.compile else net


def iteration(args, process, rng):
    """A training iteration in parts: fake's loss and AdamW, generator's loss and AdamW, EMA."""
    B, L, V = args.batch_size, args.block_size, process.vocab_size
    generator, fake = (network(args, V, dropout=args.dropout) for _ in range(2))
    teacher = network(args, V).eval().requires_grad_(False)
    adam = {net: torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
            for net in (fake, generator)}
    ema = [p.detach().clone() for p in generator.parameters()] if args.ema else []
    settings = argparse.Namespace(process=args.process, uniform_update=args.update, latent="state")

    def step(mark):
        for which, net in (("fake", fake), ("generator", generator)):
            fake.train(which == "fake").requires_grad_(which == "fake")
            x_0 = torch.randint(process.K, (B, L), generator=rng)
            t, t_tilde = stratified_times(B, rng), stratified_times(B, rng)
            t_tilde = t_tilde[torch.randperm(B, generator=rng)]
            args.amp(idlm_step)(which, settings, process, generator, fake, teacher, x_0, t, t_tilde,
                                rng).backward()
            assert all(p.grad is not None for p in net.parameters()), f"{which}: no gradient"
            mark()
            adam[net].step()
            adam[net].zero_grad(set_to_none=True)
            mark()
        with torch.no_grad():
            ema and torch._foreach_lerp_(ema, list(generator.parameters()), 1e-4)

    kind = "mdlm" if args.process == "mdlm" else args.update
    found = measure(args, f"{args.mode} {kind}", V, step, UNITS[kind])
    assert all(p.isfinite().all() for p in generator.parameters()), "the weights are not finite"
    return found


def train_case(args, process, rng):
    (fake_loss, fake_adam, loss, adam, ema), record = iteration(args, process, rng)
    if args.mode == "train":
        # With 128 words there is next to no head: what the losses still cost is the trunks'.
        trunk = sum(iteration(args, type(process)(129), rng)[0][:3:2])
        record["parts_ms"] = {part: round(ms, 2) for part, ms in dict(
            fake=fake_loss + fake_adam, generator=loss + adam + ema, trunk=trunk, ema=ema,
            head_and_loss=fake_loss + loss - trunk, optimiser=fake_adam + adam).items()}
    return record


def sample_case(args, process, rng):
    net, n, B = network(args, process.vocab_size).eval(), args.steps, args.batch_size
    name, units = args.ending, (n, n, n)
    if args.process == "mdlm":              # the pass over all-[MASK] texts serves all B of them
        name, units = "mdlm", (n - 1 + 1 / B, n - 1 + 1 / B, 1)

    def step(mark):
        args.amp(sample)(net, process, B, args.block_size, n, rng, ending=args.ending)
    return measure(args, f"sample {name} {n}", process.vocab_size, step, units)[1]


class KVCache:
    """Keys and values of a layer. position (1,): where to write; end: how far to read."""

    def __init__(self, k, v, position):
        self.k, self.v, self.position, self.end = k, v, position, k.shape[2]

    def __call__(self, k, v):               # (B, H, 1, d) x2 -> (B, H, end, d) x2, (1, end)
        self.k[:, :, self.position] = k
        self.v[:, :, self.position] = v
        visible = torch.arange(self.end, device=k.device) <= self.position
        return self.k[:, :, :self.end], self.v[:, :, :self.end], visible[None]


def cached_writer(net, first, u, segment=256):
    """A function that writes L tokens after `first` (B, 1), one a pass. u (L, B): for the draws.

    A pass reads the cache up to the next multiple of `segment`; on CUDA each segment's pass is a
    CUDA graph: launching its many small kernels would take longer than running them.
    """
    (L, B), H, graphs = u.shape, net.config.num_heads, {}
    token, position, tokens = first.clone(), first.new_zeros(1), first.new_zeros(B, L)
    zeros = net.vocab_embed.embedding.new_zeros(2, B, H, L, net.config.width // H)
    caches = [KVCache(*zeros.clone(), position) for _ in net.blocks]
    draw = idlm_loss.sample_categorical
    if idlm_loss.COMPILE:                   # block by block: one compilation serves all layers
        draw = idlm_loss.compiled(draw)
        for module in (*net.blocks, net.output_layer):
            module.compile()

    def write_one():
        h, (cos, sin) = net.vocab_embed(token), net.rotary_emb(1, position)
        cond = torch.nn.functional.silu(net.sigma_map(h.new_zeros(B)))
        for block, cache in zip(net.blocks, caches):
            h = block(h, cond, cos, sin, cache)
        # not net.project, which would copy the weights of the head at every token to align them
        logits = net.output_layer.linear(net.output_layer(h, cond))[:, 0]
        token.copy_(draw(logits, u[position][0])[:, None])
        tokens[:, position] = token
        position.add_(1)

    @torch.no_grad()
    def write(mark=None):
        token.copy_(first)
        position.zero_()
        for i in range(L):
            part = i // segment
            for cache in caches:
                cache.end = min(L, (part + 1) * segment)
            graphs[part].replay() if part in graphs else write_one()
            if net.device.type == "cuda" and part not in graphs and i % segment == 2:
                graphs[part] = torch.cuda.CUDAGraph()        # all is compiled and warm by now
                with torch.cuda.graph(graphs[part]):         # records, runs nothing
                    write_one()
        return tokens

    return write


def rival_case(args, process, rng):
    net = network(args, process.K, causal=True).eval()
    if args.device.type == "cuda":          # weights in bfloat16: a pass's cost is reading them
        for parameter in net.parameters():
            parameter.data = parameter.data.bfloat16()
    u = torch.rand(args.block_size, args.batch_size, generator=rng).to(args.device)
    first = torch.zeros(args.batch_size, 1, dtype=torch.int64, device=args.device)
    args.process = "ar"
    return measure(args, "rival", process.K, cached_writer(net, first, u), warmup=2)[1]


def main(argv=None):
    p = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    add, onoff = p.add_argument, argparse.BooleanOptionalAction
    add("mode", nargs="?", choices=("train", "sample", "rival", "scaling"), help="default: all")
    add("--all", action="store_true", help="all cases")
    add("--process", choices=("mdlm", "duo"), default="mdlm")
    add("--update", choices=("marginal", "hard", "soft"), default="hard", help="of --process duo")
    add("--ending", choices=("ancestral", "greedy"), default="greedy", help="of --process duo")
    add("--steps", type=int, default=16, help="network passes of sampling")
    gpu = torch.cuda.is_available()
    for name, sizes in SIZES.items():
        add(f"--{name}", type=int, default=sizes[not gpu], help="%d, without a GPU %d" % sizes)
    add("--dropout", type=float, default=0.1, help="of generator and fake")
    add("--ema", action=onoff, default=True)
    add("--compile", action=onoff, default=gpu, help="torch.compile")
    add("--device", help="default: the first that is there")
    add("--seed", type=int, default=1)
    add("--records", type=Path, help="JSON file for the records, written after every case")
    args = p.parse_args(argv)
    if min(getattr(args, name) for name in ("steps", *SIZES)) < 1:
        raise BadInput("a size, --steps or --iters is below 1; give whole numbers from 1 up")
    args.device, idlm_loss.COMPILE = pick_device(args.device), args.compile
    args.where, cuda = provenance(args.seed, args.device), args.device.type == "cuda"
    args.amp = torch.autocast(args.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False)
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
        print("{name:20}L {L:<5}V {V:<7}{median_ms:9.1f} ms ({p10_ms:.1f} to {p90_ms:.1f})"
              "{tokens_per_s:10,} tokens/s, {peak_gib} GiB, MFU {mfu}; compiled in {compile_s} s, "
              "then {recompilations} times; authors {authors}".format(**records[-1]),
              records[-1].get("parts_ms", ""), flush=True)
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
