"""train.py: settings, draws, the two loops, and the whole command.

    python -m pytest tests/test_train.py

Runs are of the preset `tiny` of conftest.py. What a folder holds is the subject of test_run.py, the
losses' values that of test_teacher.py and test_idlm_loss.py.
"""
import io
import json
import math
import shlex
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
import idlm_loss
import run
import sample
import train
from conftest import refused, run_train, some_text, tiny_flags
from teacher import T_MIN
from test_checkpoint import synthetic, write


def load(path):
    return checkpoint.load(f"out/{path}")


def distance(a, b):
    return max((a[key] - b[key]).abs().max().item() for key in a)


def settings(flags="", stage="idlm"):
    return train.settings_of(train.parse_args(flags.split()), stage)


# ---- settings -----------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["laptop", "gpu", "owt"])
@pytest.mark.parametrize("stage", train.ALL_STAGES)
def test_every_preset_gives_every_setting(preset, stage):
    """And nothing that nobody reads: a name of no stage is a flag, or one of six constants."""
    constants = {"warmup", "lr_decay", "beta2", "clip", "adam_eps", "save_every", "wrap_eos"}
    flags = vars(train.parse_args([])).keys()
    for key in train.PRESETS[preset]:
        first, _, name = key.partition("_")
        assert (name if first in train.ALL_STAGES else key) in flags | constants
    s = settings(f"--preset {preset} --process duo", stage)
    names = f"{run.DEFINING} {run.DEFINING_TOO[stage]}".split() + run.CHANGEABLE
    for name in set(names) - {"teacher_key", "start_key"} | constants:
        assert getattr(s, name) is not None, name
    assert s.batch_size % s.micro_batch == 0 and s.num_micro == s.batch_size // s.micro_batch


def test_a_flag_goes_before_the_stage_before_the_preset():
    laptop = train.PRESETS["laptop"]
    assert laptop["batch_size"] != laptop["idlm_batch_size"]
    assert settings("--preset laptop", "teacher").batch_size == laptop["batch_size"]
    assert settings("--preset laptop", "idlm").batch_size == laptop["idlm_batch_size"]
    assert settings("--preset laptop --batch_size 7", "idlm").batch_size == 7
    assert settings("--preset laptop --lr 0.5", "dcd").lr == 0.5


@pytest.mark.parametrize("flags, dtype", [
    ("--preset laptop", "float32"), ("--preset laptop --dtype bfloat16", "bfloat16"),
    ("--preset gpu", "bfloat16"), ("--preset gpu --dtype float32", "float32")])
def test_dtype(flags, dtype, monkeypatch):
    """The device decides where neither a flag nor the preset does."""
    monkeypatch.setattr(checkpoint, "has_bfloat16", lambda device: True)
    s = settings(f"{flags} --device cpu")
    assert s.dtype == dtype
    assert s.autocast._enabled == (dtype == "bfloat16")


def test_preset_owt_is_the_paper():
    """Batch 512 of 1,024 tokens, rate 1e-6 without decay, no clipping, Adam's eps on the scale of
    the mean, dropout 0.1, and blocks [eos] text [eos] of GPT-2's tokens."""
    s = settings("--preset owt")
    assert (s.batch_size, s.block_size, s.size) == (512, 1024, "12x12x768")
    assert (s.lr, s.fake_lr, s.lr_decay, s.warmup, s.ema) == (1e-6, 1e-6, 1.0, 2500, 0.9999)
    assert (s.clip, s.adam_eps, s.beta2, s.dropout) == (math.inf, 1e-8 / 1024, 0.999, 0.1)
    assert s.wrap_eos and not settings("--preset owt --tokenizer char").wrap_eos
    assert not settings("--preset gpu").wrap_eos


def test_defaults_are_the_papers_method():
    s = settings()
    assert (s.kind, s.pairing) == ("masked", "matched")
    assert settings("--process duo").kind == "hard"
    assert settings("--process duo --update soft").kind == "soft"


@pytest.mark.parametrize("world, batch_size, micro_batch, each", [
    (1, 8, 4, 4), (2, 8, 8, 4), (4, 8, 8, 2), (2, 8, 2, 2), (1, 6, 4, 2), (8, 512, 8, 8)])
def test_every_process_has_work(world, batch_size, micro_batch, each, monkeypatch):
    """As many micro-batches for each: one without any would leave the others waiting."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = settings(f"--batch_size {batch_size} --micro_batch {micro_batch}", "teacher")
    assert s.micro_batch == each and s.num_micro % world == 0


def test_a_batch_that_processes_cannot_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(lambda: settings("--batch_size 8"), "--batch_size 8", "3 processes")


@pytest.mark.parametrize("flags, sentence", [
    ("--seed -1", "--seed"), ("--seed 12345678901234567890", "--seed"), ("--seed x", "--seed"),
    ("--block_size 3", "--block_size"), ("--block_size 0", "--block_size"),
    ("--updates 0", "--updates"), ("--batch_size 0", "--batch_size"),
    ("--micro_batch -1", "--micro_batch"), ("--updates 1.5", "--updates"),
    ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--ema 1.1", "--ema"), ("--dropout 1", "--dropout"),
    ("--size 2x2", "--size"), ("--size 0x2x16", "--size"), ("--size 2x3x16", "even width"),
    ("--size 2x16x16", "even width"), ("--size 1000000000x2x16", "1000 layers"),
    ("--stage dcd", "--stage dcd is none of mdlm"), ("--device tpu", "this machine has"),
    ("--init_from x.pt", "add --stage idlm"), ("--stage teacher --init_from x.pt", "--stage idlm"),
    ("--start_from x.pt", "add --stage idlm"), ("--stage judge --init_from x.pt", "--stage idlm"),
    ("--process sedd", "--process"), ("--preset huge", "--preset"), ("--dtype int8", "--dtype"),
    ("--max 1", "--max 1"), ("--tokenizer bert", "--tokenizer")])
def test_flags_that_cannot_be(flags, sentence):
    refused(lambda: train.parse_args(flags.split()), sentence)


def test_a_wrong_teacher_is_refused_before_the_text_is_read(tiny):
    Path("torn.safetensors").write_bytes(b"\x08")
    refused(lambda: run_train("--stage idlm --init_from torn.safetensors --data none.txt"),
            "torn.safetensors is damaged")
    refused(lambda: run_train("--stage idlm"), "out/mdlm/teacher.pt; run python train.py first")


def test_a_teacher_of_another_alphabet(runs):
    Path("other.txt").write_text(some_text() + "!?", encoding="utf-8")
    refused(lambda: run_train("--stage idlm --init_from out/mdlm/teacher.pt --data other.txt "
                              "--out out/new"), "another tokenizer (char) than --data other.txt")


# ---- draws --------------------------------------------------------------------------------------

class Blocks:
    """Data of which every token is another number."""

    def batch(self, split, B, rng, part):
        x_0 = torch.randint(10 ** 9, (B, 16), generator=rng)
        return x_0[part], None


def draws(flags, step=0, part="net"):
    """The micro-batches of one update: [(x_0, t, t_tilde, rng)]"""
    s = settings(f"--preset laptop --no-compile {flags}")
    found = []
    for m in range(s.num_micro):
        x_0, _, t, t_tilde, rng = train.draw_batch(s, Blocks(), step, part, m, False)
        assert torch.initial_seed() == rng.initial_seed()      # dropout's draws and the noise's
        found.append((x_0, t, t_tilde, rng))
    return found


def test_micro_batches_are_interleaved_parts_of_one_batch():
    """However many there are, they see the texts and times of the whole batch."""
    (whole,) = draws("--batch_size 8 --micro_batch 8")
    parts = draws("--batch_size 8 --micro_batch 2")
    assert len(parts) == 4
    for m, part in enumerate(parts):
        for x, y in zip(whole[:3], part[:3]):
            assert torch.equal(x[m::4], y)


def test_nothing_is_drawn_twice():
    """Another seed, stage, step, part or micro-batch: other texts, times and noise. A repeated call
    draws the same, so a run has no random state to save."""
    flags = "--batch_size 8 --micro_batch 4"
    kinds = [dict(), dict(step=1), dict(part="fake"), dict(step=11), dict(step=1, part="generator")]
    sets = [draws(flags, **kind) for kind in kinds] + [draws(flags + " --seed 2")]
    texts = [part[0] for parts in sets for part in parts]
    assert len({x[0, 0].item() for x in texts}) == len(texts)
    seeds = [part[3].initial_seed() for parts in sets for part in parts]
    assert len(set(seeds)) == len(seeds)
    again = draws(flags)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(sets[0], again))
    s = settings(flags)
    keys = {train.key_of(s, step, part, m) for step in range(50) for part in ("fake", "generator")
            for m in range(20)}
    assert len(keys) == 2000 and all(0 <= key < 2 ** 60 for key in keys)


def test_times_are_stratified_and_paired():
    """Of B texts one t lies in each of B slices. matched: t_tilde in the slice of t; independent:
    in any, again one a slice. A shuffle leaves about Poisson(2) of 64 next to their place: 16 or
    more have odds 2e-10."""
    def slices(t):
        return ((t - T_MIN) / (1 - T_MIN) * 64 + 1e-5).floor()

    flags = "--batch_size 64 --micro_batch 64"
    ((_, t, t_tilde, _),) = draws(flags)
    assert torch.equal(slices(t), torch.arange(64.))
    assert torch.equal(slices(t_tilde), torch.arange(64.)) and not torch.equal(t, t_tilde)
    ((_, t, t_tilde, _),) = draws(flags + " --pairing independent")
    assert torch.equal(slices(t), torch.arange(64.))
    assert torch.equal(slices(t_tilde).sort().values, torch.arange(64.))
    assert ((t - t_tilde).abs() < 1 / 64).sum() < 16


# ---- the loops ----------------------------------------------------------------------------------

UPDATES = [("", "masked"), ("--process duo", "uniform"), ("--process duo --update soft", "soft")]


@pytest.mark.parametrize("flags, kind", UPDATES)
def test_distil_alternates(flags, kind, runs, blind, monkeypatch):
    """A fake step, then a generator step. In the fake's, the generator is in eval mode and gets no
    gradient; in the generator's, the fake is frozen. Each moves its own network and no other; the
    fake starts as the teacher, the generator as the DCD student where there is one."""
    calls = []

    def spy(name):
        inner = getattr(idlm_loss, name)

        def loss(generator, fake, *more, **noise):
            nets = [generator, fake] + ([more[0]] if "generator" in name else [])
            states = [{key: w.clone() for key, w in net.state_dict().items()} for net in nets]
            calls.append((name, states, [net.training for net in nets]))
            needs = [all(p.requires_grad for p in net.parameters()) for net in nets]
            assert needs == ([True, False, False] if "generator" in name else [True, True])
            value = inner(generator, fake, *more, **noise)
            assert value.requires_grad and value.isfinite()
            return value
        return loss

    for name in (f"{kind}_fake_loss", f"{kind}_generator_loss"):
        monkeypatch.setattr(train, name, spy(name))
    run_train(f"--stage idlm --updates 3 --micro_batch 8 --out out/new {flags} " + (
        "--init_from out/duo/teacher.pt --start_from out/duo/dcd.pt" if "duo" in flags else
        "--init_from out/mdlm/teacher.pt"))
    assert [name.split("_")[1] for name, *_ in calls] == ["fake", "generator"] * 3
    for name, _, training in calls:
        assert training == ([True, False, False] if "generator" in name else [False, True])
    process, start = ("duo", "dcd") if "duo" in flags else ("mdlm", "teacher")
    generator, fake = calls[0][1]
    assert distance(generator, load(f"{process}/{start}.pt")["ema"]) == 0
    assert distance(fake, load(f"{process}/teacher.pt")["ema"]) == 0
    assert distance(calls[-1][1][2], load(f"{process}/teacher.pt")["ema"]) == 0
    for now, then in zip(calls, calls[1:]):
        moved = [distance(a, b) > 0 for a, b in zip(now[1], then[1])]
        assert moved[:2] == ([True, False] if "generator" in now[0] else [False, True])


@pytest.mark.parametrize("flags, kind", UPDATES)
def test_what_the_losses_get(flags, kind, runs, blind, monkeypatch):
    """eps is the text at t_tilde; the noise belongs to t: its weight, its levels, and how many
    positions it leaves."""
    drawn = []
    inner = train.draw_latent

    def latent(process, x_0, t_tilde, rng, soft, free):
        drawn.append((t_tilde, soft))
        return inner(process, x_0, t_tilde, rng, soft=soft, free=free)

    monkeypatch.setattr(train, "draw_latent", latent)
    times, noises = [], []
    draw = train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *args: times.append(draw(*args)) or times[-1])
    for name in (f"{kind}_fake_loss", f"{kind}_generator_loss"):
        monkeypatch.setattr(train, name, lambda *args, loss=getattr(idlm_loss, name), **noise:
                            noises.append((args, noise)) or loss(*args, **noise))
    process = "duo" if "duo" in flags else "mdlm"
    run_train(f"--stage idlm --updates 1 --micro_batch 8 --out out/new {flags} "
              f"--init_from out/{process}/teacher.pt")
    assert len(times) == len(noises) == 2
    for (_, free, t, t_tilde, rng), (level, soft), (args, noise) in zip(times, drawn, noises):
        assert torch.equal(level, t_tilde) and soft == (kind == "soft") and free is None
        assert args[-1] is rng and noise["free"] is None
        alpha = 1 - (1 - T_MIN) * t
        if kind == "masked":
            assert torch.allclose(noise["weight"], 1 / t) and not noise["sigma"].any()
            counts = noise["is_masked"].float().mean(1)
            assert counts[t.argmax()] > counts[t.argmin()]
        elif kind == "uniform":
            assert torch.allclose(noise["alpha"], alpha)
            counts = noise["keep"].float().mean(1)
            assert counts[t.argmin()] > counts[t.argmax()]
        else:
            assert torch.allclose(noise["scale"] ** 2 + noise["std"] ** 2, torch.ones(8))
            assert noise["alpha"].argmax() == t.argmin()
        if kind != "masked":
            assert torch.allclose(noise["sigma"], -noise["alpha"].log(), atol=1e-6)
            assert (noise["dalpha"] < 0).all()


def test_duo_curriculum(tiny, blind, monkeypatch):
    """Soft inputs in the first half of the updates; the held-out loss is the hard one."""
    seen = []
    inner = train.duo_loss
    monkeypatch.setattr(train, "duo_loss", lambda *args, soft, **more:
                        seen.append(soft) or inner(*args, soft=soft, **more))
    run_train("--process duo --stage teacher --micro_batch 8")
    assert seen == [True, True, False, False]


def test_dcd_rounds(runs, blind, monkeypatch):
    """Five rounds: delta doubles, and the teacher of a round is the average at its start."""
    seen, averages = [], {}
    inner, note = train.dcd_loss, run.Run.note

    def spy(net, teacher, process, x_0, delta, rng, **more):
        seen.append((delta * 512, teacher.state_dict()["vocab_embed.embedding"].clone()))
        return inner(net, teacher, process, x_0, delta, rng, **more)

    def noted(self, step, values):
        averages[step] = self.optim.ema.state_dict()["vocab_embed.embedding"].clone()
        note(self, step, values)

    monkeypatch.setattr(train, "dcd_loss", spy)
    monkeypatch.setattr(run.Run, "note", noted)
    run_train("--process duo --stage dcd --updates 10 --micro_batch 8 --out out/new "
              "--init_from out/duo/teacher.pt")
    assert [delta for delta, _ in seen] == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16]
    averages[0] = load("duo/teacher.pt")["ema"]["vocab_embed.embedding"]
    for step, (_, embedding) in enumerate(seen):
        assert torch.equal(embedding, averages[step // 2 * 2])


@pytest.mark.parametrize("flags", ["--stage teacher",
                                   "--stage idlm --init_from out/mdlm/teacher.pt"])
def test_equal_seeds_give_equal_weights(flags, runs, blind):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)                       # whatever was drawn before does not matter
        run_train(f"{flags} --updates 2 --out out/{name} --seed {seed}")
    a, b, c = (load(f"{name}/{flags.split()[1]}.pt")["ema"] for name in "abc")
    assert distance(a, b) == 0 < distance(a, c)


@pytest.mark.parametrize("process, share", [("mdlm", 0.65), ("duo", 0.75)])
def test_a_sentence_over_and_over_is_learned(process, share, tiny, blind, monkeypatch):
    """The bound falls from about log K nats per token, a new network's, to a share of it. Measured:
    0.52, and 0.63 (uniform, which has also to see which tokens are noise); 0.15 and 0.39 later."""
    Path("text.txt").write_text("the cat sat. " * 300, encoding="utf-8")
    monkeypatch.setitem(train.PRESETS["tiny"], "save_every", 1000)
    run_train(f"--process {process} --stage teacher --updates 80 --batch_size 32 --block_size 24 "
              "--micro_batch 32 --size 1x4x32 --dropout 0")
    log = Path(f"out/{process}/log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["nelbo"] for line in log if "ms" in line]
    K = len(load(f"{process}/teacher.pt")["tokenizer"]["chars"])
    assert 0.7 < losses[0] / math.log(K) < 1.3
    assert sum(losses[-3:]) / 3 < share * math.log(K)


def test_the_judge_predicts_the_next_token(tiny, blind, monkeypatch):
    """Of a sentence over and over: after two letters the next one is certain."""
    Path("text.txt").write_text("the cat sat. " * 300, encoding="utf-8")
    monkeypatch.setitem(train.PRESETS["tiny"], "save_every", 1000)
    run_train("--stage judge --updates 60 --size 1x2x32 --dropout 0 --micro_batch 8")
    net, meta = checkpoint.load_network("out/mdlm/judge.pt")
    assert meta["process"] == "ar" and net.config.causal
    chars = meta["tokenizer"]["chars"]
    x = torch.tensor([[chars.index(c) for c in "cat sat. the"]])
    found = net(x, torch.zeros(1)).argmax(-1)[0]
    assert "".join(chars[i] for i in found[1:]) == "t sat. the "


@pytest.mark.parametrize("flags, kind", UPDATES)
def test_examples(flags, kind, tiny, monkeypatch):
    """Of a .tsv the prompts stay as they are, in every loss of every stage."""
    lines = [f"{a} + {b}\t{a + b}" for a in range(20) for b in range(20)]
    Path("sums.tsv").write_text("\n".join(lines), encoding="utf-8")
    seen = []
    draw = train.draw_latent
    monkeypatch.setattr(train, "draw_latent", lambda process, x_0, *args, **more:
                        seen.append((x_0, more["free"], draw(process, x_0, *args, **more).x))
                        or draw(process, x_0, *args, **more))
    process = "duo" if "duo" in flags else "mdlm"
    for stage in train.STAGES[process]:
        run_train(f"--data sums.tsv --stage {stage} --updates 1 {flags}")
    assert len(seen) == 4
    for x_0, free, x in seen:
        assert free.any() and not free.all()
        x = x[1][..., 0] if kind == "soft" else x
        assert torch.equal(x[~free], x_0[~free])


# ---- the whole command --------------------------------------------------------------------------

def test_all_stages_by_one_command(tiny, monkeypatch, capsys):
    """What is missing runs, in order; then the table; and the last line names a command for this
    very run, which sample.py understands."""
    tables = []
    monkeypatch.setattr(evaluate, "short_table", lambda *args: tables.append(args))
    run_train("--process duo --stage teacher --out out/mine")
    assert capsys.readouterr().out.splitlines()[-1].endswith("sample.py --model teacher --process duo --out out/mine")
    run_train("--process duo --out out/mine")
    printed = capsys.readouterr().out
    assert printed.count("is finished: kept") == 1 and "out/mine/teacher.pt is finished" in printed
    assert len(tables) == 1 and tables[0][:2] == (Path("out/mine"), "duo")
    log = [json.loads(line) for line in Path("out/mine/log.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in log if "ms" in line]
    assert stages == ["teacher"] * 4 + ["dcd"] * 4 + ["idlm"] * 4
    generator = load("mine/idlm.pt")
    assert (generator["teacher"], generator["start"]) == ("out/mine/teacher.pt", "out/mine/dcd.pt")
    script, *argv = shlex.split(printed.splitlines()[-1].split("Next: python ")[1])
    assert script == "sample.py"
    sample.main(argv)
    assert "out/mine/idlm.pt (duo, idlm)" in capsys.readouterr().out


@pytest.mark.parametrize("compiles", [False, True])
def test_no_compile_is_one_switch(compiles, tiny, monkeypatch):
    """--no-compile: nothing is compiled in any stage, and the table is asked not to, either.
    Without it the trunk's blocks are."""
    calls, tables = [], []

    def compile_or_fail(function=None, **options):
        calls.append(function)
        assert compiles, "compiled"
        return function

    monkeypatch.setattr(torch, "compile", compile_or_fail)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(checkpoint.shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(evaluate, "short_table", lambda *args: tables.append(args))
    flags = tiny_flags("--updates 1")
    train.main([flag for flag in flags if not compiles or flag != "--no-compile"])
    assert tables[0][-1] is not compiles and (len(calls) > 0) == compiles


def test_a_machine_without_a_compiler(monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "which", lambda name: None)
    assert not train.parse_args(["--device=cpu"]).compile


@pytest.mark.parametrize("process", ["mdlm", "duo"])
def test_a_published_teacher_is_distilled_exported_and_read_again(process, tiny, capsys):
    """As the README has it, with a small network of the published names and shapes."""
    chars = "".join(sorted({"\n", *some_text()}))
    spec = {"name": "char", "chars": chars}
    write(Path(f"tiny-{process}"), synthetic(V=len(chars) + 1, layers=1), tokenizer=spec)
    train.main(f"--stage idlm --preset owt --process {process} --init_from tiny-{process} --data "
               "text.txt --tokenizer char --updates 2 --batch_size 4 --micro_batch 2 "
               "--block_size 16 --device cpu --no-compile".split())
    state = load(f"{process}/idlm.pt")
    assert state["config"]["width"] == 128 and state["teacher"] == f"tiny-{process}"
    assert state["config"]["dropout"] == 0.1
    sample.main(["--process", process, "--export", "exported"])
    net, meta = checkpoint.load_network("exported", process=process)
    assert distance(net.state_dict(), state["ema"]) == 0
    assert meta["config"] == state["config"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_are_not_utf_8(encoding, tiny, monkeypatch):
    """Training goes on when it prints a text that the terminal cannot show; so does sample.py."""
    Path("text.txt").write_text("Ein Fuß – zwei Füße ☃ „so“ \n" * 60, encoding="utf-8")
    for main in (lambda: run_train("--stage teacher --updates 2"),
                 lambda: sample.main("--model teacher --num_samples 9".split())):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            checkpoint.run_script(main)
        shown = terminal.buffer.getvalue().decode(encoding)
        assert "?" in shown and "☃" not in shown and ("ß" in shown) == (encoding == "cp1252")
    assert load("mdlm/teacher.pt")["step"] == 2
