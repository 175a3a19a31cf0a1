"""The vocabulary head at the rows that count, and exact draws from it.

Run: python -m pytest tests/test_rows.py

`per_row` must give what a plain sum over all positions and tokens gives, however it cuts the work:
kept whole, recomputed in the backward pass, in chunks, on rows longer than the vocabulary.
"""
import pytest
import torch

import generator
import idlm_loss
import rows
import teacher
from conftest import Fixed, assert_law, assert_same, seeded
from rows import draw_tokens, per_row, sample_categorical

B, L, D, K = 3, 4, 5, 7


class Head:
    """A network of which only the head matters: rows @ w."""

    def __init__(self, w):
        self.w = w

    def project(self, h):
        return h @ self.w


# ---- per_row ------------------------------------------------------------------------------------

class Problem:
    """Three heads, their hidden states and an argument of every kind, in float64."""

    def __init__(self, rng, width=K):
        def normal(*shape):
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.w = [normal(D, width).requires_grad_() for _ in range(3)]
        self.h = [normal(B, L, D).requires_grad_() for _ in range(3)]
        self.tokens = torch.randint(K, (B, L), generator=rng)        # a value a position
        self.vectors = normal(B, L, 2)                               # two of them
        self.per_text = normal(B)                                    # a value a text
        self.scalar = torch.tensor(1.7, dtype=torch.float64)         # 0-dim
        self.args = self.tokens, self.vectors, self.per_text, self.scalar, 0.3
        self.nets = [Head(w) for w in self.w]
        self.calls = []

    def formula(self, one, two, three, token, vector, per_text, scalar, number):
        self.calls.append(len(one))
        assert per_text.shape == (len(one), 1) and vector.shape == (len(one), 2)
        inner = (one.softmax(-1) * (two.log_softmax(-1) - three.log_softmax(-1))).sum(-1)
        picked = one.gather(1, token[:, None])[:, 0]
        return scalar * inner * per_text[:, 0] + vector[:, 0] - number * vector[:, 1] * picked

    def dense(self):                                                 # (B, L)
        one, two, three = [h @ w for h, w in zip(self.h, self.w)]
        inner = (one.softmax(-1) * (two.log_softmax(-1) - three.log_softmax(-1))).sum(-1)
        picked = one.gather(2, self.tokens[..., None])[..., 0]
        first, second = self.vectors.unbind(-1)
        return 1.7 * inner * self.per_text[:, None] + first - 0.3 * second * picked


MODES = {"whole": (2 ** 26, 2 ** 22), "recomputed": (2 ** 26, 0), "3 rows": (3 * K, 2 ** 22),
         "1 row": (K, 2 ** 22)}


@pytest.mark.parametrize("where", ["all", "some", "one", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_per_row_is_the_dense_formula(mode, where, rng, monkeypatch):
    """Values, and gradients in every head and every hidden state, with and without a gradient."""
    chunk, keep = MODES[mode]
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(rows, "KEEP_ELEMENTS", keep)
    p = Problem(rng)
    counts = {"all": None, "none": torch.zeros(B, L, dtype=torch.bool),
              "some": torch.rand(B, L, generator=rng) < 0.6,
              "one": torch.arange(B * L).view(B, L) == 5}[where]
    found = per_row(p.formula, K, p.nets, p.h, p.args, counts)
    exact = p.dense().flatten() if counts is None else p.dense()[counts]
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
    learn = p.w + p.h
    assert_same(torch.autograd.grad(found.sum(), learn), torch.autograd.grad(exact.sum(), learn),
                bound=1e-12)
    with torch.no_grad():
        again = per_row(p.formula, K, p.nets, p.h, p.args, counts)
    assert torch.equal(again, found) and not again.requires_grad


@pytest.mark.parametrize("mode, sizes", [
    ("whole", [12]), ("recomputed", [12, 12]), ("3 rows", [3] * 8), ("1 row", [1] * 24)])
def test_chunks_are_projected_again_in_the_backward_pass(mode, sizes, rng, monkeypatch):
    """Few logits wait for the backward pass, many are made anew: chunks of equal size, twice."""
    chunk, keep = MODES[mode]
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(rows, "KEEP_ELEMENTS", keep)
    p = Problem(rng)
    per_row(p.formula, K, p.nets, p.h, p.args).sum().backward()
    assert p.calls == sizes


def test_a_frozen_network_takes_no_gradient(rng):
    """Its head is left out of the backward pass; the value is the same."""
    p = Problem(rng)
    whole = per_row(p.formula, K, p.nets, p.h, p.args)
    nets = p.nets[0], rows.frozen(p.nets[1]), p.nets[2]
    found = per_row(p.formula, K, nets, p.h, p.args)
    assert torch.equal(found, whole)
    found.sum().backward()
    assert p.w[1].grad is None and p.h[1].grad is None
    assert p.w[0].grad is not None and p.h[2].grad is not None


def test_compiled_rows_are_the_eager_rows(rng, monkeypatch):
    """Where COMPILE is set chunks are larger and their length varies. Value and gradient stay the
    same, kept or recomputed, and another number of rows compiles nothing new."""
    w = torch.randn(8, 8, generator=rng, dtype=torch.float64).requires_grad_()
    nets = Head(w), Head(torch.eye(8, dtype=torch.float64)), Head(torch.eye(8, dtype=torch.float64))
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 2 * 8)
    monkeypatch.setattr(rows, "COMPILED_CHUNKS", 3)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(rows.on_logits, dynamic=False, backend=backend)
    monkeypatch.setattr(rows, "compiled", lambda function: run)
    for n, keep in ((13, 2 ** 31), (4, 2 ** 31), (11, 0), (6, 0)):
        monkeypatch.setattr(rows, "KEEP_COMPILED", keep)
        h = torch.randn(3, 1, n, 8, generator=rng, dtype=torch.float64)
        weight = torch.rand(1, n, 1, generator=rng, dtype=torch.float64)
        results = {}
        for on in (False, True):
            monkeypatch.setattr(rows, "COMPILE", on)
            values = per_row(idlm_loss.masked_gap, 8, nets, tuple(h), (weight,))
            results[on] = values.detach(), *torch.autograd.grad(values.sum(), w)
        assert_same(results[True], results[False])
    assert len(graphs) == 1


# ---- rows longer than the vocabulary ------------------------------------------------------------

def row_formulas():
    """Every formula of the program: (formula, number of networks, arguments) for 6 rows, K 41."""
    rng = seeded(3)
    K, N = 41, 6
    x, z, token = torch.randint(K, (3, N), generator=rng)
    a, u, v = torch.rand(3, N, generator=rng, dtype=torch.float64)
    a = a[:, None]
    xi = torch.randn(N, K, generator=rng, dtype=torch.float64)
    t = torch.tensor([0.3, 0.6, 0.7], dtype=torch.float64)
    return {
        "cross_entropy": (rows.cross_entropy, 1, (x,)),
        "weighted_cross_entropy": (rows.weighted_cross_entropy, 1, (x, a)),
        "sample_categorical": (sample_categorical, 1, (u,)),
        "soft_cross_entropy": (idlm_loss.soft_cross_entropy, 2, (a,)),
        "masked_gap": (idlm_loss.masked_gap, 3, (a,)),
        "draw_weighed": (idlm_loss.draw_weighed, 1, (u, token, 9 * a)),
        "uniform_nelbo": (idlm_loss.uniform_nelbo, 2, (z, a, -a, token, 9 * a, K)),
        "uniform_gap": (idlm_loss.uniform_gap, 3, (z, a, -a, token, 9 * a, K)),
        "state_rows": (idlm_loss.state_rows, 1, (xi, a, 1 - a, 0.1, 5)),
        "one_hot_nelbo": (teacher.one_hot_nelbo, 1, (x, z, a, -a, K)),
        "kl": (teacher.kl, 2, ()),
        "draw": (generator.draw, 1, (u, t[2], 0.8)),
        "draw_with_log_prob": (generator.draw_with_log_prob, 1, (u, t[2], 0.8)),
        "uniform_step": (generator.uniform_step, 1, (z, u, v, t[0], t[1], t[2], 1.0, K)),
        "likeliest": (generator.likeliest, 1, (z, 9 * a, t[2], 1.0)),
    }


@pytest.mark.parametrize("name", row_formulas())
def test_rows_longer_than_the_vocabulary(name, rng, monkeypatch):
    """Compiled rows keep 48 entries, eager ones are cut to the 41 tokens: every formula gives the
    same values and gradients, however likely the other 7 entries seem."""
    formula, n, args = row_formulas()[name]
    weights = [torch.randn(5, 48, generator=rng, dtype=torch.float64) for _ in range(n)]
    for w in weights:
        w[:, 41:] += 5
        w.requires_grad_()
    h = [torch.randn(6, 5, generator=rng, dtype=torch.float64)] * n
    results = {}
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        widths = []

        def formula_and_width(*args):
            widths.append(args[0].shape[1])
            return formula(*args)

        results[compiling] = rows.on_logits(formula_and_width, 41, map(Head, weights), h, args)
        assert widths == [48 if compiling else 41]
    cut, wide = results[False], results[True]
    if not cut.is_floating_point():
        assert torch.equal(wide, cut)
        return
    assert_same([wide], [cut])
    assert_same(torch.autograd.grad(wide.sum(), weights), torch.autograd.grad(cut.sum(), weights))


def test_other_widths_are_cut(monkeypatch):
    """Rows of 50 entries are no multiple of 16: compiled or not, only the tokens stay."""
    logits = torch.zeros(2, 50)
    assert rows.tokens_only(logits, 41).shape == (2, 41)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert rows.tokens_only(logits, 41).shape == (2, 41)


# ---- tools --------------------------------------------------------------------------------------

def test_entry(rng, monkeypatch):
    """rows[i, index[i]], by gather and, compiled, by comparison: values and gradients."""
    x = torch.randn(6, 9, generator=rng, dtype=torch.float64).requires_grad_()
    index = torch.randint(9, (6,), generator=rng)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        found = rows.entry(x, index)
        assert torch.equal(found[:, 0], x[torch.arange(6), index])
        gradient, = torch.autograd.grad(found.sum(), x)
        assert torch.equal(gradient, torch.nn.functional.one_hot(index, 9).double())


def test_flat_rows_and_rows_of():
    """Indices of True in a flattened mask; a value per text, at every one of its positions."""
    mask = torch.tensor([[True, False, True], [False, False, True]])
    cpu = torch.device("cpu")
    assert rows.flat_rows(mask, cpu).tolist() == [0, 2, 5]
    assert rows.rows_of(torch.tensor([7, 8]), 3, cpu).tolist() == [[7]] * 3 + [[8]] * 3


def test_mean_over():
    """Over the free positions, or over all of them."""
    x = torch.zeros(2, 3)
    free = torch.tensor([[True, False, True], [False, False, True]])
    assert rows.mean_over(None, torch.tensor([1.0, 5.0]), x) == 1
    assert rows.mean_over(free, torch.tensor([1.0, 5.0]), x) == 2


def test_half_precision_is_raised_to_float32():
    """float64 stays as it is."""
    for given, computed in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):
        assert rows.upcast(torch.zeros(1, dtype=given)).dtype == computed


# ---- draws --------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", [3, 7, 300])
def test_draws_have_the_frequencies_of_the_row(K, rng):
    """50,000 draws, chi-square. Weights need not be normalised; an impossible token never comes."""
    logits = 1.5 * torch.randn(K, generator=rng) + 20
    logits[K // 2] = -torch.inf
    u = torch.rand(50_000, generator=rng, dtype=torch.float64)
    assert_law(sample_categorical(logits.expand(len(u), -1), u), logits.double().softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 2, 3, 5, 10, 17, 1000])
def test_sample_categorical_inverts_the_distribution(K, dtype, rng):
    """At the middle of every token's interval, that token. u = 0 gives the first and u just below
    1, or rounded up to 1, the last token that is possible; impossible ones never come."""
    logits = 2 * torch.randn(K, generator=rng, dtype=dtype)
    for impossible in ([], [0], [K - 1], range(0, K, 2), range(K // 2), range(K // 2 + 1, K)):
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


def test_u_rounded_up_to_1_in_float32(rng):
    """Devices without float64 give float32 numbers, which may be 1: still a possible token."""
    row = torch.tensor([0.0, 1.0, -torch.inf, -torch.inf])
    assert sample_categorical(row[None], torch.ones(1)).tolist() == [1]


def test_rare_tokens_keep_their_probability():
    """A token of probability 1e-9 behind likely ones has its interval, at its exact place."""
    row = torch.full((9,), -torch.inf, dtype=torch.float64)
    row[:3] = torch.tensor([0.5, 0.5 - 1e-9, 1e-9], dtype=torch.float64).log()
    u = torch.tensor([1 - 1.1e-9, 1 - 0.9e-9, 1 - 1e-12], dtype=torch.float64)
    assert sample_categorical(row.expand(3, -1), u).tolist() == [1, 2, 2]


def test_float32_draws_over_50257_tokens_equal_float64_ones(rng):
    """Frequencies of natural text, against a plain float64 inversion at the same u.

    A float32 softmax moves the cumulative sum by a few of its roundings (2^-24 = 6e-8): a draw may
    differ only where u is within 5e-7 of the edge between the two tokens. A cumulative sum in
    float32 is off by up to 1e-5 and fails.
    """
    rank = torch.randperm(50_257, generator=seeded(0))
    logits = (-(rank.double() + 2.7).log()).float()
    u = torch.rand(300, generator=rng, dtype=torch.float64)
    cdf = logits.double().softmax(-1).cumsum(-1)
    plain = torch.searchsorted(cdf / cdf[-1], u, right=True)
    drawn = sample_categorical(logits.expand(300, -1), u)
    differs = drawn != plain
    edge = torch.where(drawn < plain, cdf[drawn], cdf[drawn - 1])[differs]
    assert ((edge - u[differs]).abs() < 5e-7).all()
    assert (~differs).double().mean() > 0.95               # 5e-7 of a mean token, 2e-5, is 1 in 40


def test_draw_tokens_is_one_number_a_position(rng):
    """The token at a position is the same whatever other positions are drawn; no gradient."""
    logits = torch.randn(B, L, K + 2, generator=rng, dtype=torch.float64).requires_grad_()
    net = Fixed(logits)
    everywhere = draw_tokens(net, logits, K, seeded(1)).view(B, L)
    where = torch.rand(B, L, generator=rng) < 0.5
    assert torch.equal(draw_tokens(net, logits, K, seeded(1), where), everywhere[where])
    assert everywhere.max() < K and everywhere.dtype == torch.int64
    u = torch.rand(B, L, generator=seeded(1), dtype=torch.float64)
    cdf = logits.detach()[..., :K].softmax(-1).cumsum(-1)
    assert torch.equal(everywhere, (cdf <= u[..., None]).sum(-1))
