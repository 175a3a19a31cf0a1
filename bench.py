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

CHOICES = dict(process=("mdlm", "duo"), update=("hard", "marginal", "soft"),
               ending=("greedy", "ancestral"))          # the first is the default
SIZES = dict(batch_size=(8, 2), block_size=(1024, 32), num_layers=(12, 2), num_heads=(12, 4),
             width=(768, 64), vocab=(50258, 1025), iters=(20, 3), steps=(16, 16))  # on GPU, on CPU
PEAK = {"H100": 989e12, "H200": 989e12}     # dense bfloat16 FLOP/s; another device shows no MFU
# (weights, attention, head) forwards of an iteration: 3 for a network's own update, and a pass of
# the generator (fake step), of fake and teacher (generator step; soft inputs: with a backward).
# Masked head: 9 at the quarter masked at t and t_tilde, 3 and 2 where masked at one alone.
UNITS = {"mdlm": (9, 9, 3.5), "hard": (9, 9, 9), "marginal": (9, 9, 9), "soft": (11, 13, 11)}
# The authors' released code, eager, same shape: measured, H200.  ms, GiB, fake ms, generator ms
AUTHORS = {"train mdlm B8": (315.8, 17.7, 139.6, 176.2), "train soft B8": (490.3, 66.2, 147.7, 342.6),
           "sample mdlm 16 B8": (591,), "sample mdlm 16 B32": (1549, 23.4),
           "sample greedy 4 B8": (212,), "sample greedy 4 B32": (790, 59.1)}
ALL = ["train --process mdlm"] + [f"train --process duo --update {u}" for u in CHOICES["update"]] \
    + [f"sample --process {case} --batch_size {B}" for case in ("mdlm --steps 16", "duo --steps 4")
       for B in (8, 32)] + [f"rival --batch_size {B}" for B in (1, 8, 32)]
SCALING = [f"scaling --{flag} {size}" for flag, sizes in dict(
    block_size=(256, 512, 1024, 2048), batch_size=(2, 4, 16), vocab=(1026, 8194, 131074)).items()
    for size in sizes]


def now(device):
    if device.type == "cuda":               # the device notes the time, nobody waits
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def measure(args, name, V, parts, units=None, warmup=5):
    """Time rounds of `parts`, functions called in turn. -> median ms of each part, record"""
    cuda, stats, rounds = args.device.type == "cuda", counters["stats"], []
    began = time.perf_counter()
    for i in range(warmup + args.iters + 1):
        if i in (warmup, warmup + args.iters): ...
