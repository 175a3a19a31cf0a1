# SPDX-License-Identifier: MIT
"""One stage of training as a folder sees it: its networks, optimisers, checkpoints and lines.

    <stage>.pt           the averaged weights: all that the other scripts read
    <stage>.resume.pt    the same with optimisers, for --resume
    log.jsonl            a line an interval

A finished stage is kept, and never reused for other data or settings: `begin` compares. train.py
holds the loops that use this file.
"""
import copy
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

import checkpoint
import rows
from data import BadInput
from generator import sample
from model import DiT, ModelConfig
from teacher import duo_loss, mdlm_loss

LOSS_NAME = {"teacher": "nelbo", "dcd": "kl", "judge": "nll"}
# What defines a stage's result: another value is another run.
DEFINING = ("process stage tokenizer block_size batch_size warmup lr_decay beta2 clip adam_eps ema "
            "dropout wrap_eos seed dtype")
DEFINING_TOO = {"teacher": "size", "judge": "size", "dcd": "teacher_key start_key",
                "idlm": "teacher_key start_key pairing kind"}
CHANGEABLE = "updates lr fake_lr micro_batch".split()      # a run takes a new value, and says so
LARGEST = 1e6                               # no weight is: the learning rate was too large


def next_token_loss(net, x_0):
    """The judge's: -log p of each token given those before it, mean nats per token."""
    h = net.hidden(x_0[:, :-1], torch.zeros(len(x_0)))
    return rows.per_row(rows.cross_entropy, net.config.vocab_size,
                        nets=(net,), hidden=(h,), args=(x_0[:, 1:],)).mean()


@contextmanager
def joined(s):
    """The processes of one run, of which the first one speaks, and the lock on its folder."""
    if s.world > 1:
        backend = "gloo"
        if s.device.type == "cuda":
            torch.cuda.set_device(s.device)
            backend = "nccl"
        dist.init_process_group(backend, timeout=timedelta(days=1))     # one tokenises, all wait
    if s.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    with checkpoint.lock_folder(s.out):
        for torn in s.out.glob("*.pt.*.tmp"):                # of a kill while saving
            torn.unlink(missing_ok=True)
        torch.set_float32_matmul_precision("high")
        for name in s.init_from, s.start_from:
            if name:                        # a wrong one: before tokenising
                checkpoint.load_network(name, "cpu", s.process)
        yield
    if s.world > 1:
        time.sleep(0.1)                     # torch 2.6: a gloo thread frees its last tensor under
        dist.destroy_process_group()        # Python's lock, which this call holds: a rare hang


class Trainee:
    """A network with its optimiser, schedule and averaged weights."""

    def __init__(self, net, lr, s, averaged=True):
        self.lr = lr
        self.s = s
        self.total = 0.0
        self.weights = list(net.parameters())
        self.ema = copy.deepcopy(net).eval().requires_grad_(False) if averaged else None
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=lr, betas=(0.9, s.beta2), eps=s.adam_eps, weight_decay=0.0,
            fused=True)

    def backward(self, loss, m):
        """Accumulate the gradient of micro-batch m."""
        loss = loss / self.s.num_micro
        loss.backward()
        self.total += loss.detach()
        if m + self.s.world < self.s.num_micro:            # out of the CUDA graph's memory, which
            for p in self.weights:                         # its next replay overwrites
                p.grad = p.grad.clone()

    @torch.no_grad()
    def update(self, step):
        """One optimiser update from the gradients, averaged over all processes. -> loss, norm"""
        s = self.s
        total = self.total
        if s.world > 1:                     # once, after the last micro-batch
            for share in [total] + [p.grad for p in self.weights]:
                dist.all_reduce(share)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, s.clip)
        # linear warm-up, and a cosine down to the share lr_decay
        cosine = (1 + math.cos(math.pi * step / s.updates)) / 2
        warm = min(1, (step + 1) / s.warmup)
        lr = self.lr * warm * (s.lr_decay + (1 - s.lr_decay) * cosine)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total = 0.0
        if self.ema:                        # early on a shorter average, not mostly the start
            decay = min(s.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.ema.parameters()), self.weights, 1 - decay)
        return total, norm


# ---- what the folder holds ----------------------------------------------------------------------

def defining(s, data):
    return {"data": data.key} | {name: getattr(s, name) for name in
                                 f"{DEFINING} {DEFINING_TOO[s.stage]}".split()}


def changeable(s):
    return {name: getattr(s, name) for name in CHANGEABLE}


def begin(s, data):
    """Compare with what the folder holds. -> is the stage finished?, the saved state or None"""
    if s.stage in ("dcd", "idlm"):
        load_sources(s, data)
    path = s.path = s.out / f"{s.stage}.pt"
    source = path.with_suffix(".resume.pt")
    if not source.exists():
        source = path
    if not source.exists():
        return False, None
    saved = checkpoint.load(source)
    other = "choose another folder with --out"
    if "defining" not in saved:
        raise BadInput(f"{source} is no run of this program: move it away, or {other}")
    step = saved["step"]
    before = saved | saved["defining"]
    is_past = s.updates <= step
    for name, value in (defining(s, data) | changeable(s)).items():
        begun = before.get(name)
        if begun == value:
            continue
        if name not in CHANGEABLE:
            raise BadInput(f"{path} was begun with {name} {begun}, not {value}: repeat its flags "
                           f"(data {saved['data']}, teacher {saved.get('teacher')}), or {other}")
        change = "" if is_past else f", from there on {value}"
        print(f"{s.stage}: {name} was {begun} to step {step}{change}")
    if path.exists() and step >= saved["updates"] and is_past:
        return True, saved
    if not s.resume or is_past or "state" not in saved:
        raise BadInput(f"{path} is at step {step} of {saved['updates']}: go on with --resume, "
                       f"--updates above {step} and its .resume.pt beside it, or {other}")
    return False, saved


def load_sources(s, data):
    """The teacher is what was trained on the NELBO, which the loss compares; a generator starts as
    the DCD student where there is one. Both on the CPU."""
    name = s.init_from or s.out / "teacher.pt"
    student = s.out / "dcd.pt"
    has_student = s.stage == "idlm" and not s.init_from and student.exists()
    start_name = s.start_from or (student if has_student else name)
    s.sources = {"teacher": str(name), "start": str(start_name)}
    nets = []
    for name in s.sources.values():
        net, meta = checkpoint.load_network(name, "cpu", s.process)
        if meta["step"] < meta["updates"]:
            raise BadInput(f"{name} is at step {meta['step']} of {meta['updates']}: finish it "
                           f"first with --stage {meta['stage']} --resume")
        if meta["tokenizer"] != data.spec:
            raise BadInput(f"{name} has another tokenizer ({meta['tokenizer']['name']}) than "
                           f"--data {s.data} gives: name the data it was trained on")
        nets.append(net)
    s.teacher, s.start = nets
    s.teacher_key = checkpoint.weights_key(s.teacher)
    s.start_key = checkpoint.weights_key(s.start)


class Run:
    """The networks of one stage: net, and where there are any fake and teacher."""

    fake = None
    teacher = None

    def __init__(self, s, data, saved=None):
        self.s = s
        self.data = data
        self.step = saved["step"] if saved else 0
        self.meta = {"process": s.process, "tokenizer": data.spec, "stage": s.stage,
                     "block_size": s.block_size, "data": str(s.data), "data_key": data.key}
        self.process = checkpoint.make_process(self.meta)
        torch.manual_seed(s.seed)
        if s.stage in ("dcd", "idlm"):
            self.meta |= s.sources
            self.teacher = s.teacher.to(s.device, s.weights)
            self.net = self.copy_of(s.start)
        else:
            self.new_network()
        self.meta["config"] = vars(self.net.config)
        self.optim = Trainee(self.net, s.lr, s)
        self.parts = {"ema": self.optim.ema, "main": self.net,
                      "main_optimizer": self.optim.optimizer}
        if s.stage == "idlm":
            self.fake = self.copy_of(self.teacher)
            self.fake_optim = Trainee(self.fake, s.fake_lr, s, averaged=False)
            self.parts |= {"fake": self.fake, "fake_optimizer": self.fake_optim.optimizer}
        if s.stage == "dcd":
            self.parts["round_teacher"] = self.teacher
        if saved:
            for name, part in self.parts.items():
                part.load_state_dict(saved["state"][name])
        self.prepare()
        self.seen = []
        self.clock = time.time()

    def new_network(self):
        layers, heads, width = map(int, self.s.size.split("x"))
        config = ModelConfig(self.process.vocab_size, layers, heads, width)
        if self.s.stage == "judge":
            self.meta["process"] = "ar"
            config = replace(config, vocab_size=self.data.K, causal=True)
        self.net = self.build(config)

    def copy_of(self, net):
        copied = self.build(net.config)
        copied.load_state_dict(net.state_dict())
        return copied

    def build(self, config):
        config = replace(config, dropout=self.s.dropout)
        return DiT(config).to(self.s.device, self.s.weights)

    def prepare(self):
        s = self.s
        if self.teacher:
            checkpoint.prepare(self.teacher, s.dtype)
        rows.COMPILE = s.compile and s.device.type == "cuda"
        torch._dynamo.config.cache_size_limit = 64         # one function, many formulas
        for net in self.net, self.fake, self.teacher:
            if s.compile and net:
                net.compile_trunk()

    def wait_for_all(self):
        if self.s.world > 1:
            dist.barrier()                  # the next stage reads what process 0 has written

    # -- after each update

    def note(self, step, values):
        """Now and then a line, with means over the updates since the last one, and a checkpoint.
        Losses stay on the device until then: the host does not wait for them."""
        s = self.s
        self.seen.append(values)
        is_due = step == s.updates or step % s.save_every == 0
        if not is_due and step % max(1, min(50, s.updates // 20)):
            return
        ms = 1e3 * (time.time() - self.clock) / len(self.seen)
        means = {}
        shown = ""
        for name in values:
            mean = torch.stack([seen[name] for seen in self.seen]).mean().item()
            if not math.isfinite(mean):     # stop before anything is saved
                raise BadInput(f"{s.stage}: {name} is {mean} between steps "
                               f"{step - len(self.seen) + 1} and {step}; the last checkpoint is "
                               "kept. Lower the learning rate")
            means[name] = mean
            shown += f" | {name} {mean:.3f}"
        print(f"{s.stage} {step}/{s.updates}{shown} | {ms:.0f} ms | "
              f"{s.batch_size * s.block_size / ms:.1f}k tok/s | "
              f"eta {(s.updates - step) * ms / 60e3:.1f}m")
        self.log(step, {"ms": ms} | means)
        checkpoint.last_line[0] = f" after {s.stage} {step}/{s.updates}"
        if is_due and s.rank == 0:
            self.save(step)
            self.show(step)
        self.seen = []
        self.clock = time.time()

    def log(self, step, values):
        if self.s.rank == 0:
            line = {"stage": self.s.stage, "step": step} | values
            with open(self.s.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")

    def save(self, step):
        s = self.s
        for p in self.optim.weights:
            if not (p.abs() < LARGEST).all():
                raise BadInput(f"{s.stage}: a weight is not below {LARGEST} after step {step}; the "
                               "last checkpoint is kept. Lower the learning rate")
        state = {name: part.state_dict() for name, part in self.parts.items()}
        meta = self.meta | checkpoint.provenance(s.seed, s.device) | changeable(s) | {
            "step": step, "defining": defining(s, self.data), "ema": state["ema"]}
        files = [(s.path, meta), (s.path.with_suffix(".resume.pt"), meta | {"state": state})]
        if not s.path.exists():             # a kill in between repeats some steps, but at first it
            files.reverse()                 # would leave nothing to resume from
        for path, value in files:
            checkpoint.save(path, value)

    @torch.no_grad()
    def show(self, step):
        """Held-out loss, with the same draws at every call, and a text. Both have generators of
        their own: looking does not disturb training."""
        s = self.s
        net = self.optim.ema
        rng = torch.Generator().manual_seed(0)
        x_0, free = self.data.val_blocks(2 * s.micro_batch)
        with s.autocast:
            if s.stage in ("teacher", "judge"):
                nelbo = mdlm_loss if s.process == "mdlm" else duo_loss
                if s.stage == "judge":
                    loss = next_token_loss(net, x_0)
                else:
                    loss = nelbo(net, self.process, x_0, rng, free=free)
                print(f"  held-out loss {loss.item():.3f} nats per token")
                self.log(step, {"held_out": loss.item()})
            if s.stage == "judge":
                return
            steps = 64 if s.stage == "teacher" else 16
            prompt = None if free is None else x_0[:1].masked_fill(free[:1], -1)
            text = sample(net, self.process, 1, s.block_size, steps, rng, prompt=prompt)
        print(f"  a text in {text.nfe.max()} passes: "
              f"{self.data.tokenizer.decode(text.tokens[0].tolist())!r}")
