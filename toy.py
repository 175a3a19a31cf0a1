# SPDX-License-Identifier: MIT
"""Why a mixture, and why its solution is unique: the method on texts of two tokens, seen as points.

    python toy.py                 out/toy/toy.png and out/toy/toy.json; a minute on two cores
    python toy.py --seeds 0 1 2 --picture assets/toy.png --records results/toy.json
                                  the shipped files

A token has K = 50 values, so a text is a cell of a 50 x 50 plane and its law p* is a table. `law`
sends the whole plane through the sampler, so p_theta is a table too, without sampling error; only a
Gaussian latent is averaged, over 2^15 draws. Of p_theta the records hold
    validity   its mass where p* > 0
    js         the Jensen-Shannon divergence to p*, nats: 0 for p*, at most 0.69

Losses and noise are the project's; the network is a smaller one. The generator learns
to write in one pass, so its latent eps is noise alone, t_tilde = 1. Uniform: two random tokens.
Masked: two [MASK], in which nothing is random, and so a Gaussian z beside them (the paper, arXiv
2602.19066, has none; on text it did not pay). The uniform update is `hard`. What fails is trained
for a third of the updates, after which `hard` is at a JS of 0.012: one product without a latent; no
fake term; `soft`, which noises soft rows as published.
"""
import copy
import multiprocessing
import signal
from pathlib import Path

import torch
from torch import nn

import checkpoint
import idlm_loss as losses
from experiments.collect import append_records
from model import DiT, ModelConfig
from teacher import Masked, Uniform, duo_loss, mdlm_loss, stratified_times

K = 50                          # values of a token
B = 512                         # texts per batch
PROCESSES = {"masked": Masked(K + 1), "uniform": Uniform(K)}
MODELS = {                      # arguments of `distil`
    "masked": {"IDLM": dict(kind="masked", latent_dim=8),
               "no latent": dict(kind="masked"),
               "no fake term": dict(kind="masked", latent_dim=8, use_fake=False)},
    "uniform": {"IDLM": dict(kind="uniform"),
                "no fake term": dict(kind="uniform", use_fake=False),
                "soft": dict(kind="soft")}}


def eight_modes():
    """The data's law p*, (K, K) float64: eight spots on a circle."""
    axis = torch.arange(K).double() - (K - 1) / 2
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    r = first.hypot(second)
    p = (2 * (8 * torch.atan2(second, first)).cos() - 2 - (r - 17) ** 2 / 4.5).exp()
    p = torch.where(p > 0.03 * p.max(), p, 0)
    return p / p.sum()


class PlaneNet(DiT):
    """A DiT with one MLP over both tokens in place of its blocks, and with a latent of its own:
    hidden(x, sigma, z), z (B, 2, latent_dim) added to the embeddings through a projection."""

    def __init__(self, vocab_size, width=64):
        super().__init__(ModelConfig(vocab_size, 0, 1, width, cond_dim=width))
        self.set_latent(0)
        self.mlp = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, 2 * width), nn.GELU(),
                                 nn.Linear(2 * width, 2 * width), nn.GELU())

    def set_latent(self, dim):                             # 0: none
        projection = torch.randn(dim, self.config.width) / max(dim, 1) ** 0.5
        size = self.vocab_embed.embedding.std().item()     # z starts about as large as they are
        self.projection = nn.Parameter(size * projection)

    def draw_z(self, B, rng):
        return torch.randn(B, 2, len(self.projection), generator=rng)

    def hidden(self, x, sigma, z=None):
        h = self.vocab_embed(x)
        if z is not None:
            h = h + z @ self.projection
        tokens = h.flatten(1) * self.config.width ** 0.5
        h = self.mlp(torch.cat([tokens, self.sigma_map(sigma)], 1))
        return h.unflatten(1, (2, -1))


# ---- what a network writes, as a table ----------------------------------------------------------

@torch.no_grad()
def law(net, process, steps, rng):
    """p_theta of the ancestral sampler, (K, K) float64: the state's law, step after step."""
    V, masked = process.vocab_size, isinstance(process, Masked)
    P = torch.full((V, V), 1 / K ** 2, dtype=torch.float64)
    if masked:
        P[:] = 0
        P[K, K] = 1
    for i in range(steps):
        t = torch.tensor([1 - i / steps, 1 - (i + 1) / steps], dtype=torch.float64)
        alpha_t, alpha_s = process.alpha(t)[0]
        copies = 2 ** 15 if len(net.projection) else 1     # then a single pass
        x = (P > 0).nonzero().repeat(copies, 1)
        weight = P[tuple(x.T)] / copies
        sigma = process.sigma(t[:1]).float().expand(len(x))
        logits = net.project(net.hidden(x, sigma, net.draw_z(len(x), rng)))
        rows = process.log_probs(logits.double(), x).exp()
        if masked:                                         # a visible token's row is that token
            reveal = torch.where(x == K, (alpha_s - alpha_t) / (1 - alpha_t), 1)[..., None]
            rows = torch.cat([reveal * rows, 1 - reveal], -1)
        else:                                              # Bayes' rule: q(x_s | f) q(x_t | x_s)
            keep = alpha_t / alpha_s
            step = keep * nn.functional.one_hot(x, K) + (1 - keep) / K
            rows = (alpha_s * rows + (1 - alpha_s) / K) * step
            rows = rows / rows.sum(-1, keepdim=True)
        P = (weight[:, None] * rows[:, 0]).T @ rows[:, 1]
    return P[:K, :K]


def kl(p, q):
    return torch.xlogy(p, p / q.clamp(min=1e-300)).sum()


def scores(P, p):                                          # of P against p: see above
    middle = (P + p) / 2
    js = (kl(P, middle) + kl(p, middle)) / 2
    return {"validity": round(P[p > 0].sum().item(), 4), "js": round(js.item(), 4)}


# ---- training -----------------------------------------------------------------------------------

def step(loss, optimizer, lr):
    group, = optimizer.param_groups
    group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def train_teacher(p, process, rng, updates):
    net = PlaneNet(process.vocab_size)
    optimizer = torch.optim.Adam(net.parameters())
    loss = mdlm_loss if isinstance(process, Masked) else duo_loss
    for i in range(updates):
        cell = torch.multinomial(p.flatten(), 2 * B, replacement=True, generator=rng)
        texts = torch.stack([cell // K, cell % K], 1)
        step(loss(net, process, texts, rng), optimizer, 3e-3 * min(1, 2 - 2 * i / updates))
    return net


def distil(teacher, process, rng, updates, kind, latent_dim=0, use_fake=True):
    """Alternate fake and generator steps from copies of the teacher; the generator's running mean.

    kind: of the losses. use_fake=False: the fake stays a new, flat network, so the loss is
    NELBO(f*) alone.
    """
    soft = kind == "soft"
    fake_loss = getattr(losses, f"{kind}_fake_loss")
    generator_loss = getattr(losses, f"{kind}_generator_loss")
    generator = copy.deepcopy(teacher)
    generator.set_latent(latent_dim)
    mean = copy.deepcopy(generator)
    fake = copy.deepcopy(teacher) if use_fake else PlaneNet(process.vocab_size)
    optimizer = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.99))
    fake_optimizer = torch.optim.Adam(fake.parameters(), betas=(0.5, 0.99))

    def draw():                                            # -> eps, the second noise
        x = process.prior(B, 2, rng)
        t = stratified_times(B, rng)
        noise = process.draw_noise(t, 2, rng, soft)
        if soft:
            x = torch.ones(B, 2, 1), x[..., None]
        return (x, process.sigma(torch.ones(B)), generator.draw_z(B, rng)), noise

    for i in range(updates):
        decay = min(1, 2 - 2 * i / updates)
        if use_fake:
            eps, noise = draw()
            loss = fake_loss(generator, fake, eps, rng, **noise)
            step(loss, fake_optimizer, 4e-3 * decay ** 0.5)
        eps, noise = draw()
        gap = generator_loss(generator, fake, teacher, eps, rng, **noise)
        step(gap, optimizer, 1e-3 * min(i / 20, decay))
        for average, new in zip(mean.parameters(), generator.parameters()):
            average.data.lerp_(new.data, max(5 / updates, 1 / (i + 1)))
    return mean


def run(name, seed, updates):
    """All models of a process. -> a list of (p_theta as an array (K, K), record)"""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, process, p = torch.Generator().manual_seed(seed), PROCESSES[name], eight_modes()
    teacher = train_teacher(p, process, rng, updates)
    nets = [("teacher", passes, teacher) for passes in (1, 4, 50)]
    for model, options in MODELS[name].items():
        some = updates if model == "IDLM" else updates // 3
        nets.append((model, 1, distil(teacher, process, rng, some, **options)))
    results = []
    for model, passes, net in nets:
        P = law(net, process, passes, rng)
        record = {"process": name, "model": model, "passes": passes, **scores(P, p), "seed": seed}
        results.append((P.numpy(), record))
    return results


# ---- command line -------------------------------------------------------------------------------

def main():
    parser = checkpoint.Parser()
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="the picture is of the first")
    add("--updates", type=int, default=600, help="of teacher and generator")
    add("--picture", type=Path, default="out/toy/toy.png")
    add("--records", type=Path, default="out/toy/toy.json")
    args = parser.parse_args()
    tasks = [(name, seed, args.updates) for seed in args.seeds for name in PROCESSES]
    # Workers leave Ctrl-C to this process, which ends them on its way out of `with`.
    with multiprocessing.Pool(2, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        print(f"training, seeds {args.seeds}", flush=True)
        results = pool.starmap(run, tasks, chunksize=1)
    records = [record for models in results for _, record in models]
    for record in records:
        print("{process:8}{model:13}{passes:3} passes  valid {validity:.4f}  js {js:.4f}  "
              "seed {seed}".format(**record))
    provenance = checkpoint.provenance(args.seeds[0], "cpu")
    append_records(args.records, [provenance | record for record in records])
    from experiments.toy_picture import draw_picture
    draw_picture(dict(zip(PROCESSES, results)), eight_modes(), args.picture)
    print(f"wrote {args.picture} and {args.records}")


if __name__ == "__main__":
    checkpoint.run_script(main)
