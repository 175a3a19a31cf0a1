# SPDX-License-Identifier: MIT
"""The network of every role (teacher, generator, fake, judge): DiT, a diffusion transformer.

Source: DiT (arXiv 2212.09748) in the form that SEDD, MDLM and Duo use for text. Parameter names and
shapes are those of the published checkpoints below their `backbone.` prefix, so those load without
a table of renamings. There is no diffusion in this file.

    B batch   L positions   V vocabulary (with [MASK] where there is one)   D width   H heads
    x       (B, L) int64 tokens; or a soft input, a pair (weights, ids), each (B, L, k): a row on
            the simplex of which only k entries are not 0
    sigma   (B,) noise level -log alpha_t; 0 where time conditioning is off

`hidden` and `project` are apart on purpose: the vocabulary head of GPT-2's 50,257 tokens costs more
than a third of the trunk, and most callers need it at a few positions only (rows.py).

To reuse: copy this file and rows.py.
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from rows import to_device


@dataclass
class ModelConfig:
    """All that is needed to rebuild a network; saved as a dict inside every checkpoint."""
    vocab_size: int             # V, [MASK] included
    num_layers: int = 12
    num_heads: int = 12
    width: int = 768            # D
    cond_dim: int = 128         # width of the noise-level embedding
    dropout: float = 0.0
    causal: bool = False        # True: an autoregressive model (the judge)

    def __post_init__(self):
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(f"width {self.width} over {self.num_heads} heads: the width of a head "
                             "must be a whole and even number; change width or num_heads")


class LayerNorm(nn.Module):
    """LayerNorm with a scale and no bias."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight)


class Rotary(nn.Module):
    """Rotary position embedding on the two halves of each head (arXiv 2104.09864)."""

    def __init__(self, head_dim):
        super().__init__()
        self.register_buffer("inv_freq", 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, num_positions):                                # -> cos, sin: (L, 1, d / 2)
        position = torch.arange(num_positions, device=self.inv_freq.device)
        angle = position[:, None, None] * self.inv_freq
        return angle.cos(), angle.sin()


def rotate(x, cos, sin):                             # (B, L, H, d), (L, 1, d / 2) x2 -> as x
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class NoiseLevelEmbedding(nn.Module):
    """Sinusoids of sigma through a two-layer network."""

    def __init__(self, cond_dim, num_freqs=256):
        super().__init__()
        self.num_freqs = num_freqs
        self.mlp = nn.Sequential(nn.Linear(num_freqs, cond_dim), nn.SiLU(),
                                 nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma):                                        # (B,) -> (B, cond_dim)
        half = self.num_freqs // 2
        freq = torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device) / half)
        angle = sigma[:, None] * freq.to(sigma.dtype)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class GELU(nn.Module):
    """x Phi(x) by its tanh formula. tanh(u) = 2 sigmoid(2u) - 1, whose fused kernel is faster."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3))
        return F.gelu(x, approximate="tanh")


class MLP(nn.Sequential):
    """Linear, GELU, Linear. Where a compiled pass on a GPU keeps nothing for a backward one, the
    GELU (its tanh formula, there too) ends the first matrix product: less goes through memory."""

    def __init__(self, D):
        super().__init__(nn.Linear(D, 4 * D), GELU(), nn.Linear(4 * D, D))

    def forward(self, x):                                            # (B, L, D) -> (B, L, D)
        fast = x.is_cuda and torch.compiler.is_compiling() and torch.is_autocast_enabled("cuda")
        if not fast or torch.is_grad_enabled():
            return super().forward(x)
        half = torch.get_autocast_dtype("cuda")
        weight = self[0].weight.to(half).t()
        bias = self[0].bias.to(half)
        rows = x.flatten(0, 1).to(half)
        h = torch._addmm_activation(bias, rows, weight, use_gelu=True)
        return self[2](h).view_as(x)


class Block(nn.Module):
    """Attention and MLP; the noise level enters as a shift, scale and gate of each (adaLN)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.causal = config.causal
        self.norm1 = LayerNorm(D)
        self.attn_qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.norm2 = LayerNorm(D)
        self.mlp = MLP(D)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * D)
        nn.init.zeros_(self.adaLN_modulation.weight)     # both gates 0: a new block is the identity
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(self, x, cond, cos, sin, keep=None):
        B, L, D = x.shape
        modulation = self.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)       # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = self.attn_qkv(modulate(self.norm1(x), shift1, scale1))             # (B, L, 3D)
        # Heads move forward as views alone: in memory all stays (B, L, H, d), also on the way back.
        q, k, v = qkv.view(B, L, 3, self.num_heads, -1).unbind(2)
        q = rotate(q, cos, sin).transpose(1, 2)
        k = rotate(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out = self.attn_out(out.transpose(1, 2).reshape(B, L, D))
        x = x + gate1 * self.drop(out, keep, 0)
        out = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2 * self.drop(out, keep, 1)

    def drop(self, x, keep, which):                      # (B, L, D), (2, B, L, D) bool or None
        return x if keep is None else x * keep[which] / (1 - self.dropout)


class TokenEmbedding(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x):
        if not isinstance(x, tuple):
            return F.embedding(x, self.embedding)
        weights, ids = x
        weights = weights.flatten(0, 1).to(self.embedding)
        bags = F.embedding_bag(ids.flatten(0, 1), self.embedding, mode="sum",
                               per_sample_weights=weights)           # (B, L, k, D) never exists
        return bags.unflatten(0, ids.shape[:2])


class OutputLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_final = LayerNorm(config.width)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.width)
        self.linear = nn.Linear(config.width, config.vocab_size)
        for layer in (self.adaLN_modulation, self.linear):           # a new network is flat
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, cond):                                      # the head comes later
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dropout_masks = None            # compiled for a GPU: a dict, see trunk_inputs
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.width)
        self.sigma_map = NoiseLevelEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(config.width // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_layer = OutputLayer(config)

    @property
    def device(self):
        return self.vocab_embed.embedding.device

    def hidden(self, x, sigma):
        """Everything but the vocabulary head.

        x, sigma as in the module's legend, on any device. Returns (B, L, D), normalised and
        modulated: `project` of any of its rows gives that position's logits.
        """
        if isinstance(x, tuple):
            x = to_device(x[0], self.device), to_device(x[1], self.device)
        else:
            x = to_device(x, self.device)
        h = self.vocab_embed(x)
        sigma = to_device(sigma, self.device).to(h.dtype)
        cos, sin, keep = self.trunk_inputs(h)
        return self.trunk(h, sigma, cos=cos, sin=sin, keep=keep)

    def trunk_inputs(self, h):
        """The angles, and what dropout keeps: (layers, 2, B, L, D) bool, or None.

        Compiled code would compute them anew wherever it needs them. Dropout's masks stay at one
        address: a CUDA graph would copy them otherwise, and PyTorch refuses the backward of a pass
        after which another drew.
        """
        cos, sin = self.rotary_emb(h.shape[1])
        p = self.config.dropout
        if not (self.training and p):
            return cos, sin, None
        keep = self.dropout_masks.get(h.shape) if self.dropout_masks else None
        if keep is None:
            keep = h.new_empty(len(self.blocks), 2, *h.shape, dtype=torch.bool)
            if self.dropout_masks is not None:
                torch._dynamo.mark_static_address(keep, guard=False)
                self.dropout_masks[h.shape] = keep
        return cos, sin, keep.bernoulli_(1 - p)

    def trunk(self, h, sigma, cos, sin, keep):                       # (B, L, D), (B,) -> (B, L, D)
        cond = F.silu(self.sigma_map(sigma))
        for i, block in enumerate(self.blocks):
            h = block(h, cond, cos, sin, None if keep is None else keep[i])
        return self.output_layer(h, cond)

    def project(self, h):                                            # (..., D) -> (..., >= V)
        """Logits. On a GPU a row has a multiple of 64 entries; those beyond V mean nothing: with
        50,257 every second row would miss the alignment that the matrix units need, at a third of
        their speed."""
        weight, bias = self.output_layer.linear.weight, self.output_layer.linear.bias
        if not h.is_cuda:
            return F.linear(h, weight, bias)
        fill = -len(weight) % 64
        return F.linear(h, F.pad(weight, (0, 0, 0, fill)), F.pad(bias, (0, fill)))

    def forward(self, x, sigma):                                     # -> logits (B, L, V)
        return self.project(self.hidden(x, sigma))[..., :self.config.vocab_size]

    def compile_trunk(self):
        """torch.compile. On a GPU the trunk as a whole, as a CUDA graph: a host is slower at
        launching its kernels than the GPU at running them. What it returns is overwritten after
        the next torch.compiler.cudagraph_mark_step_begin(). Elsewhere block by block, where one
        compilation of seconds serves all."""
        if self.device.type != "cuda":
            for module in (*self.blocks, self.output_layer):
                module.compile()
            return self
        from torch._inductor import config
        options = {"triton.cudagraphs": True}
        if hasattr(config, "combo_kernels"):
            options["combo_kernels"] = True
        if hasattr(config.triton, "enable_pdl"):                     # dependent launches
            options["triton.enable_pdl"] = os.environ.get("TORCHINDUCTOR_ENABLE_PDL") != "0"
        self.dropout_masks = {}
        self.trunk = torch.compile(self.trunk, dynamic=False, options=options)
        return self

    def freeze(self, dtype=None):
        """For a network that is only run: no gradients, and its matrices in the dtype to which
        autocast would cast them at every pass (None: as they are). The results are the same."""
        for module in self.modules():
            if dtype and isinstance(module, nn.Linear):
                module.to(dtype)
        return self.requires_grad_(False)

