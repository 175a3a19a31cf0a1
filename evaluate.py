# SPDX-License-Identifier: MIT
"""Is the text at N passes good, and is it diverse? Beside the teacher's and beside real text.

    python evaluate.py                                   the masked run of out/mdlm
    python evaluate.py --process duo --ending map        the uniform run of out/duo
    python evaluate.py --sweep --mauve --controls --judge ar gpt2-large --num_texts 5000
    python evaluate.py --init_from kekchpek/idlm-mdlm --data "novels/*.txt" --judge gpt2-large
    python evaluate.py --plot results/laptop.json        writes the figure assets/laptop.png

Low entropy buys low perplexity, and unigram entropy alone is bought as cheaply. So entropy,
distinct4 and repetition stand beside every perplexity, --controls adds texts that some column must
expose, and --sweep follows the curve over temperature until it has the entropy of held-out text:
gen_ppl_matched is read off it there. Intervals: bootstrap over texts, 95 %.

--judge   ar: a causal DiT of the same training text, trained by train.py where it is missing
          ngram: of characters, ready in seconds        none: no perplexity
          FILE.pt: another run's judge    FILE.gguf or any other name: a model of transformers
          several: the first fills gen_ppl, the next one gen_ppl_2, ...
--mauve   of each judge but ngram: features are its last hidden state, the mean over the counted
          positions (the package's: the last position's), of each row's texts against other real
          ones; "real text (other half)" is the ceiling. Other texts, judge or number of texts:
          not comparable
Counted: every token but a text's first, which has no context; end-of-text like any other. A model
of transformers reads the decoded text with its tokenizer, cut to its longest input.
To reuse: copy the metrics; they need numpy alone.
"""
import argparse
import json
import math
import re
import subprocess
import sys
import time
from functools import lru_cache
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock               # comes with torch
from tqdm import tqdm

import checkpoint
import rows
from data import BadInput, TextData, encode
from generator import ENDINGS, ORDERS, sample

METRICS = "overlap", "known_words", "gm", "ngram_bits"    # those that may be left out
COLUMNS = ("model order ending steps passes temperature gen_ppl_matched gen_ppl bits_per_char "
           "entropy distinct4 repetition overlap known_words mauve gm ngram_bits exact_match")
SUFFIXES = "", "_2", "_3", "_4"                           # of the columns of each judge
STEPS, TEACHER_STEPS = [1, 4, 8, 16, 64], [256]           # the latter of the masked teacher alone
MODELS = "teacher", "dcd", "idlm"
RESAMPLES = 1000
GROUPS = 16                # of texts, for gm; an interval needs as many texts at least
MIN_MAUVE = 100            # MAUVE takes a cluster per ten texts: below, fewer than ten clusters
BATCH_TOKENS = 2 ** 17     # written at once, whatever --num_texts
JUDGE_TOKENS = 2 ** 12     # read at once: 50,257 logits each are 0.8 GB
NGRAM_TOKENS = 2 ** 24     # of training text that an n-gram model counts
WORD = re.compile(r"(?:[^\W\d_]|')+")


# ---- metrics: a number per text, whose mean (or ratio of sums) is the metric --------------------

def entropy(tokens):                                       # (L,) -> nats
    """Unigram entropy of one text. Of "abab": two tokens of share 1/2, so log 2 = 0.693."""
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -(p * np.log(p)).sum()


def four_grams(tokens):                                    # (N, L) -> each text's different 4-grams
    x = tokens.astype(np.uint64)                           # ids are below 2^16: four fit 64 bits
    n = x.shape[1] - 3
    codes = sum(x[:, j:n + j] << np.uint64(16 * j) for j in range(4))
    return [np.unique(row) for row in codes]


def repetition(tokens):                                    # (N, L) -> (N,)
    """Share of a text's 4-grams that stand earlier in it. "ababab": abab baba abab, so 1/3."""
    different = np.array([len(grams) for grams in four_grams(tokens)])
    return 1 - different / (tokens.shape[1] - 3)


def distinct4(tokens):                                     # (N, L) -> (N,)
    """Different 4-grams of all texts over all their 4-grams; compare at equal numbers of texts.

    "abcde", "abcdf": abcd bcde | abcd bcdf, 3 different of 4: 0.75. Resampled texts would repeat
    each other, so the spread is the jackknife's: what a text adds is the share of its 4-grams that
    no other text has (1/2, 1/2), shifted to the mean 0.75.
    """
    grams = four_grams(tokens)
    n = tokens.shape[1] - 3
    text = np.repeat(np.arange(len(grams)), [len(g) for g in grams])
    every, at, texts = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    added = np.bincount(text, texts[at] == 1) / n
    return added - added.mean() + len(every) / (len(tokens) * n)


def overlap(tokens):                                       # (N, L) -> (N,)
    """Share of a text's different 4-grams that the next text has as well, the last one's next being
    the first. "abcde", "abcdf": of abcd bcde the second text has abcd, so 1/2 (and back 1/2)."""
    grams = four_grams(tokens)
    after = grams[1:] + grams[:1]
    return np.array([np.isin(a, b).mean() for a, b in zip(grams, after)])


def whole_words(text):
    """Runs of letters and apostrophes but those cut by the text's ends. "he cat's mew": cat's"""
    words = WORD.findall(text)
    is_cut, is_cut_off = bool(WORD.match(text)), bool(WORD.match(text[-1:]))
    return words[is_cut:len(words) - is_cut_off]


def gradient_moment(g, r):                                 # (m, P), (m, P) -> (m,)
    """Squared distance of the judge's mean gradients on generated and real text (arXiv 2603.20155):
    the mean of <d_i, d_j>, i != j, d_i = g_i - r_i from group i of the texts. Groups are
    independent, so noise adds nothing, as it would to the square of one mean difference.

    One parameter, two groups, g = (1, 3), r = (0, 1): d = (1, 2), so 2; the plain square is 2.25.
    """
    d = torch.as_tensor(g) - torch.as_tensor(r)            # on their device: over 1 GB for GPT-2's
    gram = (d @ d.T).cpu().double().numpy()
    with_others = (gram.sum(1) - np.diag(gram)) / (len(gram) - 1)
    return 2 * with_others - with_others.mean()            # a pair's noise is in both its groups


@lru_cache(maxsize=2)                                      # drawn once for all metrics and rows
def resamples(n, seed):                                    # -> (1 + RESAMPLES, n): counts of a text
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.concatenate([np.ones_like(counts[:1]), counts]).astype(float)


def bootstrap(a, b=1, seed=0):                             # (N,), (N,) -> (1 + RESAMPLES,)
    """sum(a) / sum(b), first of the texts, then of resampled texts."""
    a, b = np.broadcast_arrays(np.asarray(a, float), b)
    counts = resamples(len(a), seed)
    with np.errstate(invalid="ignore"):
        return counts @ a / (counts @ b)


def summary(name, x):
    """The value and the central 95 % of its resamples. What lies beyond the measured is None."""
    low, high = np.quantile(x[1:], [0.025, 0.975], method="nearest")
    value, low, high = (float(v) if np.isfinite(v) else None for v in (x[0], low, high))
    return {name: value, name + "_ci": [low, high]}


def wilson(right, n, z=1.96):
    """The share right / n and its 95 % interval (Wilson 1927), which holds at 0 and at n, too.
    0 of 10: 0, [0, 0.278]"""
    p = right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return p, [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def ppl_at(target, entropies, log_ppls):
    """gen_ppl where the curve over temperatures has the entropy `target`: log-linear between
    neighbours, never extrapolated but -inf or inf. 2.6, (2.5, 2.7), (1.0, 1.4) -> e^1.2"""
    if not entropies.min() <= target <= entropies.max():
        return math.copysign(np.inf, target - entropies.max())
    order = np.argsort(entropies)
    return np.exp(np.interp(target, entropies[order], log_ppls[order]))


def next_temperature(done, entropies, target, margin=0.03, most=6):
    """[the temperature to try next], or [] once `target` lies well inside the entropies, after
    `most` or at 0. Entropy rises with temperature: at 1.0 it was 2.8, so for 2.9 [1.2] is next."""
    if min(entropies) + margin < target < max(entropies) - margin or len(done) >= most:
        return []
    too_cold = max(entropies) - margin <= target
    following = round(max(done) + 0.2 if too_cold else min(done) - 0.1, 1)
    return [following] * (following > 0)


def mauve(p, q):                                           # (N, D), (M, D) -> 0 ... 1
    """MAUVE (arXiv 2102.01454) of two sets of features, a row a text: 1 where they are alike."""
    from mauve import compute_mauve
    return float(compute_mauve(p_features=p, q_features=q, verbose=False).mauve)


# ---- judges -------------------------------------------------------------------------------------

class Score(NamedTuple):
    """What a judge, a function (tokens (N, L), groups) -> Score, says of N texts."""
    nll: np.ndarray                         # (N,) nats, the sum over a text's counted tokens
    tokens: np.ndarray                      # (N,) that are counted
    chars: np.ndarray                       # (N,) characters of those
    features: np.ndarray = None             # (N, D) last hidden state, mean over counted positions
    grads: torch.Tensor = None              # (groups, P), on the judge's device


class NGram:
    """p_k(c | k tokens) = (n(tokens, c) + a p_{k-1}(c)) / (n(tokens) + a), p_{-1} = 1 / K, the
    smoothing of MacKay and Peto. A judge, and at temperature 1 a sampler of the same law."""

    def __init__(self, data, order, a=20.0):
        train = data.train[:, -data.block_size:] if data.examples else data.train[:NGRAM_TOKENS]
        train = np.asarray(train, dtype=np.int64)
        self.K, self.a, self.tables = data.K, a, []
        for k in range(min(order, int(62 / math.log2(data.K)))):     # codes stay below 2^62
            grams, n = np.unique(self.codes(train, k), return_counts=True)
            self.tables.append((grams, np.append(0, n.cumsum())))

    def codes(self, x, k):                  # (..., L) -> (..., L - k): k + 1 tokens in one number
        n = x.shape[-1] - k
        return sum(x[..., j:n + j] * self.K ** (k - j) for j in range(k + 1))

    def __call__(self, tokens, groups=0):
        x = tokens.astype(np.int64)
        p = np.full(x.shape, 1 / self.K)
        for k, (grams, sums) in enumerate(self.tables[:x.shape[1]]):
            code = self.codes(x, k)
            context = code // self.K * self.K
            ends = np.searchsorted(grams, [code, code + 1, context, context + self.K])
            low, high, first, last = sums[ends]
            p[:, k:] = (high - low + self.a * p[:, k:]) / (last - first + self.a)
        counted = np.full(len(x), x.shape[1] - 1)
        return Score(-np.log(p[:, 1:]).sum(1), counted, counted)

    def sample(self, num_texts, length, seed, temperature=1.0):
        """A token follows its longest context with the share n / (n + a), else a shorter one; in a
        context with odds n(tokens, c)^(1 / temperature).  -> (num_texts, length)"""
        rng = np.random.default_rng(seed)
        tempered = [np.append(0, (np.diff(sums) ** (1 / temperature)).cumsum())
                    for _, sums in self.tables]
        x = np.zeros((num_texts, length), np.int64)
        for i in range(length):
            token = rng.integers(self.K, size=num_texts)
            for k, (grams, sums) in enumerate(self.tables[:i + 1]):
                context = self.codes(x[:, i - k:i + 1], k)[:, 0]     # x[:, i] is 0 as yet
                ends = np.searchsorted(grams, [context, context + self.K])
                n = np.diff(sums[ends], axis=0)[0]
                low, high = tempered[k][ends]
                goal = low + rng.random(num_texts) * (high - low)
                at = np.searchsorted(tempered[k], goal, "right").clip(max=len(grams)) - 1
                is_long = rng.random(num_texts) * (n + self.a) < n
                token = np.where(is_long, grams[at] % self.K, token)
            x[:, i] = token
        return x


@lru_cache(maxsize=1)                       # counted once for the judge, a metric and a control
def ngram_of(data):
    """6-grams of characters, bigrams of BPE tokens."""
    return NGram(data, 6 if data.spec["name"] == "char" else 2)


def neural_judge(device, forward, encode_row, decode):
    """A causal network. forward: ids (B, L) -> hidden (B, L, D), logits (B, L, V); encode_row: a
    text's tokens -> ids; decode: list of ids -> str."""
    @torch.no_grad()
    def score(tokens, groups=0):
        """With groups of texts: also each group's gradient, nats per token, in the last matrix,
        the mean of (p - onehot) h^T."""
        ids = [torch.as_tensor(encode_row(row) or [0]) for row in tokens.tolist()]
        counted = torch.tensor([len(row) - 1 for row in ids])
        size = max(1, JUDGE_TOKENS // (int(counted.max()) + 1))
        nll, features, grads = [], [], []
        for group in torch.arange(len(ids)).tensor_split(groups or 1):
            gradient = 0
            for part in group.split(size):
                x = torch.nn.utils.rnn.pad_sequence([ids[i] for i in part], batch_first=True)
                counts = torch.arange(x.shape[1] - 1) < counted[part, None]
                x, counts = x.to(device), counts[..., None].to(device)
                h, logits = forward(x)                     # causal: padding goes unseen
                h, target = h[:, :-1].float(), x[:, 1:, None]
                log_p = logits[:, :-1].float().log_softmax(-1)
                nll.append(-(log_p.gather(-1, target) * counts).sum((1, 2)))
                features.append((h * counts).sum(1) / counts.sum(1).clamp(min=1))
                if groups:
                    error = log_p.exp().scatter_add(-1, target, -torch.ones_like(log_p[..., :1]))
                    gradient += torch.einsum("blv,bld->vd", error * counts, h).flatten()
            grads.append(gradient / counted[group].sum())
        chars = np.array([len(decode(row[1:].tolist())) for row in ids])
        return Score(torch.cat(nll).double().cpu().numpy(), counted.numpy(), chars,
                     torch.cat(features).cpu().numpy(), torch.stack(grads) if groups else None)
    return score


def train_judge(path, args, data):
    """Run train.py for the judge of this run, unless there is a whole one."""
    state = checkpoint.load(path) if path.exists() else {"step": -1, "updates": 0}
    if state["step"] >= state["updates"]:
        return
    print(f"{path} is not there or not finished: training it", flush=True)
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--stage=judge",
               "--resume", f"--process={args.process}", f"--out={args.out}",
               f"--data={data.source}", f"--tokenizer={data.spec['name']}",
               f"--block_size={data.block_size}", f"--cache={args.cache}"]
    if args.device:
        command.append(f"--device={args.device}")
    if args.no_compile:
        command.append("--no-compile")
    status = subprocess.run(command).returncode
    if status:
        raise BadInput(f"--judge ar: training it ended with status {status}; mend what it says "
                       "above, or take --judge ngram or none")


def run_judge(path, device, data):
    """A judge that train.py wrote."""
    net, meta = checkpoint.load_network(path, device)
    if meta["process"] != "ar" or meta["tokenizer"] != data.spec:
        raise BadInput(f"{path} cannot judge this text: it is a {meta['process']} model, or of "
                       "another tokenizer; train one with train.py --stage judge")
    if meta["step"] < meta["updates"]:
        raise BadInput(f"{path} has done {meta['step']} of {meta['updates']} updates; finish it "
                       "with train.py --stage judge --resume")
    if meta["data_key"] != data.key:
        raise BadInput(f"{path} was trained on other text than {data.source} and cannot judge it; "
                       "take --judge ar or another file")

    def forward(x):
        h = net.hidden(x, torch.zeros(len(x)))
        return h, net.project(h)[..., :data.K]
    return neural_judge(device, forward, list, data.tokenizer.decode)


def hub_judge(name, device, data):
    """A model of transformers: a hub name, a folder, or a .gguf file."""
    place, options = name, {"trust_remote_code": False}
    if name.endswith(".gguf"):
        place, options["gguf_file"] = str(Path(name).parent), Path(name).name
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        net = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, **options)
    except Exception as error:              # no package, no such name, no network, a torn file
        raise BadInput(f"--judge {name} cannot be loaded ({first_line(error)}): check the name, "
                       "pip install -r requirements-eval.txt, or take --judge ar") from None
    if net.dtype != torch.float32:          # what a .gguf holds comes as float32, and stays so
        net.float()
    net.to(device).eval()
    longest = getattr(net.config, "max_position_embeddings", 1024)

    def forward(x):
        output = net(x, output_hidden_states=True)
        return output.hidden_states[-1], output.logits

    def encode_row(row):
        return tokenizer(data.tokenizer.decode(row), add_special_tokens=False, truncation=True,
                         max_length=longest).input_ids

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return neural_judge(device, forward, encode_row, decode)


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load_judge(name, args, device, data):
    """-> a function (tokens (N, L), groups) -> Score"""
    if name == "ngram":
        if data.spec["name"] != "char":
            raise BadInput(f"--judge ngram is for characters, not {data.spec['name']} tokens: "
                           "take ar")
        return ngram_of(data)
    if name == "ar":
        train_judge(args.out / "judge.pt", args, data)
        return run_judge(args.out / "judge.pt", device, data)
    return run_judge(name, device, data) if name.endswith(".pt") else hub_judge(name, device, data)


# ---- controls: texts that are not good, whatever a single column says ---------------------------

def shuffle_words(tokens, tokenizer, rng):                 # (L,) -> (L,)
    """A text's words in random order; spaces stay. "to be or" -> "or to be". A word of BPE tokens
    takes its leading space along."""
    units, words, after_space = [], [], True
    for token in tokens.tolist():
        piece = tokenizer.decode_single_token_bytes(token)
        is_space = not piece.strip() or piece == b"<|endoftext|>"
        if is_space or after_space or piece[:1].isspace():
            if not is_space:
                words.append(len(units))
            units.append([])
        units[-1].append(token)
        after_space = is_space
    order = np.arange(len(units))
    order[words] = rng.permutation(words)
    return np.concatenate([units[i] for i in order])


def ngram_texts(ngram, num_texts, length, target, seed):
    """-> texts (N, L) whose mean entropy is about `target`, and their temperature: by bisection."""
    low, high = 0.25, 4.0
    for _ in range(8):
        temperature = math.sqrt(low * high)
        few = ngram.sample(min(num_texts, 256), length, seed, temperature)
        if np.mean([entropy(row) for row in few]) < target:
            low = temperature
        else:
            high = temperature
    return ngram.sample(num_texts, length, seed, temperature), temperature


def control_rows(measure, data, real, seed):
    """-> records of the three controls, with as many texts each as `real` (N, L)."""
    if data.examples or len(data.train) < 2 ** 10:
        raise BadInput(f"--controls needs plain training text for an n-gram model, which "
                       f"{data.source} has too little of; leave it out")
    rng = np.random.default_rng(seed)
    shuffled = np.stack([shuffle_words(row, data.tokenizer, rng) for row in real])
    target = np.mean([entropy(row) for row in real])
    ngrams, temperature = ngram_texts(ngram_of(data), *real.shape, target, seed)
    repeated = np.repeat(real[:1], len(real), 0)
    return [measure(shuffled, kind="control", model="real, words shuffled")[0],
            measure(repeated, kind="control", model="real, one repeated")[0],
            measure(ngrams, kind="control", model="n-gram", temperature=temperature)[0]]


# ---- evaluation ---------------------------------------------------------------------------------

class Measure:
    """measure(tokens (N, L), **setting) -> record, {metric: (1 + RESAMPLES,)}

    judges      suffix of their columns -> judge
    reference   (N, L) held-out tokens that overlap, gm and mauve compare with
    base        what every record holds
    metrics     of METRICS, and "mauve"
    answers     (N, L) tokens, -1 where any will do: what exact_match asks of a model's texts
    """

    def __init__(self, data, judges, reference, base, metrics=METRICS, answers=None):
        self.data, self.judges, self.base, self.answers = data, judges, base, answers
        self.metrics = set(metrics)
        if data.spec["name"] != "char":
            self.metrics -= {"known_words", "ngram_bits"}
        if "known_words" in self.metrics:
            self.words = set(whole_words(data.train_text()))
        self.overlap = overlap(reference).mean()
        self.reference = {suffix: self.judge(suffix, reference) for suffix in judges}

    def judge(self, suffix, tokens):
        name = self.base["judge" + suffix]
        try:
            score = self.judges[suffix](tokens, GROUPS if "gm" in self.metrics else 0)
        except (RuntimeError, ValueError, LookupError) as error:
            raise BadInput(f"--judge {name} cannot read the text ({first_line(error)}); take "
                           "another judge") from None
        if not (np.isfinite(score.nll).all() and score.tokens.sum()):
            raise BadInput(f"--judge {name} gives NaN, or sees no token in the text; take another")
        return score

    def __call__(self, tokens, **setting):
        record = self.base | setting | {"n_texts": len(tokens)}
        ratios = {"entropy": ([entropy(row) for row in tokens], 1),
                  "distinct4": (distinct4(tokens), 1),
                  "repetition": (repetition(tokens), 1)}
        if "overlap" in self.metrics:
            ratios["overlap"] = overlap(tokens) - self.overlap, 1
        if "known_words" in self.metrics:
            texts = [whole_words(self.data.tokenizer.decode(row)) for row in tokens.tolist()]
            known = [sum(word in self.words for word in text) for text in texts]
            ratios["known_words"] = known, [len(text) for text in texts]
        if "ngram_bits" in self.metrics:
            score = ngram_of(self.data)(tokens)
            ratios["ngram_bits"] = score.nll / math.log(2), score.tokens
        for suffix, real in self.reference.items():
            score = self.judge(suffix, tokens)
            ratios["gen_ppl" + suffix] = score.nll, score.tokens
            ratios["bits_per_char" + suffix] = score.nll / math.log(2), score.chars
            if score.grads is not None:
                ratios["gm" + suffix] = gradient_moment(score.grads, real.grads), 1
            if "mauve" in self.metrics and score.features is not None:
                record["mauve" + suffix] = mauve(score.features, real.features)
        if self.answers is not None and setting["kind"] == "model":
            right = ((tokens == self.answers) | (self.answers < 0)).all(1)
            record["exact_match"], record["exact_match_ci"] = wilson(int(right.sum()), len(right))
        resampled = {}
        for name, (a, b) in ratios.items():
            x = bootstrap(a, b, record["seed"])
            resampled[name] = np.exp(x) if name.startswith("gen_ppl") else x
            record |= summary(name, resampled[name])
        return record, resampled


def write_texts(net, process, prompts, steps, seed, dtype, **choice):
    """prompts (N, L), -1 where free -> tokens (N, L), mean number of passes.

    In batches of fixed size, each with a generator made from (seed, batch): memory is bounded
    whatever N is, and more texts leave the first batches as they are.
    """
    size = max(1, BATCH_TOKENS // prompts.shape[1])
    batches = []
    for i, part in enumerate(prompts.split(size)):
        state = np.random.SeedSequence([seed, i]).generate_state(1)  # 32 bits: torch reads no more
        rng = torch.Generator().manual_seed(int(state[0]))
        with torch.autocast(net.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            batches.append(sample(net, process, *part.shape, steps, rng, prompt=part, **choice))
    tokens, passes = (torch.cat(parts) for parts in zip(*batches))
    return tokens.numpy(), passes.double().mean().item()


def match_entropy(curve, real):
    """Add gen_ppl_matched, read off the curve of a setting at the entropy of held-out text."""
    entropies = np.stack([x["entropy"] for _, x in curve], 1)
    for key in [key for key in real if key.startswith("gen_ppl")]:
        log_ppls = np.log(np.stack([x[key] for _, x in curve], 1))
        x = np.array([ppl_at(*point) for point in zip(real["entropy"], entropies, log_ppls)])
        for record, _ in curve:
            record |= summary(key.replace("gen_ppl", "gen_ppl_matched"), x)


def model_rows(nets, settings, prompts, measure, real, temperatures, sweep):
    """-> records. nets: name -> (net, process); settings: (name, {"order" or "ending": choice},
    steps); real: the resampled metrics of held-out text."""
    records, base = [], measure.base
    for name, choice, steps in (bar := tqdm(settings, leave=False, disable=None)):
        curve, todo = [], list(temperatures)
        for temperature in todo:                           # which may grow on the way
            bar.set_description(f"{name} {' '.join(choice.values())} {steps} at {temperature:g}")
            began = time.time()
            tokens, passes = write_texts(*nets[name], prompts, steps, base["seed"], base["dtype"],
                                         temperature=temperature, **choice)
            curve.append(measure(tokens, kind="model", model=name, **choice, steps=steps,
                                 passes=passes, temperature=temperature,
                                 seconds=time.time() - began))
            if sweep:
                entropies = [record["entropy"] for record, _ in curve]
                todo += next_temperature(todo, entropies, real["entropy"][0])
        if len(curve) > 1:
            match_entropy(curve, real)
        records += [record for record, _ in curve]
    return records


# ---- records and table --------------------------------------------------------------------------

def read_records(path):
    """A list of records, or a dict as in eval.json, whose provenance then goes into each record."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(records, dict):
            records = [records["provenance"] | record for record in records["records"]]
        if not all(isinstance(record, dict) for record in records):
            raise TypeError("an entry is no record")
    except (ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{path} is no JSON list of records ({first_line(error)}); it stays as it "
                       "is: repair it or name another file") from None
    return records


def append_records(path, records):
    with FileLock(f"{path}.lock"):
        earlier = read_records(path) if path.exists() else []
        checkpoint.write_json(path, earlier + records)


def cell(record, key):
    """12.3 ±0.4: the value and half its interval."""
    value, interval = record.get(key), record.get(key + "_ci")
    if value is None:
        return "not reached" if "matched" in key and key in record else "–"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if not interval:
        return text
    if None in interval:
        return text + " ±open"
    half = round((interval[1] - interval[0]) / 2, 9)       # of equal texts: 0, not a rounding error
    return text + (f" ±{half:.2g}" if half < 100 else f" ±{half:.0f}")


def records_table(records, columns=COLUMNS):
    """Aligned markdown, for the terminal too; without the columns that no record has."""
    keys = [column + suffix for column in columns.split() for suffix in SUFFIXES]
    keys = [key for key in keys if any(key in record for record in records)]
    lines = [keys] + [[cell(record, key) for key in keys] for record in records]
    width = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in width])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, width))} |" for line in lines)


def disagreement(records, key):
    """A sentence on the rows that the judge of `key` orders otherwise than the first, or ""."""
    swapped = []
    for a, b in combinations([r for r in records if r["gen_ppl"] and r[key]], 2):
        first, other = math.log(a["gen_ppl"] / b["gen_ppl"]), math.log(a[key] / b[key])
        if first * other < 0:
            labels = [" ".join(cell(r, k) for k in COLUMNS.split()[:4] if k in r) for r in (a, b)]
            swapped.append((min(abs(first), abs(other)), " and ".join(labels)))
    return swapped and (f"gen_ppl and {key}, two judges, order {len(swapped)} pairs of rows "
                        f"differently, most of all {max(swapped)[1]}")


# ---- command line -------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--process", choices=("mdlm", "duo"), default="mdlm")
    add("--out", type=Path, help="run folder, default out/<process>")
    add("--models", nargs="+", choices=MODELS, help="default: all that are there")
    add("--init_from", help="one more model: a checkpoint, folder or hub name")
    add("--data", help="default: what the model was trained on")
    add("--cache", default="out/cache", help="folder of tokenised text")
    add("--judge", nargs="+", default=["ar"], help="see above")
    add("--steps", nargs="+", type=int, help=f"passes at most, default {STEPS}; the masked teacher "
        f"also {TEACHER_STEPS}")
    add("--temperatures", nargs="+", type=float, default=[1.0], help="default 1")
    add("--sweep", action="store_true", help="more of them, to held-out entropy; at most 6")
    add("--order", nargs="+", choices=ORDERS, default=ORDERS, help="masked process, else all")
    add("--ending", nargs="+", choices=ENDINGS, default=ENDINGS, help="uniform process, else all")
    add("--num_texts", type=int, help="a row, default 64 on a CPU, else 512")
    add("--metrics", nargs="*", choices=METRICS, default=METRICS, help="beside gen_ppl, "
        "bits_per_char, entropy, distinct4 and repetition")
    add("--mauve", action="store_true", help="MAUVE too, of a judge's hidden states")
    add("--controls", action="store_true", help="three kinds of text that some column must expose")
    add("--exact_match", action="store_true", help="of examples: share of right answers")
    add("--records", type=Path, help="append the records to this list, such as results/laptop.json")
    add("--plot", nargs="+", metavar="JSON", help="only draw these records: assets/<first>.png")
    add("--seed", type=int, default=1)
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=("bfloat16", "float32", "float64"), help="of sampling, default bfloat16 "
        "where it pays")
    add("--no-compile", action="store_true", help="nothing compiles")
    args = p.parse_args(argv)
    args.out = args.out or Path("out", args.process)
    args.teacher_steps = TEACHER_STEPS if args.process == "mdlm" and not args.steps else []
    args.steps = args.steps or STEPS
    check_args(args)
    return args


def check_args(args):
    if min(args.steps) < 1 or not all(0 < t < math.inf for t in args.temperatures):
        raise BadInput(f"--steps {args.steps} --temperatures {args.temperatures}: use positives")
    if not 0 <= args.seed < 2 ** 32:
        raise BadInput(f"--seed {args.seed}: choose one from 0 to {2 ** 32 - 1}")
    if len(args.judge) > len(SUFFIXES) or "none" in args.judge[not args.sweep:]:
        raise BadInput(f"--judge {' '.join(args.judge)}: give {len(SUFFIXES)} at most, and none "
                       "stands alone, without --sweep")
    if args.mauve and {*args.judge} <= {"none", "ngram"}:
        raise BadInput(f"--mauve needs the hidden states of a judge and {args.judge[0]} has none: "
                       "add ar, or leave --mauve out")
    if args.mauve and not find_spec("mauve"):
        raise BadInput("--mauve needs a package: pip install -r requirements-eval.txt")
    if args.records and args.records.exists():
        read_records(args.records)                         # before the hours of work, not after


def load_models(args, device, dtype):
    """-> {name: (net, process)}, {name: meta}"""
    names = args.models or [n for n in MODELS if (args.out / f"{n}.pt").exists()]
    if not (args.models or args.init_from or "idlm" in names):
        raise BadInput(f"there is no generator in {args.out} yet: run python train.py first, or "
                       "name what there is with --models")
    paths = {name: args.out / f"{name}.pt" for name in names}
    if args.init_from:
        paths[args.init_from] = args.init_from
    nets, metas = {}, {}
    for name, path in paths.items():
        net, metas[name] = checkpoint.load_network(path, device, args.process)
        if dtype == "float64":
            net.double()
        net.freeze(torch.bfloat16 if dtype == "bfloat16" else None)
        nets[name] = net, checkpoint.make_process(metas[name])
    return nets, metas


def load_data(args, metas):
    meta = next(iter(metas.values()))
    source = args.data or meta.get("data")
    if not source:
        raise BadInput(f"{args.init_from} does not say which text to compare with: add --data")
    data = TextData(source, meta["tokenizer"]["name"], meta["block_size"], cache=args.cache)
    for name, meta in metas.items():
        if meta["tokenizer"] != data.spec:
            raise BadInput(f"{name} has another tokenizer than {source}: give the --data it was trained on")
        if meta.get("data_key") != data.key:
            print(f'note: {name} was not trained on {source} as it is: what is "held-out" of it '
                  "may have been trained on")
    if args.exact_match and not data.examples:
        raise BadInput(f"--exact_match needs examples with answers, and {source} has none")
    return data


def held_out(data, num_texts, least):
    """-> two halves of held-out blocks (N, L); of the first one, prompts and answers (N, L), -1
    where free."""
    blocks = data.val_blocks(2 * num_texts).x_0.numpy()
    n = len(blocks) // 2
    if n < least:
        raise BadInput(f"{n} texts a row, by --num_texts or as half of the held-out ones: an "
                       f"interval needs {GROUPS}, and MAUVE {MIN_MAUVE} for ten clusters")
    prompts, answers = np.full((2, n, data.block_size), -1)
    examples = data.val_examples(2 * num_texts)[:2 * n:2] if data.examples else []
    for i, example in enumerate(examples):
        prompt, answer = (encode(data.tokenizer, text) for text in example)
        prompts[i, :len(prompt)] = prompt
        answers[i, len(prompt):len(prompt) + len(answer)] = answer
    return blocks[:2 * n:2], blocks[1:2 * n:2], torch.from_numpy(prompts), answers


def settings_of(args, names, length):
    key, choices = ("order", args.order) if args.process == "mdlm" else ("ending", args.ending)
    settings = []
    for name, choice in product(names, choices):
        steps = args.steps + args.teacher_steps * (name == "teacher")
        if choice == "even":                               # a step reveals a position or more
            steps = [min(n, length) for n in steps]
        settings += [(name, {key: choice}, n) for n in sorted({*steps})]
    return settings


def evaluate(args, columns=COLUMNS):
    """Everything between the flags and the table."""
    device = checkpoint.pick_device(args.device)
    dtype = checkpoint.pick_dtype(args.dtype, device)
    torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    rows.COMPILE = device.type == "cuda" and not args.no_compile
    nets, metas = load_models(args, device, dtype)
    data = load_data(args, metas)
    num_texts = args.num_texts or (64 if device.type == "cpu" else 512)
    texts, reference, prompts, answers = held_out(
        data, num_texts, MIN_MAUVE if args.mauve else GROUPS)
    base = {"process": args.process, "block_size": data.block_size, "seed": args.seed,
            "dtype": dtype}
    judges = {}
    for suffix, name in zip(SUFFIXES, args.judge):
        base["judge" + suffix] = name
        if name != "none":
            judges[suffix] = load_judge(name, args, device, data)
    measure = Measure(data, judges, reference, base, [*args.metrics, *["mauve"] * args.mauve],
                      answers if args.exact_match else None)
    real, resampled = measure(texts, kind="real", model="real text" + " (other half)" * args.mauve)
    records = [real]
    if args.controls:
        records += control_rows(measure, data, texts, args.seed)
    records += model_rows(nets, settings_of(args, nets, data.block_size), prompts, measure,
                          resampled, args.temperatures, args.sweep)
    provenance = checkpoint.provenance(args.seed, device)
    checkpoint.write_json(args.out / "eval.json", {"provenance": provenance, "records": records})
    if args.records:
        append_records(args.records, [provenance | record for record in records])
    print(records_table(records, columns))
    print(f"{len(texts)} texts of {data.block_size} tokens a row; judge {' and '.join(args.judge)}; "
          f"± half of the 95 % interval over texts; more in {args.out / 'eval.json'}")
    for suffix in list(judges)[1:]:
        print(disagreement(records, "gen_ppl" + suffix) or "both judges order the rows alike")


def short_table(out, process, device, seed, no_compile=False, cache="out/cache"):
    """What training ends with: few rows and texts, and no judge that needs training."""
    try:
        spec = checkpoint.load(Path(out, "teacher.pt"))["tokenizer"]
        args = parse_args([
            f"--out={out}", f"--process={process}", f"--seed={seed}", f"--cache={cache}",
            f"--device={device}", "--steps", "4", "16", "--ending=map", "--num_texts=40",
            "--metrics=known_words", "--judge=ngram" if spec["name"] == "char" else "--judge=none"])
        args.no_compile, args.teacher_steps = no_compile, TEACHER_STEPS
        evaluate(args, "model order ending steps passes bits_per_char entropy distinct4 repetition "
                       "known_words")
    except (BadInput, OSError) as error:
        print(f"no table: {error}")


def main(argv=None):
    args = parse_args(argv)
    if args.plot:
        from experiments.tables import plot
        return plot(args.plot)
    evaluate(args)


if __name__ == "__main__":
    checkpoint.run_script(main)
