"""A run and its folder: what is kept, refused or gone on with; kills; several processes.

    python -m pytest tests/test_run.py

Runs are of the preset `tiny` of conftest.py: four updates of a network of 16 wide. The tests of the
last two sections start processes of their own.
"""
import argparse
import errno
import json
import math
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

import checkpoint
import run
import train
from conftest import contents, refused, run_train, some_text


def load(path):
    return checkpoint.load(f"out/{path}")


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


def distance(a, b):
    """The largest difference of two networks' weights."""
    return max((a[key] - b[key]).abs().max().item() for key in a)


class Killed(Exception):
    """Stands for a power cut, inside of this process."""


def kill_after(monkeypatch, step):
    """The next run ends after this step, with no time to save."""
    note = run.Run.note

    def dying(self, at, values):
        note(self, at, values)
        if at == step:
            raise Killed
    monkeypatch.setattr(run.Run, "note", dying)


def cut(monkeypatch, flags, step=5):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, step)
        run_train(flags)


# ---- a finished stage is kept, but never for another run ----------------------------------------

@pytest.mark.parametrize("stage, flags", [
    ("--stage teacher", ""), ("--stage teacher", "--resume"), ("--stage teacher", "--updates 2"),
    ("--stage idlm", "--updates 2 --resume"), ("--process duo --stage dcd", "--updates 2 --resume"),
    ("--process duo --stage idlm", "--updates 2 --resume"), ("--process duo --stage idlm", "")])
def test_a_finished_stage_is_kept(stage, flags, runs, capsys):
    """Also by a requeued job with --resume; nothing is written."""
    before = contents("out")
    run_train(f"{stage} {flags}")
    assert contents("out") == before
    assert "is finished: kept" in capsys.readouterr().out


@pytest.mark.parametrize("flags, name, begun, value", [
    ("--stage teacher --data other.txt", "data", "text.txt", "other.txt"),
    ("--stage teacher --data text.txt", "data", "text.txt", ""),         # edited in place
    ("--stage teacher --data text.txt --resume", "data", "text.txt", ""),
    ("--stage teacher --block_size 8", "block_size", 16, 8),
    ("--stage teacher --block_size 8 --resume", "block_size", 16, 8),
    ("--stage teacher --size 2x2x16", "size", "1x2x16", "2x2x16"),
    ("--stage teacher --dropout 0.2", "dropout", 0.1, 0.2),
    ("--stage teacher --batch_size 16", "batch_size", 8, 16),
    ("--stage teacher --ema 0.5", "ema", 0.9, 0.5),
    ("--stage teacher --seed 2", "seed", 1, 2),
    ("--stage teacher --dtype float64", "dtype", "float32", "float64"),
    ("--stage teacher --preset slow", "warmup", 2, 3),
    ("--stage teacher --process duo --out out/mdlm", "process", "mdlm", "duo"),
    ("--stage idlm --pairing independent", "pairing", "matched", "independent"),
    ("--stage idlm --seed 2", "seed", 1, 2),
    ("--process duo --stage idlm --update soft", "kind", "hard", "soft"),
    ("--process duo --stage idlm --start_from out/duo/teacher.pt", "start_key", "", ""),
    ("--stage idlm --init_from out/mdlm/idlm.pt", "teacher_key", "", ""),
    ("--stage idlm --init_from out/mdlm/idlm.pt --resume", "teacher_key", "", ""),
    ("--process duo --stage dcd --init_from out/duo/idlm.pt", "teacher_key", "", "")])
def test_another_run_is_refused(flags, name, begun, value, runs, monkeypatch):
    """One sentence with what it was begun with, what is asked for, and the way out."""
    monkeypatch.setitem(train.PRESETS, "slow", train.PRESETS["tiny"] | {"warmup": 3})
    Path("other.txt").write_text(some_text() + " and so on", encoding="utf-8")
    if "--data text.txt" in flags:
        Path("text.txt").write_text(some_text().replace("king", "Ming"), encoding="utf-8")
    before = contents("out/mdlm") | contents("out/duo")
    line = refused(lambda: run_train(flags), f"begun with {name} ", ", not ", "--out")
    if name == "data":
        assert "text.txt" in line           # and the keys of both contents
    else:
        assert f"begun with {name} {begun}" in line and f", not {value}" in line
    assert contents("out/mdlm") | contents("out/duo") == before


def test_the_whole_command_does_not_answer_for_other_data(runs):
    """Not only a named stage: without --stage, too, no table of the earlier run is shown."""
    Path("other.txt").write_text(some_text() + " and so on", encoding="utf-8")
    refused(lambda: run_train("--data other.txt"), "teacher.pt was begun with data", "text.txt")


def test_the_same_text_in_another_file_is_the_same_data(runs, capsys):
    shutil.copy("text.txt", "copy.txt")
    run_train("--stage teacher --data copy.txt")
    assert "is finished: kept" in capsys.readouterr().out


def test_a_finished_stage_says_what_it_was_trained_with(runs, capsys):
    """Not that it goes on with another rate."""
    run_train("--stage teacher --lr 2e-3")
    said = capsys.readouterr().out
    assert "teacher: lr was 0.01 to step 4\n" in said and "is finished: kept" in said


def test_more_updates_go_on(runs, capsys):
    """With --resume alone; what changes is said."""
    refused(lambda: run_train("--stage teacher --updates 6"), "step 4 of 4", "--resume")
    run_train("--stage teacher --updates 6 --lr 2e-3 --micro_batch 2 --resume")
    said = capsys.readouterr().out
    for change in ("updates was 4 to step 4, from there on 6", "lr was 0.01 to step 4",
                   "micro_batch was 4 to step 4, from there on 2"):
        assert f"teacher: {change}" in said
    assert load("mdlm/teacher.pt")["step"] == load("mdlm/teacher.pt")["updates"] == 6
    line = refused(lambda: run_train("--stage idlm"), "begun with teacher_key", "--out")
    assert load("mdlm/idlm.pt")["defining"]["teacher_key"] in line


def test_an_unfinished_stage_is_not_built_upon(tiny, blind, monkeypatch):
    """Nor started anew: every way of going on names --resume."""
    cut(monkeypatch, "--stage teacher --updates 6")
    before = contents("out")
    for flags in ("--stage teacher --updates 6", "--updates 6", "--stage teacher --updates 3",
                  "--stage teacher --updates 3 --resume"):
        refused(lambda: run_train(flags), "out/mdlm/teacher.pt is at step 3 of 6", "--resume")
    refused(lambda: run_train("--stage idlm"), "step 3 of 6", "--stage teacher --resume")
    assert contents("out").keys() == before.keys()
    run_train("--stage teacher --updates 6 --resume")
    run_train("--stage idlm --updates 1")


def test_files_that_are_no_run(tiny):
    """A checkpoint of something else in the place of one is never overwritten."""
    Path("out/mdlm").mkdir(parents=True)
    torch.save({}, "out/mdlm/teacher.pt")
    before = contents("out")
    for flags in ("--stage teacher", "--stage teacher --resume"):
        refused(lambda: run_train(flags), "out/mdlm/teacher.pt is no run", "--out")
    Path("out/mdlm/teacher.pt").write_text("not a checkpoint")
    refused(lambda: run_train("--stage teacher"), "out/mdlm/teacher.pt is damaged")
    assert before.keys() <= contents("out").keys()


def test_a_training_state_that_is_gone(runs):
    """The finished stage stays what it is; more updates need the optimisers."""
    Path("out/mdlm/teacher.resume.pt").unlink()
    run_train("--stage teacher")
    refused(lambda: run_train("--stage teacher --updates 6 --resume"), "teacher.pt", ".resume.pt")
    run_train("--stage idlm")


def test_a_generator_may_start_as_a_network_of_another_size(tiny, blind):
    for name, size in (("large", "2x2x16"), ("small", "1x2x16")):
        run_train(f"--stage teacher --updates 1 --out out/{name} --size {size}")
    run_train("--stage idlm --updates 1 --init_from out/large/teacher.pt "
              "--start_from out/small/teacher.pt")
    assert load("mdlm/idlm.pt")["config"]["num_layers"] == 1


# ---- an interruption changes nothing ------------------------------------------------------------

STAGES = ["--stage teacher", "--process duo --stage teacher", "--process duo --stage dcd",
          "--stage idlm", "--process duo --stage idlm", "--process duo --stage idlm --update soft"]


@pytest.mark.parametrize("flags", STAGES)
def test_resume_gives_the_same_bits(flags, runs, blind, monkeypatch):
    """Killed after update 5 of 6, with the last save at 3: networks, average, optimisers and the
    teacher of DCD's round at the end are those of a run without a kill. Dropout is on. A kill
    leaves the files of that moment, so one run gives both: its folder is copied on the way."""
    args = train.parse_args(flags.split())
    flags += " --updates 6"
    if args.stage != "teacher":
        flags += f" --init_from {args.out}/teacher.pt"
    note = run.Run.note

    def copying(self, step, values):
        note(self, step, values)
        if step == 5:
            shutil.copytree("out/whole", "out/killed")

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "note", copying)
        run_train(flags + " --out out/whole")
    assert load(f"killed/{args.stage}.pt")["step"] == 3
    torch.rand(7)                           # whatever was drawn before does not matter
    run_train(flags + " --out out/killed --resume")
    a, b = load(f"killed/{args.stage}.resume.pt"), load(f"whole/{args.stage}.resume.pt")
    assert a["step"] == b["step"] == 6
    assert_same(a["ema"], b["ema"])
    assert_same(a["state"], b["state"])
    parts = {"teacher": set(), "dcd": {"round_teacher"}, "idlm": {"fake", "fake_optimizer"}}
    assert set(a["state"]) == {"ema", "main", "main_optimizer"} | parts[args.stage]


def kill_while_saving(monkeypatch, module, name, number):
    """A run of which the file of this number is cut: halfway, or before it gets its name."""
    inner = getattr(module, name)
    calls = []

    def dying(what, where):
        if "teacher" in str(where):         # and not the tokens' cache
            calls.append(where)
        if len(calls) == number:
            if name == "save":
                where.write(b"half of a checkpoint")
            raise Killed
        return inner(what, where)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            run_train("--stage teacher")


@pytest.mark.parametrize("module, name", [(torch, "save"), (os, "replace")])
@pytest.mark.parametrize("number", [3, 4])
def test_a_kill_while_saving(module, name, number, tiny, trained, blind, monkeypatch):
    """Of the files of step 4, the first or the second is cut. What is there is whole, and the run
    ends with the same bits."""
    kill_while_saving(monkeypatch, module, name, number)
    steps = [load(f"mdlm/teacher{suffix}")["step"] for suffix in (".pt", ".resume.pt")]
    assert steps == [3 if number == 3 else 4, 3]
    checkpoint.load_network("out/mdlm/teacher.pt")
    run_train("--stage teacher --resume")
    whole = checkpoint.load(trained / "out/mdlm/teacher.resume.pt")
    assert_same(load("mdlm/teacher.resume.pt")["state"], whole["state"])


def test_a_kill_at_the_first_save(tiny, trained, blind, monkeypatch):
    """What is needed to resume is there first."""
    kill_while_saving(monkeypatch, os, "replace", 2)
    assert [path.name for path in Path("out/mdlm").glob("teacher*.pt")] == ["teacher.resume.pt"]
    run_train("--stage teacher --resume")
    whole = checkpoint.load(trained / "out/mdlm/teacher.resume.pt")
    assert_same(load("mdlm/teacher.resume.pt")["state"], whole["state"])


def test_what_a_kill_left_half_written_goes(tiny):
    torn = Path("out/mdlm/teacher.pt.0123.tmp")
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half of a checkpoint")
    run_train("--stage teacher --updates 1")
    assert not torn.exists()


# ---- what goes wrong ends in a sentence, and what was saved stays -------------------------------

class FullDisk:
    """A file on a disk with room for some bytes."""

    def __init__(self, path, room):
        self.file = open(path, "wb")
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.mark.parametrize("room", [0, 5_000, 50_000])
def test_a_full_disk(room, runs, monkeypatch, capsys):
    """torch.save hides the reason behind an error of its own; the user gets the reason. The earlier
    checkpoint still loads, and nothing half-written stays."""
    before = contents("out")
    monkeypatch.setattr(checkpoint, "open", lambda path, mode: FullDisk(path, room), raising=False)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        checkpoint.run_script(lambda: run_train("--stage teacher --updates 6 --resume"))
    assert end.value.code == ("train.py: [Errno 28] No space left on device; what was saved before "
                              "stays")
    after = contents("out")
    log = Path("out/mdlm/log.jsonl")
    assert {**after, log: None} == {**before, log: None}
    monkeypatch.undo()


@pytest.mark.parametrize("out", ["text.txt", "text.txt/deeper"])
def test_a_file_where_a_folder_should_be(out, tiny, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        checkpoint.run_script(lambda: run_train(f"--stage teacher --out {out}"))
    assert "text.txt" in end.value.code and end.value.code.count("\n") == 0
    assert Path("text.txt").read_text(encoding="utf-8") == some_text()


@pytest.mark.parametrize("stage", ["teacher", "idlm"])
def test_a_learning_rate_without_measure(stage, runs, blind):
    """1e30 leaves finite weights after its only update: still no network, and nothing is saved."""
    teacher = " --init_from out/mdlm/teacher.pt" if stage == "idlm" else ""
    refused(lambda: run_train(f"--stage {stage} --updates 1 --lr 1e30 --out out/new{teacher}"),
            f"{stage}: a weight is not below", "after step 1", "rate")
    assert not list(Path("out/new").glob("*.pt"))


@pytest.mark.parametrize("flags, loss", [
    ("--stage teacher", "mdlm_loss"), ("--process duo --stage teacher", "duo_loss"),
    ("--stage idlm --init_from out/mdlm/teacher.pt", "masked_fake_loss"),
    ("--stage idlm --init_from out/mdlm/teacher.pt", "masked_generator_loss")])
def test_a_loss_that_is_not_finite(flags, loss, runs, blind, monkeypatch):
    """It stops at the next save, also where no line is due: the save would hold broken weights."""
    inner = getattr(train, loss)
    calls = []

    def spoiled(*args, **settings):
        calls.append(1)
        return inner(*args, **settings) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setattr(train, loss, spoiled)
    stage = "idlm" if "idlm" in flags else "teacher"
    refused(lambda: run_train(f"{flags} --updates 200 --micro_batch 8 --out out/new"), f"{stage}: ",
            "between steps 4 and 6", "the last checkpoint is kept")
    state = load(f"new/{stage}.pt")
    assert state["step"] == 3 and all(w.isfinite().all() for w in state["ema"].values())


# ---- one optimiser update -----------------------------------------------------------------------

def settings(**changed):
    return argparse.Namespace(**{
        "num_micro": 1, "rank": 0, "world": 1, "updates": 5, "warmup": 2, "beta2": 0.9, "ema": 0.15,
        "lr_decay": 0.1, "clip": 1.0, "adam_eps": 1e-8} | changed)


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("lr_decay", [0.1, 1.0])
def test_update_by_hand(lr_decay, clip):
    """AdamW without decay, the gradient's norm cut at 1 or not at all, warm-up of 2, cosine to a
    tenth or none, and the average: one weight and a bias in plain Python."""
    net = torch.nn.Linear(1, 1).double()
    trainee = run.Trainee(net, 0.1, settings(lr_decay=lr_decay, clip=clip))
    w = [p.item() for p in net.parameters()]
    m, v, ema = [0, 0], [0, 0], list(w)
    for step, size in enumerate((100, 1, 0.5, 3, 0.1)):
        trainee.backward(size * (0.3 * net.weight + 0.4 * net.bias).sum(), 0)
        _, norm = trainee.update(step)
        assert norm.item() == pytest.approx(0.5 * size)
        share = min(1, clip / (0.5 * size))
        lr = 0.1 * min(1, (step + 1) / 2)
        lr *= lr_decay + (1 - lr_decay) * (1 + math.cos(math.pi * step / 5)) / 2
        decay = min(0.15, (1 + step) / (10 + step))
        for i, g in enumerate((0.3 * size * share, 0.4 * size * share)):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.9 * v[i] + 0.1 * g * g
            mean, var = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.9 ** (step + 1))
            w[i] -= lr * mean / (var ** 0.5 + 1e-8)
            ema[i] = decay * ema[i] + (1 - decay) * w[i]
        assert [p.item() for p in net.parameters()] == pytest.approx(w, abs=1e-6)
        assert [p.item() for p in trainee.ema.parameters()] == pytest.approx(ema, abs=1e-6)
        assert not any(p.requires_grad for p in trainee.ema.parameters())    # no history grows


def test_the_published_eps_on_the_scale_of_a_mean(rng):
    """The authors' loss is the sum over L = 1,024 positions, ours the mean. Adam divides by the
    gradient's size plus eps, so eps 1e-8 / L on the mean is their 1e-8 on the sum; 1e-8 is not."""
    L = 1024
    slope = 1e-8 * torch.randn(8, generator=rng, dtype=torch.float64)       # as small as eps
    found = {}
    for name, scale, eps in (("sum", L, 1e-8), ("mean", 1, train.PRESETS["owt"]["adam_eps"]),
                             ("other", 1, 1e-8)):
        net = torch.nn.Linear(8, 1, bias=False).double()
        net.weight.data.zero_()
        trainee = run.Trainee(net, 1.0, settings(clip=math.inf, adam_eps=eps, warmup=1))
        trainee.backward(scale * (net.weight[0] * slope).sum(), 0)
        trainee.update(0)
        found[name] = net.weight.detach()
    assert torch.allclose(found["sum"], found["mean"], rtol=1e-12, atol=0)
    assert not torch.allclose(found["sum"], found["other"], rtol=0.1)


def test_accumulation_is_the_mean(tiny, blind, monkeypatch):
    """With a loss that draws nothing, 1, 2 or 8 micro-batches give the same weights."""
    monkeypatch.setattr(train, "mdlm_loss", lambda net, process, x_0, rng, t, free:
                        net(x_0, torch.zeros(len(x_0))).logsumexp(-1).mean())
    found = []
    for size in (8, 4, 1):
        run_train(f"--stage teacher --dropout 0 --dtype float64 --micro_batch {size} "
                  f"--out out/{size}")
        found.append(load(f"{size}/teacher.pt")["ema"])
    assert distance(found[0], found[1]) < 1e-12 and distance(found[0], found[2]) < 1e-12
    assert found[0]["output_layer.linear.bias"].abs().max() > 1e-3


def test_looking_does_not_disturb(tiny, monkeypatch):
    """Saving, measuring and showing a text at every step or at the last one: the same weights."""
    for save_every in (1, 100):
        monkeypatch.setitem(train.PRESETS["tiny"], "save_every", save_every)
        run_train(f"--stage teacher --out out/{save_every}")
    assert_same(load("1/teacher.resume.pt")["state"], load("100/teacher.resume.pt")["state"])


def test_log(trained):
    """A line a step, here; the held-out loss where a checkpoint is written."""
    log = (trained / "out/duo/log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in log]
    names = {"teacher": {"nelbo"}, "dcd": {"kl"}, "idlm": {"gap", "fake", "fake_grad"}}
    for stage, losses in names.items():
        steps = [line for line in log if line["stage"] == stage and "ms" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4]
        assert all(set(line) == losses | {"stage", "step", "ms", "grad"} for line in steps)
        held_out = [line["step"] for line in log if line["stage"] == stage and "held_out" in line]
        assert held_out == ([3, 4] if stage == "teacher" else [])


# ---- two writers, Ctrl-C, kill -9: processes of their own ---------------------------------------

def test_two_writers_and_kill_9(tiny, start):
    """The second run in a folder gets one sentence. Killed twice without warning, the first
    one ends with the bits of a run without a kill: the lock opens with its process."""
    flags = "--stage teacher --updates 20 --micro_batch 8"
    child = start("train", flags)
    for step in (4, 8):
        child.wait_for(f"teacher {step}/20")
        if step == 4:
            refused(lambda: run_train(flags), "another process is writing to out/mdlm", "--out")
            second = start("train", flags + " --resume").wait()
            assert second[0] == 1 and second[1].count("\n") == 1
        status, _ = child.send(signal.SIGKILL)
        assert status == -signal.SIGKILL
        child = start("train", flags + " --resume")
    status, printed = child.wait()
    assert status == 0, printed
    run_train(flags + " --out out/whole")
    assert_same(load("mdlm/teacher.resume.pt")["state"], load("whole/teacher.resume.pt")["state"])
    assert not list(Path("out/mdlm").glob("*.tmp"))


def test_ctrl_c(tiny, start):
    """One line, no traceback, and the way to go on, which works."""
    flags = "--stage teacher --updates 2000 --micro_batch 8"
    child = start("train", flags)
    child.wait_for("held-out loss")
    status, printed = child.send(signal.SIGINT)
    assert status == 1 and "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("train.py: stopped by Ctrl-C after teacher ") and "--resume" in last
    step = load("mdlm/teacher.pt")["step"]
    run_train(f"--stage teacher --updates {step + 1} --micro_batch 8 --resume")


def test_temporary_names_are_unique(tiny, monkeypatch):
    """A reader or a second writer never meets half of another's file, also from another machine on
    which the process has the same number."""
    seen = set()
    inner = os.replace
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "replace", lambda a, b: seen.add(a) or inner(a, b))
    for step in range(3):
        checkpoint.save("x.pt", {"step": step})
    assert len(seen) == 3 and [p.name for p in Path().glob("x*")] == ["x.pt"]


def test_two_processes_compute_what_one_computes(tiny, blind, start):
    """gloo, float64: the same global batch and micro-batch, so parameters and optimisers agree to
    1e-10, in every stage. One process speaks and writes; a lone one goes on from what two wrote."""
    flags = "--process duo --dtype float64 --updates 2"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for i, stage in enumerate(train.STAGES["duo"]):
        pair = [start("train", f"{flags} --stage {stage} --out out/two", RANK=str(rank),
                      LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port + i)) for rank in range(2)]
        run_train(f"{flags} --stage {stage} --out out/one")
        ends = [child.wait() for child in pair]
        assert [status for status, _ in ends] == [0, 0], ends
        assert f"{stage} 2/2" in ends[0][1] and ends[1][1] == ""
        one, two = load(f"one/{stage}.resume.pt"), load(f"two/{stage}.resume.pt")
        for name, part in one["state"].items():
            if "optimizer" in name:
                for j, moments in part["state"].items():
                    assert distance(moments, two["state"][name]["state"][j]) < 1e-10
            else:
                assert part["vocab_embed.embedding"].dtype == torch.float64
                assert distance(part, two["state"][name]) < 1e-10
    run_train(f"{flags} --stage idlm --updates 3 --out out/two --resume")
    assert load("two/idlm.pt")["step"] == 3
