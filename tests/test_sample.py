"""sample.py on networks of random weights: prompts, seeds, endings, export, and what it refuses.

    python -m pytest tests/test_sample.py
"""
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from conftest import ROOT, refused
from data import get_tokenizer
from model import DiT, ModelConfig

CHARS = "\n abcdefgh"                       # K = 10
L = 16


def write_model(path, process, stage, seed):
    torch.manual_seed(seed)
    config = ModelConfig(len(CHARS) + (process == "mdlm"), 1, 2, 16, 8, causal=process == "ar")
    net = DiT(config)
    for p in net.parameters():              # a new head is 0: every text would be equally likely
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(path, {"config": asdict(config), "process": process, "stage": stage, "step": 1,
                           "tokenizer": {"name": "char", "chars": CHARS}, "block_size": L,
                           "updates": 1, "ema": net.state_dict()})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("mdlm/idlm", "mdlm/teacher", "duo/idlm", "duo/dcd", "mdlm/judge")):
        process, stage = name.split("/")
        write_model(folder / f"{name}.pt", "ar" if stage == "judge" else process, stage, seed)
    return folder


@pytest.fixture(autouse=True)
def folder(models, tmp_path, monkeypatch):
    """A working folder with runs of both processes, and no model shipped beside the program."""
    shutil.copytree(models, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "__file__", str(tmp_path / "program" / "sample.py"))
    monkeypatch.setattr(sample.time, "sleep", lambda seconds: None)


def write(capsys, *flags):
    """-> the first line, the list of texts."""
    sample.main(list(flags))
    head, *texts = capsys.readouterr().out.split("\n" + "-" * 60 + "\n")
    texts[-1] = texts[-1].removesuffix("\n")
    return head, texts


@pytest.mark.parametrize("flags, path, process, stage", [
    ([], "out/mdlm/idlm.pt", "mdlm", "idlm"),
    (["--model", "teacher"], "out/mdlm/teacher.pt", "mdlm", "teacher"),
    (["--process", "duo"], "out/duo/idlm.pt", "duo", "idlm"),
    (["--process", "duo", "--model", "dcd"], "out/duo/dcd.pt", "duo", "dcd"),
    (["--out", "out/duo", "--model", "dcd"], "out/duo/dcd.pt", "duo", "dcd"),
    (["--init_from", "out/duo/dcd.pt"], "out/duo/dcd.pt", "duo", "dcd")])
def test_first_line_and_texts(capsys, flags, path, process, stage):
    head, texts = write(capsys, *flags, "--seed", "3", "--num_samples", "3", "--steps", "5")
    found = re.fullmatch(rf"(\d+) passes, \d+\.\d\d s, seed 3, {path} \({process}, {stage}\)", head)
    assert found and 1 <= int(found[1]) <= 5
    assert len(texts) == 3 and len(set(texts)) == 3
    assert all(len(text) == L and set(text) <= set(CHARS) for text in texts)


@pytest.mark.parametrize("steps", [1, 3, 16, 200])
def test_at_most_so_many_passes(capsys, steps):
    """A masked text of L tokens reveals at most L times; a uniform one sits out where no token can
    change."""
    for flags, most in (([], min(steps, L)), (["--process", "duo"], steps)):
        passes = int(write(capsys, *flags, "--steps", str(steps))[0].split()[0])
        assert passes == 1 if steps == 1 else 2 <= passes <= most


def test_seed_and_length(capsys):
    flags = "--num_samples", "2", "--length", "40"
    texts = [write(capsys, *flags, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2] and len(texts[0][0]) == 40


def test_more_samples_than_a_batch_holds(capsys, monkeypatch):
    """Memory is that of a batch, whatever --num_samples; all texts differ."""
    sizes = []
    inner = sample.sample

    def spy(net, process, num_texts, *args, **settings):
        sizes.append(num_texts)
        return inner(net, process, num_texts, *args, **settings)

    monkeypatch.setattr(sample, "BATCH", 4)
    monkeypatch.setattr(sample, "sample", spy)
    _, texts = write(capsys, "--num_samples", "10", "--steps", "3")
    assert sizes == [4, 4, 2] and len(texts) == len(set(texts)) == 10


@pytest.mark.parametrize("flags", [[], ["--order", "even"], ["--process", "duo"],
                                   ["--process", "duo", "--ending", "greedy"],
                                   ["--process", "duo", "--ending", "map"]])
@pytest.mark.parametrize("prompt, pattern", [
    ("gab", "gab.{13}"),                               # at the start
    ("gab{5}fed", "gab.{5}fed.{5}"),                   # {N}: N tokens to fill in between
    ("{13}hag", ".{13}hag"),                           # at the end
    (r"a\nb", "a\nb.{13}"),                            # as a shell hands a newline over
    ("abcdefghabcdefgh", "abcdefghabcdefgh")])         # nothing left to write
def test_a_prompt_stays(capsys, flags, prompt, pattern):
    _, texts = write(capsys, *flags, "--prompt", prompt, "--num_samples", "4", "--steps", "3")
    assert all(re.fullmatch(pattern, text, re.DOTALL) for text in texts), texts
    if "." in pattern and "greedy" not in flags:       # that one is an argmax
        assert len(set(texts)) > 1


def test_an_answer_for_every_line_of_a_file(capsys, monkeypatch):
    """prompt TAB answer. The answer is what the model wrote, up to its padding of newlines; a
    byte-order mark is no character, and the lines of a Windows file are lines."""
    Path("prompts.txt").write_bytes("\ufeffab\r\ncd\\nef\r\n{2}hh".encode())
    sample.main(["--prompts", "prompts.txt", "--steps", "4"])
    head, *lines = capsys.readouterr().out.split("\n", 1)
    lines = re.findall(r"(?s)(ab|cd\\nef|\{2\}hh)\t(.*?)(?=\ncd|\n\{|\n\Z)", lines[0])
    assert [prompt for prompt, _ in lines] == ["ab", r"cd\nef", "{2}hh"]
    for (_, answer), written in zip(lines, (14, 11, 14)):
        assert len(answer) <= written and not answer.endswith("\n")
    Path("prompts.txt").write_bytes(b"")
    sample.main(["--prompts", "prompts.txt"])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_settings_reach_the_sampler(capsys, monkeypatch):
    seen = []
    inner = sample.sample

    def spy(net, process, num_texts, length, steps, rng, **settings):
        names = "temperature", "top_p", "order", "ending"
        seen.append((num_texts, length, steps, *(settings[name] for name in names)))
        return inner(net, process, num_texts, length, steps, rng, **settings)

    monkeypatch.setattr(sample, "sample", spy)
    write(capsys, "--process", "duo", "--ending", "map", "--temperature", "0.7", "--top_p", "0.5",
          "--steps", "2", "--num_samples", "2", "--length", "8", "--order", "even")
    write(capsys)
    assert seen == [(2, 8, 2, 0.7, 0.5, "even", "map"),
                    (1, L, 16, 1.0, 1.0, "random", "ancestral")]


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_dtype(capsys, monkeypatch, dtype):
    seen = []
    project = DiT.project
    monkeypatch.setattr(DiT, "project", lambda net, h: seen.append(project(net, h)) or seen[-1])
    write(capsys, "--dtype", dtype, "--steps", "2")
    assert {str(logits.dtype) for logits in seen} == {f"torch.{dtype}"}


def test_watch(capsys):
    """One frame a step; masks only fall away, what is written stays, the last frame is the text."""
    sample.main(["--watch", "--steps", "8", "--prompt", "a{4}b"])
    frames, text = re.split(r"\d passes.*\n-{60}\n", capsys.readouterr().out)
    _, *frames = re.split(r"\033\[H\033\[J step (\d)/8\n\n", frames)
    assert frames[::2] == [str(i) for i in range(1, 9)]
    frames = [frame.removesuffix("\n") for frame in frames[1::2]]
    masks = [frame.count("·") for frame in frames]
    assert masks == sorted(masks, reverse=True) and masks[0] > 4 and masks[-1] == 0
    for before, after in zip(frames, frames[1:]):
        assert len(after) == L and all(b in ("·", a) for b, a in zip(before, after))
        assert (after[0], after[5]) == ("a", "b")
    assert frames[-1] + "\n" == text


def test_watch_uniform(capsys):
    sample.main(["--watch", "--steps", "3", "--process", "duo"])
    out = capsys.readouterr().out
    assert out.count("\033[H\033[J") == 3 and "·" not in out


def test_readable():
    """Bytes of one character may be tokens of their own; [MASK] is a middle dot."""
    tokenizer = get_tokenizer({"name": "char", "chars": "aé☃"})
    assert sample.readable(torch.tensor([0, 2, 3, 1]), tokenizer) == "a☃·é"


@pytest.mark.parametrize("process", ["mdlm", "duo"])
def test_export_writes_the_same_model(capsys, process):
    flags = "--num_samples", "3", "--seed", "5"
    before = write(capsys, "--process", process, *flags)[1]
    sample.main(["--process", process, "--export", "folder"])
    out = capsys.readouterr().out
    assert re.fullmatch(rf"wrote folder, the weights of out/{process}/idlm.pt\n", out)
    head, after = write(capsys, "--init_from", "folder", *flags)
    assert after == before and head.endswith(f"folder ({process}, idlm)")
    refused(lambda: sample.main(["--process", process, "--export", "folder"]), "another folder")
    sample.main(["--process", process, "--export", "half", "--dtype", "bfloat16"])
    whole, half = (Path(name, "model.safetensors").stat().st_size for name in ("folder", "half"))
    assert half < 0.7 * whole and write(capsys, "--init_from", "half", *flags)[1]


def test_the_shipped_model_answers_last(capsys):
    """The folder beside sample.py is used for a plain call alone, and only without an own run."""
    sample.main(["--model", "teacher", "--export", "program/assets/shakespeare/idlm"])
    assert "out/mdlm/idlm.pt" in write(capsys)[0]
    Path("out/mdlm/idlm.pt").unlink()
    assert "program/assets/shakespeare/idlm (mdlm, teacher)" in write(capsys)[0]
    Path("out/duo/idlm.pt").unlink()
    for flags in (["--out", "out/duo"], ["--process", "duo"]):
        refused(lambda: sample.main(flags), "out/duo/idlm.pt; run python train.py first")


@pytest.mark.parametrize("flags, words", [
    ("--steps 0", ["--steps"]), ("--steps -4", ["--steps"]), ("--steps few", ["--steps"]),
    ("--num_samples 0", ["--num_samples"]), ("--length 0", ["--length"]),
    ("--temperature 0", ["--temperature"]), ("--temperature nan", ["--temperature"]),
    ("--temperature 1e-38", ["--temperature"]), ("--temperature inf", ["--temperature"]),
    ("--top_p 0", ["--top_p"]), ("--top_p 1e-38", ["--top_p"]), ("--top_p 1.5", ["--top_p"]),
    ("--seed -1", ["--seed"]), ("--seed 12345678901234567890", ["--seed"]),
    ("--model judge", ["--model"]), ("--process sedd", ["--process"]),
    ("--ending random", ["--ending"]), ("--order left", ["--order"]), ("--nothing", ["--nothing"]),
    ("--prompt abz?", ["'?'", "'z'"]),
    ("--prompt a{40}", ["the prompt holds", "the text 16", "--length"]),
    ("--prompt a{99999999999999}", ["no such characters"]),
    ("--prompt abcdefghabcdefghabcdefgh", ["the prompt holds 24 tokens, the text 16"]),
    ("--out none", ["no checkpoint at none/idlm.pt; run python train.py first"]),
    ("--model dcd", ["no checkpoint at out/mdlm/dcd.pt; run python train.py first"]),
    ("--init_from out/mdlm/idlm.pt --process duo", ["is a mdlm network"]),
    ("--init_from out/mdlm/judge.pt", ["a judge has no noising process"])])
def test_bad_input(flags, words):
    refused(lambda: sample.main(flags.split()), *words)


def test_a_model_of_no_numbers():
    state = checkpoint.load("out/mdlm/idlm.pt")
    state["ema"]["output_layer.linear.bias"][:] = float("nan")
    checkpoint.save("out/mdlm/idlm.pt", state)
    refused(lambda: sample.main([]), "out/mdlm/idlm.pt", "not finite")


def test_help(capsys):
    """The notation in one line, as it is typed."""
    with pytest.raises(SystemExit) as end:
        sample.main(["--help"])
    assert end.value.code == 0
    assert '--prompt "ROMEO:{40}\\nJULIET:"' in capsys.readouterr().out


def test_the_script_in_a_pipe_that_closes():
    """`python sample.py | head -1` in a terminal of ASCII alone: the line, and not a word more. And
    a refusal: one sentence on stderr, status 1."""
    script = f"{sys.executable} {ROOT}/sample.py --init_from out/mdlm/idlm.pt"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(f"set -o pipefail; {script} --num_samples 1000 --steps 1 | head -1",
                          shell=True, executable="/bin/bash", env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.fullmatch(rb"1 passes, .* seed 1, .*\n", done.stdout)
