"""train.py: its stages, seeds, interruptions, several processes, and what it refuses.

    python -m pytest -q tests/test_train.py
"""
import argparse
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import idlm_loss
import sample
import train
from data import BadInput, TextData
from model import DiT, ModelConfig
from teacher import EPS
from test_checkpoint import synthetic, write

ROOT = Path(train.__file__).parent
WORDS = "the king and queen of a land went to see one good man in his old red house".split()
# Dropout and accumulation are on, steps are large: what goes wrong in them shows in the weights.
TINY = dict(data="text.txt", tokenizer="char", block_size=16, size="2x2x16", dropout=0.1,
            batch_size=8, micro_batch=4, ema=0.9, warmup=2, decay=0.1, beta2=0.95, save_every=3,
            teacher=dict(updates=4, lr=1e-2), dcd=dict(updates=4, lr=1e-2),
            idlm=dict(updates=4, lr=1e-2, fake_lr=2e-2), judge=dict(updates=4, lr=1e-2))
SEEDS = torch.Generator().manual_seed(0)
TEXT = " ".join(WORDS[i] for i in torch.randint(len(WORDS), (800,), generator=SEEDS))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with a text of some kB; global switches as they were."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS, "tiny", dict(TINY))
    monkeypatch.setattr(train, "FIT_TEXTS", 32)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(flags=""):
    train.main(["--preset", "tiny", "--no-compile", "--dtype", "float32", "--device", "cpu",
                *flags.split()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder of each process with a finished teacher (and DCD student)."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.PRESETS, "tiny", dict(TINY))
        run("--stage teacher")
        run("--process duo --stage teacher")
        run("--process duo --stage dcd")
    return folder / "out"


@pytest.fixture
def teachers(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")


def load(name):
    return checkpoint.load(f"out/{name}.pt")


def assert_same(a, b, path=""):
    """Nested dicts and lists of tensors and values, equal bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b, path


NETS = "ema", "main", "main_optimizer", "fake", "fake_optimizer", "round_teacher"


def nets_of(state):
    return {key: state[key] for key in NETS if key in state}


def distance(a, b):
    return max((a[key] - b[key]).abs().max().item() for key in a)


def capture_saves(monkeypatch):
    """-> a dict step -> what was saved at it, of the last stage that runs."""
    saves, save = {}, checkpoint.save

    def spy(path, state):
        save(path, state)
        saves[state["step"]] = checkpoint.load(path)

    monkeypatch.setattr(checkpoint, "save", spy)
    return saves


class Killed(Exception):
    """Stands for a power cut."""


def kill_after(monkeypatch, step):
    report = train.report

    def dying(s, at, *args):
        report(s, at, *args)
        if at == step:
            raise Killed
    monkeypatch.setattr(train, "report", dying)


# ---- stages -------------------------------------------------------------------------------------

STAGES = ["--stage teacher", "--stage idlm", "--stage idlm --latent gaussian",
          "--stage idlm --latent words:6", "--stage idlm --pairing matched --fake_updates 2",
          "--stage judge",
          "--process duo --stage teacher", "--process duo --stage dcd",
          "--process duo --stage idlm", "--process duo --stage idlm --uniform_update marginal",
          "--process duo --stage idlm --uniform_update soft",
          "--process duo --stage idlm --init_from out/duo/teacher.pt",
          "--process duo --stage idlm --init_from out/duo/dcd.pt out/duo/teacher.pt",
          "--process duo --stage judge"]


@pytest.mark.parametrize("flags", STAGES)
def test_stage_leaves_a_checkpoint(flags, teachers, capsys, monkeypatch):
    args = train.parse_args(flags.split())
    path, teacher = args.out / f"{args.stage}.pt", args.out / "teacher.pt"
    start = args.out / "dcd.pt" if (args.process, args.stage) == ("duo", "idlm") else teacher
    if args.init_from:
        teacher, start = args.init_from[0], args.init_from[-1]
    path.unlink(missing_ok=True)
    before = {file: file.read_bytes() for file in Path("out").rglob("*.pt")}
    (args.out / "log.jsonl").unlink(missing_ok=True)
    fitted, fit = [], train.fit_words
    monkeypatch.setattr(train, "fit_words", lambda *a: fitted.append(fit(*a)) or fitted[-1])
    run(flags)
    assert {file: file.read_bytes() for file in before} == before        # no teacher was touched
    net, meta = checkpoint.load_network(path, "cpu")
    is_a = "ar" if args.stage == "judge" else args.process
    assert (meta["step"], meta["updates"], meta["stage"], meta["process"], meta["block_size"]) == \
        (4, 4, args.stage, is_a, 16)
    assert net.config.causal == (is_a == "ar") and net.config.dropout == 0.1
    assert net.config.latent_dim == (args.latent_dim if args.latent == "gaussian" else 0)
    begins = args.stage == "idlm" and args.process == "mdlm" and args.latent != "gaussian"
    assert net.config.latent_words == begins * (6 if args.latent else 8)
    if begins:                               # as often as in training text, to some power
        x = torch.tensor(TextData(meta["data"], "char", 16).train[:]).long()
        law = torch.bincount(x).double() ** torch.tensor(fitted)[:, None]
        assert torch.allclose(net.frequencies.double(), law / law.sum(1, keepdim=True))
    assert all(p.isfinite().all() for p in net.parameters())
    if args.stage in ("dcd", "idlm"):        # it goes some way from where it starts
        assert (meta["teacher"], meta["start"]) == (str(teacher), str(start))
        old = checkpoint.load(start)["ema"]
        assert 1e-3 < distance(old, net.state_dict()) < 0.5
    assert "main" not in checkpoint.load(path)                 # finished: no optimiser is kept
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    names = {"teacher": {"nelbo"}, "judge": {"nll"}, "dcd": {"kl"},
             "idlm": {"gap", "fake", "fake_grad"}}[args.stage] | {"grad", "stage", "step", "ms"}
    names |= {"beta_0", "beta_1"} if args.latent == "gaussian" else set()    # auto
    held_out = [line for line in log if "held_out" in line]
    log = [line for line in log if line not in held_out]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and all(set(x) == names for x in log)
    shows = [3, 4] if args.stage in ("teacher", "judge") else []         # where it is saved
    assert [(x["stage"], x["step"]) for x in held_out] == [(args.stage, n) for n in shows]
    assert all(math.isfinite(x["held_out"]) for x in held_out)
    out = capsys.readouterr().out
    assert ("held-out loss" in out) == (args.stage in ("teacher", "judge"))
    assert ("a text in" in out) == (args.stage != "judge")


@pytest.mark.parametrize("latent", ["state:0", "state:5", "words", "gaussian"])
def test_a_generator_goes_on_from_another(latent, teachers):
    """Whatever words the other begins with; the teacher is none of its business."""
    run("--stage idlm")
    run(f"--stage idlm --out out/next --latent {latent} "
        "--init_from out/mdlm/teacher.pt out/mdlm/idlm.pt")
    found, start = load("next/idlm"), load("mdlm/idlm")
    words = {"state:0": 0, "state:5": 5, "words": 8, "gaussian": 0}[latent]
    assert (start["config"]["latent_words"], found["config"]["latent_words"]) == (8, words)
    assert ("frequencies" in found["ema"]) == (words > 0)
    start["ema"].pop("frequencies")
    assert 0 < distance(start["ema"], found["ema"]) < 0.5


def test_a_small_text_ends_without_a_table(capsys):
    """Fewer than 8 held-out blocks give no interval: the sentence, then the sample all the same."""
    run("--block_size 32")
    out = capsys.readouterr().out
    assert "no table: " in out and "an interval needs" in out
    assert out.index("no table: ") < out.index(" passes, ") and "minutes in all" in out


@pytest.mark.parametrize("process, stages", [("mdlm", ["teacher", "idlm"]),
                                             ("duo", ["teacher", "dcd", "idlm"])])
def test_default_runs_what_is_missing(process, stages, monkeypatch, capsys):
    tables = []
    monkeypatch.setattr(evaluate, "short_table", lambda *args: tables.append(args))
    run(f"--process {process} --stage teacher")
    run(f"--process {process}")
    log = [json.loads(line) for line in Path(f"out/{process}/log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in log if "ms" in line] == [s for s in stages for _ in range(4)]
    generator = load(f"{process}/idlm")
    assert generator["teacher"] == f"out/{process}/teacher.pt"
    assert generator["start"] == f"out/{process}/{stages[-2]}.pt"
    assert tables == [(Path(f"out/{process}"), process, torch.device("cpu"), 1)]
    out = capsys.readouterr().out
    assert out.count(f"out/{process}/teacher.pt is finished: kept") == 1
    assert " passes, " in out.split("minutes so far")[-1] and f"out/{process}/idlm.pt" in out
    run(f"--process {process}")
    assert capsys.readouterr().out.count("is finished: kept") == len(stages)


@pytest.mark.parametrize("process, share", [("mdlm", 1 / 4), ("duo", 3 / 5)])
def test_tiny_overfit(process, share, monkeypatch):
    """One sentence over and over: the bound falls from log K nats per token, the flat
    distribution's and a new network's, to a quarter (masked; measured: 0.15) or to three fifths
    (uniform, which has also to see which tokens are noise; measured: 0.44)."""
    Path("text.txt").write_text("the cat sat. " * 300)
    monkeypatch.setitem(train.PRESETS["tiny"], "save_every", 1000)
    run(f"--process {process} --stage teacher --updates 150 --batch_size 32 --micro_batch 32 "
        "--size 2x4x32 --block_size 24 --dropout 0 --lr 5e-3")
    log = [json.loads(line) for line in Path(f"out/{process}/log.jsonl").read_text().splitlines()]
    K, log = len(load(f"{process}/teacher")["tokenizer"]["chars"]), [x for x in log if "ms" in x]
    assert 0.8 < log[0]["nelbo"] / math.log(K) < 1.3
    assert sum(line["nelbo"] for line in log[-3:]) / 3 < share * math.log(K)


def test_judge_predicts_the_next_token(monkeypatch):
    """Of a sentence over and over; the letter after two letters of it is certain."""
    Path("text.txt").write_text("the cat sat. " * 300)
    monkeypatch.setitem(train.PRESETS["tiny"], "save_every", 1000)
    run("--stage judge --updates 60 --size 2x2x32 --dropout 0 --micro_batch 8")
    net, meta = checkpoint.load_network("out/mdlm/judge.pt")
    chars = meta["tokenizer"]["chars"]
    x = torch.tensor([[chars.index(c) for c in "cat sat. the"]])
    found = net(x, torch.zeros(1)).argmax(-1)[0]
    assert "".join(chars[i] for i in found[1:]) == "t sat. the "


# ---- the flow of one stage ----------------------------------------------------------------------

@pytest.mark.parametrize("flags", ["", "--latent gaussian", "--latent words", "--process duo",
                                   "--process duo --uniform_update soft"])
def test_who_learns(flags, teachers, monkeypatch):
    """The fake starts as the teacher, the generator too unless there is a DCD student; each step
    moves its own network and no other."""
    calls, inner = [], train.idlm_step

    def spy(which, s, process, net, fake, teacher, *batch):
        calls.append((which, net, fake, teacher, *(
            {key: x.clone() for key, x in n.state_dict().items()} for n in (net, fake, teacher))))
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(p.requires_grad == (which == "fake") for p in fake.parameters())
        assert (net.training, fake.training, teacher.training) == (True, which == "fake", False)
        loss = inner(which, s, process, net, fake, teacher, *batch)
        assert loss.requires_grad
        return loss

    monkeypatch.setattr(train, "idlm_step", spy)
    run("--stage idlm --updates 3 --micro_batch 8 --fake_updates 2 " + flags)
    assert [call[0] for call in calls] == ["fake", "fake", "generator"] * 3
    latent = "latent_proj.weight", "frequencies"
    net, fake, teacher = ({key: x for key, x in state.items() if key not in latent}
                          for state in calls[0][4:])
    process, start = ("duo", "dcd") if "duo" in flags else ("mdlm", "teacher")
    assert_same(fake, teacher)
    assert_same(teacher, load(f"{process}/teacher")["ema"])
    assert_same(net, load(f"{process}/{start}")["ema"])
    for now, then in zip(calls, calls[1:]):
        moved = [distance(a, b) > 0 for a, b in zip(now[4:], then[4:])]
        assert moved == [now[0] == "generator", now[0] == "fake", False]


def test_the_latent_starts_at_the_scale_of_the_teachers_embeddings(teachers, monkeypatch):
    """Training lets embeddings grow; z, drawn before, would enter too small. 64 x 16 weights: their
    standard deviation within 5 sd, a factor 1 +- 0.11, of 7 times a new network's."""
    class Seen(Exception):
        pass

    def first_step(which, s, process, net, fake, teacher, *batch):
        ratio = net.latent_proj.weight.std() * 8 / net.vocab_embed.embedding.std()
        raise Seen(ratio.item(), net.vocab_embed.embedding.std().item())

    state = load("mdlm/teacher")
    before = state["ema"]["vocab_embed.embedding"].std().item()
    state["ema"]["vocab_embed.embedding"] *= 7
    checkpoint.save("out/mdlm/teacher.pt", state)
    monkeypatch.setattr(train, "idlm_step", first_step)
    with pytest.raises(Seen) as seen:
        run("--stage idlm --latent gaussian")
    ratio, size = seen.value.args
    assert abs(size / before - 7) < 0.01 and 0.89 < ratio < 1.11


def recorded_batches(monkeypatch, flags):
    """What the losses saw: a list of (which, x_0, t, t_tilde, seed of the noise, of dropout)."""
    seen, plain, idlm = [], train.plain_loss, train.idlm_step

    def spy_plain(*args):
        if args[5] is not None and args[6] is not None:        # not the held-out loss of `show`
            seen.append(("", *args[5:8], args[8].initial_seed(), torch.initial_seed()))
        return plain(*args)

    def spy_idlm(which, *args):
        seen.append((which, *args[5:8], args[8].initial_seed(), torch.initial_seed()))
        return idlm(which, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "plain_loss", spy_plain)
        patch.setattr(train, "idlm_step", spy_idlm)
        run(flags)
    shutil.rmtree("out")
    return seen


@pytest.mark.parametrize("flags", ["--stage teacher", "--stage idlm"])
def test_micro_batches_are_parts_of_one_batch(flags, finished, monkeypatch):
    """M passes see, interleaved, the texts and times that one pass sees, whatever M."""
    def batches(micro_batch):
        if "idlm" in flags:
            shutil.copytree(finished, "out")
        return recorded_batches(monkeypatch, f"{flags} --updates 2 --micro_batch {micro_batch}")
    whole, parts = batches(8), batches(2)
    assert len(parts) == 4 * len(whole) and len(whole) == (4 if "idlm" in flags else 2)
    for i, (which, *batch) in enumerate(whole):
        for m, part in enumerate(parts[4 * i:4 * i + 4]):
            assert part[0] == which
            assert all(torch.equal(x[m::4], y) for x, y in zip(batch[:3], part[1:4]))
    texts = [batch[1] for batch in whole]                      # every update draws anew,
    assert not any(torch.equal(a, b) for i, a in enumerate(texts) for b in texts[:i])
    seeds = [seed for part in parts for seed in part[4:]]      # every pass its noise and dropout
    assert len(set(seeds)) == len(seeds) == 2 * len(parts)


def test_times(finished, monkeypatch):
    """t is stratified; matched: t_tilde comes from the slice of t; independent: from any. Added
    latent: a quarter of the texts start at t_tilde = 1, of words a tenth, with t from 0.3; the
    teacher's do not.

    Of 512 texts 128 +- 49 and 51 +- 34 do: 5 standard deviations, odds 6e-7. A shuffle leaves
    about Poisson(2) of 64 within one slice of their place: 16 or more have odds 2e-10."""
    times = {}
    for how in ("", "--pairing matched:4", "--pairing independent",
                "--latent gaussian --pairing independent", "--latent words --pairing independent"):
        shutil.copytree(finished, "out")
        times[how] = [(t, t_tilde) for _, _, t, t_tilde, *_ in recorded_batches(
            monkeypatch, f"--stage idlm --updates 4 --batch_size 64 --micro_batch 64 {how}")]
        for t, t_tilde in times[how]:
            if "latent" in how:                            # what was drawn, from what it became
                assert t[t_tilde == 1].min() > 0.3 > t[t_tilde < 1].min()
                t = torch.where(t_tilde == 1, (t - 0.3) / 0.7, t)
            assert torch.equal(((t - EPS) / (1 - EPS) * 64 + 1e-5).floor(), torch.arange(64.))
    matched, grid, apart, *added = times.values()
    (_, _, t, *_), = recorded_batches(monkeypatch, "--stage teacher --latent gaussian --updates 1 "
                                      "--batch_size 64 --micro_batch 64")
    assert torch.equal(((t - EPS) / (1 - EPS) * 64 + 1e-5).floor(), torch.arange(64.))
    assert all((t - t_tilde).abs().max() < 1 / 64 for t, t_tilde in matched)
    assert {x.item() for _, t_tilde in grid for x in t_tilde} == {0.25, 0.5, 0.75, 1}
    assert all((t_tilde - t).max() < 0.27 and (t - t_tilde).max() < 1 / 64 for t, t_tilde in grid)
    assert max(((t - t_tilde).abs() < 1 / 64).sum() for t, t_tilde in apart) < 16
    for latent, low, high in zip(added, (79, 17), (177, 85), strict=True):
        assert len(latent) == 8 and low < sum((t == 1).sum() for _, t in latent) < high
    assert not any((t_tilde == 1).any() for _, t_tilde in apart)
    for flags, pairing, grid in (
            ("", "matched", 0), ("--process duo", "independent", 0),
            ("--tokenizer gpt2", "matched", 0), ("--process duo --tokenizer gpt2", "matched", 4),
            ("--process duo --tokenizer gpt2 --pairing matched", "matched", 0),
            ("--process duo --tokenizer gpt2 --uniform_update soft", "matched", 0),
            ("--process duo --pairing matched:8", "matched", 8)):
        s = train.settings_of(train.parse_args(f"--preset laptop {flags}".split()), "idlm")
        assert (s.pairing, s.grid) == (pairing, grid)


def test_dimension_and_scale_of_the_latent(teachers):
    """z's map has the size that --latent asks for, measured by the trained embedding."""
    Path("out/mdlm/idlm.pt").unlink(missing_ok=True)
    run("--stage idlm --latent gaussian:48:0.5 --updates 1 --lr 1e-9")
    net, _ = checkpoint.load_network("out/mdlm/idlm.pt")
    size = net.vocab_embed.embedding.std() * 0.5 / math.sqrt(48)
    assert net.latent_proj.weight.shape == (net.config.width, 48)
    assert (net.latent_proj.weight.std() / size).item() == pytest.approx(1, abs=0.1)
    args = train.parse_args(["--latent", "gaussian"])
    assert (args.latent, args.latent_dim, args.latent_scale) == ("gaussian", 64, 1.0)


def test_duo_curriculum(monkeypatch):
    """Soft inputs in the first half of the updates; the held-out loss is the hard one."""
    seen, inner = [], train.duo_loss
    monkeypatch.setattr(train, "duo_loss", lambda *args, soft, t: seen.append(
        (soft, t is None)) or inner(*args, soft=soft, t=t))
    run("--process duo --stage teacher --micro_batch 8")
    held_out = [(False, True)]
    assert seen == [(True, False)] * 2 + [(False, False), *held_out, (False, False), *held_out]


@pytest.mark.parametrize("process, update, loss", [
    ("mdlm", "hard", "masked"), ("mdlm --latent gaussian:64:1:1.1", "hard", "masked"),
    ("mdlm --latent state:3:1.2", "hard", "masked"),
    ("mdlm --latent words:3:1.3", "hard", "masked"),
    ("duo", "hard", "uniform"), ("duo", "marginal", "uniform"), ("duo", "marginal:1.3", "uniform"),
    ("duo", "soft", "soft")])
def test_idlm_step(process, update, loss, teachers, monkeypatch):
    """The generator reads texts at t_tilde; the second noise, its weight and sigma belong to t. The
    masked fake is told 0, or the level of t_tilde, of words that of t_tilde = 1 alone; its teacher
    always 0."""
    levels, calls, times = [], [], []
    latent, step = train.draw_latent, train.idlm_step
    monkeypatch.setitem(train.FULL_NOISE, "words", 0.4)      # of eight texts: some, not all

    def spy_latent(net, p, x_0, t_tilde, rng, soft):
        levels.append((t_tilde, soft))
        return latent(net, p, x_0, t_tilde, rng, soft=soft)

    def spy_step(*args):
        times.append(args[7:9])
        return step(*args)

    def spy(inner):
        return lambda *args, **how: calls.append((inner.__name__, args, how)) or inner(*args, **how)

    monkeypatch.setattr(train, "draw_latent", spy_latent)
    monkeypatch.setattr(train, "idlm_step", spy_step)
    for kind in ("masked", "uniform", "soft"):
        for which in ("fake", "generator"):
            name = f"{kind}_{which}_loss"
            monkeypatch.setattr(idlm_loss, name, spy(getattr(idlm_loss, name)))
    run(f"--stage idlm --updates 1 --micro_batch 8 --uniform_update {update} --process {process}")
    assert [name for name, *_ in calls] == [f"{loss}_fake_loss", f"{loss}_generator_loss"]
    for (name, args, how), (t, t_tilde), (level, soft) in zip(calls, times, levels):
        assert torch.equal(level, t_tilde) and soft == (loss == "soft")
        noise = args[4 if "generator" in name else 3:-2]     # after the networks and eps
        assert args[-2] == len(set(TEXT)) + 1                # K: with the newline of every text
        alpha = 1 - (1 - EPS) * t
        if loss == "masked":
            assert torch.allclose(noise[1], (1 - EPS) / (1 - alpha))
            z = "gaussian" in process or "words" in process
            told = -(1 - (1 - EPS) * t_tilde).log()
            told = told * ((t_tilde == 1) if "words" in process else z)
            assert torch.allclose(noise[2], told)
            assert "fake" in name or not noise[3].any()
            if "fake" in name:
                assert how == {}
            elif z:                                        # in texts that begin as sampling does
                blank = t_tilde == 1
                assert blank.any() and not blank.all()
                seen = (args[3].x[blank] != args[-2]).float().mean()
                assert 0.2 < seen < 0.45 if "words" in process else seen == 0
                assert torch.equal(how["beta"], torch.where(blank, *(
                    (1.3, 0.9) if "words" in process else (1.1, 1.0))))
            else:
                assert (how["beta"] == (1.2 if "1.2" in process else 1)).all()
            masked = noise[0].float().mean(1)
            assert masked[t.argmax()] > masked[t.argmin()]
        elif loss == "uniform":
            assert torch.allclose(noise[2], alpha) and torch.allclose(noise[4], -alpha.log())
            gap = {"gap": getattr(idlm_loss, f"{update.split(':')[0]}_gap")} if "gen" in name else {}
            beta = how.pop("beta", None)
            assert beta is None if "fake" in name else (beta == (1.3 if "1.3" in update else 1)).all()
            assert how == gap | {"weigh": False}                 # characters
            kept = noise[0].float().mean(1)
            assert kept[t.argmin()] > kept[t.argmax()]
        else:
            scale, std, alpha, dalpha, sigma = noise         # of the Gaussian clock
            assert torch.allclose(scale ** 2 + std ** 2, torch.ones(8)) and (dalpha < 0).all()
            assert torch.allclose(sigma, -alpha.log()) and alpha.argmax() == t.argmin()


def test_accumulation_is_the_mean(monkeypatch):
    """With a loss that draws nothing, 1, 2 or 8 micro-batches give the same weights."""
    monkeypatch.setattr(train, "plain_loss", lambda s, step, process, net, teacher, x_0, *rest:
                        net(x_0, torch.zeros(len(x_0))).logsumexp(-1).mean())
    found = []
    for micro_batch in (8, 4, 1):
        train.main(f"--preset tiny --stage teacher --dropout 0 --micro_batch {micro_batch} "
                   f"--dtype float64 --no-compile --device cpu --out out/{micro_batch}".split())
        found.append(load(f"{micro_batch}/teacher")["ema"])
    assert distance(found[0], found[1]) < 1e-12 and distance(found[0], found[2]) < 1e-12
    assert found[0]["output_layer.linear.bias"].abs().max() > 1e-3


@pytest.mark.parametrize("decay_to", [0.1, 1.0])
def test_update_by_hand(decay_to):
    """AdamW without decay, the gradient's norm cut at 1, warm-up of 2, cosine to a tenth or none,
    EMA: one weight and a bias, gradients (30, 40), then (0.3, 0.4), ..., in plain Python."""
    net = torch.nn.Linear(1, 1).double()
    s = argparse.Namespace(device=torch.device("cpu"), batch_size=4, micro_batch=2, rank=0, world=1,
                           seed=1, stage="teacher", autocast=nullcontext(), updates=5, warmup=2,
                           beta2=0.9, ema=0.15, decay=decay_to)
    trainee = train.Trainee(net, 0.1, s)
    w = [p.item() for p in net.parameters()]
    m, v, ema = [0, 0], [0, 0], list(w)
    for step, size in enumerate((100, 1, 0.5, 3, 0.1)):
        _, norm = trainee.update(step, 0, lambda m, M: size * (
            0.3 * net.weight + 0.4 * net.bias).sum())
        assert norm.item() == pytest.approx(0.5 * size)
        cut = min(1, 1 / (0.5 * size))
        lr = 0.1 * min(1, (step + 1) / 2)
        if decay_to < 1:
            lr *= 0.1 + 0.9 * (1 + math.cos(math.pi * step / 5)) / 2
        decay = min(0.15, (1 + step) / (10 + step))
        for i, g in enumerate((0.3 * size * cut, 0.4 * size * cut)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.9 * v[i] + 0.1 * g * g
            mean, var = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.9 ** (step + 1))
            w[i] -= lr * mean / (var ** 0.5 + 1e-8)
            ema[i] = decay * ema[i] + (1 - decay) * w[i]
        assert [p.item() for p in net.parameters()] == pytest.approx(w, abs=1e-6)
        assert [p.item() for p in trainee.ema.parameters()] == pytest.approx(ema, abs=1e-6)
        assert not any(p.requires_grad for p in trainee.ema.parameters())    # no history grows

def test_dcd_rounds(teachers, monkeypatch):
    """Five rounds: delta doubles, and the teacher of a round is the EMA at its start."""
    seen, inner = [], train.dcd_loss

    def spy(net, teacher, process, x_0, delta, rng, t):
        seen.append((delta * 512, teacher.state_dict()["vocab_embed.embedding"].clone()))
        return inner(net, teacher, process, x_0, delta, rng, t)

    Path("out/duo/dcd.pt").unlink()
    monkeypatch.setattr(train, "dcd_loss", spy)
    monkeypatch.setitem(train.PRESETS["tiny"], "save_every", 1)
    saves = capture_saves(monkeypatch)
    run("--process duo --stage dcd --updates 10 --micro_batch 8")
    assert [delta for delta, _ in seen] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    for step, (_, embedding) in enumerate(seen):
        start = step // 2 * 2
        expected = (saves[start] if start else load("duo/teacher"))["ema"]["vocab_embed.embedding"]
        assert torch.equal(embedding, expected)


# ---- seeds, interruptions -----------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    "--stage teacher", "--process duo --stage teacher",
    "--stage idlm --latent gaussian --init_from out/mdlm/teacher.pt",
    "--stage idlm --latent words --init_from out/mdlm/teacher.pt",
    "--process duo --stage idlm --uniform_update soft --init_from out/duo/teacher.pt"])
def test_same_seed_same_weights(flags, teachers):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)                        # whatever was drawn before does not matter
        run(f"{flags} --updates 3 --out out/{name} --seed {seed}")
    a, b, c = (load(f"{name}/{flags.split('--stage ')[1].split()[0]}")["ema"] for name in "abc")
    assert_same(a, b)
    assert distance(a, c) > 1e-3


def test_looking_does_not_disturb(monkeypatch):
    """Saving, measuring and showing a text at every step or at the last one: the same weights."""
    for save_every in (1, 100):
        monkeypatch.setitem(train.PRESETS["tiny"], "save_every", save_every)
        run(f"--stage teacher --out out/{save_every}")
    assert_same(load("1/teacher")["ema"], load("100/teacher")["ema"])


@pytest.mark.parametrize("flags", [
    "--stage teacher", "--process duo --stage teacher", "--process duo --stage dcd",
    "--stage idlm --latent gaussian --fake_updates 2",
    "--process duo --stage idlm --pairing matched",
    "--process duo --stage idlm --uniform_update soft --init_from out/duo/teacher.pt"])
def test_resume_is_no_interruption(flags, teachers, monkeypatch):
    """Killed after update 5 of 8, with the last save at 3: bit for bit the same at 6 and at 8, in
    networks, EMA, optimisers and the teacher of DCD's round; with dropout, which the second half
    draws too. The teacher is the first run's without being named again."""
    args = train.parse_args(flags.split())
    path = args.out / f"{args.stage}.pt"
    path.unlink(missing_ok=True)
    flags += " --updates 8 --micro_batch 8"
    monkeypatch.setattr(train, "show", lambda *args: None)
    saves = capture_saves(monkeypatch)
    run(flags)
    whole = dict(saves)
    assert list(whole) == [3, 6, 8]
    path.unlink()
    saves.clear()
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            run(flags)
    assert list(saves) == [3] and checkpoint.load(path)["step"] == 3
    torch.rand(7)
    run(flags.replace("--init_from out/duo/teacher.pt", "") + " --resume")
    assert list(saves) == [3, 6, 8]
    for step in whole:
        assert_same(nets_of(whole[step]), nets_of(saves[step]))
    assert set(nets_of(whole[3])) == {"ema", "main", "main_optimizer"} | (
        {"fake", "fake_optimizer"} if args.stage == "idlm" else
        {"round_teacher"} if args.stage == "dcd" else set())
    assert saves[8].get("teacher") == whole[8].get("teacher")


@pytest.mark.parametrize("broken", ["os.replace", "torch.save"])
def test_kill_while_writing(broken, monkeypatch):
    """Cut in the second write, halfway or before the new name: the first is whole, and goes on."""
    module, name = broken.split(".")
    inner, calls = getattr(getattr(checkpoint, module), name), []

    def breaking(what, where, *rest):
        if "teacher.pt" in str(getattr(where, "name", where)):
            calls.append(where)
            if len(calls) == 2:
                if name == "save":
                    where.write(b"half of a checkpoint")
                raise Killed
        return inner(what, where, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module), name, breaking)
        with pytest.raises(Killed):
            run("--stage teacher --updates 7")
    assert load("mdlm/teacher")["step"] == 3
    net, meta = checkpoint.load_network("out/mdlm/teacher.pt")
    assert meta["step"] == 3
    run("--stage teacher --updates 7 --resume")
    run("--stage teacher --updates 7 --out out/whole")
    assert_same(load("mdlm/teacher")["ema"], load("whole/teacher")["ema"])


@pytest.mark.parametrize("stage, name", [("teacher", "nelbo"), ("idlm", "fake"), ("idlm", "gap")])
def test_non_finite_loss(stage, name, teachers, monkeypatch):
    """It stops with step and name, also where a line is due at update 10 only and a save at 6
    would write the broken weights."""
    Path(f"out/mdlm/{stage}.pt").unlink(missing_ok=True)
    plain, idlm, calls = train.plain_loss, train.idlm_step, []

    def spoil(loss, which):
        calls.append(which)
        return loss * (math.inf if which == name and calls.count(name) == 6 else 1)

    monkeypatch.setattr(train, "plain_loss", lambda *args: spoil(
        plain(*args), "nelbo" if args[6] is not None else "held-out"))
    monkeypatch.setattr(train, "idlm_step", lambda which, *args: spoil(
        idlm(which, *args), {"generator": "gap"}.get(which, which)))
    with pytest.raises(BadInput, match=f"{stage}: {name} is -?(inf|nan) between steps 4 and 6; "
                                       "the last checkpoint is kept"):
        run(f"--stage {stage} --updates 200 --micro_batch 8")
    state = load(f"mdlm/{stage}")
    assert state["step"] == 3 and all(x.isfinite().all() for x in state["ema"].values())


# ---- several processes --------------------------------------------------------------------------

DRIVER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import tiktoken
import checkpoint, evaluate, train
torch.set_num_threads(1)
train.PRESETS["tiny"] = {TINY!r}
save, report, encode = checkpoint.save, train.report, tiktoken.Encoding.encode_ordinary_batch

def slow_save(path, state):                 # a process that does not wait reads an older file
    time.sleep(0.3)
    save(path, state)

def slow_encode(self, texts):              # and tokenises what another one is at
    with open("tokenised", "a") as file:
        file.write("x")
    time.sleep(0.5)
    return encode(self, texts)

def dying(s, step, *rest):
    report(s, step, *rest)
    if (s.stage, step) == ("idlm", 4):
        os._exit(7)         # cut: no shutdown, in which gloo's threads may meet a process that is gone

checkpoint.save, train.report, train.show = slow_save, dying, lambda *args: None
tiktoken.Encoding.encode_ordinary_batch = slow_encode
train.main(sys.argv[1:])
"""


def test_two_processes(monkeypatch):
    """All stages of the uniform process by two processes (gloo) as by one: same global batch and
    micro-batch, float64, parameters and optimisers to 1e-10. They begin with no tokens and with a
    teacher that one process was cut from at 3; both are cut after update 4 of idlm, and one process
    goes on from the checkpoint at 3."""
    flags = "--preset tiny --process duo --updates 5 --no-compile --dtype float64".split()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                        "OMP_NUM_THREADS": "1"}
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(Killed):
            train.main([*flags, "--out", "out/two", "--stage", "teacher"])
    assert load("two/teacher")["step"] == 3
    Path("pair").mkdir()                     # where out/cache is empty
    shutil.copy("text.txt", "pair")
    out = "--out", "../out/two"
    pair = [subprocess.Popen([sys.executable, "-c", DRIVER, *flags, *out, "--resume"],
                             env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}, cwd="pair",
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for i in range(2)]
    try:
        monkeypatch.setattr(evaluate, "short_table", lambda *args: None)
        with monkeypatch.context() as patch:
            saves = capture_saves(patch)     # meanwhile, of the last stage: idlm
            train.main([*flags, "--out", "out/one"])
        said = [process.communicate(timeout=600) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [7, 7], said
    assert "idlm 4/5" in said[0][0] and said[1][0] == ""                  # one process speaks
    assert Path("pair/tokenised").read_text() == "x"                      # and one tokenises
    log = [json.loads(line) for line in Path("out/two/log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in log if "ms" in line]                # the others: held-out
    assert steps == [1, 2, 3, 4, 4, 5] + [1, 2, 3, 4, 5] + [1, 2, 3, 4]
    for stage in ("teacher", "dcd"):
        assert distance(load(f"two/{stage}")["ema"], load(f"one/{stage}")["ema"]) < 1e-10
    assert load("two/idlm")["step"] == 3
    one, two = nets_of(saves[3]), nets_of(load("two/idlm"))
    for name in ("ema", "main", "fake"):
        assert one[name]["vocab_embed.embedding"].dtype == torch.float64
        assert distance(one[name], two[name]) < 1e-10
    for name in ("main_optimizer", "fake_optimizer"):
        for i, state in one[name]["state"].items():
            assert distance(state, two[name]["state"][i]) < 1e-10
    with monkeypatch.context() as patch:
        patch.chdir("pair")
        train.main([*flags, *out, "--resume"])
    assert load("two/idlm")["step"] == 5
    assert distance(load("two/idlm")["ema"], load("one/idlm")["ema"]) < 1e-10


@pytest.mark.parametrize("world, batch_size, micro_batch, each", [
    (1, 8, 4, 4), (2, 8, 8, 4), (4, 8, 8, 2), (2, 8, 2, 2), (1, 6, 4, 2), (8, 512, 8, 8)])
def test_every_process_has_work(world, batch_size, micro_batch, each, monkeypatch):
    """As many micro-batches for each: one without any would leave the others waiting."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = train.settings_of(train.parse_args(
        ["--batch_size", str(batch_size), "--micro_batch", str(micro_batch)]), "teacher")
    assert s.micro_batch == each and s.batch_size // s.micro_batch % world == 0


# ---- settings and what is refused ---------------------------------------------------------------

def actions(monkeypatch):
    parsers, inner = [], argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args",
                      lambda self, argv: parsers.append(self) or inner(self, argv))
        train.parse_args([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


def test_flags_and_presets(monkeypatch):
    """At most 25 flags; a preset sets flags or the four settings that are none, nothing unknown;
    every stage of every preset finds all it needs."""
    flags = {action.dest for action in actions(monkeypatch)}
    assert len(flags) <= 25
    known = flags - {"process", "stage", "preset", "out", "resume"} | {
        "warmup", "decay", "beta2", "save_every"}
    monkeypatch.delitem(train.PRESETS, "tiny")
    assert set(train.PRESETS) == {"laptop", "gpu", "owt"}
    for name, preset in train.PRESETS.items():
        entries = {key: value for key, value in preset.items() if isinstance(value, dict)}
        assert {key.removesuffix(" gpt2").split()[-1] for key in entries} == {
            "teacher", "dcd", "idlm", "judge"}
        assert set(preset) - set(entries) <= known
        for key, entry in entries.items():
            # "idlm", or "duo idlm" for one process alone, or of that one tokenizer's words
            *process, stage = key.removesuffix(" gpt2").split()
            assert set(entry) <= known and set(process) <= set(train.STAGES)
            flags = ["--preset", name, *(f"--process={p}" for p in process)]
            flags += ["--tokenizer=gpt2"] * key.endswith("gpt2")
            s = vars(train.settings_of(train.parse_args(flags), stage))
            parsed = train.parse_latent(entry["latent"]) if "latent" in entry else {}
            parsed = {k: v for k, v in parsed.items() if v is not None and k != "beta"}
            over = {} if process else preset.get("mdlm " + stage, {})    # the default process' own
            assert all(s[setting] == value for setting, value in (entry | parsed | over).items()
                       if setting != "latent" or setting in entry)
            needed = known - {"init_from"} - (set() if stage == "idlm" else {"fake_lr"})
            assert not [key for key in needed if s.get(key) is None]
            assert s["batch_size"] % s["micro_batch"] == 0


def test_own_token_follows_the_tokenizer():
    def own_token(*flags):
        args = train.parse_args(["--preset", "laptop", "--process", "duo", *flags])
        return train.settings_of(args, "idlm").own_token
    assert own_token() == own_token("--tokenizer=char") == "ignored"
    assert own_token("--tokenizer=gpt2") == own_token("--uniform_update=hard:weighed") == "weighed"
    assert own_token("--tokenizer=gpt2", "--uniform_update=marginal:ignored") == "ignored"
    with pytest.raises(train.BadInput, match="soft:weighed"):
        own_token("--uniform_update=soft:weighed")


def test_beta_follows_process_and_latent():
    def settings(*flags):
        return train.settings_of(train.parse_args(["--preset", "laptop", *flags]), "idlm")

    def betas(*flags):
        s = settings(*flags)
        return getattr(s, "betas", s.beta)
    for latent, tokenizer, share in (("words", "char", 0.05), ("words", "gpt2", 0.1),
                                     ("gaussian", "gpt2", 0.25), ("state", "char", 0)):
        assert settings("--latent", latent, "--tokenizer", tokenizer).full_noise == share
    assert betas("--latent=state") == betas("--process=duo") == betas("--latent=state:6:1") == (1, 1)
    assert betas() == betas("--preset=gpu") == betas("--latent=words") == (1, 0.9)
    assert betas("--preset=gpu", "--tokenizer=gpt2") == "auto" and betas("--preset=owt") == (1, 1)
    assert betas("--latent=state:8:1.2") == (1.2, 1.2) and betas("--latent=state:0:auto") == "auto"
    assert betas("--latent=gaussian:8:2") == betas("--latent=words", "--tokenizer=gpt2") == "auto"
    assert betas("--latent=gaussian:8:2:1.1") == (1.1, 1)
    assert betas("--latent=words:5:1.1") == (1.1, 0.9) and betas("--latent=words:2:auto") == "auto"
    marginal = "--process=duo", "--uniform_update"
    assert betas(*marginal, "marginal") == (1, 1) and betas(*marginal, "marginal:1.1") == (1.1, 1.1)
    assert betas(*marginal, "marginal:weighed:auto") == betas(*marginal, "marginal:auto") == "auto"


@pytest.mark.parametrize("flags, steps", [
    ("--latent words:8:auto", {0: 1, 1: 8}), ("--latent state:8:auto", {1: 8}), ("--latent words:5:1.1", {}),
    ("--process duo --uniform_update marginal:auto --pairing matched:4", {0: 1, 1: 8}),
    ("--process duo --uniform_update marginal:auto --pairing matched:1", {0: 1}),
    ("--process duo --uniform_update marginal:auto --pairing independent", {1: 8})])
def test_steering(flags, steps, teachers, monkeypatch):
    """beta follows what the entropy of the texts lacks: up where they have too little, down where
    too much, within bounds; each number by texts of its own number of passes, and the losses of the
    texts it acts on get it."""
    monkeypatch.setattr(train, "STEER", ((1, 1, 0.1, 0.01), (2, 8, 0.05, 0.02)))
    for up in (True, False):             # texts of one word alone; all words equally often
        written, given = [], []
        with monkeypatch.context() as patch:
            for name in ("masked_generator_loss", "uniform_generator_loss"):
                patch.setattr(idlm_loss, name, lambda *a, inner=getattr(idlm_loss, name), **how:
                              given.append(how["beta"].clone()) or inner(*a, **how))

            def write(net, process, B, L, passes, rng, **how):
                written.append(passes)
                words = torch.arange(B * L).view(B, L) % process.K
                return types.SimpleNamespace(tokens=words * (not up))

            patch.setattr(train, "sample", write)
            patch.setattr(train, "show", lambda *a: None)
            patch.setattr(train, "fit_words", lambda *a: 1.0)
            process = "duo" if "duo" in flags else "mdlm"
            run(f"--stage idlm --updates 4 --micro_batch 8 --out out/{up} {flags} --init_from "
                f"out/{process}/teacher.pt")
        rows = [json.loads(row) for row in Path(f"out/{up}/log.jsonl").read_text().splitlines()]
        assert {int(k[-1]) for k in rows[-1] if k.startswith("beta")} == set(steps)
        assert sorted(written) == [1] * 4 * (0 in steps) + [8] * 2 * (1 in steps)
        for which in steps:
            betas = [row[f"beta_{which}"] for row in rows]
            assert all(0.899 < beta <= 2 for beta in betas)
            assert betas[-1] > betas[0] > 1 if up else 1 > betas[0] >= betas[-1]
            assert any((beta == torch.tensor(betas[i])).any() for i, beta in enumerate(given))


@pytest.mark.parametrize("passes, texts", [(1, 600), (2, 300), (8, 150)])
@pytest.mark.parametrize("kind, power, within", [
    (0.7, 0.7, 0.06), (1.3, 1.3, 0.12), ("one word", 0.5, 0.01), ("all words", 1.5, 0.01)])
def test_words_fit_the_entropy_of_text(kind, power, within, passes, texts, monkeypatch):
    """Texts of words alone, by frequency: the power is that of the text's own; else an end. Each
    round draws anew from the same seed, at the sampler's own temperature. The laws of other numbers
    of passes stay as they are."""
    net, rng, seen = DiT(ModelConfig(31, 1, 2, 8, latent_words=3)), \
        torch.Generator().manual_seed(1), []
    net.set_frequencies(1 / torch.arange(1, 31).double())
    law = net.frequencies[0].clone()

    def write(net, process, B, L, steps, rng):
        seen.append((B, L, steps, rng.get_state().sum().item()))
        words = torch.multinomial(net.word_frequencies(passes), B * L, True, generator=rng)
        other = {"one word": 0 * words, "all words": torch.arange(B * L) % 30}
        return types.SimpleNamespace(tokens=other.get(kind, words).view(B, L))

    monkeypatch.setattr(train, "sample", write)
    monkeypatch.setattr(train, "FIT_TEXTS", 600)
    x_0 = torch.multinomial(law ** (kind if type(kind) is float else 1), 800 * 64, True,
                            generator=torch.Generator().manual_seed(2)).view(800, 64)
    found = train.fit_words(net, None, x_0, rng, passes)
    per_round = {1: 3, 2: 2, 8: 1}[passes]
    assert abs(found - power) < within * (600 / texts) ** 0.5
    assert sum(row[0] for row in seen[:per_round]) == texts
    assert seen == seen[:per_round] * (5 if type(kind) is float else 2)
    assert all(row[1:3] == (64, passes) for row in seen)
    for n in (1, 2, 4, 8, 16):
        wanted = law ** (found if n == passes else 1)
        assert torch.allclose(net.word_frequencies(n), wanted / wanted.sum())


def test_words_are_set_at_the_end(teachers, monkeypatch):
    """From training text alone, in the averaged weights that are saved."""
    seen, inner = [], train.fit_words

    def spy(net, process, x_0, rng, passes):
        seen.append((x_0, net.frequencies.clone(), passes))
        return inner(net, process, x_0, rng, passes)

    monkeypatch.setattr(train, "fit_words", spy)
    run("--stage idlm --updates 4 --out out/new --latent words:3 "
        "--init_from out/mdlm/teacher.pt")
    assert [row[2] for row in seen] == [1, 2, 4, 8, 16]
    x_0, before, _ = seen[0]
    data = TextData("text.txt", "char", 16)
    text = "".join(map(chr, data.train[:]))
    assert len(x_0) == 8 * 32 and all("".join(map(chr, row)) in text for row in x_0.tolist())
    after = load("new/idlm")["ema"]["frequencies"]
    assert torch.allclose(after.sum(1), torch.ones(5)) and (after != before).any(1).all()


def test_flag_before_stage_before_preset():
    def batch_size(stage, *flags):
        return train.settings_of(train.parse_args(["--preset", "laptop", *flags]), stage).batch_size
    laptop = train.PRESETS["laptop"]
    assert batch_size("teacher") == laptop["batch_size"] != laptop["idlm"]["batch_size"]
    assert batch_size("idlm") == laptop["idlm"]["batch_size"]
    assert batch_size("idlm", "--batch_size", "7") == 7


def test_rates_of_gpt2s_words():
    """Preset gpu has its own for masked generators of them."""
    def found(*flags, process="mdlm"):
        s = train.settings_of(train.parse_args(["--preset", "gpu", "--process", process, *flags]),
                              "idlm")
        return s.lr, s.fake_lr, s.fake_updates, s.batch_size, s.ema
    assert found() == (2e-4, 1e-3, 1, 128, 0.998)
    assert found("--tokenizer", "gpt2") == (1e-4, 3e-4, 2, 64, 0.998)
    assert found("--tokenizer", "gpt2", "--fake_lr", "1") == (1e-4, 1, 2, 64, 0.998)
    assert found("--tokenizer", "gpt2", process="duo") == (1e-4, 3e-4, 1, 128, 0.99)


def test_device_of_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.pick_device(None) == train.pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert train.pick_device(None) == torch.device("cuda:3")
    assert train.pick_device("cpu") == torch.device("cpu")
    assert train.pick_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize("flags, sentence", [
    ("--data none.txt", "there is no text file at 'none.txt'"),
    ("--data empty.txt", "empty.txt"),
    ("--data short.txt", "short.txt holds 15 tokens.* blocks of 16"),
    ("--size 2x2", "--size 2x2: give layers x heads x width"),
    ("--size big", "--size big: give layers x heads x width"),
    ("--size 0x2x16", "--size 0x2x16: give layers"),
    ("--size 2x0x16", "--size 2x0x16: give layers"),
    ("--size 2x3x16", "--size 2x3x16: give .*an even width for each head"),
    ("--size 2x16x16", "--size 2x16x16: give .*an even width for each head"),
    ("--updates 0", "--updates 0 is out of range"),
    ("--updates -3", "--updates -3 is out of range"),
    ("--batch_size 0", "--batch_size 0 is out of range"),
    ("--micro_batch 0", "--micro_batch 0 is out of range"),
    ("--block_size 0", "--block_size 0 is out of range"),
    ("--fake_updates 0", "--fake_updates 0 is out of range"),
    ("--lr -1", "--lr -1.0 is out of range"),
    ("--lr nan", "--lr nan is out of range"),
    ("--dropout 1", "--dropout 1.0 is out of range"),
    ("--seed -1", "--seed -1 is out of range"),
    ("--device tpu", "--device tpu: this machine has .*cpu"),
    ("--stage dcd", "--stage dcd is none of mdlm"),
    ("--init_from out/mdlm/teacher.pt", "gives a teacher: add --stage idlm"),
    ("--stage teacher --init_from x.pt", "gives a teacher: add --stage idlm"),
    ("--process duo --stage dcd --init_from a.pt b.pt", "a.pt b.pt: give a teacher and, for"),
    ("--stage idlm --init_from a.pt b.pt c.pt", "a.pt b.pt c.pt: give a teacher and, for"),
    ("--process duo --latent gaussian", "--latent gaussian is for the masked process"),
    ("--process duo --latent words", "--latent words is for the masked process"),
    ("--latent noise", "--latent noise: use state, words, gaussian or"),
    ("--latent words:0", "--latent words:0: use state"),
    ("--latent words:1", "--latent words:1: use state"),
    ("--latent state:1", "--latent state:1: use state"),
    ("--latent state:1.2", "--latent state:1.2: use state"),
    ("--uniform_update gentle", "--uniform_update gentle: use hard, marginal or"),
    ("--pairing none", "--pairing none: use independent or matched"),
    ("--pairing matched:0", "--pairing matched:0: use independent or matched"),
    ("--process duo --uniform_update soft --pairing matched:4", "has the Gaussian's clock"),
    ("--latent gaussian:8:1:", "--latent gaussian:8:1:: use state, words"),
    ("--latent gaussian:0", "--latent gaussian:0: use state"),
    ("--latent state:x", "--latent state:x: use state"),
    ("--stage idlm --out new", "no checkpoint at new/teacher.pt; run python train.py first"),
    ("--process duo --stage dcd --out new", "no checkpoint at new/teacher.pt; run python train.py"),
    ("--stage idlm --init_from out/duo/dcd.pt --out new", "out/duo/dcd.pt is a duo network"),
    ("--stage idlm --init_from out/mdlm/teacher.pt --out new --data other.txt",
     "has another tokenizer .char. than --data other.txt gives"),
    ("--stage teacher", "out/mdlm/teacher.pt is at step 4 of 4: finish"),
    ("--stage teacher --resume", "out/mdlm/teacher.pt is at step 4 of 4: finish"),
    ("--out half --stage teacher --updates 8", "at step 3 of 8: finish it with --resume"),
    ("--out half", "at step 3 of 8: finish it with --resume"),
    ("--out half --stage teacher --updates 3 --resume", "teacher.pt is at step 3 of 8"),
    ("--out half --stage teacher --resume --size 1x2x16", "teacher.pt holds a network of another"),
    ("--out half --stage teacher --resume --data other.txt", "holds a network of another shape")])
def test_bad_input(flags, sentence, teachers, half):
    for name, text in (("empty", ""), ("short", "a" * 15), ("other", TEXT + "!?")):
        Path(f"{name}.txt").write_text(text)
    shutil.copytree(half, "half")
    before = {file: file.read_bytes() for file in Path().rglob("*.pt")}
    with pytest.raises(BadInput, match=sentence) as error:
        run(flags)
    assert len(str(error.value).splitlines()) == 1
    assert {file: file.read_bytes() for file in Path().rglob("*.pt")} == before


def test_a_start_of_another_shape(teachers):
    run("--stage teacher --out small --size 1x2x16")
    with pytest.raises(BadInput, match="small/teacher.pt has another shape than out/mdlm/teacher"):
        run("--stage idlm --out new --init_from out/mdlm/teacher.pt small/teacher.pt")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run folder with a teacher killed at update 3 of 8."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(train.PRESETS, "tiny", dict(TINY))
        kill_after(patch, 4)
        with pytest.raises(Killed):
            run("--stage teacher --updates 8 --out half")
    return folder / "half"


def test_a_resumed_generator_keeps_its_method(teachers, monkeypatch):
    cut = "--stage idlm --init_from out/mdlm/teacher.pt --updates 8 --out cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4)
        run(cut)
    with pytest.raises(BadInput, match="begun with pairing matched, not independent: repeat the"):
        run(cut + " --resume --pairing independent")
    for constant, name in (train.VISIBLE_BETA, "betas"), (train.FULL_NOISE, "full_noise"):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match=f"begun with {name} "):
            patch.setitem(constant, "state", 0.8)
            run(cut + " --resume")
    run(cut + " --resume")


def test_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BadInput, match="--batch_size 8 cannot be shared by 3 processes"):
        run("--stage teacher")


def test_unknown_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadInput, match="--device cuda: this machine has .*cpu"):
        run("--device cuda")


@pytest.mark.parametrize("flags", ["--process sedd", "--stage student", "--preset huge",
                                   "--tokenizer bert", "--dtype int8",
                                   "--updates many", "--max 1"])
def test_unknown_flag_values(flags, capsys):
    with pytest.raises(SystemExit) as error:
        run(flags)
    assert error.value.code == 2 and flags.split()[0] in capsys.readouterr().err


def test_a_wrong_teacher_is_told_before_the_text_is_read():
    Path("torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(BadInput, match="torn.safetensors is truncated"):
        run("--stage idlm --init_from torn.safetensors --data none.txt")


@pytest.mark.parametrize("process", ["mdlm", "duo"])
def test_a_published_teacher_is_distilled_exported_and_evaluated(process, capsys):
    """The way of the README, with a small network of the published names and shapes: the preset of
    the paper, the export bit for bit, and the export as a model to evaluate."""
    Path("text.txt").write_text(TEXT * 5)
    chars = "".join(sorted({"\n", *TEXT}))
    write(Path("tiny-" + process), synthetic(V=len(chars) + 1, layers=1),
          tokenizer={"name": "char", "chars": chars})
    train.main(f"--stage idlm --preset owt --process {process} --init_from tiny-{process} "
               "--data text.txt --tokenizer char --updates 2 --batch_size 4 --micro_batch 2 "
               "--block_size 16 --device cpu --no-compile".split())
    state = load(f"{process}/idlm")
    assert state["config"]["width"] == 128 and state["teacher"] == f"tiny-{process}"
    sample.main(["--process", process, "--export", "exported"])
    net, meta = checkpoint.load_network("exported", process=process)
    assert_same(dict(net.state_dict()), dict(state["ema"]))
    assert meta["config"] == state["config"] and "0x" not in json.dumps(meta)
    evaluate.main(f"--process {process} --init_from exported --judge none --steps 2 --num_texts 8 "
                  "--temperatures 1 --ending greedy --metrics entropy --device cpu".split())
    found = {r["model"]: r["entropy"] for r in evaluate.load_records(f"out/{process}/eval.json")}
    assert found["exported"] == found["idlm"] > 0


def test_exit_code_of_the_script():
    """Too large a learning rate: one sentence on stderr, no traceback, status 1."""
    flags = ("--preset laptop --stage teacher --data text.txt --size 2x2x16 --block_size 16 "
             "--batch_size 8 --updates 9 --device cpu --dtype float32 --no-compile --lr 1e30")
    found = subprocess.run([sys.executable, ROOT / "train.py", *flags.split()], text=True,
                           capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 1
    assert re.fullmatch(r"train.py: teacher: (nelbo|grad) is (inf|nan) between steps \d and \d; "
                        r"the last checkpoint is kept. Lower the learning rate\n", found.stderr)
    assert not Path("out/mdlm/teacher.pt").exists()
