"""Exact sums over every text of a tiny vocabulary, in float64: the oracle behind the theorem tests.

Of the code under test only `process.alpha`, `process.log_probs` and `process.nelbo` are called; the
forward law and the best denoiser are written out here. Works for any process whose tokens are
noised one by one (masked: K words and [MASK]; uniform: K words).

    K words, L tokens, V token ids (K, or K + 1 with [MASK])
    law        (K^L,) probability of every text, in the order of `texts(K, L)`
    likelihood (K^L, V^L) q(x_t | x_0) of every noised text, in the order of `texts(V, L)`
    rows       (V^L, L, K) a denoiser: for every noised text, a distribution at every position
"""
from types import SimpleNamespace

import numpy as np
import torch


def texts(K, L):                                           # -> (K^L, L) int64, first token slowest
    return torch.cartesian_prod(*[torch.arange(K)] * L).view(-1, L)


def index_of(x, V):                                        # (..., L) -> (...): row in texts(V, L)
    index = torch.zeros(x.shape[:-1], dtype=torch.int64)
    for l in range(x.shape[-1]):
        index = index * V + x[..., l]
    return index


def random_law(n, rng, sharpness=1.0):                     # -> (n,) all positive
    return (sharpness * torch.randn(n, generator=rng, dtype=torch.float64)).softmax(0)


def random_rows(shape, rng, sharpness=1.0):                # -> (*shape), simplex in the last one
    return (sharpness * torch.randn(shape, generator=rng, dtype=torch.float64)).softmax(-1)


def transition(process, t):                                # -> (K, V): q(token at t | token at 0)
    a, K = process.alpha(t)[0], process.K
    words = a * torch.eye(K, dtype=torch.float64)
    if process.vocab_size == K + 1:                        # masked
        return torch.cat([words, (1 - a).expand(K, 1)], 1)
    return words + (1 - a) / K


def factors(process, t, L):                                # -> L of (K^L, V^L): q at each position
    q, x_0, x_t = transition(process, t), texts(process.K, L), texts(process.vocab_size, L)
    return [q[x_0[:, l]][:, x_t[:, l]] for l in range(L)]


def product(matrices, like):
    out = torch.ones_like(like)
    for m in matrices:
        out = out * m
    return out


def best_denoiser(process, t, law, L):                     # -> rows (V^L, L, K)
    """p(x_0^l | the other noised tokens): the minimiser of the NELBO of either process.

    Masked: at a [MASK] the position's own token says nothing, so this is p(x_0^l | x_t).
    """
    x_0, q = texts(process.K, L), factors(process, t, L)
    rows = []
    for l in range(L):
        others = law[:, None] * product(q[:l] + q[l + 1:], q[l])             # (K^L, V^L)
        joint = torch.stack([others[x_0[:, l] == v].sum(0) for v in range(process.K)], -1)
        rows.append(joint / joint.sum(-1, keepdim=True))
    return torch.stack(rows, 1)


def nelbo_of_texts(process, t, rows, L):                   # -> (K^L,): nats per text, at time t
    """E over x_t of the NELBO of `rows`, for every clean text."""
    x_0, x_t = texts(process.K, L), texts(process.vocab_size, L)
    q = factors(process, t, L)
    likelihood = product(q, q[0])
    one_hot = torch.nn.functional.one_hot(x_0, process.K).double()
    log_probs = process.log_probs(rows.log(), x_t)
    S, N, K = len(x_0), len(x_t), process.K
    nelbo = process.nelbo(log_probs.expand(S, N, L, K).flatten(0, 1),
                          one_hot[:, None].expand(S, N, L, K).flatten(0, 1),
                          x_t.expand(S, N, L).flatten(0, 1), t.expand(S * N))
    return (likelihood * nelbo.sum(-1).view(S, N)).sum(1)


def nodes(n, power=1):
    """Gauss-Legendre times and weights on [0, 1], in s where t = s^power.

    The masked integrand is a polynomial in t of degree L - 1: a few nodes are exact. A power of 3
    or more tames what behaves like log t at t = 0.
    """
    x, w = np.polynomial.legendre.leggauss(n)
    s, w = torch.tensor((x + 1) / 2), torch.tensor(w / 2)
    return [(t[None], weight) for t, weight in zip(s ** power, w * power * s ** (power - 1))]


def exact_nelbo(process, law_for_rows, L, times):          # -> (K^L,): nats per text
    """The NELBO of every text under the best denoiser of `law_for_rows`."""
    return sum(w * nelbo_of_texts(process, t, best_denoiser(process, t, law_for_rows, L), L)
               for t, w in times)


def exact_gap(process, p, p_star, L, times, beta=1.0):     # -> (): nats per text, differentiable
    """L(f*, p) - beta min_f L(f, p), with f* and f the best denoisers of p* and of p."""
    return (p * (exact_nelbo(process, p_star, L, times)
                 - beta * exact_nelbo(process, p, L, times))).sum()


def kl(p, q):
    return (p * (p / q).log()).sum()


def noised(process, t, law, L):                            # -> (V^L,): the law of x_t
    q = factors(process, t, L)
    return law @ product(q, q[0])


def kl_at(process, t, p, p_star, L):
    return kl(noised(process, t, p, L), noised(process, t, p_star, L))


class Table:
    """A network that looks its logits up: `hidden` finds them, `project` hands them on.

    logits (V^L, L, >= K). All that the losses and the sampler ask of a network; logs its inputs.
    """

    def __init__(self, logits, V):
        self.logits, self.V, self.device = logits, V, logits.device
        self.config, self.training, self.seen = SimpleNamespace(latent_dim=0, latent_words=0), \
            False, []

    def hidden(self, x, sigma=None, z=None):
        self.seen.append(x)
        return self.logits[index_of(x, self.V)]

    def project(self, rows):
        return rows

    def __call__(self, x, sigma=None, z=None):
        return self.project(self.hidden(x, sigma, z))

    def eval(self):
        return self.train(False)

    def train(self, mode=True):
        self.training = mode
        return self
