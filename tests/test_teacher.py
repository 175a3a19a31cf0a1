"""The two noising processes, and the losses that train a teacher, against dense formulas.

Run: python -m pytest tests/test_teacher.py

tests/oracle.py holds the dense NELBOs and sums over all texts. Whether the bounds are right is
asked in test_theorem.py; this file asks whether the code computes them: rows at the positions that
count, draws, given prompts.
"""
import pytest
import torch
import torch.nn.functional as F

import oracle
import teacher
from conftest import Recorded, assert_law, assert_same, gradients, random_dit, seeded
from teacher import T_MIN, Masked, Uniform, dcd_loss, duo_loss, mdlm_loss, stratified_times

B, L, K = 5, 6, 7
MASKED = Masked(K + 1)
MASK = MASKED.mask_id
UNIFORM = Uniform(K)
f64 = {"dtype": torch.float64}


def texts_and_times(rng):
    x_0 = torch.randint(K, (B, L), generator=rng)
    t = 0.1 + 0.8 * torch.rand(B, generator=rng, **f64)
    return x_0, t


# ---- time ---------------------------------------------------------------------------------------

def test_stratified_times(rng):
    """One time in each of B equal slices of [T_MIN, 1], spread over all of its slice."""
    t = torch.stack([stratified_times(8, rng) for _ in range(200)]).double()
    place = (t - T_MIN) / (1 - T_MIN) * 8 - torch.arange(8)
    assert place.min() > -1e-5 and place.max() < 1 + 1e-5
    assert place.min() < 0.05 and place.max() > 0.95       # 1,600 draws: odds of failing 1e-35


def test_the_schedule():
    """alpha_t = 1 - (1 - 1e-3) t with its slope; weight = -dalpha_t / (1 - alpha_t) = 1 / t."""
    t = torch.linspace(T_MIN, 1, 50, **f64).requires_grad_()
    for process in (MASKED, UNIFORM):
        alpha, dalpha = process.alpha(t)
        assert torch.allclose(alpha, 1 - 0.999 * t)
        assert torch.allclose(torch.autograd.grad(alpha.sum(), t)[0], dalpha)
    t = t.detach()
    torch.testing.assert_close(MASKED.weight(t), 1 / t, rtol=1e-12, atol=0)
    torch.testing.assert_close(MASKED.weight(t.float()), 1 / t.float(), rtol=1e-4, atol=0)
    assert (MASKED.sigma(t) == 0).all()
    assert torch.allclose(UNIFORM.sigma(t), -(1 - 0.999 * t).log())


# ---- the masked process -------------------------------------------------------------------------

def test_mask_rate(rng):
    """Each position with probability 1 - alpha_t, apart from the others: 200,000 draws at each of
    five times, and pairs of positions, within 5 standard deviations (false alarm 6e-6)."""
    n, length = 50_000, 4
    for t in (T_MIN, 0.1, 0.5, 0.9, 1.0):
        p = 0.999 * t
        masked = MASKED.draw_mask(torch.full((n,), t), length, rng).double()
        assert abs(masked.mean() - p) < 5 * (p * (1 - p) / n / length) ** 0.5
        pairs = (masked[:, 0] * masked[:, 1]).mean()
        assert abs(pairs - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5 + 1e-12
    each = MASKED.draw_mask(torch.tensor([T_MIN, 1.0]), 4000, rng).double().mean(1)
    assert each[0] < 0.1 and each[1] > 0.9                 # every text at its own time


def test_masked_corrupt(rng):
    """x_t is [MASK] or the token; at given positions always the token."""
    x_0, _ = texts_and_times(rng)
    t = torch.full((B,), 0.5)
    free = torch.rand(B, L, generator=rng) < 0.5
    x_t = MASKED.corrupt(x_0, t, seeded(1))
    assert ((x_t == MASK) | (x_t == x_0)).all()
    assert torch.equal(x_t == MASK, MASKED.draw_mask(t, L, seeded(1)))
    assert (x_t == MASK)[~free].any()
    prompted = MASKED.corrupt(x_0, t, seeded(1), free)
    assert torch.equal(prompted, torch.where(free, x_t, x_0))
    assert (MASKED.prior(2, 3, rng) == MASK).all()


def test_subs(rng):
    """[MASK] has no column, rows are normalised, a visible token is copied with certainty."""
    logits = torch.randn(B, L, K + 1, generator=rng)
    logits[..., MASK] = 50
    x_t = torch.randint(K + 1, (B, L), generator=rng)
    before = logits.clone()
    log_probs = MASKED.log_probs(logits, x_t)
    is_visible = x_t != MASK
    assert torch.equal(logits, before) and log_probs.shape == (B, L, K)
    assert torch.equal(log_probs[is_visible].exp(), F.one_hot(x_t[is_visible], K).float())
    inside = logits[~is_visible][:, :K].log_softmax(-1)
    torch.testing.assert_close(log_probs[~is_visible], inside)
    assert MASKED.log_probs(logits.bfloat16(), x_t).dtype == torch.float32


# ---- the uniform process ------------------------------------------------------------------------

def kernel(alpha):
    """q(z | x) of one token: (K, K)."""
    return alpha * torch.eye(K, **f64) + (1 - alpha) / K


def test_uniform_corrupt(rng):
    """Kept with alpha_t, each text at its own time, else uniform over all K, itself included."""
    x_0 = torch.full((2, 50_000), 3)
    t = torch.tensor([0.25, 0.9])
    for row, time in zip(UNIFORM.corrupt(x_0, t, rng), t.tolist()):
        assert_law(row, kernel(1 - 0.999 * time)[3])
    assert_law(UNIFORM.prior(4, 20_000, rng), torch.full((K,), 1 / K, **f64))


def test_uniform_corrupt_leaves_given_positions(rng):
    """A given token stays, and the other positions' draws are the same."""
    x_0, _ = texts_and_times(rng)
    t = torch.full((B,), 0.9)
    free = torch.rand(B, L, generator=rng) < 0.5
    x_t = UNIFORM.corrupt(x_0, t, seeded(1))
    assert (x_t != x_0)[~free].any()
    prompted = UNIFORM.corrupt(x_0, t, seeded(1), free)
    assert torch.equal(prompted, torch.where(free, x_t, x_0))


def test_posterior_is_bayes_rule(rng):
    """q(x_s | x_t, x_0) ~ q(x_t | x_s) q(x_s | x_0) for every x_t, and with a row f in the place of
    x_0, q(x_s | f) in the place of q(x_s | x_0)."""
    rows = torch.cat([torch.eye(K, **f64), oracle.random_rows((4, K), rng)])
    for alpha_t, alpha_s in ((0.3, 0.8), (1e-3, 0.2), (0.6, 1.0), (0.5, 0.500001)):
        for z in range(K):
            x_t = torch.full((len(rows),), z)
            bayes = (rows @ kernel(alpha_s)) * kernel(alpha_t / alpha_s)[:, z]
            bayes = bayes / bayes.sum(-1, keepdim=True)
            found = oracle.posterior(rows, x_t, alpha_t, alpha_s)
            assert torch.allclose(found, bayes, rtol=0, atol=1e-12)


# ---- losses against the dense NELBO -------------------------------------------------------------

def dense_loss(process, net, x_0, x_t, t, free):
    """The mean NELBO per free token by tests/oracle.py, every row of the network formed."""
    log_probs = process.log_probs(net(x_t, process.sigma(t)), x_t)
    nelbo = oracle.nelbo(process, log_probs, F.one_hot(x_0, K).double(), x_t, t)
    return nelbo.mean() if free is None else nelbo[free].mean()


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("process, loss_of", [(MASKED, mdlm_loss), (UNIFORM, duo_loss)])
def test_loss_is_the_dense_nelbo(process, loss_of, with_prompt, rng):
    """Value and every gradient to 1e-10, at the noised text of the same draws."""
    x_0, t = texts_and_times(rng)
    free = torch.rand(B, L, generator=rng) < 0.6 if with_prompt else None
    net = random_dit(process.vocab_size, rng)
    loss = loss_of(net, process, x_0, seeded(1), t=t, free=free)
    x_t = process.corrupt(x_0, t, seeded(1), free)
    exact = dense_loss(process, net, x_0, x_t, t, free)
    assert 0 < (x_t == x_0).sum() < B * L and exact > 0.1
    assert_same([loss], [exact])
    assert_same(gradients(loss, net), gradients(exact, net))


@pytest.mark.parametrize("with_prompt", [False, True])
def test_soft_duo_loss_is_the_dense_nelbo(with_prompt, rng):
    """The curriculum: the network reads softmax(w / tau), the NELBO is taken at argmax(w) on the
    Gaussian clock."""
    x_0, t = texts_and_times(rng)
    free = torch.rand(B, L, generator=rng) < 0.6 if with_prompt else None
    net = random_dit(K, rng)
    loss = duo_loss(net, UNIFORM, x_0, seeded(1), soft=True, t=t, free=free)
    _, _, alpha, dalpha = UNIFORM.gaussian(t)
    x_in, z = UNIFORM.gaussian.soft_corrupt(x_0, t, seeded(1), free)
    log_f = net(x_in, -alpha.log()).log_softmax(-1)
    one_hot = F.one_hot(x_0, K).double()
    nelbo = oracle.uniform_nelbo(log_f, one_hot, z, alpha, dalpha)
    exact = nelbo.mean() if free is None else nelbo[free].mean()
    assert 0 < (z == x_0).sum() < B * L
    assert_same([loss], [exact])
    assert_same(gradients(loss, net), gradients(exact, net))


@pytest.mark.parametrize("with_prompt", [False, True])
def test_dcd_loss_is_the_dense_kl(with_prompt, rng):
    """KL(student(z_t) || teacher(z_s)) at s = t - delta >= 0, each at the sigma of its own time; no
    gradient to the teacher."""
    delta = 0.25
    x_0, t = texts_and_times(rng)
    t[0] = 0.1
    free = torch.rand(B, L, generator=rng) < 0.6 if with_prompt else None
    student = random_dit(K, rng)
    frozen = random_dit(K, rng)
    loss = dcd_loss(student, frozen, UNIFORM, x_0, delta, seeded(1), t=t, free=free)
    s = (t - delta).clamp(min=0)
    z_t, z_s = UNIFORM.gaussian.shared_argmax(x_0, (t, s), seeded(1), free)
    log_p = student(z_t, -UNIFORM.gaussian(t)[2].log()).log_softmax(-1)
    log_q = frozen(z_s, -UNIFORM.gaussian(s)[2].log()).log_softmax(-1).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    exact = kl.mean() if free is None else kl[free].mean()
    assert exact > 0.01 and s[0] == 0
    assert_same([loss], [exact])
    assert_same(gradients(loss, student), gradients(exact, student))
    loss.backward()
    assert all(p.grad is None for p in frozen.parameters())


def test_dcd_loss_of_equal_networks_is_0(rng):
    """With delta 0 both read the same text."""
    x_0, _ = texts_and_times(rng)
    net = random_dit(K, rng)
    assert dcd_loss(net, net, UNIFORM, x_0, 0.0, seeded(1)) == 0
    assert dcd_loss(net, net, UNIFORM, x_0, 0.5, seeded(1)) > 1e-3


LOSSES = {
    "mdlm": (MASKED, mdlm_loss),
    "duo": (UNIFORM, duo_loss),
    "soft duo": (UNIFORM, lambda *args, **more: duo_loss(*args, soft=True, **more)),
    "dcd": (UNIFORM, lambda net, process, x_0, rng, **more: dcd_loss(
        net, random_dit(K, seeded(9)), process, x_0, 0.25, rng, **more)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_times_are_drawn_if_not_given(name, rng):
    """Without t: stratified, one a text, the first draw of the rng."""
    process, loss_of = LOSSES[name]
    x_0 = torch.randint(K, (B, L), generator=rng)
    net = random_dit(process.vocab_size, rng)
    after = seeded(1)
    t = stratified_times(B, after)
    assert torch.equal(loss_of(net, process, x_0, seeded(1)),
                       loss_of(net, process, x_0, after, t=t))


# ---- a given prompt -----------------------------------------------------------------------------

@pytest.mark.parametrize("name", LOSSES)
def test_all_free_is_no_prompt(name, rng):
    """free=all True equals free=None bit for bit, in value and gradient."""
    process, loss_of = LOSSES[name]
    x_0, t = texts_and_times(rng)
    net = random_dit(process.vocab_size, rng)
    plain = loss_of(net, process, x_0, seeded(1), t=t)
    free = torch.ones(B, L, dtype=torch.bool)
    prompted = loss_of(net, process, x_0, seeded(1), t=t, free=free)
    assert torch.equal(plain, prompted)
    for a, b in zip(gradients(plain, net), gradients(prompted, net)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_given_positions_have_no_noise_and_no_gradient(name, rng):
    """The network reads the given tokens, and no row of theirs carries loss. Other given tokens
    with a network that sees one position at a time: the same loss."""
    process, loss_of = LOSSES[name]
    x_0, _ = texts_and_times(rng)
    t = torch.full((B,), 0.9, **f64)
    free = torch.rand(B, L, generator=rng) < 0.5
    net = Recorded(random_dit(process.vocab_size, rng))
    loss = loss_of(net, process, x_0, rng, t=t, free=free)
    x_t, _ = net.seen[0]
    z = x_t[1][..., 0] if isinstance(x_t, tuple) else x_t
    assert torch.equal(z[~free], x_0[~free]) and not torch.equal(z[free], x_0[free])
    if isinstance(x_t, tuple):
        assert (x_t[0][~free][:, 0] == 1).all()
    gradient, = torch.autograd.grad(loss, net.hidden_states[0])
    moved = (gradient != 0).any(-1)
    counts = free & (z == MASK) if process is MASKED else free
    assert torch.equal(moved, counts) and moved.any()


@pytest.mark.parametrize("process, loss_of, times", [
    (Masked(3), mdlm_loss, oracle.nodes(3)), (Uniform(3), duo_loss, oracle.nodes(40, power=4))])
def test_the_conditional_nelbo_by_enumeration(process, loss_of, times, rng, monkeypatch):
    """V = 3, a prompt of one token and an answer of two: for every text, the loss averaged over
    all noised answers and all times is -log p(answer | prompt) less the KL that the noisy end
    keeps, KL(q(x_1 | answer) || p_1(x_1 | prompt)), when the network is the best denoiser given the
    prompt. The loss itself is called on every (text, noised answer), and gives a value a token."""
    K, V = process.K, process.vocab_size
    laws = torch.stack([oracle.random_law(K * K, rng) for _ in range(K)])          # p(. | prompt)
    answers = oracle.texts(K, 2)
    noised = oracle.texts(V, 2)
    one = torch.ones(1, **f64)
    S, N = len(answers), len(noised)
    all_answers = answers[:, None].expand(S, N, 2).flatten(0, 1)
    all_noised = noised.expand(S, N, 2).flatten(0, 1)
    free = torch.tensor([False, True, True]).expand(S * N, 3)
    values = []
    per_row = teacher.per_row

    def recorded(*args, **more):
        values.append(per_row(*args, **more))
        return values[-1]

    monkeypatch.setattr(teacher, "per_row", recorded)
    for prompt in range(K):
        given = torch.full((S * N, 1), prompt)
        x_0 = torch.cat([given, all_answers], 1)
        x_t = torch.cat([given, all_noised], 1)
        bound = torch.zeros(S, **f64)
        for t, weight in times:
            rows = oracle.best_denoiser(process, t, laws[prompt], 2)               # (V^2, 2, K)
            logits = torch.zeros(V, N, 3, V, **f64)
            logits[prompt, :, 1:, :K] = rows.log()
            net = oracle.Table(logits.flatten(0, 1), V)
            monkeypatch.setattr(process, "corrupt", lambda *args: x_t, raising=False)
            loss = loss_of(net, process, x_0, rng, t=t.expand(S * N), free=free)
            each = torch.zeros(S * N, 3, **f64)
            each[free & (x_t == process.K) if V > K else free] = values[-1]
            torch.testing.assert_close(loss, each.sum() / (2 * S * N))
            likelihood = oracle.product(oracle.factors(process, t, 2), torch.ones(S, N, **f64))
            bound += weight * (likelihood * each.sum(-1).view(S, N)).sum(1)
        end = oracle.product(oracle.factors(process, one, 2), torch.ones(S, N, **f64))
        kl = (end * (end / oracle.noised(process, one, laws[prompt], 2)).log()
              ).nan_to_num().sum(1)
        assert (bound - (-laws[prompt].log() - kl)).abs().max() < 1e-8


# ---- what the uniform loss is minimal at --------------------------------------------------------

def test_the_uniform_minimiser_leaves_the_own_token_out(rng):
    """Two tokens, the expected loss over all texts and noised texts: its gradient in the logits is
    0 at p(x_0^l | x_t without position l), and not at p(x_0^l | x_t)."""
    process = Uniform(3)
    t = torch.tensor([0.6], **f64)
    law = oracle.random_law(9, rng)
    alpha, dalpha = process.alpha(t)
    texts = oracle.texts(3, 2)
    likelihood = oracle.product(oracle.factors(process, t, 2), torch.ones(9, 9, **f64))
    joint = law[:, None] * likelihood                      # x_0, x_t

    def slope(rows):
        logits = rows.log().requires_grad_()
        nelbo = teacher.one_hot_nelbo(
            logits.expand(9, 9, 2, 3).flatten(0, 2),
            x=texts[:, None].expand(9, 9, 2).flatten(),
            z=texts.expand(9, 9, 2).flatten(),
            a=alpha.expand(162)[:, None], dalpha=dalpha.expand(162)[:, None], K=3)
        loss = (joint[..., None] * nelbo.view(9, 9, 2)).sum()
        return torch.autograd.grad(loss, logits)[0].abs().max()

    full = torch.stack([torch.stack([joint[texts[:, l] == v].sum(0) for v in range(3)], -1)
                        for l in range(2)], 1)
    full = full / full.sum(-1, keepdim=True)
    assert slope(oracle.best_denoiser(process, t, law, 2)) < 1e-12
    assert slope(full) > 1e-3


@pytest.mark.parametrize("K, t", [(83, 1e-3), (83, 1.0), (50_257, 1e-3), (50_257, 1.0)])
def test_uniform_loss_in_float32(K, t):
    """Within 5e-5 of float64, and of 1e-5 + 3e-7 / alpha: K terms of size alpha and error 6e-8 are
    summed and divided by K alpha, which leaves 1e-4 nats of noise at t = 1, alpha = 1e-3."""
    rng = seeded(26)
    N = 16
    x = torch.randint(K, (N,), generator=rng)
    z = torch.where(torch.arange(N) % 2 == 0, x, torch.randint(K, (N,), generator=rng))
    logits = torch.randn(N, K, generator=rng)
    logits[torch.arange(N), x] += 12
    alpha, dalpha = Uniform.alpha(torch.tensor([t]).expand(N)[:, None])
    found = teacher.one_hot_nelbo(logits, x, z, alpha, dalpha, K)
    exact = teacher.one_hot_nelbo(logits.double(), x, z, alpha.double(), dalpha.double(), K)
    for half in (slice(0, None, 2), slice(1, None, 2)):    # z = x; z elsewhere
        error = (found - exact)[half].abs().max()
        assert error < 5e-5 * exact[half].abs().max() + 1e-5 + 3e-7 / alpha[0]
