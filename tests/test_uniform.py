"""The uniform process against enumeration, quadrature and simulation: link, bound, sampler.

    python -m pytest -q tests/test_uniform.py            # about 5 s on one core

The losses are in test_uniform_losses.py. Oracles are float64 and written here from the definition
of the process (rates, Bayes' rule, sums over all texts), not from the formulas of the code.

Statistical tests draw with fixed seeds, so they are repeatable; `assert_law` states the odds of a
false alarm on another seed or on another torch (below 1e-5 for each law tested, 30 in all).
"""
import itertools
import math

import pytest
import torch

import teacher
from generator import (draw_latent, generate_probs, greedy_end, mixture_log_prob, sample,
                       uniform_step)
from idlm_loss import (hard_gap, marginal_gap, own_token, renoise_uniform, soft_state,
                       uniform_nelbo, weighing)
from model import DiT, ModelConfig
from teacher import Uniform, hard_nelbo

f64 = {"dtype": torch.float64}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- oracles ------------------------------------------------------------------------------------

def assert_law(tokens, law):
    """Pearson's chi-square of draws against a law over 0 ... n - 1, bins of fewer than 10 merged.

    (chi2 / df)^(1/3) is close to normal (Wilson and Hilferty: mean 1 - 2/(9 df), variance
    2/(9 df)); the alarm at 4.5 standard deviations has odds below 1e-5 for any df.
    """
    counts = torch.bincount(tokens.flatten(), minlength=len(law)).double()
    expected = law.double() * counts.sum()
    assert abs(law.sum() - 1) < 1e-9 and counts[expected == 0].sum() == 0
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 10:
        counts, expected = counts[:-1], expected[:-1]
    df = len(expected) - 1
    assert df >= 1, "nothing to test"
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    score = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    assert score < 4.5, f"chi2 {chi2:.1f} at {df} degrees of freedom"


def gauss_legendre(n):
    """Nodes and weights on [0, 1], by Newton's method on the Legendre polynomial."""
    x = torch.cos(math.pi * (torch.arange(n, **f64) + 0.75) / (n + 0.5))
    for _ in range(20):
        p, before = x, torch.ones_like(x)
        for k in range(2, n + 1):
            p, before = ((2 * k - 1) * x * p - (k - 1) * before) / k, p
        slope = n * (x * p - before) / (x * x - 1)
        x = x - p / slope
    return (x + 1) / 2, 1 / ((1 - x * x) * slope ** 2)


def all_texts(K, L):
    return torch.tensor(list(itertools.product(range(K), repeat=L)))               # (K^L, L)


def kernel(K, a):
    """q(z | x) of one token, (K, K)."""
    return a * torch.eye(K, **f64) + (1 - a) / K


def noise_matrix(K, L, a):
    """q(z | x) of whole texts, (K^L, K^L)."""
    Q = kernel(K, a)
    out = torch.ones(1, 1, **f64)
    for _ in range(L):
        out = torch.kron(out, Q)
    return out


def leave_one_out(p, K, L, a):
    """p(x_l | z without position l) for every noised text z: (K^L, L, K)."""
    texts, Q = all_texts(K, L), kernel(K, a)
    per_token = Q[texts[:, None], texts[None]]                                     # x, z, l
    out = torch.zeros(len(texts), L, K, **f64)
    for l in range(L):
        others = per_token[..., [m for m in range(L) if m != l]].prod(-1)           # x, z
        for v in range(K):
            here = texts[:, l] == v
            out[:, l, v] = (p[here, None] * others[here]).sum(0)
    return out / out.sum(-1, keepdim=True)


def rate_nelbo(f, x, z, a, dalpha):
    """The bound from the rates of the process, f and x (..., K), z (...), a and dalpha (..., 1).

    Forward, each token jumps to each of the K at rate -dalpha / (alpha K). Reversed, z turns into v
    at that rate times q(v) / q(z). The bound is the divergence of the two Poisson processes:
    sum over v of rate * [s - r + r log(r / s)], r the true ratio and s the network's.
    """
    K, index = f.shape[-1], z[..., None]
    law_f, law_x = (a * row + (1 - a) / K for row in (f, x))
    s, r = law_f / law_f.gather(-1, index), law_x / law_x.gather(-1, index)
    return -dalpha[..., 0] / (K * a[..., 0]) * (s - r + r * (r / s).log()).sum(-1)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def random_law(n, seed, sharp=1.0):
    rng = seeded(seed)
    return (sharp * torch.randn(n, generator=rng, **f64)).softmax(-1)


def random_rows(*shape, seed, sharp=1.0):
    rng = seeded(seed)
    return (sharp * torch.randn(*shape, generator=rng, **f64)).softmax(-1)


def random_dit(K, seed, std=0.4):
    """A small float64 network without the zero initialisation that would flatten its output."""
    net = DiT(ModelConfig(vocab_size=K, num_layers=1, num_heads=2, width=8, cond_dim=8)).double()
    rng = seeded(seed)
    for parameter in net.parameters():
        parameter.data.normal_(std=std, generator=rng)
    return net


def column(value, n=1):
    return torch.full((n, 1), float(value), **f64)


# ---- the Gaussian link --------------------------------------------------------------------------

def link_reference(K, gamma):
    """alpha and dalpha / dgamma by Gauss-Legendre in 24 panels, Phi from math.erfc."""
    m = math.exp(-gamma / 2)
    nodes, weights = gauss_legendre(32)
    z = (nodes + torch.arange(-12, 12, **f64)[:, None]).flatten() + m   # m - 12 ... m + 12
    weights = weights.repeat(24)
    tail = torch.tensor([math.erfc(abs(x) / math.sqrt(2)) / 2 for x in z.tolist()], **f64)
    log_Phi = torch.where(z > 0, torch.log1p(-tail), tail.clamp(min=1e-300).log())
    density = weights * (-(z - m) ** 2 / 2 + (K - 1) * log_Phi).exp() / math.sqrt(2 * math.pi)
    P, dP = density.sum(), (-m / 2 * (z - m) * density).sum()
    return (K * P.item() - 1) / (K - 1), K * dP.item() / (K - 1)


@pytest.mark.parametrize("K", [2, 27, 83, 4096, 50257])
def test_alpha_of_gamma_and_its_slope(K):
    process = Uniform(K)
    gammas = torch.linspace(-5.9, 8, 15, **f64)
    alpha, slope = process.alpha_of_gamma(gammas)
    for gamma, a, d in zip(gammas.tolist(), alpha.tolist(), slope.tolist()):
        a_ref, d_ref = link_reference(K, gamma)
        assert abs(a - a_ref) < 1e-9 and abs(d - d_ref) < 1e-9
        if K == 2:                                          # P(N(m, 1) > N(0, 1)) in closed form
            assert abs(a - math.erf(math.exp(-gamma / 2) / 2)) < 1e-9

    # Over the clock: falling, both ends hit, and the slope in t is the derivative in t.
    t = torch.linspace(0, 1, 201, **f64)
    scale, std, alpha, dalpha = process.gaussian(t)
    assert (alpha.diff() < 0).all() and (dalpha < 0).all()
    assert abs(alpha[0] - 0.999) < 1e-9 and abs(alpha[-1] - 1e-3) < 1e-9
    assert torch.allclose(scale ** 2 + std ** 2, torch.ones_like(t), atol=1e-14)
    gamma = process.gamma_min + (process.gamma_max - process.gamma_min) * t
    assert torch.allclose((scale / std).log(), -gamma / 2, atol=1e-12)
    h, middle = 1e-5, t[5:-5]
    numeric = (process.gaussian(middle + h)[2] - process.gaussian(middle - h)[2]) / (2 * h)
    assert torch.allclose(dalpha[5:-5], numeric, rtol=1e-6, atol=1e-9)


def test_published_gammas():
    """Duo's limits for K = 50257 are -3.55 ... -1.85, alpha 0.946 ... 0.049 (rounded figures); the
    same alphas sit near -2.89 and 0.54 for K = 83 (by this quadrature -2.874 and 0.567)."""
    for K, gammas, tolerance in ((50257, (-3.55, -1.85), 0.005), (83, (-2.89, 0.54), 0.03)):
        process = Uniform(K, alpha_max=0.946, alpha_min=0.049)
        assert abs(process.gamma_min - gammas[0]) < tolerance
        assert abs(process.gamma_max - gammas[1]) < tolerance


def test_link_by_simulation():
    """argmax(scale * one_hot + std * xi) has the law q(. | x_0) at `gaussian`'s alpha, K = 27."""
    process, rng = Uniform(27), seeded(1)
    for t in (0.3, 0.6):
        scale, std, alpha, _ = process.gaussian(torch.tensor([t], **f64))
        w = std * torch.randn(100_000, 27, generator=rng, **f64)
        w[:, 4] += scale
        assert_law(w.argmax(-1), kernel(27, alpha.item())[4])


def ks(x, y):
    """Largest distance of two empirical distribution functions, in units where 1.95 has p = 0.001."""
    x, y, every = x.sort().values, y.sort().values, torch.cat([x, y])
    F, G = (torch.searchsorted(v, every, right=True) / len(v) for v in (x, y))
    return ((F - G).abs().max() * math.sqrt(len(x) * len(y) / (len(x) + len(y)))).item()


@pytest.mark.parametrize("tau, k", [(5e-3, 4), (1.0, 6)])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_soft_corrupt(t, tau, k):
    """softmax(w / tau), w = scale x_0 + std xi: its argmax follows q, and its largest entries, the
    differences of two noise coordinates and the places have the law of the dense computation."""
    K, n, token = 7, 40_000, 2
    process, times = Uniform(K), torch.tensor([t], **f64)
    scale, std, alpha, _ = process.gaussian(times)
    (weights, ids), z = process.soft_corrupt(torch.full((1, n), token), times, seeded(3), tau, k=k)
    weights, ids = weights[0], ids[0]
    assert_law(z[0], kernel(K, alpha.item())[token])
    assert torch.equal(z[0], ids[:, 0]) and (ids.sort(1).values.diff(dim=1) > 0).all()
    w = std * torch.randn(n, K, generator=seeded(4), **f64)
    w[:, token] += scale
    top = (w / tau).softmax(-1).sort(-1, descending=True).values
    for j in range(3 if tau < 0.1 else K):                 # beyond: float32 has nothing but 0
        assert ks(weights[:, j], top[:, j]) < 1.95
    second = ids[:, 1][ids[:, 0] == token]                 # which noise is the largest: any
    assert_law(second, torch.full((K,), 1 / (K - 1), **f64).index_fill(0, torch.tensor(token), 0))
    if tau == 1.0:                                         # nothing is left out: all of w but a sum
        assert ids.shape[1] == K
        w = torch.zeros(n, K, **f64).scatter_(1, ids, weights.log())
        noise = (w[:, 5] - w[:, 6]) / (std * math.sqrt(2))
        assert ks(noise, torch.randn(n, generator=seeded(5), **f64)) < 1.95
        own = (w[:, token] - w[:, 0] - scale) / (std * math.sqrt(2))
        assert ks(own, torch.randn(n, generator=seeded(6), **f64)) < 1.95
        assert abs(torch.corrcoef(torch.stack([noise, own]))[0, 1]) < 4 / math.sqrt(n)


def test_soft_corrupt_takes_more_entries_where_ties_demand():
    """All 49 noise coordinates lie within 25 tau of the largest: none may be left out."""
    x_0, t = torch.zeros(1, 3, dtype=torch.long), torch.tensor([0.9], **f64)
    (weights, ids), _ = Uniform(50).soft_corrupt(x_0, t, seeded(7), tau=1.0)
    assert ids.shape[-1] == 50 and (ids.sort(-1).values[0] == torch.arange(50)).all()
    assert Uniform(50).soft_corrupt(x_0, t, seeded(7), tau=1e-6)[0][0].shape[-1] == 17


@pytest.mark.parametrize("K", [2, 5])
def test_shared_argmax(K):
    """Both states are q at the Gaussian clock's alpha, and their joint law is that of one noise."""
    process, n = Uniform(K), 200_000
    t, s = torch.tensor([0.7]), torch.tensor([0.4])
    x_0 = torch.full((1, n), 1)
    z_t, z_s = process.shared_argmax(x_0, (t, s), seeded(5))
    for time, z in ((t, z_t), (s, z_s)):
        alpha = process.gaussian(time.double())[2].item()
        assert_law(z, kernel(K, alpha)[1])

    # The exact joint law: with one noise a token that is still the argmax at t is so at s < t, and
    # where it has lost at both times the winner is the same word, any of the others alike.
    stay_t, stay_s = (((K - 1) * process.gaussian(x.double())[2].item() + 1) / K for x in (t, s))
    assert stay_t < stay_s
    joint = torch.zeros(K, K, **f64)                           # z_t, z_s
    joint[1, 1] = stay_t
    for v in range(K):
        if v != 1:
            joint[v, 1] = (stay_s - stay_t) / (K - 1)
            joint[v, v] = (1 - stay_s) / (K - 1)
    assert_law(z_t * K + z_s, joint.flatten())

    # And by dense simulation with one xi for both times.
    xi = torch.randn(n, K, generator=seeded(6), **f64)
    states = []
    for time in (t, s):
        scale, std = (value.item() for value in process.gaussian(time.double())[:2])
        w = std * xi
        w[:, 1] += scale
        states.append(w.argmax(-1))
    assert_law(states[0] * K + states[1], joint.flatten())
    same = process.shared_argmax(x_0, (t, t), seeded(7))
    assert torch.equal(*same)


# ---- corruption, posterior, bound ---------------------------------------------------------------

def test_corrupt_and_prior():
    """Each token is kept with alpha_t, per text, else uniform over all K, itself included."""
    K, process = 5, Uniform(5)
    x_0 = torch.full((2, 100_000), 3)
    t = torch.tensor([0.25, 0.9])
    x_t = process.corrupt(x_0, t, seeded(8))
    for row, time in zip(x_t, t.tolist()):
        assert_law(row, kernel(K, 1 - 0.999 * time)[3])
    assert_law(process.prior(4, 20_000, seeded(9)), torch.full((K,), 1 / K))
    assert torch.allclose(process.sigma(t), -(1 - 0.999 * t).log())


@pytest.mark.parametrize("K", [2, 5])
def test_posterior_is_bayes_rule(K):
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0), by enumeration; for a row f, the form that the
    same formula takes when x_0 is a simplex row: q(x_s | f) in place of q(x_s | x_0)."""
    process = Uniform(K)
    rows = torch.cat([torch.eye(K, **f64), random_rows(4, K, seed=10)])
    for alpha_t, alpha_s in ((0.3, 0.8), (1e-3, 0.2), (0.6, 1.0), (0.5, 0.500001)):
        Q_ts = kernel(K, alpha_t / alpha_s)
        for z in range(K):
            x_t = torch.full((len(rows),), z)
            found = process.posterior(rows, x_t, alpha_t, alpha_s)
            bayes = (rows @ kernel(K, alpha_s)) * Q_ts[:, z]
            assert torch.allclose(found.sum(-1), torch.ones(len(rows), **f64), atol=1e-12)
            assert torch.allclose(found, bayes / bayes.sum(-1, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("t", [1e-3, 0.4, 1.0])
def test_nelbo_forms(t):
    """Simplex form = divergence of the rates; hard form = simplex form on one-hot rows; 0 at the
    true rows and positive elsewhere."""
    K, N = 7, 50
    process, times = Uniform(K), torch.tensor([t], **f64)
    a, dalpha = (column(value.item(), N) for value in process.alpha(times))
    f, x = random_rows(N, K, seed=11, sharp=2), random_rows(N, K, seed=12, sharp=2)
    rng = seeded(13)
    z, token = (torch.randint(K, (N,), generator=rng) for _ in range(2))
    z[::3] = token[::3]
    one_hot = torch.nn.functional.one_hot(token, K).double()
    for target in (x, one_hot):
        truth = rate_nelbo(f, target, z, a, dalpha)
        assert (truth > 0).all()
        found = process.nelbo(f.log()[None], target[None], z[None], times)[0]
        assert torch.allclose(found, truth, rtol=1e-9)
    assert torch.allclose(hard_nelbo(f.log() + 3, token, z, a, dalpha), truth, rtol=1e-9)
    assert torch.allclose(uniform_nelbo(f.log() + 3, x.log() - 1, z, a, dalpha),
                          rate_nelbo(f, x, z, a, dalpha), rtol=1e-9)
    # 0 at the true rows, up to rounding: sums of K terms of at most K / (1 - a) cancel there.
    zero = process.nelbo(x.log()[None], x[None], z[None], times)
    assert zero.abs().max() < 1e-10
    certain = 100 * one_hot
    assert hard_nelbo(certain, token, z, a, dalpha).abs().max() < 1e-9


def bound_terms(p, f_of, K, L, n=80):
    """For each text x_0: the integral of the NELBO over t in [0, 1], f_of(a) -> rows (K^L, L, K).

    t = u^4: the integrand has terms in t log t. Returns (K^L,) nats per text.
    """
    process, texts = Uniform(K), all_texts(K, L)
    total = torch.zeros(len(texts), **f64)
    for u, weight in zip(*gauss_legendre(n)):
        alpha, slope = (value.item() for value in process.alpha(u[None] ** 4))
        f, Q = f_of(alpha).log(), noise_matrix(K, L, alpha)
        for i, x_0 in enumerate(texts):                                # rows: (z, l)
            loss = hard_nelbo(f.flatten(0, 1), x_0.repeat(len(texts)), texts.flatten(),
                              column(alpha, f.shape[0] * L), column(slope, f.shape[0] * L))
            total[i] += 4 * u ** 3 * weight * (Q[i] * loss.view(-1, L).sum(-1)).sum()
    return total


@pytest.mark.parametrize("L", [1, 2])
def test_bound_is_exact_for_the_leave_one_out_denoiser(L):
    """-log p(x_0) = integral of the NELBO over [0, 1] + KL(q(x_1 | x_0) || p_1), for every text.

    p_1 is the noised data at t = 1 (the end term; a sampler that starts from the flat law in its
    place pays KL(p_1 || flat) more on average); alpha_0 = 1, so there is no term at the clean end.
    """
    K = 3
    p = random_law(K ** L, seed=14)
    bound = bound_terms(p, lambda a: leave_one_out(p, K, L, a), K, L)
    Q_1 = noise_matrix(K, L, 1e-3)
    assert torch.allclose(bound + kl(Q_1, p @ Q_1), -p.log(), atol=1e-8)


def test_bound_holds_for_any_denoiser():
    """-log p_f(x_0) < integral of the NELBO + KL(q(x_1 | x_0) || flat), p_f the law that the
    reverse process of a wrong f writes from the flat law: its jump rates, integrated in 800 steps.
    With the leave-one-out f of p and the start p_1 the same integration returns p."""
    K, L, N = 3, 2, 800
    p, process, texts = random_law(9, seed=15), Uniform(K), all_texts(K, L)
    wrong = random_rows(9, L, K, seed=16)

    # Texts that differ at position l only: there the jump z -> y is a change of that token.
    differ = texts[:, None] != texts[None]                             # z, y, l
    single = differ & (differ.sum(-1, keepdim=True) == 1)

    def written(f_of, law):
        for i in range(N):
            t = torch.tensor([1 - (i + 0.5) / N], **f64)
            alpha, slope = (value.item() for value in process.alpha(t))
            fbar = alpha * f_of(alpha) + (1 - alpha) / K               # z, l, v
            s = fbar / fbar.gather(-1, texts[..., None])
            to = s[:, torch.arange(L), texts]                       # s at y's token: z, y, l
            rates = -slope / (alpha * K) * (single * to).sum(-1)
            law = law @ torch.linalg.matrix_exp((rates - rates.sum(1).diag()) / N)
        return law

    flat = torch.full((9,), 1 / 9, **f64)
    Q_1 = noise_matrix(K, L, 1e-3)
    bound = bound_terms(p, lambda a: wrong, K, L) + kl(Q_1, flat)
    slack = bound + written(lambda a: wrong, flat).log()
    assert (slack > 1e-3).all()
    exact = written(lambda a: leave_one_out(p, K, L, a), p @ Q_1)
    assert (exact / p - 1).abs().max() < 1e-4


def test_minimiser_is_leave_one_out():
    """The expected NELBO is stationary in f at p(x_l | z without l), not at E[x_0 | z], and smaller
    there: for tokens of p by `hard_nelbo`, and for a mixture's soft rows by `uniform_nelbo`."""
    K, L, alpha, slope = 3, 2, 0.4, -0.999
    texts = all_texts(K, L)
    share, G = random_law(4, seed=17), random_rows(4, L, K, seed=18, sharp=2)     # a mixture
    component = G[:, 0, :, None] * G[:, 1, None, :]
    p = (share[:, None, None] * component).sum(0).flatten()
    Q = noise_matrix(K, L, alpha)

    def expected(f, soft):                                             # logits (9, L, K)
        rows, a, d = f.flatten(0, 1), column(alpha, 9 * L), column(slope, 9 * L)
        total = 0
        for i in range(4 if soft else 9):
            if soft:
                law = share[i] * (component[i].flatten() @ Q)
                loss = uniform_nelbo(rows, G[i].log().repeat(9, 1), texts.flatten(), a, d)
            else:
                law = p[i] * Q[i]
                loss = hard_nelbo(rows, texts[i].repeat(9), texts.flatten(), a, d)
            total = total + (law * loss.view(9, L).sum(-1)).sum()
        return total

    loo = leave_one_out(p, K, L, alpha)
    full = torch.stack([(p[:, None] * Q)[texts[:, l] == v].sum(0) / (p @ Q)
                        for l in range(L) for v in range(K)], -1).view(9, L, K)
    for soft in (False, True):
        values, slopes = [], []
        for f in (loo, full):
            logits = f.log().requires_grad_()
            values.append(expected(logits, soft))
            slopes.append(torch.autograd.grad(values[-1], logits)[0].abs().max())
        assert slopes[0] < 1e-12 < 1e-3 < slopes[1] and values[0] < values[1] - 1e-3


# ---- the theorem --------------------------------------------------------------------------------

def exact_gap(share, G, p_star, how, n=60):
    """Integral over t in [0, 1] of the expected gap, summed over tokens: both networks the exact
    leave-one-out posteriors, every component, noised text and position enumerated."""
    M, L, K = G.shape
    process, texts = Uniform(K), all_texts(K, L)
    p = mixture(share, G)
    total = 0.0
    for u, weight in zip(*gauss_legendre(n)):               # t = u^2 for a nearly one-hot G
        alpha, slope = (value.item() for value in process.alpha(u[None] ** 2))
        f, f_star = (leave_one_out(law, K, L, alpha).log() for law in (p, p_star))
        size = M * len(texts) * L
        rows = [rows.expand(M, len(texts), L, K).reshape(-1, K)
                for rows in (G[:, None].log(), f[None], f_star[None])]
        z = texts.expand(M, -1, -1)
        gap = how(*rows, z.flatten(), column(alpha, size), column(slope, size)).view(z.shape)
        z_law = (alpha * G[:, None].expand(-1, len(texts), -1, -1).gather(-1, z[..., None])[..., 0]
                 + (1 - alpha) / K).prod(-1)
        total += 2 * u * weight * (share[:, None] * z_law * gap.sum(-1)).sum()
    return total.item()


def mixture(share, G):
    texts = all_texts(G.shape[2], G.shape[1])
    positions = torch.arange(G.shape[1])
    return (share[:, None] * G[:, positions, texts].prod(-1)).sum(0)


@pytest.mark.parametrize("how", [hard_gap, marginal_gap])
@pytest.mark.parametrize("L", [1, 2, 3])
def test_theorem(L, how):
    """gap = KL(p_theta || p*) - KL of the two laws noised to t = 1, for 1, 2 and 3 tokens of 3
    words and a mixture of 4 products; it is 0 where p* = p_theta."""
    K = 3
    share, G = random_law(4, seed=19), random_rows(4, L, K, seed=20, sharp=1.5)
    p, p_star = mixture(share, G), random_law(K ** L, seed=21)
    Q_1 = noise_matrix(K, L, 1e-3)
    end = kl(p @ Q_1, p_star @ Q_1)
    assert end > 0 and kl(p, p_star) > 1e-3
    assert abs(exact_gap(share, G, p_star, how) - (kl(p, p_star) - end)) < 1e-10
    assert abs(exact_gap(share, G, p, how)) < 1e-12


@pytest.mark.parametrize("beta", [0.9, 1.3])
def test_beta_counts_the_bound_of_the_fake(beta):
    """marginal_gap = E[NELBO(f*) - beta NELBO(f)] over words y ~ G and z ~ q(. | y), each bound with
    all its terms, also where rows are longer than the vocabulary; beta (N, 1) as well as a number."""
    K, N = 6, 5
    logits = [random_rows(N, K, seed=seed, sharp=2).log() for seed in (22, 23, 24)]
    G = logits[0].softmax(-1)
    for alpha in (0.999, 0.5, 1e-3):
        a, dalpha = column(alpha, N), column(-0.999, N)
        truth = torch.zeros(N, **f64)
        for y, z in itertools.product(range(K), range(K)):
            chance = G[:, y] * (alpha * (y == z) + (1 - alpha) / K)
            y, z = torch.full((N,), y), torch.full((N,), z)
            bound = [hard_nelbo(f, y, z, a, dalpha) for f in logits[1:]]
            truth += chance * (bound[1] - beta * bound[0])
        found = marginal_gap(*logits, None, a, dalpha, beta)
        assert torch.allclose(found, truth, rtol=1e-10, atol=1e-10)
        assert torch.allclose(found, marginal_gap(*logits, None, a, dalpha, column(beta, N)))
        wide = [torch.cat([x, torch.full((N, 3), -1e4, **f64)], 1) for x in logits]
        assert torch.allclose(marginal_gap(*wide, None, a, dalpha, beta, K), truth, rtol=1e-10,
                              atol=1e-10)


def test_marginal_is_the_expectation_of_hard():
    """For rows f, f* that do not move with the own token z: marginal_gap = E[hard_gap] over
    z ~ xbar / K, in value; and its gradient is the gradient of that expectation, which is `hard`'s
    expected gradient plus what the draw's dependence on G adds (and `hard` drops)."""
    K, N = 6, 5
    rows = [random_rows(N, K, seed=seed, sharp=2).log() for seed in (22, 23, 24)]
    for alpha in (0.999, 0.5, 1e-3):
        a, dalpha = column(alpha, N), column(-0.999, N)
        logits = rows[0].clone().requires_grad_()
        z_law = alpha * logits.softmax(-1) + (1 - alpha) / K                       # (N, K)
        each = torch.stack([hard_gap(logits, *rows[1:], torch.full((N,), z), a, dalpha)
                            for z in range(K)], -1)
        expectation = (z_law * each).sum()
        value = marginal_gap(logits, *rows[1:], torch.zeros(N, dtype=torch.long), a, dalpha)
        assert torch.allclose(value.sum(), expectation, rtol=0, atol=1e-10)
        assert torch.allclose(value, (z_law * each).sum(-1), rtol=0, atol=1e-10)
        found, = torch.autograd.grad(value.sum(), logits)
        whole, = torch.autograd.grad(expectation, logits, retain_graph=True)
        hards, = torch.autograd.grad((z_law.detach() * each).sum(), logits, retain_graph=True)
        draws, = torch.autograd.grad((z_law * each.detach()).sum(), logits)
        assert torch.allclose(found, whole, rtol=0, atol=1e-10)
        assert torch.allclose(found, hards + draws, rtol=0, atol=1e-10)
        if alpha == 0.5:
            assert draws.norm() > 0.1 * hards.norm()       # what is dropped is not nothing


# ---- the law of the re-noised generator ---------------------------------------------------------

class Fixed:
    """A network that gives the logits it is made of, (B, L, K): as trunk and as projection."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, *eps):
        return self.logits

    def project(self, h):
        return h


@pytest.mark.parametrize("weigh", [False, True])
def test_hard_renoising_has_the_law_of_G(weigh):
    """z ~ alpha G + (1 - alpha) / K, each text at its own level; G is the network's row f or, with
    the token 1 weighed in that every row stands on, f_u q(1 | u), normalised."""
    K, n = 5, 100_000
    process, rng = Uniform(K), seeded(25)
    G = torch.tensor([[.5, .5, 0, 0, 0], [.1, .2, .3, .15, .25]], **f64)
    t, t_tilde = torch.tensor([0.1, 0.6]), torch.tensor([0.8, 0.5], **f64)
    logits = G.log()[:, None].expand(2, n, K)
    eps = torch.ones(2, n, dtype=torch.int64), process.sigma(t_tilde)
    own = own_token(eps, K, torch.device("cpu")) if weigh else ()
    z = renoise_uniform(Fixed(logits), logits, own, *process.draw_noise(t, n, rng), K, rng)
    for row, g, time, time_tilde in zip(z, G, t.tolist(), t_tilde.tolist()):
        g = g * kernel(K, 1 - 0.999 * time_tilde)[:, 1] if weigh else g
        assert_law(row, g / g.sum() @ kernel(K, 1 - 0.999 * time))


def test_weighed_rows_of_a_network():
    """generate_probs, weigh: softmax(logits) times q(x_tilde | u), normalised."""
    K, process, net = 5, Uniform(5), random_dit(5, seed=31)
    t_tilde = torch.tensor([0.3, 1.0], **f64)
    eps = draw_latent(net, process, process.prior(2, 4, seeded(32)), t_tilde, seeded(33))
    a = process.alpha(t_tilde)[0][:, None, None]
    here = torch.arange(K) == eps.x[..., None]
    G = net(*eps).softmax(-1) * (a * here + (1 - a) / K)
    found = generate_probs(net, process, eps, weigh=True)
    assert torch.allclose(found, G / G.sum(-1, keepdim=True), atol=1e-12)
    assert (found[0] - generate_probs(net, process, eps)[0]).abs().max() > 0.1


@pytest.mark.parametrize("L", [1, 2])
def test_G_starts_as_the_posterior(L):
    """If the network's row is the law of token l given the other noised tokens, G's row is the law
    given all of them, by enumeration of all texts; and the sampler's step, Uniform.posterior of the
    network's row, is the mean over u ~ G of the step for the clean token u."""
    K, t_tilde = 3, 0.6
    process, p = Uniform(K), torch.rand(K ** L, generator=seeded(3), **f64)
    a, a_s = process.alpha(torch.tensor([t_tilde, 0.2], **f64))[0]
    texts = torch.tensor([*itertools.product(range(K), repeat=L)])           # (K^L, L)
    Q = kernel(K, a.item())                                                  # q(v | u)
    for x in texts:                                                          # the noised text
        chance = Q[texts, x]                                                 # (K^L, L)
        for l in range(L):
            others = p * chance[:, torch.arange(L) != l].prod(1)
            f = torch.stack([others[texts[:, l] == u].sum() for u in range(K)])
            law = f * Q[:, x[l]] / (f * Q[:, x[l]]).sum()
            own = own_token((x[None, l:l + 1], -a.log()[None]), K, torch.device("cpu"))
            G = weighing(lambda logits: logits.softmax(-1))(f.log()[None], *own)[0]
            assert torch.allclose(G, law, atol=1e-12)
            step = process.posterior((f / f.sum())[None], x[l:l + 1], a, a_s)[0]
            each = process.posterior(torch.eye(K, **f64), x[l].expand(K), a, a_s)
            assert torch.allclose(step, G @ each, atol=1e-12)


def test_gaussian_state_of_a_soft_row_does_not():
    """The published state w = scale G + std xi, K = 50257, gamma = -3.55 (alpha 0.946).

    G = (.5, .5): argmax(w) should be each of the two with probability alpha / 2 = 0.473; it is
    with 0.101, by quadrature and in soft_state. (.9, .1): the second gets 0.0946 under q, and under
    w less than 1 in 10,000. One-hot G does follow q. The quadrature is over the winner's value:
    int phi(z - m G_v) prod_u Phi(z - m G_u) dz. Simulation: 400 rows, 6 standard deviations.
    """
    K, gamma = 50257, -3.55
    m = math.exp(-gamma / 2)
    z = torch.linspace(-10, 20, 30_001, **f64)

    def wins(*G):                                    # argmax at the first of G; the rest are 0
        log_Phi = sum(torch.special.log_ndtr(z - m * g) for g in G[1:])
        log_Phi = log_Phi + (K - len(G)) * torch.special.log_ndtr(z)
        phi = (-(z - m * G[0]) ** 2 / 2).exp() / math.sqrt(2 * math.pi)
        return (phi * log_Phi.exp()).sum().item() * 1e-3

    alpha = Uniform(K).alpha_of_gamma(torch.tensor([gamma]))[0].item()
    assert abs(alpha - 0.946) < 1e-3 and abs(wins(1.0) - (alpha + (1 - alpha) / K)) < 1e-6
    half, law_half = wins(.5, .5), alpha / 2 + (1 - alpha) / K
    assert abs(half - 0.101) < 1e-3 and abs(law_half - 0.473) < 1e-3
    assert wins(.1, .9) < 1e-4 and abs(alpha * .1 - 0.0946) < 1e-3

    n, G = 400, torch.full((K,), -torch.inf)
    G[3] = G[9] = 0.0
    level = torch.tensor([gamma])
    state = Fixed(G.expand(1, n, K))
    _, tokens = soft_state(state, state.logits, torch.sigmoid(-level).sqrt(),
                           torch.sigmoid(level).sqrt(), K, 1e-3, seeded(26))
    for v in (3, 9):
        share = (tokens == v).double().mean().item()
        assert abs(share - half) < 6 * math.sqrt(half * (1 - half) / n) < law_half - half


# ---- the sampler --------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha_t, alpha_s", [(0.3, 0.8), (1e-3, 0.334), (0.6, 1.0)])
def test_uniform_step_is_the_posterior(alpha_t, alpha_s):
    """Both uniforms on a lattice of 500 x 500 midpoints: shares of a rectangle's area are right to
    a few lines of the lattice, 1 / 500 each."""
    K, n = 4, 500
    line = (torch.arange(n, **f64) + 0.5) / n
    u_kind, u_word = (u.flatten() for u in torch.meshgrid(line, line, indexing="ij"))
    logits = torch.tensor([0.3, -1.0, 1.4, -torch.inf], **f64)       # a word cut by top_p
    for z in range(K):
        x_t = torch.full((n * n,), z)
        x_s = uniform_step(logits.expand(n * n, K), x_t, u_kind, u_word, alpha_t, alpha_s)
        found = torch.bincount(x_s, minlength=K).double() / n ** 2
        truth = Uniform(K).posterior(logits.softmax(-1)[None], x_t[:1], alpha_t, alpha_s)[0]
        assert (found - truth).abs().max() < 4 / n


def test_greedy_end():
    """argmax_v f_v q(z | v) by enumeration against the published argmax f; they do differ."""
    K, alpha = 6, 0.2
    f = random_rows(400, K, seed=27)
    z = torch.arange(400) % K
    weighed = (f * kernel(K, alpha)[:, z].T).argmax(-1)
    assert torch.equal(greedy_end(f.log(), z, alpha), weighed)
    assert torch.equal(greedy_end(f.log(), z, alpha, published=True), f.argmax(-1))
    assert (weighed != f.argmax(-1)).any() and (weighed != z).any()


class TableNet:
    """Logits looked up by the whole text, moving with sigma; counts its passes."""
    device, training = torch.device("cpu"), True

    class config:
        latent_dim = latent_words = 0

    def __init__(self, K, L, seed):
        rng = seeded(seed)
        self.K, self.passes = K, 0
        self.base, self.slope = (torch.randn(K ** L, L, K, generator=rng, **f64)
                                 for _ in range(2))

    def rows(self, sigma):                                              # (K^L, L, K)
        return self.base + sigma / 4 * self.slope

    def hidden(self, x, sigma):
        self.passes += 1
        index = (x * self.K ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)
        return self.base[index] + sigma[:, None, None] / 4 * self.slope[index]

    def project(self, h):
        return h

    def eval(self):
        return self.train(False)

    def train(self, mode=True):
        self.training = mode
        return self


@pytest.mark.parametrize("ending, steps, schedule", [
    *itertools.product(["ancestral", "greedy", "greedy-published"], [1, 2, 3, 6], ["linear"]),
    ("greedy", 3, "cosine")])
def test_exact_law_of_samples(ending, steps, schedule):
    """3 words, 2 tokens: the law over the 9 texts by multiplying the steps' exact transitions
    (Bayes' rule with f for x_0, tokens independent) against 100,000 samples."""
    K, L = 3, 2
    net, process, texts = TableNet(K, L, seed=28), Uniform(K), all_texts(K, L)
    time = {"linear": lambda x: 1 - x, "cosine": lambda x: math.cos(math.pi / 2 * x)}[schedule]
    law = torch.full((9,), 1 / 9, **f64)
    for i in range(steps):
        alpha_t, alpha_s = (1 - 0.999 * time(j / steps) for j in (i, i + 1))
        f = net.rows(-math.log(alpha_t)).softmax(-1)                    # z, l, v
        weigh = kernel(K, alpha_t)[texts]                               # q(z_l | v)
        if i == steps - 1 and ending != "ancestral":
            best = (f * weigh if ending == "greedy" else f).argmax(-1)
            rows = torch.nn.functional.one_hot(best, K).double()
        else:
            rows = (f @ kernel(K, alpha_s)) * kernel(K, alpha_t / alpha_s)[texts]
            rows = rows / rows.sum(-1, keepdim=True)
        law = law @ (rows[:, 0, :, None] * rows[:, 1, None, :]).flatten(1)
    out = sample(net, process, 100_000, L, steps, seeded(29), ending=ending, schedule=schedule)
    assert_law(out.tokens[:, 0] * K + out.tokens[:, 1], law)
    assert net.passes == steps and out.nfe.max() == steps and out.nfe.min() >= 1 and net.training
    assert (out.nfe < steps).any() == (steps > 2)          # the first and the last step take all
    with pytest.raises(ValueError, match="ending"):
        sample(net, process, 1, L, 1, torch.Generator(), ending="gready")


def test_who_stays_whatever_f_is_needs_no_head():
    """At 100 steps the head runs at a tenth of all positions: on paper the sum of the steps' bounds
    is about 2 log(1 / alpha(1)) = 14 passes' worth."""
    K, L, n, steps, rows = 3, 2, 2000, 100, []
    net = TableNet(K, L, seed=28)
    net.project = lambda h: rows.append(len(h)) or h
    nfe = sample(net, Uniform(K), n, L, steps, seeded(29)).nfe.double()
    assert 0.05 < sum(rows) / (n * L * steps) < 0.15
    assert sum(rows) / (n * L) < nfe.mean() < sum(rows) / n and net.passes == steps


def test_exact_teacher_samples_the_data():
    """With the leave-one-out posterior in the network's place the ancestral steps write p, up to
    the price of drawing tokens independently within a step; it falls as 1 / steps."""
    K, L = 3, 2
    p, texts, process = random_law(9, seed=30), all_texts(K, L), Uniform(K)
    errors = []
    for steps in (100, 200):
        law = torch.full((9,), 1 / 9, **f64)
        for i in range(steps):
            alpha_t, alpha_s = (1 - 0.999 * (1 - j / steps) for j in (i, i + 1))
            f = leave_one_out(p, K, L, alpha_t)
            rows = process.posterior(f, texts, alpha_t, alpha_s)
            law = law @ (rows[:, 0, :, None] * rows[:, 1, None, :]).flatten(1)
        errors.append((law - p).abs().max())
    assert errors[1] < 2e-3 and 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("soft", [False, True])
def test_mixture_log_prob(soft):
    """log of the mean over draws of eps of prod_l G_l(eps)[x_l], for token and for soft inputs."""
    K, net, process, rng = 6, random_dit(6, seed=34), Uniform(6), seeded(35)
    x_0, t = process.prior(3, 4, rng), torch.full((3,), 0.5, **f64)
    draws = [draw_latent(net, process, x_0, t, rng, soft=soft) for _ in range(5)]
    rows = torch.stack([generate_probs(net, process, eps) for eps in draws])
    assert torch.allclose(rows.sum(-1), torch.ones(5, 3, 4, **f64))
    each = [math.prod(rows[k, b, l, x_0[b, l]].item() for l in range(4))
            for b in range(3) for k in range(5)]
    truth = torch.tensor(each, **f64).view(3, 5).mean(1).log()
    assert torch.allclose(mixture_log_prob(net, process, x_0, draws), truth, atol=1e-12)


def test_prompt_stays_and_rng_decides():
    K, L = 3, 2
    net, process = TableNet(K, L, seed=31), Uniform(K)
    write = lambda seed, **more: sample(net, process, 500, L, 3, seeded(seed), **more).tokens
    prompted = write(0, prompt=torch.tensor([2, -1]))
    assert (prompted[:, 0] == 2).all() and len(prompted[:, 1].unique()) == K
    assert torch.equal(write(0), write(0)) and not torch.equal(write(0), write(1))


def test_draw_latent():
    """Hard: noised tokens and -log alpha of the log-linear clock. Soft: the Gaussian state and its
    own alpha. Neither needs a latent z."""
    K, net, process = 6, random_dit(6, seed=32), Uniform(6)
    x_0, t = torch.zeros(2, 4, dtype=torch.long), torch.tensor([0.2, 0.9], **f64)
    eps = draw_latent(net, process, x_0, t, seeded(33))
    assert eps.z is None and torch.allclose(eps.sigma, -(1 - 0.999 * t).log())
    assert torch.equal(eps.x, process.corrupt(x_0, t, seeded(33)))
    eps = draw_latent(net, process, x_0, t, seeded(33), soft=True)
    (weights, ids), z = process.soft_corrupt(x_0, t, seeded(33))
    assert torch.equal(eps.x[0], weights) and torch.equal(eps.x[1], ids) and eps.z is None
    assert torch.allclose(eps.sigma, -process.gaussian(t)[2].log())
    dense = torch.zeros(2, 4, K, **f64).scatter_add_(2, ids, weights)
    assert torch.allclose(net(*eps), net(dense, eps.sigma), atol=1e-12)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, **f64))
    assert teacher.EPS == 1e-3                             # the oracles above write it out
