"""Duo's Gaussian link against other quadratures, closed forms and dense Gaussians.

Run: python -m pytest tests/test_gaussian.py

Statistical tests draw with fixed seeds, so they are repeatable; on other draws each law tested
would fail with odds below 1e-5 (`assert_law`) or 1e-3 (`ks`).
"""
import math

import numpy as np
import pytest
import torch

from conftest import assert_law, seeded
from gaussian import GaussianClock, alpha_of_gamma, gamma_of_alpha, random_places

f64 = {"dtype": torch.float64}


# ---- alpha(gamma) -------------------------------------------------------------------------------

def reference(K, gamma):
    """alpha and dalpha / dgamma by their definition, integrals over the winning value z of w / std:

    P = int phi(z - m) Phi(z)^(K - 1) dz,  dP / dgamma = int -m / 2 (z - m) phi(z - m) Phi^(K - 1)

    with m = exp(-gamma / 2), by 32 Gauss-Legendre nodes in each of 24 panels and math.erfc.
    """
    m = math.exp(-gamma / 2)
    nodes, weights = np.polynomial.legendre.leggauss(32)
    z = ((nodes + 1) / 2 + np.arange(-12, 12)[:, None]).flatten() + m
    weights = np.tile(weights / 2, 24)
    tail = np.array([math.erfc(abs(x) / math.sqrt(2)) / 2 for x in z])
    log_Phi = np.where(z > 0, np.log1p(-tail), np.log(np.maximum(tail, 1e-300)))
    density = weights * np.exp(-(z - m) ** 2 / 2 + (K - 1) * log_Phi) / math.sqrt(2 * math.pi)
    P = density.sum()
    slope = (-m / 2 * (z - m) * density).sum()
    return (K * P - 1) / (K - 1), K * slope / (K - 1)


@pytest.mark.parametrize("K", [2, 77, 50_257, 10 ** 6])
def test_alpha_of_gamma_and_its_slope(K):
    """Within 1e-12 of another quadrature from alpha near 1 to alpha near 0."""
    gammas = torch.linspace(-6, 16, 23, **f64)
    alpha, slope = alpha_of_gamma(gammas, K)
    for i, gamma in enumerate(gammas.tolist()):
        exact_alpha, exact_slope = reference(K, gamma)
        assert abs(alpha[i] - exact_alpha) < 1e-12
        assert abs(slope[i] - exact_slope) < 1e-12
    assert alpha[0] > 0.999 and alpha[-1] < 0.02
    assert (alpha.diff() <= 0).all()


def test_two_tokens_in_closed_form():
    """K = 2: the first of N(m, 1), N(0, 1) is larger with probability Phi(m / sqrt 2), so that
    alpha = erf(m / 2)."""
    gammas = torch.linspace(-8, 20, 57, **f64)
    alpha, _ = alpha_of_gamma(gammas, 2)
    exact = torch.erf((-gammas / 2).exp() / 2)
    assert (alpha - exact).abs().max() < 1e-12


@pytest.mark.parametrize("K", [2, 77, 50_257, 10 ** 6])
def test_slope_is_the_derivative(K):
    """Against central differences of alpha itself."""
    gammas = torch.linspace(-6, 8, 57, **f64)
    h = 1e-4
    up, _ = alpha_of_gamma(gammas + h, K)
    down, _ = alpha_of_gamma(gammas - h, K)
    _, slope = alpha_of_gamma(gammas, K)
    assert ((up - down) / (2 * h) - slope).abs().max() < 1e-7
    assert (slope <= 0).all() and slope.min() < -0.01


@pytest.mark.parametrize("K", [2, 77, 50_257, 10 ** 6])
def test_every_finite_gamma_has_its_alpha(K):
    """1 where the noise is far too weak, 0 where far too strong, with a flat slope there."""
    for size in (60.0, 1e3, 1e100, 1.7e308):
        alpha, slope = alpha_of_gamma(torch.tensor([-size, size], **f64), K)
        assert abs(alpha[0] - 1) < 1e-12 and abs(alpha[1]) < 1e-12
        assert (slope.abs() < 1e-12).all()
    alpha, _ = alpha_of_gamma(torch.linspace(-40, 60, 400, **f64), K)
    assert (alpha >= 0).all() and (alpha <= 1).all() and alpha.diff().max() < 1e-12


@pytest.mark.parametrize("gamma", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(gamma):
    with pytest.raises(ValueError, match="is not finite"):
        alpha_of_gamma(torch.tensor([0.0, gamma]), 77)


def test_gamma_of_alpha_is_the_inverse():
    for K in (2, 77, 50_257):
        alpha = torch.tensor([0.999, 0.9, 0.5, 0.01], **f64)
        back, _ = alpha_of_gamma(gamma_of_alpha(alpha, K), K)
        assert (back - alpha).abs().max() < 1e-12


# ---- the clock ----------------------------------------------------------------------------------

def test_the_published_clock():
    """K = 50,257: gamma runs linearly from -3.55 to -1.85, alpha from 0.9455 to 0.0493."""
    clock = GaussianClock(50_257)
    scale, std, alpha, dalpha = clock(torch.tensor([0.0, 0.25, 1.0], **f64))
    gamma = torch.tensor([-3.55, -3.55 + 0.25 * 1.7, -1.85], **f64)
    assert torch.allclose(scale, torch.sigmoid(-gamma).sqrt(), rtol=1e-12)
    assert torch.allclose(std, torch.sigmoid(gamma).sqrt(), rtol=1e-12)
    assert round(alpha[0].item(), 4) == 0.9455 and round(alpha[2].item(), 4) == 0.0493
    for a, slope, g in zip(alpha.tolist(), dalpha.tolist(), gamma.tolist()):
        exact, exact_slope = reference(50_257, g)
        assert abs(a - exact) < 1e-9 and abs(slope - 1.7 * exact_slope) < 1e-9


@pytest.mark.parametrize("K", [2, 77, 10 ** 6])
def test_other_vocabularies_run_between_the_same_alphas(K):
    """The ends of another K's clock are where its alpha is the published one."""
    ends = torch.tensor([0.0, 1.0], **f64)
    published = GaussianClock(50_257)(ends)[2]
    assert (GaussianClock(K)(ends)[2] - published).abs().max() < 1e-9


@pytest.mark.parametrize("K", [2, 77, 50_257])
def test_the_clock_falls_and_its_slope_is_the_derivative(K):
    """alpha and dalpha / dt over all of [0, 1]; scale^2 + std^2 = 1; the dtype is that of t."""
    clock = GaussianClock(K)
    t = torch.linspace(0.01, 0.99, 50, **f64)
    scale, std, alpha, dalpha = clock(t)
    h = 1e-5
    numeric = (clock(t + h)[2] - clock(t - h)[2]) / (2 * h)
    assert torch.allclose(dalpha, numeric, rtol=1e-6)
    assert (alpha.diff() < 0).all() and (dalpha < 0).all()
    assert torch.allclose(scale ** 2 + std ** 2, torch.ones_like(t))
    assert all(x.dtype == torch.float32 for x in clock(t.float()))


# ---- argmax(w) follows the uniform process ------------------------------------------------------

def kept_or_uniform(K, alpha, token):
    """q(x_t | token): alpha at the token and (1 - alpha) / K everywhere."""
    law = torch.full((K,), (1 - alpha) / K, **f64)
    law[token] += alpha
    return law


def dense_state(clock, t, token, n, rng):                  # -> w: (n, K)
    scale, std, _, _ = clock(torch.tensor([t], **f64))
    w = std * torch.randn(n, clock.K, generator=rng, **f64)
    w[:, token] += scale
    return w


@pytest.mark.parametrize("t", [0.3, 0.6])
def test_argmax_of_dense_gaussians_follows_q(t, rng):
    """50,000 states of 27 tokens: kept with the clock's alpha, else any token alike."""
    clock = GaussianClock(27)
    alpha = clock(torch.tensor([t], **f64))[2].item()
    w = dense_state(clock, t, token=4, n=50_000, rng=rng)
    assert_law(w.argmax(-1), kept_or_uniform(27, alpha, 4))


def ks(x, y):
    """Kolmogorov-Smirnov: the largest distance of two samples' distribution functions, in units in
    which 1.95 has p = 0.001."""
    x = x.sort().values
    y = y.sort().values
    every = torch.cat([x, y])
    F = torch.searchsorted(x, every, right=True) / len(x)
    G = torch.searchsorted(y, every, right=True) / len(y)
    return ((F - G).abs().max() * math.sqrt(len(x) * len(y) / (len(x) + len(y)))).item()


@pytest.mark.parametrize("t", [0.2, 0.8])
@pytest.mark.parametrize("tau, k", [(0.05, 4), (1.0, 6)])
def test_soft_corrupt_has_the_law_of_dense_gaussians(t, tau, k):
    """7 tokens, 30,000 states: argmax, largest weights, and which token comes second.

    With k = K - 1 nothing is left out: log weights are w / tau but for a constant, so differences
    of two coordinates are Gaussian, and the token's own is apart from them.
    """
    K, n, token = 7, 30_000, 2
    clock = GaussianClock(K)
    times = torch.tensor([t], **f64)
    scale, std, alpha, _ = clock(times)
    x_0 = torch.full((1, n), token)
    (weights, ids), z = clock.soft_corrupt(x_0, times, seeded(3), tau=tau, k=k)
    weights, ids, z = weights[0], ids[0], z[0]
    assert_law(z, kept_or_uniform(K, alpha.item(), token))
    assert torch.equal(z, ids[:, 0]) and (weights.diff(dim=-1) <= 0).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()      # k + 1 different tokens
    second = ids[:, 1][ids[:, 0] == token]
    others = torch.full((K,), 1 / (K - 1), **f64)
    others[token] = 0
    assert_law(second, others)
    dense = (dense_state(clock, t, token, n, seeded(4)) / tau).softmax(-1).sort(-1).values.flip(-1)
    for j in range(3 if k < K - 1 else K):
        assert ks(weights[:, j], dense[:, j]) < 1.95
    if k == K - 1:
        w = torch.zeros(n, K, **f64).scatter_(1, ids, tau * weights.log())
        noise = (w[:, 5] - w[:, 6]) / (std * math.sqrt(2))
        own = (w[:, token] - w[:, 0] - scale) / (std * math.sqrt(2))
        assert ks(noise, torch.randn(n, generator=seeded(5), **f64)) < 1.95
        assert ks(own, torch.randn(n, generator=seeded(6), **f64)) < 1.95
        assert abs(torch.corrcoef(torch.stack([noise, own]))[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_the_24_largest_entries_are_the_dense_softmax(t, rng):
    """50,257 tokens in float32, tau = 1e-3: softmax over the 24 largest of w and the token's own
    equals the softmax over all of w there, and what is left out is below 1e-9 of the sum."""
    w = dense_state(GaussianClock(50_257), t, token=9, n=30, rng=rng).float()
    dense = (w / 1e-3).softmax(-1)
    largest = w.clone()
    largest[:, 9] = -torch.inf
    ids = torch.cat([largest.topk(24).indices, torch.full((30, 1), 9)], -1)
    kept = (w.gather(1, ids) / 1e-3).softmax(-1)
    assert torch.allclose(kept, dense.gather(1, ids), rtol=1e-5, atol=1e-9)
    assert dense.scatter(1, ids, 0).sum(-1).max() < 1e-9


def test_soft_corrupt_leaves_given_positions(rng):
    """Where not free the state is the token itself, and the other positions' noise is the same."""
    clock = GaussianClock(77)
    x_0 = torch.randint(77, (3, 8), generator=rng)
    free = torch.rand(3, 8, generator=rng) < 0.5
    t = torch.tensor([0.2, 0.5, 1.0])
    (weights, ids), z = clock.soft_corrupt(x_0, t, seeded(1), free)
    assert torch.equal(z[~free], x_0[~free]) and torch.equal(ids[..., 0], z)
    assert (weights[~free][:, 0] == 1).all() and (weights[~free][:, 1:] == 0).all()
    assert weights.dtype == torch.float32 and weights.shape == (3, 8, 25)
    (all_weights, all_ids), all_z = clock.soft_corrupt(x_0, t, seeded(1))
    assert torch.equal(weights[free], all_weights[free]) and torch.equal(z[free], all_z[free])
    assert torch.equal(ids[free], all_ids[free]) and (all_z != x_0).any()


# ---- one noise at two times (DCD) ---------------------------------------------------------------

@pytest.mark.parametrize("K", [2, 5])
def test_shared_argmax(K):
    """The joint law of two argmaxes of one noise, exactly, and by dense Gaussians.

    A token that is still the argmax at t is so at s < t. Where it has lost at both times the winner
    is the same token, any of the others alike.
    """
    n, token = 100_000, 1
    clock = GaussianClock(K)
    t = torch.tensor([0.7])
    s = torch.tensor([0.4])
    x_0 = torch.full((1, n), token)
    z_t, z_s = clock.shared_argmax(x_0, (t, s), seeded(5))
    alpha_t, alpha_s = [clock(x.double())[2].item() for x in (t, s)]
    assert_law(z_t, kept_or_uniform(K, alpha_t, token))
    assert_law(z_s, kept_or_uniform(K, alpha_s, token))

    kept_t = kept_or_uniform(K, alpha_t, token)[token]
    kept_s = kept_or_uniform(K, alpha_s, token)[token]
    joint = torch.zeros(K, K, **f64)                       # z_t, z_s
    joint[token, token] = kept_t
    for v in range(K):
        if v != token:
            joint[v, token] = (kept_s - kept_t) / (K - 1)
            joint[v, v] = (1 - kept_s) / (K - 1)
    assert_law(z_t * K + z_s, joint.flatten())
    w_t = dense_state(clock, 0.7, token, n, seeded(6))
    w_s = dense_state(clock, 0.4, token, n, seeded(6))     # the same noise
    assert_law(w_t.argmax(-1) * K + w_s.argmax(-1), joint.flatten())


def test_shared_argmax_leaves_given_positions(rng):
    """Given tokens stay, the others' draws are the same; equal times give equal states."""
    clock = GaussianClock(5)
    x_0 = torch.randint(5, (4, 50), generator=rng)
    free = torch.rand(4, 50, generator=rng) < 0.5
    t = torch.full((4,), 0.9)
    one, two = clock.shared_argmax(x_0, (t, t), seeded(1), free)
    assert torch.equal(one, two) and torch.equal(one[~free], x_0[~free])
    everywhere, _ = clock.shared_argmax(x_0, (t, t), seeded(1))
    assert torch.equal(everywhere[free], one[free]) and (everywhere != x_0)[~free].any()


def test_random_places_are_any_in_any_order(rng):
    """3 different of 4 numbers: each of the 24 ordered choices equally often."""
    places = random_places(4, 3, (40_000,), rng)
    assert (places.sort(-1).values.diff(dim=-1) > 0).all()
    index = places[:, 0] * 16 + places[:, 1] * 4 + places[:, 2]
    law = torch.zeros(64, **f64)
    law[index.unique()] = 1 / 24
    assert_law(index, law)


def test_random_places_among_many(rng):
    """40 of 1,100 numbers, of which every second row would repeat one: all are different, and the
    first and the last place hold any number alike."""
    places = random_places(1100, 40, (30, 1000), rng)
    assert places.shape == (30, 1000, 40)
    assert (places.sort(-1).values.diff(dim=-1) > 0).all()
    for column in (0, 39):
        assert_law(places[..., column], torch.full((1100,), 1 / 1100, **f64))
