"""sample.py on networks of random weights: prompts, seeds, endings, export, and what it refuses.

    python -m pytest -q tests/test_sample.py
"""
import json
import re
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from data import BadInput
from model import DiT, ModelConfig

SCRIPT = sample.__file__
CHARS = "\n abcdefgh"                       # K = 10
L = 16


def write_model(path, process, stage, seed):
    torch.manual_seed(seed)
    config = ModelConfig(len(CHARS) + (process == "mdlm"), 1, 2, 16, 8, causal=process == "ar")
    net = DiT(config)
    for p in net.parameters():              # a fresh head is 0: every text would be equally likely
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(path, {"config": asdict(config), "process": process, "stage": stage, "step": 1,
                           "tokenizer": {"name": "char", "chars": CHARS}, "block_size": L,
                           "updates": 1, "ema": net.state_dict()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("mdlm/idlm", "mdlm/teacher", "duo/idlm", "duo/dcd", "mdlm/judge")):
        process, stage = name.split("/")
        write_model(folder / f"{name}.pt", "ar" if stage == "judge" else process, stage, seed)
    return folder


@pytest.fixture(autouse=True)
def here(runs, tmp_path, monkeypatch):
    """A folder with runs of both processes, and no model shipped beside the program."""
    shutil.copytree(runs, tmp_path / "out")
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
def test_passes_at_most_steps(capsys, steps):
    """A masked text of L tokens reveals at most L times; a uniform one sits out where no token can
    change, but for the first and the last step."""
    for flags, most in (([], min(steps, L)), (["--process", "duo"], steps)):
        passes = int(write(capsys, *flags, "--steps", str(steps))[0].split()[0])
        assert passes == 1 if steps == 1 else 2 <= passes <= most


def test_seed_and_length(capsys):
    flags = "--num_samples", "2", "--length", "40"
    texts = [write(capsys, *flags, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2] and len(texts[0][0]) == 40


@pytest.mark.parametrize("flags", [[], ["--process", "duo"],
                                   ["--process", "duo", "--ending", "ancestral"],
                                   ["--process", "duo", "--ending", "greedy-published"]])
@pytest.mark.parametrize("prompt, pattern", [
    ("gab", "gab.{13}"),                            # at the start
    ("gab{5}fed", "gab.{5}fed.{5}"),             # {N}: N tokens to fill in between
    ("{13}hag", ".{13}hag"),                        # at the end
    (r"a\nb", "a\nb.{13}"),                         # as a shell hands a newline over
    ("abcdefghabcdefgh", "abcdefghabcdefgh")])         # nothing left to write
def test_prompt_stays(capsys, flags, prompt, pattern):
    _, texts = write(capsys, *flags, "--prompt", prompt, "--num_samples", "4", "--steps", "3")
    assert all(re.fullmatch(pattern, text, re.DOTALL) for text in texts), texts
    if "." in pattern and "greedy-published" not in flags:         # that one is an argmax
        assert len(set(texts)) > 1


def test_settings_reach_the_sampler(capsys, monkeypatch):
    seen = []
    inner = sample.sample

    def spy(net, process, num_texts, length, steps, rng, **how):
        seen.append((num_texts, length, steps, how["temperature"], how["top_p"], how["ending"],
                     how["schedule"]))
        return inner(net, process, num_texts, length, steps, rng, **how)

    monkeypatch.setattr(sample, "sample", spy)
    write(capsys, "--process", "duo", "--ending", "ancestral", "--temperature", "0.7", "--top_p",
          "0.5", "--steps", "2", "--num_samples", "2", "--length", "8", "--schedule", "cosine")
    write(capsys)
    assert seen == [(2, 8, 2, 0.7, 0.5, "ancestral", "cosine"),
                    (1, L, 16, None, 1.0, "greedy", "even")]


def test_a_model_may_say_its_schedule(capsys, monkeypatch):
    """config.json's word counts, unless --schedule says otherwise."""
    sample.main(["--export", "said"])
    stated = json.loads(Path("said/config.json").read_text())
    Path("said/config.json").write_text(json.dumps(stated | {"schedule": "cosine"}))
    seen, inner = [], sample.sample
    monkeypatch.setattr(sample, "sample", lambda *args, **how: seen.append(how["schedule"]) or
                        inner(*args, **how))
    write(capsys, "--init_from", "said")
    write(capsys, "--init_from", "said", "--schedule", "linear")
    assert seen == ["cosine", "linear"]


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


@pytest.mark.parametrize("process", ["mdlm", "duo"])
def test_export_writes_the_same_model(capsys, process):
    flags = "--num_samples", "3", "--seed", "5"
    before = write(capsys, "--process", process, *flags)[1]
    sample.main(["--process", process, "--export", "folder"])
    out = capsys.readouterr().out
    assert re.fullmatch(rf"wrote folder: [\d,]+ parameters of out/{process}/idlm.pt\n", out)
    head, after = write(capsys, "--init_from", "folder", *flags)
    assert after == before and head.endswith(f"folder ({process}, idlm)")
    with pytest.raises(BadInput, match="folder.* choose another folder"):
        sample.main(["--process", process, "--export", "folder"])


def test_shipped_model_answers_last(capsys):
    """The folder beside sample.py is used for a plain call alone, and only without an own run."""
    sample.main(["--model", "teacher", "--export", "program/assets/shakespeare"])
    assert "out/mdlm/idlm.pt" in write(capsys)[0]
    Path("out/mdlm/idlm.pt").unlink()
    assert "seed 1, program/assets/shakespeare (mdlm, teacher)" in write(capsys)[0]
    Path("out/duo/idlm.pt").unlink()
    for flags in (["--out", "out/duo"], ["--process", "duo"]):
        with pytest.raises(BadInput, match="out/duo/idlm.pt; run python train.py first"):
            sample.main(flags)


@pytest.mark.parametrize("flags, sentence", [
    (["--steps", "0"], "--steps 0 is out of range"),
    (["--steps", "-4"], "--steps -4 is out of range"),
    (["--num_samples", "0"], "--num_samples 0 is out of range"),
    (["--length", "0"], "--length 0 is out of range"),
    (["--temperature", "0"], "--temperature 0.0 is out of range"),
    (["--temperature", "nan"], "--temperature nan is out of range"),
    (["--top_p", "0"], "--top_p 0.0 is out of range"),
    (["--top_p", "1.5"], "--top_p 1.5 is out of range"),
    (["--prompt", "abz?"], r"'\?'.* 'z'"),
    (["--prompt", "a{40}"], "the prompt holds 41 tokens, the text 16"),
    (["--prompt", "abcdefgh" * 3], "the prompt holds 24 tokens, the text 16"),
    (["--out", "none"], "there is no checkpoint at none/idlm.pt; run python train.py first"),
    (["--model", "dcd"], "there is no checkpoint at out/mdlm/dcd.pt; run python train.py first"),
    (["--init_from", "out/mdlm/idlm.pt", "--process", "duo"], "is a mdlm network"),
    (["--init_from", "out/mdlm/judge.pt"], "a judge has no noising process")])
def test_bad_input(flags, sentence):
    with pytest.raises(BadInput, match=sentence):
        sample.main(flags)


def test_unknown_cuda_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadInput, match="--device cuda: this machine has .*cpu"):
        sample.main(["--device", "cuda"])


@pytest.mark.parametrize("flags", [["--model", "judge"], ["--process", "sedd"],
                                   ["--ending", "random"], ["--steps", "few"], ["--nothing"]])
def test_unknown_flag_values(flags, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(flags)
    assert error.value.code == 2 and flags[0] in capsys.readouterr().err


def test_end_of_the_script(monkeypatch):
    """A string to sys.exit: one sentence on stderr, no traceback, status 1."""
    monkeypatch.setattr("sys.argv", ["sample.py", "--out", "none"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert error.value.code == "sample.py: there is no checkpoint at none/idlm.pt; " \
                               "run python train.py first"


def test_help_shows_the_notation_in_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        sample.main(["--help"])
    assert error.value.code == 0
    assert '--prompt "ROMEO:{40}\\nJULIET:"' in capsys.readouterr().out
