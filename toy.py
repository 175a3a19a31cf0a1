# SPDX-License-Identifier: MIT
"""Why a mixture, and why its solution is unique: the method on texts of two tokens, seen as points.

    python toy.py                 3 data sets, 2 processes: assets/toy.png, assets/toy_gap.png and
                                  results/toy.json, in 3 minutes on two CPU cores
    python toy.py --theorem       the exact loss, minimised from three starts; half a minute
    --seeds 0 1 2                 as in results/toy.json;  --exact: p*'s own denoiser as the teacher

A token has K = 50 values, so a text is a cell of a 50 x 50 plane and p* is a table. `law` sends the
whole plane through the sampler, so p_theta is a table too, with no sampling error; only a Gaussian
latent is averaged over 2^15 draws. Of p_theta are reported: validity, its mass where p* > 0; js, the
Jensen-Shannon divergence to p* (nats, at most 0.69); kl, KL(p_theta || p*), p* with FLOOR (nats per
text); least, its mass on the part of p* (one of eight) that it covers worst, over p*'s mass there.

Losses, noise and samplers are those of idlm_loss.py, teacher.py, generator.py; the network is a
smaller one. Generator and fake start as copies of the learned teacher, also under --exact.
"""
import argparse
import copy
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import idlm_loss as losses
from checkpoint import provenance
from generator import Latent, draw_latent, gaussian_latent, generate_probs
from model import ModelConfig, NoiseLevelEmbedding, TokenEmbedding
from teacher import Masked, Uniform, duo_loss, mdlm_loss, stratified_times

K, B = 50, 512              # values of a token, texts per batch
FLOOR = 1e-3                # the exact denoiser's p* spreads this much over the plane: finite logs
DATA, PROCESSES = ("checkerboard", "two spirals", "eight modes"), ("masked", "uniform")


def data_set(name):                                        # -> p* and the part of each cell, (K, K)
    i, j = torch.meshgrid(*[torch.arange(K).double()] * 2, indexing="ij")
    if name == "checkerboard":
        p, part = (4 * i // K + 4 * j // K) % 2 == 0, 4 * (4 * i // K) + 4 * j // K
    else:                                                  # bumps around points: two arms, or a ring
        angle, r, width = (torch.linspace(1.6, 10, 600), 2.2, 0.9) if name == "two spirals" else \
            (torch.arange(4) * torch.pi / 4, 17, 1.5)
        arm = r * (angle if width < 1 else 1) * torch.stack([angle.cos(), angle.sin()])
        cells, points = torch.stack([i, j], -1).view(-1, 2) - (K - 1) / 2, torch.cat([arm, -arm], 1).T
        distance, nearest = torch.cdist(cells, points.double()).min(-1)
        p, part = (-distance ** 2 / (2 * width ** 2)).exp(), nearest * 8 // len(points)
        p = torch.where(p > 0.03, p, 0)
    return (p / p.sum()).view(K, K), part.view(K, K).long()


def draw_texts(p, rng):                                    # -> (B, 2) int64
    cell = torch.multinomial(p.flatten(), B, replacement=True, generator=rng)
    return torch.stack([cell // K, cell % K], 1)


class PlaneNet(nn.Module):
    """Two embeddings and the noise level through an MLP: a DiT of two tokens at a fifth of the time."""

    def __init__(self, config):
        super().__init__()
        D, H, self.config, self.device = config.cond_dim, config.width, config, torch.device("cpu")
        self.vocab_embed, self.sigma_map = TokenEmbedding(config.vocab_size, D), NoiseLevelEmbedding(D)
        nn.init.normal_(self.vocab_embed.embedding)
        self.trunk = nn.Sequential(nn.Linear(3 * D, H), nn.GELU(), nn.Linear(H, H), nn.GELU(),
                                   nn.Linear(H, 2 * D), nn.GELU())
        self.project = nn.Linear(D, config.vocab_size)
        if config.latent_dim:                              # as in model.py; latent_scale 0: zeros
            self.latent_proj = nn.Linear(config.latent_dim, D, bias=False)
            nn.init.normal_(self.latent_proj.weight, std=config.latent_scale / config.latent_dim ** 0.5)

    def hidden(self, x, sigma, z=None):
        h = self.vocab_embed(x) + (0 if z is None else self.latent_proj(z))
        return self.trunk(torch.cat([h.flatten(1), self.sigma_map(sigma)], 1)).unflatten(1, (2, -1))

    def forward(self, *eps):
        return self.project(self.hidden(*eps))


class Exact(nn.Module):
    """The best denoiser of a known law: each token's rows given the other, possibly noised, token."""
    config, device, project = ModelConfig(K + 1), torch.device("cpu"), nn.Identity()

    def __init__(self, p, process):
        super().__init__()
        self.process, joints = process, (floored(p).float().T, floored(p).float())
        self.rows = torch.stack([torch.cat([p, p.sum(0)[None]]) for p in joints])  # last: not known

    def forward(self, x, sigma, z=None):
        other = F.one_hot(x, K + 1).float().flip(1)
        if isinstance(self.process, Uniform):              # known with probability alpha_t, else noise
            a = (-sigma).exp()[:, None, None]
            other = torch.cat([a * other[..., :K], (1 - a).expand(-1, 2, 1) / K], -1)
        return torch.einsum("blv,lvk->blk", other, self.rows).log()

    hidden = forward


def floored(p):
    return (1 - FLOOR) * p / p.sum() + FLOOR / K ** 2


def kl(p, q):
    return torch.xlogy(p, p / q.clamp(min=1e-300)).sum()


def scores(P, p, part):
    mass = [torch.zeros(16).double().index_add_(0, part.flatten(), (q * (p > 0)).flatten())
            for q in (P, p)]
    middle = (P + p) / 2
    return {"validity": mass[0].sum().item(), "js": (kl(P, middle) + kl(p, middle)).item() / 2,
            "kl": kl(P, floored(p)).item(), "least": (mass[0] / mass[1]).nan_to_num(9).min().item()}


@torch.no_grad()
def law(net, process, steps, rng, draws=2 ** 15):          # -> (K, K) float64
    """p_theta of `sample` with these steps: the law of the state, from noise on, step by step."""
    V, masked = process.vocab_size, isinstance(process, Masked)
    P = torch.full((V, V), 0 if masked else 1 / K ** 2, dtype=torch.float64)
    P[V - 1, V - 1] += masked                              # all of it on (mask, mask)
    for i in range(steps):
        t = torch.tensor([1 - i / steps, 1 - (i + 1) / steps]).double()
        alpha_t, alpha_s = process.alpha(t)[0]
        x = P.nonzero()
        x = x[(x == K).any(1)] if masked else x            # texts without [MASK] stay as they are
        copies = draws // len(x) if net.config.latent_dim else 1
        weight, x = P[x[:, 0], x[:, 1]].repeat(copies) / copies, x.repeat(copies, 1)
        eps = Latent(x, process.sigma(t[:1]).float().expand(len(x)), gaussian_latent(net, x, K, rng))
        rows = generate_probs(net, process, eps).double()
        if masked:
            reveal = (alpha_s - alpha_t) / (1 - alpha_t)
            rows = torch.where((x == K)[..., None], F.pad(reveal * rows, (0, 1), value=1 - reveal),
                               F.one_hot(x, V))
            P[K], P[:, K] = 0, 0
        else:
            rows, P = process.posterior(rows, x, alpha_t, alpha_s), 0 * P
        P += (weight[:, None] * rows[:, 0]).T @ rows[:, 1]
    return P[:K, :K]


def noised(P, a, process):                                 # (K, n) -> (V, n): the first token noised
    b = (1 - a) * P.sum(0, keepdim=True)
    return torch.cat([a * P, b]) if isinstance(process, Masked) else a * P + b / K


def exact_gap(P, p, process, fake=None, nodes=24):
    """The IDLM loss of the law P, nats per text, all texts and noises summed: the best denoiser of p
    is the teacher, that of P (or of `fake`) the fake. It is KL(P || p) less the KL of both laws at
    t = 1, so never negative, and 0 for P = p alone."""
    total = 0
    for u, weight in zip(*numpy.polynomial.legendre.leggauss(nodes)):
        u = torch.tensor([[(u + 1) / 2]])                  # t = u^4: more nodes where t is small
        a, slope = process.alpha(u ** 4)
        for laws in ((P, P if fake is None else fake, p),) * 2:
            pass
    return total
