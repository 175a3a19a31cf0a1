"""The uniform process' losses against dense float64 formulas, finite differences and chunking.

    python -m pytest -q tests/test_uniform_losses.py     # about 5 s on one core

The dense side is written here from the definition (rates of the process, test_uniform.py), with the
code's draws reproduced by seeding the same generator anew.
"""
import itertools

import pytest
import torch
import torch.nn.functional as F

import idlm_loss
from idlm_loss import (hard_gap, is_enough, marginal_gap, soft_fake_loss,
                       soft_generator_loss, soft_state, top_entries, uniform_fake_loss,
                       uniform_generator_loss, uniform_nelbo)
from model import TokenEmbedding
from teacher import Uniform, dcd_loss, duo_loss, hard_nelbo
from test_uniform import Fixed, f64, random_dit, rate_nelbo, seeded

B, L = 2, 3


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def close(found, truth, atol=1e-9):
    """Equal to 1e-9 of the largest entry (or of 1)."""
    return (found - truth).abs().max() <= atol * max(1, truth.abs().max().item())


# ---- top-k instead of the whole vocabulary ------------------------------------------------------

def smallest_safe_k(w, tau):
    """One more than the entries within 25 tau of their row's largest, at most K."""
    near = w.max(-1, keepdim=True).values - w <= 25 * tau
    return min(near.sum(-1).max().item() + 1, w.shape[-1])


def topk_softmax(w, tau, k=16):
    """softmax(w / tau) as its k largest entries, k doubled until it is: as soft_state goes about."""
    while True:
        top, ids = top_entries(w, k := min(k, w.shape[1]))
        if k == w.shape[1] or is_enough(top[:, 0] - top[:, -1], tau):
            return (top / tau).softmax(-1), ids
        k *= 2


@pytest.mark.parametrize("t, enough", [(1e-3, True), (0.2, True), (0.9, True)])
def test_topk_softmax_is_the_dense_one(t, enough):
    """K = 50257, float32, tau = 1e-3: the weights are the dense softmax's, what is left out is
    together less than the rounding of 1 (6e-8), and k is the first of 16, 32, ... that is safe.

    The smallest safe k depends on the spread of the noise. Rows of pure noise, as under a generator
    that is undecided, are the worst case, and worst at the clean end (std 0.13, t = 1e-3).
    """
    K, tau = 50257, 1e-3
    _, std, *_ = Uniform(K).gaussian(torch.tensor([t]))
    w = std * torch.randn(40, K, generator=seeded(0))
    weights, ids = topk_softmax(w, tau)
    dense = (w / tau).softmax(-1)
    safe, k = smallest_safe_k(w, tau), weights.shape[-1]
    assert k >= safe and (k == 16 or k // 2 < safe) and (safe <= 16) == enough
    assert dense.scatter(1, ids, 0).sum(-1).max() < 6e-8
    assert (ids[:, 0] == w.argmax(-1)).all() and (weights.diff(dim=-1) <= 0).all()
    assert torch.allclose(weights, dense.gather(1, ids), rtol=1e-5, atol=1e-9)


def test_ties_raise_k():
    """Rows nearer to each other than 25 tau need every entry, also in one row of many."""
    K, tau = 50, 1e-3
    w = torch.randn(6, K, generator=seeded(1))
    w[:, 7] += 9.0                                          # a clear winner: 16 do
    assert topk_softmax(w, tau)[0].shape == (6, 16)
    w[3] = 1e-5 * torch.arange(K)
    weights, ids = topk_softmax(w, tau)
    assert weights.shape == (6, K)
    found = torch.zeros_like(w).scatter(1, ids, weights)
    assert torch.allclose(found, (w / tau).softmax(-1), rtol=1e-5, atol=1e-9)
    w[3, 20:] -= 1.0                                        # 20 near-equal ones: 32 do, 16 do not
    assert topk_softmax(w, tau)[0].shape == (6, 32)
    w[3] = 0.0249 * (torch.arange(K) > 0)                    # the edge itself counts as near
    assert topk_softmax(-w, tau)[0].shape == (6, K)


def state_noise(seed, *shape, dtype=torch.float64):
    """The noise that soft_state draws over the words, from a seed that its generator gives."""
    inner = torch.randint(2 ** 62, (), generator=seeded(seed)).item()
    return torch.randn(shape, generator=seeded(inner), dtype=dtype)


def dense_state(logits, scale, std, xi, tau):
    """softmax(w / tau) of all words, and argmax(w); logits, xi (B, L, K), scale, std (B,)."""
    w = scale[:, None, None] * logits.softmax(-1) + std[:, None, None] * xi
    return (w / tau).softmax(-1), w.argmax(-1)


@pytest.mark.parametrize("scale, std", [(0.97, 0.23), (0.99, 0.01)])
def test_soft_embedding_in_float32(scale, std):
    """The top-k embedding against the dense product, K = 50257, float32: value, gradient in the
    embedding matrix and, through the state, in the generator's logits.

    G has four words of about 1/4 each. At the clock's own std (alpha 0.5) one word nearly always
    wins by far, and the gradient through the state is next to nothing; at std 0.01 they compete.
    """
    K, tau, n = 50257, 1e-3, 16
    rng = seeded(2)
    logits = torch.randn(1, n, K, generator=rng)
    top = torch.randint(K, (n, 4), generator=rng)
    logits[0].scatter_(1, top, 16 + 0.01 * torch.randn(n, 4, generator=rng))
    logits.requires_grad_()
    embed, direction = TokenEmbedding(K, 8), torch.randn(n, 8, generator=rng)
    scale, std = torch.tensor([scale]), torch.tensor([std])
    (weights, ids), z = soft_state(Fixed(logits), logits, scale, std, K, tau, seeded(3))
    xi = state_noise(3, 1, n, K, dtype=torch.float32)
    dense, z_dense = dense_state(logits, scale, std, xi, tau)
    assert weights.shape[-1] <= 128 and torch.equal(z, z_dense)
    found, truth = embed((weights, ids)), embed(dense)
    assert torch.allclose(found, truth, rtol=0, atol=1e-6)
    found, truth = (grads((e * direction).sum(), embed.embedding, logits) for e in (found, truth))
    assert torch.allclose(found[0], truth[0], rtol=1e-5, atol=1e-5)
    size = truth[1].abs().max()
    if std < 0.1:
        assert size > 1e-3
    assert (found[1] - truth[1]).abs().max() < 1e-4 * size


# ---- the losses against dense formulas ----------------------------------------------------------

class Setting:
    """Networks, draws and schedule of one update in float64; the generator's logits are free."""

    def __init__(self, K, seed=0, std=2.0):
        self.K, self.process = K, Uniform(K)
        self.fake, self.teacher = random_dit(K, seed + 1), random_dit(K, seed + 2)
        rng = seeded(seed)
        self.logits = (std * torch.randn(B, L, K, generator=rng, **f64)).requires_grad_()
        self.generator = Fixed(self.logits)
        self.t = torch.tensor([0.25, 0.7], **f64)
        self.keep, self.noise = self.process.draw_noise(self.t, L, rng)
        self.eps = self.process.prior(B, L, rng), torch.tensor([0.3, 2.0], **f64)   # x_tilde, sigma
        self.keep[:, 0], self.keep[:, 1] = True, False      # both kinds, whatever the draw

    def args(self, soft):
        """What a loss takes after eps, up to the generator of random numbers."""
        if soft:
            scale, std, a, dalpha = self.process.gaussian(self.t)
            return scale, std, a, dalpha, -a.log(), self.K
        a, dalpha = self.process.alpha(self.t)
        return self.keep, self.noise, a, dalpha, -a.log(), self.K

    def columns(self, soft):
        a, dalpha = self.args(soft)[2:4]
        return a[:, None, None], dalpha[:, None, None]

    def G(self, logits, kind):
        """The rows: f = softmax(logits), or if weighed f_u q(x_tilde | u), normalised."""
        x_tilde, a = self.eps[0][..., None], (-self.eps[1]).exp()[:, None, None]
        chance = a * (torch.arange(self.K) == x_tilde) + (1 - a) / self.K
        rows = logits.softmax(-1) * (chance if "weighed" in kind else 1)
        return rows / rows.sum(-1, keepdim=True)

    def hard_state(self, seed, G):
        """z ~ q(. | y): y by inverting the cumulative distribution at the same uniforms."""
        G = G.detach()
        u = torch.zeros(B, L, **f64)
        u[self.keep] = torch.rand(int(self.keep.sum()), generator=seeded(seed), **f64)
        u = u[..., None]
        y = (G.cumsum(-1) <= u).sum(-1)
        return torch.where(self.keep, y, self.noise)

    def soft_state(self, seed, tau, logits=None):
        xi = state_noise(seed, B, L, self.K)
        return dense_state(self.logits if logits is None else logits, *self.args(True)[:2], xi, tau)

    def rows(self, net, x, soft):
        return net(x, self.args(soft)[4]).softmax(-1)


def dense_gap(setting, kind, seed, tau=None, path=True, logits=None):
    """NELBO(f*) - NELBO(f) on G, mean over positions; marginal: summed over the own token z, with
    the rows f, f* that the drawn text gave."""
    logits = setting.logits if logits is None else logits
    G, soft = setting.G(logits, kind), kind == "soft"
    a, dalpha = setting.columns(soft)
    if soft:
        x, z = setting.soft_state(seed, tau, logits)
        x = x if path else x.detach()
    else:
        x = z = setting.hard_state(seed, G)
    f, f_star = (setting.rows(net, x, soft) for net in (setting.fake, setting.teacher))
    gap = lambda z: rate_nelbo(f_star, G, z, a, dalpha) - rate_nelbo(f, G, z, a, dalpha)
    if "marginal" not in kind:
        return gap(z).mean()
    law = a * G + (1 - a) / setting.K
    return sum(law[..., v] * gap(torch.full_like(z, v)) for v in range(setting.K)).mean()


def code_gap(setting, kind, seed, tau=None, generator=None, **more):
    generator = generator or setting.generator
    nets = generator, setting.fake, setting.teacher, setting.eps
    if kind == "soft":
        return soft_generator_loss(*nets, *setting.args(True), seeded(seed), tau=tau, **more)
    gap = {"hard": hard_gap, "marginal": marginal_gap}[kind.partition(":")[0]]
    return uniform_generator_loss(*nets, *setting.args(False), seeded(seed), gap=gap,
                                  weigh="weighed" in kind, **more)


KINDS = [("hard", None, 7), ("hard:weighed", None, 7), ("marginal", None, 7),
         ("marginal:weighed", None, 7), ("soft", 0.5, 7), ("soft", 5e-3, 40)]


@pytest.mark.parametrize("kind, tau, K", KINDS)
def test_generator_gap_and_gradient(kind, tau, K):
    """Value and gradient in G's logits: against the dense formula, and against central differences
    of the code's own value with the draws held fixed (same seed; a step of 1e-6 moves no token)."""
    setting = Setting(K, std=1.0)
    loss = code_gap(setting, kind, 5, tau)
    truth = dense_gap(setting, kind, 5, tau)
    assert abs(truth) > 1e-3 and close(loss, truth, 1e-10)
    found, = grads(loss, setting.logits)
    exact, = grads(truth, setting.logits)
    assert close(found / exact.abs().max(), exact / exact.abs().max(), 1e-8)

    h, flat, numeric = 1e-6, setting.logits.data.view(-1), torch.zeros(B * L * K, **f64)
    with torch.no_grad():
        for i in range(0, len(flat), 1 if K < 10 else 7):
            flat[i] += h
            up = code_gap(setting, kind, 5, tau)
            flat[i] -= 2 * h
            numeric[i] = (up - code_gap(setting, kind, 5, tau)) / (2 * h)
            flat[i] += h
    tested = numeric != 0
    assert tested.sum() > len(flat) // 10
    error = (found.flatten() - numeric)[tested].abs().max()
    assert error < 1e-5 * found.abs().max()


def test_beta_is_a_number_or_one_a_text():
    """The loss is a sum over texts, each linear in its own beta."""
    setting = Setting(7, std=1.0)
    loss = lambda beta: code_gap(setting, "marginal", 5, beta=beta).item()
    ones, eye, beta = torch.ones(B, **f64), torch.eye(B, **f64), torch.linspace(0.9, 1.4, B, **f64)
    slopes = [loss(ones + row) - loss(1) for row in eye]
    assert min(map(abs, slopes)) > 1e-3
    assert abs(loss(ones) - loss(1)) < 1e-12 and abs(loss(1.2 * ones) - loss(1.2)) < 1e-12
    assert abs(loss(beta) - loss(1) - sum(s * (b - 1) for s, b in zip(slopes, beta))) < 1e-10


def test_path_gradient():
    """path_gradient=False: the same value, the gradient of the formula at a constant state; through
    the state it is another (tau 0.5, so that the state moves)."""
    setting = Setting(7, std=1.0)
    loss = code_gap(setting, "soft", 5, 0.5, path_gradient=False)
    assert torch.equal(loss, code_gap(setting, "soft", 5, 0.5))
    found, = grads(loss, setting.logits)
    exact, = grads(dense_gap(setting, "soft", 5, 0.5, path=False), setting.logits)
    whole, = grads(code_gap(setting, "soft", 5, 0.5), setting.logits)
    assert close(found, exact, 1e-10)
    assert (found - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("kind, tau, K", KINDS)
def test_gradient_reaches_the_generator_alone(kind, tau, K):
    """A DiT generator: every parameter gets the dense formula's gradient, teacher and fake none.
    hard, marginal: whatever their requires_grad; soft: with it off, as train.py sets it."""
    setting, generator = Setting(K), random_dit(K, seed=8)
    setting.eps = (setting.process.prior(B, L, seeded(9)), torch.ones(B, **f64))
    for net in (setting.fake, setting.teacher):
        net.requires_grad_(kind != "soft")
    code_gap(setting, kind, 5, tau, generator=generator).backward()
    truth = dense_gap(setting, kind, 5, tau, logits=generator(*setting.eps))
    parameters = list(generator.parameters())
    exact = grads(truth, *parameters)
    assert max(g.abs().max() for g in exact) > 1e-3
    for parameter, g in zip(parameters, exact):
        assert close(parameter.grad, g)
    for net in (setting.fake, setting.teacher):
        assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("kind, tau, K", [*KINDS[:2], *KINDS[4:]])
def test_fake_loss_and_its_gradient(kind, tau, K):
    """NELBO of the fake on the rows G: dense value, dense gradient in the fake, none elsewhere."""
    setting, generator = Setting(K), random_dit(K, seed=8)
    setting.eps = (setting.process.prior(B, L, seeded(9)), torch.ones(B, **f64))
    loss_of, soft = (soft_fake_loss, True) if kind == "soft" else (uniform_fake_loss, False)
    loss = loss_of(generator, setting.fake, setting.eps, *setting.args(soft), seeded(5),
                   **({"tau": tau} if soft else {"weigh": "weighed" in kind}))
    loss.backward()

    logits = generator(*setting.eps).detach()
    if soft:
        x, z = setting.soft_state(5, tau, logits)
    else:
        x = z = setting.hard_state(5, setting.G(logits, kind))
    truth = rate_nelbo(setting.rows(setting.fake, x, soft), setting.G(logits, kind), z,
                       *setting.columns(soft)).mean()
    assert truth > 1e-3 and close(loss, truth, 1e-10)
    parameters = list(setting.fake.parameters())
    for parameter, g in zip(parameters, grads(truth, *parameters)):
        assert close(parameter.grad, g)
    for net in (generator, setting.teacher):
        assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("kind", ["hard", "hard:weighed", "marginal", "soft"])
def test_gap_is_zero_where_fake_is_teacher(kind):
    setting = Setting(7)
    setting.fake.load_state_dict(setting.teacher.state_dict())
    loss = code_gap(setting, kind, 5, 0.05)
    assert loss == 0 and grads(loss, setting.logits)[0].abs().max() < 1e-15


# ---- the teacher's losses -----------------------------------------------------------------------

@pytest.mark.parametrize("soft", [False, True])
def test_duo_loss(soft):
    """Against the dense formula at the same draws: value and gradient. Soft: tau is 1e-3, K 40, the
    network reads all 40 weights on the dense side."""
    K, process, net = 40, Uniform(40), random_dit(40, seed=10)
    x_0 = torch.randint(K, (B, L), generator=seeded(11))
    t = torch.tensor([0.1, 0.8], **f64)
    loss = duo_loss(net, process, x_0, seeded(12), soft=soft, t=t)
    if soft:
        scale, std, a, dalpha = (value[:, None, None] for value in process.gaussian(t))
        (weights, ids), z = process.soft_corrupt(x_0, t, seeded(12))
        x_in = torch.zeros(B, L, K, **f64).scatter(2, ids, weights)
    else:
        a, dalpha = (value[:, None, None] for value in process.alpha(t))
        x_in = z = process.corrupt(x_0, t, seeded(12))
    assert 0 < (z == x_0).sum() < z.numel()
    f = net(x_in, -a[:, 0, 0].log()).softmax(-1)
    truth = rate_nelbo(f, F.one_hot(x_0, K).double().clamp(min=1e-300), z, a, dalpha).mean()
    assert close(loss, truth, 1e-10)
    parameters = list(net.parameters())
    for found, exact in zip(grads(loss, *parameters), grads(truth, *parameters)):
        assert close(found, exact)


def test_duo_loss_draws_its_times():
    """Without t: stratified over [1e-3, 1], so 64 texts differ from 64 at a single time."""
    process, net = Uniform(7), random_dit(7, seed=13)
    x_0 = torch.randint(7, (64, L), generator=seeded(14))
    rng = seeded(15)
    t = 1e-3 + 0.999 * (torch.arange(64) + torch.rand(64, generator=rng)) / 64
    assert torch.equal(duo_loss(net, process, x_0, seeded(15)),
                       duo_loss(net, process, x_0, rng, t=t))


def test_dcd_loss():
    """KL(student(z_t) || teacher(z_s)) of the same draws, each told its own alpha; no gradient to
    the teacher; exactly 0 for student = teacher and delta = 0."""
    K, delta = 7, 0.25
    process, student, teacher = Uniform(K), random_dit(K, seed=16), random_dit(K, seed=17)
    x_0 = torch.randint(K, (B, L), generator=seeded(18))
    t = torch.tensor([0.1, 0.8], **f64)            # the first s would be below 0
    loss = dcd_loss(student, teacher, process, x_0, delta, seeded(19), t=t)
    s = torch.tensor([0.0, 0.55], **f64)
    z_t, z_s = process.shared_argmax(x_0, (t, s), seeded(19))
    p = student(z_t, -process.gaussian(t)[2].log()).softmax(-1)
    q = teacher(z_s, -process.gaussian(s)[2].log()).softmax(-1).detach()
    truth = (p * (p / q).log()).sum(-1).mean()
    assert truth > 0.01 and close(loss, truth, 1e-12)
    parameters = list(student.parameters())
    exact = grads(truth, *parameters)
    loss.backward()
    for parameter, g in zip(parameters, exact):
        assert close(parameter.grad, g)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert dcd_loss(student, student, process, x_0, 0.0, seeded(20)) == 0
    assert dcd_loss(student, student, process, x_0, 0.5, seeded(20)) > 1e-3


# ---- chunks and float32 -------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["hard", "hard:weighed", "marginal", "soft", "fake", "soft fake",
                                  "duo", "soft duo", "dcd"])
def test_chunked_equals_whole(name, monkeypatch):
    """Chunks of 2 of the 6 rows: value and gradients of every loss.

    K = 32: torch fills Gaussians in blocks of 16, so the noise does not depend on the split.
    """
    K = 32
    setting, generator = Setting(K), random_dit(K, seed=8)
    setting.eps = (setting.process.prior(B, L, seeded(9)), torch.ones(B, **f64))
    eps, process, fake = setting.eps, setting.process, setting.fake
    x_0 = process.prior(B, L, seeded(22))
    losses = {
        "fake": lambda: uniform_fake_loss(generator, fake, eps, *setting.args(False), seeded(5)),
        "soft fake": lambda: soft_fake_loss(generator, fake, eps, *setting.args(True), seeded(5)),
        "duo": lambda: duo_loss(fake, process, x_0, seeded(5), t=setting.t),
        "soft duo": lambda: duo_loss(fake, process, x_0, seeded(5), soft=True, t=setting.t),
        "dcd": lambda: dcd_loss(fake, setting.teacher, process, x_0, 0.1, seeded(5), t=setting.t)}
    loss_of = losses.get(name) or (lambda: code_gap(setting, name, 5, 1e-3, generator=generator))
    trained = fake if name in losses else generator
    for net in (generator, fake, setting.teacher):
        net.requires_grad_(net is trained)
    parameters = list(trained.parameters())
    whole = loss_of()
    exact = grads(whole, *parameters)
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", 2 * K)
    chunked = loss_of()
    assert close(chunked, whole, 1e-12) and max(g.abs().max() for g in exact) > 1e-4
    for found, g in zip(grads(chunked, *parameters), exact):
        assert close(found, g)


def test_one_row_of_ties_raises_k_for_all(monkeypatch):
    """Text 0 is far from ties, text 1 is all ties: every row gets all the words, of the same noise
    as at first, and what it does not need carries neither weight nor gradient."""
    K, tau = 32, 1e-3
    logits = torch.randn(B, L, K, generator=seeded(23), **f64)
    logits[0, :, 0] += 6
    logits.requires_grad_()
    scale, std = torch.tensor([.9, 1e-3], **f64), torch.tensor([.05, 1e-3], **f64)
    monkeypatch.setattr(idlm_loss, "CHUNK_ELEMENTS", K)
    (weights, ids), z = soft_state(Fixed(logits), logits, scale, std, K, tau, seeded(24))
    xi = state_noise(24, B, L, K)
    dense, z_dense = dense_state(logits, scale, std, xi, tau)
    assert weights.shape == (B, L, K) and (weights[0, :, 16:] < 1e-20).all()
    assert torch.equal(z, z_dense)
    found = torch.zeros_like(dense).scatter_add(2, ids, weights)
    assert torch.allclose(found, dense, atol=1e-12)
    direction = torch.randn(B, L, K, generator=seeded(25), **f64)
    assert close(*grads((found * direction).sum(), logits),
                 *grads((dense * direction).sum(), logits))


@pytest.mark.parametrize("K, t", list(itertools.product([83, 50257], [1e-3, 0.5, 1.0])))
def test_float32_rows(K, t):
    """The row formulas in float32 over the clock, against the same formulas in float64: within 1e-5
    (K = 83) or 5e-5 of the largest value, and 4e-6 + 3e-7 / alpha: K terms of size alpha and error
    6e-8 are summed and divided by K alpha, which leaves 1e-4 nats of noise at t = 1, alpha = 1e-3.

    (At t = 1e-3, 1 - alpha is 1e-3: fbar as K a f + 1, less a, would be off by 1e-4 for words of no
    mass, and this test fails.)"""
    N, rng, relative = 32, seeded(26), 1e-5 if K == 83 else 5e-5
    x = torch.randint(K, (N,), generator=rng)
    z = torch.where(torch.arange(N) % 2 == 0, x, torch.randint(K, (N,), generator=rng))
    logits = [torch.randn(N, K, generator=rng).scatter_add_(1, x[:, None], torch.full((N, 1), top))
              for top in (15.0, 12.0, 11.0)]
    a, dalpha = (value[:, None].expand(N, 1) for value in Uniform.alpha(torch.tensor([t])))
    for formula, rows, index in (
            (hard_nelbo, logits[1:2], (x, z)), (uniform_nelbo, logits[:2], (z,)),
            (hard_gap, logits, (z,)), (marginal_gap, logits, (z,))):
        found = formula(*rows, *index, a, dalpha)
        truth = formula(*(row.double() for row in rows), *index, a.double(), dalpha.double())
        for half in (slice(0, None, 2), slice(1, None, 2)):           # z = x; z elsewhere
            error, size = (found - truth)[half].abs().max(), truth[half].abs().max()
            assert error < relative * size + 4e-6 + 3e-7 / a[0], (formula.__name__, error, size)
