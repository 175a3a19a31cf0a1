"""The masked sampler, the mixture's likelihood and the Gaussian latent.

A table of logits stands in for the network (tests/enumeration.py), so that the law of the sampled
texts can be summed exactly.

Run: python -m pytest tests/test_generator.py
"""
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import enumeration as en
from generator import (Latent, draw_latent, generate_probs, mixture_log_prob, own_temperature,
                       sample, turns, warp)
from idlm_loss import masked_generator_loss, sample_categorical
from model import DiT, ModelConfig
from teacher import Masked, Uniform

K, L = 3, 3
PROCESS = Masked(K + 1)
MASK = PROCESS.mask_id


def table(rng, sharpness=1.5):
    """A random denoiser: other rows for every noised text. [MASK]'s own logit is high: it must not
    count."""
    logits = sharpness * torch.randn((K + 1) ** L, L, K + 1, generator=rng, dtype=torch.float64)
    logits[..., MASK] = 4
    return en.Table(logits, K + 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def chance_to_reveal(i, steps, schedule):
    """(alpha_s - alpha_t) / (1 - alpha_t) = (t - s) / t of step i = 0 .. N - 1, log-linear alpha:
    at t = 1 - i / N that is 1 / (N - i)."""
    if schedule == "linear":
        return 1 / (steps - i)
    return 1 if i == steps - 1 else \
        1 - math.cos(math.pi * (i + 1) / (2 * steps)) / math.cos(math.pi * i / (2 * steps))


def law_of_sampling(rows, steps, prompt=(-1,) * L, schedule="linear"):
    """The law of the finished texts: dict of text -> probability. rows: for every noised text a
    list of L distributions. `even`: n turns begin at each position equally often."""
    if schedule != "even":
        return walk(lambda i, l: chance_to_reveal(i, steps, schedule), [rows] * steps, prompt)
    turn = {1: (0,), 2: (0, 1), 3: (0, 2, 1)}[n := min(steps, L)]        # the middle one last
    return mean_of(walk(lambda i, l: (turn[(l + first) % n] + 0.5) * steps // n == i, [rows] * steps,
                        prompt) for first in range(n))


def walk(reveals, rows, prompt=(-1,) * L):
    """Every path. reveals(i, l): chance that step i reveals position l; rows[i]: what it draws a
    word from. The words revealed in one step are independent."""
    now = {tuple(MASK if word < 0 else word for word in prompt): 1.0}
    for i, table in enumerate(rows):
        then = {}
        for text, chance in now.items():
            index = sum(word * (K + 1) ** (L - 1 - l) for l, word in enumerate(text))
            options = [[(word, 1.0)] if word != MASK else
                       [(v, reveals(i, l) * table[index][l][v]) for v in range(K)] +
                       [(MASK, 1 - reveals(i, l))] for l, word in enumerate(text)]
            for choice in product(*options):
                new = tuple(word for word, _ in choice)
                then[new] = then.get(new, 0) + chance * math.prod(p for _, p in choice)
        now = then
    return {text: chance for text, chance in now.items() if chance > 0}


def mean_of(laws):
    laws = [*laws]
    return {text: sum(law.get(text, 0) for law in laws) / len(laws)
            for text in {text for law in laws for text in law}}


def chi_square_p(tokens, law):
    """p value of Pearson's test of the sampled texts against their exact law."""
    counts = torch.bincount(en.index_of(tokens, K), minlength=K ** L)
    p = torch.zeros(K ** L, dtype=torch.float64)
    for text, chance in law.items():
        p[en.index_of(torch.tensor(text), K)] = chance
    assert abs(p.sum() - 1) < 1e-12 and (counts[p == 0] == 0).all()
    expected = len(tokens) * p[p > 0]
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi / 2).item()


# ---- the law of the sampled texts ---------------------------------------------------------------

@pytest.mark.parametrize("steps, schedule", [(1, "linear"), (2, "linear"), (3, "linear"),
                                             (7, "linear"), (2, "cosine"), (7, "cosine"),
                                             (1, "even"), (2, "even"), (3, "even"), (7, "even")])
def test_sampled_texts_follow_the_exact_law(steps, schedule, rng):
    """27 texts, 200,000 samples, chi-square p > 1e-5 (false alarm 1e-5 each). The laws of 1, 2
    and 3 steps are far apart, those of the schedules too: the samples of one fail against the law
    of another. Even turns take no more passes than there are positions."""
    net = table(rng)
    rows = net.logits[..., :K].softmax(-1).tolist()
    out = sample(net, PROCESS, 200_000, L, steps, rng, schedule=schedule)
    assert out.tokens.min() >= 0 and out.tokens.max() < K  # no mask left
    assert out.nfe.min() >= 1 and out.nfe.max() <= steps and len(net.seen) <= steps
    assert schedule != "even" or (out.nfe == min(steps, L)).all()
    assert chi_square_p(out.tokens, law_of_sampling(rows, steps, schedule=schedule)) > 1e-5
    if steps > 1:
        other = {"cosine": "linear", "linear": "even", "even": "linear"}[schedule]
        assert chi_square_p(out.tokens, law_of_sampling(rows, 1)) < 1e-9
        assert chi_square_p(out.tokens, law_of_sampling(rows, steps, schedule=other)) < 1e-9


def test_an_unknown_schedule_is_refused(rng):
    with pytest.raises(ValueError, match="schedule 'cosin'"):
        sample(table(rng), PROCESS, 2, L, 2, rng, schedule="cosin")


@pytest.mark.parametrize("schedule", ["linear", "even"])
def test_prompted_texts_follow_the_conditional_law(schedule, rng):
    """One clamped token in the middle and two steps: the same test (false alarm 1e-5)."""
    net, prompt = table(rng), (-1, 2, -1)
    rows = net.logits[..., :K].softmax(-1).tolist()
    out = sample(net, PROCESS, 200_000, L, 2, rng, prompt=torch.tensor(prompt), schedule=schedule)
    assert (out.tokens[:, 1] == 2).all()
    assert chi_square_p(out.tokens, law_of_sampling(rows, 2, prompt, schedule)) > 1e-5


def nucleus(row, top_p):                                   # the fewest words holding top_p
    kept, held = [0.0] * len(row), 0.0
    for v in sorted(range(len(row)), key=lambda v: -row[v]):
        if held < top_p:
            kept[v], held = row[v], held + row[v]
    return [p / held for p in kept]


def test_temperature_and_top_p_change_the_law_as_they_say(rng):
    """Rows sharpened and cut by hand, two steps (false alarm 1e-5)."""
    net = table(rng)
    rows = [[nucleus(row, 0.8) for row in text]
            for text in (net.logits[..., :K] / 0.7).softmax(-1).tolist()]
    out = sample(net, PROCESS, 200_000, L, 2, rng, temperature=0.7, top_p=0.8,
                 schedule="linear")
    assert chi_square_p(out.tokens, law_of_sampling(rows, 2)) > 1e-5
    uncut = (net.logits[..., :K] / 0.7).softmax(-1).tolist()
    assert chi_square_p(out.tokens, law_of_sampling(uncut, 2)) < 1e-9


# ---- what every run keeps -----------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_visible_tokens_stay_and_steps_are_counted(steps, rng):
    """At every step: what is visible stays, each text has used a pass only where it revealed
    something, the head saw [MASK] positions alone, and nothing is masked at the end."""
    n, length = 50, 12
    rows = torch.randn(length, 9, generator=rng)
    net = en.Table(rows, 9)
    net.hidden = lambda x, sigma: net.seen.append(x) or rows.expand(len(x), -1, -1)
    states, process = [torch.full((n, length), 8)], Masked(9)
    out = sample(net, process, n, length, steps, rng,
                 callback=lambda i, x: states.append((i, x.clone())))
    assert [i for i, _ in states[1:]] == list(range(steps))
    states = states[:1] + [x for _, x in states[1:]]
    changed = []
    for before, after in zip(states, states[1:]):
        visible = before != 8
        assert torch.equal(after[visible], before[visible])
        changed.append((after != before).any(1))
    assert (states[-1] != 8).all() and torch.equal(states[-1], out.tokens)
    assert torch.equal(out.nfe, sum(c.long() for c in changed))
    assert out.nfe.max() <= min(steps, length)
    assert len(net.seen) == sum(c.any().item() for c in changed)


def test_prompt_is_kept_wherever_it_stands(rng):
    net = table(rng)
    for prompt in product((-1, 1, 2), repeat=L):
        tokens = torch.tensor(prompt)
        out = sample(net, PROCESS, 20, L, 3, rng, prompt=tokens)
        assert (out.tokens[:, tokens >= 0] == tokens[tokens >= 0]).all()
        assert (out.tokens < K).all()
        if (tokens >= 0).all():
            assert (out.nfe == 0).all()                    # nothing to write, nothing to pay
    each = torch.tensor([[0, -1, -1], [-1, 1, -1], [-1, -1, 2]])         # a prompt per text
    out = sample(net, PROCESS, 3, L, 2, rng, prompt=each)
    assert (out.tokens[each >= 0] == each[each >= 0]).all() and (each == torch.tensor(
        [[0, -1, -1], [-1, 1, -1], [-1, -1, 2]])).all()    # and the argument is left alone


def test_equal_seeds_give_equal_texts(rng):
    net = table(rng)
    a, b, c = (sample(net, PROCESS, 50, L, 3, seeded(s)).tokens for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps, rng):
    with pytest.raises(ValueError, match=f"at least 1, not {steps}"):
        sample(table(rng), PROCESS, 2, L, steps, rng)


def test_training_mode_is_put_back(rng):
    net = table(rng)
    during = []
    hidden = net.hidden
    net.hidden = lambda *args: during.append(net.training) or hidden(*args)
    sample(net.train(), PROCESS, 2, L, 2, rng)
    assert net.training and not any(during)
    sample(net.eval(), PROCESS, 2, L, 2, rng)
    assert not net.training


@pytest.mark.parametrize("prompt", [None, (-1, 4, -1, -1, 0, -1)])
def test_the_shortcuts_change_nothing(prompt):
    """One pass for all texts while they are blank, no pass for texts that reveal nothing, the head
    at revealed positions: a plain sampler with the same draws writes the same texts."""
    rng, n, length, steps, process = seeded(3), 6, 6, 9, Masked(7)
    net = random_dit(rng, vocab_size=7)
    prompt = None if prompt is None else torch.tensor(prompt)
    ours = sample(net, process, n, length, steps, seeded(5), prompt=prompt, schedule="linear")

    draws, x = seeded(5), torch.full((n, length), 6)
    torch.randint(2, (n, 1), generator=draws)              # the turns of schedule even
    when = torch.rand(n, length, generator=draws, dtype=torch.float64)
    if prompt is not None:
        x = torch.where(prompt < 0, x, prompt)
    passes = torch.zeros(n, dtype=torch.int64)
    for i in range(steps):
        reveal = (x == 6) & (when >= (steps - 1 - i) / steps)
        cdf = net(x, torch.zeros(n))[..., :6].softmax(-1).cumsum(-1)[reveal]
        u = torch.rand(len(cdf), generator=draws, dtype=torch.float64)
        x = x.clone()
        x[reveal] = (u[:, None] >= cdf).sum(-1)
        passes += reveal.any(1)
    assert torch.equal(ours.tokens, x) and torch.equal(ours.nfe, passes)


# ---- draws --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_words", [1, 2, 3, 5, 10, 17, 1000])
def test_sample_categorical_inverts_the_distribution(num_words, dtype, rng):
    """At the middle of every word's interval that word; u = 0 the first and u just below 1 (or
    rounded up to it) the last word that is possible; impossible words never."""
    logits = 2 * torch.randn(num_words, generator=rng, dtype=dtype)
    for impossible in ([], [0], [num_words - 1], range(0, num_words, 2), range(num_words // 2),
                       range(num_words // 2 + 1, num_words)):
        row = logits.clone()
        row[list(impossible)] = -torch.inf
        possible = row.isfinite().nonzero()[:, 0]
        if not len(possible):
            continue
        p = row.double().softmax(-1)
        middle = (p.cumsum(-1) - p / 2)[possible]
        ends = torch.tensor([0, 2.0 ** -60, 1 - 2.0 ** -53, 1.0], dtype=torch.float64)
        u = torch.cat([middle, ends])
        drawn = sample_categorical(row.expand(len(u), -1), u)
        assert torch.equal(drawn[:-4], possible)
        assert drawn[-4:].tolist() == [possible[0]] * 2 + [possible[-1]] * 2


def test_rare_words_at_the_end_of_a_block_keep_their_probability():
    """A word of probability 1e-9 behind likely ones: its interval is there, at its exact place."""
    row = torch.full((9,), -torch.inf, dtype=torch.float64)
    row[:3] = torch.tensor([0.5, 0.5 - 1e-9, 1e-9], dtype=torch.float64).log()
    u = torch.tensor([1 - 1.1e-9, 1 - 0.9e-9, 1 - 1e-12], dtype=torch.float64)
    assert sample_categorical(row.expand(3, -1), u).tolist() == [1, 2, 2]


def zipf(dtype):
    """Logits of 50,257 words with the frequencies of natural text, and a rank for every id."""
    rank = torch.randperm(50_257, generator=seeded(0))
    return (-(rank.double() + 2.7).log()).to(dtype)


def test_float32_draws_over_a_large_vocabulary_equal_float64_ones(rng):
    """Against a plain float64 inversion at the same u. A float32 softmax moves the cumulative sum
    by a few of its roundings (2^-24 = 6e-8): a draw may differ only where u is within 5e-7 of the
    edge between the words drawn. A cumulative sum in float32 is off by up to 1e-5 and fails."""
    logits, u = zipf(torch.float32), torch.rand(600, generator=rng, dtype=torch.float64)
    cdf = logits.double().softmax(-1).cumsum(-1)
    plain = torch.searchsorted(cdf / cdf[-1], u, right=True)
    ours = sample_categorical(logits.expand(600, -1), u)
    edge = torch.where(ours < plain, cdf[ours], cdf[ours - 1])[ours != plain]
    assert ((edge - u[ours != plain]).abs() < 5e-7).all()
    assert (ours == plain).double().mean() > 0.95          # 5e-7 of a mean word, 2e-5, is 1 in 40


def test_float32_sampling_keeps_the_entropy_of_float64(rng):
    """2,048 tokens over 50,257 words in 64 steps, at float32 and float64 with one seed. The mean of
    -log p(token) is the entropy, known here; its standard error is sd / sqrt(2048), about 0.06
    nats: each run within 5 of them (false alarm 1e-6). The two runs share their draws, so that they
    differ in at most one token in 40 (see above), each by a word of nearly its own frequency."""
    surprise = -zipf(torch.float64).log_softmax(-1)
    p = (-surprise).exp()
    entropy = (p * surprise).sum()
    sd = (p * (surprise - entropy) ** 2).sum().sqrt()
    process, means, tokens = Masked(50_258), [], []
    for dtype in (torch.float32, torch.float64):
        row = torch.cat([zipf(dtype), torch.tensor([5.0], dtype=dtype)])
        net = en.Table(row, 50_258)
        net.hidden = lambda x, sigma: torch.zeros(*x.shape, 1)
        net.project = lambda rows: row.expand(len(rows), -1)
        tokens.append(sample(net, process, 16, 128, 64, seeded(1)).tokens)
        means.append(surprise[tokens[-1]].mean())
        assert abs(means[-1] - entropy) < 5 * sd / 2048 ** 0.5
    assert (tokens[0] == tokens[1]).double().mean() > 1 - 1 / 40
    assert abs(means[0] - means[1]) < 0.01


def test_warp(rng):
    logits = torch.randn(50, 20, generator=rng, dtype=torch.float64)
    assert torch.equal(warp(logits, 1.0, 1.0), logits)
    torch.testing.assert_close(warp(logits, 0.5, 1.0), 2 * logits)
    for top_p in (1e-9, 0.3, 0.9):
        p, kept = logits.softmax(-1), warp(logits, 1.0, top_p)
        out = kept.isinf()
        assert torch.equal(kept[~out], logits[~out])
        assert not out.all(-1).any()                       # the likeliest word always stays
        if top_p < 0.1:
            assert (out.sum(-1) == 19).all()
        for row, gone in zip(p, out):
            assert row[~gone].sum() >= top_p               # enough is kept ...
            assert row[~gone].sum() - row[~gone].min() < top_p           # ... and not one too many
            assert not gone.any() or row[gone].max() <= row[~gone].min()
    assert warp(logits.bfloat16(), 0.7, 0.9).dtype == torch.float32


# ---- the mixture's likelihood -------------------------------------------------------------------

def latents_of(rng, texts_of, n):
    """n noised texts as eps, the same for every text of the batch."""
    noised = torch.randint(K + 1, (n, L), generator=rng)
    return [Latent(x.expand(texts_of, -1), torch.zeros(texts_of)) for x in noised]


def test_mixture_log_prob_is_that_of_the_mixture(rng):
    """All latents of a small set given once each: the log of the mean product, text by text, with
    visible tokens certain; and the probabilities of all texts sum to 1."""
    net, x_0 = table(rng), en.texts(K, L)
    latents = latents_of(rng, len(x_0), 5) + [Latent(torch.full((len(x_0), L), MASK),
                                                     torch.zeros(len(x_0)))]
    expected = torch.zeros(len(x_0), dtype=torch.float64)
    for eps in latents:
        rows = net.logits[en.index_of(eps.x[0], K + 1)][:, :K].softmax(-1)
        for text, x in enumerate(x_0.tolist()):
            chance = 1.0
            for l, word in enumerate(x):
                seen = eps.x[0, l].item()
                chance *= rows[l, word] if seen == MASK else float(seen == word)
            expected[text] += chance / len(latents)
    log_prob = mixture_log_prob(net, PROCESS, x_0, iter(latents))
    torch.testing.assert_close(log_prob, expected.log(), rtol=1e-12, atol=1e-12)
    assert abs(log_prob.exp().sum() - 1) < 1e-12


def test_few_latents_bias_the_likelihood_downwards(rng):
    """The exact expectation of the estimate over all n^k draws of k latents: below the mixture's
    log p, and rising with k."""
    net, x_0, n = table(rng), en.texts(K, L)[:5], 4
    latents = [Latent(torch.full((5, L), MASK), torch.zeros(5))]
    for l in range(L):                                     # one visible token that does agree
        latents.append(latents[0]._replace(x=torch.full((5, L), MASK).index_copy(
            1, torch.tensor([l]), x_0[:, l:l + 1])))
    true = mixture_log_prob(net, PROCESS, x_0, latents)
    expected = []
    for k in (1, 2, 3, 4):
        estimates = [mixture_log_prob(net, PROCESS, x_0, draw)
                     for draw in product(latents, repeat=k)]
        assert len(estimates) == n ** k
        expected.append(torch.stack(estimates).mean(0))
    for less, more in zip(expected, expected[1:] + [true]):
        assert (less < more - 1e-4).all()


def test_generate_probs_is_on_the_simplex_and_copies(rng):
    net = table(rng)
    eps = latents_of(rng, 1, 6)
    for e in eps:
        probs = generate_probs(net, PROCESS, e)
        torch.testing.assert_close(probs.sum(-1), torch.ones(1, L, dtype=torch.float64))
        for l in range(L):
            if e.x[0, l] != MASK:
                assert probs[0, l, e.x[0, l]] == 1


# ---- the Gaussian latent ------------------------------------------------------------------------

def random_dit(rng, vocab_size=K + 1, latent_dim=0, latent_words=0):
    torch.manual_seed(0)                                   # of the latent's projection
    net = DiT(ModelConfig(vocab_size=vocab_size, num_layers=2, num_heads=2, width=16, cond_dim=8,
                          latent_dim=latent_dim, latent_words=latent_words)).double()
    for name, p in net.named_parameters():
        if name != "latent_proj.weight":                   # its own scale is under test
            p.data = 0.4 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net


def test_latent_is_standard_normal_where_all_is_masked_and_0_elsewhere(rng):
    """n > 150,000 numbers: mean within 5 / sqrt(n), variance 5 sqrt(2 / n) (false alarm 1e-6)."""
    net = random_dit(rng, latent_dim=8)
    x_0 = torch.randint(K, (4000, 12), generator=rng)
    t_tilde = torch.where(torch.arange(4000) % 2 == 0, 1.0, 0.55)
    eps = draw_latent(net, PROCESS, x_0, t_tilde, rng)
    assert eps.z.shape == (4000, 12, 8)
    masked = eps.x == MASK
    assert torch.equal(eps.x[~masked], x_0[~masked]) and masked[::2].all()
    blank = masked.all(1)
    assert blank[::2].all() and blank[1::2].float().mean() < 0.01 and masked[~blank].any()
    assert (eps.z[~blank] == 0).all()
    z = eps.z[blank].double()
    n = z.numel()
    assert n > 150_000
    assert abs(z.mean()) < 5 / n ** 0.5 and abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    other = draw_latent(random_dit(rng), PROCESS, x_0, torch.full((4000,), 0.55), rng)
    assert other.z is None


def test_latent_enters_at_the_scale_of_the_embeddings(rng):
    """A new network's z adds to the embedding what has about its standard deviation (16 * 64
    weights: within 5 sd, a factor 1 +- 0.11)."""
    torch.manual_seed(0)
    net = DiT(ModelConfig(vocab_size=500, num_layers=1, num_heads=2, width=64, latent_dim=16))
    z = torch.randn(20_000, 16, generator=rng)
    ratio = net.latent_proj(z).std() / net.vocab_embed.embedding.std()
    assert 0.89 < ratio < 1.11


def test_latent_of_scale_0_changes_nothing(rng):
    net = random_dit(rng, latent_dim=8)
    x = torch.randint(K + 1, (4, L), generator=rng)
    z, sigma = torch.randn(4, L, 8, generator=rng), torch.zeros(4)
    assert not torch.allclose(net(x, sigma, z), net(x, sigma))
    net.latent_proj.weight.data.zero_()
    assert torch.equal(net(x, sigma, z), net(x, sigma))


def test_one_pass_depends_on_the_latent_and_learns_to(rng):
    """From an all-[MASK] text two z give two products of rows, and the IDLM loss reaches the
    projection; without a latent all texts of one pass share one product."""
    net = random_dit(rng, latent_dim=8)
    x, sigma = torch.full((4, L), MASK), torch.zeros(4)
    z = torch.randn(4, L, 8, generator=rng)
    probs = generate_probs(net, PROCESS, Latent(x, sigma, z))
    assert (probs[0] - probs[1]).abs().max() > 0.01
    assert torch.equal(*generate_probs(net, PROCESS, Latent(x, sigma))[:2])
    loss = masked_generator_loss(net, random_dit(rng), random_dit(rng), Latent(x, sigma, z),
                                 torch.ones(4, L, dtype=torch.bool), torch.ones(4), sigma, sigma,
                                 MASK, rng)
    loss.backward()
    assert net.latent_proj.weight.grad.abs().max() > 1e-4


def assert_estimated(net, x_0, exact, rng, repeats=2000):
    """-> standard errors of 20,000 draws through mixture_log_prob, 10 at a time: each of the texts
    within 5 of them of its exact probability."""
    many = x_0.repeat(repeats, 1)
    log_p = mixture_log_prob(net, PROCESS, many, [
        draw_latent(net, PROCESS, many, torch.ones(len(many)), rng) for _ in range(10)])
    found = log_p.exp().view(repeats, -1)
    error = found.std(0) / repeats ** 0.5
    assert ((found.mean(0) - exact).abs() < 5 * error).all()
    return error


def test_monte_carlo_over_z_agrees_with_enumeration(rng):
    """One pass, two positions, a z of one number each: the mixture's exact law by Gauss-Hermite
    quadrature over both numbers (24 nodes and 36 agree to 1e-6), and draws of draw_latent."""
    net, x_0 = random_dit(rng, latent_dim=1), en.texts(K, 2)

    def law(n):
        node, weight = (torch.tensor(x) for x in np.polynomial.hermite_e.hermegauss(n))
        z = torch.cartesian_prod(node, node)
        blank = torch.full((len(z), 2), MASK)
        G = generate_probs(net, PROCESS, Latent(blank, torch.zeros(len(z)), z[..., None]))
        rows = G[:, 0, x_0[:, 0]] * G[:, 1, x_0[:, 1]]
        return torch.cartesian_prod(weight, weight).prod(1) / weight.sum() ** 2 @ rows

    exact = law(36)
    assert abs(exact.sum() - 1) < 1e-9 and (exact - law(24)).abs().max() < 1e-6
    product_of_means = generate_probs(net, PROCESS, Latent(
        torch.full((1, 2), MASK), torch.zeros(1), torch.zeros(1, 2, 1)))[0]
    error = assert_estimated(net, x_0, exact, rng)
    without = product_of_means[0, x_0[:, 0]] * product_of_means[1, x_0[:, 1]]
    assert ((without - exact).abs() > 10 * error).any()    # z = 0 is not the mixture


def test_texts_begin_with_words(rng):
    """Where t_tilde = 1, every 4th position from each of four equally often, the rest [MASK]; each
    word as often as the frequencies say, at first as another: n = 40,000 within 5 standard
    deviations (odds 6e-7 each). Other texts are noised as ever."""
    net, n = random_dit(rng, latent_words=4), 40_000
    assert all((net.word_frequencies(n) == 1).all() for n in (1, 5, 100))
    net = random_dit(rng, latent_words=4)
    net.frequencies.copy_(torch.arange(K))                 # one never
    x_0 = torch.randint(K, (2 * n // 3, 12), generator=rng)
    t_tilde = torch.where(torch.arange(len(x_0)) % 2 == 0, 1.0, 0.3)
    x, sigma, z = draw_latent(net, PROCESS, x_0, t_tilde, rng)
    assert z is None
    here = x[::2] != MASK
    first = here.int().argmax(1)
    assert torch.equal(here, (torch.arange(12) - first[:, None]) % 4 == 0) and first.max() == 3
    m = len(first)
    assert ((torch.bincount(first) - m / 4).abs() < 5 * (m * 3 / 16) ** 0.5).all()
    words, law = x[::2][here], torch.arange(K) / torch.arange(K).sum()
    assert len(words) == n // 3 * 3
    count = torch.bincount(words, minlength=K)
    assert ((count - n * law).abs() <= 5 * (n * law * (1 - law)) ** 0.5).all() and count[0] == 0
    shown = x[1::2] != MASK
    assert torch.equal(x[1::2][shown], x_0[1::2][shown]) and 0.6 < shown.double().mean() < 0.8


def test_monte_carlo_over_words_agrees_with_enumeration(rng):
    """One pass, three positions of which every second is there: the mixture's exact law over all
    beginnings, and draws of draw_latent. What is visible is copied."""
    net, x_0 = random_dit(rng, latent_words=2), en.texts(K, 3)
    net.frequencies.copy_(torch.arange(1, K + 1))
    law, exact = torch.arange(1, K + 1).double() / 6, 0
    for first in range(2):
        here = (torch.arange(3) + first) % 2 == 0
        G = generate_probs(net, PROCESS, Latent(torch.where(here, x_0, MASK), torch.zeros(len(x_0))))
        rows = torch.where(here, law[x_0], G.gather(-1, x_0[..., None])[..., 0])
        exact = exact + rows.prod(1) / 2
    assert abs(exact.sum() - 1) < 1e-9
    error = assert_estimated(net, x_0, exact, rng)
    blank = Latent(torch.full((1, 3), MASK), torch.zeros(1))
    without = generate_probs(net, PROCESS, blank)[0, torch.arange(3), x_0].prod(1)
    assert ((without - exact).abs() > 10 * error).any()


def test_turns_halve_the_gaps(rng):
    found = turns(2000, 16, 16, rng)
    at = found.argsort(1)
    assert ((at - at[:, :1]) % 16 == torch.tensor(
        [0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15])).all()
    assert len(at[:, 0].unique()) == 16
    for n in range(1, 20):                                 # every n-th position, whatever n
        found = turns(5, 60, n, rng)
        assert all((found[:, i:i + n].sort(1)[0] == torch.arange(n)).all() for i in range(60 - n))


@pytest.mark.parametrize("steps, schedule", [(1, "even"), (2, "even"), (2, "linear")])
def test_sampling_begins_with_words(steps, schedule, rng):
    """The first of n = steps + 1 turns (of at least latent_words = 3, at most L) costs no pass; its
    words are independent. Not so where steps reveal random positions, as published. Chi-square as
    above."""
    net, law = table(rng), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    rows = net.logits[..., :K].softmax(-1).tolist()
    net.config, net.word_frequencies = SimpleNamespace(latent_dim=0, latent_words=3), lambda n: law
    out = sample(net, PROCESS, 200_000, L, steps, rng, schedule=schedule, temperature=1.0)
    begin = [[law.tolist()] * L] * (K + 1) ** L

    def chance(i, l, first):
        turn = (0, 2, 1)[(l + first) % 3]                  # turn 0 | 1, 2 or 1 | 2
        return turn == 0 if not i else turn > 0 and (turn - 1) * steps // 2 == i - 1

    with_words = mean_of(walk(lambda i, l: chance(i, l, first), [begin] + [rows] * steps)
                         for first in range(3))
    without = law_of_sampling(rows, steps, schedule=schedule)
    even = schedule == "even"
    assert chi_square_p(out.tokens, with_words if even else without) > 1e-5
    assert chi_square_p(out.tokens, without if even else with_words) < 1e-9
    assert out.nfe.max() <= steps and (not even or (out.nfe == steps).all())


@pytest.mark.parametrize("steps, temperature", [(1, 0.5), (2, 0.65), (4, 0.75), (16, 0.88), (64, 0.94)])
def test_more_passes_are_warmer(steps, temperature):
    net = SimpleNamespace(config=SimpleNamespace(latent_words=4))
    assert own_temperature(net, PROCESS, steps, "even") == temperature
    assert own_temperature(net, PROCESS, steps, "linear") == 1
    assert own_temperature(None, Uniform(K), steps, "even") == 1      # whose networks know no words


@pytest.mark.parametrize("words, schedule, temperature", [
    (3, "even", 0.65), (3, "linear", 1.0), (0, "even", 1.0)])
def test_the_network_is_cold_where_texts_begin_with_words(words, schedule, temperature):
    net = table(torch.Generator().manual_seed(1))
    net.config = SimpleNamespace(latent_dim=0, latent_words=words)
    net.word_frequencies = lambda passes: torch.ones(K)
    plain, told = (sample(net, PROCESS, 1000, L, 2, torch.Generator().manual_seed(2),
                          schedule=schedule, **how).tokens for how in ({}, {
                              "temperature": temperature}))
    other = sample(net, PROCESS, 1000, L, 2, torch.Generator().manual_seed(2), schedule=schedule,
                   temperature=1.2 * temperature).tokens
    assert torch.equal(plain, told) and not torch.equal(plain, other)


@pytest.mark.parametrize("steps, words, n", [(1, 4, 4), (2, 4, 4), (5, 4, 6)])
def test_words_keep_away_from_a_prompt(steps, words, n, rng):
    """As far as from each other. The network never writes word 0, at first there is no other."""
    net, length, at = en.Table(torch.zeros(1), K + 1), 30, 11
    net.config = SimpleNamespace(latent_dim=0, latent_words=words)
    net.word_frequencies = lambda passes: torch.eye(K)[0]
    net.hidden = lambda x, sigma: torch.tensor([-1e4, 0, 0, 0]).expand(*x.shape, K + 1)
    prompt = torch.full((length,), -1)
    for there in (None, 1):
        if there:
            prompt[at] = there
        tokens = sample(net, PROCESS, 300, length, steps, rng, prompt=prompt).tokens
        found = tokens == 0
        place = torch.arange(length)
        far = (place - at).abs() >= n if there else place >= 0
        firsts = [int(place[row & (place > at if there else far)][0] % n) for row in found]
        for row, first in zip(found, firsts):
            assert torch.equal(row, (place % n == first) & far)
        assert set(firsts) == set(range(n)) and (tokens < K).all()
        assert not there or (tokens[:, at] == 1).all()


def test_the_sampler_gives_the_latent_to_texts_without_a_word(rng):
    """Their own numbers to each text and position, until its first word is there; a prompt's word
    is one. With no latent in the network one pass over one blank text serves all."""
    n, length, passes = 4, 6, []
    net = en.Table(torch.zeros(1), K + 1)
    net.config = SimpleNamespace(latent_dim=5, latent_words=0)

    def hidden(x, sigma, z=None):
        passes.append((x.clone(), z))
        return torch.zeros(*x.shape, K + 1)

    net.hidden = hidden
    prompt = torch.full((n, length), -1)
    prompt[0, 0] = 1
    sample(net, PROCESS, n, length, 12, rng, prompt=prompt, schedule="linear")
    numbers = []
    for x, z in passes:
        blank = (x == MASK).all(1)
        assert z.shape == (*x.shape, 5)
        assert torch.equal((z != 0).all(-1), blank[:, None].expand_as(x))
        assert (z[~blank] == 0).all()
        numbers += z[blank].flatten(0, 1).tolist()
    assert len(numbers) >= 3 * length and len(set(map(tuple, numbers))) == len(numbers)
    assert any((x != MASK).any(1).all() for x, _ in passes)
    assert any((x != MASK).any() and (x == MASK).all(1).any() for x, _ in passes)
    net.config = SimpleNamespace(latent_dim=0, latent_words=0)
    passes.clear()
    sample(net, PROCESS, n, length, 1, rng)
    assert [(len(x), z) for x, z in passes] == [(1, None)]
