# SPDX-License-Identifier: MIT
"""The IDLM loss summed exactly, and minimised from three starts: only p* is its minimum.

    python experiments/theorem.py         half a minute

`exact_gap` takes laws of one to three tokens; tests/test_theorem.py holds it to the two KLs.
`mixture_log_prob` estimates the likelihood of longer texts. The law here is toy.py's,
of two tokens. Without the fake's term the descent ends on few texts.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy                                                         # noqa: E402
import torch                                                         # noqa: E402

from checkpoint import run_script                                    # noqa: E402
from generator import log_rows                                       # noqa: E402
from teacher import Masked                                           # noqa: E402
from toy import K, PROCESSES, eight_modes, kl, step                  # noqa: E402


@torch.no_grad()
def mixture_log_prob(net, process, x_0, latents):
    """Monte-Carlo log p_theta(x_0) ~= log mean_k prod_i G_i(eps_k)[x_i], nats per text.

    x_0 (B, L); latents: an iterable of eps, independent draws for those B texts. Biased low: the
    log of an average is above the average of logs (Jensen), less so the more draws there are.
    """
    x_0 = x_0[..., None]
    terms = []
    for eps in latents:
        log_G = log_rows(net, process, eps)
        terms.append(log_G.gather(-1, x_0.to(log_G.device))[..., 0].sum(-1))
    return torch.stack(terms).logsumexp(0) - math.log(len(terms))


def exact_gap(P, p_star, process, fake=None, nodes=24):
    """The IDLM loss of the law P, nats per text, with every text, noise and time summed.

    P, p_star, fake: laws of L = 1, 2, 3 tokens, (K,) * L float64; differentiable. The best denoiser
    of p_star is the teacher, that of P (or of `fake`) the fake. For fake = P the loss is
    KL(P || p_star) less the KL of both laws noised to t = 1: never negative, and 0 for P = p_star
    alone. Time by Gauss-Legendre in s, t = s^4: more nodes where t is small.

    Either NELBO is a sum over positions, and its best denoiser a row that depends on the *other*
    noised tokens. So for each position the others are noised, and the token itself stays clean.
    """
    s, node = (torch.tensor(x) for x in numpy.polynomial.legendre.leggauss(nodes))
    t = ((1 + s) / 2) ** 4
    node = node / 2 * 4 * t ** 0.75
    alpha, dalpha = (x.view(-1, *[1] * P.dim()) for x in process.alpha(t))
    total = 0
    for position in range(P.dim()):
        joint, joint_f, joint_t = (others_noised(q, position, alpha, process)
                                   for q in (P, P if fake is None else fake, p_star))
        f, f_star = rows_of(joint_f), rows_of(joint_t)
        if isinstance(process, Masked):     # a chance of 1 - alpha cancels in the NELBO's weight
            gap = joint * (f / f_star).log()
        else:
            gap = uniform_gap(joint, f, f_star, K=process.K, a=alpha)
        total = total - (node * (dalpha * gap).flatten(1).sum(1)).sum()
    return total


def others_noised(P, position, alpha, process):
    """(K,) * L -> (nodes, ..., K): the others noised at alpha, (nodes, 1, ...), this token last."""
    P = P[None]
    for axis in range(1, P.dim()):
        if axis != position + 1:
            noise = (1 - alpha) * P.sum(axis, keepdim=True)
            if isinstance(process, Masked):
                P = torch.cat([alpha * P, noise], axis)
            else:
                P = alpha * P + noise / process.K
    return P.movedim(position + 1, -1)


def rows_of(joint):
    joint = joint.clamp(min=1e-30)                         # finite logarithms
    return joint / joint.sum(-1, keepdim=True)


def uniform_gap(joint, f, f_star, K, a):
    """The NELBOs of UDLM and Duo with the position's noised token z ~ gbar / K summed out, where
    gbar = K a g + 1 - a for the row g of P, and likewise fbar and tbar:
    1 / (K a) sum_v gbar_v (log fbar_v / tbar_v + 1 / tbar_v - 1 / fbar_v) - log fbar_v / tbar_v
    """
    gbar, fbar, tbar = (K * a * row + 1 - a for row in (rows_of(joint), f, f_star))
    log_ratio = (fbar / tbar).log()
    inner = gbar * (log_ratio + 1 / tbar - 1 / fbar) - log_ratio
    return joint.sum(-1, keepdim=True) * inner / (K * a)


def theorem(updates=300):
    """Descend from three starts, by the IDLM loss and by NELBO(f*) alone (a flat, fixed fake)."""
    torch.set_num_threads(1)                               # no slower than two, so small
    torch.manual_seed(0)
    flat = torch.full((K, K), 1 / K ** 2, dtype=torch.float64)
    p_star = 0.999 * eight_modes() + 0.001 * flat          # finite logarithms
    edge = torch.arange(K)[:, None] > 39                   # a part of one mode
    starts = {"flat": flat.log(), "an edge": p_star.log() + 9 * edge, "noise": torch.randn(K, K)}
    for name, process in PROCESSES.items():
        for loss, fake in {"IDLM loss": None, "no fake term": flat}.items():
            for start, logits in starts.items():
                logits = logits.double().clone().requires_grad_()
                optimizer = torch.optim.Adam([logits])
                for _ in range(updates):
                    P = logits.flatten().softmax(0).view(K, K)
                    step(exact_gap(P, p_star, process, fake, nodes=6), optimizer, 0.3)
                cells = (-torch.xlogy(P, P).sum()).exp().item()
                print(f"{name:8}{loss:13} from {start:8} KL(P || p*) {kl(P, p_star).item():.5f}"
                      f"  on {cells:.0f} texts", flush=True)


if __name__ == "__main__":
    run_script(theorem)
