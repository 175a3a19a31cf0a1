# SPDX-License-Identifier: MIT
"""Time and memory of training and sampling, beside an autoregressive rival of the same size.

    python bench.py                          all cases: the paper's shape on a GPU, a toy on a CPU
    python bench.py train --process duo --update soft
    python bench.py rival                    our causal model with a KV cache writes L tokens
    python bench.py scaling                  a training iteration over L, B and V

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

CHOICES = dict(mode=("train", "sample", "rival", "scaling"), process=("mdlm", "duo"),
               update=("hard", "marginal", "soft"), ending=("greedy", "ancestral"))
SIZES = dict(batch_size=(8, 2), block_size=(1024, 32), num_layers=(12, 2), num_heads=(12, 4),
             width=(768, 64), vocab=(50258, 1025), iters=(20, 3), steps=(16, 16))  # GPU, CPU
PEAK = 989e12                               # dense bfloat16 FLOP/s of H100 and H200
# (weights, attention, head) forwards of an iteration: 3 to update a network, 1 to run another (soft
# inputs: with a backward). The masked head counts where t or t_tilde, or both, mask.
UNITS = {"mdlm": (9, 9, 3.5), "hard": (9, 9, 9), "marginal": (9, 9, 9), "soft": (11, 13, 11)}
# The authors' released code, eager, same shape: measured, H200.  ms, GiB
AUTHORS = {"train mdlm B8": (315.8, 17.7), "train soft B8": (490.3, 66.2),
           "sample mdlm 16 B8": (591,), "sample mdlm 16 B32": (1549, 23.4),
           "sample greedy 4 B8": (212,), "sample greedy 4 B32": (790, 59.1)}
ALL = ["train --process mdlm"] + [f"train --process duo --update {u}" for u in CHOICES["update"]] \
    + [f"sample --process {case} --batch_size {B}" for case in ("mdlm --steps 16", "duo --steps 4")
       for B in (8, 32)] + [f"rival --batch_size {B}" for B in (1, 8, 32)]
SCALING = [f"scaling --{name} {size}" for name, sizes in dict(
    block_size=(256, 512, 1024, 2048), batch_size=(2, 4, 16), vocab=(1026, 8194, 131074)).items()
    for size in sizes]


def measure(args, name, V, parts, units=(0, 0, 0), warmup=5):
    """Call the functions `parts` in turn, again and again. -> median ms of each, record"""
    wait, cuda = getattr(torch, args.device.type).synchronize, args.device.type == "cuda"
    marks, graphs = [], []
    for part in [wait, *parts * (warmup + args.iters)]:
        part()                              # on CUDA the device notes the time, nobody waits
        marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(
            enable_timing=True)) if cuda else wait() or time.perf_counter())
        graphs.append(counters["stats"]["unique_graphs"])
    wait()
    times = torch.tensor([a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks)],
                         dtype=torch.float64).view(-1, len(parts))
    warm, times = times[:warmup].sum().item(), times[warmup:]
    low, ms, high = (round(times.sum(1).quantile(q).item(), 3) for q in (0.1, 0.5, 0.9))
    B, L, D, layers = args.batch_size, args.block_size, args.width, args.num_layers
    flops = B * L * D * (layers * (24 * units[0] * D + 4 * units[1] * L) + 2 * units[2] * V)
    known = flops and any(chip in args.where["device"] for chip in ("H100", "H200"))
    return times.median(0).values.tolist(), dict(
        name=f"{name} B{B}", process=args.process, B=B, L=L, V=V, layers=layers, width=D,
        median_ms=ms, p10_ms=low, p90_ms=high, tokens_per_s=round(1e3 * B * L / ms),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if cuda else None,
        mfu=round(1e3 * flops / ms / PEAK, 4) if known else None, iters=args.iters,
        compile_s=round(max(0, warm - warmup * ms) / 1e3, 1), compiled=args.compile,
        recompilations=graphs[-1] - graphs[warmup * len(parts)], **args.where,
        authors=AUTHORS.get(f"{name} B{B}") if (D, layers, L) == (768, 12, 1024) else None)


def network(args, V, **config):
    with args.device:
        net = DiT(ModelConfig(V, args.num_layers, args.num_heads, args.width, **config))
        for parameter in net.parameters():  # as trained: products with zeros would be faster
            torch.nn.init.normal_(parameter, std=0.02)
    return net.compile_trunk() if args.compile else net


def iteration(args, process, rng):
    """train.py's, in parts: loss and AdamW of the fake, of the generator, then EMA."""
    B, L = args.batch_size, args.block_size
    generator, fake, teacher = (network(args, process.vocab_size, dropout=args.dropout)
                                for _ in range(3))
    teacher.eval().requires_grad_(False)
    weights = [p.detach() for p in generator.parameters()]
    ema = [w.clone() for w in weights] if args.ema else []
    settings = argparse.Namespace(process=args.process, uniform_update=args.update, latent="state")

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


def cached_writer(net, tokens, u):
    """A function that continues column 0 of tokens (B, L + 1), one a pass. u (L, B): for the draws.

    The cache is of full length, so on CUDA all passes are one CUDA graph, replayed: launching the
    many small kernels would take longer than running them.
    """
    (L, B), position, step = u.shape, tokens.new_zeros(1), None
    heads = B, net.config.num_heads, L, net.config.width // net.config.num_heads

    def remember(keys, values, k, v):       # (B, H, L, d) x2, (B, H, 1, d) x2
        keys[:, :, position], values[:, :, position] = k, v
        return keys, values, (torch.arange(L, device=k.device) <= position)[None]

    @torch.no_grad()
    def write_one():                        # not net.project: it copies the head to align it
        h = net.hidden(tokens[:, position], u.new_zeros(B))[:, 0]
        drawn = idlm_loss.sample_categorical(net.output_layer.linear(h), u[position][0])
        tokens[:, position + 1] = drawn[:, None]
        position.add_(1)

    def write():
        position.zero_()
        for _ in range(L):
            step()

    net.rotary_emb.forward = partial(net.rotary_emb.forward, start=position)
    for block in net.blocks:
        empty = (torch.zeros(heads).to(net.vocab_embed.embedding) for _ in range(2))
        block.forward = partial(block.forward, cache=partial(remember, *empty))
    step = torch.compile(write_one) if idlm_loss.COMPILE else write_one
    if net.device.type == "cuda":
        for _ in range(3):                  # compiles and warms up
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    return write


def run(args, process, rng):
    """-> the record of one case"""
    n, B, L, V = args.steps, args.batch_size, args.block_size, process.vocab_size
    if args.mode == "sample":
        net, name, head = network(args, V).eval(), args.ending, n
        if args.process == "mdlm":          # the pass over all-[MASK] texts serves all B of them
            name, head, passes = "mdlm", 1, n - 1 + 1 / B
        write = partial(args.amp(sample), net, process, B, L, n, rng, ending=args.ending)
        return measure(args, f"sample {name} {n}", V, [write], (passes, passes, head))[1]
    if args.mode == "rival":
        args.process, V = "ar", process.K
        net = network(args, V, causal=True).eval()
        if args.device.type == "cuda":      # weights in bfloat16: a pass's cost is reading them
            for parameter in net.parameters():
                parameter.data = parameter.data.bfloat16()
        tokens = torch.zeros(B, L + 1, dtype=torch.int64, device=args.device)
        u = torch.rand(L, B, generator=rng).to(args.device)
        return measure(args, "rival", V, [cached_writer(net, tokens, u)], warmup=2)[1]
    kind = "mdlm" if args.process == "mdlm" else args.update
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
    gpu, onoff = torch.cuda.is_available(), argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter, description=__doc__)
    add = p.add_argument
    add("mode", nargs="?", choices=CHOICES["mode"])
