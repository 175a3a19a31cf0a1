"""Exact sums over every text of a tiny vocabulary, in float64: what the code is tested against.

Of the code under test only `process.alpha`, `process.weight` and `process.log_probs` are called. The
forward law, the best denoiser and the dense NELBOs are written out in this file. Works for any
process that noises tokens one by one (masked: K tokens and [MASK]; uniform: K tokens).

    K tokens, L positions, V token ids (K, or K + 1 with [MASK])
    law     (K^L,) probability of every text, in the order of `texts(K, L)`
    rows    (V^L, L, K) a denoiser: for every noised text, a distribution at every position
    times   a list of (t, weight) from `nodes`: a quadrature over t in [0, 1]

All values are nats; of a text unless a docstring says per token.
"""
import numpy as np
import torch


def texts(K, L):
    """Every text, (K^L, L) int64, the first token slowest."""
    return torch.cartesian_prod(*[torch.arange(K)] * L).view(-1, L)


def index_of(x, V):
    """Row of a text in texts(V, L): (..., L) -> (...)."""
    index = torch.zeros(x.shape[:-1], dtype=torch.int64)
    for l in range(x.shape[-1]):
        index = index * V + x[..., l]
    return index


def random_law(n, rng, sharpness=1.0):
    """(n,) probabilities, all positive."""
    return random_rows((n,), rng, sharpness)


def random_rows(shape, rng, sharpness=1.0):
    """Rows on the simplex, along the last axis."""
    return (sharpness * torch.randn(shape, generator=rng, dtype=torch.float64)).softmax(-1)


# ---- the forward law and the best denoiser ------------------------------------------------------

def transition(process, t):
    """q(token at t | token at 0): (K, V). t: (1,)."""
    alpha, K = process.alpha(t)[0], process.K
    kept = alpha * torch.eye(K, dtype=torch.float64)
    if process.vocab_size == K + 1:                        # masked
        return torch.cat([kept, (1 - alpha).expand(K, 1)], 1)
    return kept + (1 - alpha) / K


def factors(process, t, L):
    """q(x_t^l | x_0^l) of every clean and every noised text: a list of L tables (K^L, V^L)."""
    q, x_0, x_t = transition(process, t), texts(process.K, L), texts(process.vocab_size, L)
    return [q[x_0[:, l]][:, x_t[:, l]] for l in range(L)]


def product(tables, like):
    out = torch.ones_like(like)
    for table in tables:
        out = out * table
    return out


def best_denoiser(process, t, law, L):
    """p(x_0^l | the other noised tokens), which minimises the NELBO of either process: (V^L, L, K).

    Masked: at a [MASK] the token itself says nothing, so this is p(x_0^l | x_t).
    """
    x_0, q = texts(process.K, L), factors(process, t, L)
    rows = []
    for l in range(L):
        others = law[:, None] * product(q[:l] + q[l + 1:], q[l])             # (K^L, V^L)
        joint = torch.stack([others[x_0[:, l] == v].sum(0) for v in range(process.K)], -1)
        rows.append(joint / joint.sum(-1, keepdim=True))
    return torch.stack(rows, 1)


def noised(process, t, law, L):
    """The law of x_t: (V^L,)."""
    q = factors(process, t, L)
    return law @ product(q, q[0])


def posterior(rows, x_t, alpha_t, alpha_s):
    """Uniform process: q(x_s | x_t), x_0 drawn from `rows`, by Bayes' rule: (..., K), (...) -> (..., K).

    UDLM prints it multiplied out (eq. 15). With a leave-one-out row this is what sampling draws from.
    """
    K, keep = rows.shape[-1], alpha_t / alpha_s
    x_s = alpha_s * rows + (1 - alpha_s) / K
    joint = x_s * (keep * torch.nn.functional.one_hot(x_t, K).to(rows) + (1 - keep) / K)
    return joint / joint.sum(-1, keepdim=True)


def kl(p, q):
    return (p * (p / q).log()).sum()


def kl_at(process, t, p, p_star, L):
    """KL of two laws, both noised to t."""
    return kl(noised(process, t, p, L), noised(process, t, p_star, L))


# ---- the NELBO, dense ---------------------------------------------------------------------------

def masked_nelbo(log_probs, x_0_probs, is_masked, weight):
    """MDLM's bound, nats per token: -weight <x_0_probs, log f> at masked positions, else 0.

    log_probs, x_0_probs: (B, L, K); is_masked: (B, L); weight = -dalpha_t / (1 - alpha_t): (B,).
    """
    counts = is_masked[..., None] & (x_0_probs != 0)                         # else 0 * -inf
    inner = -(x_0_probs * log_probs.masked_fill(~counts, 0)).sum(-1)
    return weight[:, None] * inner


def uniform_nelbo(log_probs, x_0_probs, z, alpha, dalpha):
    """UDLM's and Duo's bound, nats per token, as printed in the papers. With xbar = K a x + 1 - a

    -dalpha / (K a) [ sum_v xbar_v / xbar_z log(fbar_z xbar_v / (fbar_v xbar_z))
                      - K / xbar_z + K / fbar_z ]

    log_probs, x_0_probs: (B, L, K); z: (B, L) noised tokens; alpha, dalpha: (B,) at t.
    """
    K, a = log_probs.shape[-1], alpha[:, None, None]
    xbar = K * a * x_0_probs + 1 - a
    fbar = K * a * log_probs.exp() + 1 - a
    xbar_z = xbar.gather(-1, z[..., None])
    fbar_z = fbar.gather(-1, z[..., None])
    inner = (xbar / xbar_z * (fbar_z * xbar / (fbar * xbar_z)).log()).sum(-1, keepdim=True)
    return (-dalpha / (K * alpha))[:, None] * (inner - K / xbar_z + K / fbar_z)[..., 0]


def nelbo(process, log_probs, x_0_probs, x_t, t):
    """The process's bound at times t (B,), for simplex or one-hot targets: (B, L) nats per token."""
    if process.vocab_size == process.K + 1:
        return masked_nelbo(log_probs, x_0_probs, x_t == process.mask_id, process.weight(t))
    return uniform_nelbo(log_probs, x_0_probs, x_t, *process.alpha(t))


def nelbo_of_texts(process, t, rows, L):
    """Of every clean text the expectation over x_t of the NELBO of `rows`, at time t: (K^L,)."""
    x_0, x_t = texts(process.K, L), texts(process.vocab_size, L)
    S, N, K = len(x_0), len(x_t), process.K
    q = factors(process, t, L)
    one_hot = torch.nn.functional.one_hot(x_0, K).double()
    log_probs = process.log_probs(rows.log(), x_t)
    each = nelbo(process,
                 log_probs.expand(S, N, L, K).flatten(0, 1),
                 one_hot[:, None].expand(S, N, L, K).flatten(0, 1),
                 x_t.expand(S, N, L).flatten(0, 1),
                 t.expand(S * N))
    return (product(q, q[0]) * each.sum(-1).view(S, N)).sum(1)


def nodes(n, power=1):
    """Gauss-Legendre times and weights on [0, 1], in s where t = s^power.

    The masked integrand is a polynomial in t of degree L - 1: a few nodes are exact. A power of 3
    or more tames what behaves like log t at t = 0.
    """
    x, w = np.polynomial.legendre.leggauss(n)
    s, w = torch.tensor((x + 1) / 2), torch.tensor(w / 2)
    return [(t[None], weight) for t, weight in zip(s ** power, w * power * s ** (power - 1))]


def exact_nelbo(process, law_for_rows, L, times):
    """The NELBO of every text under the best denoiser of `law_for_rows`: (K^L,)."""
    return sum(weight * nelbo_of_texts(process, t, best_denoiser(process, t, law_for_rows, L), L)
               for t, weight in times)


# ---- a network that is a table ------------------------------------------------------------------

class Table:
    """A network that looks its logits up: all that the losses and the sampler ask of one.

    logits: (V^L, L, >= K), a row for every noised text. `seen` lists the inputs it got.
    """

    def __init__(self, logits, V):
        self.logits, self.V, self.device = logits, V, logits.device
        self.training, self.seen = False, []

    def hidden(self, x, sigma=None):
        self.seen.append(x)
        return self.logits[index_of(x, self.V)]

    def project(self, rows):
        return rows

    def __call__(self, x, sigma=None):
        return self.project(self.hidden(x, sigma))

    def eval(self):
        return self.train(False)

    def train(self, mode=True):
        self.training = mode
        return self
