"""The theorem of inverse distillation, by enumeration, for the masked process.

    L(f*, p) - min_f L(f, p) = KL(p || p*) - KL of the two laws noised to t = 1

on vocabularies so small that every text and every noised text is summed over (float64, time by
Gauss-Legendre, exact here). Then the code's own losses: their exact expectation, over all masks and
draws, is that gap.

Run: python -m pytest tests/test_theorem.py
"""
import pytest
import torch

import enumeration as en
import idlm_loss
from idlm_loss import masked_fake_loss, masked_generator_loss
from teacher import Masked, Uniform, mdlm_loss

TIMES = en.nodes(6)
END = torch.ones(1, dtype=torch.float64)
SIZES = [(2, 1), (3, 1), (2, 2), (3, 2), (2, 3), (3, 3)]   # K words, L tokens


# ---- the oracle itself, against closed forms ----------------------------------------------------

@pytest.mark.parametrize("K, L", SIZES)
def test_nelbo_of_the_best_denoiser_is_minus_log_p(K, L, rng):
    """Text by text. At t = 1 alpha is 1e-3, not 0: what of -log p(x) the tokens still visible there
    would have told is missing, E[-log p(visible tokens)]."""
    process, p = Masked(K + 1), en.random_law(K ** L, rng)
    x = en.texts(K, L)
    alpha, missing = 1e-3, torch.zeros(K ** L, dtype=torch.float64)
    for visible in en.texts(2, L).bool():
        agrees = (x[:, None] == x[None])[:, :, visible].all(-1).double()
        chance = alpha ** int(visible.sum()) * (1 - alpha) ** int((~visible).sum())
        missing -= chance * (agrees @ p).log()
    nelbo = en.exact_nelbo(process, p, L, TIMES)
    torch.testing.assert_close(nelbo, -p.log() - missing, rtol=0, atol=1e-12)
    assert missing.max() < 0.02                            # so the bound is all but -log p


def test_any_other_denoiser_is_worse(rng):
    """The NELBO of a wrong denoiser bounds the entropy from above."""
    process, p = Masked(4), en.random_law(9, rng)
    best = (p * en.exact_nelbo(process, p, 2, TIMES)).sum()
    for _ in range(5):
        rows = en.random_rows((16, 2, 3), rng)
        other = sum(w * (p * en.nelbo_of_texts(process, t, rows, 2)).sum() for t, w in TIMES)
        assert other > best + 1e-3


# ---- the theorem --------------------------------------------------------------------------------

@pytest.mark.parametrize("K, L", SIZES)
def test_gap_is_the_difference_of_two_kls(K, L, rng):
    process = Masked(K + 1)
    for sharpness in (0.3, 1.0, 3.0):
        p, p_star = (en.random_law(K ** L, rng, sharpness) for _ in range(2))
        gap = en.exact_gap(process, p, p_star, L, TIMES)
        clean, noisy = en.kl(p, p_star), en.kl_at(process, END, p, p_star, L)
        assert abs(gap - (clean - noisy)) < 1e-10
        assert 0 < noisy < 0.01 * clean                    # alpha(1) = 1e-3: a thousandth a token
        if L == 1:
            assert abs(gap - (1 - 1e-3) * clean) < 1e-10


@pytest.mark.parametrize("K, L", SIZES)
def test_gap_and_its_gradient_vanish_at_the_teacher(K, L, rng):
    """At p = p* value and gradient are 0, and a small step away in any direction both are not."""
    process = Masked(K + 1)
    start = torch.randn(K ** L, generator=rng, dtype=torch.float64)
    p_star = start.softmax(0)

    def gap_and_gradient(theta):
        theta = theta.clone().requires_grad_()
        gap = en.exact_gap(process, theta.softmax(0), p_star, L, TIMES)
        return gap.item(), torch.autograd.grad(gap, theta)[0].norm().item()

    gap, gradient = gap_and_gradient(start)
    assert abs(gap) < 1e-12 and gradient < 1e-12
    for _ in range(3):
        step = torch.randn(K ** L, generator=rng, dtype=torch.float64)
        step -= step.mean()                                # softmax ignores a common shift
        gap, gradient = gap_and_gradient(start + 0.1 * step / step.norm())
        assert gap > 1e-5 and gradient > 1e-4


@pytest.mark.parametrize("process, K, L, beta", [
    *((Masked, *case) for case in [(3, 1, 1), (2, 2, 1), (2, 3, 1), (3, 1, 1.5), (2, 2, 1.5)]),
    (Uniform, 3, 1, 1.5), (Uniform, 2, 2, 1.5)])
def test_descent_on_the_exact_gap_reaches_the_teacher_from_anywhere(process, K, L, beta, rng):
    """With the fake's bound counted beta times, p*^(1 / beta), normalised; to a thousandth, since
    alpha(1) is one. Either process: the bound's minimum is the entropy."""
    process, p_star = process(K + (process is Masked)), en.random_law(K ** L, rng)
    aim = (p_star.log() / beta).softmax(0)
    assert beta == 1 or (aim - p_star).abs().max() > 0.01
    for sharpness in (0.5, 2.0, 4.0):
        theta = sharpness * torch.randn(K ** L, generator=rng, dtype=torch.float64)
        theta.requires_grad_()
        assert (theta.softmax(0) - p_star).abs().max() > 0.05
        optimizer = torch.optim.Adam([theta], lr=0.2, betas=(0.8, 0.99))
        for _ in range(250):
            optimizer.zero_grad()
            times = en.nodes(1 + L // 2) if isinstance(process, Masked) else en.nodes(8, 3)
            en.exact_gap(process, theta.softmax(0), p_star, L, times, beta).backward()
            optimizer.step()
        assert (theta.softmax(0) - aim).abs().max() < (1e-6 if beta == 1 else 1e-3)


# ---- the code's losses, in exact expectation ----------------------------------------------------

class Mixture:
    """A generator without visible tokens: latent j of M picks the rows softmax(logits[j]).

    logits (M, L, K + 1); eps = (all [MASK], sigma, j).
    """

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, x_tilde, sigma, j):
        return self.logits[j]

    def project(self, rows):
        return rows

    def rows(self):                                        # G_j: (M, L, K)
        return self.logits[..., :-1].softmax(-1)

    def law(self):                                         # p_theta: (K^L,)
        M, L, V = self.logits.shape
        x = en.texts(V - 1, L)
        each = torch.stack([self.rows()[:, l, x[:, l]] for l in range(L)]).prod(0)      # (M, K^L)
        return each.mean(0)


def random_mixture(M, K, L, rng, sharpness=1.0):
    logits = sharpness * torch.randn(M, L, K + 1, generator=rng, dtype=torch.float64)
    return Mixture(logits.requires_grad_())


def masked_table(process, law, L):
    """The best denoiser as a network; masked, it is one at all t. [MASK]'s logit is junk."""
    rows = en.best_denoiser(process, TIMES[0][0], law, L)
    junk = torch.full((*rows.shape[:2], 1), 3.0, dtype=torch.float64)
    return en.Table(torch.cat([rows.log(), junk], -1).detach(), process.vocab_size)


def every_case(generator, process, L, monkeypatch):
    """One row for every (latent, time node, noised text): the arguments of the masked losses such
    that the loss times the number of rows is the exact expectation over all of them.

    The chance of a row multiplies its weight; the draws from G are dictated.
    """
    M, x_t, T = len(generator.logits), en.texts(process.vocab_size, L), len(TIMES)
    N = len(x_t)
    j = torch.arange(M).repeat_interleave(T * N)
    t = torch.cat([t for t, _ in TIMES]).repeat_interleave(N).repeat(M)
    node = torch.stack([w for _, w in TIMES]).repeat_interleave(N).repeat(M)
    x_t = x_t.repeat(M * T, 1)
    is_masked, alpha = x_t == process.mask_id, process.alpha(t)[0][:, None]
    G = generator.rows().detach()[j]                                           # (rows, L, K)
    drawn = G.gather(-1, x_t.clamp(max=process.K - 1)[..., None])[..., 0]
    chance = node * torch.where(is_masked, 1 - alpha, alpha * drawn).prod(1) / M
    monkeypatch.setattr(idlm_loss, "draw_tokens", lambda *_: x_t[~is_masked])
    sigma = torch.zeros_like(t)
    eps = (torch.full_like(x_t, process.mask_id), sigma, j)
    return eps, is_masked, process.weight(t) * chance, sigma


def exact_generator_loss(generator, fake, teacher, process, L, monkeypatch):   # nats per token
    eps, is_masked, weight, sigma = every_case(generator, process, L, monkeypatch)
    return len(weight) * masked_generator_loss(generator, fake, teacher, eps, is_masked, weight,
                                               sigma, sigma, process.mask_id, None)


@pytest.mark.parametrize("K, L, M", [(3, 1, 4), (3, 2, 3), (2, 3, 4), (3, 3, 2)])
def test_masked_generator_loss_is_the_gap(K, L, M, rng, monkeypatch):
    process = Masked(K + 1)
    generator, p_star = random_mixture(M, K, L, rng), en.random_law(K ** L, rng)
    p = generator.law().detach()
    loss = exact_generator_loss(generator, masked_table(process, p, L),
                                masked_table(process, p_star, L), process, L, monkeypatch)
    assert abs(L * loss - en.exact_gap(process, p, p_star, L, TIMES)) < 1e-10


def test_masked_losses_with_their_own_draws(rng):
    """The same with masks and tokens drawn by the code: the mean of 100 batches of 1,000 lies
    within 5 standard errors of the exact value, for the gap and for the fake's NELBO
    (false alarm: 5e-6 for the two, by the t distribution of 99 degrees of freedom)."""
    process, L = Masked(4), 2
    generator, p_star = random_mixture(3, 3, L, rng, 1.5), en.random_law(9, rng)
    p = generator.law().detach()
    fake, teacher = masked_table(process, p, L), masked_table(process, p_star, L)
    gaps, nelbos = [], []
    for _ in range(100):
        B = 1000
        t = torch.rand(B, generator=rng, dtype=torch.float64)
        sigma = torch.zeros(B)
        eps = (torch.full((B, L), 3), sigma, torch.randint(3, (B,), generator=rng))
        is_masked = process.draw_mask(t, L, rng)
        gaps.append(masked_generator_loss(generator, fake, teacher, eps, is_masked,
                                          process.weight(t), sigma, sigma, 3, rng).detach())
        nelbos.append(masked_fake_loss(generator, fake, eps, is_masked, process.weight(t), sigma,
                                       3, rng))
    exact_gap = en.exact_gap(process, p, p_star, L, TIMES) / L
    exact_nelbo = (p * en.exact_nelbo(process, p, L, TIMES)).sum() / L
    for draws, exact in ((torch.stack(gaps), exact_gap), (torch.stack(nelbos), exact_nelbo)):
        error = draws.std() / 10
        assert abs(draws.mean() - exact) < 5 * error
        assert 5 * error < 0.2 * exact                     # the test sees an error of a fifth


@pytest.mark.parametrize("K, L", [(3, 1), (2, 2)])
def test_the_fake_that_minimises_its_loss_is_the_posterior(K, L, rng, monkeypatch):
    """Descent on the exact expectation of masked_fake_loss, from random logits. At [MASK] the
    optimum is p_theta(x_0^l | x_t), and the loss there is the NELBO of the best denoiser."""
    process = Masked(K + 1)
    generator = random_mixture(3, K, L, rng, 1.5)
    fake = en.Table(torch.randn((K + 1) ** L, L, K + 1, generator=rng, dtype=torch.float64),
                    process.vocab_size)
    fake.logits.requires_grad_()
    eps, is_masked, weight, sigma = every_case(generator, process, L, monkeypatch)
    optimizer = torch.optim.LBFGS([fake.logits], max_iter=300, history_size=30, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = len(weight) * masked_fake_loss(generator, fake, eps, is_masked, weight, sigma,
                                              process.mask_id, None)
        loss.backward()
        return loss

    optimizer.step(closure)
    p = generator.law().detach()
    posterior = en.best_denoiser(process, TIMES[0][0], p, L)
    at_mask = en.texts(K + 1, L) == K
    learnt = fake.logits.detach()[..., :K].softmax(-1)
    assert (learnt - posterior)[at_mask].abs().max() < 1e-5
    best = (p * en.exact_nelbo(process, p, L, TIMES)).sum() / L
    assert abs(closure().item() - best) < 1e-9
    assert generator.logits.grad is None


def test_mdlm_loss_is_the_nelbo(rng):
    """mdlm_loss of the best denoiser, averaged over 100 batches of 1,000 texts of the law, lies
    within 5 standard errors of the exact NELBO (false alarm 3e-6, see above); alpha, weight and
    mask rate all enter."""
    process, L = Masked(4), 2
    p = en.random_law(9, rng)
    net = masked_table(process, p, L)
    draws = []
    for _ in range(100):
        x_0 = en.texts(3, L)[torch.multinomial(p, 1000, replacement=True, generator=rng)]
        t = torch.rand(1000, generator=rng, dtype=torch.float64)
        draws.append(mdlm_loss(net, process, x_0, rng, t))
    draws, exact = torch.stack(draws), (p * en.exact_nelbo(process, p, L, TIMES)).sum() / L
    assert abs(draws.mean() - exact) < 5 * draws.std() / 10
    assert draws.std() / 2 < 0.05 * exact


def test_the_gradient_is_that_of_kl_for_one_token_and_close_to_it_for_two(rng, monkeypatch):
    """The draw of x_t's visible tokens is not differentiated: nothing is lost for one token; for
    two the cosine to the true gradient is about 0.96."""
    cosines = []
    for L in (1, 2, 2, 2, 2):
        process, K = Masked(4), 3
        generator, p_star = random_mixture(3, K, L, rng), en.random_law(K ** L, rng)
        p = generator.law()
        true = torch.autograd.grad(en.exact_gap(process, p, p_star, L, TIMES), generator.logits)[0]
        loss = L * exact_generator_loss(generator, masked_table(process, p.detach(), L),
                                        masked_table(process, p_star, L), process, L, monkeypatch)
        ours = torch.autograd.grad(loss, generator.logits)[0]
        if L == 1:
            torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
        cosines.append((ours * true).sum() / ours.norm() / true.norm())
    assert min(cosines) > 0.9
    assert min(cosines[1:]) < 0.9999                       # and it is not the whole gradient


@pytest.mark.parametrize("K, L, M", [(3, 1, 3), (3, 2, 3), (2, 3, 4), (3, 3, 2)])
def test_the_gradient_is_that_of_a_weighed_kl_of_the_noised_laws(K, L, M, rng, monkeypatch):
    """What is left when the draw is not differentiated is no approximation of a gradient but one:
    that of D = integral of KL_t (-dalpha_t / alpha_t) dt, KL_t between the laws of p_theta and p*
    noised to t. D >= 0, and 0 only at p*."""
    process, p_star = Masked(K + 1), en.random_law(K ** L, rng)
    generator = random_mixture(M, K, L, rng)
    p, D = generator.law(), 0
    for t, node in TIMES:                                  # exact: a polynomial in t
        alpha, dalpha = process.alpha(t)
        D = D + node * en.kl_at(process, t, p, p_star, L) * (-dalpha / alpha).item()
    weighed = torch.autograd.grad(D, generator.logits)[0]
    loss = L * exact_generator_loss(generator, masked_table(process, p.detach(), L),
                                    masked_table(process, p_star, L), process, L, monkeypatch)
    ours = torch.autograd.grad(loss, generator.logits)[0]
    torch.testing.assert_close(ours, weighed, rtol=1e-10, atol=1e-12)
    assert ours.norm() > 1e-3 and D > 1e-3


def test_the_alternation_with_an_exact_fake_reaches_the_teacher(rng, monkeypatch):
    """The code's generator step, the fake being the exact posterior at each: a mixture of products
    goes to a correlated p* (mostly 00 and 11), which no single product can hold."""
    process, K, L = Masked(3), 2, 2
    p_star = torch.tensor([0.46, 0.06, 0.08, 0.40], dtype=torch.float64)
    teacher = masked_table(process, p_star, L)
    generator = random_mixture(6, K, L, rng)
    optimizer = torch.optim.Adam([generator.logits], lr=0.1)
    assert en.kl(generator.law(), p_star) > 0.1
    for _ in range(250):
        optimizer.zero_grad()
        fake = masked_table(process, generator.law().detach(), L)
        exact_generator_loss(generator, fake, teacher, process, L, monkeypatch).backward()
        optimizer.step()
    assert en.kl(generator.law(), p_star) < 1e-8
