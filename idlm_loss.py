# SPDX-License-Identifier: MIT
"""Inverse distillation: the two losses that turn a diffusion teacher into a few-step generator.

    L_IDLM(theta) = L(f*, p_theta) - min_f L(f, p_theta)                  IDLM, arXiv 2602.19066

L is the teacher's own training loss, a bound on -log p (NELBO); f* the frozen teacher; the inner
minimum is held by `fake`, a diffusion model trained on the generator's outputs. An iteration is

    fake step        NELBO(fake) on G                    gradient to the fake alone
    generator step   NELBO(f*) - NELBO(fake) on G        gradient to the generator alone

both on one path: draw a latent eps, let G = generator(eps) be rows on the simplex, noise *G* to a
second time t, show x_t to fake and teacher. In exact arithmetic the loss is KL(p_theta || p*) less
the KL of the two laws after noising to t = 1, so it is 0 only at p_theta = p*.

t = 0 is clean, t = 1 noise. B texts, L positions, width D, K words ([MASK] is no word; where there
is one it is token K, the last). Losses are nats per token, averaged over all B * L positions. A
*network* is anything with
    hidden(x, sigma, ...) -> (B, L, D)       the trunk
    project(rows)         -> (N, >= K)       logits of any rows of it
and eps the tuple of the generator's inputs, eps[0] = the noised tokens (B, L).

From the formula on paper only the place of evaluation differs: the vocabulary projection runs at
the positions that count, in chunks, and (positions x vocabulary) never exists in float32.
tests/test_masked.py and tests/test_uniform_losses.py hold the dense formulas. Differences from the
authors' code: log-softmax in float32 and no +-1e6 constants; `hard` and `marginal` updates for the
uniform process beside their `soft` one, with rows that can weigh in their own token. To reuse: copy
this file alone (torch and nothing else).
"""
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

COMPILE = False           # True: `per_row` runs through torch.compile (train.py sets it on a GPU)
CHUNK_ELEMENTS = 2 ** 26  # rows x words held at once: 1,335 rows of 50,257 words
COMPILED_CHUNKS = 8       # times as many where compiled: in half precision, and nothing beside them
NOISE_CHUNKS = 4          # the same in soft_state, with Gaussian noise in float32 beside them
KEEP_ELEMENTS = 2 ** 22   # logits as few as this wait for the backward instead of being recomputed
KEEP_COMPILED = 2 ** 31   # the same compiled, which keeps them once, in half precision: 4 GiB


# ---- tools: rows in chunks, draws ---------------------------------------------------------------

def upcast(logits):
    """float32 for half precision: in bfloat16 the rows of a softmax sum to 0.93 ... 1.07."""
    return logits if logits.dtype == torch.float64 else logits.float()


def on_logits(formula, K, nets, *rows):
    """formula(logits of each network at its hidden rows, other arguments): what a chunk does."""
    logits = [of_words(net.project(h), K) for net, h in zip(nets, rows)]
    return formula(*logits, *rows[len(nets):])


def of_words(logits, K):                                   # (N, >= K) -> (N, K), or see below
    """Compiled, rows of a multiple of 16 entries stay as wide as they are, and what is no word gets
    probability 0, which adds nothing to any formula. Cut to 50,257 the kernels take up to twice as
    long: their loads do not come in whole 16 bytes. Hence the formulas' argument K, the words of
    rows that may be longer."""
    if not torch.compiler.is_compiling() or logits.shape[1] % 16:
        return logits[:, :K]
    return torch.where(torch.arange(logits.shape[1], device=logits.device) < K, logits, -1e4)


@lru_cache(maxsize=None)
def compiled(function):
    """torch.compile; where it can, with the device's own exponential, good to 2 units in the last
    place of a float32."""
    from torch._inductor import config
    fast = {"use_fast_math": True} if hasattr(config, "use_fast_math") else None
    return torch.compile(function, dynamic=False, options=fast)


def to_device(x, device):
    """Move without making the host wait: through pinned memory where the target is a GPU."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def per_row(formula, K, nets, *rows):
    """formula(logits, ..., other rows, ...) -> (N,), evaluated chunk by chunk.

    rows: a hidden row tensor (N, D) for each network, then further row tensors (N, ...), which go
    with them, and scalars, which go to every chunk.
    The backward pass projects a chunk again instead of keeping its logits, so that (N x K) never
    exists; compiled, where they are half as large, they are kept while they are few. The number of
    rows is marked as one that varies: nothing compiles twice.
    """
    N = len(rows[0])
    if N * K <= min(KEEP_ELEMENTS, CHUNK_ELEMENTS):
        return on_logits(formula, K, nets, *rows)
    run = compiled(on_logits) if COMPILE else on_logits
    if torch.is_grad_enabled() and not (COMPILE and N * K * len(nets) <= KEEP_COMPILED):
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    n = min(N, math.ceil(N * K / (CHUNK_ELEMENTS * (COMPILED_CHUNKS if COMPILE else 1))))
    chunks = [*zip(*(r.tensor_split(n) if torch.is_tensor(r) and r.dim() else [r] * n
                     for r in rows))]
    for row in (r for chunk in chunks for r in chunk if COMPILE and torch.is_tensor(r) and r.dim()):
        torch._dynamo.maybe_mark_dynamic(row, 0)
    return torch.cat([run(formula, K, nets, *chunk) for chunk in chunks])


def sample_categorical(logits, u):
    """One token per row by inverting the cumulative distribution at u.  # (N, K), (N,) -> (N,)

    u: uniform in [0, 1), one number per row. Two levels (blocks of words, then words of the block)
    keep the cumulative sums short; they run in float64 where the device has it, so that rare
    tokens keep their probability: a float32 sum over 50,257 words, or float32 Gumbel noise, loses
    the tail (arXiv 2409.02908). Exact up to the float32 rounding of the exponentials themselves.
    """
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    block = max(1, int(logits.shape[-1] ** 0.5))
    logits = F.pad(logits, (0, -logits.shape[-1] % block), value=-torch.inf)
    logits = logits.unflatten(-1, (-1, block))                       # (N, blocks, block)
    top = upcast(logits).amax((1, 2), keepdim=True)                  # weights need not sum to 1
    mass = (upcast(logits) - top).exp().sum(-1, dtype=precise).cumsum(-1)           # (N, blocks)
    tiny = torch.finfo(precise).eps                                  # u may have rounded up to 1
    u = u.to(mass).clamp(max=1 - tiny)[:, None] * mass[:, -1:]
    # `right`: the first entry whose cumulative mass exceeds u, so a word of mass 0 is never taken.
    which = torch.searchsorted(mass, u, right=True).clamp(max=mass.shape[1] - 1)
    rest = u - torch.where(which > 0, mass.gather(1, (which - 1).clamp(min=0)), 0)
    chosen = logits.gather(1, which[..., None].expand(-1, -1, block))[:, 0]  # logits: kept anyway
    inside = (upcast(chosen) - top[:, 0]).exp().to(precise).cumsum(-1)
    rest = torch.minimum(rest, inside[:, -1:] * (1 - tiny))          # rounding: stay in the block
    return (which * block + torch.searchsorted(inside, rest, right=True).clamp(max=block - 1))[:, 0]


def uniforms(n, rng, device):                              # -> (n,) in [0, 1), float64 where it is
    u = torch.rand(n, generator=rng, device=rng.device, dtype=torch.float64)
    return to_device(u.float() if device.type == "mps" else u, device)


@torch.no_grad()
def draw_tokens(net, h, K, rng, own=()):
    """Tokens from the rows' distributions.  # (N, D) -> (N,) int64; own: see `own_token`"""
    draw = weighing(sample_categorical) if own else sample_categorical
    return per_row(draw, K, (net,), h, uniforms(len(h), rng, h.device), *own)


def entry(rows, index):                                    # (N, K), (N,) -> (N, 1)
    """rows[i, index[i]]; by a comparison where compiled: it joins the kernel around it, also
    backwards, where `gather` writes a (N, K) of zeros."""
    if torch.compiler.is_compiling():
        words = torch.arange(rows.shape[1], device=rows.device)
        return torch.where(words == index[:, None], rows, 0).sum(-1, keepdim=True)
    return rows.gather(1, index[:, None])


class frozen:
    """A network whose projection takes no gradient and keeps nothing for a backward pass."""

    def __init__(self, net):
        self.net = net

    @torch.no_grad()
    def project(self, h):
        return self.net.project(h)


def rows_of(x, L, device):                                 # (B,) -> (B * L, 1): a value per text
    return to_device(x[:, None], device).expand(-1, L).reshape(-1, 1)


def flat_rows(mask, device):
    """Flat indices of the True entries. Masks that live on the CPU cost the device no wait."""
    return to_device(mask.flatten().nonzero()[:, 0], device)


# ---- masked process (MDLM) ----------------------------------------------------------------------
# A visible token is copied with certainty, so only positions that are [MASK] in x_t carry loss. Let
# x_tilde = eps[0] be the generator's input. Where it is visible, G is that very token, without
# gradient; so the generator's loss needs the positions masked in both x_tilde and x_t.

# Rows of logits are a constant, their logsumexp, above log f; where that is taken out of a sum over
# words, as here, the backward pass needs no second sum.

def cross_entropy(logits, x):                              # (N, K), (N,) -> (N,): -log f_x
    logits = upcast(logits)
    return logits.logsumexp(-1) - entry(logits, x)[:, 0]


def soft_cross_entropy(logits_f, logits_g):                # (N, K), (N, K) -> (N,): -<G, log f>
    logits_f = upcast(logits_f)
    return logits_f.logsumexp(-1) - (upcast(logits_g).softmax(-1) * logits_f).sum(-1)


def masked_gap(logits_g, logits_f, logits_t, beta=1.0):    # -> (N,): <G, beta log f - log f*>
    logits_f, logits_t = upcast(logits_f), upcast(logits_t)          # beta: a number or (N, 1)
    mean = (upcast(logits_g).softmax(-1) * (beta * logits_f - logits_t)).sum(-1, keepdim=True)
    return (mean - beta * logits_f.logsumexp(-1, keepdim=True)
            + logits_t.logsumexp(-1, keepdim=True))[:, 0]


@torch.no_grad()
def renoise_masked(generator, h_g, x_tilde, is_masked, mask_id, rng):
    """x_t ~ q(. | G): [MASK] where `is_masked`, else the visible token, else a draw from G."""
    x_t = to_device(x_tilde, h_g.device)
    drawn = flat_rows((x_tilde == mask_id) & ~is_masked, h_g.device)
    tokens = draw_tokens(generator, h_g.flatten(0, 1)[drawn], mask_id, rng)
    x_t = x_t.flatten().index_copy(0, drawn, tokens).view_as(x_t)
    return x_t.masked_fill(to_device(is_masked, h_g.device), mask_id)


def masked_fake_loss(generator, fake, eps, is_masked, weight, sigma, mask_id, rng):
    """NELBO of the fake on G, nats per token: the inner minimisation, with MDLM's loss.

    eps        the generator's inputs, eps[0] = x_tilde (B, L)
    is_masked  (B, L) bool, where x_t is [MASK]: each with probability 1 - alpha_t
    weight     (B,) -dalpha_t / (1 - alpha_t)
    sigma      (B,) what the fake is told: 0, or -log alpha of t_tilde (train.idlm_step)
    """
    K, was_masked = mask_id, eps[0] == mask_id
    with torch.no_grad():                                  # the generator gets no gradient here
        h_g = generator.hidden(*eps)
        x_t = renoise_masked(generator, h_g, eps[0], is_masked, mask_id, rng)
    h_f = fake.hidden(x_t, sigma).flatten(0, 1)
    device, L = h_f.device, is_masked.shape[1]
    # Where x_tilde was masked the target is G's row ...
    soft = flat_rows(was_masked & is_masked, device)
    soft_nll = per_row(soft_cross_entropy, K, (fake, frozen(generator)),
                       h_f[soft], h_g.flatten(0, 1)[soft])
    # ... where it was visible, that token.
    hard = flat_rows(~was_masked & is_masked, device)
    x_0 = to_device(eps[0], device).flatten()[hard]
    hard_nll = per_row(cross_entropy, K, (fake,), h_f[hard], x_0)
    row_weight = rows_of(weight, L, device)[:, 0]
    return ((row_weight[soft] * soft_nll).sum()
            + (row_weight[hard] * hard_nll).sum()) / is_masked.numel()


def masked_generator_loss(generator, fake, teacher, eps, is_masked, weight, sigma_fake, sigma,
                          mask_id, rng, beta=1.0):
    """The gap NELBO(f*) - NELBO(f) on G, nats per token: the outer minimisation.

    Where x_tilde is visible G is a given token and its terms have no gradient: they are left out,
    so the value is the share of the gap that the generator can change. Its gradient in G's logits
    is -weight * G * (a - <G, a>) with a = log f* - log f; none runs through x_t, teacher or fake.
    It is a gradient all the same: with the best fake, and t drawn apart from eps, its expectation
    is that of D / L, D = integral of KL_t (-dalpha_t / alpha_t) dt with KL_t = KL(p_theta || p*) of
    the laws noised to t (tests/test_theorem.py). D, too, is 0 only at p*.
    Arguments as in `masked_fake_loss`; sigma: (B,) for the teacher.

    beta > 1 counts the fake's bound, whose minimum is the entropy of p_theta, beta times. The gap
    is then KL(p_theta || p*) - (beta - 1) H(p_theta), minimal at p*^(1 / beta), normalised; the
    update, which weighs the noised laws as in D, stops near there. A generator that cannot be p*
    seeks its modes; beta holds it apart, at the price of too many rare words; beta < 1 sharpens it
    where something else does so. A number, or (B,): one a text, which tunes the laws of those texts
    apart if the fake is told which they are.
    """
    K, L = mask_id, is_masked.shape[1]
    h_g = generator.hidden(*eps)
    rows = flat_rows((eps[0] == mask_id) & is_masked, h_g.device)
    with torch.no_grad():
        x_t = renoise_masked(generator, h_g, eps[0], is_masked, mask_id, rng)
        h_f = fake.hidden(x_t, sigma_fake).flatten(0, 1)[rows]
        h_t = teacher.hidden(x_t, sigma).flatten(0, 1)[rows]
    if torch.is_tensor(beta):
        beta = rows_of(beta, L, h_g.device)[rows]
    gap = per_row(masked_gap, K, (generator, frozen(fake), frozen(teacher)),
                  h_g.flatten(0, 1)[rows], h_f, h_t, beta)
    row_weight = rows_of(weight, L, gap.device)[rows, 0]
    return (row_weight * gap).sum() / is_masked.numel()


# ---- uniform process (UDLM, Duo) ----------------------------------------------------------------
# With a = alpha_t and a network's row x, write xbar_v = K a x_v + 1 - a (K times the law of the
# noised token). c = -dalpha_t / (K a). All row arguments a, dalpha are (N, 1).

def uniform_nelbo(logits_f, logits_g, z, a, dalpha, K=None):  # (N, K) x2, (N,), (N, 1) x2 -> (N,)
    """NELBO of f at the noised token z for the target row G = softmax(logits_g), as in UDLM, Duo:
    c [ sum_v xbar_v / xbar_z log(fbar_z xbar_v / (fbar_v xbar_z)) - K / xbar_z + K / fbar_z ]
    where, as sum_v xbar_v = K, the logarithm's part at z comes out of the sum."""
    return uniform_nelbo_probs(logits_f, upcast(logits_g).softmax(-1), z, a, dalpha, K)


def uniform_nelbo_probs(logits_f, x_0_probs, z, a, dalpha, K=None):
    K = K or logits_f.shape[-1]
    xbar = K * a * x_0_probs + (1 - a)
    fbar = K * a * upcast(logits_f).softmax(-1) + (1 - a)
    xbar_z, fbar_z = entry(xbar, z), entry(fbar, z)
    inner = (xbar * (xbar / fbar).log()).sum(-1, keepdim=True) - K * (xbar_z / fbar_z).log()
    return (-dalpha / (K * a) * (inner / xbar_z - K / xbar_z + K / fbar_z))[:, 0]


def hard_gap(logits_g, logits_f, logits_t, z, a, dalpha, K=None):
    """NELBO(f*) - NELBO(f) at z for the target G; what depends on G alone has cancelled:
    c [ sum_v xbar_v / xbar_z (log fbar_v / fbar_z - log tbar_v / tbar_z)
        + K / tbar_z - K / fbar_z ]
    with tbar the teacher's."""
    K = K or logits_g.shape[-1]
    xbar = K * a * upcast(logits_g).softmax(-1) + (1 - a)
    fbar = K * a * upcast(logits_f).softmax(-1) + (1 - a)
    tbar = K * a * upcast(logits_t).softmax(-1) + (1 - a)
    xbar_z, fbar_z, tbar_z = (entry(rows, z) for rows in (xbar, fbar, tbar))
    inner = (xbar * (fbar / tbar).log()).sum(-1, keepdim=True) - K * (fbar_z / tbar_z).log()
    return (-dalpha / (K * a) * (inner / xbar_z + K / tbar_z - K / fbar_z))[:, 0]


def marginal_gap(logits_g, logits_f, logits_t, z, a, dalpha, beta=1.0, K=None):
    """`hard_gap` with the position's own token z integrated out, which a leave-one-out f allows.

    The minimiser of the NELBO predicts token l from the *other* noised tokens, so its row f does
    not move with z. Then the expectation over z ~ xbar / K of what depends on f in the NELBO is

        c sum_z xbar_z / K [ sum_v xbar_v / xbar_z (log fbar_z - log fbar_v) + K / fbar_z ]
      = c [ sum_z log fbar_z - sum_v xbar_v (log fbar_v - 1 / fbar_v) ]              xbar / xbar_z
                                                                                     has cancelled
    and with xbar_v = K a G_v + 1 - a and phi(u) = log u - 1 / u

      = dalpha <G, phi(fbar)> + c sum_v [ a log fbar_v + (1 - a) / fbar_v ].

    The teacher's less the fake's is the value below. It holds the draw's dependence on G as well:
    its gradient is -dalpha times that of <G, phi(fbar) - phi(f*bar)>, the masked formula with phi
    for log, at every position and with a bounded weight. z is not used.

    beta counts the fake's bound beta times, a number or (N, 1), as in masked_generator_loss. The
    closed form leaves out what both bounds share, a number: (1 - beta) times it is in the value.
    """
    K = K or logits_g.shape[-1]
    G = upcast(logits_g).softmax(-1)
    fbar = K * a * upcast(logits_f).softmax(-1) + (1 - a)
    tbar = K * a * upcast(logits_t).softmax(-1) + (1 - a)
    log_ratio = beta * fbar.log() - tbar.log()
    inverse = beta / fbar - 1 / tbar
    rest = (a * log_ratio + (1 - a) * inverse).sum(-1, keepdim=True)          # without G
    no_words = logits_g.shape[-1] - K                      # whose entries of fbar, tbar are 1 - a
    rest = rest + (1 - beta) * (no_words * (a * (1 - a).log() + 1)
                                + K - (K - 1) * a * (K * a / (1 - a)).log1p())
    return -dalpha[:, 0] * (G * (log_ratio - inverse)).sum(-1) + (dalpha / (K * a) * rest)[:, 0]


# A teacher's row f is the law of token l given the *other* noised tokens. As published, G is the
# row of the network that starts as the teacher's copy. With `weigh` G is the law given all of them:
# with x_tilde's own token v at level a~,
#     G_u  ~  f_u q(v | u)  ~  f_u (1 + [u = v] K a~ / (1 - a~)),
# so that at little noise G starts from the text it was given, not from a fresh draw of every word.
# That is also what sampling makes of the network's row (Uniform.posterior is the law of x_s for
# x_0 ~ G, greedy_end the argmax of G): else the own token counts twice there, up to K fold.

def own_token(eps, K, device):                             # -> (N,), (N, 1)
    """The token that each row of G weighs in and its bonus in logits; eps = (x_tilde, sigma)."""
    x_tilde, a, noise = eps[0], (-eps[1]).exp(), -(-eps[1]).expm1()  # noise = 1 - a
    bonus = torch.log1p(K * a / noise.clamp(min=1e-9))
    return to_device(x_tilde, device).flatten(), rows_of(bonus, x_tilde.shape[1], device)


def weigh_in(logits, own, bonus):                          # (N, K), (N,), (N, 1) -> (N, K)
    words = torch.arange(logits.shape[1], device=own.device)
    return logits + torch.where(words == own[:, None], bonus, 0)


@lru_cache(maxsize=None)
def weighing(formula, which=0):
    """`formula` whose argument number `which`, the generator's logits, weighs in the rows' own
    tokens: own_token's two rows are its last arguments."""
    def weighed(*args):
        before, logits, after = args[:which], args[which], args[which + 1:-2]
        return formula(*before, weigh_in(logits, *args[-2:]), *after)
    return weighed


def uniform_mean(formula, K, nets, hs, z, *per_text, own=(), which=0):
    """Mean over all positions of formula(logits of each net, z, alpha_t, dalpha_t); with `own` the
    logits of net number `which`, the generator, weigh in their tokens."""
    per_text = (rows_of(x, z.shape[1], z.device) for x in per_text)
    formula = weighing(formula, which) if own else formula
    return per_row(formula, K, nets, *(h.flatten(0, 1) for h in hs), z.flatten(),
                   *per_text, K, *own).mean()


@torch.no_grad()
def renoise_uniform(generator, h_g, own, keep, noise, K, rng):
    """z ~ q(. | y), y ~ G: the draw where `keep` (probability alpha_t), else a uniform token."""
    rows = flat_rows(keep, h_g.device)
    y = draw_tokens(generator, h_g.flatten(0, 1)[rows], K, rng, [x[rows] for x in own])
    return to_device(noise, y.device).flatten().index_copy(0, rows, y).view_as(noise)


def uniform_fake_loss(generator, fake, eps, keep, noise, a, dalpha, sigma, K, rng, weigh=False):
    """NELBO of the fake on the rows G, at hard tokens z ~ q(. | G), nats per token.

    eps        the generator's inputs, x_tilde (B, L) and sigma (B,), -log alpha at t_tilde
    keep       (B, L) bool, True with probability alpha_t;  noise  (B, L) uniform tokens
    a, dalpha  (B,) alpha_t and its slope;  sigma  (B,) -log alpha_t, for the fake
    weigh      G's rows weigh in the token they stand on, see above
    A soft target has less variance than the drawn token and the same minimiser: the posterior
    of a token given the *other* noised tokens (leave one out).
    """
    with torch.no_grad():                                  # the generator gets no gradient here
        h_g = generator.hidden(*eps)
        own = own_token(eps, K, h_g.device) if weigh else ()
        z = renoise_uniform(generator, h_g, own, keep, noise, K, rng)
    return uniform_mean(uniform_nelbo, K, (fake, frozen(generator)), (fake.hidden(z, sigma), h_g),
                        z, a, dalpha, own=own, which=1)


def uniform_generator_loss(generator, fake, teacher, eps, keep, noise, a, dalpha, sigma, K, rng,
                           gap=marginal_gap, weigh=False, beta=1.0):
    """NELBO(f*) - NELBO(f) on G under the exact noising law; gap: hard_gap or marginal_gap.

    The gradient runs through the target G alone: neither teacher nor fake is differentiated.
    beta: of marginal_gap, see there; a number, or (B,).
    """
    h_g = generator.hidden(*eps)
    own = own_token(eps, K, h_g.device) if weigh else ()
    z = renoise_uniform(generator, h_g, own, keep, noise, K, rng)
    with torch.no_grad():
        h_f, h_t = fake.hidden(z, sigma), teacher.hidden(z, sigma)
    per_text = (a, dalpha)
    if gap is marginal_gap:
        per_text += (torch.as_tensor(beta, dtype=a.dtype).expand(len(a)),)
    return uniform_mean(gap, K, (generator, frozen(fake), frozen(teacher)), (h_g, h_f, h_t),
                        z, *per_text, own=own)


# The published update (IDLM-Duo): the networks read the Gaussian state softmax(w / tau) of G and
# the gradient runs through it. Its law is q(. | G) only for one-hot G (the tests show how far off).

def top_entries(w, k):                                     # (N, K) -> (N, k) values, (N, k) ids
    """w.topk(k), by blocks: the k largest entries stand in the k blocks of the largest maxima."""
    if w.shape[1] <= 256 * k:
        return w.topk(k)
    blocks = F.pad(w, (0, -w.shape[1] % 256), value=-torch.inf).unflatten(1, (-1, 256))
    best = blocks.amax(-1).topk(k).indices                           # (N, k) blocks
    top, at = blocks.gather(1, best[..., None].expand(-1, -1, 256)).flatten(1).topk(k)
    return top, best.gather(1, at // 256) * 256 + at % 256


def is_enough(spread, tau):
    """May softmax(w / tau) leave out what lies `spread` below the maximum? exp(-25) = 1e-11 is lost
    in a float32 sum with the largest entry's 1."""
    return bool((spread > 25 * tau).all())


def device_rng(rng, device):
    """A generator on `device`, seeded from `rng`: noise over a whole vocabulary is drawn there."""
    if rng.device.type == torch.device(device).type:
        return rng
    seed = torch.randint(2 ** 62, (), generator=rng, device=rng.device).item()
    return torch.Generator(device).manual_seed(seed)


def noisy_top(logits_g, xi, scale, std, k):                # (N, K) x2, (N, 1) x2 -> (N, k) x2
    G = upcast(logits_g).softmax(-1)[:, :xi.shape[1]]
    return top_entries(scale * G + std * xi, k)


def state_weights(logits_g, ids, noise, scale, tau):       # (N, K), (N, k) x2, (N, 1) -> (N, k)
    G = upcast(logits_g).softmax(-1)
    return ((scale * G.gather(1, ids) + noise) / tau).softmax(-1)


def soft_state(generator, h_g, scale, std, K, tau, rng):
    """w = scale G + std xi as soft network inputs, differentiable in G.

    h_g (B, L, D); scale, std (B,), the Gaussian process' signal and noise. Returns the soft input
    (weights, ids), each (B, L, k), and z = argmax w (B, L).
    """
    B, L, _ = h_g.shape
    scale, std = rows_of(scale, L, h_g.device), rows_of(std, L, h_g.device)
    seed, k = torch.randint(2 ** 62, (), generator=rng, device=rng.device).item(), 24
    run = compiled(on_logits) if COMPILE else on_logits
    n = min(B * L, math.ceil(B * L * K / (CHUNK_ELEMENTS * (NOISE_CHUNKS if COMPILE else 1))))
    while True:                                            # which entries survive, and their noise
        found, k, noise_rng = [], min(k, K), torch.Generator(h_g.device).manual_seed(seed)
        with torch.no_grad():
            for h, s, d in zip(*(x.tensor_split(n) for x in (h_g.flatten(0, 1), scale, std))):
                xi = torch.randn(len(h), K, generator=noise_rng, device=h.device, dtype=s.dtype)
                top, ids = run(noisy_top, K, (generator,), h, xi, s, d, k)
                found.append((top, ids, d * xi.gather(1, ids)))
        top, ids, noise = (torch.cat(parts) for parts in zip(*found))
        if k == K or is_enough(top[:, 0] - top[:, -1], tau):
            break
        k *= 2                                             # the same noise again: no row is favoured
    weights = (top / tau).softmax(-1)
    if torch.is_grad_enabled():                            # the same, as a function of G
        weights = per_row(state_weights, K, (generator,), h_g.flatten(0, 1), ids, noise, scale, tau)
    return (weights.view(B, L, -1), ids.view(B, L, -1)), ids[:, 0].contiguous().view(B, L)


def soft_fake_loss(generator, fake, eps, scale, std, a, dalpha, sigma, K, rng, tau=1e-3):
    """`uniform_fake_loss` on the Gaussian state of G; a, dalpha: those of the Gaussian time."""
    with torch.no_grad():
        h_g = generator.hidden(*eps)
        soft, z = soft_state(generator, h_g, scale, std, K, tau, rng)
    return uniform_mean(uniform_nelbo, K, (fake, frozen(generator)),
                        (fake.hidden(soft, sigma), h_g), z, a, dalpha)


def soft_generator_loss(generator, fake, teacher, eps, scale, std, a, dalpha, sigma, K, rng,
                        tau=1e-3, path_gradient=True):
    """NELBO(f*) - NELBO(f) on the Gaussian state of G, gradient through target *and* state.

    path_gradient=False stops the gradient at the state: the paper's ablation, reported to diverge.
    Give teacher and fake with requires_grad False, or they collect gradients nobody asked for.
    """
    h_g = generator.hidden(*eps)
    (weights, ids), z = soft_state(generator, h_g, scale, std, K, tau, rng)
    soft = (weights if path_gradient else weights.detach(), ids)
    return uniform_mean(hard_gap, K, (generator, fake, teacher),
                        (h_g, fake.hidden(soft, sigma), teacher.hidden(soft, sigma)), z, a, dalpha)
