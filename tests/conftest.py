"""Puts the repository's root on the path, and holds the helpers that several test files share."""
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def rng():
    """A seeded CPU generator; every draw of a test comes from one."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64():
    """New tensors, networks and uniform numbers are float64, so that 1e-10 is a fair bar."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- networks -----------------------------------------------------------------------------------

def random_dit(V, rng, **config):
    """A small DiT in float64 with every parameter random: a new one predicts the flat law."""
    from model import DiT, ModelConfig
    config = {"num_layers": 2, "num_heads": 2, "width": 16, "cond_dim": 8, **config}
    net = DiT(ModelConfig(V, **config)).double()
    for p in net.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return net


class Fixed:
    """A network of given logits (B, L, >= K), whatever it reads."""

    def __init__(self, logits):
        self.logits = logits

    def hidden(self, x, sigma):
        return self.logits

    def project(self, rows):
        return rows


class Recorded:
    """A network that remembers what it read (x, sigma) and the hidden states it gave."""

    def __init__(self, net):
        self.net = net
        self.project = net.project
        self.seen = []
        self.hidden_states = []

    def hidden(self, x, sigma):
        self.seen.append((x, sigma))
        self.hidden_states.append(self.net.hidden(x, sigma))
        return self.hidden_states[-1]


# ---- comparisons --------------------------------------------------------------------------------

def gradients(loss, net):
    """The gradient in every parameter; zeros where there is none."""
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def assert_same(found, exact, bound=1e-10):
    """Every tensor within `bound` of its exact one, relative to the latter's largest entry."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= bound * b.abs().max().clamp(min=1e-12)


def assert_law(tokens, law):
    """Pearson's chi-square of draws against a law over 0 ... n - 1; bins below 10 are merged.

    (chi2 / df)^(1/3) is close to normal (Wilson and Hilferty: mean 1 - 2 / (9 df), variance
    2 / (9 df)). The alarm at 4.5 standard deviations has odds below 1e-5 for any df.
    """
    assert law_score(tokens, law) < 4.5


def law_score(tokens, law):
    """How many standard deviations the draws are from the law; infinite for a token of mass 0."""
    counts = torch.bincount(tokens.flatten(), minlength=len(law)).double()
    expected = law.double() * counts.sum()
    assert abs(law.sum() - 1) < 1e-9
    if counts[expected == 0].sum() > 0:
        return math.inf
    is_rare = expected < 10
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    if expected[-1] < 10:
        counts = counts[:-1]
        expected = expected[:-1]
    df = len(expected) - 1
    assert df >= 1, "nothing to test"
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
