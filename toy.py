# SPDX-License-Identifier: MIT
"""Why a mixture, and why its solution is unique: the method on texts of two tokens, seen as points.

    python toy.py                 assets/toy.png, assets/toy_gap.png, results/toy.json; 2 minutes
    python toy.py --theorem       the exact loss, minimised from three starts; half a minute
    --seeds 0 1 2                 as in results/toy.json;  --exact: p*'s own denoiser is the teacher

A token has K = 50 values, so a text is a cell of a 50 x 50 plane and p* is a table. `law` sends the
whole plane through the sampler, so p_theta is a table too, without sampling error; only a Gaussian
latent is averaged, over 2^15 draws. Reported of p_theta: validity, its mass where p* > 0; js, the
Jensen-Shannon divergence to p* (nats, <= 0.69); kl, KL(p_theta || p* with FLOOR), nats per text;
least, its mass on the worst covered of eight parts of p* over p*'s mass there.

Losses, noise and samplers are the project's own; the network is a smaller one. Generator and fake
start as copies of a learned teacher, also under --exact; the uniform update is `marginal`. The fake
is told t_tilde in the uniform process too: otherwise the levels of t_tilde may share out the modes
among them, and only their mixture is p*.
"""
import argparse
import copy
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy
import torch
from torch import nn

import idlm_loss as losses
from checkpoint import provenance
from generator import Latent, added_latent, draw_latent, generate_probs
from model import DiT, ModelConfig
from teacher import Masked, Uniform, duo_loss, mdlm_loss, stratified_times

K, B = 50, 512              # values of a token, texts per batch
FLOOR = 1e-3                # the exact denoiser's p* spreads this much over the plane: finite logs
DATA = "checkerboard", "two spirals", "eight modes"
PROCESSES = {"masked": Masked(K + 1), "uniform": Uniform(K)}
VARIANTS = {"masked": {"no latent": {"latent_dim": 0}, "zero-init latent": {"latent_scale": 0.0},
                       "no fake term": {"use_fake": False}},
            "uniform": {"no fake term": {"use_fake": False}, "soft update": {"update": "soft"},
                        "hard update": {"update": "hard"}}}


def data_set(name):                                        # -> p* and the part of each cell: (K, K)
    i, j = torch.meshgrid(*[torch.arange(K).double() - (K - 1) / 2] * 2, indexing="ij")
    r, angle, column, row = i.hypot(j), torch.atan2(j, i), (4 * i / K).floor(), (4 * j / K).floor()
    part = 4 * column + row + 10 if name == "checkerboard" else (angle * 4 / math.pi).round() % 8
    p = {"checkerboard": ((column + row) % 2 == 0).double(),
         "two spirals": (6 * (2 * angle - r / 1.6).cos() - 6).exp() * (r > 5) * (r < 24),
         "eight modes": (2 * (8 * angle).cos() - 2 - (r - 17) ** 2 / 4.5).exp()}[name]
    p = torch.where(p > 0.03 * p.max(), p, 0)
    return p / p.sum(), part.long()


def draw_texts(p, n, rng):                                 # -> (n, 2) int64
    cell = torch.multinomial(p.flatten(), n, replacement=True, generator=rng)
    return torch.stack([cell // K, cell % K], 1)


class PlaneNet(DiT):
    """A DiT with one MLP over both tokens in place of its blocks: a fifth of the time here."""
    num_levels = 1                                         # 2: reads both columns of sigma (B, 2)

    def __init__(self, config):
        super().__init__(config)
        D, H = config.width, 2 * config.width
        self.mlp = nn.Sequential(nn.Linear(2 * D + config.cond_dim, H), nn.GELU(),
                                 nn.Linear(H, H), nn.GELU(), nn.Linear(H, 2 * D), nn.GELU())

    def hidden(self, x, sigma, z=None):
        h = self.vocab_embed(x) + (0 if z is None else self.latent_proj(z))
        levels = sigma.reshape(len(h), -1).T[:self.num_levels]           # of t; of t_tilde, shifted
        cond = sum(self.sigma_map(level + 20 * k) for k, level in enumerate(levels))
        h = torch.cat([h.flatten(1) * self.config.width ** 0.5, cond], 1)
        return self.mlp(h).unflatten(1, (2, -1))


def joint(P, x, a, process):                               # (K, K), (...), (...) -> (..., K)
    """The law P of two tokens, at the second token and x, the first one noised at alpha_t = a."""
    a, alone = a[..., None], P.sum(0)
    if isinstance(process, Uniform):
        return a * P[x] + (1 - a) / K * alone
    return torch.where((x == K)[..., None], (1 - a) * alone, a * P[x.clamp(max=K - 1)])


class Exact(nn.Module):
    """The best denoiser of a known law: rows of each token given the other one, noised."""
    config, device, project = ModelConfig(K + 1), torch.device("cpu"), nn.Identity()

    def __init__(self, p, process):
        super().__init__()
        self.p, self.process = floored(p).float(), process

    def forward(self, x, sigma, z=None):
        a = (-sigma.reshape(len(sigma), -1)[:, :1]).exp()
        if isinstance(self.process, Masked):               # sigma is 0, and the rows depend on no a
            a = a / 2
        weights, ids = x if isinstance(x, tuple) else (torch.ones(len(x), 2, 1), x[..., None])
        return torch.cat([weights[:, l, None] @ joint(P, ids[:, l], a, self.process)
                          for l, P in ((1, self.p.T), (0, self.p))], 1).log()

    hidden = forward


def floored(p):
    return (1 - FLOOR) * p / p.sum() + FLOOR / K ** 2


def kl(p, q):
    return torch.xlogy(p, p / q.clamp(min=1e-300)).sum()


def scores(P, p, part):
    mass, share = (torch.zeros(16).double().index_add_(0, part.flatten(), (q * (p > 0)).flatten())
                   for q in (P, p))
    found = {"validity": mass.sum(), "js": (kl(P, (P + p) / 2) + kl(p, (P + p) / 2)) / 2,
             "kl": kl(P, floored(p)), "least": (mass / share)[share > 0].min()}
    return {key: round(value.item(), 6) for key, value in found.items()}


@torch.no_grad()
def law(net, process, steps, rng, draws=2 ** 15):          # -> p_theta (K, K), float64
    """What `sample` draws from: the law of the state, step after step from pure noise."""
    V, masked = process.vocab_size, isinstance(process, Masked)
    P = torch.full((V, V), 0 if masked else 1 / K ** 2, dtype=torch.float64)
    P[-1, -1] += masked                                    # all of it on [MASK] [MASK]
    for i in range(steps):
        t = torch.tensor([1 - i / steps, 1 - (i + 1) / steps]).double()
        alpha_t, alpha_s = process.alpha(t)[0]
        x = (P > 0).nonzero()
        x = x[(x == K).any(1)] if masked else x            # what holds no [MASK] stays as it is
        copies = draws // len(x) if net.config.latent_dim else 1
        weight, x = P[x[:, 0], x[:, 1]].repeat(copies) / copies, x.repeat(copies, 1)
        sigma = process.sigma(t[:1]).float().expand(len(x))
        eps = Latent(x, sigma, added_latent(net, x, K, rng))
        rows = generate_probs(net, process, eps).double()
        if masked:
            reveal = torch.where(x == K, (alpha_s - alpha_t) / (1 - alpha_t), 1)[..., None]
            rows, P[K], P[:, K] = torch.cat([reveal * rows, 1 - reveal], -1), 0, 0
        else:
            rows, P = process.posterior(rows, x, alpha_t, alpha_s), 0 * P
        P += (weight[:, None] * rows[:, 0]).T @ rows[:, 1]
    return P[:K, :K]


def exact_gap(P, p, process, fake=None, nodes=24):
    """The IDLM loss of the law P, nats per text, all texts and noises summed: the best denoiser of
    p is the teacher, that of P (or of `fake`) the fake. It is KL(P || p) less the KL of both laws
    at t = 1, so never negative, and 0 for P = p alone."""
    total, x = 0, torch.arange(process.vocab_size)
    for u, w in zip(*numpy.polynomial.legendre.leggauss(nodes)):
        t = torch.tensor([(1 + u) / 2]).double() ** 4      # more nodes where t is small
        a, slope = process.alpha(t)
        for turn in (torch.clone, torch.t):                # one token given the other; vice versa
            laws = [joint(turn(q), x, a, process) for q in (P, P if fake is None else fake, p)]
            G, f, f_star = (q.clamp(min=1e-30).log() for q in laws)
            gap = losses.marginal_gap(G, f, f_star, None, a[:, None], slope[:, None]) \
                if isinstance(process, Uniform) else -slope * losses.masked_gap(G, f, f_star)
            total = total + w / 2 * 4 * t ** 0.75 * (laws[0].sum(-1) * gap).sum()
    return total.squeeze()


def step(loss, optimizer, lr):
    optimizer.param_groups[0]["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def theorem(updates=600):
    """Descend from three starts, by the IDLM loss and by NELBO(f*) alone (a flat, fixed fake)."""
    torch.manual_seed(0)
    p, part = data_set("eight modes")
    starts = {"flat": 0 * p, "mode 0": ((part == 0) * p + 1e-9).log(), "noise": torch.randn(K, K)}
    for (name, process), fake in product(PROCESSES.items(), (None, torch.ones_like(p))):
        for start, logits in starts.items():
            logits, seen = logits.double().clone().requires_grad_(), []
            optimizer = torch.optim.Adam([logits])
            for i in range(updates + 1):
                P = logits.flatten().softmax(0).view(K, K)
                seen.append(kl(P, floored(p)).item())
                step(exact_gap(P, floored(p), process, fake, nodes=6), optimizer, 0.3)
            cells, mass = (-torch.xlogy(P, P).sum()).exp(), [P[part == k].sum() for k in range(8)]
            print(f"{name:8}{'IDLM loss' if fake is None else 'no fake term':13} from {start:6} "
                  f" KL {seen[0]:.3f} -> {seen[-1]:.5f}  on {cells:3.0f} cells  modes",
                  *[f"{m:.2f}" for m in mass], flush=True)


def train_teacher(p, process, rng, updates):
    V = process.vocab_size
    net = PlaneNet(ModelConfig(V, num_layers=0, num_heads=1, width=64, cond_dim=64))
    optimizer = torch.optim.Adam(net.parameters())
    for i in range(updates):
        loss = duo_loss if isinstance(process, Uniform) else mdlm_loss
        step(loss(net, process, draw_texts(p, 2 * B, rng), rng), optimizer,
             3e-3 * min(1, 2 - 2 * i / updates))
    return net


def idlm(start, teacher, p, process, rng, updates, share=1.0, latent_dim=8, latent_scale=1.0,
         use_fake=True, update="marginal", curve=None):
    """Alternate fake and generator steps from copies of `start`; the generator's running mean.

    share: of texts with t_tilde = 1, which is all that one pass meets; the others' is uniform.
    """
    masked, latent_dim = isinstance(process, Masked), latent_dim * isinstance(process, Masked)
    generator = PlaneNet(replace(start.config, latent_dim=latent_dim, latent_scale=latent_scale))
    generator.load_state_dict(start.state_dict(), strict=False)
    mean = copy.deepcopy(generator)
    fake = copy.deepcopy(start) if use_fake else Exact(torch.ones(K, K), process)
    fake.num_levels = 1 if masked else 2
    fake_loss, generator_loss = losses.uniform_fake_loss, losses.uniform_generator_loss
    if masked:
        fake_loss, generator_loss = losses.masked_fake_loss, losses.masked_generator_loss
    elif update == "soft":
        fake_loss, generator_loss = losses.soft_fake_loss, losses.soft_generator_loss
    elif update == "hard":
        generator_loss = partial(generator_loss, gap=losses.hard_gap)

    def draw():                                            # the losses' arguments eps ... sigma
        t, x_0 = stratified_times(B, rng), draw_texts(p, B, rng)
        t_tilde = torch.where(torch.rand(B, generator=rng) < share, 1, torch.rand(B, generator=rng))
        eps = draw_latent(generator, process, x_0, t_tilde, rng, soft=update == "soft")
        told = -process.alpha(t_tilde)[0].log()
        if masked:
            return eps, process.draw_mask(t, 2, rng), process.weight(t), told
        noise = process.gaussian(t) if update == "soft" else \
            (*process.draw_noise(t, 2, rng), *process.alpha(t))        # ends with alpha_t and slope
        return eps, *noise, torch.stack([-noise[2].log(), told], 1)

    optimizer = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.99))
    fake_optimizer = torch.optim.Adam(fake.parameters(), betas=(0.5, 0.99)) if use_fake else None
    gaps = []
    for i in range(updates):
        decay = min(1, 2 - 2 * i / updates)
        if use_fake:
            step(fake_loss(generator, fake, *draw(), K, rng), fake_optimizer, 4e-3 * decay ** 0.5)
        gap = generator_loss(generator, fake, teacher, *draw(), *[torch.zeros(B)] * masked, K, rng)
        step(gap, optimizer, 1e-3 * min(i / 20, decay))
        for average, new in zip(mean.parameters(), generator.parameters()):
            average.data.lerp_(new.data, max(5 / updates, 1 / (i + 1)))
        gaps.append(2 * gap.item())                        # per text, not per token
        if curve is not None and i % 20 == 19:
            P = law(generator, process, 1, rng, 2 ** 13)
            curve.append((i + 1, kl(P, floored(p)).item(),
                          exact_gap(P, floored(p), process).item(), sum(gaps[-20:]) / 20))
    return mean


def run(data, name, seed, exact, updates):
    """Train on a data set: {(model, passes): (p_theta, record)} and the eight modes' curve."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, process, (p, part) = torch.Generator().manual_seed(seed), PROCESSES[name], data_set(data)
    found, curve = {}, []

    def note(net, model, *all_passes):
        for passes in all_passes:
            P = law(net, process, passes, rng)
            found[model, passes] = P, {
                "data": data, "process": name, "teacher": "exact" if exact else "learned",
                "model": model, "latent": "gaussian" if net.config.latent_dim else "state",
                "passes": passes, **scores(P, p, part), "seed": seed}

    learned = train_teacher(p, process, rng, min(600, updates))
    teacher = Exact(p, process) if exact else learned
    note(teacher, "teacher", 1, 4, 50)
    distil = partial(idlm, learned, teacher, p, process, rng)
    note(distil(updates), "IDLM", 1)
    note(distil(updates, share=0.5), "IDLM", 2, 4)
    if data == "eight modes" and not exact:
        for variant, change in VARIANTS[name].items():
            note(distil(updates // 3, **change), variant, 1)
        idlm(learned, Exact(p, process), p, process, rng, updates, curve=curve)
    return found, curve


def draw_figures(results, folder):                         # {(data, process): run(...)}
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    columns = ["data", 0], ["teacher", 1], ["teacher", 4], ["teacher", 50], ["IDLM", 1], ["IDLM", 2]
    rows = [[(data, name, *column) for column in columns] for data in DATA for name in PROCESSES]
    rows.append([("eight modes", name, model, 1) for name in PROCESSES for model in VARIANTS[name]])
    figure, axes = plt.subplots(len(rows), 6, figsize=(11, 14), layout="constrained")
    for row, cells in enumerate(rows):
        axes[row, 0].set_ylabel("\n".join(cells[0][:2]) if row < 6 else "eight modes, 1 pass")
        for axis, (data, name, model, passes) in zip(axes[row], cells):
            p = data_set(data)[0]
            P, record = results[data, name][0].get((model, passes), (p, None))
            P, top = P.T.sqrt().numpy(), p.max() ** 0.5    # roots, so that stray mass shows
            axis.imshow(P, origin="lower", cmap="magma", vmin=0, vmax=top)
            label = "valid {validity:.1%}, JS {js:.3f}".format(**record) if record else "p*"
            axis.set(xticks=[], yticks=[], xlabel=label)
            if row in (0, 6):
                count = f"\n{passes} pass" + "es" * (passes > 1)
                axis.set_title(f"{name}:\n{model}" if row else model + count * (passes > 0))
    figure.savefig(folder / "toy.png", dpi=110)

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, name in zip(axes, PROCESSES):
        update, clean, gap, trained = zip(*results["eight modes", name][1])
        axis.plot(update, trained, color="tab:orange", label="IDLM gap in training, trained fake")
        axis.plot(update, clean, color="tab:blue", label=r"KL($p_\theta \| p^*$), exact")
        axis.plot(update, gap, "k.", label="IDLM loss with the best fake, exact")
        axis.axhline(0, color="grey", lw=0.5)
        axis.set(title=f"eight modes, {name}, 1 pass", xlabel="generator updates")
        axis.set_yscale("symlog", linthresh=0.1)
    axes[0].set_ylabel("nats per text")
    axes[0].legend()
    figure.savefig(folder / "toy_gap.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description="The method on texts of two tokens.")
    parser.add_argument("--theorem", action="store_true", help="minimise the exact loss")
    parser.add_argument("--exact", action="store_true", help="teacher: p*'s denoiser; no figures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="figures: of the first")
    parser.add_argument("--updates", type=int, help="of the generator (600; with --exact 2000)")
    args = parser.parse_args()
    if args.theorem:
        return theorem()
    here, cases = Path(__file__).parent, list(product(reversed(DATA), PROCESSES))
    path = here / "results" / "toy.json"
    updates = args.updates or (2000 if args.exact else 600)
    for seed in args.seeds:
        tasks, results, new = [(*case, seed, args.exact, updates) for case in cases], {}, []
        with ProcessPoolExecutor(2) as pool:
            for case, results[case] in zip(cases, pool.map(run, *zip(*tasks))):
                for _, record in results[case][0].values():
                    print("{data:13}{process:8}{model:16}{passes:3} passes  valid {validity:.4f} "
                          " js {js:.4f}  kl {kl:.4f}  least {least:.2f}".format(**record))
                    new.append({**record, **provenance(seed, "cpu")})
        old = json.loads(path.read_text()) if path.exists() else []
        old = [r for r in old if (r["teacher"], r["seed"]) != (new[0]["teacher"], seed)]
        path.write_text("[\n" + ",\n".join(json.dumps(r) for r in old + new) + "\n]\n")
        if seed == args.seeds[0] and not args.exact:
            draw_figures(results, here / "assets")


if __name__ == "__main__":
    main()
