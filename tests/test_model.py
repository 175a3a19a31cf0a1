"""The network: DiT against its description, in float64.

Run: python -m pytest tests/test_model.py

`dense` below is the network written out for one text, attention as a softmax over all pairs. That
published checkpoints load and compute the same is in test_checkpoint.py.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_same, gradients, random_dit, seeded
from model import DiT, ModelConfig, Rotary, rotate

V, L = 9, 7
D, COND, HEADS = 16, 8, 2


def text(rng, B=2):
    return torch.randint(V, (B, L), generator=rng)


# ---- the layout of the published checkpoints ----------------------------------------------------

BLOCK = {
    "norm1.weight": (D,),
    "attn_qkv.weight": (3 * D, D),
    "attn_out.weight": (D, D),
    "norm2.weight": (D,),
    "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,),
    "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,),
    "adaLN_modulation.weight": (6 * D, COND), "adaLN_modulation.bias": (6 * D,),
}
LAYOUT = {
    "vocab_embed.embedding": (V, D),
    "sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,),
    "sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,),
    "rotary_emb.inv_freq": (D // HEADS // 2,),
    **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()},
    "output_layer.norm_final.weight": (D,),
    "output_layer.linear.weight": (V, D), "output_layer.linear.bias": (V,),
    "output_layer.adaLN_modulation.weight": (2 * D, COND),
    "output_layer.adaLN_modulation.bias": (2 * D,),
}


def test_parameter_names_are_the_published_ones(rng):
    """Names and shapes below the checkpoints' `backbone.` prefix, and nothing besides."""
    net = random_dit(V, rng)
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == LAYOUT
    sizes = [math.prod(shape) for shape in LAYOUT.values()]
    assert sum(p.numel() for p in net.parameters()) == sum(sizes) - len(net.rotary_emb.inv_freq)


# ---- the function -------------------------------------------------------------------------------

def layer_norm(x, weight):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x):
    """Rotary embedding of (L, d): entry i and i + d / 2 as a plane turned by position / 10000^."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    plane = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([plane.real, plane.imag], -1)


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def dense(net, x, sigma, causal=False):
    """Logits (L, V) of one text x (L,) at noise level sigma, from the parameters by name."""
    w = dict(net.named_parameters())

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    angle = sigma * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    cond = linear("sigma_map.mlp.0", torch.cat([angle.cos(), angle.sin()]))
    cond = F.silu(linear("sigma_map.mlp.2", F.silu(cond)))
    h = w["vocab_embed.embedding"][x]
    for i in range(net.config.num_layers):
        b = f"blocks.{i}."
        modulation = linear(b + "adaLN_modulation", cond).view(6, D)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        qkv = linear(b + "attn_qkv", layer_norm(h, w[b + "norm1.weight"]) * (1 + scale) + shift)
        outs = []
        for head in range(HEADS):
            q, k, v = qkv.view(L, 3, HEADS, D // HEADS)[:, :, head].unbind(1)
            scores = turned(q) @ turned(k).T / math.sqrt(D // HEADS)
            if causal:
                scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf)
            outs.append(scores.softmax(-1) @ v)
        h = h + gate * linear(b + "attn_out", torch.cat(outs, -1))
        inner = layer_norm(h, w[b + "norm2.weight"]) * (1 + scale_mlp) + shift_mlp
        h = h + gate_mlp * linear(b + "mlp.2", gelu(linear(b + "mlp.0", inner)))
    shift, scale = linear("output_layer.adaLN_modulation", cond).view(2, D)
    h = layer_norm(h, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return linear("output_layer.linear", h)


@pytest.mark.parametrize("causal", [False, True])
def test_logits_are_the_dense_formula(causal, rng, float64):
    """Two texts at noise levels of their own, as a diffusion model and as a judge."""
    net = random_dit(V, rng, causal=causal)
    x = text(rng)
    sigma = torch.tensor([0.0, 1.3])
    found = net(x, sigma)
    for row, level, logits in zip(x, sigma, found):
        exact = dense(net, row, level, causal)
        assert exact.std() > 0.3
        torch.testing.assert_close(logits, exact, rtol=1e-11, atol=1e-11)


def test_hidden_and_project_are_forward(rng):
    """The head at any rows gives those positions' logits."""
    net = random_dit(V, rng)
    x = text(rng)
    sigma = torch.rand(2, generator=rng, dtype=torch.float64)
    h = net.hidden(x, sigma)
    assert h.shape == (2, L, D)
    assert torch.equal(net.project(h), net(x, sigma))
    torch.testing.assert_close(net.project(h[1, 2:4]), net(x, sigma)[1, 2:4], rtol=1e-12, atol=0)


def test_a_soft_input_of_one_token_is_that_token(rng):
    """Weights 1 and 0 on (token, anything) equal the token itself."""
    net = random_dit(V, rng)
    x = text(rng)
    ids = torch.stack([x, (x + 3) % V], -1)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, L, 2)
    sigma = torch.zeros(2)
    torch.testing.assert_close(net((weights, ids), sigma), net(x, sigma), rtol=1e-12, atol=1e-12)


def test_a_soft_input_is_the_mean_embedding(rng):
    """Weights on k tokens: their weighted sum, with a gradient in weights and embeddings."""
    embed = random_dit(V, rng).vocab_embed
    ids = torch.randint(V, (2, L, 3), generator=rng)
    weights = torch.rand(2, L, 3, generator=rng, dtype=torch.float64).requires_grad_()
    found = embed((weights, ids))
    exact = (weights[..., None] * embed.embedding[ids]).sum(2)
    torch.testing.assert_close(found, exact)
    direction = torch.randn(found.shape, generator=rng, dtype=torch.float64)
    both = weights, embed.embedding
    for a, b in zip(torch.autograd.grad((found * direction).sum(), both),
                    torch.autograd.grad((exact * direction).sum(), both)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_who_sees_whom(causal, rng):
    """Another token at position 4: a judge's earlier logits stay bit for bit, a diffusion model's
    all change."""
    net = random_dit(V, rng, causal=causal)
    x = text(rng)
    other = x.clone()
    other[:, 4] = (other[:, 4] + 1) % V
    changed = (net(x, torch.zeros(2)) != net(other, torch.zeros(2))).any(-1)
    assert changed[:, 4:].all()
    assert changed[:, :4].all() != causal and changed[:, :4].any() != causal


def test_rotary_angles_see_only_the_distance(rng, float64):
    """<rotated q at m, rotated k at n> depends on m - n; lengths stay; position 0 is not turned."""
    rotary = Rotary(8)
    q = torch.randn(8, generator=rng).expand(1, 10, 1, 8)
    k = torch.randn(8, generator=rng).expand(1, 10, 1, 8)
    cos, sin = rotary(10)
    q_turned = rotate(q, cos, sin)[0, :, 0]
    k_turned = rotate(k, cos, sin)[0, :, 0]
    scores = q_turned @ k_turned.T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1
    torch.testing.assert_close(q_turned.norm(dim=-1), q[0, :, 0].norm(dim=-1))
    assert torch.equal(q_turned[0], q[0, 0, 0])


def test_a_new_network_predicts_the_flat_law():
    """The head starts at 0, and the blocks as the identity."""
    net = DiT(ModelConfig(V, num_layers=1, num_heads=2, width=D, cond_dim=COND))
    x = text(seeded(0))
    assert (net(x, torch.zeros(2)) == 0).all()
    h = net.vocab_embed(x)
    cos, sin, keep = net.trunk_inputs(h)
    assert torch.equal(net.blocks[0](h, torch.randn(2, COND), cos, sin, keep), h)


@pytest.mark.parametrize("width, num_heads", [(15, 2), (6, 2)])
def test_a_head_of_odd_or_broken_width_is_refused(width, num_heads):
    with pytest.raises(ValueError, match=f"width {width} over {num_heads} heads"):
        ModelConfig(V, width=width, num_heads=num_heads)


# ---- training -----------------------------------------------------------------------------------

def test_dropout_only_in_training(rng):
    """In eval mode a network with dropout is the same network without; in training two passes
    differ, the global seed decides, and a share p of what a block adds is dropped."""
    net = random_dit(V, seeded(1), dropout=0.3)
    plain = random_dit(V, seeded(1))
    x = text(rng)
    sigma = torch.zeros(2)
    assert torch.equal(net.eval()(x, sigma), plain(x, sigma))
    net.train()
    torch.manual_seed(5)
    one = net(x, sigma)
    two = net(x, sigma)
    torch.manual_seed(5)
    assert torch.equal(net(x, sigma), one) and not torch.equal(one, two)
    keep = net.trunk_inputs(torch.zeros(50, L, D))[2]
    assert keep.shape == (2, 2, 50, L, D)
    n = keep.numel()
    assert abs(keep.double().mean() - 0.7) < 5 * (0.21 / n) ** 0.5


def test_dropout_keeps_the_mean(rng):
    """What is kept is scaled up by 1 / (1 - p)."""
    block = random_dit(V, rng, dropout=0.25).blocks[0]
    x = torch.ones(1, L, D)
    keep = torch.rand(2, 1, L, D, generator=rng) < 0.75
    out = block.drop(x, keep, 1)
    assert (out[keep[1]] == 1 / 0.75).all() and (out[~keep[1]] == 0).all()
    assert block.drop(x, None, 1) is x


def test_dropout_masks_at_one_address():
    """Compiled for a GPU, a network draws what it keeps into one tensor a shape. A second pass
    before the first one's backward is refused instead of taking the wrong mask."""
    net = random_dit(V, seeded(1), dropout=0.5).train()
    net.dropout_masks = {}
    first = net.trunk_inputs(torch.zeros(2, L, D))[2]
    assert net.trunk_inputs(torch.zeros(2, L, D))[2] is first
    assert net.trunk_inputs(torch.zeros(1, L, D))[2] is not first
    x = text(seeded(0))
    loss = net(x, torch.zeros(2)).sum()
    net(x, torch.zeros(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- speed must not change anything -------------------------------------------------------------

def test_a_frozen_network_computes_the_same(rng):
    """Matrices cast once give bit for bit what autocast gives by casting them at every pass."""
    net = random_dit(V, rng).float()
    x = text(rng)
    sigma = torch.rand(2, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x, sigma)
        after = net.freeze(torch.bfloat16)(x, sigma)
    assert before.dtype == torch.bfloat16 and torch.equal(before, after)
    assert before.requires_grad and not after.requires_grad
    assert net.blocks[0].attn_qkv.weight.dtype == torch.bfloat16
    assert net.blocks[0].norm1.weight.dtype == net.vocab_embed.embedding.dtype == torch.float32


def test_compiled_gelu_is_the_same_function(rng, monkeypatch):
    """x sigmoid(2u) and x (1 + tanh(u)) / 2."""
    net = random_dit(V, rng)
    x = text(rng)
    eager = net(x, torch.zeros(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    other = net(x, torch.zeros(2))
    torch.testing.assert_close(other, eager, rtol=1e-12, atol=1e-13)
    assert not torch.equal(other, eager)                   # the other branch has run


def test_a_compiled_trunk_on_a_cpu_is_the_eager_one(rng, monkeypatch):
    """Value and gradient of one block and the output layer, each compiled by itself. The code is
    traced but not turned into C++, which takes a cold cache a minute."""
    compile_module = torch.nn.Module.compile
    compiled = []

    def traced(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    net = random_dit(V, rng, num_layers=1)
    x = text(rng)
    sigma = torch.rand(2, generator=rng, dtype=torch.float64)
    eager = net(x, sigma)
    exact = gradients(eager.square().sum(), net)
    torch._dynamo.reset()
    found = net.compile_trunk()(x, sigma)
    assert compiled == ["Block", "OutputLayer"]
    assert_same([found], [eager])
    assert_same(gradients(found.square().sum(), net), exact)
