"""experiments/watch.py on a network of random weights: frames, times, places, and what it refuses.

    python -m pytest tests/test_watch.py
"""
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import sample
from conftest import refused
from experiments import watch
from model import DiT, ModelConfig

CHARS = "\n abcdefgh"
L = 48
STEPS = 4


def write_model(path, process="mdlm", tokenizer="char"):
    torch.manual_seed(0)
    K = len(CHARS) if tokenizer == "char" else 50_257
    spec = {"name": "char", "chars": CHARS} if tokenizer == "char" else {"name": tokenizer}
    net = DiT(ModelConfig(K + (process == "mdlm"), 1, 2, 16, 8))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(path, {"config": asdict(net.config), "process": process, "stage": "idlm",
                           "step": 1, "updates": 1, "tokenizer": spec, "block_size": L,
                           "ema": net.state_dict()})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "idlm.pt"
    write_model(path)
    return path


def run(model, out, *flags):
    watch.main([f"--model={model}", f"--out={out}", f"--steps={STEPS}", *flags])
    return out.read_bytes()


def frames(path):
    """-> RGB arrays, milliseconds, the number of repeats (0: for ever)"""
    pictures, times = [], []
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            pictures.append(np.asarray(image.convert("RGB")))
            times.append(image.info["duration"])
        return pictures, times, image.info["loop"]


@pytest.mark.parametrize("order", ["random", "even"])
def test_a_frame_a_pass_and_the_last_one_is_the_text_of_sample(model, tmp_path, capsys, order):
    path = tmp_path / "new" / "watch.gif"
    assert len(run(model, path, f"--order={order}")) < 1.5e6
    capsys.readouterr()
    pictures, times, loop = frames(path)
    assert times == [500] * (STEPS - 1) + [3000] and loop == 0
    flags = [f"--init_from={model}", f"--steps={STEPS}", f"--order={order}", "--device=cpu"]
    sample.main([*flags, "--dtype=float32"])
    head, text = capsys.readouterr().out.split("\n" + "-" * 60 + "\n")
    assert head.startswith(f"{STEPS} passes")
    net, meta = checkpoint.load_network(model)
    texts = watch.write(net, meta, STEPS, order, seed=1)
    assert texts[-1] == text[:-1] and "·" not in texts[-1]
    assert np.array_equal(pictures[-1], watch.draw(texts)[-1].convert("RGB"))


def test_equal_seeds_give_equal_files(model, tmp_path):
    first = run(model, tmp_path / "a.gif")
    assert run(model, tmp_path / "b.gif") == first
    assert run(model, tmp_path / "a.gif", "--seed=2") != first             # replaced as a whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gif", "b.gif"]


def test_colours_tell_masked_revealed_and_earlier_characters():
    texts = ["a··", "ab·", "abc"]
    for i, image in enumerate(watch.draw(texts)):
        pixels = np.asarray(image.convert("RGB"))
        for column in range(3):
            left = watch.MARGIN + column * watch.STEP_X
            cell = pixels[watch.MARGIN:watch.MARGIN + watch.STEP_Y, left:left + watch.STEP_X]
            seen = {tuple(color) for color in cell.reshape(-1, 3).tolist()}
            assert (watch.GLOW in seen) == (column == i)
            assert (watch.FRESH in seen) == (column == i)
            assert (watch.INK in seen) == (column < i)


def test_lines_break_at_newlines_and_before_words():
    text = "to be\n\n" + "word " * 20 + "end"
    where = watch.places(text)
    assert where[:8] == [(0, i) for i in range(6)] + [(1, 0), (2, 0)]
    assert where[-3:] == [(3, 40), (3, 41), (3, 42)]      # 12 words, and 8 before the end
    for text in ("x" * 150, "\n" * 5, "x", "x" * 63 + "\n\n", " " * 70, "x " * 31 + "xy\nz"):
        where = watch.places(text)
        assert len(where) == len(text) == len({*where}) and where == sorted(where)
        assert max(column for _, column in where) < 64


def test_what_it_refuses(model, tmp_path):
    kept = tmp_path / "text.txt"
    kept.write_text("kept", encoding="utf-8")
    refused(lambda: run(model, kept), "text.txt", ".gif")
    assert kept.read_text(encoding="utf-8") == "kept"
    refused(lambda: run(tmp_path / "none.pt", tmp_path / "a.gif"), "none.pt")
    refused(lambda: run(model, tmp_path / "a.gif", "--steps=0"), "--steps")
    refused(lambda: run(model, tmp_path / "a.gif", "--order=left"), "--order")
    other = tmp_path / "other.pt"
    for process, tokenizer in (("duo", "char"), ("mdlm", "gpt2")):
        write_model(other, process, tokenizer)
        words = f"other.pt is a {process} network of {tokenizer} tokens"
        refused(lambda: run(other, tmp_path / "a.gif"), words)
    assert not (tmp_path / "a.gif").exists()
