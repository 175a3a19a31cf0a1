# SPDX-License-Identifier: MIT
"""The latent-mixture generator, and the few-step sampler that teacher and generator share.

    p_theta(x) = E_eps prod_i Cat(x_i; G_i(eps))                            IDLM, arXiv 2602.19066

eps = (x_tilde, sigma, z): real text noised to a random level t_tilde, which is what the generator
meets at every step of sampling, and optionally a latent z. Tokens are independent only
given eps, so the mixture carries dependencies that one factorised pass cannot. What a copy of the
teacher has to unlearn is to answer with marginals: under the IDLM loss its rows turn into atoms.

One pass of the masked process starts from an all-[MASK] text, which holds no randomness: there the
mixture has a single component. Two repairs. Every n-th word is there already, drawn about as often
as training text has it (random words among [MASK]: Di[M]O, arXiv 2503.15457): that asks no pass, and no
training, since a text noised to t_tilde = 1 - 1/n looks like it: so far apart words hardly depend
on each other. Or z, N(0, 1) at every position, is added to the embeddings of an all-[MASK] text
through a random projection.

A pass draws its tokens independently, so they had better stand far apart: the masked sampler
reveals every n-th position in a step, not random ones (evenly spread: Halton-MaskGIT, arXiv
2503.17076).

Sampling counts t down from 1 to 0; N steps are at most N network passes.
To reuse: copy this file, teacher.py and idlm_loss.py.
"""
import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from idlm_loss import (device_rng, flat_rows, own_token, per_row, sample_categorical, to_device,
                       uniforms, upcast, weigh_in)
from teacher import Masked


class Latent(NamedTuple):
    """eps, the inputs of the generator's network in its order: net.hidden(*eps)."""
    x: torch.Tensor                         # x_tilde: (B, L) tokens, or a soft input (model.py)
    sigma: torch.Tensor                     # (B,)
    z: torch.Tensor = None                  # (B, L, latent_dim), see added_latent


def turns(B, L, n, rng):                                   # -> (B, L) in 0 ... n - 1
    """The step that reveals a position: every n-th one, from a random one on. The next halve the
    gaps, then quarter them, ...: 0 8 4 12 2 ... of 16. Left to right, a step next to the last one's,
    generators wrote names and stage directions over and over."""
    bits, turn = (n - 1).bit_length(), torch.arange(n)
    turn[sorted(range(n), key=lambda i: f"{i:0{bits}b}"[::-1])] = torch.arange(n)
    return turn[(torch.arange(L) + torch.randint(n, (B, 1), generator=rng)) % n]


def draw_words(net, here, mask_id, rng, passes=1):         # (B, L) bool -> (B, L), elsewhere [MASK]
    """Words about as frequent as in training text (train.fit_words): what a step of the sampler
    draws where there is nothing to go by, at no pass. passes: that the text will take."""
    words = torch.multinomial(net.word_frequencies(passes), here.numel(), True, generator=rng)
    return torch.where(here, words.view(here.shape), mask_id)


def added_latent(net, x, mask_id, rng):
    """z for the texts of x (B, L), or None for a network without one: N(0, 1) for those that are
    all [MASK], else 0. Visible words tell texts apart already: z beside them was no better in one
    pass and worse from four on (results/laptop_latent.json)."""
    config, device = net.config, net.device
    if not config.latent_dim:
        return None
    rng, blank = device_rng(rng, device), to_device((x == mask_id).all(1), device)
    z = torch.randn(*x.shape, config.latent_dim, generator=rng, device=device)
    return z * blank[:, None, None]


def draw_latent(net, process, x_0, t_tilde, rng, soft=False):
    """eps for the texts x_0 (B, L) at levels t_tilde (B,).

    soft (uniform process): the network reads the Gaussian state of x_0 at t_tilde, as published.
    """
    if soft:
        x, _ = process.soft_corrupt(x_0, t_tilde, rng)
        return Latent(x, -process.gaussian(t_tilde)[2].log())
    x = process.corrupt(x_0, t_tilde, rng)
    if not isinstance(process, Masked):
        return Latent(x, process.sigma(t_tilde))
    # alpha(1) is 1e-3, but sampling starts without any word, or with every n-th
    start, n = process.prior(*x.shape, rng), net.config.latent_words
    if n:
        start = draw_words(net, turns(*x.shape, n, rng) == 0, process.mask_id, rng)
    x = torch.where((t_tilde == 1)[:, None], start, x)
    return Latent(x, process.sigma(t_tilde), added_latent(net, x, process.mask_id, rng))


def log_rows(net, process, eps, weigh=False):              # -> log G(eps): (B, L, K)
    x = eps.x if torch.is_tensor(eps.x) else eps.x[1][..., 0]
    log_G = process.log_probs(net(*eps), x.to(net.device))
    if not weigh:
        return log_G
    own = own_token(eps, process.K, net.device)
    return weigh_in(log_G.flatten(0, 1), *own).log_softmax(-1).view_as(log_G)


def generate_probs(net, process, eps, weigh=False):
    """x_0_probs (B, L, K), rows on the simplex: all of G(eps) at once, for small vocabularies.
    weigh: of a uniform generator trained so (train.py --uniform_update hard:weighed)."""
    return log_rows(net, process, eps, weigh).exp()


@torch.no_grad()
def mixture_log_prob(net, process, x_0, latents, weigh=False):
    """Monte-Carlo log p_theta(x_0) ~= log mean_k prod_i G_i(eps_k)[x_i], nats per text.

    x_0 (B, L); latents: an iterable of eps, K independent draws for those B texts; weigh: see
    generate_probs. Biased low: the log of an average is below the average's log in expectation
    (Jensen), less so as K grows, so the true log-likelihood is at least what this converges to from
    below.
    """
    terms = []
    for eps in latents:
        log_G = log_rows(net, process, eps, weigh)
        terms.append(log_G.gather(-1, x_0.to(net.device)[..., None])[..., 0].sum(-1))
    return torch.stack(terms).logsumexp(0) - math.log(len(terms))


# ---- sampling -----------------------------------------------------------------------------------

class Sample(NamedTuple):
    tokens: torch.Tensor                    # (B, L) int64, on the CPU
    nfe: torch.Tensor                       # (B,) network passes that each text took, <= steps


def warp(logits, temperature, top_p):                      # (N, K) -> (N, K)
    """Divide by the temperature; then keep the fewest words that hold the share top_p."""
    logits = upcast(logits) / temperature
    if top_p < 1:
        ordered, ids = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(-1, ids, ordered.masked_fill(before >= top_p, -torch.inf))
    return logits


def draw(logits, u, temperature, top_p):                   # (N, K), (N,) -> (N,)
    return sample_categorical(warp(logits, temperature, top_p), u)


SCHEDULES = "even", "linear", "cosine"


def words_first(net, process, schedule):    # every so many-th word is there at first, at no pass; 0: none
    return net.config.latent_words if isinstance(process, Masked) and schedule == "even" else 0


def own_temperature(net, process, steps, schedule):
    """Of the network's draws, where nobody says: 1; but 1/2 in one pass, 3/4 in four, 0.88 in 16 for
    texts that begin with words. Words tell texts apart, so the network need not: the tokens that
    one pass draws know nothing of each other, and the fewer the passes, the more of them there are."""
    return round(1 - 0.5 / math.sqrt(steps), 2) if words_first(net, process, schedule) else 1.0


def step_times(steps, schedule):                           # -> [1, ..., 0], steps + 1 times
    """even, linear: equal steps; with cosine (MaskGIT, arXiv 2202.04200) small ones first, as long
    as there are few words for the next ones to go by; t = cos(pi/2 i / steps)."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: choose one of {SCHEDULES}")
    x = torch.arange(steps + 1, dtype=torch.float64) / steps
    t = (math.pi / 2 * x).cos() if schedule == "cosine" else 1 - x
    return [*t[:-1].tolist(), 0.0]


@torch.no_grad()
def sample(net, process, num_texts, length, steps, rng, *, temperature=None, top_p=1.0, prompt=None,
           ending="ancestral", schedule="even", callback=None):
    """Write num_texts texts of `length` tokens in at most `steps` network passes.

    net       a DiT: the teacher, or the generator in its place
    rng       a CPU torch.Generator: equal seeds give equal texts
    prompt    (length,) or (num_texts, length) tokens, -1 where the model writes; the rest stays
    temperature   of the network's draws; default: own_temperature
    ending    uniform process: 'ancestral', 'greedy' (last step: the likeliest word given also the
              token it stands on), 'greedy-published' (the likeliest word under the network alone)
    schedule  'even': equal steps, and of the masked process a step reveals every n-th position,
              after a first turn of words by frequency, where the network knows that, at no pass;
              'linear' (as published), 'cosine': random positions; times as in step_times
    callback  called with (step, x_t (B, L)) after every step, for showing
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    free = torch.ones(num_texts, length, dtype=torch.bool)
    x = process.prior(num_texts, length, rng)
    if prompt is not None:
        prompt = prompt.expand(num_texts, length)
        free = prompt < 0
        x = torch.where(free, x, prompt)
    walk, when = sample_uniform, None
    if isinstance(process, Masked):
        walk, words = sample_masked, words_first(net, process, schedule)
        n = min(max(steps + 1, words) if words else steps, length)
        turn, first = turns(num_texts, length, n, rng), int(words > 0)
        if words:                                          # the first turn, at no pass
            near = F.max_pool1d((~free).float()[:, None], 2 * n - 1, 1, n - 1)[:, 0] > 0
            x = torch.where(near, x, draw_words(net, turn == 0, process.mask_id, rng, steps))
            free = x == process.mask_id                    # none within n of a prompt's
        when = 1 - (turn - first + 0.5) / (n - first) if schedule == "even" else \
            torch.rand(free.shape, generator=rng, dtype=torch.float64)
    was_training = net.training
    if temperature is None:
        temperature = own_temperature(net, process, steps, schedule)
    how = to_device(torch.tensor(temperature), net.device), top_p   # a tensor: compiled only once
    x, nfe = walk(net.eval(), process, x, free, step_times(steps, schedule), rng, how,
                  when=when, ending=ending, callback=callback)
    net.train(was_training)
    return Sample(x.cpu(), nfe)


def sample_masked(net, process, x, is_masked, times, rng, how, *, when, callback, **_):
    """Reverse steps of the masked process: the step from t to s reveals the positions with
    s <= `when` < t, (B, L) on the CPU. With `when` uniform that is exactly the ancestral step, which
    reveals a masked position with probability (t - s) / t; no joint float32 draw over words *and*
    [MASK], which would reveal too rarely and too greedily. Texts that reveal nothing take no pass,
    and the head runs at revealed positions alone."""
    nfe = torch.zeros(len(x), dtype=torch.int64)
    blank = bool(is_masked.all())                          # equal texts: one pass serves them all
    device, x = net.device, to_device(x, net.device)
    for i, s in enumerate(times[1:]):
        reveal = is_masked & (when >= s)
        if reveal.any():
            chosen, here = texts_and_rows(reveal, device)
            x_in = x[chosen]
            sigma = torch.zeros(len(x_in), device=device)
            z = added_latent(net, x_in, process.mask_id, rng)
            if z is not None:
                h = net.hidden(x_in, sigma, z)
            elif blank:
                h = net.hidden(x_in[:1], sigma[:1]).expand(len(x_in), -1, -1)
            else:
                h = net.hidden(x_in, sigma)
            rows = h.reshape(-1, h.shape[-1])[here]
            tokens = per_row(draw, process.K, (net,), rows, uniforms(len(rows), rng, device), *how)
            x[chosen] = x_in.flatten().index_copy(0, here, tokens).view_as(x_in)
            is_masked, blank = is_masked & ~reveal, False
            nfe += reveal.any(1)
        if callback:
            callback(i, x)
    return x, nfe


def texts_and_rows(wanted, device):                        # (B, L) bool, on the CPU
    """-> which texts a pass takes, and which rows of those it projects. Texts that want nothing
    sit out; but while most want something, the batch keeps its one shape."""
    some = wanted.any(1)
    if 2 * some.sum() > len(wanted):
        return slice(None), flat_rows(wanted, device)
    return flat_rows(some, device), flat_rows(wanted[some], device)


def uniform_step(logits, z, u_kind, u_word, alpha_t, alpha_s, temperature=1.0, top_p=1.0, K=None):
    """x_s ~ q(x_s | x_t = z, f), Uniform.posterior, as the mixture it is. (N, K), (N,) x3 -> (N,)

    Up to 1 / (K alpha_t f_z + 1 - alpha_t) the posterior puts K alpha_t f_z + alpha_ts - alpha_t on
    staying at z, spreads alpha_s - alpha_t as f and (1 - alpha_ts)(1 - alpha_s) evenly: choose the
    part, then draw in it, and the posterior itself is never formed.
    """
    K, a_ts, logits = K or logits.shape[-1], alpha_t / alpha_s, warp(logits, temperature, top_p)
    f_z = (logits.gather(1, z[:, None])[:, 0] - logits.logsumexp(-1)).exp()
    move, spread = alpha_s - alpha_t, (1 - a_ts) * (1 - alpha_s)
    u = u_kind * (K * alpha_t * f_z + 1 - alpha_t)
    drawn = sample_categorical(logits, u_word)
    even = (u_word * K).long().clamp(max=K - 1)
    return torch.where(u < move, drawn, torch.where(u < move + spread, even, z))


def greedy_end(logits, z, alpha_t, published=False, temperature=1.0, top_p=1.0, K=None):
    """argmax over v of f_v q(z | v): f is a leave-one-out posterior, so the token z under it has
    still to be weighed in. The published form takes the argmax of f alone. (N, K), (N,) -> (N,)"""
    logits = warp(logits, temperature, top_p)
    if not published:
        K = K or logits.shape[-1]
        bonus = torch.log1p(torch.as_tensor(K * alpha_t / (1 - alpha_t)))
        here = torch.arange(logits.shape[-1], device=z.device) == z[:, None]
        logits = torch.where(here, logits + bonus, logits)
    return logits.argmax(-1)


def sample_uniform(net, process, x, free, times, rng, how, *, ending, callback, **_):
    """Reverse steps of the uniform process. The number that decides whether a token changes is
    drawn first: a step changes it with probability (move + spread) / (K alpha_t f_z + 1 - alpha_t),
    at most (move + spread) / (1 - alpha_t) whatever the network says, so tokens above that bound
    need no head, and texts with none below it no pass. The last step takes all."""
    if ending not in ("ancestral", "greedy", "greedy-published"):
        raise ValueError(f"ending {ending!r}: choose ancestral, greedy or greedy-published")
    nfe, device, x = torch.zeros(len(x), dtype=torch.int64), net.device, to_device(x, net.device)
    for i, t in enumerate(map(torch.tensor, pairwise(times))):
        alpha_t, alpha_s = process.alpha(t.double())[0]
        end = i == len(times) - 2 and ending != "ancestral"
        bound = alpha_s - alpha_t + (1 - alpha_t / alpha_s) * (1 - alpha_s)
        u = torch.rand(free.shape, generator=rng, dtype=torch.float64)
        wanted = free if end else free & (u * (1 - alpha_t) < bound)
        if wanted.any():
            chosen, here = texts_and_rows(wanted, device)
            x_in, clock = x[chosen], to_device(process.alpha(t)[0], device)    # no recompilation
            h = net.hidden(x_in, process.sigma(t[:1]).repeat(len(x_in))).flatten(0, 1)[here]
            z = x_in.flatten()[here]
            if end:
                new = per_row(greedy_end, process.K, (net,), h, z, clock[0],
                              ending == "greedy-published", *how, process.K)
            else:
                u = to_device(u[wanted].to(clock.dtype if device.type == "mps" else u.dtype), device)
                new = per_row(uniform_step, process.K, (net,), h, z, u,
                              uniforms(len(z), rng, device), *clock, *how, process.K)
            x[chosen] = x_in.flatten().index_copy(0, here, new).view_as(x_in)
            nfe += wanted.any(1)
        if callback:
            callback(i, x)
    return x, nfe
