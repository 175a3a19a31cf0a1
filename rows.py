# SPDX-License-Identifier: MIT
"""A network's vocabulary head at the rows that count, and exact draws from it.

With GPT-2's 50,257 tokens the head costs more than a third of a pass, and (positions x vocabulary)
in float32 is gigabytes. So a network here has two parts,

    hidden(x, sigma, ...) -> (B, L, D)      the trunk, at all positions
    project(rows (N, D))  -> (N, >= K)      the head, at any rows of it

and a loss is a *formula* on rows of logits. `per_row` evaluates it at the positions that count, in
chunks, compiled on a GPU, and projects a chunk again in the backward pass instead of keeping it.

    B texts   L positions   D width   K tokens that a text may hold   N rows = positions that count

To reuse: copy this file alone (torch and nothing else).
"""
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

COMPILE = False           # True: formulas run through torch.compile (train.py sets it on a GPU)
CHUNK_ELEMENTS = 2 ** 26  # rows x tokens held at once: 1,335 rows of 50,257 tokens
COMPILED_CHUNKS = 8       # times as many where compiled: half precision, and nothing beside them
KEEP_ELEMENTS = 2 ** 22   # logits as few as this wait for the backward pass
KEEP_COMPILED = 2 ** 31   # the same compiled, which keeps them once, in half precision: 4 GiB


# ---- the formula, row by row --------------------------------------------------------------------

def per_row(formula, K, nets, hidden, args=(), where=None):
    """formula(logits of each network, *args) at the positions that count.  -> (N,)

    formula   takes (N, >= K) logits a network, then args; gives (N,). Entries of a row beyond K
              have probability 0: they add nothing to a sum over tokens
    nets      the networks, hidden: what each one's trunk made, (B, L, D)
    args      a tensor (B, L) or (B, L, n) becomes rows (N,) or (N, n); a value per text (B,) a
              column (N, 1); a number stays as it is
    where     (B, L) bool, the positions that count; default: all. A mask on the CPU costs the
              device no wait
    """
    device = hidden[0].device
    L = hidden[0].shape[1]
    at = slice(None)
    if where is not None:
        at = flat_rows(where, device)
    rows = [h.flatten(0, 1)[at] for h in hidden]
    args = [row_argument(x, L, at, device) for x in args]
    N = len(rows[0])
    if N * K <= min(KEEP_ELEMENTS, CHUNK_ELEMENTS):
        return on_logits(formula, K, nets, rows, args)

    run = compiled(on_logits) if COMPILE else on_logits
    few = COMPILE and N * K * len(nets) <= KEEP_COMPILED
    if torch.is_grad_enabled() and not few:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    most = CHUNK_ELEMENTS * (COMPILED_CHUNKS if COMPILE else 1)
    num_chunks = min(N, math.ceil(N * K / most))
    values = []
    for i in range(num_chunks):
        row_chunk = [chunk(x, i, num_chunks) for x in rows]
        arg_chunk = [chunk(x, i, num_chunks) for x in args]
        values.append(run(formula, K, nets, row_chunk, arg_chunk))
    return torch.cat(values)


def row_argument(x, L, at, device):
    if not torch.is_tensor(x) or x.dim() == 0:
        return x
    if x.dim() == 1:
        return rows_of(x, L, device)[at]
    return to_device(x, device).flatten(0, 1)[at]


def chunk(x, i, num_chunks):
    if not torch.is_tensor(x) or x.dim() == 0:
        return x
    part = x.tensor_split(num_chunks)[i]
    if COMPILE:                             # the number of rows varies: nothing compiles twice
        torch._dynamo.maybe_mark_dynamic(part, 0)
    return part


def on_logits(formula, K, nets, rows, args):
    logits = [tokens_only(net.project(h), K) for net, h in zip(nets, rows)]
    return formula(*logits, *args)


def tokens_only(logits, K):                                # (N, >= K) -> (N, K), or see below
    """Compiled, rows of a multiple of 16 entries keep their width, and what is no token gets
    probability 0. Cut to 50,257 the kernels take up to twice as long: their loads do not come in
    whole 16 bytes. Hence the argument K of formulas whose rows may be longer."""
    if not torch.compiler.is_compiling() or logits.shape[1] % 16:
        return logits[:, :K]
    is_token = torch.arange(logits.shape[1], device=logits.device) < K
    return torch.where(is_token, logits, -1e4)


@lru_cache(maxsize=None)
def compiled(function):
    """torch.compile; where it can, with the device's own exponential, good to 2 units in the last
    place of a float32."""
    from torch._inductor import config
    options = {"use_fast_math": True} if hasattr(config, "use_fast_math") else None
    return torch.compile(function, dynamic=False, options=options)


class frozen:
    """A network whose head takes no gradient and keeps nothing for a backward pass."""

    def __init__(self, net):
        self.net = net

    @torch.no_grad()
    def project(self, h):
        return self.net.project(h)


# ---- tools of formulas --------------------------------------------------------------------------

def upcast(logits):
    """float32 for half precision: in bfloat16 the rows of a softmax sum to 0.93 ... 1.07."""
    return logits if logits.dtype == torch.float64 else logits.float()


def entry(rows, index):                                    # (N, K), (N,) -> (N, 1)
    """rows[i, index[i]]. Compiled, by a comparison: it joins the kernel around it, also in the
    backward pass, where `gather` writes a (N, K) of zeros."""
    if torch.compiler.is_compiling():
        tokens = torch.arange(rows.shape[1], device=rows.device)
        return torch.where(tokens == index[:, None], rows, 0).sum(-1, keepdim=True)
    return rows.gather(1, index[:, None])


def cross_entropy(logits, x):                              # (N, K), (N,) -> (N,): -log f_x
    logits = upcast(logits)
    return logits.logsumexp(-1) - entry(logits, x)[:, 0]


def weighted_cross_entropy(logits, x, weight):             # (N, K), (N,), (N, 1) -> (N,)
    return weight[:, 0] * cross_entropy(logits, x)


def mean_over(free, values, x):
    """Sum of `values` over the number of free positions; free None: over all of x (B, L)."""
    return values.sum() / (x.numel() if free is None else free.sum())


# ---- tools of masks and devices -----------------------------------------------------------------

def to_device(x, device):
    """Move without making the host wait: through pinned memory where the target is a GPU."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def flat_rows(mask, device):                               # (B, L) bool -> (N,): flat indices
    return to_device(mask.flatten().nonzero()[:, 0], device)


def rows_of(x, L, device):                                 # (B,) -> (B * L, 1): a value per text
    return to_device(x[:, None], device).expand(-1, L).reshape(-1, 1)


# ---- draws --------------------------------------------------------------------------------------

def sample_categorical(logits, u):
    """One token per row by inverting the cumulative distribution at u.  # (N, K), (N,) -> (N,)

    u: uniform in [0, 1), one number per row. Two levels (blocks of tokens, then the tokens of one
    block) keep the cumulative sums short. They run in float64 where the device has it, so that rare
    tokens keep their probability: a float32 sum over 50,257 tokens, or float32 Gumbel noise, loses
    the tail (arXiv 2409.02908). Exact up to the float32 rounding of the exponentials themselves.
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    tiny = torch.finfo(precise).eps
    K = logits.shape[-1]
    size = max(1, int(K ** 0.5))
    padded = F.pad(logits, (0, -K % size), value=-torch.inf)
    blocks = padded.unflatten(-1, (-1, size))                        # (N, blocks, size)

    top = upcast(blocks).amax((1, 2), keepdim=True)                  # weights need not sum to 1
    mass = (upcast(blocks) - top).exp().sum(-1, dtype=precise).cumsum(-1)           # (N, blocks)
    u = u.to(mass).clamp(max=1 - tiny)                               # it may have rounded up to 1
    goal = u[:, None] * mass[:, -1:]
    # `right`: the first entry whose cumulative mass exceeds the goal; a token of mass 0 never does.
    which = torch.searchsorted(mass, goal, right=True)
    which = which.clamp(max=mass.shape[1] - 1)
    before = mass.gather(1, (which - 1).clamp(min=0))
    goal = goal - torch.where(which > 0, before, 0)

    block = blocks.gather(1, which[..., None].expand(-1, -1, size))[:, 0]
    inside = (upcast(block) - top[:, 0]).exp().to(precise).cumsum(-1)
    goal = torch.minimum(goal, inside[:, -1:] * (1 - tiny))          # rounding: stay in the block
    token = torch.searchsorted(inside, goal, right=True)
    token = which * size + token.clamp(max=size - 1)
    return token[:, 0]


def on_device(rng, device):
    """A generator on `device`, seeded from rng where that is elsewhere."""
    if rng.device.type == device.type:
        return rng
    seed = torch.randint(2 ** 62, (), generator=rng, device=rng.device)
    return torch.Generator(device).manual_seed(seed.item())


def uniforms(shape, rng, device):                          # -> (*shape) in [0, 1)
    """float64 where the device has it."""
    u = torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64)
    return to_device(u.float() if device.type == "mps" else u, device)


@torch.no_grad()
def draw_tokens(net, h, K, rng, where=None, formula=sample_categorical, args=()):
    """A token from the row of each position that counts.  # (B, L, D) -> (N,) int64

    formula(logits, u, *args): another law than the row's own.
    """
    u = uniforms(h.shape[:2], rng, h.device)
    return per_row(formula, K, (net,), (h,), (u, *args), where)
