"""The toy: its tables against sampling and closed forms, its theorem, its training, its command.

tests/test_theorem.py holds `exact_gap`. Run: python -m pytest tests/test_toy.py
"""
import json
import math
import signal
import sys
from multiprocessing.pool import ThreadPool

import pytest
import torch

import toy
from conftest import law_score
from experiments import theorem
from generator import sample
from toy import K, PROCESSES, eight_modes, kl, law, scores


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are no faster on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_net(process, latent_dim=0):
    """A PlaneNet whose tokens depend on each other, on its input and on its latent."""
    torch.manual_seed(0)
    net = toy.PlaneNet(process.vocab_size, width=32)
    net.set_latent(latent_dim)
    net.projection.data *= 3
    for layer in (*net.mlp[::2], net.output_layer.linear):
        torch.nn.init.normal_(layer.weight, std=2 / layer.in_features ** 0.5)
    return net


def squares(P):                                            # (K, K) -> (100,): mass of 5 x 5 cells
    return P.view(10, 5, 10, 5).sum((1, 3)).flatten()


def square_of(x):                                          # (n, 2) -> (n,)
    return x[:, 0] // 5 * 10 + x[:, 1] // 5


# ---- data and scores ----------------------------------------------------------------------------

def test_data_are_eight_equal_spots_on_a_circle():
    p = eight_modes()
    first, second = (p > 0).nonzero().double().T - (K - 1) / 2
    mode = (torch.atan2(second, first) * 4 / math.pi).round() % 8
    mass = torch.zeros(8).double().index_add_(0, mode.long(), p[p > 0])
    assert p.sum().item() == pytest.approx(1)
    assert ((mass > 0.12) & (mass < 0.13)).all()
    assert ((first.hypot(second) - 17).abs() < 5).all()
    assert 200 < (p > 0).sum() < 600                       # neither a few points nor the plane


def test_scores_of_laws_known_by_hand():
    p = eight_modes()
    assert scores(p, p) == {"validity": 1, "js": 0}
    off = (p == 0) / (p == 0).sum()                        # disjoint: JS is ln 2
    assert scores(off.double(), p) == {"validity": 0, "js": pytest.approx(math.log(2), abs=1e-4)}
    # Half of p*, of mass m, and nothing else: P is c = 1 / m times p* there, the middle (1 + c) / 2
    # times p*; elsewhere the middle is p* / 2.
    half = torch.where(torch.arange(K)[:, None] < K // 2, p, 0)
    m = half.sum().item()
    c = 1 / m
    js = (math.log(2 * c / (1 + c)) + m * math.log(2 / (1 + c)) + (1 - m) * math.log(2)) / 2
    assert scores(half / m, p) == {"validity": 1, "js": pytest.approx(js, abs=1e-4)}


# ---- law ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, steps", [("masked", 1), ("masked", 3), ("uniform", 1),
                                         ("uniform", 2)])
def test_law_is_what_sample_draws_from(name, steps, rng):
    """20,000 texts, counted in squares of 5 x 5 cells, against the table."""
    process = PROCESSES[name]
    net = random_net(process)
    P = law(net, process, steps, rng)
    x = square_of(sample(net, process, 20_000, 2, steps, rng).tokens)
    assert P.sum().item() == pytest.approx(1, abs=1e-5)
    assert law_score(x, squares(P) / P.sum()) < 4.5
    # The test can fail: neither a flat law passes nor the tokens in the wrong order.
    assert law_score(x, torch.full((100,), 0.01)) > 10
    assert law_score(x, squares(P.T) / P.sum()) > 10
    # From [MASK] [MASK] one pass draws a product; what is random in two tokens couples them.
    product = P.sum(1, keepdim=True) * P.sum(0)
    assert (kl(P, product) > 0.02) == (steps > 1 or name == "uniform")


def test_law_averages_over_the_latent(rng):
    """One masked pass with z: texts drawn one by one, each from the rows of a z of its own."""
    process = PROCESSES["masked"]
    net = random_net(process, latent_dim=8)
    P = law(net, process, 1, rng)
    x = torch.full((20_000, 2), K)
    with torch.no_grad():
        h = net.hidden(x, torch.zeros(len(x)), net.draw_z(len(x), rng))
        rows = process.log_probs(net.project(h), x).exp()
    drawn = torch.multinomial(rows.flatten(0, 1), 1, generator=rng).view(-1, 2)
    assert law_score(square_of(drawn), squares(P) / P.sum()) < 4.5
    assert kl(P, P.sum(1, keepdim=True) * P.sum(0)) > 0.02


# ---- theorem and training -----------------------------------------------------------------------

def test_theorem_descends_to_the_data_and_collapses_without_the_fake(monkeypatch, capsys):
    monkeypatch.setattr(theorem, "PROCESSES", {"uniform": PROCESSES["uniform"]})
    theorem.theorem(updates=40)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    for words in lines:
        distance, cells = float(words[words.index("p*)") + 1]), float(words[-2])
        if "IDLM" in words:                                # p* has about 310 texts
            assert distance < 0.5 and cells > 200, words
        else:
            assert distance > 1 and cells < 80, words


def test_a_latent_carries_what_one_product_cannot(rng, monkeypatch):
    """Two squares on the diagonal, one masked pass. A product is at best one of the squares, or
    both and their mirror images: JS 0.216 either way."""
    side = (torch.arange(K) < K // 2).double()
    p = torch.outer(side, side) + torch.outer(1 - side, 1 - side)
    p, process = p / p.sum(), PROCESSES["masked"]
    monkeypatch.setattr(toy, "B", 128)
    torch.manual_seed(0)
    teacher = toy.train_teacher(p, process, rng, 80)
    assert scores(law(teacher, process, 1, rng), p)["js"] > 0.2
    net = toy.distil(teacher, process, rng, 60, kind="masked", latent_dim=2)
    assert scores(law(net, process, 1, rng), p)["js"] < 0.1


@pytest.mark.parametrize("name, model", [(name, model) for name in toy.MODELS
                                         for model in toy.MODELS[name]])
def test_every_model_trains(name, model, rng, monkeypatch):
    """Its generator moves, its teacher does not."""
    monkeypatch.setattr(toy, "B", 8)
    process = PROCESSES[name]
    teacher = random_net(process)
    before = {key: x.clone() for key, x in teacher.state_dict().items()}
    net = toy.distil(teacher, process, rng, 3, **toy.MODELS[name][model])
    assert all(torch.equal(x, before[key]) for key, x in teacher.state_dict().items())
    assert not torch.equal(net.mlp[0].weight, teacher.mlp[0].weight)


# ---- the command --------------------------------------------------------------------------------

def test_command_writes_picture_and_records_under_out(tmp_path, monkeypatch, capsys):
    """In one process, with no training and p* in the place of every table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "law", lambda *_: eight_modes())
    monkeypatch.setattr(toy.multiprocessing, "Pool", lambda *_: ThreadPool(1))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--updates", "0", "--seeds", "0", "3"])
    toy.main()
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"toy.png", "toy.json", "toy.json.lock"}
    assert (tmp_path / "out/toy/toy.png").stat().st_size > 20_000
    records = json.loads((tmp_path / "out/toy/toy.json").read_text())
    models = [(r["seed"], r["process"], r["model"], r["passes"]) for r in records]
    assert models[:4] == [(0, "masked", "teacher", 1), (0, "masked", "teacher", 4),
                          (0, "masked", "teacher", 50), (0, "masked", "IDLM", 1)]
    assert len(models) == len(set(models)) == 24
    assert all(r["validity"] == 1 and r["js"] == 0 for r in records)
    assert capsys.readouterr().out.count("IDLM") == 4


def test_ctrl_c_ends_it_with_one_line(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    child = start("toy", "")
    child.wait_for("training")
    status, printed = child.send(signal.SIGINT)
    assert status == 1
    first, last = printed.splitlines()
    assert first.startswith("training") and last.startswith("toy.py: stopped")
