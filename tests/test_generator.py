"""The latent, the mixture's likelihood, and the few-step sampler against its exact law.

Run: python -m pytest tests/test_generator.py

A table of logits stands in for the network (oracle.Table), so that the law of the written texts is
a product of small matrices: one a step, from every text to every text. Samples are compared with it
by a chi-square test whose odds of a false alarm are below 1e-5 each; seeds are fixed.
"""
import math
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import oracle
from conftest import assert_law, law_score, random_dit, seeded
from experiments.theorem import mixture_log_prob
from generator import (Latent, draw, draw_latent, draw_with_log_prob, generate_probs,
                       reveal_steps, sample, surest, uniform_step, warp)
from teacher import Masked, Uniform

K, L = 3, 3
MASKED = Masked(K + 1)
MASK = MASKED.mask_id
UNIFORM = Uniform(K)
f64 = {"dtype": torch.float64}


def masked_table(rng):
    """A random denoiser: other rows for every noised text. [MASK]'s own logit is high: it must not
    count."""
    logits = 1.5 * torch.randn((K + 1) ** L, L, K + 1, generator=rng, **f64)
    logits[..., MASK] = 4
    return oracle.Table(logits, K + 1)


class UniformTable(oracle.Table):
    """Logits that depend on the noise level, too: base + sigma / 4 * slope. Tokens of rows that the
    head projects are counted."""

    def __init__(self, rng, L):
        base, slope = 1.0 * torch.randn(2, K ** L, L, K, generator=rng, **f64)
        super().__init__(base, K)
        self.slope = slope
        self.num_rows = 0

    def rows(self, sigma):                                 # -> (K^L, L, K) logits
        return self.logits + sigma / 4 * self.slope

    def hidden(self, x, sigma):
        h = super().hidden(x)
        return h + sigma[:, None, None] / 4 * self.slope[oracle.index_of(x, K)]

    def project(self, rows):
        self.num_rows += len(rows)
        return rows


# ---- the exact law of the written texts ---------------------------------------------------------

def step_matrix(rows):
    """One step from every text to every text, given the law of every position's next token, apart
    from each other: (V^L, L, V) -> (V^L, V^L)."""
    N, length, V = rows.shape
    after = oracle.texts(V, length)
    matrix = torch.ones(N, N, **f64)
    for l in range(length):
        matrix = matrix * rows[:, l, after[:, l]]
    return matrix


def masked_rows(f, chance):
    """A visible token stays; a masked position is revealed with chance[l] and then drawn from f
    (V^L, L, K)."""
    x = oracle.texts(K + 1, L)
    hit = torch.tensor(chance, **f64)[:, None]
    drawn = torch.cat([hit * f, (1 - hit).expand(len(x), L, 1)], -1)
    return torch.where((x == MASK)[..., None], drawn, F.one_hot(x, K + 1).double())


EVEN = {1: (0,), 2: (0, 1), 3: (0, 2, 1)}                  # of n steps, the one of each position


def masked_law(f, steps, order, prompt=(-1,) * L):
    """(K^L,): the law of finished texts. random: step i of N reveals with probability (t - s) / t =
    1 / (N - i). even: one of n = min(N, L) turns starts at each position equally often."""
    if order == "confident":
        return confident_law(f, f, steps, prompt)
    start = oracle.index_of(torch.tensor([MASK if v < 0 else v for v in prompt]), K + 1)
    if order == "random":
        chances = [[[1 / (steps - i)] * L for i in range(steps)]]
    else:
        n = min(steps, L)
        chances = [[[float(EVEN[n][(l + first) % n] == i) for l in range(L)] for i in range(n)]
                   for first in range(n)]
    laws = []
    for plan in chances:
        law = F.one_hot(start, (K + 1) ** L).double()
        for chance in plan:
            law = law @ step_matrix(masked_rows(f, chance))
        laws.append(law)
    finished = oracle.index_of(oracle.texts(K, L), K + 1)
    law = torch.stack(laws).mean(0)[finished]
    assert abs(law.sum() - 1) < 1e-12                      # no [MASK] is left
    return law


def confident_law(f, sureness, steps, prompt=(-1,) * L):
    """(K^L,): a token is drawn from f at every [MASK]; the `due` ones that `sureness` puts first
    stay, where due spreads what is left over the steps that are left, and the others are forgotten.
    Both are (V^L, L, K)."""
    law = {tuple(MASK if v < 0 else v for v in prompt): 1.0}
    for i in range(steps):
        after = Counter()
        for text, chance in law.items():
            row = oracle.index_of(torch.tensor(text), K + 1)
            masked = [l for l in range(L) if text[l] == MASK]
            due = len(masked) // (steps - i)
            for drawn in product(range(K), repeat=len(masked)):
                drawn = list(zip(masked, drawn))
                kept = sorted(drawn, key=lambda lv: -sureness[row, lv[0], lv[1]])[:due]
                written = list(text)
                for l, v in kept:
                    written[l] = v
                after[tuple(written)] += chance * math.prod(f[row, l, v].item() for l, v in drawn)
        law = after
    law = torch.tensor([law[tuple(x)] for x in oracle.texts(K, L).tolist()], **f64)
    assert abs(law.sum() - 1) < 1e-12                      # no [MASK] is left
    return law


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("order", ["random", "even", "confident"])
def test_masked_texts_follow_the_exact_law(order, steps, rng):
    """27 texts, 50,000 samples. The laws of other numbers of steps and of other orders are far off:
    the samples fail against those. Only random order may leave a pass out before all is written."""
    net = masked_table(rng)
    f = net.logits[..., :K].softmax(-1)
    out = sample(net, MASKED, 50_000, L, steps, rng, order=order)
    index = oracle.index_of(out.tokens, K)
    assert_law(index, masked_law(f, steps, order))
    assert out.tokens.dtype == torch.int64 and out.tokens.shape == (50_000, L)
    assert out.nfe.min() >= 1 and out.nfe.max() <= steps and len(net.seen) <= steps
    if order != "random":
        assert (out.nfe == min(steps, L)).all()
    if steps > 1:
        assert law_score(index, masked_law(f, 1, order)) > 10
        for other in {"random", "even", "confident"} - {order}:
            assert law_score(index, masked_law(f, steps, other)) > 10


@pytest.mark.parametrize("order", ["random", "even", "confident"])
def test_prompted_texts_follow_the_conditional_law(order, rng):
    """One given token in the middle, two steps."""
    net = masked_table(rng)
    f = net.logits[..., :K].softmax(-1)
    out = sample(net, MASKED, 50_000, L, 2, rng, prompt=torch.tensor([-1, 2, -1]), order=order)
    assert (out.tokens[:, 1] == 2).all()
    assert_law(oracle.index_of(out.tokens, K), masked_law(f, 2, order, prompt=(-1, 2, -1)))


def test_temperature_and_top_p_change_the_law_as_they_say(rng):
    """Rows sharpened, cut to their nucleus and normalised by hand; two steps."""
    net = masked_table(rng)
    uncut = (net.logits[..., :K] / 0.7).softmax(-1)
    f = torch.zeros_like(uncut)
    for row, kept in zip(uncut.view(-1, K), f.view(-1, K)):
        for v in row.argsort(descending=True):             # the fewest tokens that hold 0.8
            if kept.sum() < 0.8:
                kept[v] = row[v]
        kept /= kept.sum()
    out = sample(net, MASKED, 50_000, L, 2, rng, temperature=0.7, top_p=0.8)
    index = oracle.index_of(out.tokens, K)
    assert_law(index, masked_law(f, 2, "random"))
    assert law_score(index, masked_law(uncut, 2, "random")) > 10
    out = sample(net, MASKED, 50_000, L, 2, rng, temperature=0.7, top_p=0.8, order="confident")
    index = oracle.index_of(out.tokens, K)                 # drawn from f, ranked by the network
    assert_law(index, confident_law(f, net.logits[..., :K].softmax(-1), 2))


def uniform_rows(net, i, steps, ending, length):
    """The law of every position's next token at step i: Bayes' rule with f in the place of x_0, or
    at the end the argmax of f ('greedy') or of f weighed by q(z | v) ('map')."""
    alpha_t = 1 - 0.999 * (1 - i / steps)
    alpha_s = 1 - 0.999 * (1 - (i + 1) / steps)
    f = net.rows(-math.log(alpha_t)).softmax(-1)           # text z, position, v

    def q(alpha):
        return alpha * torch.eye(K, **f64) + (1 - alpha) / K

    z = oracle.texts(K, length)
    if i == steps - 1 and ending != "ancestral":
        best = (f * q(alpha_t)[z] if ending == "map" else f).argmax(-1)
        return F.one_hot(best, K).double()
    rows = (f @ q(alpha_s)) * q(alpha_t / alpha_s)[z]
    return rows / rows.sum(-1, keepdim=True)


def uniform_law(net, steps, ending, length):
    law = torch.full((K ** length,), K ** -length, **f64)  # noise: any text
    for i in range(steps):
        law = law @ step_matrix(uniform_rows(net, i, steps, ending, length))
    return law


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("ending", ["ancestral", "greedy", "map"])
def test_uniform_texts_follow_the_exact_law(ending, steps, rng):
    """9 texts of two tokens, 50,000 samples; at most one pass a step, and a text takes none in
    which it certainly stays (with three steps or more some do)."""
    net = UniformTable(rng, 2)
    out = sample(net, UNIFORM, 50_000, 2, steps, rng, ending=ending)
    index = oracle.index_of(out.tokens, K)
    assert_law(index, uniform_law(net, steps, ending, 2))
    other = "ancestral" if ending != "ancestral" else "greedy"
    assert law_score(index, uniform_law(net, steps, other, 2)) > 10
    assert len(net.seen) == steps and out.nfe.max() == steps and out.nfe.min() >= 1
    assert (out.nfe < steps).any() == (steps > 2)


def test_prompted_uniform_texts(rng):
    """The given token stays, the other one is written."""
    net = UniformTable(rng, 2)
    out = sample(net, UNIFORM, 500, 2, 3, rng, prompt=torch.tensor([2, -1]))
    assert (out.tokens[:, 0] == 2).all() and len(out.tokens[:, 1].unique()) == K


def test_an_exact_teacher_writes_the_data(rng):
    """With the best denoiser (leave one out) in the network's place the uniform steps write p, up
    to the price of drawing tokens independently within a step, which falls as 1 / steps."""
    p = oracle.random_law(9, rng)
    errors = []
    for steps in (100, 200):
        law = torch.full((9,), 1 / 9, **f64)
        for i in range(steps):
            t, s = torch.tensor([[1 - i / steps], [1 - (i + 1) / steps]], **f64)
            f = oracle.best_denoiser(UNIFORM, t, p, 2)
            rows = oracle.posterior(f, oracle.texts(K, 2), UNIFORM.alpha(t)[0],
                                     UNIFORM.alpha(s)[0])
            law = law @ step_matrix(rows)
        errors.append((law - p).abs().max())
    assert errors[1] < 2e-3 and 1.8 < errors[0] / errors[1] < 2.2


# ---- one step -----------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha_t, alpha_s", [(0.3, 0.8), (1e-3, 0.334), (0.6, 1.0)])
def test_uniform_step_is_the_posterior(alpha_t, alpha_s):
    """Both uniform numbers on a lattice of 500 x 500 midpoints: shares of a rectangle's area are
    right to a few lines of the lattice, 1 / 500 each. The last token was cut by top_p."""
    n = 500
    line = (torch.arange(n, **f64) + 0.5) / n
    u_kind, u_token = [u.flatten() for u in torch.meshgrid(line, line, indexing="ij")]
    logits = torch.tensor([0.3, -1.0, 1.4, -torch.inf], **f64)
    for z in range(4):
        x_t = torch.full((n * n,), z)
        x_s = uniform_step(logits.expand(n * n, 4), x_t, u_kind, u_token, alpha_t=alpha_t,
                           alpha_s=alpha_s, temperature=1.0, top_p=1.0, K=4)
        found = torch.bincount(x_s, minlength=4).double() / n ** 2
        exact = oracle.posterior(logits.softmax(-1)[None], x_t[:1], alpha_t, alpha_s)[0]
        assert (found - exact).abs().max() < 4 / n


@pytest.mark.parametrize("ending", ["greedy", "map"])
def test_the_last_step(ending, rng):
    """One step from t = 1 on a wide vocabulary: 'greedy' is argmax f, 'map' is the argmax of
    f_v q(z | v). They differ wherever the token on which a position stands is nearly as likely."""
    n, wide = 40, 6
    process = Uniform(wide)
    logits = 3e-3 * torch.randn(n, n, wide, generator=rng, **f64)
    net = oracle.Table(logits, wide)
    net.hidden = lambda x, sigma: net.seen.append(x.clone()) or logits
    tokens = sample(net, process, n, n, 1, rng, ending=ending).tokens
    z = net.seen[0]
    f = logits.softmax(-1)
    alpha = 1e-3
    weighed = f * (alpha * F.one_hot(z, wide) + (1 - alpha) / wide)
    assert torch.equal(tokens, (f if ending == "greedy" else weighed).argmax(-1))
    assert (weighed.argmax(-1) != f.argmax(-1)).any() and (weighed.argmax(-1) != z).any()


def test_random_order_is_the_ancestral_step(rng):
    """The step that reveals a position is uniform, so what is still masked at t is revealed on the
    way to s with probability (t - s) / t; 60,000 positions."""
    steps = 5
    when = reveal_steps(torch.ones(20_000, 3, dtype=bool), steps, "random", rng)
    assert_law(when, torch.full((steps,), 1 / steps, **f64))
    for i in range(steps):
        t = 1 - i / steps
        left = (when >= i).sum().item()
        p = min(1, 1 / steps / t)                          # (t - s) / t
        share = (when == i).sum().item() / left
        assert abs(share - p) <= 5 * (p * (1 - p) / left) ** 0.5


def test_even_order_halves_the_gaps(rng):
    """16 steps: 0 8 4 12 2 ..., from each of 16 first positions; n steps: every n-th position."""
    when = reveal_steps(torch.ones(2000, 16, dtype=bool), 16, "even", rng)
    positions = when.argsort(1)
    halving = torch.tensor([0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15])
    assert ((positions - positions[:, :1]) % 16 == halving).all()
    assert len(positions[:, 0].unique()) == 16
    for n in range(1, 20):
        when = reveal_steps(torch.ones(5, 60, dtype=bool), n, "even", rng)
        for i in range(60 - n):
            assert (when[:, i:i + n].sort(1).values == torch.arange(n)).all()


def test_shuffled_order_reveals_equally_many(rng):
    """10 and 7 positions in 4 steps: 2 or 3 and 1 or 2 a step, none twice, given ones never counted.
    Every position comes in every step; steps from the number of positions on take one each."""
    is_masked = torch.ones(2000, 10, dtype=bool)
    is_masked[1000:, [0, 4, 9]] = False
    when = reveal_steps(is_masked, 4, "shuffled", rng)
    for rows, fewest in ((slice(1000), 2), (slice(1000, None), 1)):
        counts = torch.stack([((when == i) & is_masked)[rows].sum(1) for i in range(4)])
        assert counts.min() == fewest and counts.max() == fewest + 1
    assert_law(when[:1000, 3], torch.tensor([0.3, 0.2, 0.3, 0.2], **f64))
    when = reveal_steps(is_masked[:1], 13, "shuffled", rng)
    assert len(when.unique()) == 10 and when.max() < 13


def test_surest_tokens():
    """Four texts of which 1, 2, 0 and 3 tokens are due: those of the largest log-probability among
    the positions that drew one."""
    where = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
    tokens = torch.tensor([10, 11, 12, 20, 22, 30, 31, 32])
    log_p = torch.tensor([-3.0, -1.0, -2.0, -9.0, -1.0, -4.0, -5.0, 0.0])
    drawn = torch.stack([tokens, log_p], 1)
    chosen, kept = surest(drawn, where, torch.tensor([1, 2, 0, 3]))
    assert chosen.tolist() == [[False, True, False], [True, False, True], [False] * 3, [True] * 3]
    assert kept.tolist() == [11, 20, 22, 30, 31, 32] and kept.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.1, 1.0), (1.0, 0.3), (1.0, 1e-9)])
def test_a_token_and_its_probability(dtype, temperature, top_p, rng):
    """What `draw` draws, exact as a float for every token of GPT-2 and more; beside it the
    logarithm of its probability in the row as the network gave it."""
    logits = (2 * torch.randn(5, 70_000, generator=rng)).to(dtype)
    u = torch.rand(5, generator=rng, **f64)
    tokens = draw(logits, u, temperature, top_p)
    drawn = draw_with_log_prob(logits, u, temperature, top_p)
    wide = torch.promote_types(dtype, torch.float32)
    log_p = logits.to(wide).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(drawn[:, 0].long(), tokens) and drawn.dtype == wide
    torch.testing.assert_close(drawn[:, 1], log_p)


def test_warp(rng):
    """Divided by the temperature; then the fewest tokens that hold top_p, as they are."""
    logits = torch.randn(50, 20, generator=rng, **f64)
    assert torch.equal(warp(logits, 1.0, 1.0), logits)
    torch.testing.assert_close(warp(logits, 0.5, 1.0), 2 * logits)
    for top_p in (1e-9, 0.3, 0.9):
        kept = warp(logits, 1.0, top_p)
        is_cut = kept.isinf()
        assert torch.equal(kept[~is_cut], logits[~is_cut])
        for row, cut in zip(logits.softmax(-1), is_cut):
            assert row[~cut].sum() >= top_p                # enough is kept ...
            assert row[~cut].sum() - row[~cut].min() < top_p         # ... and not one too many
            assert not cut.any() or row[cut].max() <= row[~cut].min()
    assert warp(logits.bfloat16(), 0.7, 0.9).dtype == torch.float32


# ---- what every run keeps -----------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize("order", ["random", "confident"])
def test_visible_tokens_stay_and_passes_are_counted(order, steps, rng):
    """At every step: what is visible stays, a text has taken a pass only where it revealed
    something, and nothing is [MASK] at the end."""
    n, length = 50, 12
    rows = torch.randn(length, 9, generator=rng)
    net = oracle.Table(rows, 9)
    net.hidden = lambda x, sigma: net.seen.append(x) or rows.expand(len(x), -1, -1)
    states = [torch.full((n, length), 8)]
    called = []

    def callback(step, x_t):
        called.append(step)
        states.append(x_t.clone())

    out = sample(net, Masked(9), n, length, steps, rng, order=order, callback=callback)
    assert called == list(range(steps))
    changed = []
    for before, after in zip(states, states[1:]):
        is_visible = before != 8
        assert torch.equal(after[is_visible], before[is_visible])
        changed.append((after != before).any(1))
    assert (states[-1] != 8).all() and torch.equal(states[-1], out.tokens)
    assert torch.equal(out.nfe, torch.stack(changed).sum(0))
    assert out.nfe.max() <= min(steps, length)
    assert len(net.seen) == sum(c.any().item() for c in changed)


@pytest.mark.parametrize("process, order", [
    (MASKED, "random"), (MASKED, "confident"), (UNIFORM, "random")],
    ids=["masked", "masked, confident", "uniform"])
def test_a_prompt_stays_wherever_it_stands(process, order, rng):
    """All prompts of three positions, a prompt a text, and nothing to write: no pass."""
    net = masked_table(rng) if process is MASKED else UniformTable(rng, L)
    for prompt in product((-1, 1, 2), repeat=L):
        tokens = torch.tensor(prompt)
        out = sample(net, process, 20, L, 3, rng, prompt=tokens, order=order)
        assert (out.tokens[:, tokens >= 0] == tokens[tokens >= 0]).all()
        assert out.tokens.min() >= 0 and out.tokens.max() < K
        assert (tokens < 0).any() or (out.nfe == 0).all()
    each = torch.tensor([[0, -1, -1], [-1, 1, -1], [-1, -1, 2]])
    before = each.clone()
    out = sample(net, process, 3, L, 2, rng, prompt=each, order=order)
    assert (out.tokens[each >= 0] == each[each >= 0]).all() and torch.equal(each, before)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_equal_seeds_give_equal_texts(process, rng):
    net = masked_table(rng) if process is MASKED else UniformTable(rng, L)
    texts = [sample(net, process, 50, L, 3, seeded(seed)).tokens for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_training_mode_is_put_back(rng):
    """The passes themselves run in eval mode."""
    net = masked_table(rng)
    hidden = net.hidden
    during = []
    net.hidden = lambda *args: during.append(net.training) or hidden(*args)
    for mode in (True, False):
        sample(net.train(mode), MASKED, 2, L, 2, rng)
        assert net.training == mode
    assert during and not any(during)


@pytest.mark.parametrize("steps, more, sentence", [
    (0, {}, "steps 0"), (-3, {}, "steps -3"), (2, {"order": "evn"}, "order 'evn'"),
    (2, {"ending": "gready"}, "ending 'gready'"), (2, {"temperature": 0}, "temperature 0"),
    (2, {"temperature": -1.0}, "temperature -1.0"), (2, {"top_p": 0}, "top_p 0"),
    (2, {"top_p": 1.5}, "top_p 1.5")])
def test_unknown_settings_are_refused(steps, more, sentence, rng):
    with pytest.raises(ValueError, match=sentence):
        sample(masked_table(rng), MASKED, 2, L, steps, rng, **more)


@pytest.mark.parametrize("prompt", [None, (-1, 4, -1, -1, 0, -1)])
def test_the_shortcuts_change_nothing(prompt, rng):
    """One pass for all texts while they are blank, no pass for texts that reveal nothing, the head
    at revealed positions: a plain loop with the same draws writes the same texts."""
    n, length, steps = 6, 6, 9
    process = Masked(7)
    net = random_dit(7, rng)
    prompt = None if prompt is None else torch.tensor(prompt)
    out = sample(net, process, n, length, steps, seeded(5), prompt=prompt)

    draws = seeded(5)
    when = reveal_steps(torch.ones(n, length, dtype=bool), steps, "random", draws)
    x = torch.full((n, length), 6)
    if prompt is not None:
        x = torch.where(prompt < 0, x, prompt)
    passes = torch.zeros(n, dtype=torch.int64)
    for i in range(steps):
        reveal = (x == 6) & (when == i)
        takes = reveal.any(1)
        if not takes.any():
            continue
        cdf = net(x, torch.zeros(n))[..., :6].softmax(-1).cumsum(-1)
        u = torch.zeros(n, length, **f64)
        batch = slice(None) if 2 * takes.sum() > n else takes        # see pass_rows
        u[batch] = torch.rand(u[batch].shape, generator=draws, **f64)
        x = torch.where(reveal, (u[..., None] >= cdf).sum(-1), x)
        passes += takes
    assert torch.equal(out.tokens, x) and torch.equal(out.nfe, passes)


# A text a line, with 0 to 6 positions to write (-1).
STAIRS = [[0, 1, 1, 0, 1, 0], [0, 1, -1, 0, 1, 0], [-1, 1, 1, -1, 1, 0], [0, -1, -1, 0, -1, 0],
          [-1, -1, -1, -1, 1, 0], [-1, -1, -1, -1, -1, 0], [-1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 11])
@pytest.mark.parametrize("prompt", [[[-1] * 6] * 7, [[-1, 1, -1, -1, 0, -1]] * 7, STAIRS],
                         ids=["blank", "one prompt", "0 to 6 to write"])
def test_confident_order_is_a_plain_loop(prompt, steps, rng):
    """All texts, all positions, one text after the other, with the same draws: of the tokens drawn
    at the [MASK] of a text the likeliest stay, as many as are left over by the steps left. Texts of
    which nothing is due yet sit out, the others' shapes vary: it writes the same texts."""
    n, length, wide = 7, 6, 2
    process = Masked(wide + 1)
    net = oracle.Table(torch.randn(3 ** 6, length, wide + 1, generator=rng, **f64), wide + 1)
    prompt = torch.tensor(prompt)
    out = sample(net, process, n, length, steps, seeded(5), prompt=prompt, order="confident")

    draws = seeded(5)
    x = torch.where(prompt < 0, wide, prompt)
    passes = torch.zeros(n, dtype=torch.int64)
    for i in range(steps):
        due = (x == wide).sum(1) // (steps - i)
        takes = due > 0
        if not takes.any():
            continue
        f = net.logits[oracle.index_of(x, wide + 1)][..., :wide].softmax(-1)
        u = torch.zeros(n, length, **f64)
        batch = slice(None) if 2 * takes.sum() > n else takes        # see pass_rows
        u[batch] = torch.rand(u[batch].shape, generator=draws, **f64)
        drawn = (u[..., None] >= f.cumsum(-1)).sum(-1)
        for text in range(n):
            masked = [l for l in range(length) if x[text, l] == wide]
            masked.sort(key=lambda l: f[text, l, drawn[text, l]], reverse=True)
            for l in masked[:due[text]]:
                x[text, l] = drawn[text, l]
        passes += takes
    assert torch.equal(out.tokens, x) and torch.equal(out.nfe, passes)
    assert torch.equal(passes, (prompt < 0).sum(1).clamp(max=steps))


@pytest.mark.parametrize("steps", [6, 7, 20])
def test_with_steps_for_all_the_surest_position_comes_next(steps, rng):
    """Six positions, six steps or more, and draws that are the likeliest tokens (top_p): every pass
    writes one position, the one whose likeliest token is the likeliest of all."""
    length, wide = 6, 2
    net = oracle.Table(torch.randn(3 ** 6, length, wide + 1, generator=rng, **f64), wide + 1)
    states = [torch.full((1, length), wide)]
    out = sample(net, Masked(wide + 1), 1, length, steps, rng, order="confident", top_p=1e-9,
                 callback=lambda step, x: states.append(x.clone()))
    assert len(net.seen) == out.nfe == length
    for before, after in zip(states[steps - length:], states[steps - length + 1:]):
        p = net.logits[oracle.index_of(before[0], wide + 1)][:, :wide].softmax(-1)
        best, token = p.max(-1)
        surest_one = best.masked_fill(before[0] != wide, -1).argmax()
        assert (after != before)[0].nonzero().tolist() == [[surest_one]]
        assert after[0, surest_one] == token[surest_one]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_order_in_other_precisions(dtype, rng):
    """Under autocast too: prompts stay, all is written, no text takes more passes than steps."""
    net = random_dit(9, rng).float()
    prompt = torch.tensor([-1, 5, -1, -1, 0, -1, -1, -1])
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        out = sample(net, Masked(9), 30, 8, 4, rng, prompt=prompt, order="confident")
    assert (out.tokens[:, prompt >= 0] == prompt[prompt >= 0]).all()
    assert out.tokens.min() >= 0 and out.tokens.max() < 8 and (out.nfe == 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_tokens_keep_their_rank(dtype):
    """log p where float32 rounds p itself to 1, and of a token that all but cannot be drawn: exact,
    so sure tokens are not level and every drawn one is ahead of what is not wanted (-inf)."""
    logits = torch.zeros(6, 4, dtype=dtype)
    logits[:, 2] = torch.tensor([10, 20, 30, 50, 90, -150])
    drawn = draw_with_log_prob(logits, torch.full((6,), 0.5, **f64), 1.0, 1.0)
    assert drawn[:5, 0].tolist() == [2] * 5
    exact = -torch.log1p(3 * (-logits[:5, 2].double()).exp())
    torch.testing.assert_close(drawn[:5, 1].double(), exact, rtol=1e-5, atol=0)
    hot = draw_with_log_prob(logits[5:], torch.tensor([0.52], **f64), 1000.0, 1.0)
    assert hot[0, 0] == 2 and abs(hot[0, 1] + 150 + math.log(3)) < 1e-3


def test_of_level_tokens_the_first_stay():
    """Not whichever the processor's sort puts first."""
    where = torch.ones(2, 82, dtype=torch.bool)
    where[:, 0] = False
    drawn = torch.tensor([[7.0, 0.0]]).repeat(162, 1)
    chosen, tokens = surest(drawn, where, torch.tensor([3, 40]))
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[1, 2, 3], [*range(1, 41)]]
    assert tokens.tolist() == [7] * 43


def test_who_stays_whatever_f_is_needs_no_head(rng):
    """Uniform process at 100 steps: the head runs at a tenth of all positions. On paper the sum of
    the steps' bounds is about 2 log(1 / alpha(1)) = 14 passes' worth."""
    n, steps = 2000, 100
    net = UniformTable(rng, 2)
    nfe = sample(net, UNIFORM, n, 2, steps, rng).nfe.double()
    assert 0.05 < net.num_rows / (n * 2 * steps) < 0.15
    assert net.num_rows / (n * 2) < nfe.mean() < net.num_rows / n and len(net.seen) == steps


# ---- the latent ---------------------------------------------------------------------------------

@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
def test_draw_latent(process, rng):
    """eps is the text noised by the process, with the sigma that its network reads; given positions
    stay."""
    x_0 = torch.randint(K, (2, 50), generator=rng)
    t = torch.tensor([0.2, 0.9], **f64)
    free = torch.rand(2, 50, generator=rng) < 0.5
    eps = draw_latent(process, x_0, t, seeded(1))
    assert torch.equal(eps.x, process.corrupt(x_0, t, seeded(1)))
    assert torch.equal(eps.sigma, process.sigma(t)) and torch.equal(eps[0], eps.x)
    prompted = draw_latent(process, x_0, t, seeded(1), free=free)
    assert torch.equal(prompted.x, torch.where(free, eps.x, x_0))


def test_draw_soft_latent(rng):
    """The Gaussian state of the text at t, and the sigma of its own clock."""
    x_0 = torch.randint(K, (2, 50), generator=rng)
    t = torch.tensor([0.2, 0.9], **f64)
    (weights, ids), sigma = draw_latent(UNIFORM, x_0, t, seeded(1), soft=True)
    exact, _ = UNIFORM.gaussian.soft_corrupt(x_0, t, seeded(1))
    assert torch.equal(weights, exact[0]) and torch.equal(ids, exact[1])
    assert torch.equal(sigma, -UNIFORM.gaussian(t)[2].log())


def test_masked_rows_are_on_the_simplex_and_copy(rng):
    """generate_probs: G is the network's softmax over tokens, certain where x_tilde is visible."""
    net = masked_table(rng)
    x = oracle.texts(K + 1, L)
    probs = generate_probs(net, MASKED, Latent(x, torch.zeros(len(x))))
    exact = masked_rows(net.logits[..., :K].softmax(-1), [1.0] * L)[..., :K]
    torch.testing.assert_close(probs, exact)


def test_uniform_rows_are_weighed_by_their_own_token(rng):
    """generate_probs: f_u q(x_tilde | u), normalised, as idlm_loss.py trains it; `soft` takes f."""
    wide = 6
    process = Uniform(wide)
    net = random_dit(wide, rng)
    x_0 = torch.randint(wide, (2, 4), generator=rng)
    t = torch.tensor([0.3, 1.0], **f64)
    eps = draw_latent(process, x_0, t, rng)
    alpha = process.alpha(t)[0][:, None, None]
    f = net(*eps).softmax(-1)
    rows = f * (alpha * F.one_hot(eps.x, wide) + (1 - alpha) / wide)
    found = generate_probs(net, process, eps)
    torch.testing.assert_close(found, rows / rows.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert (found[0] - f[0]).abs().max() > 0.1
    eps = draw_latent(process, x_0, t, rng, soft=True)
    torch.testing.assert_close(generate_probs(net, process, eps), net(*eps).softmax(-1))


# ---- the mixture's likelihood -------------------------------------------------------------------

def test_mixture_log_prob_is_that_of_the_mixture(rng):
    """Six latents, once each: the log of the mean product, text by text, with visible tokens
    certain; the probabilities of all texts sum to 1."""
    net = masked_table(rng)
    x_0 = oracle.texts(K, L)
    noised = torch.randint(K + 1, (6, L), generator=rng)
    noised[0] = MASK
    latents = [Latent(x.expand(len(x_0), -1), torch.zeros(len(x_0))) for x in noised]
    exact = torch.zeros(len(x_0), **f64)
    for x_tilde in noised:
        rows = net.logits[oracle.index_of(x_tilde, K + 1)][:, :K].softmax(-1)
        for i, x in enumerate(x_0.tolist()):
            chance = 1.0
            for l, v in enumerate(x):
                is_masked = x_tilde[l] == MASK
                chance *= rows[l, v].item() if is_masked else float(x_tilde[l] == v)
            exact[i] += chance / len(noised)
    log_prob = mixture_log_prob(net, MASKED, x_0, iter(latents))
    torch.testing.assert_close(log_prob, exact.log(), rtol=1e-12, atol=1e-12)
    assert abs(log_prob.exp().sum() - 1) < 1e-12


@pytest.mark.parametrize("soft", [False, True])
def test_mixture_log_prob_of_the_uniform_process(soft, rng):
    """log of the mean over draws of eps of prod_l G_l(eps)[x_l], for tokens and for soft inputs."""
    wide = 6
    process = Uniform(wide)
    net = random_dit(wide, rng)
    x_0 = torch.randint(wide, (3, 4), generator=rng)
    t = torch.full((3,), 0.5, **f64)
    draws = [draw_latent(process, x_0, t, rng, soft=soft) for _ in range(5)]
    rows = torch.stack([generate_probs(net, process, eps) for eps in draws])
    picked = rows.gather(-1, x_0.expand(5, 3, 4)[..., None])[..., 0]
    exact = picked.prod(-1).mean(0).log()
    torch.testing.assert_close(mixture_log_prob(net, process, x_0, draws), exact)


def test_few_latents_bias_the_likelihood_downwards(rng):
    """The exact expectation of the estimate over all 4^k draws of k latents lies below the
    mixture's log p, and rises with k."""
    net = masked_table(rng)
    x_0 = oracle.texts(K, L)[:5]
    blank = torch.full((5, L), MASK)
    sigma = torch.zeros(5)
    latents = [Latent(blank, sigma)]
    for l in range(L):                                     # one visible token, which agrees
        seen = torch.arange(L) == l
        latents.append(Latent(torch.where(seen, x_0, blank), sigma))
    exact = mixture_log_prob(net, MASKED, x_0, latents)
    expected = []
    for k in (1, 2, 3):
        draws = product(latents, repeat=k)
        estimates = [mixture_log_prob(net, MASKED, x_0, draw) for draw in draws]
        expected.append(torch.stack(estimates).mean(0))
    for less, more in zip(expected, expected[1:] + [exact]):
        assert (less < more - 1e-4).all()
