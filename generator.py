# SPDX-License-Identifier: MIT
"""The latent-mixture generator, and the few-step sampler that teacher and generator share.

    p_theta(x) = E_eps prod_i Cat(x_i; G_i(eps))                            IDLM, arXiv 2602.19066

eps = (x_tilde, sigma). In training x_tilde is real text noised to a random level t_tilde; in
sampling it is the text so far, so one trained pass serves every step. Tokens are independent only
given eps, so the mixture carries dependencies that one factorised pass cannot. An all-[MASK] text
holds nothing random: the first pass of the masked process draws its tokens independently.

Sampling counts t down from 1 to 0. N steps are at most N network passes, and the generator takes
the teacher's place in the teacher's own sampler.
To reuse: copy this file, teacher.py, gaussian.py, idlm_loss.py and rows.py.
"""
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from idlm_loss import token_bonus, weigh_token
from rows import cross_entropy, draw_tokens, entry, flat_rows, per_row, sample_categorical
from rows import to_device, uniforms, upcast
from teacher import Masked

ORDERS = "random", "even", "shuffled", "confident"        # of revealing, masked process
ENDINGS = "ancestral", "greedy", "map"      # last step, uniform process


class Latent(NamedTuple):
    """eps, the inputs of the generator's network in its order: net.hidden(*eps)."""
    x: torch.Tensor                         # x_tilde: (B, L) tokens, or a soft input (model.py)
    sigma: torch.Tensor                     # (B,)


def draw_latent(process, x_0, t_tilde, rng, soft=False, free=None):
    """eps for the texts x_0 (B, L) at levels t_tilde (B,).

    soft (uniform process): the network reads the Gaussian state of x_0 at t_tilde, as published.
    free (B, L) bool: the positions that the model writes; the others stay as they are.
    """
    if soft:
        x, _ = process.gaussian.soft_corrupt(x_0, t_tilde, rng, free)
        return Latent(x, process.gaussian.sigma(t_tilde))
    return Latent(process.corrupt(x_0, t_tilde, rng, free), process.sigma(t_tilde))


def log_rows(net, process, eps):                           # -> log G(eps): (B, L, K)
    x_tilde, sigma = eps[:2]
    logits = net(*eps)
    if isinstance(x_tilde, tuple):                         # `soft` takes the row itself
        return process.log_probs(logits, None)
    x_tilde = x_tilde.to(logits.device)
    if not isinstance(process, Masked):
        bonus = token_bonus(sigma, process.K).to(x_tilde.device)
        logits = weigh_token(logits, x_tilde, bonus[:, None, None])
    return process.log_probs(logits, x_tilde)


def generate_probs(net, process, eps):
    """x_0_probs (B, L, K), rows on the simplex: all of G(eps) at once, for small vocabularies."""
    return log_rows(net, process, eps).exp()


# ---- sampling -----------------------------------------------------------------------------------

class Sample(NamedTuple):
    tokens: torch.Tensor                    # (B, L) int64, on the CPU
    nfe: torch.Tensor                       # (B,) network passes that each text took, <= steps


@torch.no_grad()
def sample(net, process, num_texts, length, steps, rng, *, temperature=1.0, top_p=1.0,
           order="random", ending="ancestral", prompt=None, callback=None):
    """Write num_texts texts of `length` tokens in at most `steps` network passes.

    net       a DiT: the teacher, or the generator in its place
    rng       a CPU torch.Generator: equal seeds give equal texts, on one machine
    order     masked process: 'random' positions, as published; 'even': every n-th one;
              'shuffled': random ones, equally many a pass;
              'confident': draw at every [MASK], then keep the likeliest tokens, as many as are
              due, level ones from left to right (MaskGIT, arXiv 2202.04200, without its noise);
              the head runs at every [MASK]
    ending    uniform process, last step: 'ancestral'; 'greedy', the likeliest token of the
              network's row, as published; 'map', the likeliest of G (idlm_loss.py)
    prompt    (length,) or (num_texts, length) tokens, -1 where the model writes; the rest stays
    callback  called with (step, x_t (B, L)) after every step, for showing
    """
    if (steps < 1 or order not in ORDERS or ending not in ENDINGS or temperature <= 0
            or not 0 < top_p <= 1):
        raise ValueError(f"steps {steps}, order {order!r}, ending {ending!r}, temperature "
                         f"{temperature}, top_p {top_p}: give steps from 1 up, an order of "
                         f"{ORDERS}, an ending of {ENDINGS}, a temperature above 0 and a top_p "
                         "above 0, at most 1")
    if prompt is None:
        prompt = torch.full((length,), -1)
    is_free = (prompt < 0).expand(num_texts, length)
    x = torch.where(is_free, process.prior(num_texts, length, rng), prompt)
    x = to_device(x, net.device)
    was_training = net.training
    net.eval()
    law = (to_device(torch.tensor(temperature), net.device), top_p)   # a tensor: compiled once
    if isinstance(process, Masked):
        x, nfe = sample_masked(net, process, x, is_free, steps, rng, law, order, callback)
    else:
        x, nfe = sample_uniform(net, process, x, is_free, steps, rng, law, ending, callback)
    net.train(was_training)
    return Sample(x.cpu(), nfe)


def warp(logits, temperature, top_p):                      # (N, K) -> (N, K)
    """Divide by the temperature; then keep the fewest tokens that hold the share top_p."""
    logits = upcast(logits) / temperature
    if top_p < 1:
        ordered, ids = logits.sort(-1, descending=True)
        probs = ordered.softmax(-1)
        is_beyond = probs.cumsum(-1) - probs >= top_p
        logits = logits.scatter(-1, ids, ordered.masked_fill(is_beyond, -torch.inf))
    return logits


def pass_rows(wanted):                                     # (B, L) bool, on the CPU
    """-> which texts a pass takes, and which rows of those it draws. Texts that want nothing sit
    out; but while most want something, the batch keeps its one shape."""
    some = wanted.any(1)
    if 2 * some.sum() > len(wanted):
        return slice(None), wanted
    return some.nonzero()[:, 0], wanted[some]


# -- masked process

def reveal_steps(is_masked, steps, order, rng):            # (B, L) -> (B, L) in 0 ... steps - 1
    """The step that reveals each position.

    random: uniform, which is exactly the ancestral step from t to s: it reveals a masked position
    with probability (t - s) / t. shuffled: in as random an order, but equally many a step, so fewer
    positions meet that should know of each other. even: every n-th position from a random one on,
    so that tokens of one pass stand far apart; the next steps halve the gaps, then quarter them:
    0 8 4 12 2 ... of 16. (Left to right, texts repeat themselves.)
    """
    B, L = is_masked.shape
    if order != "even":
        u = torch.rand(B, L, generator=rng, dtype=torch.float64)
        if order == "random":
            return (u * steps).long()
        rank = u.masked_fill(~is_masked, 1).argsort(-1).argsort(-1)
        return rank * steps // is_masked.sum(-1, keepdim=True).clamp(min=1)
    n = min(steps, L)
    bits = (n - 1).bit_length()
    by_gap = sorted(range(n), key=lambda i: f"{i:0{bits}b}"[::-1])
    step_of = torch.tensor(by_gap).argsort()               # the inverse permutation
    start = torch.randint(n, (B, 1), generator=rng)
    return step_of[(torch.arange(L) + start) % n]


def draw(logits, u, temperature, top_p):                   # (N, K), (N,) -> (N,)
    return sample_categorical(warp(logits, temperature, top_p), u)


def draw_with_log_prob(logits, u, temperature, top_p):     # (N, K), (N,) -> (N, 2)
    """The token and its log-probability in the network's own row. Not in the row it is drawn from:
    at a low temperature or top_p every token there is certain. By the log-odds, as float32 rounds
    p = 1 - 1e-8 to 1."""
    token = draw(logits, u, temperature, top_p)
    rest = upcast(logits).scatter(-1, token[:, None], -torch.inf).logsumexp(-1)
    return torch.stack([token, logsigmoid(entry(logits, token)[:, 0] - rest)], -1)


def surest(drawn, where, due):                             # (N, 2), (B, L), (B,)
    """Of what draw_with_log_prob drew at the N positions `where`, each text's `due` likeliest
    tokens. -> their positions (B, L) bool, the tokens (M,)"""
    log_p = torch.full(where.shape, -torch.inf)
    log_p[where] = drawn[:, 1].to(log_p)
    rank = (-log_p).argsort(dim=-1, stable=True).argsort(-1)
    chosen = rank < due[:, None]
    return chosen, drawn[flat_rows(chosen[where], drawn.device), 0].long()


def sample_masked(net, process, x, is_masked, steps, rng, law, order, callback):
    """Reveal first, draw second: the head runs at revealed positions alone, and texts that reveal
    nothing take no pass. No joint float32 draw over tokens *and* [MASK], which would reveal too
    rarely and too greedily (arXiv 2409.02908). `confident` has to draw at every [MASK] first."""
    nfe = torch.zeros(len(x)).long()
    left = is_masked.clone()
    all_equal = left.all()
    is_sure = order == "confident"
    formula = draw_with_log_prob if is_sure else draw
    if not is_sure:
        step_of = reveal_steps(left, steps, order, rng)
    for i in range(steps):
        if is_sure:
            due = left.sum(1) // (steps - i)
            wanted = left & (due > 0)[:, None]
        else:
            wanted = left & (step_of == i)
        if wanted.any():
            texts, where = pass_rows(wanted)
            x_t = x[texts]
            n = 1 if all_equal else len(x_t)               # one pass serves equal texts
            h = net.hidden(x_t[:n], torch.zeros(n, device=x.device))
            h = h.expand(len(x_t), -1, -1)
            tokens = draw_tokens(net, h, process.K, rng, where, formula=formula, args=law)
            if is_sure:
                where, tokens = surest(tokens, where, due[texts])
            x[texts] = x_t.masked_scatter(to_device(where, x.device), tokens)
            left[texts] &= ~where
            all_equal = False
            nfe += wanted.any(1)
        if callback:
            callback(i, x)
    return x, nfe


# -- uniform process

def uniform_step(logits, z, u_kind, u_token, alpha_t, alpha_s, temperature, top_p, K):
    """x_s ~ q(x_s | x_t = z, f), UDLM's posterior (eq. 15), as the mixture it is.

    logits (N, K), z and the two uniform draws (N,) -> (N,).

    f is the network's row, alpha_ts = alpha_t / alpha_s. Times K alpha_t f_z + 1 - alpha_t, the
    posterior puts K alpha_t f_z + alpha_ts - alpha_t on staying at z, spreads alpha_s - alpha_t as
    f and (1 - alpha_ts)(1 - alpha_s) evenly: choose the part, then draw in it, and the posterior
    itself is never formed.
    """
    logits = warp(logits, temperature, top_p)
    f_z = (-cross_entropy(logits, z)).exp()
    by_f = alpha_s - alpha_t
    by_chance = (1 - alpha_t / alpha_s) * (1 - alpha_s)
    u = u_kind * (K * alpha_t * f_z + 1 - alpha_t)
    from_f = sample_categorical(logits, u_token)
    from_all = (u_token * K).long().clamp(max=K - 1)
    moved = torch.where(u < by_f, from_f, from_all)
    return torch.where(u < by_f + by_chance, moved, z)


def likeliest(logits, z, bonus, temperature, top_p):       # (N, K), (N,) -> (N,)
    """argmax of f weighed by its own token; with bonus 0, of f alone."""
    return weigh_token(warp(logits, temperature, top_p), z, bonus).argmax(-1)


def sample_uniform(net, process, x, is_free, steps, rng, law, ending, callback):
    """The number that decides whether a token changes is drawn first. A step changes it with
    probability at most (by_f + by_chance) / (1 - alpha_t), whatever the network says, so tokens
    above that bound need no head, and texts with none below it no pass. The last step takes all."""
    device = x.device
    nfe = torch.zeros(len(x)).long()
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    for i in range(steps):
        t = times[i:i + 2]
        alpha_t, alpha_s = process.alpha(t)[0]
        is_end = i == steps - 1 and ending != "ancestral"
        most = alpha_s - alpha_t + (1 - alpha_t / alpha_s) * (1 - alpha_s)
        u_kind = torch.rand(is_free.shape, generator=rng, dtype=torch.float64)
        wanted = is_free if is_end else is_free & (u_kind * (1 - alpha_t) < most)
        if wanted.any():
            texts, where = pass_rows(wanted)
            x_t = x[texts]
            sigma = process.sigma(t[:1].float()).expand(len(x_t))
            h = net.hidden(x_t, sigma)
            if is_end:
                bonus = token_bonus(sigma, process.K) * (ending == "map")
                new = per_row(likeliest, process.K, (net,), (h,), (x_t, bonus, *law), where)
            else:
                u_token = uniforms(x_t.shape, rng, device)
                alphas = to_device(process.alpha(t.float())[0], device)
                u_kind = u_kind[texts].to(u_token.dtype)
                args = (x_t, u_kind, u_token, *alphas, *law, process.K)
                new = per_row(uniform_step, process.K, (net,), (h,), args, where)
            x[texts] = x_t.masked_scatter(to_device(where, device), new)
            nfe += wanted.any(1)
        if callback:
            callback(i, x)
    return x, nfe
