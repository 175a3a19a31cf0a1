# SPDX-License-Identifier: MIT
"""Duo's Gaussian link (arXiv 2506.10892): uniform noise on tokens as the argmax of Gaussian noise.

    w = scale * x_0 + std * xi      x_0 one-hot among K tokens, xi ~ N(0, I)
    scale^2 = sigmoid(-gamma), std^2 = sigmoid(gamma)

argmax(w) is distributed as the uniform process' x_t at alpha(gamma). The teacher's curriculum and
the published IDLM-Duo update let a network read softmax(w / tau); DCD takes two argmaxes of one xi.

Difference from the authors' code: alpha(gamma) and its slope by quadrature for any K, not pickled
tables and forward differences. To reuse: copy this file and rows.py (torch only).
"""
import math

import torch
import torch.nn.functional as F

from rows import on_device, to_device

# Duo's published clock: gamma is linear in t between these, at K = 50,257. For another K the ends
# are those gammas at which alpha is the same.
PUBLISHED_K = 50_257
PUBLISHED_GAMMA = -3.55, -1.85


def normal(x):
    return (-x ** 2 / 2).exp() / math.sqrt(2 * math.pi)


def alpha_of_gamma(gamma, K):                              # (n,) -> alpha, dalpha / dgamma: float64
    """alpha is 1 where the noise is far too weak, 0 where far too strong, for every finite gamma.

    With m = exp(-gamma / 2), the token's own entry of w is the largest with probability
    P = E[Phi(m + xi)^(K - 1)], xi ~ N(0, 1). Kept or drawn back by chance, P is
    alpha + (1 - alpha) / K. The integrals are trapezoid sums, which converge fast for so smooth an
    integrand; tests/test_gaussian.py holds their error.
    """
    gamma = gamma.double()
    if not gamma.isfinite().all():
        raise ValueError(f"gamma {gamma.tolist()} is not finite: give numbers")
    step = 0.06                             # 0.08 errs by 1e-11 at K = 10^6
    xi = torch.arange(-9, 9, step, dtype=torch.float64)
    density = normal(xi)
    m = (-gamma / 2).exp().clamp(max=1e3)[:, None]         # from there on Phi(m + xi) is 1
    log_Phi = torch.special.log_ndtr(m + xi)
    is_largest = ((K - 1) * log_Phi).exp()
    P = (density * is_largest).sum(-1) * step
    alpha = (K * P - 1) / (K - 1)
    # dP / dm = (K - 1) E[Phi^(K - 2) phi], all terms positive; the (K - 1) of alpha cancels its own
    is_tied = normal(m + xi) * ((K - 2) * log_Phi).exp()
    dalpha_dm = K * (density * is_tied).sum(-1) * step
    dm_dgamma = -m[:, 0] / 2
    slope = dalpha_dm * dm_dgamma
    return alpha.clamp(0, 1), slope


def gamma_of_alpha(alpha, K):                              # (n,) -> (n,): alpha falls with gamma
    low = torch.full_like(alpha, -20.0)
    high = torch.full_like(alpha, 40.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_above = alpha_of_gamma(middle, K)[0] > alpha
        low = torch.where(is_above, middle, low)
        high = torch.where(is_above, high, middle)
    return low


class GaussianClock:
    """clock(t), (B,) -> scale and std of w; alpha_t and dalpha_t of argmax(w): (B,) each."""

    def __init__(self, K):
        self.K = K
        gamma = torch.tensor(PUBLISHED_GAMMA, dtype=torch.float64)
        if K != PUBLISHED_K:
            alpha, _ = alpha_of_gamma(gamma, PUBLISHED_K)
            gamma = gamma_of_alpha(alpha, K)
        self.gamma_min, self.gamma_max = gamma.tolist()

    def __call__(self, t):
        span = self.gamma_max - self.gamma_min
        gamma = self.gamma_min + span * t.double()
        alpha_t, slope = alpha_of_gamma(gamma, self.K)
        scale = torch.sigmoid(-gamma).sqrt()
        std = torch.sigmoid(gamma).sqrt()
        return scale.to(t), std.to(t), alpha_t.to(t), (slope * span).to(t)

    def sigma(self, t):                                    # of argmax(w): -log alpha_t
        return -self(t)[2].log()

    def soft_corrupt(self, x_0, t, rng, free=None, tau=1e-3, k=24):
        """softmax(w / tau) of tokens x_0 (B, L) at t (B,), as its k largest entries.

        Returns the soft input (weights, ids), each (B, L, k), and z = argmax(w) (B, L), on the
        device of x_0. Where not free, w is the token alone. Besides its own token, w is plain
        noise, of which only the largest entries matter. Their law is known, so a vocabulary of
        Gaussians is never drawn: of n uniforms in falling order each is the one before times
        u^(1 / number left), and they stand at random places. What k leaves out is below 1e-9 of the
        sum, but for one position in millions.
        """
        device = x_0.device
        rng = on_device(rng, device)
        scale, std, _, _ = self(t.double())
        scale = to_device(scale, device)[:, None]
        std = to_device(std, device)[:, None, None]
        k = min(k, self.K - 1)
        like = {"generator": rng, "device": device, "dtype": torch.float64}
        xi = torch.randn(*x_0.shape, 1, **like)
        u = torch.rand(*x_0.shape, k, **like)
        number_left = torch.arange(self.K - 1, self.K - 1 - k, -1, device=device)
        falling = (u.log() / number_left).cumsum(-1).exp()
        largest = torch.special.ndtri(falling)
        w = std * torch.cat([xi, largest], -1)
        w[..., 0] += scale
        if free is not None:
            w[..., 0].masked_fill_(~to_device(free, device), 100.0)
        places = random_places(self.K - 1, k, x_0.shape, rng)
        others = places + (places >= x_0[..., None])
        ids = torch.cat([x_0[..., None], others], -1)
        w, order = w.sort(-1, descending=True)
        ids = ids.gather(-1, order)
        weights = (w / tau).softmax(-1).to(t.dtype)
        return (weights, ids), ids[..., 0]

    def shared_argmax(self, x_0, times, rng, free=None):
        """argmax(w) at several times, with *one* noise xi.  # -> list of (B, L)

        Only xi at the token and the largest of the other K - 1 matter. That maximum is drawn from
        its law, Phi^-1(u^(1 / (K - 1))), and its place is uniform.
        """
        xi = torch.randn(x_0.shape, generator=rng, dtype=torch.float64)
        u = torch.rand(x_0.shape, generator=rng, dtype=torch.float64)
        largest = torch.special.ndtri(u ** (1 / (self.K - 1)))
        place = torch.randint(self.K - 1, x_0.shape, generator=rng)
        other = place + (place >= x_0)
        states = []
        for t in times:
            scale, std, _, _ = self(t.double())
            keep = scale[:, None] + std[:, None] * xi > std[:, None] * largest
            if free is not None:
                keep = keep | ~free
            states.append(torch.where(keep, x_0, other))
        return states


def random_places(n, k, shape, rng):                       # -> (*shape, k) int64
    """k different numbers below n, in random order, without a wait for the device.

    Of many numbers k + 8 are drawn and repetitions left out; more than 8 of them come once in
    10^12 rows.
    """
    device = rng.device
    if n <= 1024:
        return torch.rand(*shape, n, generator=rng, device=device).argsort(-1)[..., :k]
    draws = torch.randint(n, (*shape, k + 8), generator=rng, device=device)
    place, order = draws.sort(dim=-1, stable=True)
    is_repeated = F.pad(place.diff(dim=-1) == 0, (1, 0))
    order = order + is_repeated * (k + 8)                  # repetitions last
    return place.gather(-1, order.argsort(-1))[..., :k]
