"""The toy: its tables against sampling and closed forms, its theorem, its figures.

Run: python -m pytest tests/test_toy.py
"""
import math

import pytest
import torch

import toy
from generator import sample
from model import ModelConfig
from toy import DATA, K, PROCESSES, Exact, data_set, exact_gap, floored, kl, law, scores


def random_law(rng, sharpness=2.0):                        # (K, K), all positive
    return (sharpness * torch.randn(K, K, generator=rng).double()).flatten().softmax(0).view(K, K)


def random_net(process, latent_dim=0):
    """A PlaneNet whose tokens depend on each other, its input and its latent."""
    torch.manual_seed(0)
    net = toy.PlaneNet(ModelConfig(process.vocab_size, num_layers=0, num_heads=1, width=32,
                                   cond_dim=32, latent_dim=latent_dim, latent_scale=3.0))
    for layer in (*net.mlp[::2], net.output_layer.linear):
        torch.nn.init.normal_(layer.weight, std=2 / layer.in_features ** 0.5)
    return net


# ---- data and scores ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", DATA)
def test_data_sets_have_eight_parts(name):
    p, part = data_set(name)
    mass = torch.stack([p[part == k].sum() for k in part.unique()])
    assert p.sum().item() == pytest.approx(1) and (p >= 0).all()
    assert (mass > 0.09).sum() == 8 and mass[mass <= 0.09].sum() < 1e-12
    assert 300 < (p > 0).sum() < 1300                      # neither a few points nor the plane


def test_the_board_alternates():
    p, _ = data_set("checkerboard")
    corners = p[[0, 0, 49, 49, 0, 20, 20], [0, 49, 0, 49, 20, 0, 20]] > 0
    assert corners.tolist() == [True, False, False, True, False, False, True]


def test_scores_of_laws_known_by_hand():
    p, part = data_set("checkerboard")
    perfect = scores(p, p, part)
    assert perfect["validity"] == 1 and abs(perfect["js"]) < 1e-12 and perfect["least"] == 1
    off = (p == 0) / (p == 0).sum()                        # disjoint: JS is ln 2
    disjoint = scores(off.double(), p, part)
    assert disjoint["validity"] == 0 and disjoint["js"] == pytest.approx(math.log(2), abs=1e-5)
    # Without one part, of mass m: P is c = 1 / (1 - m) times p on the rest, the midpoint
    # (1 + c) / 2 times p there, and p / 2 on the part. p* is level, so KL to it is one logarithm.
    m = p[part == 0].sum().item()
    c, lost = 1 / (1 - m), scores(torch.where(part == 0, 0, p) / (1 - m), p, part)
    js = (math.log(2 * c / (1 + c)) + (1 - m) * math.log(2 / (1 + c)) + m * math.log(2)) / 2
    floor = 1 - toy.FLOOR + toy.FLOOR * (p > 0).sum().item() / K ** 2
    assert lost["least"] == 0 and lost["validity"] == 1
    assert lost["js"] == pytest.approx(js, abs=1e-5)
    assert lost["kl"] == pytest.approx(math.log(c / floor), abs=1e-5)


# ---- law ----------------------------------------------------------------------------------------

CASES = [("masked", 0, 1), ("masked", 0, 3), ("masked", 8, 1), ("masked", 8, 2), ("uniform", 0, 1),
         ("uniform", 0, 3)]


@pytest.mark.parametrize("name, latent_dim, steps", CASES)
def test_law_is_what_sample_draws_from(name, latent_dim, steps, rng):
    """20,000 texts counted in 100 squares of 5 x 5 cells, against the table.

    A count is binomial; over its standard deviation its distance from the mean is beyond 5.5 with
    odds of 4e-8 (a little more where few are expected, so squares with less than 50 are left out):
    below 1e-4 for all squares and cases. With a latent the table is the mean of four, each itself
    an average over latents; the variance of that mean, estimated from the four, is added three
    times over, since four values may underestimate it.
    """
    process, n = PROCESSES[name], 20_000
    net = random_net(process, latent_dim)

    def squares(P):
        return P.view(10, 5, 10, 5).sum((1, 3)).flatten()

    tables = torch.stack([law(net, process, steps, torch.Generator().manual_seed(seed), 2 ** 13)
                          for seed in range(4 if latent_dim else 1)])
    P, spread = tables.mean(0), 0
    if latent_dim:
        spread = 3 * torch.stack([squares(table) for table in tables]).var(0) / 4
    x = sample(net, process, n, 2, steps, rng, schedule="linear").tokens
    counts = torch.bincount(x[:, 0] // 5 * 10 + x[:, 1] // 5, minlength=100)

    def worst(share):
        z = (counts - n * share) / (n * share * (1 - share) + n ** 2 * spread).sqrt()
        return z[n * share > 50].abs().max().item()

    assert P.sum().item() == pytest.approx(1, abs=1e-5) and (n * squares(P) > 50).sum() > 30
    assert worst(squares(P)) < 5.5
    # The test can fail: neither a flat table passes nor the tokens in the wrong order.
    assert worst(torch.full((100,), 0.01)) > 10 and worst(squares(P.T)) > 10
    product = P.sum(1, keepdim=True) * P.sum(0)
    assert (kl(P, product) > 0.02) == (steps > 1 or latent_dim > 0 or name == "uniform")


def test_one_masked_pass_without_latent_is_a_product(rng):
    P = law(random_net(PROCESSES["masked"]), PROCESSES["masked"], 1, rng)
    torch.testing.assert_close(P, P.sum(1, keepdim=True) * P.sum(0), rtol=1e-5, atol=1e-12)


# ---- the exact denoiser and the exact loss ------------------------------------------------------

def test_exact_denoiser_is_bayes_rule(rng):
    p = random_law(rng)
    q = floored(p)
    x = torch.tensor([[3, K], [K, 7], [K, K]])
    rows = Exact(p, PROCESSES["masked"])(x, torch.zeros(3)).double().softmax(-1)
    for row, want in ((rows[0, 1], q[3]), (rows[1, 0], q[:, 7]), (rows[2, 0], q.sum(1)),
                      (rows[2, 1], q.sum(0))):
        torch.testing.assert_close(row, want / want.sum(), rtol=1e-4, atol=1e-9)
    # Uniform: sum over the clean other token y of p(token, y) q(z | y), term by term.
    a, z = 0.3, torch.tensor([[11, 4]])
    rows = Exact(p, PROCESSES["uniform"])(z, torch.tensor([-math.log(a)])).double().softmax(-1)[0]
    for l, joint in ((0, q), (1, q.T)):
        want = sum(joint[:, y] * (a * (y == z[0, 1 - l]) + (1 - a) / K) for y in range(K))
        torch.testing.assert_close(rows[l], want / want.sum(), rtol=1e-4, atol=1e-9)


def noise(P, a, masked):
    """Both tokens noised at alpha_t = a, by the transition matrix."""
    Q = a * torch.eye(K).double() + (0 if masked else (1 - a) / K)
    Q = torch.cat([Q, torch.full((K, 1), 1 - a)], 1) if masked else Q
    return Q.T @ P @ Q


@pytest.mark.parametrize("name, nodes", [("masked", 8), ("uniform", 48)])
def test_exact_gap_is_the_difference_of_two_kls(name, nodes, rng):
    P, p = random_law(rng), floored(data_set("eight modes")[0])
    masked, a = name == "masked", 1e-3
    want = kl(P, p) - kl(noise(P, a, masked), noise(p, a, masked))
    gap = exact_gap(P, p, PROCESSES[name], nodes=nodes)
    torch.testing.assert_close(gap, want, rtol=1e-8, atol=1e-9)
    assert want > 1 and exact_gap(p, p, PROCESSES[name]).abs() < 1e-12


def test_theorem_descends_to_the_data_and_collapses_without_the_fake(monkeypatch, capsys):
    monkeypatch.setattr(toy, "PROCESSES", {"uniform": PROCESSES["uniform"]})
    toy.theorem(updates=40)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    for words in lines:
        before, after = (float(words[words.index(word) + 1]) for word in ("KL", "->"))
        cells = float(words[words.index("on") + 1])        # p* has about 270 equally likely ones
        if "IDLM" in words:
            assert after < 0.1 * before and cells > 200, words
        else:
            assert after > 1 and cells < 80, words


# ---- training and figures -----------------------------------------------------------------------

def test_a_latent_carries_what_one_product_cannot(rng, monkeypatch):
    """Two squares on the diagonal, one masked pass. A product is at best one of the squares, or
    both and their mirror images: JS 0.216 either way. Measured with the latent: 0.01 to 0.03."""
    side = (torch.arange(K) < K // 2).double()
    p = torch.outer(side, side) + torch.outer(1 - side, 1 - side)
    p, part = p / p.sum(), (2 * side[:, None] + side).long()
    process, js = PROCESSES["masked"], {}
    monkeypatch.setattr(toy, "B", 256)
    torch.manual_seed(0)
    start = toy.train_teacher(p, process, rng, 60)
    for latent_dim in (0, 8):
        curve = []
        net = toy.idlm(start, Exact(p, process), p, process, rng, 80, latent_dim=latent_dim,
                       curve=curve)
        js[latent_dim] = scores(law(net, process, 1, rng, 2 ** 13), p, part)["js"]
        assert len(curve) == 4
        for _, clean, gap, _ in curve:                     # the loss with the best fake is the KL
            assert 0.95 * clean < gap < clean
    assert js[8] < 0.1 and js[0] > 0.2 and curve[-1][1] < curve[0][1] / 2, js


def test_figures_are_drawn(tmp_path):
    p, part = data_set("eight modes")
    record = scores(p, p, part)
    models = [("teacher", 1), ("teacher", 4), ("teacher", 50), ("IDLM", 1), ("IDLM", 2)]
    models += [(model, 1) for variants in toy.VARIANTS.values() for model in variants]
    found = {model: (p, record) for model in models}
    curve = [(20, 1.0, 0.9, 1.1), (40, 0.1, 0.1, -0.01)]
    results = {(data, name): (found, curve) for data in DATA for name in PROCESSES}
    toy.draw_figures(results, tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("toy.png", "toy_gap.png"))
