"""IDLM's losses against their formulas, written out densely in float64.

Run: python -m pytest tests/test_idlm_loss.py

The first part runs train.py's own loop `distil` for one update on tiny networks, and compares every
loss and gradient that it hands to an optimiser with the dense formula at the same draws. The second
part holds each loss by itself: which network gets gradient, the law of the re-noised text, given
prompts. Whether the formulas minimise what the paper says is in test_theorem.py.

    masked   MDLM          hard   uniform, exact noising law          soft   IDLM-Duo as published
"""
import math
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import oracle
import train
from conftest import (ROOT, Fixed, Recorded, assert_law, assert_same, gradients, law_score,
                      random_dit, seeded)
from data import Batch
from generator import draw_latent
from idlm_loss import (masked_fake_loss, masked_gap, masked_generator_loss, noise_masked,
                       noise_uniform, soft_cross_entropy, soft_fake_loss, soft_generator_loss,
                       soft_state, token_bonus, top_entries, uniform_fake_loss, uniform_gap,
                       uniform_generator_loss, uniform_nelbo, weigh_token)
from teacher import Masked, Uniform

K, L = 7, 5
KINDS = "masked", "hard", "soft"
FAKE_LOSS = {"masked": masked_fake_loss, "hard": uniform_fake_loss, "soft": soft_fake_loss}
GENERATOR_LOSS = {"masked": masked_generator_loss, "hard": uniform_generator_loss,
                  "soft": soft_generator_loss}


# ---- the dense formulas -------------------------------------------------------------------------
# Each takes (nets, process, eps, noise, rng): networks by role, the latent, what process.draw_noise
# gave, and the rng of the draws that the loss itself makes.

def invert(G, u):
    """The token at which the cumulative sum of a row passes u: (B, L, K), (B, L) -> (B, L)."""
    return (G.cumsum(-1) <= u[..., None]).sum(-1).clamp(max=G.shape[-1] - 1)


def mean(nelbo, noise):                                    # over the free positions
    return nelbo.mean() if noise["free"] is None else nelbo[noise["free"]].mean()


def masked_rows(generator, eps):
    """G: the generator's softmax over tokens where x_tilde is [MASK], one-hot where visible."""
    softmax = generator(*eps)[..., :K].softmax(-1)
    one_hot = F.one_hot(eps.x.clamp(max=K - 1), K).double()
    return torch.where((eps.x == K)[..., None], softmax, one_hot)


def hard_rows(generator, eps):
    """G_u ~ f_u q(x_tilde | u), normalised, q(v | u) = a [u = v] + (1 - a) / K at t_tilde."""
    a = (-eps.sigma).exp()[:, None, None]
    q = a * F.one_hot(eps.x, K) + (1 - a) / K
    rows = generator(*eps).softmax(-1) * q
    return rows / rows.sum(-1, keepdim=True)


def soft_rows(generator, eps):
    """G: the network's row itself, as published."""
    return generator(*eps).softmax(-1)


ROWS = {"masked": masked_rows, "hard": hard_rows, "soft": soft_rows}


def noised(kind, G, eps, noise, rng, tau):
    """x_t as the networks read it, and the token z of every position."""
    if kind == "soft":
        xi = torch.randn(*G.shape, generator=rng)
        w = noise["scale"][:, None, None] * G + noise["std"][:, None, None] * xi
        rows = (w / tau).softmax(-1)
        if noise["free"] is not None:
            given = F.one_hot(eps.x[1][..., 0], K).double()
            rows = torch.where(noise["free"][..., None], rows, given)
        return (rows, torch.arange(K).expand_as(rows)), rows.argmax(-1)
    y = invert(G.detach(), torch.rand(G.shape[:2], generator=rng))
    if kind == "masked":
        x_t = y.masked_fill(noise["is_masked"], K)
        return x_t, x_t
    z = torch.where(noise["keep"], y, noise["tokens"])
    if noise["free"] is not None:
        z = torch.where(noise["free"], z, eps.x)
    return z, z


def dense_nelbo(kind, net, G, x_t, z, noise):
    """NELBO of a network on the rows G at x_t: (B, L) nats per token."""
    logits = net(x_t, noise["sigma"])
    if kind == "masked":
        log_f = Masked(K + 1).log_probs(logits, x_t)
        return oracle.masked_nelbo(log_f, G, noise["is_masked"], noise["weight"])
    return oracle.uniform_nelbo(logits.log_softmax(-1), G, z, noise["alpha"], noise["dalpha"])


def dense_fake_loss(kind, nets, eps, noise, rng, tau=1e-3):
    """NELBO(f) on G, no gradient to the generator."""
    G = ROWS[kind](nets.generator, eps).detach()
    x_t, z = noised(kind, G, eps, noise, rng, tau)
    return mean(dense_nelbo(kind, nets.fake, G, x_t, z, noise), noise)


def dense_gap(kind, nets, eps, noise, rng, tau=1e-3, path_gradient=True):
    """NELBO(f*) - NELBO(f) on G, position by position. The networks are constants: gradient runs
    through the target G and, for `soft`, through what they read."""
    G = ROWS[kind](nets.generator, eps)
    x_t, z = noised(kind, G, eps, noise, rng, tau)
    if kind == "soft" and not path_gradient:
        x_t = x_t[0].detach(), x_t[1]
    return (dense_nelbo(kind, nets.teacher, G, x_t, z, noise)
            - dense_nelbo(kind, nets.fake, G, x_t, z, noise))


def dense_generator_loss(kind, nets, eps, noise, rng, **more):
    """(value, what to differentiate). Of the masked gap the value leaves out positions visible in
    x_tilde, where G is constant; the gradient is that of the whole gap."""
    gap = dense_gap(kind, nets, eps, noise, rng, **more)
    value = gap * (eps.x == K) if kind == "masked" else gap
    return mean(value, noise), mean(gap, noise)


# ---- one update of train.py ---------------------------------------------------------------------

def read_tokens(x):
    """Tokens as they are; of a soft input, the likeliest."""
    return x[1][..., 0] if isinstance(x, tuple) else x


class Texts:
    """Random texts in the place of TextData; with_prompt: the first positions are given."""

    def __init__(self, with_prompt):
        self.with_prompt = with_prompt

    def batch(self, split, B, rng, part):
        x_0 = torch.randint(K, (B, L), generator=rng)
        free = torch.arange(L) >= torch.arange(B)[:, None] % 4       # some texts have no prompt
        self.last = Batch(x_0[part], free[part] if self.with_prompt else None)
        return self.last


class Optimiser:
    """Takes what train.py would optimise, a loss and all gradients, and changes nothing."""

    def __init__(self, nets):
        self.nets = nets
        self.taken = []

    def backward(self, loss, m):
        for net in vars(self.nets).values():
            net.zero_grad(set_to_none=True)
        loss.backward()
        grads = {role: [p.grad for p in net.parameters()] for role, net in vars(self.nets).items()}
        self.taken.append((loss.detach(), grads))

    def update(self, step):
        return 0.0, 0.0


def tiny_nets(process):
    rng = seeded(11)
    nets = [random_dit(process.vocab_size, rng) for _ in range(3)]
    return SimpleNamespace(generator=nets[0], fake=nets[1], teacher=nets[2].requires_grad_(False))


def settings(kind, pairing):
    """train.py's own settings of stage idlm on the laptop, for 6 texts in 2 micro-batches."""
    flags = f"--preset laptop --device cpu --dtype float64 --no-compile --pairing {pairing} "
    flags += f"--batch_size 6 --micro_batch 3 --block_size {L} --updates 1 "
    flags += "--process " + ("mdlm" if kind == "masked" else f"duo --update {kind}")
    return train.settings_of(train.parse_args(flags.split()), "idlm")


class Update:
    """One update of `distil`: the draws that it gives to its losses, and what these give back."""

    def __init__(self, kind, with_prompt, pairing, monkeypatch):
        self.kind = kind
        process = Masked(K + 1) if kind == "masked" else Uniform(K)
        self.nets = tiny_nets(process)
        self.optim = Optimiser(self.nets)
        self.fake_optim = Optimiser(self.nets)
        self.data = Texts(with_prompt)
        self.draws = {"fake": [], "generator": []}
        for step, losses in (("fake", FAKE_LOSS), ("generator", GENERATOR_LOSS)):
            name = losses[kind].__name__
            monkeypatch.setattr(train, name, self.recorded(losses[kind], self.draws[step]))
        run = SimpleNamespace(
            net=self.nets.generator, fake=self.nets.fake, teacher=self.nets.teacher,
            process=process, step=0, optim=self.optim, fake_optim=self.fake_optim,
            note=lambda step, values: None)
        train.distil(settings(kind, pairing), run, self.data)
        self.nets.fake.requires_grad_(True)

    def recorded(self, loss, draws):
        def call(*args, **noise):
            eps, rng = args[-2:]
            x_0, free = self.data.last
            if free is not None:
                assert torch.equal(noise["free"], free)
                assert torch.equal(read_tokens(eps.x)[~free], x_0[~free])
            same_draws = torch.Generator().set_state(rng.get_state())
            draws.append((eps, noise, same_draws))
            return loss(*args, **noise)
        return call


@pytest.fixture(params=[(kind, with_prompt, pairing) for kind in KINDS
                        for with_prompt, pairing in ((False, "matched"), (True, "independent"))],
                ids=lambda p: f"{p[0]}-{'prompt' if p[1] else 'free'}-{p[2]}")
def update(request, float64, monkeypatch):
    return Update(*request.param, monkeypatch)


def test_the_fake_step_of_train_py_is_the_dense_formula(update):
    """NELBO(f) on G and its gradient in the fake; the generator and the teacher get none."""
    assert len(update.fake_optim.taken) == len(update.draws["fake"]) == 2
    for (loss, grads), (eps, noise, rng) in zip(update.fake_optim.taken, update.draws["fake"]):
        exact = dense_fake_loss(update.kind, update.nets, eps, noise, rng)
        assert exact > 0.1
        assert_same([loss], [exact])
        assert_same(grads["fake"], gradients(exact, update.nets.fake))
        assert all(g is None for g in grads["generator"] + grads["teacher"])


def test_the_generator_step_of_train_py_is_the_dense_formula(update):
    """NELBO(f*) - NELBO(f) on G and its gradient in the generator; fake and teacher get none."""
    assert len(update.optim.taken) == len(update.draws["generator"]) == 2
    for (loss, grads), (eps, noise, rng) in zip(update.optim.taken, update.draws["generator"]):
        value, whole = dense_generator_loss(update.kind, update.nets, eps, noise, rng)
        assert abs(value) > 1e-3
        assert_same([loss], [value])
        exact = gradients(whole, update.nets.generator)
        assert_same(grads["generator"], exact)
        assert max(g.abs().max() for g in exact) > 1e-3
        assert all(g is None for g in grads["fake"] + grads["teacher"])


# ---- one loss by itself -------------------------------------------------------------------------

def one_draw(kind, B=6, free=None, t=None):
    """Tiny networks, and what a loss takes: eps and the noise, texts at levels of their own."""
    rng = seeded(5)
    process = Masked(K + 1) if kind == "masked" else Uniform(K)
    x_0 = torch.randint(K, (B, L), generator=rng)
    t_tilde = 0.2 + 0.6 * torch.rand(B, generator=rng)
    t = 0.2 + 0.6 * torch.rand(B, generator=rng) if t is None else t
    eps = draw_latent(process, x_0, t_tilde, rng, soft=kind == "soft", free=free)
    noise = process.draw_noise(t, L, rng, soft=kind == "soft", free=free)
    return tiny_nets(process), eps, noise


@pytest.mark.parametrize("path_gradient", [True, False])
def test_soft_where_the_state_moves(path_gradient, float64):
    """At tau = 0.5 the gradient through the state is most of it: the dense formula with it and, as
    the paper's ablation, without; the value is the same."""
    nets, eps, noise = one_draw("soft")
    nets.fake.requires_grad_(False)
    loss = soft_generator_loss(nets.generator, nets.fake, nets.teacher, eps, seeded(1), **noise,
                               tau=0.5, path_gradient=path_gradient)
    value, whole = dense_generator_loss("soft", nets, eps, noise, seeded(1), tau=0.5,
                                        path_gradient=path_gradient)
    assert_same([loss], [value])
    exact = gradients(whole, nets.generator)
    assert_same(gradients(loss, nets.generator), exact)
    _, other = dense_generator_loss("soft", nets, eps, noise, seeded(1), tau=0.5,
                                    path_gradient=not path_gradient)
    differences = [(a - b).norm() > 1e-3 * a.norm()
                   for a, b in zip(exact, gradients(other, nets.generator))]
    assert sum(differences) > len(differences) / 2


def test_the_fake_of_soft_at_another_tau(float64):
    nets, eps, noise = one_draw("soft")
    loss = soft_fake_loss(nets.generator, nets.fake, eps, seeded(1), **noise, tau=0.5)
    exact = dense_fake_loss("soft", nets, eps, noise, seeded(1), tau=0.5)
    assert_same([loss], [exact])
    assert_same(gradients(loss, nets.fake), gradients(exact, nets.fake))


def test_the_masked_gradient_in_the_logits(float64):
    """-weight * G * (a - <G, a>), a = log f* - log f, where masked in both x_tilde and x_t."""
    rng = seeded(5)
    B = 6
    logits_g, logits_f, logits_t = torch.randn(3, B, L, K + 1, generator=rng).unbind()
    logits_g.requires_grad_()
    was_masked, is_masked = torch.rand(2, B, L, generator=rng) < 0.6
    x_tilde = torch.randint(K, (B, L), generator=rng).masked_fill(was_masked, K)
    weight = 1 + torch.rand(B, generator=rng)
    masked_generator_loss(
        Fixed(logits_g), Fixed(logits_f), Fixed(logits_t), (x_tilde, None), rng,
        is_masked=is_masked, weight=weight, sigma=None, mask_id=K).backward()
    G = logits_g.detach()[..., :K].softmax(-1)
    a = logits_t[..., :K].log_softmax(-1) - logits_f[..., :K].log_softmax(-1)
    exact = -weight[:, None, None] * G * (a - (G * a).sum(-1, keepdim=True)) / (B * L)
    exact = exact * (was_masked & is_masked)[..., None]
    assert_same([logits_g.grad[..., :K]], [exact])
    assert (logits_g.grad[..., K] == 0).all()              # [MASK] is never predicted


@pytest.mark.parametrize("kind", ["masked", "hard"])
def test_networks_that_take_no_gradient_build_no_graph(kind, float64):
    """Whatever their requires_grad: only the learner's trunk keeps anything for a backward pass."""
    nets, eps, noise = one_draw(kind)
    nets.teacher.requires_grad_(True)
    g, f, t = [Recorded(net) for net in (nets.generator, nets.fake, nets.teacher)]
    FAKE_LOSS[kind](g, f, eps, seeded(1), **noise).backward()
    GENERATOR_LOSS[kind](g, f, t, eps, seeded(1), **noise).backward()
    builds = [[h.requires_grad for h in net.hidden_states] for net in (g, f, t)]
    assert builds == [[False, True], [True, False], [False]]
    assert all(p.grad is None for p in nets.teacher.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fake_equal_to_the_teacher_gives_exactly_no_gap(kind, dtype):
    """0 in value and, up to the rounding of `soft`'s path, in every gradient."""
    nets, eps, noise = one_draw(kind)
    generator = nets.generator.to(dtype)
    teacher = nets.teacher.to(dtype)
    gap = GENERATOR_LOSS[kind](generator, teacher, teacher, eps, seeded(1), **noise)
    assert gap.item() == 0
    bound = 1e-4 if dtype == torch.float32 else 1e-12
    assert all(g.abs().max() <= bound for g in gradients(gap, generator))


@pytest.mark.parametrize("x_tilde, masked", [("visible", True), ("visible", False),
                                             ("masked", False)])
def test_an_update_without_a_position_that_counts(x_tilde, masked, float64):
    """Nothing masked in both: the generator's loss is 0 with a zero gradient, and no error."""
    nets, eps, noise = one_draw("masked")
    x = torch.full((6, L), K) if x_tilde == "masked" else torch.randint(K, (6, L))
    eps = eps._replace(x=x)
    noise["is_masked"] = torch.full((6, L), masked)
    gap = masked_generator_loss(nets.generator, nets.fake, nets.teacher, eps, seeded(1), **noise)
    assert gap.item() == 0
    assert all((g == 0).all() for g in gradients(gap, nets.generator))
    loss = masked_fake_loss(nets.generator, nets.fake, eps, seeded(1), **noise)
    assert (loss.item() > 0) == masked
    loss.backward()


# ---- one definition of G for `hard` -------------------------------------------------------------

def test_weighed_rows(rng):
    """softmax(logits + bonus at the own token) = f_u q(v | u), normalised, from clean to noise."""
    sigma = torch.tensor([1e-3, 0.4, 2.0, 6.9], dtype=torch.float64)
    logits = torch.randn(4, K, generator=rng, dtype=torch.float64)
    v = torch.randint(K, (4,), generator=rng)
    a = (-sigma).exp()[:, None]
    rows = logits.softmax(-1) * (a * F.one_hot(v, K) + (1 - a) / K)
    G = weigh_token(logits, v, token_bonus(sigma, K)[:, None]).softmax(-1)
    assert_same([G], [rows / rows.sum(-1, keepdim=True)])


def test_no_noise_keeps_the_token():
    """sigma 0: the bonus is finite, and the row is the token."""
    bonus = token_bonus(torch.zeros(1), 50_257)
    assert bonus.isfinite() and bonus > 30
    G = weigh_token(torch.zeros(1, 50_257), torch.tensor([3]), bonus[:, None]).softmax(-1)
    assert G[0, 3] > 1 - 1e-6


@pytest.mark.parametrize("length", [1, 2])
def test_G_starts_as_the_posterior(length, rng):
    """If the network's row is the law of token l given the other noised tokens, G is the law given
    all of them; and the sampler's step from the network's row (oracle.posterior) is the mean over
    u ~ G of the step for the clean token u. All texts of 3 tokens."""
    process = Uniform(3)
    t = torch.tensor([0.6], dtype=torch.float64)
    law = oracle.random_law(3 ** length, rng)
    f = oracle.best_denoiser(process, t, law, length)
    texts = oracle.texts(3, length)
    chance = law[:, None] * oracle.product(oracle.factors(process, t, length),
                                           torch.ones(len(law), len(law)))
    alpha_t, alpha_s = process.alpha(torch.tensor([0.6, 0.2], dtype=torch.float64))[0]
    for l in range(length):
        given_all = torch.stack([chance[texts[:, l] == u].sum(0) for u in range(3)], -1)
        given_all = given_all / given_all.sum(-1, keepdim=True)
        G = weigh_token(f[:, l].log(), texts[:, l], token_bonus(process.sigma(t), 3)).softmax(-1)
        assert_same([G], [given_all])
        step = oracle.posterior(f[:, l], texts[:, l], alpha_t, alpha_s)
        one_hot = torch.eye(3, dtype=torch.float64).expand(len(texts), 3, 3)
        each = oracle.posterior(one_hot, texts[:, l, None].expand(-1, 3), alpha_t, alpha_s)
        assert_same([step], [(G[:, None] @ each)[:, 0]])


def test_the_gap_with_the_own_token_summed_out(rng):
    """For rows that do not depend on the own token z, the mean of the gap over z ~ Gbar / K is
    c sum_v [Gbar_v (phi(fbar_v) - phi(tbar_v)) - log(fbar_v / tbar_v)], phi(u) = log u - 1 / u,
    c = -dalpha / (K a): a closed form that was tried as a loss, and seeks modes."""
    logits = torch.randn(3, 4, K, generator=rng, dtype=torch.float64)
    token = torch.randint(K, (4,), generator=rng)
    for alpha in (0.999, 0.5, 1e-3):
        a = torch.full((4, 1), alpha, dtype=torch.float64)
        bars = [K * a * x.softmax(-1) + 1 - a for x in logits]
        Gbar, fbar, tbar = bars
        expected = sum(Gbar[:, z] / K * uniform_gap(
            logits_g=logits[0], logits_f=logits[1], logits_star=logits[2],
            z=torch.full((4,), z), a=a, dalpha=-a, token=token, bonus=0.0, K=K) for z in range(K))
        closed = Gbar * (fbar.log() - 1 / fbar - tbar.log() + 1 / tbar) - (fbar / tbar).log()
        assert_same([expected], [closed.sum(-1) / K], bound=1e-9)


# ---- the law of the re-noised text --------------------------------------------------------------

def test_noise_masked(rng):
    """x_t: [MASK] where is_masked, else the visible token, else a token of frequency G. Four
    positions with rows of their own, 20,000 texts."""
    n, length = 20_000, 4
    rows = torch.randn(length, K + 1, generator=rng, dtype=torch.float64)
    was_masked, is_masked = torch.rand(2, n, length, generator=rng) < 0.5
    x_tilde = torch.randint(K, (n, length), generator=rng).masked_fill(was_masked, K)
    h = rows.expand(n, -1, -1)
    x_t = noise_masked(Fixed(h), h, x_tilde, is_masked, K, rng)
    assert (x_t[is_masked] == K).all() and (x_t[~is_masked] < K).all()
    shown = ~is_masked & ~was_masked
    assert torch.equal(x_t[shown], x_tilde[shown])
    drawn = was_masked & ~is_masked
    for l in range(length):
        assert_law(x_t[:, l][drawn[:, l]], rows[l, :K].softmax(-1))


def test_noise_uniform(rng):
    """z ~ alpha G + (1 - alpha) / K, each text at its own levels, every row standing on token 1."""
    n = 50_000
    process = Uniform(K)
    f = oracle.random_rows((2, K), rng)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    t_tilde = torch.tensor([0.8, 0.5], dtype=torch.float64)
    h = f.log()[:, None].expand(2, n, K)
    eps = torch.ones(2, n, dtype=torch.int64), process.sigma(t_tilde)
    noise = process.draw_noise(t, n, rng)
    z = noise_uniform(Fixed(h), h, eps, noise["keep"], noise["tokens"], K, rng, free=None)
    for b in range(2):
        G = f[b] * oracle.transition(process, t_tilde[b:b + 1])[:, 1]
        G = G / G.sum()
        law = G @ oracle.transition(process, t[b:b + 1])
        assert_law(z[b], law)
        assert law_score(z[b], f[b] @ oracle.transition(process, t[b:b + 1])) > 10


def test_the_gaussian_state_of_a_soft_row_does_not_follow_q(rng):
    """K = 50,257, gamma = -3.55 (alpha 0.9455). With G = (.5, .5) argmax(w) should be each of the
    two with probability 0.473, and is so with 0.101, by quadrature and in soft_state. With
    (.9, .1) the second should come with 0.0946, and comes in less than 1 of 10,000. A one-hot row
    does follow q.

    Quadrature over the winner's value: int phi(z - m G_v) prod_u Phi(z - m G_u) dz. Simulation: 100
    rows, 5 standard deviations.
    """
    K, gamma = 50_257, -3.55
    m = math.exp(-gamma / 2)
    z = torch.linspace(-10, 20, 30_001, dtype=torch.float64)

    def wins(first, second=None):                          # argmax at `first`; the rest of G is 0
        log_Phi = (K - 2) * torch.special.log_ndtr(z)
        log_Phi = log_Phi + torch.special.log_ndtr(z - m * (second or 0))
        phi = (-(z - m * first) ** 2 / 2).exp() / math.sqrt(2 * math.pi)
        return (phi * log_Phi.exp()).sum().item() * 1e-3

    process = Uniform(K)
    start = torch.zeros(1, dtype=torch.float64)
    noise = process.draw_noise(start, 1, rng, soft=True)
    alpha = noise["alpha"].item()
    assert round(alpha, 4) == 0.9455
    assert abs(wins(1.0) - (alpha + (1 - alpha) / K)) < 1e-6
    half = wins(0.5, 0.5)
    assert abs(half - 0.101) < 1e-3 and abs(alpha / 2 - 0.473) < 1e-3
    assert wins(0.1, 0.9) < 1e-4 and abs(alpha * 0.1 - 0.0946) < 1e-3

    n = 100
    G = torch.full((K,), -torch.inf)
    G[[3, 9]] = 0.0
    h = G.expand(1, n, K)
    with torch.no_grad():
        _, tokens = soft_state(Fixed(h), h, None, scale=noise["scale"].float(),
                               std=noise["std"].float(), K=K, tau=1e-3, rng=rng, free=None)
    for v in (3, 9):
        share = (tokens == v).double().mean().item()
        assert abs(share - half) < 5 * math.sqrt(half * (1 - half) / n) < alpha / 2 - half


@pytest.mark.parametrize("std", [0.23, 0.01])
def test_soft_state_is_the_dense_softmax(std, rng):
    """50,257 tokens in float32, tau = 1e-3: the few entries carry the weights, the argmax and the
    gradient in G of softmax(w / tau) over the whole vocabulary.

    G has four tokens of about 1/4 each. At the clock's own std one token nearly always wins by far
    and next to no gradient passes the state; at std 0.01 they compete.
    """
    K, n, tau = 50_257, 8, 1e-3
    logits = torch.randn(1, n, K, generator=rng)
    top = torch.randint(K, (1, n, 4), generator=rng)
    logits.scatter_(2, top, 16 + 0.01 * torch.randn(1, n, 4, generator=rng))
    logits.requires_grad_()
    direction = torch.randn(1, n, K, generator=rng)
    (weights, ids), z = soft_state(
        Fixed(logits), logits, None, scale=torch.tensor([0.97]), std=torch.tensor([std]), K=K,
        tau=tau, rng=seeded(3), free=None)
    w = 0.97 * logits.softmax(-1) + std * torch.randn(1, n, K, generator=seeded(3))
    dense = (w / tau).softmax(-1)
    assert weights.shape == (1, n, 24) and torch.equal(z, w.argmax(-1))
    whole = torch.zeros_like(dense).scatter(2, ids, weights)
    assert torch.allclose(whole, dense, rtol=1e-3, atol=1e-6)
    found, = torch.autograd.grad((whole * direction).sum(), logits)
    exact, = torch.autograd.grad((dense * direction).sum(), logits)
    assert exact.abs().max() > 1e-3 or std > 0.1
    assert (found - exact).abs().max() < 1e-3 * exact.abs().max() + 1e-7


@pytest.mark.parametrize("K, k", [(50, 5), (9000, 5), (50_257, 32), (40, 40)])
def test_top_entries(K, k, rng):
    """By blocks as at once: the ids of the k largest, in falling order."""
    w = torch.randn(20, K, generator=rng)
    assert torch.equal(top_entries(w, k), w.topk(k).indices)


# ---- a given prompt -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_given_positions_have_no_noise_and_no_gradient(kind, float64):
    """In both steps the networks read the given tokens as they are, and none of those counts."""
    free = torch.arange(L) >= torch.arange(6)[:, None] % 4
    nets, eps, noise = one_draw(kind, free=free, t=torch.full((6,), 0.9))
    nets.fake.requires_grad_(kind != "soft")
    x_0 = torch.randint(K, (6, L), generator=seeded(5))
    assert torch.equal(read_tokens(eps.x)[~free], x_0[~free])
    g, f, t = [Recorded(net) for net in (nets.generator, nets.fake, nets.teacher)]
    gap = GENERATOR_LOSS[kind](g, f, t, eps, seeded(1), **noise)
    nets.fake.requires_grad_(True)
    loss = FAKE_LOSS[kind](nets.generator, f, eps, seeded(1), **noise)
    for x, _ in f.seen + t.seen:
        assert torch.equal(read_tokens(x)[~free], x_0[~free])
        assert not torch.equal(read_tokens(x)[free], x_0[free])
        if kind == "soft":
            assert (x[0][~free][:, 0] == 1).all() and (x[0][~free][:, 1:] == 0).all()
    for value, h in ((gap, g.hidden_states[0]), (loss, f.hidden_states[1])):
        gradient, = torch.autograd.grad(value, h)
        assert (gradient[~free] == 0).all() and (gradient[free] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_free_is_no_prompt(kind, float64):
    """free=all True equals free=None bit for bit, in value and gradient."""
    results = []
    for free in (None, torch.ones(6, L, dtype=torch.bool)):
        nets, eps, noise = one_draw(kind, free=free)
        loss = FAKE_LOSS[kind](nets.generator, nets.fake, eps, seeded(1), **noise)
        grads = gradients(loss, nets.fake)
        nets.fake.requires_grad_(False)
        gap = GENERATOR_LOSS[kind](nets.generator, nets.fake, nets.teacher, eps, seeded(1), **noise)
        results.append([loss, gap, *grads, *gradients(gap, nets.generator)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- precision ----------------------------------------------------------------------------------

def test_half_precision_logits_are_raised_to_float32(rng):
    """A flat f gives log K whatever G, if G's rows sum to 1; summed in bfloat16 they do not. And
    two equal networks must not show a gap of rounding."""
    g = (3 * torch.randn(20, 5000, generator=rng)).bfloat16()
    one = torch.ones(20, 1)
    loss = soft_cross_entropy(torch.zeros_like(g), g, one)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((20,), 5000.0).log(), rtol=1e-6, atol=0)
    assert (masked_gap(g, g, g, one) == 0).all()


@pytest.mark.parametrize("K, t", [(83, 1e-3), (83, 0.5), (50_257, 1e-3), (50_257, 1.0)])
def test_uniform_rows_in_float32(K, t):
    """Within 5e-5 of float64, and of 4e-6 + 3e-7 / alpha: K terms of size alpha and error 6e-8 are
    summed and divided by K alpha, which leaves 1e-4 nats of noise at t = 1, alpha = 1e-3."""
    rng = seeded(26)
    N = 16
    x = torch.randint(K, (N,), generator=rng)
    z = torch.where(torch.arange(N) % 2 == 0, x, torch.randint(K, (N,), generator=rng))
    logits = torch.randn(3, N, K, generator=rng)
    logits[:, torch.arange(N), x] += torch.tensor([[15.0], [12.0], [11.0]])
    a, dalpha = Uniform.alpha(torch.tensor([t]).expand(N)[:, None])
    for formula, networks in ((uniform_nelbo, [1, 0]), (uniform_gap, [0, 1, 2])):
        rows = [logits[i] for i in networks]
        found = formula(*rows, z=z, a=a, dalpha=dalpha, token=x, bonus=0.0, K=K)
        exact = formula(*[row.double() for row in rows], z=z, a=a.double(), dalpha=dalpha.double(),
                        token=x, bonus=0.0, K=K)
        for half in (slice(0, None, 2), slice(1, None, 2)):          # z = x; z elsewhere
            error = (found - exact)[half].abs().max()
            assert error < 5e-5 * exact[half].abs().max() + 4e-6 + 3e-7 / a[0]


# ---- the two files to copy ----------------------------------------------------------------------

def test_two_files_copied_to_an_empty_folder_take_a_step(tmp_path, monkeypatch, capsys):
    """`python idlm_loss.py` beside rows.py, nothing else of the repository within reach: a fake and
    a generator step. (In this process: another one would import torch for seconds.)"""
    for name in ("rows.py", "idlm_loss.py"):
        shutil.copy(ROOT / name, tmp_path)
    ours = "", str(ROOT), str(ROOT / "tests")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and str(Path(file).parent) in ours:
            monkeypatch.delitem(sys.modules, name)
    elsewhere = [path for path in sys.path if path not in ours]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("idlm_loss.py", run_name="__main__")
    assert sys.modules["rows"].__file__ == str(tmp_path / "rows.py")
    monkeypatch.delitem(sys.modules, "rows")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["fake step", "generator step"]
    assert float(lines[0].split()[2]) > 1
