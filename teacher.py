# SPDX-License-Identifier: MIT
"""Two noising processes on tokens, and the losses that train a diffusion teacher on them.

    Masked    each token turns into [MASK] and stays it        MDLM, arXiv 2406.07524
    Uniform   each token turns into a uniformly random token   UDLM, 2412.10193; Duo, 2506.10892

Time t in [0, 1]: 0 is clean, 1 noise. alpha_t falls from 1 to about 0, dalpha_t < 0 is its slope.
x_0, x_t are (B, L) int64; K is the number of words (for Masked, [MASK] is token K, the last one);
x_0_probs, log_probs are rows over the K words. All losses are nats per token.

Both processes offer the same names: alpha, sigma, corrupt, log_probs, nelbo, prior.
Training draws (times, masks) come from a CPU generator: the host then knows which positions count
without waiting for the device, and a run draws the same noise on every device.

Differences from the authors' code: alpha(gamma) and its slope by quadrature for any K, not pickled
tables and forward differences; SUBS by leaving [MASK] out of the projection, not by -1e6.
To reuse: copy this file and idlm_loss.py (its tools; torch only).
"""
import math
from dataclasses import dataclass

import torch

from idlm_loss import (cross_entropy, entry, flat_rows, frozen, is_enough, per_row, rows_of,
                       to_device, uniform_nelbo_probs, upcast)

EPS = 1e-3                                  # alpha at t = 1, and the smallest training time


def stratified_times(B, rng, t_min=EPS):
    """Row i of B draws from the i-th of B equal slices of [t_min, 1]: less variance, same mean."""
    t = (torch.arange(B, device=rng.device) + torch.rand(B, generator=rng, device=rng.device)) / B
    return t_min + (1 - t_min) * t


def log_linear(t):                                         # (B,) -> alpha_t, dalpha_t: (B,) each
    return 1 - (1 - EPS) * t, torch.full_like(t, -(1 - EPS))


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
        """Time conditioning is off: the number of masks tells the time."""
        return torch.zeros_like(t)

    def weight(self, t):                                   # -dalpha_t / (1 - alpha_t) = 1 / t here
        alpha_t, dalpha_t = self.alpha(t)
        return -dalpha_t / (1 - alpha_t)

    def prior(self, B, L, rng):
        return torch.full((B, L), self.mask_id)

    def draw_mask(self, t, L, rng):                        # (B,) -> (B, L) bool: where [MASK]
        u = torch.rand(len(t), L, generator=rng, device=rng.device)
        return u >= self.alpha(t)[0][:, None].to(u.device)

    def corrupt(self, x_0, t, rng):
        return x_0.masked_fill(self.draw_mask(t, x_0.shape[1], rng).to(x_0.device), self.mask_id)

    def log_probs(self, logits, x_t):                      # (..., V), (...) -> (..., K)
        """SUBS (MDLM): [MASK] is never predicted, a visible token is copied."""
        log_probs = upcast(logits[..., :self.K]).log_softmax(-1)
        visible = (x_t != self.mask_id)[..., None]
        copied = torch.arange(self.K, device=x_t.device) == x_t[..., None]
        return torch.where(visible, torch.where(copied, 0.0, -torch.inf), log_probs)

    def nelbo(self, log_probs, x_0_probs, x_t, t):         # (B, L, K) x2, (B, L), (B,) -> (B, L)
        """MDLM's bound on -log p per token, for simplex targets; visible positions: 0."""
        counts = (x_0_probs != 0) & (x_t == self.mask_id)[..., None]       # elsewhere: 0 * -inf
        cross_entropy = -(x_0_probs * log_probs.masked_fill(~counts, 0)).sum(-1)
        return self.weight(t)[:, None] * cross_entropy


def mdlm_loss(net, process, x_0, rng, t=None):
    """MDLM's training loss, mean nats per token. x_0 (B, L) on the CPU.

    The head runs at masked positions only: SUBS makes the loss 0 at the others.
    """
    t = stratified_times(len(x_0), rng) if t is None else t
    x_t = process.corrupt(x_0, t, rng)
    h = net.hidden(x_t, process.sigma(t)).flatten(0, 1)
    rows = flat_rows(x_t == process.mask_id, h.device)
    target = to_device(x_0, h.device).flatten()[rows]
    weight = rows_of(process.weight(t), x_0.shape[1], h.device)[rows, 0]
    nll = per_row(cross_entropy, process.K, (net,), h[rows], target)
    return (weight * nll).sum() / x_0.numel()


class Uniform:
    """q(x_t | x_0): each token is kept with probability alpha_t, else drawn uniformly from all K.

    Two clocks. Hard tokens use the log-linear schedule `alpha(t)`. The Gaussian clock `gaussian(t)`
    is Duo's: w = scale * x_0 + std * xi has argmax(w) distributed as q at some alpha(gamma), and
    gamma is linear in t between the values where alpha is alpha_max and alpha_min.
    """
    alpha = staticmethod(log_linear)

    def __init__(self, vocab_size, alpha_max=0.999, alpha_min=1e-3):
        self.vocab_size = self.K = vocab_size
        self.z = torch.arange(-9, 30, 0.05, dtype=torch.float64)
        self.Phi_power = ((self.K - 1) * torch.special.log_ndtr(self.z)).exp() * 0.05
        self.gamma_min, self.gamma_max = self.gamma_at(alpha_max), self.gamma_at(alpha_min)

    def sigma(self, t):
        return -self.alpha(t)[0].log()

    def prior(self, B, L, rng):
        return torch.randint(self.K, (B, L), generator=rng, device=rng.device)

    def draw_noise(self, t, L, rng):                       # (B,) -> keep (B, L) bool, noise (B, L)
        u = torch.rand(len(t), L, generator=rng, device=rng.device)
        return u < self.alpha(t)[0][:, None].to(u.device), self.prior(len(t), L, rng)

    def corrupt(self, x_0, t, rng):
        keep, noise = self.draw_noise(t, x_0.shape[1], rng)
        return torch.where(keep.to(x_0.device), x_0, noise.to(x_0.device))

    def log_probs(self, logits, x_t):
        return upcast(logits[..., :self.K]).log_softmax(-1)

    def nelbo(self, log_probs, x_0_probs, x_t, t):         # (B, L, K) x2, (B, L), (B,) -> (B, L)
        """UDLM's bound on -log p per token, for simplex targets (one-hot rows: the hard form)."""
        a, dalpha = (rows_of(x, x_t.shape[1], x_t.device) for x in self.alpha(t))
        return uniform_nelbo_probs(log_probs.flatten(0, 1), x_0_probs.flatten(0, 1), x_t.flatten(),
                                   a, dalpha).view_as(x_t)

    def posterior(self, x_0_probs, x_t, alpha_t, alpha_s):  # (..., K), (...) -> (..., K)
        """q(x_s | x_t, x_0) of UDLM; the sampler draws from it without forming it."""
        K, a_ts = self.K, alpha_t / alpha_s
        here = torch.nn.functional.one_hot(x_t, K).to(x_0_probs)
        x_z = x_0_probs.gather(-1, x_t[..., None])
        return (K * alpha_t * x_z * here + (a_ts - alpha_t) * here + (alpha_s - alpha_t) * x_0_probs
                + (1 - a_ts) * (1 - alpha_s) / K) / (K * alpha_t * x_z + 1 - alpha_t)

    # -- the Gaussian link (Duo). P(gamma) = E[Phi(z)^(K-1)], z ~ N(m, 1) with
    # m = exp(-gamma / 2), is the chance that the token's own coordinate is the largest. The
    # trapezoid sum of so smooth an integrand is exact to about 1e-12, for any K.

    def alpha_of_gamma(self, gamma):                       # (B,) -> alpha, dalpha / dgamma: float64
        m = (-gamma.double() / 2).exp()[:, None]
        phi = (-(self.z - m) ** 2 / 2).exp() / math.sqrt(2 * math.pi)
        P = (phi * self.Phi_power).sum(-1)
        dP = (-m / 2 * (self.z - m) * phi * self.Phi_power).sum(-1)
        return (self.K * P - 1) / (self.K - 1), self.K * dP / (self.K - 1)

    def gamma_at(self, alpha):                             # alpha falls with gamma: bisection
        low, high = -6.0, 25.0
        for _ in range(60):
            middle = (low + high) / 2
            gamma = torch.tensor([middle], dtype=torch.float64)
            above = self.alpha_of_gamma(gamma)[0].item() > alpha
            low, high = (middle, high) if above else (low, middle)
        return low

    def gaussian(self, t):
        """At time t of the Gaussian clock: scale, std of w; alpha_t and dalpha_t of argmax(w)."""
        gamma = self.gamma_min + (self.gamma_max - self.gamma_min) * t.double()
        alpha_t, dalpha = self.alpha_of_gamma(gamma)
        scale, std = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return tuple(x.to(t.dtype) for x in
                     (scale, std, alpha_t, dalpha * (self.gamma_max - self.gamma_min)))

    def soft_corrupt(self, x_0, t, rng, tau=1e-3, k=16):   # -> (weights, ids): (B, L, k); z: (B, L)
        """softmax(w / tau) of clean tokens as its top k entries, and z = argmax(w).

        Away from the token w is plain noise, of which only the largest entries matter. Their law is
        known: of n uniforms in falling order each is the one before times u^(1 / how many are
        left), and they stand at random places: no vocabulary of Gaussians.
        """
        scale, std = (x[:, None, None] for x in self.gaussian(t.double())[:2])
        own = torch.randn(*x_0.shape, 1, generator=rng, dtype=torch.float64)
        u = torch.empty(*x_0.shape, 0, dtype=torch.float64)
        while True:
            k = min(k, self.K - 1)
            more = torch.rand(*x_0.shape, k - u.shape[-1], generator=rng, dtype=torch.float64)
            u = torch.cat([u, more], -1)
            left = torch.arange(self.K - 1, self.K - 1 - k, -1)
            others = std * torch.special.ndtri((u.log() / left).cumsum(-1).exp())
            w = torch.cat([scale + std * own, others], -1)
            if k == self.K - 1 or is_enough(w.amax(-1) - w[..., -1], tau):
                break
            k *= 2
        places = random_places(self.K - 1, k, x_0.shape, rng)
        ids = torch.cat([x_0[..., None], places + (places >= x_0[..., None])], -1)
        w, order = w.sort(-1, descending=True)
        ids = ids.gather(-1, order)
        return ((w / tau).softmax(-1).to(t.dtype), ids), ids[..., 0]

    def shared_argmax(self, x_0, times, rng):
        """argmax(scale_t x_0 + std_t xi) at several times with *one* noise xi.  # -> list of (B, L)

        Only xi at the token and the largest of the other K - 1 matter; that maximum is drawn from
        its own law, Phi^-1(u^(1/(K-1))), and its place is uniform: no vocabulary of Gaussians.
        """
        shape = x_0.shape
        own = torch.randn(shape, generator=rng, dtype=torch.float64)
        u = torch.rand(shape, generator=rng, dtype=torch.float64)
        largest = torch.special.ndtri(u ** (1 / (self.K - 1)))
        place = torch.randint(self.K - 1, shape, generator=rng)
        place = place + (place >= x_0)
        clocks = [[x[:, None] for x in self.gaussian(t.double())] for t in times]
        return [torch.where(scale + std * own > std * largest, x_0, place)
                for scale, std, *_ in clocks]


def random_places(n, k, shape, rng):                       # -> (*shape, k) int64
    """k different numbers below n, in random order. Floyd: a repetition takes the newest number."""
    found = torch.empty(*shape, 0, dtype=torch.int64)
    for newest in range(n - k, n):
        draw = torch.randint(newest + 1, (*shape, 1), generator=rng)
        again = (found == draw).any(-1, keepdim=True)
        found = torch.cat([found, torch.where(again, newest, draw)], -1)
    return found.gather(-1, torch.rand(found.shape, generator=rng).argsort(-1))


def duo_loss(net, process, x_0, rng, soft=False, t=None):
    """Duo's training loss, mean nats per token: the NELBO at hard tokens on the log-linear clock,
    or (soft, the curriculum of the first half) with the network reading softmax(w / tau) and the
    NELBO taken at argmax(w) on the Gaussian clock."""
    t = stratified_times(len(x_0), rng) if t is None else t
    if soft:
        _, _, a, dalpha = process.gaussian(t)
        x_in, z = process.soft_corrupt(x_0, t, rng)
    else:
        a, dalpha = process.alpha(t)
        x_in = z = process.corrupt(x_0, t, rng)
    h = net.hidden(x_in, -a.log())
    L, rows = x_0.shape[1], (to_device(x, h.device).flatten() for x in (x_0, z))
    return per_row(hard_nelbo, process.K, (net,), h.flatten(0, 1), *rows, rows_of(a, L, h.device),
                   rows_of(dalpha, L, h.device), process.K).mean()


def hard_nelbo(logits_f, x, z, a, dalpha, K=None):         # (N, K), (N,) x2, (N, 1) x2 -> (N,)
    """`uniform_nelbo` for the one-hot target x, with the target's sums written out.

    xbar is K a + 1 - a at x and b = 1 - a elsewhere, so only fbar's log runs over the vocabulary.
    """
    K, b = K or logits_f.shape[-1], 1 - a
    fbar = K * a * upcast(logits_f).softmax(-1) + b
    fbar_z, fbar_x = entry(fbar, z), entry(fbar, x)
    top, hit = K * a + b, (x == z)[:, None]
    xbar_z = torch.where(hit, top, b)
    cross = b * ((fbar_z / b).log() * K - (fbar / b).log().sum(-1, keepdim=True)) \
        + K * a * (fbar_z.log() - fbar_x.log())            # sum_v xbar_v log(fbar_z / fbar_v)
    own = top * top.log() + (K - 1) * b * b.log() - K * xbar_z.log()   # ... log(xbar_v / xbar_z)
    return (-dalpha / (K * a) * ((cross + own) / xbar_z - K / xbar_z + K / fbar_z))[:, 0]


def dcd_loss(student, teacher, process, x_0, delta, rng, t=None):
    """Discrete consistency distillation (Duo): KL(student(z_t) || teacher(z_s)), s = t - delta, the
    two states being argmaxes of one Gaussian path. Mean nats per token; none to the teacher."""
    t = stratified_times(len(x_0), rng) if t is None else t
    s = (t - delta).clamp(min=0)
    z_t, z_s = process.shared_argmax(x_0, (t, s), rng)
    h = student.hidden(z_t, -process.gaussian(t)[2].log())
    with torch.no_grad():
        h_teacher = teacher.hidden(z_s, -process.gaussian(s)[2].log())

    return per_row(kl, process.K, (student, frozen(teacher)),
                   h.flatten(0, 1), h_teacher.flatten(0, 1)).mean()


def kl(logits_p, logits_q):                                # (N, K) x2 -> (N,)
    log_p, log_q = upcast(logits_p).log_softmax(-1), upcast(logits_q).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
