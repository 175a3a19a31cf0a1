# SPDX-License-Identifier: MIT
"""Train a diffusion teacher and distil it with IDLM into a generator of few passes.

    python train.py                            masked process: teacher, idlm, a table and a sample
    python train.py --process duo              uniform process: teacher, dcd, idlm
    python train.py --stage idlm --init_from kuleshov-group/mdlm-owt --preset owt
    torchrun --standalone --nproc_per_node=8 train.py --preset owt

Each stage leaves out/<process>/<stage>.pt:
    teacher   MDLM's or Duo's training loss (teacher.py)
    dcd       discrete consistency distillation of the Duo teacher, what idlm then starts as
    idlm      generator and fake alternate (idlm_loss.py): IDLM, arXiv 2602.19066
    judge     an autoregressive model of the same data, which evaluate.py scores texts with
With no --stage, whatever is missing runs. Nothing finished is ever overwritten.

Every draw comes from a generator seeded by (seed, stage, step, part, micro-batch). So a run has no
random state to save, --resume goes on as if nothing had happened, and M processes compute what one
process computes that accumulates M micro-batches.
"""
import argparse
import copy
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import checkpoint
import idlm_loss
from data import BadInput, TextData
from generator import draw_latent, sample
from model import FITTED, DiT, ModelConfig
from teacher import dcd_loss, duo_loss, mdlm_loss, stratified_times

# A flag goes before the preset's entry for process, stage and tokenizer, that before the one for
# process and stage, that before the stage's, and that before the general one.
PRESETS = {
    # 2 CPU cores: ten minutes for everything. Characters of Shakespeare.
    "laptop": dict(
        data="data/shakespeare.txt", tokenizer="char", block_size=64, size="4x4x128", dropout=0.0,
        batch_size=64, micro_batch=64, ema=0.999, warmup=100, decay=0.1, beta2=0.95, save_every=600,
        teacher=dict(updates=2000, lr=3e-3), judge=dict(updates=450, lr=3e-3, batch_size=32),
        dcd=dict(updates=300, lr=3e-4, batch_size=32),
        idlm=dict(updates=750, lr=2e-4, batch_size=32, ema=0.99, warmup=20),
        **{"mdlm idlm": dict(latent="words:5", fake_lr=3e-4),
           "duo idlm": dict(updates=1100, fake_lr=3e-4)}),
    # One GPU: some minutes. The same text, a larger network.
    "gpu": dict(
        data="data/shakespeare.txt", tokenizer="char", block_size=256, size="8x6x384", dropout=0.1,
        batch_size=128, micro_batch=128, ema=0.999, warmup=200, decay=0.1, beta2=0.95,
        save_every=2000,
        teacher=dict(updates=10_000, lr=1e-3), judge=dict(updates=3000, lr=1e-3),
        dcd=dict(updates=2000, lr=1e-4),
        idlm=dict(updates=3000, lr=1e-4, fake_lr=3e-4, ema=0.99, warmup=50),
        **{"mdlm idlm": dict(latent="words", updates=1500, lr=2e-4, fake_lr=1e-3, ema=0.998,
                             dropout=0.0),
           "mdlm idlm gpt2": dict(lr=1e-4, fake_lr=3e-4, fake_updates=2, batch_size=64,
                                  micro_batch=64)}),
    # The paper's recipe: 169M parameters, batch 512, the published optimiser, whose rate stays as
    # it is after warm-up. The hub has the data set's parquet files under this name: no remote code.
    "owt": dict(
        data="Skylion007/openwebtext", tokenizer="gpt2", block_size=1024, size="12x12x768",
        dropout=0.1, batch_size=512, micro_batch=8, ema=0.9999, warmup=2500, decay=1.0, beta2=0.999,
        save_every=1000,
        teacher=dict(updates=1_000_000, lr=3e-4), judge=dict(updates=100_000, lr=3e-4),
        dcd=dict(updates=50_000, lr=6e-5), idlm=dict(updates=100_000, lr=1e-6, fake_lr=1e-6)),
}
STAGES = {"mdlm": ("teacher", "idlm"), "duo": ("teacher", "dcd", "idlm")}
ALL_STAGES = "teacher", "dcd", "idlm", "judge"
DCD_ROUNDS, DCD_DELTA = 5, 1 / 512   # a round's teacher is the student at its start; then 2 x delta
FULL_NOISE = {"gaussian": 0.25, "words": 0.05, "words gpt2": 0.1}    # share of texts at t_tilde = 1
FULL_NOISE_T_MIN = 0.3               # and their smallest t: the gap is large, 1 / t lets small t rule
VISIBLE_BETA = {"gaussian": 1.0, "words": 0.9}     # beta, where not steered, of texts with more words:
                                     # those of t_tilde = 1 make them more varied and 8 passes worse
STEER = (10, 1, 1.0, 0.02), (50, 8, 0.5, 0.1)    # beta "auto": every so many updates, by texts of
                                     # so many passes; proportional and integral gain. See Steering
STEER_ABOVE = 0.01                   # a little high: a lower temperature costs less than a higher
EVERY = {"char": 8, "gpt2": 4}       # --latent state, words: best of 3 to 12 in one pass, of 2 to 16
WORDS_FROM, FIT_TEXTS = 2 ** 26, 1024    # frequencies: of so many words; fitted with so many texts
CLIP = 1.0                           # gradient norm


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    # what to run
    add("--process", choices=STAGES, default="mdlm", help="masked or uniform noise")
    add("--stage", choices=ALL_STAGES, help="one stage; else all missing")
    add("--preset", choices=PRESETS, help="default: gpu with a CUDA device, else laptop")
    add("--out", help="run folder, default out/<process>")
    add("--resume", action="store_true", help="go on from a checkpoint; repeat its flags")
    add("--init_from", nargs="+", default=[], metavar=("TEACHER", "START"),
        help="of idlm or dcd: checkpoint, folder or hub name; default OUT/teacher.pt. START: what\n"
             "the generator starts as; default OUT/dcd.pt if both are left out, else TEACHER")
    # data and network
    add("--data", help="text file, glob of .txt[.gz|.xz], or hub data set")
    add("--tokenizer", choices=("char", "gpt2"))
    add("--block_size", type=int, help="tokens per text, L")
    add("--size", help="layers x heads x width, e.g. 12x12x768")
    add("--dropout", type=float)
    # optimisation
    add("--updates", type=int, help="of each stage (idlm: generator updates)")
    add("--batch_size", type=int, help="texts per update, over all processes")
    add("--micro_batch", type=int, help="texts per pass; the rest accumulates")
    add("--lr", type=float, help="peak learning rate (idlm: the generator's)")
    add("--fake_lr", type=float, help="idlm: the fake's")
    add("--fake_updates", type=int, help="idlm: per generator update")
    add("--ema", type=float, help="decay of the averaged weights that sampling uses")
    # the method
    add("--pairing", metavar="{independent,matched}[:STEPS]",
        help="t_tilde and t of a text: drawn apart (the paper) or alike (the authors' code);\n"
             "STEPS: t_tilde rounded up to the times that a sampler of so many steps visits.\n"
             "Default: matched; --process duo: matched:4, with characters independent (see README)")
    add("--latent",
        metavar="{state[:EVERY[:BETA]],words[:EVERY[:BETA]],gaussian[:DIM[:SCALE[:BETA]]]}",
        help="masked: what eps is beside the noised text. state (preset owt): nothing, but few passes begin with every\n"
             "EVERY-th word there (8, of GPT-2's 4; 0: none), about by frequency; words (presets laptop, with 5, and\n"
             "gpu): one text in twenty trains as such; gaussian: z where all is [MASK], DIM numbers a position, SCALE\n"
             "times the embeddings' size (64, 1). The fake's bound counts BETA times, against mode seeking: a number\n"
             "(default 1; words, gaussian: in those texts; the others have 0.9, 1) or auto (default of gaussian, and\n"
             "of words of GPT-2's), which holds the entropy of all texts")
    add("--uniform_update", default="hard",
        metavar="{hard[:OWN],marginal[:OWN][:BETA],soft}",
        help="OWN: weighed, G weighs in the token it stands on, or ignored (as published); default:\n"
             "weighed for GPT-2's words, ignored for characters (README says why). BETA: as above,\n"
             "in all texts (1)")
    # the machine
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=("float64", "float32", "bfloat16"), help="bfloat16: by autocast")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: where it helps")
    add("--seed", type=int, default=1)
    args = p.parse_args(argv)
    counts = "updates", "batch_size", "micro_batch", "block_size", "fake_updates"  # at least 1
    for name, value in vars(args).items():
        low, high = name in counts, 1 if name == "dropout" else math.inf
        if type(value) in (int, float) and not low <= value < high:
            raise BadInput(f"--{name} {value} is out of range: see --help")
    if args.stage not in (None, "judge", *STAGES[args.process]):
        raise BadInput(f"--stage {args.stage} is none of {args.process}: try --process duo")
    if args.init_from and args.stage not in ("dcd", "idlm"):
        raise BadInput(f"--init_from {' '.join(args.init_from)} gives a teacher: add --stage idlm "
                       "(or dcd)")
    if len(args.init_from) > (2 if args.stage == "idlm" else 1):
        raise BadInput(f"--init_from {' '.join(args.init_from)}: give a teacher and, for --stage "
                       "idlm, what the generator starts as")
    if args.latent:
        vars(args).update(parse_latent(args.latent))
    if args.latent not in (None, "state") and args.process == "duo":
        raise BadInput(f"--latent {args.latent} is for the masked process: leave it out")
    own = "(?::(weighed|ignored))?"
    update = re.fullmatch(f"(soft)|(hard){own}|(marginal){own}{BETA}?", args.uniform_update)
    if not update:
        raise BadInput(f"--uniform_update {args.uniform_update}: use hard, marginal or soft, or of "
                       "the first two, say, hard:weighed")
    soft, hard, own_1, marginal, own_2, beta = update.groups()
    args.uniform_update, args.own_token = soft or hard or marginal, own_1 or own_2
    if args.process == "duo":
        args.beta = beta or "1"
    pairing = re.fullmatch(r"(?:(independent|matched)(?::([1-9]\d*))?)?", args.pairing or "")
    if not pairing:
        raise BadInput(f"--pairing {args.pairing}: use independent or matched, or, say, matched:4")
    args.pairing, args.grid = pairing[1], int(pairing[2] or 0)
    args.device = pick_device(args.device)
    args.preset = args.preset or ("gpu" if args.device.type == "cuda" else "laptop")
    args.out = Path(args.out or f"out/{args.process}")
    args.dtype = args.dtype or ("bfloat16" if has_bfloat16(args.device) else "float32")
    if args.compile is None:             # on a CPU it needs a C++ compiler at run time
        compilers = any(map(shutil.which, ("g++", "clang++", "cl")))
        args.compile = {"cuda": True, "cpu": compilers}.get(args.device.type, False)
    return args


COUNT, NUMBER, BETA = r"(?::([1-9]\d*))", r"(?::(\d+\.?\d*))", r"(?::(\d+\.?\d*|auto))"


def parse_latent(spec):
    found = re.fullmatch(rf"(?:state|words)(?::(\d+){BETA}?)?"
                         rf"|gaussian(?:{COUNT}(?:{NUMBER}{BETA}?)?)?", spec)
    every, beta_1, dim, scale, beta_2 = found.groups() if found else [0] * 5
    if not found or every == "1" or spec[0] == "w" and every and not int(every):
        raise BadInput(f"--latent {spec}: use state, words, gaussian or, say, words:5:1.1")
    return dict(latent=spec.split(":")[0], latent_dim=int(dim or 64), beta=beta_1 or beta_2,
                latent_scale=float(scale or 1), latent_words=int(every) if every else None)


def pick_device(name):
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + \
        ["cpu"]
    name, rank = name or there[0], os.environ.get("LOCAL_RANK")
    if name.split(":")[0] not in there:
        raise BadInput(f"--device {name}: this machine has {there}; drop the flag for the first")
    return torch.device(f"cuda:{rank}" if name == "cuda" and rank else name)


def has_bfloat16(device):
    """Does autocast to bfloat16 pay? On a CPU only with matrix units for it (AMX): with AVX-512's
    instructions alone an update of the laptop preset takes longer than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def settings_of(args, stage):
    preset = PRESETS[args.preset]
    found = {k: v for k, v in preset.items() if not isinstance(v, dict)} | {"fake_updates": 1} \
        | preset[stage] | preset.get(f"{args.process} {stage}", {}) \
        | preset.get(f"{args.process} {stage} {args.tokenizer or preset['tokenizer']}", {})
    found |= parse_latent(found.get("latent", "state"))
    found |= {k: v for k, v in vars(args).items() if v is not None or k not in found}
    s = argparse.Namespace(**found | {"stage": stage})
    s.world, s.rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0)))
    if s.batch_size % s.world:
        raise BadInput(f"--batch_size {s.batch_size} cannot be shared by {s.world} processes: "
                       "choose a multiple")
    s.micro_batch = math.gcd(s.batch_size // s.world, s.micro_batch)
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", s.size)
    if not sizes or int(sizes[3]) % (2 * int(sizes[2])):
        raise BadInput(f"--size {s.size}: give layers x heads x width, as in 12x12x768, with an "
                       "even width for each head")
    s.layers, s.heads, s.width = map(int, sizes.groups())
    if s.latent_words is None:
        s.latent_words = EVERY[s.tokenizer]
    s.own_token = s.own_token or ("weighed" if s.tokenizer == "gpt2" else "ignored")
    kind = f"{s.latent} {s.tokenizer}"
    s.full_noise = FULL_NOISE.get(kind, FULL_NOISE.get(s.latent, 0.0))
    s.beta = s.beta or ("auto" if s.latent == "gaussian" or kind == "words gpt2" else "1")
    if s.beta != "auto":                 # in texts that are noise alone; in others
        s.beta = float(s.beta)
        s.betas = s.beta, VISIBLE_BETA.get(s.latent, s.beta)
    uniform = s.process == "duo"
    soft = uniform and s.uniform_update == "soft"
    if not s.pairing:
        s.pairing = "independent" if uniform and s.tokenizer == "char" else "matched"
        s.grid = 4 if uniform and s.tokenizer == "gpt2" and not soft else 0
    if s.grid and soft:
        raise BadInput(f"--pairing {s.pairing}:{s.grid}: --uniform_update soft has the Gaussian's "
                       "clock, not the sampler's steps; leave them out")
    s.weights = torch.float64 if s.dtype == "float64" else torch.float32
    # No cache: before torch 2.13 a weight first cast under no_grad stays without gradient in it.
    s.autocast = torch.autocast(s.device.type, dtype=torch.bfloat16, cache_enabled=False,
                                enabled=s.dtype == "bfloat16")
    return s


def key_of(s, step, part=0, micro=0):
    """One seed for one set of draws; see the module's docstring."""
    key = (s.seed * 4 + ALL_STAGES.index(s.stage)) * 10 ** 7 + step
    return ((key * 16 + part) * 4096 + micro) % 2 ** 63


class Trainee:
    """A network with its optimiser, schedule and averaged weights."""

    def __init__(self, net, lr, s, averaged=True):
        self.net, self.lr, self.s = net, lr, s
        self.ema = copy.deepcopy(net).eval().requires_grad_(False) if averaged else None
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, s.beta2),
                                           weight_decay=0.0, fused=s.device.type in ("cuda", "cpu"))

    def update(self, step, part, loss_of):
        """One optimiser update: loss_of(m, M) over the micro-batches of this process, gradients
        averaged over all processes and clipped. Returns mean loss and gradient norm."""
        s, total, M = self.s, 0.0, self.s.batch_size // self.s.micro_batch
        weights = [*self.net.parameters()]
        for m in range(s.rank, M, s.world):
            torch.manual_seed(-key_of(s, step, part, m))   # dropout; seeds of `batch` are positive
            torch.compiler.cudagraph_mark_step_begin()
            with s.autocast:
                loss = loss_of(m, M) / M
            loss.backward()
            total += loss.detach()
            if m == s.rank and m + s.world < M:            # out of the CUDA graph's memory, which
                for p in weights:                          # its next replay overwrites
                    p.grad = p.grad.clone()
        if s.world > 1:                  # once, after the last micro-batch: what DDP's no_sync does
            shares = [total, *(p.grad for p in weights)]
            sums = parameters_to_vector(shares)
            dist.all_reduce(sums)
            vector_to_parameters(sums, shares)
        norm = torch.nn.utils.clip_grad_norm_(weights, CLIP)
        # linear warm-up, then a cosine down to the share `decay`
        factor = 1 - (1 - s.decay) * (1 - math.cos(math.pi * min(1, step / s.updates))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor * min(1, (step + 1) / max(1, s.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:         # early on a shorter average, not mostly the start
            decay = min(s.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_([*self.ema.parameters()], weights, 1 - decay)
        return total, norm


# ---- the losses of a stage ----------------------------------------------------------------------

def plain_loss(s, step, process, net, teacher, x_0, t, t_tilde, rng):
    """teacher, dcd and judge: one network, one loss."""
    if s.stage == "judge":
        h = net.hidden(x_0[:, :-1], torch.zeros(len(x_0))).flatten(0, 1)
        target = idlm_loss.to_device(x_0[:, 1:].flatten(), s.device)
        return idlm_loss.per_row(idlm_loss.cross_entropy, net.config.vocab_size, (net,), h,
                                 target).mean()
    if s.stage == "dcd":
        round_ = step // math.ceil(s.updates / DCD_ROUNDS)
        return dcd_loss(net, teacher, process, x_0, DCD_DELTA * 2 ** round_, rng, t)
    if s.process == "mdlm":
        return mdlm_loss(net, process, x_0, rng, t)
    return duo_loss(net, process, x_0, rng, soft=step < s.updates // 2, t=t)


def idlm_step(which, s, process, net, fake, teacher, x_0, t, t_tilde, rng):
    """The loss of `which`, "fake" or "generator": draw eps, draw the second noise, compare."""
    soft, L = s.process == "duo" and s.uniform_update == "soft", x_0.shape[1]
    eps = draw_latent(net, process, x_0, t_tilde, rng, soft=soft)
    if s.process == "mdlm":
        # The fake's sigma input, otherwise unused (0), tells it t_tilde, with words t_tilde = 1
        # alone: telling it the level of the others, too, makes no difference beyond that between
        # seeds there (results/README.md, "One pass").
        blank = (t_tilde == 1) & (s.latent != "state")
        level, knows = -process.alpha(t_tilde)[0].log(), blank | (s.latent == "gaussian")
        told = torch.where(knows, level, process.sigma(t))
        noise = process.draw_mask(t, L, rng), process.weight(t), told
        if which == "fake":
            return idlm_loss.masked_fake_loss(net, fake, eps, *noise, process.mask_id, rng)
        beta = torch.where(blank, *s.betas)
        return idlm_loss.masked_generator_loss(net, fake, teacher, eps, *noise, process.sigma(t),
                                               process.mask_id, rng, beta=beta)
    if soft:
        scale, std, a, dalpha = process.gaussian(t)
        noise, how, gap = (scale, std, a, dalpha, -a.log()), {}, {}
        fake_loss, generator_loss = idlm_loss.soft_fake_loss, idlm_loss.soft_generator_loss
    else:
        noise = *process.draw_noise(t, L, rng), *process.alpha(t), process.sigma(t)
        how = {"weigh": s.own_token == "weighed"}
        gap = {"gap": getattr(idlm_loss, s.uniform_update + "_gap"),
               "beta": torch.where(t_tilde == 1, *s.betas)}
        fake_loss, generator_loss = idlm_loss.uniform_fake_loss, idlm_loss.uniform_generator_loss
    if which == "fake":
        return fake_loss(net, fake, eps, *noise, process.K, rng, **how)
    return generator_loss(net, fake, teacher, eps, *noise, process.K, rng, **how, **gap)


def mean_entropy(tokens):                                  # (B, L) -> nats
    from evaluate import entropy                           # which itself imports this file
    return np.mean([entropy(text) for text in tokens.numpy()])


class Steering(torch.nn.Module):
    """beta "auto": holds the entropy of the generator's texts at that of training text.

    A generator that seeks modes writes with too few different words, one whose beta is too large
    with too many rare ones, and which beta is right changes as it learns. So texts are written now
    and then, and what their unigram entropy lacks sets beta, by a proportional and an integral
    part. Two numbers, each for the texts it acts on: [0] by what one pass writes, of texts that are
    noise alone (t_tilde = 1); [1] by 8 passes, of the others.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("beta", torch.ones(2))
        self.register_buffer("integral", torch.zeros(2))

    def update(self, which, s, process, net, x_0, rng):
        _, passes, proportional, integral = STEER[which]
        next_graph = torch.compiler.cudagraph_mark_step_begin
        next_graph()
        with s.autocast:
            y = sample(net, process, *x_0.shape, passes, rng, temperature=1.0,
                       callback=lambda *_: next_graph()).tokens
        lack = mean_entropy(x_0) - mean_entropy(y) + STEER_ABOVE
        total = (self.integral[which] + integral * lack).clamp(-0.1, 1)    # no further than beta
        self.integral[which] = total
        self.beta[which] = (1 + total + proportional * lack).clamp(0.9, 2)


@torch.no_grad()
def fit_words(net, process, x_0, rng, passes=1, rounds=5):
    """Words that texts begin with: by frequency to the power at which texts of so many passes have
    the unigram entropy of the training texts x_0 (N, L), or a little above.

    At one entropy, varied words and a cold network (generator.own_temperature) beat words as they
    are and a warm one: what the network draws, it draws independently. The power is sought
    between 0.5 and 1.5 by straight lines through the last two on either side.
    """
    law, wanted = net.word_frequencies(passes).clone(), mean_entropy(x_0) + STEER_ABOVE
    texts, state = FIT_TEXTS // min(passes, 4), rng.get_state()      # fewer of what takes longer

    def above(power):                                      # falls as the power rises
        net.set_frequencies(law ** power, [passes])
        rng.set_state(state)
        y = [sample(net, process, len(part), x_0.shape[1], passes, rng).tokens
             for part in x_0[:texts].split(256)]
        return mean_entropy(torch.cat(y)) - wanted

    ends = {power: above(power) for power in (0.5, 1.5)}
    for _ in range(rounds - 2):
        (low, over), (high, under) = ends.items()
        if over <= 0 or under >= 0:                        # out of reach: that end
            ends.pop(high if over <= 0 else low)
            break
        power = low + (high - low) * over / (over - under)
        left = above(power)
        ends = {power: left, high: under} if left > 0 else {low: over, power: left}
    power = min(ends, key=lambda power: abs(ends[power]))
    net.set_frequencies(law ** power, [passes])
    return power


def load_networks(s, data, saved):
    """The teacher, the network that this stage's own one starts as, and their names. A generator
    starts as the DCD student where there is one; but its teacher is what was trained on the NELBO,
    which the loss compares. As a teacher the student costs entropy (results/laptop_start.json)."""
    if s.init_from or saved:
        names = s.init_from or [saved["teacher"], saved.get("start", saved["teacher"])]
    else:
        student = s.stage == "idlm" and (s.out / "dcd.pt").exists()
        names = [s.out / "teacher.pt", s.out / ("dcd.pt" if student else "teacher.pt")]
    (teacher, start), nets = (str(names[0]), str(names[-1])), {}
    for name in {teacher, start}:
        net, meta = checkpoint.load_network(name, s.device, s.process)
        if meta["tokenizer"] != data.spec:
            raise BadInput(f"{name} has another tokenizer ({meta['tokenizer']['name']}) than --data "
                           f"{s.data} gives: name the data it was trained on")
        nets[name] = net.to(s.weights)
    kept = {k: getattr(nets[start].config, k) for k in ("dropout", "latent_words")}
    if nets[start].config != replace(nets[teacher].config, **kept):
        raise BadInput(f"{start} has another shape than {teacher}: a generator starts as a network "
                       "of its teacher's shape")
    return nets[teacher], nets[start], {"teacher": teacher, "start": start}


# ---- a stage ------------------------------------------------------------------------------------

def run_stage(args, stage, data):
    s = settings_of(args, stage)
    path = s.out / f"{stage}.pt"
    saved = checkpoint.load(path) if path.exists() else None
    start = saved["step"] if saved else 0
    if saved and start >= saved["updates"] and not args.stage:
        return print(f"{path} is finished: kept")
    if saved and not (s.resume and start < min(s.updates, saved["updates"])):
        raise BadInput(f"{path} is at step {start} of {saved['updates']}: finish it with --resume, "
                       "or choose another folder with --out")
    meta = dict(process="ar" if stage == "judge" else s.process, tokenizer=data.spec, stage=stage,
                block_size=s.block_size, data=str(s.data), updates=s.updates,
                latent=s.latent if stage == "idlm" else "state")
    process = checkpoint.make_process(meta) if stage != "judge" else None
    config = ModelConfig(process.vocab_size if process else data.K, s.layers, s.heads, s.width,
                         dropout=s.dropout, causal=stage == "judge")
    teacher = None
    if stage in ("dcd", "idlm"):
        teacher, begin, names = load_networks(s, data, saved)
        meta |= names
        config = replace(teacher.config, dropout=s.dropout)
        if stage == "idlm" and s.latent == "gaussian":
            config = replace(config, latent_dim=s.latent_dim, latent_scale=s.latent_scale)
        elif stage == "idlm" and s.process == "mdlm":
            config = replace(config, latent_words=s.latent_words)
    flags = {k: str(v) for k, v in vars(s).items() if k != "autocast"}
    meta |= {"config": asdict(config), "args": flags}
    method = "pairing", "grid", "own_token", "uniform_update", "beta", "betas", "full_noise"
    for name in method * bool(saved and s.stage == "idlm"):
        now = flags.get(name)
        if (begun := saved["args"].get(name, now)) != now:
            raise BadInput(f"{path} was begun with {name} {begun}, not {now}: repeat the flags it "
                           "was begun with, or choose another folder with --out")
    if saved and saved["config"] != meta["config"]:
        raise BadInput(f"{path} holds a network of another shape, {saved['config']}: repeat its "
                       "flags, or choose another folder with --out")
    torch.manual_seed(s.seed)
    net = DiT(config).to(s.device, s.weights)
    if teacher:                          # what is left is the map of z: random
        state = net.state_dict()
        net.load_state_dict(state | {k: v for k, v in begin.state_dict().items() if k in state})
    if config.latent_dim:                # at the size of the embeddings that it has now
        net.init_latent()
    if config.latent_words:
        count = np.bincount(data.train[:WORDS_FROM], minlength=data.K)
        net.set_frequencies(torch.tensor(count))
    main, fake, steering = Trainee(net, s.lr, s), None, None
    kept = {"ema": main.ema, "main": net, "main_optimizer": main.optimizer}    # for --resume
    if stage == "idlm":
        fake = DiT(replace(teacher.config, dropout=s.dropout)).to(s.device, s.weights)
        fake.load_state_dict(teacher.state_dict())
        follower = Trainee(fake, s.fake_lr, s, averaged=False)
        kept |= {"fake": fake, "fake_optimizer": follower.optimizer}
        if s.beta == "auto":
            steering = kept["steering"] = Steering()       # on the CPU, where times and masks are
            s.betas = steering.beta
    if stage == "dcd":
        kept["round_teacher"] = teacher
    if teacher:
        teacher.freeze(torch.bfloat16 if s.dtype == "bfloat16" else None)
    if saved:
        for name, part in kept.items():
            part.load_state_dict(saved[name])
        saved = None                     # it may be gigabytes
    if s.compile:
        idlm_loss.COMPILE = s.device.type == "cuda"
        torch._dynamo.config.cache_size_limit = 64       # one function, many formulas
        for network in filter(None, (net, fake, teacher)):
            network.compile_trunk()

    def batch(step, part, m, M):         # the m-th of M interleaved parts of the global batch
        rng = torch.Generator().manual_seed(key_of(s, step, part))
        x_0 = data.batch("train", s.batch_size, rng, slice(m, None, M))
        t, t_tilde = (stratified_times(s.batch_size, rng) for _ in range(2))
        if s.pairing == "independent":
            t_tilde = t_tilde[torch.randperm(s.batch_size, generator=rng)]
        if s.grid:
            t_tilde = (t_tilde * s.grid).ceil() / s.grid
        if stage == "idlm" and s.latent != "state":
            full = torch.rand(s.batch_size, generator=rng) < s.full_noise
            t_tilde[full], t[full] = 1.0, FULL_NOISE_T_MIN + (1 - FULL_NOISE_T_MIN) * t[full]
        rng = torch.Generator().manual_seed(key_of(s, step, part, m + 1))
        return x_0, t[m::M], t_tilde[m::M], rng

    # Losses stay on the device until a line is due: the host does not wait for them in between.
    one, few = s.grid or s.latent != "state", s.grid != 1   # are there texts of t_tilde = 1, of less?
    steers = [i for i, there in enumerate((one, few)) if steering and there]
    rows, clock, tick = [], time.time(), max(1, min(50, s.updates // 20))
    for step in range(start, s.updates):
        net.train()
        if stage == "idlm":
            nets = net, fake, teacher
            # ======== ALGORITHM, inner problem: the fake follows the generator ========
            fake.train().requires_grad_(True)
            for part in range(1, 1 + s.fake_updates):
                fake_loss, fake_norm = follower.update(step, part, lambda m, M: idlm_step(
                    "fake", s, process, *nets, *batch(step, part, m, M)))
            for which in steers:
                if step % STEER[which][0] == 0:
                    x_0, *_, rng = batch(step, 15, 0, s.batch_size // s.micro_batch)
                    steering.update(which, s, process, net, x_0, rng)
            # ======== ALGORITHM, outer problem: the generator descends the gap ========
            fake.eval().requires_grad_(False)
            loss, norm = main.update(step, 0, lambda m, M: idlm_step(
                "generator", s, process, *nets, *batch(step, 0, m, M)))
            rows.append({"fake": fake_loss, "fake_grad": fake_norm, "gap": loss, "grad": norm} |
                        {f"beta_{i}": s.betas[i].clone() for i in steers})
        else:
            if stage == "dcd" and step and step % math.ceil(s.updates / DCD_ROUNDS) == 0:
                teacher.load_state_dict(main.ema.state_dict())
            loss, norm = main.update(step, 0, lambda m, M: plain_loss(
                s, step, process, net, teacher, *batch(step, 0, m, M)))
            rows.append({{"dcd": "kl", "judge": "nll"}.get(stage, "nelbo"): loss, "grad": norm})
        step += 1
        due = step % s.save_every == 0 or step == s.updates
        if due or step % tick == 0:      # stops at a non-finite loss, before anything is saved
            report(s, step, rows, time.time() - clock)
            rows, clock = [], time.time()
        if due and s.rank == 0:
            if step == s.updates and config.latent_words:
                rng = torch.Generator().manual_seed(key_of(s, step, 15))
                x_0 = data.batch("train", 8 * FIT_TEXTS, rng)
                with s.autocast:
                    powers = [fit_words(main.ema, process, x_0, rng, n) for n in FITTED]
                print(f"  texts of {', '.join(map(str, FITTED))} passes begin with words by frequency "
                      f"to the power {', '.join(f'{power:.2f}' for power in powers)}", flush=True)
            parts = kept if step < s.updates else {"ema": main.ema}    # finished: no optimiser
            checkpoint.save(path, meta | checkpoint.provenance(s.seed, s.device) | {"step": step} |
                            {name: part.state_dict() for name, part in parts.items()})
            show(s, step, process, main.ema, data)
            clock = time.time()
    if s.world > 1:
        dist.barrier()                   # the next stage reads what process 0 has written


@torch.no_grad()
def show(s, step, process, net, data):
    """Held-out loss, with draws that are the same at every call, and a text on the screen. Both
    have their own generators: looking does not disturb training."""
    rng = torch.Generator().manual_seed(0)
    with s.autocast:
        if s.stage in ("teacher", "judge"):
            loss = plain_loss(s, s.updates, process, net, None, data.val_blocks(2 * s.micro_batch),
                              None, None, rng).item()
            print(f"  held-out loss {loss:.3f} nats per token", flush=True)
            log(s, {"stage": s.stage, "step": step, "held_out": loss})
        if process:
            text = sample(net, process, 1, s.block_size, 64 if s.stage == "teacher" else 16, rng)
            print(f"  a text in {text.nfe.max()} passes: "
                  f"{data.tokenizer.decode(text.tokens[0].tolist())!r}", flush=True)


def report(s, step, rows, seconds):
    """A line on the terminal and in log.jsonl: means over the updates since the last one."""
    means = {k: torch.stack([row[k] for row in rows]).mean().item() for k in rows[0]}
    for name, value in means.items():
        if not math.isfinite(value):
            raise BadInput(f"{s.stage}: {name} is {value} between steps {step - len(rows) + 1} and "
                           f"{step}; the last checkpoint is kept. Lower the learning rate")
    ms = 1e3 * seconds / len(rows)
    parts = " | ".join(f"{k} {v:.3f}" for k, v in means.items())
    print(f"{s.stage} {step}/{s.updates} | {parts} | {ms:.0f} ms | "
          f"{s.batch_size * s.block_size / ms:.1f}k tok/s | "
          f"eta {(s.updates - step) * ms / 60e3:.1f}m", flush=True)
    if s.rank == 0:
        log(s, {"stage": s.stage, "step": step, "ms": ms, **means})


def log(s, line):
    with open(s.out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def main(argv=None):
    args, began = parse_args(argv), time.time()
    s = settings_of(args, args.stage or "teacher")
    if s.world > 1:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))   # another machine may tokenise longer
    if s.rank:                           # one process speaks
        sys.stdout = open(os.devnull, "w")
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.init_from:          # a wrong one is told before hours of tokenising
        checkpoint.load_network(name, "cpu", args.process)
    data = TextData(s.data, s.tokenizer, s.block_size)
    print(f"{args.process}, preset {args.preset}, {args.device}, {args.dtype}, compile "
          f"{'on' if args.compile else 'off'}, seed {args.seed}, in {args.out}\n{s.data}: {data.K} "
          f"words, {len(data.train):,} tokens to train, the last {len(data.val):,} held out")
    for stage in [args.stage] if args.stage else STAGES[args.process]:
        run_stage(args, stage, data)
        print(f"{(time.time() - began) / 60:.1f} minutes so far", flush=True)
    if not args.stage and s.rank == 0:
        import evaluate
        import sample as writer
        try:
            evaluate.short_table(args.out, args.process, args.device, args.seed)
        except BadInput as error:        # a small text: what was trained is good all the same
            print(f"no table: {error}")
        writer.main(["--out", str(args.out), "--process", args.process, "--num_samples", "2",
                     "--device", str(args.device)])
        print(f"{(time.time() - began) / 60:.1f} minutes in all. Next: python sample.py --steps 16")
    if s.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"train.py: {error}")
