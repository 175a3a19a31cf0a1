"""The theorem of inverse distillation, by exact sums over all texts, noises and times.

    L(f*, p) - min_f L(f, p) = KL(p || p*) - KL of the two laws noised to t = 1

for 1, 2 and 3 tokens, masked and uniform, in float64: `exact_gap` against the KLs and against
the dense NELBO of tests/oracle.py. Then the losses of idlm_loss.py, whose exact expectation over all
noises and draws is that gap.

Run: python -m pytest tests/test_theorem.py
"""
import pytest
import torch

import idlm_loss
import oracle
from idlm_loss import (masked_fake_loss, masked_generator_loss, uniform_fake_loss, uniform_gap,
                       uniform_generator_loss)
from teacher import Masked, Uniform, mdlm_loss
from experiments.theorem import exact_gap

SIZES = [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3), (3, 3)]   # K tokens, L positions
TIMES = oracle.nodes(6)                                    # exact for the masked process
UNIFORM_TIMES = oracle.nodes(24, 2)
END = torch.ones(1, dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are no faster on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def process_of(kind, K):
    return Masked(K + 1) if kind == "masked" else Uniform(K)


def gap_of(p, p_star, process, L, **options):              # laws as (K^L,)
    shape = (process.K,) * L
    if options.get("fake") is not None:
        options["fake"] = options["fake"].view(shape)
    return exact_gap(p.view(shape), p_star.view(shape), process, **options)


# ---- the oracle, against closed forms -----------------------------------------------------------

@pytest.mark.parametrize("K, L", SIZES)
def test_nelbo_of_the_best_denoiser_is_minus_log_p(K, L, rng):
    """Text by text. At t = 1 alpha is 1e-3, not 0: what the tokens still visible there would add to
    -log p(x) is missing, E[-log p(visible tokens)]."""
    process, p = Masked(K + 1), oracle.random_law(K ** L, rng)
    x = oracle.texts(K, L)
    alpha, missing = 1e-3, torch.zeros(K ** L, dtype=torch.float64)
    for visible in oracle.texts(2, L).bool():
        agrees = (x[:, None] == x[None])[:, :, visible].all(-1).double()
        chance = alpha ** int(visible.sum()) * (1 - alpha) ** int((~visible).sum())
        missing -= chance * (agrees @ p).log()
    nelbo = oracle.exact_nelbo(process, p, L, TIMES)
    torch.testing.assert_close(nelbo, -p.log() - missing, rtol=0, atol=1e-12)
    assert missing.max() < 0.02                            # so the bound is all but -log p


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_any_other_denoiser_is_worse(kind, rng):
    process, L = process_of(kind, 3), 2
    p = oracle.random_law(9, rng)
    for t, _ in oracle.nodes(3):
        best = oracle.best_denoiser(process, t, p, L)
        least = (p * oracle.nelbo_of_texts(process, t, best, L)).sum()
        for _ in range(3):
            rows = 0.8 * best + 0.2 * oracle.random_rows(best.shape, rng)
            assert (p * oracle.nelbo_of_texts(process, t, rows, L)).sum() > least + 1e-5


# ---- the theorem --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("K, L", SIZES)
def test_gap_is_the_difference_of_two_kls(kind, K, L, rng):
    process = process_of(kind, K)
    times = TIMES if kind == "masked" else UNIFORM_TIMES
    for sharpness in (0.3, 1.0):
        p, p_star = (oracle.random_law(K ** L, rng, sharpness) for _ in range(2))
        clean, noisy = oracle.kl(p, p_star), oracle.kl_at(process, END, p, p_star, L)
        gap = gap_of(p, p_star, process, L, nodes=32)
        teacher, best = (oracle.exact_nelbo(process, law, L, times) for law in (p_star, p))
        assert abs(gap - (clean - noisy)) < 1e-12
        assert abs((p * (teacher - best)).sum() - (clean - noisy)) < 1e-12
        assert 0 < noisy < 0.01 * clean                    # alpha(1) is 1e-3, not 0


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_gap_with_another_fake(kind, rng):
    """exact_gap(fake=law) takes that law's best denoiser for the fake."""
    process, K, L = process_of(kind, 3), 3, 2
    p, p_star, other = (oracle.random_law(K ** L, rng) for _ in range(3))
    nelbo = [oracle.exact_nelbo(process, law, L, UNIFORM_TIMES) for law in (p_star, other)]
    gap = gap_of(p, p_star, process, L, fake=other, nodes=32)
    assert abs(gap - (p * (nelbo[0] - nelbo[1])).sum()) < 1e-12
    assert gap < gap_of(p, p_star, process, L) - 0.01      # any other fake makes it smaller


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("K, L", SIZES)
def test_gap_and_its_gradient_vanish_at_the_teacher(kind, K, L, rng):
    """At p = p* value and gradient are 0, and a small step away in any direction both are not."""
    process = process_of(kind, K)
    start = torch.randn(K ** L, generator=rng, dtype=torch.float64)
    p_star = start.softmax(0)

    def gap_and_gradient(theta):
        theta = theta.clone().requires_grad_()
        gap = gap_of(theta.softmax(0), p_star, process, L)
        return gap.item(), torch.autograd.grad(gap, theta)[0].norm().item()

    gap, gradient = gap_and_gradient(start)
    assert abs(gap) < 1e-12 and gradient < 1e-10
    for _ in range(3):
        step = torch.randn(K ** L, generator=rng, dtype=torch.float64)
        step -= step.mean()                                # softmax ignores a common shift
        gap, gradient = gap_and_gradient(start + 0.1 * step / step.norm())
        assert gap > 1e-5 and gradient > 1e-4


@pytest.mark.parametrize("kind", ["masked", "uniform"])
@pytest.mark.parametrize("K, L", [(3, 1), (2, 2)])
def test_descent_on_the_gap_reaches_the_teacher_from_anywhere(kind, K, L, rng):
    """The solution is unique: no start is caught elsewhere."""
    process, p_star = process_of(kind, K), oracle.random_law(K ** L, rng)
    for sharpness in (0.5, 2.0, 4.0):
        theta = sharpness * torch.randn(K ** L, generator=rng, dtype=torch.float64)
        theta.requires_grad_()
        assert (theta.softmax(0) - p_star).abs().max() > 0.05
        optimizer = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-9,
                                      tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            gap = gap_of(theta.softmax(0), p_star, process, L, nodes=6)
            gap.backward()
            return gap

        optimizer.step(closure)
        assert (theta.softmax(0) - p_star).abs().max() < 1e-5


# ---- the code's losses, in exact expectation ----------------------------------------------------

class Mixture:
    """A generator that ignores its tokens: latent j of M picks the rows softmax(logits[j]).

    logits (M, L, V); eps = (x_tilde, sigma, j).
    """

    def __init__(self, M, L, K, V, rng, sharpness=1.0):
        self.K = K
        self.logits = sharpness * torch.randn(M, L, V, generator=rng, dtype=torch.float64)
        self.logits.requires_grad_()

    def hidden(self, x_tilde, sigma, j):
        return self.logits[j]

    def project(self, rows):
        return rows

    def rows(self):                                        # G_j: (M, L, K)
        return self.logits[..., :self.K].softmax(-1)

    def law(self):                                         # p_theta: (K^L,)
        L = self.logits.shape[1]
        x = oracle.texts(self.K, L)
        each = torch.stack([self.rows()[:, l, x[:, l]] for l in range(L)]).prod(0)      # (M, K^L)
        return each.mean(0)


def masked_mixture(M, K, L, rng, sharpness=1.0):
    return Mixture(M, L, K, K + 1, rng, sharpness)


def masked_table(process, law, L):
    """The best denoiser as a network; masked, it is one at all t. The logit of [MASK] is junk."""
    rows = oracle.best_denoiser(process, TIMES[0][0], law, L)
    junk = torch.full((*rows.shape[:2], 1), 3.0, dtype=torch.float64)
    return oracle.Table(torch.cat([rows.log(), junk], -1).detach(), process.vocab_size)


def every_masked_case(generator, process, L, monkeypatch):
    """-> eps and noise with one row for every (latent, time node, noised text), such that a loss
    times their number is its exact expectation: the chance of a row multiplies its weight, and the
    draws from G are dictated."""
    M, x_t, T = len(generator.logits), oracle.texts(process.vocab_size, L), len(TIMES)
    N = len(x_t)
    j = torch.arange(M).repeat_interleave(T * N)
    t = torch.cat([t for t, _ in TIMES]).repeat_interleave(N).repeat(M)
    node = torch.stack([w for _, w in TIMES]).repeat_interleave(N).repeat(M)
    x_t = x_t.repeat(M * T, 1)
    is_masked, alpha = x_t == process.mask_id, process.alpha(t)[0][:, None]
    G = generator.rows().detach()[j]                                           # (rows, L, K)
    drawn = G.gather(-1, x_t.clamp(max=process.K - 1)[..., None])[..., 0]
    chance = node * torch.where(is_masked, 1 - alpha, alpha * drawn).prod(1) / M
    monkeypatch.setattr(idlm_loss, "draw_tokens", lambda *_, **__: x_t[~is_masked])
    sigma = torch.zeros_like(t)
    eps = torch.full_like(x_t, process.mask_id), sigma, j
    return eps, {"is_masked": is_masked, "weight": process.weight(t) * chance, "sigma": sigma,
                 "mask_id": process.mask_id}


def expected_masked_gap(generator, fake, teacher, process, L, monkeypatch):   # nats per text
    eps, noise = every_masked_case(generator, process, L, monkeypatch)
    return L * len(eps[0]) * masked_generator_loss(generator, fake, teacher, eps, None, **noise)


@pytest.mark.parametrize("K, L, M", [(3, 1, 4), (3, 2, 3), (2, 3, 4), (3, 3, 2)])
def test_masked_generator_loss_is_the_gap(K, L, M, rng, monkeypatch):
    process = Masked(K + 1)
    generator, p_star = masked_mixture(M, K, L, rng), oracle.random_law(K ** L, rng)
    p = generator.law().detach()
    loss = expected_masked_gap(generator, masked_table(process, p, L),
                               masked_table(process, p_star, L), process, L, monkeypatch)
    assert abs(loss - gap_of(p, p_star, process, L)) < 1e-12


@pytest.mark.parametrize("K, L, M", [(3, 1, 4), (3, 2, 3), (2, 3, 4)])
def test_uniform_losses_are_the_gap(K, L, M, rng):
    """`hard`: the soft target G has the expectation of the drawn token, and so the gap is exact, as
    is the fake's NELBO but for what it lacks of a one-hot target's entropy."""
    process = Uniform(K)
    generator, p_star = Mixture(M, L, K, K, rng), oracle.random_law(K ** L, rng)
    p, z = generator.law().detach(), oracle.texts(K, L)
    G = generator.rows().detach()
    j, z = torch.arange(M).repeat_interleave(len(z)), z.repeat(M, 1)
    nothing = torch.full((len(z),), torch.inf, dtype=torch.float64)          # x_tilde says nothing
    gap, change = 0, 0
    other = oracle.random_law(K ** L, rng)
    for t, node in UNIFORM_TIMES:
        alpha, dalpha = process.alpha(t)
        noised = (alpha * G + (1 - alpha) / K)[j]                            # (M N, L, K)
        chance = noised.gather(-1, z[..., None])[..., 0].prod(1) / M
        # Nothing is kept, so z is what `tokens` say; a row's chance multiplies its dalpha.
        noise = {"keep": torch.zeros_like(z, dtype=torch.bool), "tokens": z, "K": K,
                 "alpha": alpha.expand(len(z)), "dalpha": dalpha * chance * len(z) * L * node,
                 "sigma": process.sigma(t).expand(len(z))}
        fake, teacher, third = (
            oracle.Table(oracle.best_denoiser(process, t, law, L).log(), K)
            for law in (p, p_star, other))
        eps = z, nothing, j
        gap += uniform_generator_loss(generator, fake, teacher, eps, rng, **noise)
        change += uniform_fake_loss(generator, third, eps, rng, **noise)
        change -= uniform_fake_loss(generator, fake, eps, rng, **noise)
    assert abs(gap - gap_of(p, p_star, process, L, nodes=32)) < 1e-10
    assert abs(change - gap_of(p, other, process, L, nodes=32)) < 1e-10


def test_the_noised_token_can_be_summed_out(rng):
    """The gap of `hard` has a closed form for a leave-one-out fake. With phi(u) = log u - 1 / u, the
    mean over z ~ Gbar / K of the gap at z is
        c sum_v Gbar_v (phi(fbar_v) - phi(tbar_v)) - log(fbar_v / tbar_v),    c = -dalpha / (K a)
    As an update it seeks modes and went out of the program (SPEC section 6); the toy's exact gap is
    this form."""
    K, N, a = 5, 7, 0.3
    dalpha = torch.full((N, 1), -0.9, dtype=torch.float64)
    logits_g, logits_f, logits_t = torch.randn(3, N, K, generator=rng, dtype=torch.float64)
    Gbar, fbar, tbar = (K * a * logits.softmax(-1) + 1 - a
                        for logits in (logits_g, logits_f, logits_t))

    def phi(u):
        return u.log() - 1 / u

    closed = (Gbar * (phi(fbar) - phi(tbar)) - (fbar / tbar).log()).sum(-1)
    closed = -dalpha[:, 0] / (K * a) * closed
    summed = 0
    for v in range(K):
        z = torch.full((N,), v)
        at_z = uniform_gap(logits_g, logits_f, logits_t, z, a, dalpha, token=z, bonus=0.0, K=K)
        summed = summed + Gbar[:, v] / K * at_z
    torch.testing.assert_close(closed, summed, rtol=1e-12, atol=1e-12)
    assert closed.abs().min() > 1e-3


def test_masked_losses_with_draws_of_the_code(rng):
    """Masks and tokens drawn by the code: the mean of 100 batches of 1,000 lies within 5 standard
    errors of the exact value, for the gap and for the fake's NELBO (false alarm: 5e-6 for the two,
    by the t distribution of 99 degrees of freedom)."""
    process, L, B = Masked(4), 2, 1000
    generator, p_star = masked_mixture(3, 3, L, rng, 1.5), oracle.random_law(9, rng)
    p = generator.law().detach()
    fake, teacher = masked_table(process, p, L), masked_table(process, p_star, L)
    gaps, nelbos = [], []
    for _ in range(100):
        t = torch.rand(B, generator=rng, dtype=torch.float64)
        eps = process.prior(B, L, rng), torch.zeros(B), torch.randint(3, (B,), generator=rng)
        noise = process.draw_noise(t, L, rng)
        gaps.append(masked_generator_loss(generator, fake, teacher, eps, rng, **noise).detach())
        nelbos.append(masked_fake_loss(generator, fake, eps, rng, **noise))
    gap = gap_of(p, p_star, process, L) / L
    nelbo = (p * oracle.exact_nelbo(process, p, L, TIMES)).sum() / L
    for draws, exact in ((torch.stack(gaps), gap), (torch.stack(nelbos), nelbo)):
        error = draws.std() / 10
        assert abs(draws.mean() - exact) < 5 * error
        assert 5 * error < 0.2 * exact                     # the test sees an error of a fifth


def test_mdlm_loss_is_the_nelbo(rng):
    """The teacher's training loss is the L of the theorem: 100 batches of 1,000 texts of the law,
    within 5 standard errors of the exact NELBO (false alarm 3e-6)."""
    process, L = Masked(4), 2
    p = oracle.random_law(9, rng)
    net = masked_table(process, p, L)
    draws = []
    for _ in range(100):
        x_0 = oracle.texts(3, L)[torch.multinomial(p, 1000, replacement=True, generator=rng)]
        t = torch.rand(1000, generator=rng, dtype=torch.float64)
        draws.append(mdlm_loss(net, process, x_0, rng, t))
    draws, exact = torch.stack(draws), (p * oracle.exact_nelbo(process, p, L, TIMES)).sum() / L
    assert abs(draws.mean() - exact) < 5 * draws.std() / 10
    assert draws.std() / 2 < 0.05 * exact


# ---- what the alternation does ------------------------------------------------------------------

@pytest.mark.parametrize("K, L", [(3, 1), (2, 2)])
def test_the_fake_that_minimises_its_loss_is_the_posterior(K, L, rng, monkeypatch):
    """Descent on the exact expectation of masked_fake_loss, from random logits. At [MASK] the
    optimum is p_theta(x_0^l | x_t), and the loss there is the NELBO of the best denoiser."""
    process = Masked(K + 1)
    generator = masked_mixture(3, K, L, rng, 1.5)
    logits = torch.randn((K + 1) ** L, L, K + 1, generator=rng, dtype=torch.float64)
    fake = oracle.Table(logits.requires_grad_(), process.vocab_size)
    eps, noise = every_masked_case(generator, process, L, monkeypatch)
    optimizer = torch.optim.LBFGS([fake.logits], max_iter=300, history_size=30, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = len(eps[0]) * masked_fake_loss(generator, fake, eps, None, **noise)
        loss.backward()
        return loss

    optimizer.step(closure)
    p = generator.law().detach()
    posterior = oracle.best_denoiser(process, TIMES[0][0], p, L)
    at_mask = oracle.texts(K + 1, L) == K
    learnt = fake.logits.detach()[..., :K].softmax(-1)
    assert (learnt - posterior)[at_mask].abs().max() < 1e-5
    best = (p * oracle.exact_nelbo(process, p, L, TIMES)).sum() / L
    assert abs(closure().item() - best) < 1e-9
    assert generator.logits.grad is None


def test_the_gradient_is_that_of_kl_for_one_token_and_close_to_it_for_two(rng, monkeypatch):
    """The draw of x_t's visible tokens is not differentiated: nothing is lost for one token; for
    two the cosine to the true gradient is about 0.96."""
    cosines = []
    for L in (1, 2, 2, 2, 2):
        process, K = Masked(4), 3
        generator, p_star = masked_mixture(3, K, L, rng), oracle.random_law(K ** L, rng)
        p = generator.law()
        true = torch.autograd.grad(gap_of(p, p_star, process, L), generator.logits)[0]
        loss = expected_masked_gap(generator, masked_table(process, p.detach(), L),
                                   masked_table(process, p_star, L), process, L, monkeypatch)
        ours = torch.autograd.grad(loss, generator.logits)[0]
        if L == 1:
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
        cosines.append((ours * true).sum() / ours.norm() / true.norm())
    assert min(cosines) > 0.9
    assert min(cosines[1:]) < 0.9999                       # and it is not the whole gradient


@pytest.mark.parametrize("K, L, M", [(3, 1, 3), (3, 2, 3), (2, 3, 4), (3, 3, 2)])
def test_the_gradient_is_that_of_a_weighted_kl_of_the_noised_laws(K, L, M, rng, monkeypatch):
    """What is left is a gradient all the same: that of D = integral of KL_t (-dalpha_t / alpha_t) dt,
    KL_t between the laws of p_theta and p* noised to t. D >= 0, and 0 only at p*."""
    process, p_star = Masked(K + 1), oracle.random_law(K ** L, rng)
    generator = masked_mixture(M, K, L, rng)
    p, D = generator.law(), 0
    for t, node in TIMES:                                  # exact: a polynomial in t
        alpha, dalpha = process.alpha(t)
        D = D + node * oracle.kl_at(process, t, p, p_star, L) * (-dalpha / alpha).item()
    weighted = torch.autograd.grad(D, generator.logits)[0]
    loss = expected_masked_gap(generator, masked_table(process, p.detach(), L),
                               masked_table(process, p_star, L), process, L, monkeypatch)
    ours = torch.autograd.grad(loss, generator.logits)[0]
    torch.testing.assert_close(ours, weighted, rtol=1e-10, atol=1e-12)
    assert ours.norm() > 1e-3 and D > 1e-3


def test_the_alternation_with_an_exact_fake_reaches_the_teacher(rng, monkeypatch):
    """The code's generator step, the fake being the exact posterior at each: a mixture of products
    goes to a correlated p* (mostly 00 and 11), which no single product can hold."""
    process, K, L = Masked(3), 2, 2
    p_star = torch.tensor([0.46, 0.06, 0.08, 0.40], dtype=torch.float64)
    teacher = masked_table(process, p_star, L)
    generator = masked_mixture(6, K, L, rng)
    optimizer = torch.optim.Adam([generator.logits], lr=0.3, betas=(0.8, 0.99))
    assert oracle.kl(generator.law(), p_star) > 0.1
    for _ in range(100):
        optimizer.zero_grad()
        fake = masked_table(process, generator.law().detach(), L)
        expected_masked_gap(generator, fake, teacher, process, L, monkeypatch).backward()
        optimizer.step()
    assert oracle.kl(generator.law(), p_star) < 1e-8
