# SPDX-License-Identifier: MIT
"""Train a diffusion teacher and distil it with IDLM into a generator of few passes.

    python train.py                            masked process: teacher, idlm, a table and a text
    python train.py --process duo              uniform process: teacher, dcd, idlm
    python train.py --stage idlm --init_from kuleshov-group/mdlm-owt --preset owt
    torchrun --standalone --nproc_per_node=8 train.py --preset owt

Each stage writes out/<process>/<stage>.pt:
    teacher   MDLM's or Duo's training loss (teacher.py)
    dcd       discrete consistency distillation of the Duo teacher, what idlm then starts as
    idlm      generator and fake alternate (idlm_loss.py): IDLM, arXiv 2602.19066
    judge     an autoregressive model of the same data, which evaluate.py scores texts with
With no --stage, whatever is missing runs. `train` is the loop of one network and one loss; `distil`
is IDLM. run.py holds optimisers and checkpoints: run.optim is that of run.net (gradients, clipping,
averaged weights), run.fake_optim that of run.fake; run.teacher is frozen. A new loss: write it in
idlm_loss.py, import it here, call it in `distil`; its noise comes from draw_noise (teacher.py).

Every draw comes from an rng seeded by (seed, stage, step, part, micro-batch). So a run has no
random state to save, --resume goes on as if nothing had happened, and M processes compute what one
process computes that accumulates M micro-batches.
"""
import argparse
import hashlib
import math
import os
import time
from pathlib import Path

import torch

import checkpoint
from checkpoint import number
from data import BadInput, TextData
from generator import draw_latent
from idlm_loss import masked_fake_loss, masked_generator_loss
from idlm_loss import soft_fake_loss, soft_generator_loss
from idlm_loss import uniform_fake_loss, uniform_generator_loss
from presets import PRESETS
from rows import to_device
from run import LOSS_NAME, Run, begin, changeable, defining, joined, next_token_loss
from teacher import dcd_loss, duo_loss, mdlm_loss, stratified_times

STAGES = {"mdlm": ("teacher", "idlm"), "duo": ("teacher", "dcd", "idlm")}
ALL_STAGES = "teacher", "dcd", "idlm", "judge"
DCD_ROUNDS = 5                # each takes the student's EMA as its teacher and doubles delta
DCD_DELTA = 1 / 512


def parse_args(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    # what to run
    add("--process", choices=STAGES, default="mdlm", help="masked or uniform noise")
    add("--stage", choices=ALL_STAGES, help="one stage; else all missing")
    add("--preset", choices=PRESETS, help="default: gpu with a CUDA device, else laptop")
    add("--out", type=Path, help="run folder, default out/<process>")
    add("--resume", action="store_true", help="go on from a checkpoint; repeat its flags")
    add("--init_from", help="of idlm or dcd: the teacher, a checkpoint, folder or hub name;\n"
                            "default OUT/teacher.pt")
    add("--start_from", help="of idlm: what the generator starts as, if not as its teacher;\n"
                             "default OUT/dcd.pt where there is one")
    # data and network
    add("--data", help="text file, glob of .txt[.gz|.xz], examples.tsv, or hub data set")
    add("--cache", default="out/cache", help="folder of the tokenised text")
    add("--tokenizer", choices=("char", "gpt2"))
    add("--block_size", type=number(int, 4, 2 ** 20), help="tokens per text, L")
    add("--size", type=checkpoint.network_size, help="layers x heads x width, e.g. 12x12x768")
    add("--dropout", type=number(float, 0, 0.99))
    # optimisation
    add("--updates", type=number(int, 1), help="of each stage")
    add("--batch_size", type=number(int, 1), help="texts per update, over all processes")
    add("--micro_batch", type=number(int, 1), help="texts per pass; the rest accumulates")
    add("--lr", type=number(float, 0), help="peak learning rate (idlm: the generator's)")
    add("--fake_lr", type=number(float, 0), help="idlm: the fake's")
    add("--ema", type=number(float, 0, 1), help="decay of the averaged weights that sampling uses")
    # the method
    add("--pairing", choices=("matched", "independent"), default="matched",
        help="t_tilde and t of a text: alike (the authors' code) or drawn apart (the paper)")
    add("--update", choices=("hard", "soft"), default="hard",
        help="uniform process: exact noising law, or the published Gaussian state")
    # the machine
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=checkpoint.DTYPES, help="bfloat16: by autocast")
    add("--no-compile", action="store_true", help="nothing is compiled, here or in evaluate.py")
    add("--seed", type=number(int, 0, 2 ** 62), default=1)
    args = p.parse_args(argv)
    if args.stage not in (None, "judge", *STAGES[args.process]):
        p.error(f"--stage {args.stage} is none of {args.process}: try --process duo")
    if (args.init_from or args.start_from) and args.stage not in ("dcd", "idlm"):
        p.error("--init_from and --start_from are for one stage: add --stage idlm (or dcd)")
    args.device = checkpoint.pick_device(args.device)
    args.preset = args.preset or ("gpu" if args.device.type == "cuda" else "laptop")
    args.out = args.out or Path("out", args.process)
    args.compile = checkpoint.can_compile(args.device) and not args.no_compile
    return args


def settings_of(args, stage):
    """Flags over the preset, for one stage: a flat namespace. idlm_lr is the lr of stage idlm."""
    preset = {}
    for key, value in PRESETS[args.preset].items():
        first, _, name = key.partition("_")
        if first == stage:
            preset[name] = value
        elif first not in ALL_STAGES:
            preset.setdefault(key, value)
    given = {key: value for key, value in vars(args).items() if value is not None}
    s = argparse.Namespace(**vars(args) | preset | given)
    s.stage = stage
    s.dtype = checkpoint.pick_dtype(s.dtype, s.device)
    s.wrap_eos = s.wrap_eos and s.tokenizer == "gpt2"
    s.kind = "masked" if s.process == "mdlm" else s.update
    s.world = int(os.environ.get("WORLD_SIZE", 1))
    s.rank = int(os.environ.get("RANK", 0))
    s.micro_batch = math.gcd(s.batch_size // s.world, s.micro_batch)
    s.num_micro = s.batch_size // s.micro_batch
    if s.batch_size % s.world:
        raise BadInput(f"--batch_size {s.batch_size} cannot be shared by {s.world} processes: "
                       "choose a multiple")
    s.weights = torch.float64 if s.dtype == "float64" else torch.float32
    # No cache: before torch 2.13 a weight first cast under no_grad stays without gradient in it.
    s.autocast = torch.autocast(s.device.type, dtype=torch.bfloat16, cache_enabled=False,
                                enabled=s.dtype == "bfloat16")
    return s


# ---- draws --------------------------------------------------------------------------------------

def key_of(s, step, part, micro):
    """One seed, of 60 bits, for one set of draws; see the module's docstring."""
    key = f"{s.seed} {s.stage} {step} {part} {micro}".encode("utf-8")
    return int(hashlib.sha256(key).hexdigest()[:15], 16)


def draw_batch(s, data, step, part, m, soft):
    """The m-th of num_micro interleaved parts of the global batch, b texts.

    Returns x_0 (b, L); free (b, L) bool, or None where the model writes all; t and t_tilde (b,);
    the rng of all further draws. All on the CPU, but x_0 for Gaussian states (soft) on a GPU,
    which draws them faster.
    """
    rng = torch.Generator().manual_seed(key_of(s, step, part, "batch"))
    mine = slice(m, None, s.num_micro)
    x_0, free = data.batch("train", s.batch_size, rng, mine)
    t = stratified_times(s.batch_size, rng)
    t_tilde = stratified_times(s.batch_size, rng)
    if s.pairing == "independent":
        t_tilde = t_tilde[torch.randperm(s.batch_size, generator=rng)]
    if soft and s.device.type == "cuda":
        x_0 = to_device(x_0, s.device)
    seed = key_of(s, step, part, m)
    torch.manual_seed(seed)                                # dropout's
    if s.compile:
        torch.compiler.cudagraph_mark_step_begin()
    return x_0, free, t[mine], t_tilde[mine], torch.Generator().manual_seed(seed)


# ---- the two loops ------------------------------------------------------------------------------

def train(s, run, data):
    """teacher, dcd, judge: one network, one loss."""
    net = run.net
    process = run.process
    round_length = math.ceil(s.updates / DCD_ROUNDS)
    for step in range(run.step, s.updates):
        net.train()
        if s.stage == "dcd" and step and step % round_length == 0:
            run.teacher.load_state_dict(run.optim.ema.state_dict())
        # Duo's curriculum: Gaussian states in the first half
        soft = s.stage == "teacher" and s.process == "duo" and step < s.updates // 2
        for m in range(s.rank, s.num_micro, s.world):
            x_0, free, t, _, rng = draw_batch(s, data, step, "net", m, soft)
            with s.autocast:
                if s.stage == "judge":
                    loss = next_token_loss(net, x_0)
                elif s.stage == "dcd":
                    delta = DCD_DELTA * 2 ** (step // round_length)
                    loss = dcd_loss(net, run.teacher, process, x_0, delta, rng, t=t, free=free)
                elif s.process == "mdlm":
                    loss = mdlm_loss(net, process, x_0, rng, t=t, free=free)
                else:
                    loss = duo_loss(net, process, x_0, rng, soft=soft, t=t, free=free)
            run.optim.backward(loss, m)
        loss, norm = run.optim.update(step)
        run.note(step + 1, {LOSS_NAME[s.stage]: loss, "grad": norm})


def distil(s, run, data):
    """IDLM: fake and generator alternate; the teacher is frozen."""
    generator = run.net
    fake = run.fake
    teacher = run.teacher
    process = run.process
    soft = s.kind == "soft"
    for step in range(run.step, s.updates):
        # ======== inner problem: the fake follows the generator ========
        generator.eval()                                   # no dropout in the rows it learns from
        fake.train().requires_grad_(True)
        for m in range(s.rank, s.num_micro, s.world):
            x_0, free, t, t_tilde, rng = draw_batch(s, data, step, "fake", m, soft)
            eps = draw_latent(process, x_0, t_tilde, rng, soft=soft, free=free)
            noise = process.draw_noise(t, s.block_size, rng, soft, free)
            with s.autocast:
                if s.kind == "masked":
                    loss = masked_fake_loss(generator, fake, eps, rng, **noise)
                elif s.kind == "hard":
                    loss = uniform_fake_loss(generator, fake, eps, rng, **noise)
                else:
                    loss = soft_fake_loss(generator, fake, eps, rng, **noise)
            run.fake_optim.backward(loss, m)
        fake_loss, fake_norm = run.fake_optim.update(step)

        # ======== outer problem: the generator descends the gap ========
        generator.train()
        fake.eval().requires_grad_(False)
        for m in range(s.rank, s.num_micro, s.world):
            x_0, free, t, t_tilde, rng = draw_batch(s, data, step, "generator", m, soft)
            eps = draw_latent(process, x_0, t_tilde, rng, soft=soft, free=free)
            noise = process.draw_noise(t, s.block_size, rng, soft, free)
            with s.autocast:
                if s.kind == "masked":
                    gap = masked_generator_loss(generator, fake, teacher, eps, rng, **noise)
                elif s.kind == "hard":
                    gap = uniform_generator_loss(generator, fake, teacher, eps, rng, **noise)
                else:
                    gap = soft_generator_loss(generator, fake, teacher, eps, rng, **noise)
            run.optim.backward(gap, m)
        gap, norm = run.optim.update(step)
        run.note(step + 1, {"fake": fake_loss, "fake_grad": fake_norm, "gap": gap, "grad": norm})


# ---- all stages ---------------------------------------------------------------------------------

def run_stage(args, stage, data):
    s = settings_of(args, stage)
    is_finished, saved = begin(s, data)
    if is_finished:
        return print(f"{s.out / stage}.pt is finished: kept")
    shown = defining(s, data) | changeable(s)
    print(" ".join(f"{name}={value}" for name, value in shown.items()))
    run = Run(s, data, saved)
    if stage == "idlm":
        distil(s, run, data)
    else:
        train(s, run, data)
    run.wait_for_all()


def main(argv=None):
    args = parse_args(argv)
    began = time.time()
    s = settings_of(args, args.stage or "teacher")
    with joined(s):
        data = TextData(s.data, s.tokenizer, s.block_size, cache=s.cache, wrap_eos=s.wrap_eos)
        print(f"{s.data}: {data.K} tokens in the vocabulary, {len(data.train):,} to train on; held "
              f"out: {data.held_out}\n{s.device}, compile {s.compile}, in {s.out}")
        for stage in [args.stage] if args.stage else STAGES[args.process]:
            run_stage(args, stage, data)
    if s.rank == 0:
        if not args.stage:
            import evaluate                 # which trains its judge with this file
            import sample
            evaluate.short_table(s.out, s.process, s.device, s.seed, s.no_compile, s.cache)
            sample.main(["--steps=16", f"--process={s.process}", f"--out={s.out}"])
        script = {"teacher": "sample.py --model teacher", "dcd": "sample.py --model dcd",
                  "judge": "evaluate.py"}.get(args.stage, "sample.py --steps 16")
        print(f"{(time.time() - began) / 60:.1f} minutes in all. Next: python {script} --process "
              f"{s.process} --out {s.out}")


if __name__ == "__main__":
    checkpoint.run_script(main)
