# SPDX-License-Identifier: MIT
"""The network of every role (teacher, generator, fake, judge): DiT, a diffusion transformer.

Source: DiT (arXiv 2212.09748) in the form that SEDD, MDLM and Duo use for text. Parameter names
and shapes are those of the published checkpoints below their `backbone.` prefix, so that those
load without a table of renamings. There is no diffusion in this file.

    B batch   L positions   V vocabulary (with [MASK] where there is one)   D width   H heads
    x       (B, L) int64 tokens, or (B, L, V) simplex rows, or a pair (weights, ids), each
            (B, L, k): a simplex row of which only k entries are not 0
    sigma   (B,) noise level -log alpha_t, 0 where time conditioning is off
    z       None, or a random latent added to the embedding (generator.py): (B, L, latent_dim)
            numbers

`hidden` and `project` are apart on purpose: the vocabulary projection of GPT-2's 50,257 tokens
costs more than a third of the trunk, and most callers need it at a few positions only.

To reuse: copy this file alone.
"""
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


FITTED = 1, 2, 4, 8, 16         # passes: the words that texts begin with have a law for each


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
    latent_dim: int = 0         # > 0: the network takes a Gaussian latent z (generator.py)
    latent_scale: float = 1.0   # of its random projection, in units of the embedding's size
    latent_words: int = 0       # > 0: texts begin with every so many-th word, by `word_frequencies`

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

    def forward(self, num_positions, start=0):                       # -> cos, sin: (L, 1, d / 2)
        position = torch.arange(num_positions, device=self.inv_freq.device) + start
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
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        if not (half and x.is_cuda and torch.compiler.is_compiling()) or torch.is_grad_enabled():
            return super().forward(x)
        weight, bias = self[0].weight.to(half), self[0].bias.to(half)
        h = torch._addmm_activation(bias, x.flatten(0, 1).to(half), weight.t(), use_gelu=True)
        return self[2](h).view_as(x)


class Block(nn.Module):
    """Attention and MLP; the noise level enters as a shift, scale and gate of each (adaLN)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.num_heads, self.dropout, self.causal = config.num_heads, config.dropout, config.causal
        self.norm1 = LayerNorm(D)
        self.attn_qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.norm2 = LayerNorm(D)
        self.mlp = MLP(D)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * D)
        nn.init.zeros_(self.adaLN_modulation.weight)     # both gates 0: a new block is the identity
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(self, x, cond, cos, sin, keep=None, cache=None):
        B, L, D = x.shape
        modulation = self.adaLN_modulation(cond)[:, None].chunk(6, dim=-1)       # (B, 1, D) each
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        qkv = self.attn_qkv(modulate(self.norm1(x), shift1, scale1))             # (B, L, 3D)
        # Heads move forward as views alone: in memory all stays (B, L, H, d), also on the way back.
        q, k, v = qkv.view(B, L, 3, self.num_heads, -1).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if cache is not None:                            # a causal model writing token by token
            k, v, visible = cache(k, v)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        else:
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
        if isinstance(x, tuple):                                     # k weights and their ids
            weights, ids = x
            bags = F.embedding_bag(ids.flatten(0, 1), self.embedding, mode="sum",
                                   per_sample_weights=weights.flatten(0, 1).to(self.embedding))
            return bags.unflatten(0, ids.shape[:2])                  # (B, L, k, D) never exists
        if x.is_floating_point():                                    # whole simplex rows
            return x @ self.embedding
        return F.embedding(x, self.embedding)


class OutputLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_final = LayerNorm(config.width)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * config.width)
        self.linear = nn.Linear(config.width, config.vocab_size)
        for parameter in (*self.adaLN_modulation.parameters(), *self.linear.parameters()):
            nn.init.zeros_(parameter)                    # a new network predicts a flat law

    def forward(self, x, cond):                                      # the projection comes later
        shift, scale = self.adaLN_modulation(cond)[:, None].chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.on_cpu = None                   # see word_frequencies
        self.keep = None                     # compiled for a GPU: dropout's masks, see `drawn`
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.width)
        self.sigma_map = NoiseLevelEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(config.width // config.num_heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.output_layer = OutputLayer(config)
        if config.latent_dim:
            self.latent_proj = nn.Linear(config.latent_dim, config.width, bias=False)
            self.init_latent()
        if config.latent_words:              # even until train.py knows the frequencies of a text
            self.register_buffer("frequencies", torch.ones(len(FITTED), config.vocab_size - 1))

    def init_latent(self):
        """A random map at the scale of the embeddings, never 0: a latent that does not move the
        output gets no gradient to start moving it. Trained embeddings are larger than new ones, so
        again once a teacher's are loaded."""
        std = self.vocab_embed.embedding.std().item() / math.sqrt(self.config.latent_dim)
        nn.init.normal_(self.latent_proj.weight, std=std * self.config.latent_scale)

    @property
    def device(self):
        return self.vocab_embed.embedding.device

    def word_frequencies(self, passes):      # -> (K,), on the CPU, where texts are drawn
        if self.on_cpu is None:
            self.on_cpu = self.frequencies.cpu()
        return self.on_cpu[sum(n <= passes for n in FITTED) - 1]    # of 3: those of 2

    def set_frequencies(self, counts, passes=FITTED):      # (K,)
        law = (counts / counts.sum()).to(self.frequencies)
        self.frequencies[[FITTED.index(n) for n in passes]] = law
        self.on_cpu = None

    def hidden(self, x, sigma, z=None):
        """Everything but the vocabulary projection.

        x, sigma, z as in the module's legend, on any device. Returns (B, L, D), normalised and
        modulated: `project` of any of its rows gives that position's logits.
        """
        x = tuple(to_device(part, self.device) for part in x) if isinstance(x, tuple) \
            else to_device(x, self.device)
        h = self.vocab_embed(x)
        if z is not None:
            h = h + self.latent_proj(to_device(z, self.device).to(h.dtype))
        sigma = to_device(sigma, self.device).to(h.dtype)
        return self.trunk(h, sigma, *self.drawn(h))

    def drawn(self, h):
        """The trunk's other inputs, which a compiled kernel would compute anew wherever it needs
        them: the angles, and what dropout keeps. A CUDA graph would copy that first, were it not
        always at one place; PyTorch refuses the backward of a pass after which another drew."""
        keep, p = None, self.config.dropout
        if self.training and p:
            keep = self.keep.get(h.shape) if self.keep else None
            if keep is None:
                keep = h.new_empty(len(self.blocks), 2, *h.shape, dtype=torch.bool)
                if self.keep is not None:
                    torch._dynamo.mark_static_address(keep, guard=False)
                    self.keep[h.shape] = keep
            keep.bernoulli_(1 - p)
        return *self.rotary_emb(h.shape[1]), keep

    def trunk(self, h, sigma, cos, sin, keep):     # (B, L, D), (B,), `drawn` -> (B, L, D)
        cond = F.silu(self.sigma_map(sigma))
        for i, block in enumerate(self.blocks):
            h = block(h, cond, cos, sin, None if keep is None else keep[i])
        return self.output_layer(h, cond)

    def project(self, h):                                            # (..., D) -> (..., >= V)
        """Logits; on a GPU more than V of them, a multiple of 64, of which the last mean nothing."""
        weight, bias = self.output_layer.linear.weight, self.output_layer.linear.bias
        if not h.is_cuda:
            return F.linear(h, weight, bias)
        # 50,257 words to a row would leave every second row off the alignment that the matrix
        # units need, at a third of their speed: fill up to 64.
        fill = -len(weight) % 64
        return F.linear(h, F.pad(weight, (0, 0, 0, fill)), F.pad(bias, (0, fill)))

    def forward(self, x, sigma, z=None):                             # -> logits (B, L, V)
        return self.project(self.hidden(x, sigma, z))[..., :self.config.vocab_size]

    def compile_trunk(self):
        """torch.compile: on a GPU the trunk as a whole, small kernels joined, and as a CUDA graph,
        since a host is slower at launching its kernels than the GPU at running them: what it
        returns is overwritten after the next torch.compiler.cudagraph_mark_step_begin(). Elsewhere
        block by block, where one compilation of seconds serves all."""
        if self.device.type == "cuda":
            from torch._inductor import config
            options = {"triton.cudagraphs": True}
            options |= {"combo_kernels": True} if hasattr(config, "combo_kernels") else {}
            if torch.__version__ >= "2.11":              # dependent launches, where a GPU has them
                options["triton.enable_pdl"] = os.environ.get("TORCHINDUCTOR_ENABLE_PDL") != "0"
            self.keep = {}
            self.trunk = torch.compile(self.trunk, dynamic=False, options=options)
        else:
            for module in (*self.blocks, self.output_layer):
                module.compile()
        return self

    def freeze(self, dtype=None):
        """For a network that is only run: no gradients, and its matrices in the dtype to which
        autocast would cast them at every pass (None: as they are). The results are the same."""
        for module in self.modules():
            if dtype and isinstance(module, nn.Linear):
                module.to(dtype)
        return self.requires_grad_(False)

    def num_params(self):
        return sum(p.numel() for p in self.parameters())


def to_device(x, device):
    """Move without making the host wait: through pinned memory where the target is a GPU."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


if __name__ == "__main__":
    net = DiT(ModelConfig(vocab_size=100, num_layers=2, num_heads=4, width=64))
    x = torch.randint(0, 100, (2, 16))
    print(f"{net.num_params():,} parameters; logits {tuple(net(x, torch.zeros(2)).shape)}")
