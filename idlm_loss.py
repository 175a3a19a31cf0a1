# SPDX-License-Identifier: MIT
"""Inverse distillation: the losses that turn a diffusion teacher into a few-step generator.

    L_IDLM(theta) = NELBO(f*, p_theta) - min_f NELBO(f, p_theta)          IDLM, arXiv 2602.19066

The NELBO is the teacher's own training loss, a bound on -log p. f* is the frozen teacher. `fake`, a
diffusion model f trained on the generator's outputs, holds the inner minimum. Two steps alternate:

    fake step        NELBO(fake) on G                    gradient to the fake alone
    generator step   NELBO(f*) - NELBO(fake) on G        gradient to the generator alone

Every loss below reads in the paper's order: rows G = generator(eps) on the simplex; draw tokens
from G and noise them to a time t, x_t ~ q(. | G) (`soft` noises the rows themselves); show x_t to
fake f and teacher f*; compare. Where f holds the minimum and f* is the exact denoiser of p*, the
mean of L_IDLM is KL(p_theta || p*) less the KL of both laws noised to t = 1: it is 0 only at
p_theta = p*.

    masked    MDLM's process
    uniform   UDLM's and Duo's process, exact noising law: `hard` in train.py
    soft      Duo's process, Gaussian state of G, as published

B texts, L positions, D width, K the size of the vocabulary without [MASK], which is token K. t = 0
is clean, t = 1 noise. eps is the tuple of the generator's inputs: eps[0] the noised tokens x_tilde
(B, L), eps[1] their sigma (B,). A network has a trunk `hidden`, which moves its inputs to its own
device, and a head `project` (rows.py); eps, noise and rng are on the CPU. Losses are nats per
token, means over the free positions: free (B, L) bool, None for all. tests/test_idlm_loss.py holds
every loss to its dense formula.

To reuse: copy this file and rows.py (torch only). `python idlm_loss.py` takes one fake and one
generator step of the masked process. `soft` also needs gaussian.py and a network that reads soft
inputs (model.py).
"""
import copy

import torch
import torch.nn.functional as F

from rows import draw_tokens, entry, frozen, mean_over, on_device, per_row, sample_categorical
from rows import to_device, upcast, weighted_cross_entropy


# ---- masked process (MDLM) ----------------------------------------------------------------------
# A visible token is copied with certainty, so only positions that are [MASK] in x_t carry loss.
# Where x_tilde is visible, G is that very token, without gradient: the generator's loss needs the
# positions masked in both x_tilde and x_t.

def soft_cross_entropy(logits_f, logits_g, weight):        # -> (N,): -weight <G, log f>
    logits_f = upcast(logits_f)
    G = upcast(logits_g).softmax(-1)
    return weight[:, 0] * (logits_f.logsumexp(-1) - (G * logits_f).sum(-1))


def masked_gap(logits_g, logits_f, logits_star, weight):      # -> (N,): weight <G, log f - log f*>
    # log f = logits - logsumexp. As G sums to 1, both logsumexp stand outside of the sum: one sum
    # less in the backward pass.
    logits_f = upcast(logits_f)
    logits_star = upcast(logits_star)
    G = upcast(logits_g).softmax(-1)
    gap = (G * (logits_f - logits_star)).sum(-1)
    return weight[:, 0] * (gap - logits_f.logsumexp(-1) + logits_star.logsumexp(-1))


@torch.no_grad()
def noise_masked(generator, h_g, x_tilde, is_masked, mask_id, rng):
    """x_t ~ q(. | G): [MASK] where `is_masked`, else the visible token, else a draw from G."""
    device = h_g.device
    is_drawn = (x_tilde == mask_id) & ~is_masked
    tokens = draw_tokens(generator, h_g, mask_id, rng, where=is_drawn)
    x_t = to_device(x_tilde, device).masked_scatter(to_device(is_drawn, device), tokens)
    return x_t.masked_fill(to_device(is_masked, device), mask_id)


def masked_fake_loss(
    generator, fake, eps, rng, *,
    is_masked, weight, sigma, mask_id, free=None,
):
    """NELBO of the fake on G: the inner minimisation, with MDLM's loss.

    is_masked  (B, L) bool, where x_t is [MASK]: each with probability 1 - alpha_t
    weight     (B,) -dalpha_t / (1 - alpha_t)
    sigma      (B,) the networks' noise level, 0 where time conditioning is off
    """
    x_tilde = eps[0]
    was_masked = x_tilde == mask_id
    with torch.no_grad():                                  # the generator gets no gradient
        h_g = generator.hidden(*eps)
        x_t = noise_masked(generator, h_g, x_tilde, is_masked, mask_id, rng)
    h_f = fake.hidden(x_t, sigma)
    # mask_id is K. The target is G's row where x_tilde was masked, that token where visible.
    at_masked = per_row(
        soft_cross_entropy, mask_id,
        nets=(fake, frozen(generator)),
        hidden=(h_f, h_g),
        args=(weight,),
        where=is_masked & was_masked,
    )
    at_visible = per_row(
        weighted_cross_entropy, mask_id,
        nets=(fake,),
        hidden=(h_f,),
        args=(x_tilde, weight),
        where=is_masked & ~was_masked,
    )
    return mean_over(free, torch.cat([at_masked, at_visible]), x_tilde)


def masked_generator_loss(
    generator, fake, teacher, eps, rng, *,
    is_masked, weight, sigma, mask_id, free=None,
):
    """The gap NELBO(f*) - NELBO(f) on G: the outer minimisation. Arguments as for the fake.

    Where x_tilde is visible the terms have no gradient and are left out of the value. x_t is a
    draw: the part of the gradient that runs through its law is dropped, as in the released code.
    What is left is, in G's logits, weight * G * (d - <G, d>) with d = log f - log f*; none to
    teacher or fake.
    """
    x_tilde = eps[0]
    was_masked = x_tilde == mask_id
    h_g = generator.hidden(*eps)
    with torch.no_grad():
        x_t = noise_masked(generator, h_g, x_tilde, is_masked, mask_id, rng)
        h_f = fake.hidden(x_t, sigma)
        h_star = teacher.hidden(x_t, sigma)
    gap = per_row(
        masked_gap, mask_id,
        nets=(generator, frozen(fake), frozen(teacher)),
        hidden=(h_g, h_f, h_star),
        args=(weight,),
        where=is_masked & was_masked,
    )
    return mean_over(free, gap, x_tilde)


# ---- uniform process (UDLM, Duo) ----------------------------------------------------------------
# The minimiser of this process' NELBO predicts a token from the *other* noised tokens: so does the
# generator's row g. G also uses x_tilde's token v of the position, at level a~, by Bayes' rule:
#     G_u  ~  g_u q(v | u)  ~  g_u (1 + [u = v] K a~ / (1 - a~)).
# In logits that is a bonus for v. The sampler applies the same factor, so this is the one
# definition of G. Only `soft`, as published, takes the row itself: its bonus is 0.

def token_bonus(sigma, K):                                 # (B,) -> (B,)
    """log(1 + K a / (1 - a)) with a = exp(-sigma): what a row's own token gains in logits."""
    noise = -torch.expm1(-sigma)
    return torch.log1p(K * torch.exp(-sigma) / noise.clamp(min=1e-9))


def weigh_token(logits, token, bonus):                     # (..., K), (...), (..., 1) -> (..., K)
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    return upcast(logits) + torch.where(tokens == token[..., None], bonus, 0)


def draw_weighed(logits_g, u, token, bonus):               # (N, K), (N,) x2, (N, 1) -> (N,)
    return sample_categorical(weigh_token(logits_g, token, bonus), u)


# A row x on the simplex becomes xbar_v = K a x_v + 1 - a, K times the law of the noised token, with
# a = alpha_t. z (N,) is the noised token; a, dalpha, bonus are columns (N, 1).

def noised(logits, a, K):                                  # (N, K), (N, 1) -> (N, K)
    return K * a * upcast(logits).softmax(-1) + (1 - a)


def uniform_nelbo(logits_f, logits_g, z, a, dalpha, token, bonus, K):      # -> (N,)
    """NELBO of f at z for the target G (UDLM, Duo), with c = -dalpha / (K a):
        c [ sum_v Gbar_v / Gbar_z log(fbar_z Gbar_v / (fbar_v Gbar_z)) - K / Gbar_z + K / fbar_z ]
    where, as sum_v Gbar_v = K, the part of the logarithm at z comes out of the sum."""
    Gbar = noised(weigh_token(logits_g, token, bonus), a, K)
    fbar = noised(logits_f, a, K)
    Gbar_z = entry(Gbar, z)
    fbar_z = entry(fbar, z)
    inner = (Gbar * (Gbar / fbar).log()).sum(-1, keepdim=True)
    inner = inner - K * (Gbar_z / fbar_z).log()
    nelbo = -dalpha / (K * a) * (inner / Gbar_z - K / Gbar_z + K / fbar_z)
    return nelbo[:, 0]


def uniform_gap(logits_g, logits_f, logits_star, z, a, dalpha, token, bonus, K):      # -> (N,)
    """NELBO(f*) - NELBO(f) at z for the target G, with sbar for the teacher's row; what depends on
    G alone has cancelled:
        c [ sum_v Gbar_v / Gbar_z log(fbar_v sbar_z / (fbar_z sbar_v)) + K / sbar_z - K / fbar_z ]
    """
    Gbar = noised(weigh_token(logits_g, token, bonus), a, K)
    fbar = noised(logits_f, a, K)
    sbar = noised(logits_star, a, K)
    Gbar_z = entry(Gbar, z)
    fbar_z = entry(fbar, z)
    sbar_z = entry(sbar, z)
    inner = (Gbar * (fbar / sbar).log()).sum(-1, keepdim=True)
    inner = inner - K * (fbar_z / sbar_z).log()
    gap = -dalpha / (K * a) * (inner / Gbar_z + K / sbar_z - K / fbar_z)
    return gap[:, 0]


@torch.no_grad()
def noise_uniform(generator, h_g, eps, keep, tokens, K, rng, free):
    """z ~ q(. | y), y ~ G: the draw y where `keep`, else the random token; a given one stays."""
    device = h_g.device
    x_tilde = eps[0]
    is_drawn = keep if free is None else keep & free
    y = draw_tokens(generator, h_g, K, rng, where=is_drawn, formula=draw_weighed,
                    args=(x_tilde, token_bonus(eps[1], K)))
    z = tokens if free is None else torch.where(free, tokens, x_tilde)
    return to_device(z, device).masked_scatter(to_device(is_drawn, device), y)


def uniform_fake_loss(
    generator, fake, eps, rng, *,
    keep, tokens, alpha, dalpha, sigma, K, free=None,
):
    """NELBO of the fake on the rows G, at hard tokens z ~ q(. | G).

    keep           (B, L) bool, True with probability alpha_t;  tokens  (B, L) uniformly random
    alpha, dalpha  (B,) alpha_t and its slope;  sigma  (B,) -log alpha_t
    A soft target has less variance than the drawn token and the same minimiser: the law of a token
    given the *other* noised tokens (leave one out).
    """
    with torch.no_grad():                                  # the generator gets no gradient
        h_g = generator.hidden(*eps)
        z = noise_uniform(generator, h_g, eps, keep, tokens, K, rng, free)
    h_f = fake.hidden(z, sigma)
    nelbo = per_row(
        uniform_nelbo, K,
        nets=(fake, frozen(generator)),
        hidden=(h_f, h_g),
        args=(z, alpha, dalpha, eps[0], token_bonus(eps[1], K), K),
        where=free,
    )
    return nelbo.mean()


def uniform_generator_loss(
    generator, fake, teacher, eps, rng, *,
    keep, tokens, alpha, dalpha, sigma, K, free=None,
):
    """NELBO(f*) - NELBO(f) on G under the exact noising law. Arguments as for the fake.

    The gradient runs through the target G alone: the law of z, fake and teacher carry none.
    """
    h_g = generator.hidden(*eps)
    z = noise_uniform(generator, h_g, eps, keep, tokens, K, rng, free)
    with torch.no_grad():
        h_f = fake.hidden(z, sigma)
        h_star = teacher.hidden(z, sigma)
    gap = per_row(
        uniform_gap, K,
        nets=(generator, frozen(fake), frozen(teacher)),
        hidden=(h_g, h_f, h_star),
        args=(z, alpha, dalpha, eps[0], token_bonus(eps[1], K), K),
        where=free,
    )
    return gap.mean()


# ---- the published update of the uniform process (IDLM-Duo) -------------------------------------
# The networks read the Gaussian state softmax(w / tau) of G, w = scale G + std xi, and the gradient
# runs through it. argmax w has the law q(. | G) only for one-hot G; tests/test_idlm_loss.py shows
# how far off it is otherwise.

def top_entries(w, k, size=256):                           # (N, K) -> (N, k): ids, largest first
    """w.topk(k), by blocks: the k largest entries stand in the k blocks of the largest maxima."""
    if w.shape[1] <= size * k:
        return w.topk(k).indices
    blocks = F.pad(w, (0, -w.shape[1] % size), value=-torch.inf).unflatten(1, (-1, size))
    best = blocks.amax(-1).topk(k).indices                           # (N, k) blocks
    candidates = blocks.gather(1, best[..., None].expand(-1, -1, size)).flatten(1)
    at = candidates.topk(k).indices
    return best.gather(1, at // size) * size + at % size


def state_rows(logits_g, xi, scale, std, tau, k):          # (N, >= K), (N, K), (N, 1) x2 -> (N, 2k)
    """The k largest entries of softmax(w / tau), largest first; then their ids, as numbers."""
    G = upcast(logits_g).softmax(-1)[:, :xi.shape[1]]
    ids = top_entries(scale * G.detach() + std * xi, k)
    w = scale * G.gather(1, ids) + std * xi.gather(1, ids)
    return torch.cat([(w / tau).softmax(-1), ids], -1)


def soft_state(generator, h_g, eps, scale, std, K, tau, rng, free, k=24):
    """softmax(w / tau) as a soft input of its k largest entries, differentiable in G.

    scale, std (B,): signal and noise of the Gaussian process. Returns (weights, ids), each
    (B, L, k), and z = argmax w (B, L); a given token stays as it is in eps. What k leaves out is
    below 1e-9 of the sum, but for one position in millions.
    """
    B, L, _ = h_g.shape
    device = h_g.device
    k = min(k, K)
    # noise over the whole vocabulary is drawn on the device, seeded from rng
    xi = torch.randn(B, L, K, generator=on_device(rng, device), device=device, dtype=scale.dtype)
    rows = per_row(
        state_rows, K,
        nets=(generator,),
        hidden=(h_g,),
        args=(xi, scale, std, tau, k),
    )
    weights, ids = rows.view(B, L, 2, k).unbind(2)
    ids = ids.long()
    if free is not None:
        given = to_device(eps[0][1][..., :1], device)
        is_free = to_device(free, device)[..., None]
        one_hot = (torch.arange(k, device=device) == 0).to(weights)
        weights = torch.where(is_free, weights, one_hot)
        ids = torch.where(is_free, ids, given)
    return (weights, ids), ids[..., 0].contiguous()


def soft_fake_loss(
    generator, fake, eps, rng, *,
    scale, std, alpha, dalpha, sigma, K, free=None, tau=1e-3,
):
    """NELBO of the fake on G, at the Gaussian state of G; eps[0] is a soft input itself.

    scale, std, alpha, dalpha  (B,) of Uniform.gaussian(t);  sigma  (B,) -log alpha
    """
    with torch.no_grad():                                  # the generator gets no gradient
        h_g = generator.hidden(*eps)
        state, z = soft_state(generator, h_g, eps, scale, std, K, tau, rng, free)
    h_f = fake.hidden(state, sigma)
    nelbo = per_row(
        uniform_nelbo, K,
        nets=(fake, frozen(generator)),
        hidden=(h_f, h_g),
        args=(z, alpha, dalpha, z, 0.0, K),                # bonus 0: the row itself
        where=free,
    )
    return nelbo.mean()


def soft_generator_loss(
    generator, fake, teacher, eps, rng, *,
    scale, std, alpha, dalpha, sigma, K, free=None, tau=1e-3, path_gradient=True,
):
    """NELBO(f*) - NELBO(f) on G, at the Gaussian state of G, gradient through target *and* state.

    path_gradient=False stops the gradient at the state: the paper's ablation, reported to diverge.
    Give teacher and fake with requires_grad False, or they collect gradients that nobody uses.
    """
    h_g = generator.hidden(*eps)
    state, z = soft_state(generator, h_g, eps, scale, std, K, tau, rng, free)
    if not path_gradient:
        state = (state[0].detach(), state[1])
    h_f = fake.hidden(state, sigma)
    h_star = teacher.hidden(state, sigma)
    gap = per_row(
        uniform_gap, K,
        nets=(generator, fake, teacher),
        hidden=(h_g, h_f, h_star),
        args=(z, alpha, dalpha, z, 0.0, K),                # bonus 0: the row itself
        where=free,
    )
    return gap.mean()


# ---- the example to copy ------------------------------------------------------------------------

class TinyNet(torch.nn.Module):
    """A network on the CPU: a trunk `hidden` and a head `project`."""

    def __init__(self, vocab_size, width=32):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.trunk = torch.nn.GRU(width, width, batch_first=True)
        self.project = torch.nn.Linear(width, vocab_size)

    def hidden(self, x, sigma):
        return self.trunk(self.embedding(x))[0]


def example(B=4, L=8, K=10):
    """One fake and one generator step of the masked process; [MASK] is token K."""
    rng = torch.Generator().manual_seed(0)
    teacher = TinyNet(K + 1)
    generator = copy.deepcopy(teacher)                     # both start as the teacher
    fake = copy.deepcopy(teacher)
    x_0 = torch.randint(K, (B, L), generator=rng)          # texts
    for net in (fake, generator):
        t_tilde, t = torch.rand(2, B, 1, generator=rng).clamp(min=1e-3)
        x_tilde = x_0.masked_fill(torch.rand(B, L, generator=rng) < t_tilde, K)
        eps = (x_tilde, torch.zeros(B))
        noise = {
            "is_masked": torch.rand(B, L, generator=rng) < t,
            "weight": 1 / t[:, 0],
            "sigma": torch.zeros(B),
            "mask_id": K,
        }
        if net is fake:
            loss = masked_fake_loss(generator, fake, eps, rng, **noise)
        else:
            loss = masked_generator_loss(generator, fake, teacher, eps, rng, **noise)
        optimizer = torch.optim.AdamW(net.parameters())
        loss.backward()
        optimizer.step()
        print(f"{'fake' if net is fake else 'generator'} step: {loss.item():.5f} nats per token")


if __name__ == "__main__":
    example()
