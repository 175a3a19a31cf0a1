# SPDX-License-Identifier: MIT
"""Two noising processes on tokens, and the losses that train a diffusion teacher on them.

    Masked    each token turns into [MASK] and stays it        MDLM, arXiv 2406.07524
    Uniform   each token turns into a uniformly random token   UDLM, 2412.10193; Duo, 2506.10892

Time t in [0, 1]: 0 is clean, 1 noise. alpha_t falls from 1 to about 0; dalpha_t < 0 is its slope.
A network reads sigma = -log alpha_t; 0 in the masked process. x_0, x_t are (B, L) int64. K is the
size of the vocabulary without [MASK], which is token K, the last one. Losses are nats per token.

free (B, L) bool marks the positions that the model writes; the others are a given prompt, which is
never noised and carries no loss. None: all are free. A loss is the mean over the free positions.

Times and masks come from a CPU rng: the host then has the masks without waiting for the device, and
a run draws the same noise on every device.

A loss is a formula on rows of logits. per_row (rows.py) calls it for the N positions of `where`
with logits (N, K) of each network, (B, L) arguments as (N,), (B,) arguments as columns (N, 1); it
returns (N,). mean_over divides their sum by the number of free positions. frozen(net): no gradient
to the head.

Difference from MDLM's code, which sets the logit of [MASK] to -1e6: here the head leaves it out.
To reuse: copy this file, gaussian.py and rows.py (torch only).
"""
from dataclasses import dataclass

import torch

from gaussian import GaussianClock
from rows import entry, frozen, mean_over, per_row, upcast, weighted_cross_entropy

T_MIN = 1e-3                                # the smallest training time, and alpha at t = 1


def stratified_times(B, rng):
    """Text i of B draws from the i-th of B equal slices of [T_MIN, 1]: less variance, same mean."""
    u = torch.rand(B, generator=rng, device=rng.device)
    t = (torch.arange(B, device=rng.device) + u) / B
    return T_MIN + (1 - T_MIN) * t


def log_linear(t):                                         # (B,) -> alpha_t, dalpha_t: (B,) each
    alpha_t = 1 - (1 - T_MIN) * t
    return alpha_t, torch.full_like(t, -(1 - T_MIN))


# ---- masked process -----------------------------------------------------------------------------

@dataclass
class Masked:
    """q(x_t | x_0): each token is kept with probability alpha_t, else [MASK]."""
    vocab_size: int                                        # V = K + 1
    alpha = staticmethod(log_linear)

    @property
    def K(self):
        return self.vocab_size - 1

    mask_id = K

    def sigma(self, t):
        """0, time conditioning is off: the number of masks says what t is."""
        return torch.zeros_like(t)

    def weight(self, t):                                   # -dalpha_t / (1 - alpha_t) = 1 / t
        alpha_t, dalpha_t = self.alpha(t)
        return -dalpha_t / (1 - alpha_t)

    def prior(self, B, L, rng):
        return torch.full((B, L), self.mask_id)

    def draw_mask(self, t, L, rng, free=None):             # (B,) -> (B, L) bool: where [MASK]
        u = torch.rand(len(t), L, generator=rng, device=rng.device)
        is_masked = u >= self.alpha(t)[0][:, None]
        return is_masked if free is None else is_masked & free

    def draw_noise(self, t, L, rng, soft=False, free=None):
        """The noise of x_t, as idlm_loss.py takes it. soft: of the uniform process alone."""
        return {
            "is_masked": self.draw_mask(t, L, rng, free),
            "weight": self.weight(t),
            "sigma": self.sigma(t),
            "mask_id": self.mask_id,
            "free": free,
        }

    def corrupt(self, x_0, t, rng, free=None):             # (B, L), (B,) -> x_t (B, L)
        is_masked = self.draw_mask(t, x_0.shape[1], rng, free)
        return x_0.masked_fill(is_masked.to(x_0.device), self.mask_id)

    def log_probs(self, logits, x_t):                      # (..., V), (...) -> (..., K)
        """SUBS (MDLM): [MASK] is never predicted, a visible token is copied."""
        log_probs = upcast(logits[..., :self.K]).log_softmax(-1)
        is_visible = (x_t != self.mask_id)[..., None]
        is_copied = torch.arange(self.K, device=x_t.device) == x_t[..., None]
        copied = torch.where(is_copied, 0.0, -torch.inf)
        return torch.where(is_visible, copied, log_probs)


def mdlm_loss(net, process, x_0, rng, t=None, free=None):
    """MDLM's training loss (arXiv 2406.07524, eq. 10): weight_t * -log f(x_t)[x_0] at [MASK].

    x_0 (B, L) on the CPU. Returns nats per token, the mean over free positions. The head runs at
    masked ones alone: under SUBS the loss is 0 at the others.
    """
    t = stratified_times(len(x_0), rng) if t is None else t
    x_t = process.corrupt(x_0, t, rng, free)
    h = net.hidden(x_t, process.sigma(t))
    nll = per_row(
        weighted_cross_entropy, process.K,
        nets=(net,),
        hidden=(h,),
        args=(x_0, process.weight(t)),
        where=x_t == process.mask_id,
    )
    return mean_over(free, nll, x_0)


# ---- uniform process ----------------------------------------------------------------------------

class Uniform:
    """q(x_t | x_0): each token is kept with probability alpha_t, else drawn uniformly from all K.

    It has two clocks: hard tokens follow the log-linear schedule `alpha(t)`, Gaussian states Duo's
    clock `gaussian(t)` (gaussian.py).
    """
    alpha = staticmethod(log_linear)

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.K = vocab_size
        self.gaussian = GaussianClock(vocab_size)

    def sigma(self, t):
        return -self.alpha(t)[0].log()

    def prior(self, B, L, rng):
        return torch.randint(self.K, (B, L), generator=rng, device=rng.device)

    def draw_keep(self, t, L, rng, free=None):
        """-> keep (B, L) bool, tokens (B, L): x_t is x_0 where `keep`, else the random token."""
        u = torch.rand(len(t), L, generator=rng, device=rng.device)
        keep = u < self.alpha(t)[0][:, None]
        tokens = self.prior(len(t), L, rng)
        return keep if free is None else keep | ~free, tokens

    def draw_noise(self, t, L, rng, soft=False, free=None):
        """The noise of x_t, as idlm_loss.py takes it for `hard`; soft: its Gaussian level."""
        if soft:
            scale, std, alpha_t, dalpha_t = self.gaussian(t)
            noise = {"scale": scale, "std": std}
        else:
            alpha_t, dalpha_t = self.alpha(t)
            keep, tokens = self.draw_keep(t, L, rng, free)
            noise = {"keep": keep, "tokens": tokens}
        sigma = -alpha_t.log()
        level = {"alpha": alpha_t, "dalpha": dalpha_t, "sigma": sigma}
        return noise | level | {"K": self.K, "free": free}

    def corrupt(self, x_0, t, rng, free=None):             # (B, L), (B,) -> x_t (B, L)
        keep, tokens = self.draw_keep(t, x_0.shape[1], rng, free)
        return torch.where(keep.to(x_0.device), x_0, tokens.to(x_0.device))

    def log_probs(self, logits, x_t):                      # (..., >= K), (...) -> (..., K)
        return upcast(logits[..., :self.K]).log_softmax(-1)


def one_hot_nelbo(logits_f, x, z, a, dalpha, K):           # (N, K), (N,) x2, (N, 1) x2 -> (N,)
    """UDLM's NELBO of f at the noised token z, for the one-hot target x, its sums written out.

    With xbar_v = K a x_v + 1 - a (fbar likewise) and c = -dalpha / (K a) it is
        c [ sum_v xbar_v / xbar_z log(fbar_z xbar_v / (fbar_v xbar_z)) - K / xbar_z + K / fbar_z ]
    xbar is K a + b at x and b = 1 - a elsewhere, so only log fbar runs over the vocabulary.
    """
    b = 1 - a
    fbar = K * a * upcast(logits_f).softmax(-1) + b
    fbar_z = entry(fbar, z)
    fbar_x = entry(fbar, x)
    top = K * a + b
    xbar_z = torch.where((x == z)[:, None], top, b)
    # sum_v xbar_v log(fbar_z / fbar_v): all tokens with weight b, and x with K a more
    flat_part = (fbar_z / b).log() * K - (fbar / b).log().sum(-1, keepdim=True)
    cross = b * flat_part + K * a * (fbar_z.log() - fbar_x.log())
    # sum_v xbar_v log(xbar_v / xbar_z)
    target_part = top * top.log() + (K - 1) * b * b.log() - K * xbar_z.log()
    bracket = (cross + target_part) / xbar_z - K / xbar_z + K / fbar_z
    return (-dalpha / (K * a) * bracket)[:, 0]


def duo_loss(net, process, x_0, rng, soft=False, t=None, free=None):
    """Duo's training loss (arXiv 2506.10892), mean nats per token. x_0 (B, L) on the CPU.

    Hard tokens: the NELBO on the log-linear clock. soft (the curriculum of the first half): the
    network reads softmax(w / tau) of the Gaussian state w (gaussian.py), and the NELBO is taken at
    argmax(w), on the Gaussian clock.
    """
    t = stratified_times(len(x_0), rng) if t is None else t
    if soft:
        _, _, alpha_t, dalpha_t = process.gaussian(t)
        x_in, z = process.gaussian.soft_corrupt(x_0, t, rng, free)
    else:
        alpha_t, dalpha_t = process.alpha(t)
        x_in = z = process.corrupt(x_0, t, rng, free)
    h = net.hidden(x_in, -alpha_t.log())
    nelbo = per_row(
        one_hot_nelbo, process.K,
        nets=(net,),
        hidden=(h,),
        args=(x_0, z, alpha_t, dalpha_t, process.K),
        where=free,
    )
    return nelbo.mean()


def dcd_loss(student, teacher, process, x_0, delta, rng, t=None, free=None):
    """Discrete consistency distillation (Duo): KL(student(z_t) || teacher(z_s)), s = t - delta.

    z_t and z_s are argmaxes of one Gaussian path. Mean nats per token; no gradient to the teacher.
    """
    t = stratified_times(len(x_0), rng) if t is None else t
    s = (t - delta).clamp(min=0)
    z_t, z_s = process.gaussian.shared_argmax(x_0, (t, s), rng, free)
    h = student.hidden(z_t, process.gaussian.sigma(t))
    with torch.no_grad():
        h_teacher = teacher.hidden(z_s, process.gaussian.sigma(s))
    divergence = per_row(
        kl, process.K,
        nets=(student, frozen(teacher)),
        hidden=(h, h_teacher),
        where=free,
    )
    return divergence.mean()


def kl(logits_p, logits_q):                                # (N, K) x2 -> (N,)
    log_p = upcast(logits_p).log_softmax(-1)
    log_q = upcast(logits_q).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
