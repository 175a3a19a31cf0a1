# SPDX-License-Identifier: MIT
"""Train a diffusion teacher and distil it with IDLM into a generator of few passes.

    python train.py                            masked process: teacher -> idlm -> table and a sample
    python train.py --process duo              uniform process: teacher -> dcd -> idlm
    python train.py --stage idlm --init_from kuleshov-group/mdlm-owt --preset owt
    torchrun --standalone --nproc_per_node=8 train.py --preset owt

Stages, each leaving out/<process>/<stage>.pt:
    teacher   MDLM's or Duo's training loss (teacher.py)
    dcd       discrete consistency distillation of the Duo teacher, a better start for idlm
    idlm      generator and fake alternate (idlm_loss.py); Algorithm 1 of arXiv 2602.19066
    judge     an autoregressive model of the same data, which evaluate.py scores texts with
With no --stage, whatever is missing runs. Nothing finished is ever overwritten.

Every random draw comes from a generator seeded by (seed, stage, step, micro-batch). So a run has
no random state to save, --resume continues as if nothing had happened, and one process that
accumulates M micro-batches computes what M processes with one each compute.
"""
import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import idlm_loss
from data import BadInput, TextData
from generator import draw_latent, sample
from model import DiT, ModelConfig
from teacher import Uniform, dcd_loss, duo_loss, mdlm_loss, stratified_times

# What a preset sets may be set by a flag too; a stage's own entry goes before the general one.
PRESETS = {
    # 2 CPU cores: about 9 minutes for everything. Characters of Shakespeare.
    "laptop": dict(data="data/shakespeare.txt", tokenizer="char", block_size=64, size="4x4x128",
                   dropout=0.0, batch_size=64, micro_batch=64, ema=0.999, warmup=100, beta2=0.95,
                   save_every=1000, teacher=dict(updates=2000, lr=2e-3),
                   dcd=dict(updates=500, lr=3e-4, batch_size=32),
                   idlm=dict(updates=1100, lr=1e-4, fake_lr=3e-4, batch_size=32, ema=0.99, warmup=20),
                   judge=dict(updates=1500, lr=2e-3)),
    # One GPU: some minutes. The same text, a larger network.
    "gpu": dict(data="data/shakespeare.txt", tokenizer="char", block_size=256, size="8x6x384",
                dropout=0.1, batch_size=128, micro_batch=128, ema=0.999, warmup=200, beta2=0.95,
                save_every=2000, teacher=dict(updates=10_000, lr=1e-3),
                dcd=dict(updates=2000, lr=1e-4),
                idlm=dict(updates=3000, lr=3e-5, fake_lr=3e-4, ema=0.99, warmup=50),
                judge=dict(updates=3000, lr=1e-3)),
    # The paper's recipe: 169M parameters, batch 512, the published optimiser. Days on eight GPUs.
    "owt": dict(data="openwebtext", tokenizer="gpt2", block_size=1024, size="12x12x768",
                dropout=0.1, batch_size=512, micro_batch=8, ema=0.9999, warmup=2500, beta2=0.999,
                save_every=1000, teacher=dict(updates=1_000_000, lr=3e-4),
                dcd=dict(updates=50_000, lr=6e-5), idlm=dict(updates=100_000, lr=1e-6, fake_lr=1e-6),
                judge=dict(updates=100_000, lr=3e-4)),
}
STAGES = {"mdlm": ("teacher", "idlm"), "duo": ("teacher", "dcd", "idlm")}
DCD_ROUNDS, DCD_DELTA = 5, 1 / 512      # the teacher of a round is the student at its start; 2x delta
LATENT_DIM, FULL_NOISE = 64, 0.5        # --latent gaussian: size of z, share of rows at t_tilde = 1
CLIP = 1.0


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add, onoff = p.add_argument, argparse.BooleanOptionalAction
    # what to run
    add("--process", choices=("mdlm", "duo"), default="mdlm", help="masked or uniform noise")
    add("--stage", choices=("teacher", "dcd", "idlm", "judge"), help="one stage; else all missing")
    add("--preset", choices=PRESETS, help="default: gpu with a CUDA device, else laptop")
    add("--out", help="run folder, default out/<process>")
    add("--resume", action="store_true", help="go on from an unfinished checkpoint")
    add("--init_from", help="teacher for idlm or dcd: a checkpoint, folder or hub name")
    # data and network
    add("--data", help="text file, glob of .txt[.gz|.xz], or hub data set")
    add("--tokenizer", choices=("char", "gpt2"))
    add("--block_size", type=int, help="tokens per text, L")
    add("--size", help="layers x heads x width, e.g. 12x12x768")
    add("--dropout", type=float)
    # optimisation
    add("--updates", type=int, help="of this stage (idlm: generator updates)")
    add("--batch_size", type=int, help="texts per update, over all processes")
    add("--micro_batch", type=int, help="texts per pass; the rest accumulates")
    add("--lr", type=float, help="peak learning rate (idlm: the generator's)")
    add("--fake_lr", type=float, help="idlm: the fake's")
    add("--fake_updates", type=int, default=1, help="idlm: per generator update")
    add("--ema", type=float, help="decay of the averaged weights that sampling uses")
    # the method
    add("--pairing", choices=("independent", "matched"), default="independent",
        help="how t_tilde and t of a row are paired")
    add("--latent", choices=("state", "gaussian"), default="state", help="masked generator: eps is "
        "the noised text alone, or with an added Gaussian z (for 1 to 4 passes)")
    add("--uniform_update", choices=("hard", "marginal", "soft"), default="hard")
    # the machine
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=("float64", "float32", "bfloat16"), help="bfloat16: autocast")
    add("--compile", action=onoff, help="torch.compile; default: on where it helps")
    add("--seed", type=int, default=1)
    args = p.parse_args(argv)
    args.device = pick_device(args.device)
    args.preset = args.preset or ("gpu" if args.device.type == "cuda" else "laptop")
    args.out = Path(args.out or f"out/{args.process}")
    if args.dtype is None:
        args.dtype = "bfloat16" if has_bfloat16(args.device) else "float32"
    if args.compile is None:            # on the CPU it needs a C++ compiler at run time
        args.compile = args.device.type == "cuda" or (
            args.device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "cl"))))
    for name in ("updates", "batch_size", "micro_batch", "block_size", "fake_updates"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def pick_device(name):
    mps = getattr(torch.backends, "mps", None)
    there = {"cuda": torch.cuda.is_available(), "mps": bool(mps and mps.is_available()), "cpu": True}
    if name is None:
        name = next(d for d, ok in there.items() if ok)
    if not there.get(name.split(":")[0], False):
        raise BadInput(f"--device {name}: this machine has {[d for d, ok in there.items() if ok]}; "
                       "leave the flag out to take the first")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(name)


def has_bfloat16(device):
    """Does autocast to bfloat16 pay? On a CPU only with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and ask()


def settings_of(args, stage):
    """The stage's settings: flags, then the preset's entry for the stage, then the preset."""
    preset = PRESETS[args.preset]
    s = argparse.Namespace(**{k: v for k, v in preset.items() if not isinstance(v, dict)})
    vars(s).update({"fake_lr": None} | preset[stage])
    vars(s).update({k: v for k, v in vars(args).items() if v is not None or not hasattr(s, k)})
    s.stage = stage
    if s.batch_size % s.micro_batch:
        s.micro_batch = math.gcd(s.batch_size, s.micro_batch)
    return s


def rng_of(seed, stage, step, part=0, micro=0):
    """A CPU generator for one set of draws; see the module's docstring."""
    stage = ("teacher", "dcd", "idlm", "judge", "sample").index(stage)
    key = (((seed * 8 + stage) * 10_000_000 + step) * 16 + part) * 4096 + micro
    return torch.Generator().manual_seed(key % 2 ** 63)


# ---- one optimiser update -----------------------------------------------------------------------

class Trainee:
    """A network with its optimiser, its averaged weights and its learning-rate schedule."""

    def __init__(self, net, lr, s, averaged=True):
        self.net, self.lr, self.s = net, lr, s
        self.ema = copy.deepcopy(net).eval().requires_grad_(False) if averaged else None
        fused = next(net.parameters()).device.type in ("cuda", "cpu")
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, s.beta2),
                                           weight_decay=0.0, fused=fused)

    def update(self, step, loss_of, world, rank, part=0):
        """loss_of(micro-batch rng, x_0 indices, m) summed over this process' micro-batches, the
        gradient averaged over all processes, clipped, applied. Returns loss and gradient norm."""
        s, total = self.s, 0.0
        M = s.batch_size // s.micro_batch
        for m in range(rank, M, world):
            torch.manual_seed(hash((s.seed, step, part, m)) % 2 ** 63)           # dropout
            with autocast(s):
                loss = loss_of(m, M) / M
            loss.backward()
            total = total + loss.detach()
        if world > 1:                    # once an update, after the last micro-batch: no_sync in DDP
            total = torch.as_tensor(total, device=s.device, dtype=torch.float64)
            for x in [total] + [p.grad for p in self.net.parameters() if p.grad is not None]:
                dist.all_reduce(x)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor(step, s)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            decay = min(s.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        return total, norm


def autocast(s):
    # No cache: before torch 2.13 a weight first cast under no_grad stays without gradient in it.
    return torch.autocast(s.device.type, dtype=torch.bfloat16, enabled=s.dtype == "bfloat16",
                          cache_enabled=False)


def lr_factor(step, s):
    """Linear warm-up, then a cosine to a tenth."""
    warm = min(1.0, (step + 1) / max(1, s.warmup))
    return warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / s.updates)))


# ---- a stage ------------------------------------------------------------------------------------

def run_stage(stage, args, data):
    s = settings_of(args, stage)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    path, main_rank = s.out / f"{stage}.pt", rank == 0
    saved = checkpoint.load(path) if path.exists() else None
    if saved and not s.resume:
        raise BadInput(f"{path} is at step {saved['step']} of {saved['updates']}: add --resume to go "
                       "on, or choose another folder with --out")

    # networks: the teacher's shape is everybody's shape
    process_name = "ar" if stage == "judge" else s.process
    meta = dict(process=process_name, tokenizer=data.spec, block_size=s.block_size)
    teacher = None
    if stage in ("dcd", "idlm"):
        teacher, meta = load_teacher(s, stage, data)
        config = copy.copy(teacher.config)
        if stage == "idlm" and s.process == "mdlm" and s.latent == "gaussian":
            config.latent_dim = LATENT_DIM
    else:
        layers, heads, width = parse_size(s.size)
        config = ModelConfig(data.K + (process_name == "mdlm"), layers, heads, width,
                             dropout=s.dropout, causal=stage == "judge")
    process = checkpoint.make_process(meta) if stage != "judge" else None
    torch.manual_seed(s.seed)
    net = DiT(config).to(s.device, torch.float64 if s.dtype == "float64" else torch.float32)
    if teacher is not None:
        own = {k: v for k, v in net.state_dict().items() if k.startswith("latent_proj")}
        net.load_state_dict(teacher.state_dict() | own)
    main = Trainee(net, s.lr, s)
    fake = None
    if stage == "idlm":
        fake = Trainee(copy.deepcopy(teacher).requires_grad_(True), s.fake_lr, s, averaged=False)
    trainees = {"main": main} | ({"fake": fake} if fake else {})
    start = 0
    if saved:
        start = saved["step"]
        main.ema.load_state_dict(saved["ema"])
        for name, trainee in trainees.items():
            trainee.net.load_state_dict(saved[name])
            trainee.optimizer.load_state_dict(saved[f"{name}_optimizer"])
        if "teacher" in saved:          # dcd: the student at the start of the round
            teacher.load_state_dict(saved["teacher"])
    if s.compile:
        idlm_loss.COMPILE = s.device.type == "cuda"
        limit = [n for n in ("recompile_limit", "cache_size_limit") if hasattr(torch._dynamo.config, n)]
        setattr(torch._dynamo.config, limit[0], 64)      # a formula each, of one function
        for n in (net, teacher, fake.net if fake else None):
            n and n.compile_trunk()

    def save(step):
        if main_rank:
            state = meta | dict(
                config=asdict(config), stage=stage, step=step, updates=s.updates, data=str(s.data),
                latent=s.latent, ema=main.ema.state_dict(), **checkpoint.provenance(s.seed, s.device),
                args={k: str(v) for k, v in vars(s).items()})
            if step < s.updates:        # a finished stage needs no optimiser
                for name, trainee in trainees.items():
                    state[name] = trainee.net.state_dict()
                    state[f"{name}_optimizer"] = trainee.optimizer.state_dict()
                if stage == "dcd":
                    state["teacher"] = teacher.state_dict()
            checkpoint.save(path, state)

    def batch(step, part, m, M):        # the m-th of M interleaved parts of the global batch
        rng = rng_of(s.seed, stage, step, part)
        x_0 = data.batch("train", s.batch_size, rng)[m::M]
        t = stratified_times(s.batch_size, rng)
        t_tilde = stratified_times(s.batch_size, rng)
        if s.pairing == "independent":
            t_tilde = t_tilde[torch.randperm(s.batch_size, generator=rng)]
        if s.latent == "gaussian" and stage == "idlm":
            t_tilde = torch.where(torch.rand(s.batch_size, generator=rng) < FULL_NOISE,
                                  torch.ones(()), t_tilde)
        return x_0, t[m::M], t_tilde[m::M], rng_of(s.seed, stage, step, part, m + 1)

    log = Log(s, stage, start, main_rank, s.batch_size * s.block_size)
    tick = max(1, min(50, s.updates // 20))
    for step in range(start, s.updates):
        if stage == "idlm":
            # ======== ALGORITHM 1, inner: the fake follows the generator ========
            net.train(), fake.net.train()
            for k in range(s.fake_updates):
                loss, norm = fake.update(step, lambda m, M: idlm_step(
                    "fake", s, process, net, fake.net, teacher, *batch(step, 1 + k, m, M)),
                    world, rank, 1 + k)
                log.add(fake=loss, fake_grad=norm)
            # ======== ALGORITHM 1, outer: the generator descends NELBO(f*) - NELBO(f) ========
            fake.net.eval().requires_grad_(False)
            loss, norm = main.update(step, lambda m, M: idlm_step(
                "generator", s, process, net, fake.net, teacher, *batch(step, 0, m, M)), world, rank)
            fake.net.requires_grad_(True)
            log.add(gap=loss, grad=norm)
        else:
            if stage == "dcd" and step % max(1, s.updates // DCD_ROUNDS) == 0 and step > 0:
                teacher.load_state_dict(main.ema.state_dict())
            net.train()
            loss, norm = main.update(step, lambda m, M: plain_loss(
                stage, s, step, process, net, teacher, *batch(step, 0, m, M)), world, rank)
            log.add(nelbo=loss, grad=norm)
        if (step + 1) % tick == 0 or step + 1 == s.updates:
            log.line(step + 1)          # raises on a non-finite loss, before anything is saved
        if (step + 1) % s.save_every == 0 or step + 1 == s.updates:
            save(step + 1)
            if main_rank:
                log.note(step + 1, val=validate(stage, s, process, main.ema, data))
                if stage != "judge":
                    show(s, process, main.ema, data, step + 1, 64 if stage == "teacher" else 16)
    return path


def plain_loss(stage, s, step, process, net, teacher, x_0, t, t_tilde, rng):
    """The losses of the stages that train one network."""
    if stage == "judge":
        logits = net(x_0[:, :-1], torch.zeros(len(x_0)))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1),
                                                 x_0[:, 1:].flatten().to(s.device))
    if stage == "dcd":
        round_ = step // max(1, s.updates // DCD_ROUNDS)
        return dcd_loss(net, teacher, process, x_0, DCD_DELTA * 2 ** round_, rng, t)
    if s.process == "mdlm":
        return mdlm_loss(net, process, x_0, rng, t)
    return duo_loss(net, process, x_0, rng, soft=step < s.updates // 2, t=t)


def idlm_step(which, s, process, net, fake, teacher, x_0, t, t_tilde, rng):
    """fake_loss or generator_loss of one micro-batch: draw eps and the second noise, then the loss."""
    soft = s.process == "duo" and s.uniform_update == "soft"
    eps = draw_latent(net, process, x_0, t_tilde, rng, soft=soft)
    L = x_0.shape[1]
    if s.process == "mdlm":
        # With the added latent half of the rows are pure [MASK], and which t_tilde a text comes
        # from changes what the fake should predict: it is told through its unused sigma input.
        told = -process.alpha(t_tilde)[0].log() if s.latent == "gaussian" else process.sigma(t)
        noise = (process.draw_mask(t, L, rng), process.weight(t), told)
        if which == "fake":
            return idlm_loss.masked_fake_loss(net, fake, eps, *noise, process.mask_id, rng)
        return idlm_loss.masked_generator_loss(net, fake, teacher, eps, *noise, process.sigma(t),
                                               process.mask_id, rng)
    if soft:
        scale, std, a, dalpha = process.gaussian(t)
        noise, suffix = (scale, std, a, dalpha, -a.log()), {}
        losses = idlm_loss.soft_fake_loss, idlm_loss.soft_generator_loss
    else:
        noise = (*process.draw_noise(t, L, rng), *process.alpha(t), process.sigma(t))
        suffix = dict(gap=getattr(idlm_loss, s.uniform_update + "_gap"))
        losses = idlm_loss.uniform_fake_loss, idlm_loss.uniform_generator_loss
    if which == "fake":
        return losses[0](net, fake, eps, *noise, process.K, rng)
    return losses[1](net, fake, teacher, eps, *noise, process.K, rng, **suffix)


def load_teacher(s, stage, data):
    """The network that this stage distils, and its checkpoint's other entries."""
    name = s.init_from or s.out / ("dcd.pt" if stage == "idlm" and (s.out / "dcd.pt").exists()
                                   else "teacher.pt")
    net, meta = checkpoint.load_network(name, s.device, s.process)
    meta = {k: meta[k] for k in ("process", "tokenizer", "block_size")} | {"teacher_from": str(name)}
    if meta["tokenizer"] != data.spec:
        raise BadInput(f"{name} was trained with another tokenizer than --data {s.data} gives "
                       f"({meta['tokenizer']['name']}): use the data it was trained on")
    net.config.dropout = s.dropout
    for block in net.blocks:
        block.dropout = s.dropout
    return net.requires_grad_(False), meta


def parse_size(size):
    try:
        layers, heads, width = (int(n) for n in size.split("x"))
        return layers, heads, width
    except ValueError:
        raise BadInput(f"--size {size}: give layers x heads x width, such as 12x12x768") from None


@torch.no_grad()
def validate(stage, s, process, net, data):
    """Mean loss on held-out text with draws that are the same at every call."""
    x_0 = data.val_blocks(2 * s.micro_batch)
    rng = torch.Generator().manual_seed(0)
    with autocast(s):
        if stage == "judge":
            return plain_loss(stage, s, 0, process, net, None, x_0, None, None, rng).item()
        loss = mdlm_loss if s.process == "mdlm" else duo_loss
        return loss(net, process, x_0, rng).item()


def show(s, process, net, data, step, steps):
    """A text on the screen, from its own generator: looking does not disturb training."""
    with autocast(s):
        text = sample(net, process, 1, s.block_size, steps, rng_of(s.seed, "sample", step))
    print(f"  -- {s.stage}, step {step}, {int(text.nfe.max())} passes: "
          f"{data.tokenizer.decode(text.tokens[0].tolist())!r}", flush=True)


class Log:
    """One line per interval on the terminal, the same numbers in log.jsonl. Losses stay on the
    device until a line is due, so that the host never waits for them in between."""

    def __init__(self, s, stage, start, active, tokens):
        self.s, self.stage, self.start, self.active, self.tokens = s, stage, start, active, tokens
        self.sums, self.count, self.last, self.t0 = {}, {}, start, time.time()
        self.clock, self.rate = self.t0, None

    def add(self, **values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.count[name] = self.count.get(name, 0) + 1

    def line(self, step):
        means = {k: float(v) / self.count[k] for k, v in self.sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise BadInput(f"{self.stage}: {name} is {value} between steps {self.last + 1} and "
                               f"{step}; the checkpoint of an earlier step is kept. Lower --lr")
        now = time.time()
        ms = 1e3 * (now - self.clock) / (step - self.last)
        self.rate = ms if self.rate is None or step - self.start < 100 else 0.8 * self.rate + 0.2 * ms
        left = (self.s.updates - step) * self.rate / 60e3
        if self.active:
            parts = " | ".join(f"{k} {v:.3f}" for k, v in means.items())
            print(f"{self.stage} {step}/{self.s.updates} | {parts} | {ms:.0f} ms | "
                  f"{self.tokens / ms:.1f}k tok/s | eta {left:.1f}m", flush=True)
            self.write(step=step, ms=ms, seconds=now - self.t0, **means)
        self.sums, self.count, self.last, self.clock = {}, {}, step, now

    def note(self, step, **values):
        print("  " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)
        self.write(step=step, **values)
        self.clock = time.time()

    def write(self, **record):
        with open(self.s.out / "log.jsonl", "a") as f:
            f.write(json.dumps({"stage": self.stage} | record) + "\n")


def main(argv=None):
    args = parse_args(argv)
    if "WORLD_SIZE" in os.environ:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    s = settings_of(args, args.stage or "teacher")
    data = TextData(s.data, s.tokenizer, s.block_size)
    print(f"{args.process}, preset {args.preset}, {args.device}, {args.dtype}, "
          f"compile {'on' if args.compile else 'off'}, seed {args.seed}; {len(data.train):,} training "
          f"and {len(data.val):,} held-out tokens, {data.K} words; run folder {args.out}", flush=True)
    stages = (args.stage,) if args.stage else STAGES[args.process]
    began = time.time()
    for stage in stages:
        path = args.out / f"{stage}.pt"
        if path.exists() and (saved := checkpoint.load(path))["step"] >= saved["updates"]:
            if args.stage:
                raise BadInput(f"{path} is finished: choose another folder with --out, or delete it")
            print(f"{path} is there and finished: kept")
            continue
        run_stage(stage, args, data)
        print(f"{stage} done, {(time.time() - began) / 60:.1f} minutes so far", flush=True)
    if not args.stage and int(os.environ.get("RANK", 0)) == 0:
        import evaluate
        evaluate.short_table(args.out, args.process, args.device, args.seed)
        print(f"{(time.time() - began) / 60:.1f} minutes in all. Next: python sample.py --steps 16")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"train.py: {error}")
