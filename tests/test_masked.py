"""The masked process and its losses against the formulas on paper, written out densely in float64.

tests/test_theorem.py asks whether the formulas are right; this file, whether the code computes
them: gathered positions, chunks, detached networks, float32 where it is used.

Run: python -m pytest tests/test_masked.py
"""
import pytest
import torch
import torch.nn.functional as F

import idlm_loss
from generator import draw, draw_latent, greedy_end, uniform_step
from idlm_loss import (masked_fake_loss, masked_gap, masked_generator_loss, per_row,
                       renoise_masked, soft_cross_entropy)
from model import DiT, ModelConfig
from teacher import EPS, Masked, hard_nelbo, kl, mdlm_loss, stratified_times

K, B, L = 7, 5, 6
PROCESS = Masked(K + 1)
MASK = PROCESS.mask_id


def random_dit(rng, latent_dim=0):
    """A float64 network with every parameter random: a new one predicts the flat distribution."""
    net = DiT(ModelConfig(vocab_size=K + 1, num_layers=2, num_heads=2, width=16, cond_dim=8,
                          latent_dim=latent_dim)).double()
    for p in net.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net


class Recorded:
    """A network that remembers what it was shown."""

    def __init__(self, net):
        self.net, self.project, self.seen = net, net.project, []

    def hidden(self, x, *rest):
        self.seen.append(x.clone())
        return self.net.hidden(x, *rest)


class Logits:
    """A network whose hidden states are given logits, whatever it is shown."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, x, *_):
        return self.logits

    def project(self, rows):
        return rows


def set_up(rng, latent_dim=0):
    """Networks, and one draw of everything an update needs: texts with positions of all four kinds
    (masked or visible in x_tilde, masked or visible in x_t). The fake is told another sigma."""
    generator, fake, teacher = random_dit(rng, latent_dim), random_dit(rng), random_dit(rng)
    x_0 = torch.randint(K, (B, L), generator=rng)
    t_tilde, t = (0.2 + 0.6 * torch.rand(B, generator=rng, dtype=torch.float64) for _ in range(2))
    t_tilde[0] = 1.0 if latent_dim else t_tilde[0]         # z is where all is [MASK]
    eps = draw_latent(generator, PROCESS, x_0, t_tilde, rng)
    is_masked = PROCESS.draw_mask(t, L, rng)
    kinds = {(a.item(), b.item()) for a, b in zip((eps.x == MASK).flatten(), is_masked.flatten())}
    assert len(kinds) == 4
    return generator, fake, teacher, eps, is_masked, PROCESS.weight(t), t_tilde


def dense_rows(generator, eps):                            # G: (B, L, K), one-hot where visible
    one_hot = F.one_hot(eps.x.clamp(max=K - 1), K).double()
    G = generator(*eps)[..., :K].softmax(-1)
    return torch.where((eps.x == MASK)[..., None], G, one_hot)


def dense_nelbo(net, x_t, sigma, G, weight):               # (B, L): nats per token, summed by hand
    log_f = net(x_t, sigma)[..., :K].log_softmax(-1)
    return -(G * log_f).sum(-1) * weight[:, None] * (x_t == MASK)


def gradients(loss, net):
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, net.parameters())]


def assert_same(ours, theirs):                             # 1e-10 of each tensor's largest entry
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1e-12)


# ---- gathered and chunked = dense ---------------------------------------------------------------

chunked = pytest.mark.parametrize("chunk", [2 ** 27, 3 * K, 1])


@chunked
def test_fake_loss_is_the_dense_formula(chunk, rng, monkeypatch):
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", chunk)
    generator, fake, _, eps, is_masked, weight, sigma = set_up(rng, latent_dim=3)
    shown = Recorded(fake)
    loss = masked_fake_loss(generator, shown, eps, is_masked, weight, sigma, MASK, rng)
    G = dense_rows(generator, eps).detach()
    dense = dense_nelbo(fake, shown.seen[0], sigma, G, weight).mean()
    assert_same([loss], [dense])
    assert_same(gradients(loss, fake), gradients(dense, fake))


@pytest.mark.parametrize("chunk, beta", [(2 ** 27, 1.0), (3 * K, 1.0), (1, 1.0), (3 * K, 1.2),
                                         (2 ** 27, "a text"), (3 * K, "a text")])
def test_generator_loss_is_the_dense_formula(chunk, beta, rng, monkeypatch):
    """The value is the dense gap at positions masked in x_tilde too, the gradient that of all of
    it: where x_tilde is visible G is constant. beta counts the fake's part, a number or one for
    each text."""
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", chunk)
    generator, fake, teacher, eps, is_masked, weight, sigma_fake = set_up(rng, latent_dim=3)
    sigma, shown = torch.zeros(B), Recorded(fake)
    beta = 1 + torch.arange(B) / 4 if beta == "a text" else beta
    loss = masked_generator_loss(generator, shown, teacher, eps, is_masked, weight, sigma_fake,
                                 sigma, MASK, rng, beta=beta)
    x_t, G = shown.seen[0], dense_rows(generator, eps)
    beta = beta[:, None] if torch.is_tensor(beta) else beta
    gap = (dense_nelbo(teacher, x_t, sigma, G, weight)
           - beta * dense_nelbo(fake, x_t, sigma_fake, G, weight))
    assert_same([loss], [gap[eps.x == MASK].sum() / (B * L)])
    expected = gradients(gap.mean(), generator)
    assert_same(gradients(loss, generator), expected)
    assert all(g.abs().max() > 1e-4 for g in expected)     # every parameter takes part


@chunked
def test_mdlm_loss_is_the_dense_formula(chunk, rng, monkeypatch):
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", chunk)
    net, x_0 = random_dit(rng), torch.randint(K, (B, L), generator=rng)
    t = 0.1 + 0.8 * torch.rand(B, generator=rng, dtype=torch.float64)
    shown = Recorded(net)
    loss = mdlm_loss(shown, PROCESS, x_0, rng, t)
    x_t, one_hot = shown.seen[0], F.one_hot(x_0, K).double()
    dense = dense_nelbo(net, x_t, torch.zeros(B), one_hot, 1 / t).mean()
    assert 0 < (x_t == MASK).sum() < B * L and (x_t == x_0)[x_t != MASK].all()
    assert_same([loss], [dense])
    assert_same(gradients(loss, net), gradients(dense, net))
    log_probs = PROCESS.log_probs(net(x_t, torch.zeros(B)), x_t)
    assert_same([PROCESS.nelbo(log_probs, one_hot, x_t, t).mean()], [dense])


def test_chunks_are_recomputed_and_change_nothing(rng, monkeypatch):
    """per_row over every size: kept whole, one chunk recomputed, several, and no rows; scalars and
    row arguments reach every chunk."""
    net = Logits(None)
    w = torch.randn(4, K, generator=rng, dtype=torch.float64).requires_grad_()
    h, calls = torch.randn(10, 4, generator=rng, dtype=torch.float64), []
    net.project = lambda rows: rows @ w
    shift = torch.randn(10, generator=rng, dtype=torch.float64)

    def formula(logits, shift, factor):
        calls.append(len(logits))
        return factor * logits.logsumexp(-1) + shift

    dense = 3.0 * (h @ w).logsumexp(-1) + shift
    expected = torch.autograd.grad(dense.sum(), w, retain_graph=True)[0]
    for chunk, keep, sizes in ((2 ** 26, 2 ** 22, [10]), (2 ** 26, 0, [10, 10]),
                               (4 * K, 2 ** 22, [3, 3, 4] * 2)):
        monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(idlm_loss, "KEEP_ELEMENTS", keep)
        calls.clear()
        out = per_row(formula, K, (net,), h, shift, 3.0)
        gradient = torch.autograd.grad(out.sum(), w)[0]
        torch.testing.assert_close(out, dense, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)
        assert sorted(calls) == sorted(sizes)              # forward, then again for the backward
    assert per_row(formula, K, (net,), h[:0], shift[:0], 3.0).shape == (0,)


def test_compiled_rows_are_the_eager_rows(rng, monkeypatch):
    """COMPILE takes larger chunks and marks their length as varying: value and gradient stay the
    same, kept or recomputed, and other numbers of rows compile nothing new."""
    w = torch.randn(8, 8, generator=rng, dtype=torch.float64).requires_grad_()
    nets = [Logits(None) for _ in range(3)]
    nets[0].project = lambda h: h @ w
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", 2 * 8)
    monkeypatch.setattr(idlm_loss, "COMPILED_CHUNKS", 3)
    graphs, found = [], {}
    run = torch.compile(idlm_loss.on_logits, dynamic=False,
                        backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(idlm_loss, "compiled", lambda f: run)
    for n, keep in ((13, 2 ** 31), (4, 2 ** 31), (11, 0), (6, 0)):
        monkeypatch.setattr(idlm_loss, "KEEP_COMPILED", keep)
        logits = torch.randn(3, n, 8, generator=rng, dtype=torch.float64)
        for compile_ in (False, True):
            monkeypatch.setattr(idlm_loss, "COMPILE", compile_)
            loss = per_row(masked_gap, 8, nets, *logits)
            found[compile_] = loss.detach(), torch.autograd.grad(loss.sum(), w)[0]
        assert_same(found[True], found[False])
    assert len(graphs) == 1


@pytest.mark.parametrize("formula, nets", [
    (idlm_loss.cross_entropy, 1), (idlm_loss.uniform_nelbo, 2), (idlm_loss.hard_gap, 3),
    (idlm_loss.weighing(idlm_loss.hard_gap), 3), (hard_nelbo, 1)])
def test_compiled_formulas_are_the_eager_ones(formula, nets, rng):
    """A compiled formula takes one word of a row by comparison, an eager one by `gather`."""
    logits = torch.randn(nets, 6, 9, generator=rng, dtype=torch.float64).requires_grad_()
    words = torch.randint(9, (2, 6), generator=rng)
    a = torch.rand(6, 1, generator=rng, dtype=torch.float64)
    others = {idlm_loss.cross_entropy: words[:1], hard_nelbo: (*words, a, -a),
              idlm_loss.weighing(idlm_loss.hard_gap): (words[0], a, -a, words[1], 9 * a)}.get(
        formula, (words[0], a, -a))
    compiled = torch.compile(formula, backend="aot_eager")
    found, expected = compiled(*logits, *others), formula(*logits, *others)
    assert_same([found], [expected])
    assert_same(torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), logits))


class Wide:
    """48 logits a row, of which the first 41 are of words: compiled rows are not cut to them."""

    def __init__(self, w):
        self.w = w

    def project(self, h):
        return h @ self.w


def row_formulas():
    """name: (formula, number of networks, other arguments) for 6 rows of 41 words"""
    rng, K = torch.Generator().manual_seed(3), 41
    x, z, own = torch.randint(K, (3, 6), generator=rng)
    a, u, v = torch.rand(3, 6, generator=rng, dtype=torch.float64)
    a = a[:, None]
    nelbo = z, a, -a, K
    xi = torch.randn(6, K, generator=rng, dtype=torch.float64)
    return {
        "cross_entropy": (idlm_loss.cross_entropy, 1, (x,)),
        "soft_cross_entropy": (idlm_loss.soft_cross_entropy, 2, ()),
        "masked_gap": (masked_gap, 3, (1.1,)), "kl": (kl, 2, ()),
        "uniform_nelbo": (idlm_loss.uniform_nelbo, 2, nelbo),
        "hard_gap": (idlm_loss.hard_gap, 3, nelbo),
        "marginal_gap": (idlm_loss.marginal_gap, 3, (*nelbo[:3], 1.1 + 0 * a, K)),
        "weighed": (idlm_loss.weighing(idlm_loss.hard_gap), 3, (*nelbo, own, 9 * a)),
        "weighed_fake": (idlm_loss.weighing(idlm_loss.uniform_nelbo, 1), 2, (*nelbo, own, 9 * a)),
        "hard_nelbo": (hard_nelbo, 1, (x, *nelbo)),
        "sample_categorical": (idlm_loss.sample_categorical, 1, (u,)),
        "draw": (draw, 1, (u, torch.tensor(0.7), 0.8)),
        "uniform_step": (uniform_step, 1, (z, u, v, torch.tensor(0.3), torch.tensor(0.6),
                                           torch.tensor(0.7), 1.0, K)),
        "greedy_end": (greedy_end, 1, (z, torch.tensor(0.3), False, torch.tensor(0.7), 1.0, K)),
        "noisy_top": (idlm_loss.noisy_top, 1, (xi, a, 1 - a, 5)),
        "state_weights": (idlm_loss.state_weights, 1, (x[:, None], xi[:, :1], a, 1e-1)),
    }


@pytest.mark.parametrize("name", row_formulas())
def test_rows_longer_than_the_vocabulary(name, rng):
    """Compiled rows keep their 48 entries, eager ones are cut to the 41 words: the same values and
    gradients, by every formula, however likely the other 7 seem."""
    formula, n, others = row_formulas()[name]
    weights = [torch.randn(5, 48, generator=rng, dtype=torch.float64) for _ in range(n)]
    for w in weights:
        w[:, 41:] += 5
        w.requires_grad_()
    nets, h = [*map(Wide, weights)], [torch.randn(6, 5, generator=rng, dtype=torch.float64)] * n
    widths = []

    def formula_and_width(*args):
        widths.append(args[0].shape[1])
        return formula(*args)

    torch._dynamo.reset()
    run = torch.compile(idlm_loss.on_logits, backend="aot_eager")
    found = run(formula_and_width, 41, nets, *h, *others)
    expected = idlm_loss.on_logits(formula_and_width, 41, nets, *h, *others)
    assert set(widths) == {48, 41}
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    for one, two in zip(found, expected, strict=True):
        if not one.is_floating_point():
            assert torch.equal(one, two)
            continue
        assert_same([one], [two])
        if one.requires_grad:
            assert_same(torch.autograd.grad(one.sum(), weights, retain_graph=True),
                        torch.autograd.grad(two.sum(), weights, retain_graph=True))


@pytest.mark.parametrize("x_tilde, masked",
                         [("visible", True), ("visible", False), ("mask", False)])
def test_an_update_without_a_position_that_counts(x_tilde, masked, rng):
    """Nothing masked in both: the generator's loss is 0 with a zero gradient, not an error."""
    generator, fake, teacher, eps, is_masked, weight, sigma = set_up(rng)
    x = torch.full((B, L), MASK) if x_tilde == "mask" else torch.randint(K, (B, L), generator=rng)
    eps, is_masked = eps._replace(x=x), torch.full((B, L), masked)
    loss = masked_generator_loss(generator, fake, teacher, eps, is_masked, weight, sigma, sigma,
                                 MASK, rng)
    assert loss.item() == 0 and all((g == 0).all() for g in gradients(loss, generator))
    loss = masked_fake_loss(generator, fake, eps, is_masked, weight, sigma, MASK, rng)
    assert (loss.item() > 0) == masked
    loss.backward()


# ---- the generator's gradient -------------------------------------------------------------------

def test_gradient_in_the_logits(rng):
    """-weight * G * (a - <G, a>) with a = log f* - log f at positions masked twice, else 0."""
    logits = [torch.randn(B, L, K + 1, generator=rng, dtype=torch.float64) for _ in range(3)]
    logits_g = logits[0].requires_grad_()
    was_masked, is_masked = torch.rand(2, B, L, generator=rng) < 0.6
    x_tilde = torch.randint(K, (B, L), generator=rng).masked_fill(was_masked, MASK)
    weight = 1 + torch.rand(B, generator=rng, dtype=torch.float64)
    masked_generator_loss(*map(Logits, logits), (x_tilde, None), is_masked, weight, None, None,
                          MASK, rng).backward()
    G, log_f, log_t = (x.detach()[..., :K].log_softmax(-1) for x in logits)
    G, a = G.exp(), log_t - log_f
    expected = -weight[:, None, None] * G * (a - (G * a).sum(-1, keepdim=True)) / (B * L)
    expected = expected * (was_masked & is_masked)[..., None]
    torch.testing.assert_close(logits_g.grad[..., :K], expected, rtol=1e-10, atol=1e-15)
    assert (logits_g.grad[..., K] == 0).all()              # [MASK] is never predicted
    assert (expected != 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_teacher_equal_to_fake_gives_exactly_nothing(dtype, rng):
    generator, _, teacher, eps, is_masked, weight, sigma = set_up(rng)
    generator, teacher = generator.to(dtype), teacher.to(dtype)
    loss = masked_generator_loss(generator, teacher, teacher, eps, is_masked, weight.to(dtype),
                                 sigma, sigma, MASK, rng)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, generator))


@chunked
def test_each_step_gives_gradient_to_its_own_network_alone(chunk, rng, monkeypatch):
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", chunk)
    generator, fake, teacher, eps, is_masked, weight, sigma = set_up(rng, latent_dim=3)

    def touched():
        nets = (generator, fake, teacher)
        found = [any(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
                 for net in nets]
        for net in nets:
            net.zero_grad(set_to_none=True)
        return found

    masked_generator_loss(generator, fake, teacher, eps, is_masked, weight, sigma, sigma, MASK,
                          rng).backward()
    assert touched() == [True, False, False]
    masked_fake_loss(generator, fake, eps, is_masked, weight, sigma, MASK, rng).backward()
    assert touched() == [False, True, False]


def test_networks_that_take_no_gradient_build_no_graph(rng):
    """Only the learner's hidden states are differentiable: the others' would cost memory."""
    generator, fake, teacher, eps, is_masked, weight, sigma = set_up(rng)
    graphs = {}
    for name, net in (("generator", generator), ("fake", fake), ("teacher", teacher)):
        def hidden(*args, name=name, hidden=net.hidden):
            h = hidden(*args)
            graphs[name] = h.requires_grad
            return h
        net.hidden = hidden
    masked_generator_loss(generator, fake, teacher, eps, is_masked, weight, sigma, sigma, MASK, rng)
    assert graphs == {"generator": True, "fake": False, "teacher": False}
    graphs.clear()
    masked_fake_loss(generator, fake, eps, is_masked, weight, sigma, MASK, rng)
    assert graphs == {"generator": False, "fake": True}


def test_half_precision_logits_are_raised_to_float32(rng):
    """A flat f gives log K whatever G, if G's rows sum to 1; summed in bfloat16 they do not. And
    two nearly equal networks must not show a gap of rounding: masked_gap(g, f, f) is 0."""
    g = (3 * torch.randn(20, 5000, generator=rng)).bfloat16()
    loss = soft_cross_entropy(torch.zeros_like(g), g)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((20,), 5000.0).log(), rtol=1e-6, atol=0)
    assert (masked_gap(g, g, g) == 0).all()


# ---- noising ------------------------------------------------------------------------------------

def test_renoising_keeps_masks_and_draws_from_the_generator(rng):
    """x_t: [MASK] where is_masked, else the visible token, else a word of frequency G. 4 positions
    with rows of their own, 20,000 texts: chi-square over words and positions, 4 * 6 degrees of
    freedom, p > 1e-5 (false alarm 1e-5)."""
    n, length = 20_000, 4
    rows = torch.randn(length, K + 1, generator=rng, dtype=torch.float64)
    was_masked, is_masked = torch.rand(2, n, length, generator=rng) < 0.5
    x_tilde = torch.randint(K, (n, length), generator=rng).masked_fill(was_masked, MASK)
    x_t = renoise_masked(Logits(None), rows.expand(n, -1, -1), x_tilde, is_masked, MASK, rng)
    assert (x_t[is_masked] == MASK).all() and (x_t[~is_masked] < K).all()
    assert torch.equal(x_t[~is_masked & ~was_masked], x_tilde[~is_masked & ~was_masked])
    drawn, chi = was_masked & ~is_masked, 0
    for l in range(length):
        observed = torch.bincount(x_t[:, l][drawn[:, l]], minlength=K)
        expected = drawn[:, l].sum() * rows[l, :K].softmax(-1)
        assert expected.min() > 20                         # enough for the chi-square law
        chi += ((observed - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor(12.0), chi / 2) > 1e-5


def test_mask_rate(rng):
    """Each position with probability 1 - alpha_t, whatever its row and column: 400,000 draws at
    each of five times within 5 standard deviations, columns and a pair of them within 5 of
    theirs (10 comparisons, false alarm 6e-6)."""
    for t in (EPS, 0.1, 0.5, 0.9, 1.0):
        n, length, p = 100_000, 4, (1 - EPS) * t
        masked = PROCESS.draw_mask(torch.full((n,), t), length, rng).double()
        assert abs(masked.mean() - p) < 5 * (p * (1 - p) / n / length) ** 0.5
        if t == 0.5:
            assert (masked.mean(0) - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
            pair = (masked[:, 0] * masked[:, 1]).mean()    # independent of each other
            assert abs(pair - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5
    x_0 = torch.randint(K, (100, L), generator=rng)
    x_t = PROCESS.corrupt(x_0, torch.full((100,), 0.5), rng)
    assert ((x_t == MASK) | (x_t == x_0)).all() and (x_t == MASK).any() and (x_t == x_0).any()
    steps = PROCESS.draw_mask(torch.tensor([EPS, 1.0]), 4000, rng)     # a row each
    assert steps[0].double().mean() < 0.1 and steps[1].double().mean() > 0.9


def test_stratified_times(rng):
    """One time in each of B equal slices of [t_min, 1], spread over its slice."""
    for t_min in (EPS, 0.25):
        t = torch.stack([stratified_times(8, rng, t_min) for _ in range(200)]).double()
        place = (t - t_min) / (1 - t_min) * 8 - torch.arange(8)
        assert place.min() > -1e-5 and place.max() < 1 + 1e-5
        assert place.min() < 0.05 and place.max() > 0.95   # 1,600 draws: odds of failing 1e-35
    assert t.min() >= 0.25 and t.max() < 1 + 1e-6


def test_weight_is_minus_the_log_derivative(rng):
    """-dalpha_t / (1 - alpha_t) = 1 / t on the log-linear schedule, and dalpha_t is the slope."""
    t = (EPS + (1 - EPS) * torch.rand(100, generator=rng, dtype=torch.float64)).requires_grad_()
    alpha, dalpha = PROCESS.alpha(t)
    torch.testing.assert_close(torch.autograd.grad(alpha.sum(), t)[0], dalpha)
    torch.testing.assert_close(PROCESS.weight(t), 1 / t, rtol=1e-9, atol=0)
    assert PROCESS.alpha(torch.tensor([0.0, 1.0]).double())[0].tolist() == [1, pytest.approx(EPS)]
    t = t.detach().float()                                 # what training uses
    torch.testing.assert_close(PROCESS.weight(t), 1 / t, rtol=1e-4, atol=0)
    assert (PROCESS.sigma(t) == 0).all()


# ---- SUBS and the dense NELBO -------------------------------------------------------------------

def test_subs(rng):
    """[MASK] has no column, rows are normalised, visible tokens are copied with certainty."""
    logits = torch.randn(B, L, K + 1, generator=rng)
    logits[..., MASK] = 50
    x_t = torch.randint(K + 1, (B, L), generator=rng)
    before = logits.clone()
    log_probs = PROCESS.log_probs(logits, x_t)
    assert torch.equal(logits, before) and log_probs.shape == (B, L, K)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(B, L))
    visible = x_t != MASK
    assert visible.any() and (~visible).any()
    assert torch.equal(log_probs[visible].exp(), F.one_hot(x_t[visible], K).float())
    torch.testing.assert_close(log_probs[~visible], logits[~visible][:, :K].log_softmax(-1))
    assert PROCESS.log_probs(logits.bfloat16(), x_t).dtype == torch.float32


def test_nelbo_of_soft_targets(rng):
    """Visible positions count 0 even where the target does not agree with the visible token (an
    infinite cross-entropy), in value and gradient; impossible words of a target cost nothing."""
    logits = torch.randn(B, L, K + 1, generator=rng, dtype=torch.float64).requires_grad_()
    target = torch.randn(B, L, K, generator=rng, dtype=torch.float64).softmax(-1)
    target[..., 0] = 0
    target.requires_grad_()
    x_t = torch.randint(K + 1, (B, L), generator=rng)
    x_t[0, :2] = MASK
    t = torch.linspace(0.1, 1, B, dtype=torch.float64)
    with torch.no_grad():
        logits[0, 0, 0] = -torch.inf                       # 0 * log 0
    nelbo = PROCESS.nelbo(PROCESS.log_probs(logits, x_t), target, x_t, t)
    kept = torch.tensor([0.0] + [1.0] * (K - 1), dtype=torch.float64)
    log_f = logits.detach()[..., :K].log_softmax(-1).clamp(min=-1e9)
    expected = -(target * kept * log_f).sum(-1) / t[:, None] * (x_t == MASK)
    torch.testing.assert_close(nelbo, expected, rtol=1e-10, atol=1e-14)
    for gradient in torch.autograd.grad(nelbo.sum(), (logits, target)):
        assert gradient.isfinite().all() and (gradient[x_t != MASK] == 0).all()
        assert (gradient[x_t == MASK] != 0).any()
