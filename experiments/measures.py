# SPDX-License-Identifier: MIT
"""What evaluate.py asks for beside its fixed columns: the measures of headline tables, checks.

    --metrics       overlap, known_words, the gradient moment gm
    --mauve         MAUVE on a judge's features
    --exact_match   the share of prompts answered exactly
    --sweep         perplexity where the curve over temperature has held-out entropy
    --controls      texts that some column must expose
    --judge NAME    a pretrained judge: a hub model, or a .gguf file; or `ar`, where it is missing
"""
import math
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import checkpoint
from data import BadInput
from evaluate import (COLUMNS, SUFFIXES, bootstrap, cell, entropy, four_grams, neural_judge,
                      ngram_of, summary)
from experiments.collect import read_records

WORD = re.compile(r"(?:[^\W\d_]|')+")
GROUPS = 16                # of texts, for gm
MIN_TEXTS = 16             # of an interval
MIN_MAUVE = 100            # MAUVE takes a cluster per ten texts: below, fewer than ten clusters


# ---- columns that may be left out ---------------------------------------------------------------

class Extras:
    """extras(tokens (N, L), scores, setting) -> {metric: (1 + RESAMPLES,)}, {metric: value}

    metrics     of evaluate.METRICS, and "mauve"
    reference   (N, L) held-out tokens that overlap compares with
    real        what the judges say of them: suffix of a judge -> Score; scores: of `tokens`
    answers     see exact_match
    """

    def __init__(self, metrics, data, reference, real, answers=None):
        self.metrics = metrics
        self.tokenizer = data.tokenizer
        self.overlap = overlap(reference).mean()
        self.real = real
        self.answers = answers
        self.words = None
        if "known_words" in metrics and data.spec["name"] == "char":
            self.words = set(whole_words(data.train_text()))

    def __call__(self, tokens, scores, setting):
        seed = setting["seed"]
        resampled, values = {}, {}
        if "overlap" in self.metrics:
            resampled["overlap"] = bootstrap(overlap(tokens) - self.overlap, seed=seed)
        if self.words is not None:
            texts = [whole_words(self.tokenizer.decode(row)) for row in tokens.tolist()]
            known = [sum(word in self.words for word in text) for text in texts]
            resampled["known_words"] = bootstrap(known, [len(text) for text in texts], seed)
        for suffix, score in scores.items():
            real = self.real[suffix]
            if score.grads is not None:
                moments = gradient_moment(score.grads, real.grads)
                resampled["gm" + suffix] = bootstrap(moments, seed=seed)
            if "mauve" in self.metrics and score.features is not None:
                values["mauve" + suffix] = mauve(score.features, real.features)
        if self.answers is not None and setting["kind"] == "model":
            values |= exact_match(tokens, self.answers)
        return resampled, values


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


class Gradients:
    """The judge's gradient of each group of texts, nats per token, in its last matrix: the mean of
    (p - onehot) h^T over the group's tokens. Without groups: nothing."""

    def __init__(self, num_texts, groups):
        texts = torch.arange(num_texts).tensor_split(groups) if groups else []
        self.bounds = [(int(group[0]), int(group[-1]) + 1) for group in texts]
        self.sums = [0] * groups
        self.counted = [0] * groups

    def add(self, first, h, log_p, target):                # (B, L, D), (B, L, K), (B, L, 1)
        """Texts first, first + 1, ... A target below 0 does not count."""
        for i, (start, end) in enumerate(self.bounds):
            part = slice(max(start - first, 0), max(end - first, 0))
            if not len(target[part]):
                continue
            index = target[part].clamp(min=0)
            counts = target[part] >= 0
            p = log_p[part].exp()
            error = p.scatter_add(-1, index, -torch.ones_like(p[..., :1])) * counts
            self.sums[i] += torch.einsum("blv,bld->vd", error, h[part]).flatten()
            self.counted[i] += counts.sum()

    def means(self):                                       # -> (groups, P) on the judge's device
        if self.sums:
            return torch.stack([total / n for total, n in zip(self.sums, self.counted)])


def gradient_moment(g, r):                                 # (m, P), (m, P) -> (m,)
    """Squared distance of the judge's mean gradients on generated and real text (arXiv 2603.20155):
    the mean of <d_i, d_j>, i != j, d_i = g_i - r_i from group i of the texts. Groups are
    independent, so noise adds nothing, as it would to the square of one mean difference.

    The paper's is of all of a judge's parameters and sums over a text: values do not compare.

    One parameter, two groups, g = (1, 3), r = (0, 1): d = (1, 2), so 2; the plain square is 2.25.
    """
    d = torch.as_tensor(g) - torch.as_tensor(r)            # on their device: over 1 GB for GPT-2's
    gram = (d @ d.T).cpu().double().numpy()
    with_others = (gram.sum(1) - np.diag(gram)) / (len(gram) - 1)
    return 2 * with_others - with_others.mean()            # a pair's noise is in both its groups


def mauve(p, q):                                           # (N, D), (M, D) -> 0 ... 1
    """MAUVE (arXiv 2102.01454) of two sets of features, a row a text: 1 where they are alike."""
    from mauve import compute_mauve
    return float(compute_mauve(p_features=p, q_features=q, verbose=False).mauve)


def wilson(right, n, z=1.96):
    """The share right / n and its 95 % interval (Wilson 1927), which holds at 0 and at n, too.
    0 of 10: 0, [0, 0.278]"""
    p = right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return p, [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def exact_match(tokens, answers):                          # (N, L) x2 -> record
    right = ((tokens == answers) | (answers < 0)).all(1)
    share, interval = wilson(int(right.sum()), len(right))
    return {"exact_match": share, "exact_match_ci": interval}


def answers_of(texts, prompts, data):                      # (N, L) x2 -> (N, L), -1: any token
    """What exact_match asks where the prompts are free (-1). An answer ends with the first token of
    its padding; what follows may be anything."""
    if not data.examples:
        raise BadInput(f"--exact_match needs examples with answers, and {data.source} has none")
    padding = data.tokenizer.encode_ordinary("\n")[0] if data.spec["name"] == "char" else \
        data.tokenizer.eot_token
    x_0 = torch.from_numpy(texts)
    is_padding = (x_0 != padding).flip(1).cumsum(1).flip(1) == 0
    answers = torch.where(prompts < 0, x_0, -1)
    answers[:, 1:][is_padding[:, :-1]] = -1
    return answers.numpy()


# ---- the curve over temperature -----------------------------------------------------------------

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


def following(temperatures, curve, real):
    entropies = [record["entropy"] for record, _ in curve]
    return next_temperature(temperatures, entropies, real["entropy"][0])


def match_entropy(curve, real):
    """Add gen_ppl_matched, read off the curve of a setting at the entropy of held-out text. A point
    is no curve."""
    if len(curve) == 1:
        return
    entropies = np.stack([x["entropy"] for _, x in curve], 1)
    for key in [key for key in real if key.startswith("gen_ppl")]:
        log_ppls = np.log(np.stack([x[key] for _, x in curve], 1))
        x = np.array([ppl_at(*point) for point in zip(real["entropy"], entropies, log_ppls)])
        for record, _ in curve:
            record |= summary(key.replace("gen_ppl", "gen_ppl_matched"), x)


# ---- judges -------------------------------------------------------------------------------------

def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def ask(judge, name, tokens, with_gradients):
    """-> Score, or a sentence on what is wrong with the judge of this name."""
    try:
        score = judge(tokens, GROUPS if with_gradients else 0)
    except torch.OutOfMemoryError:          # run_script names the flags
        raise
    except (RuntimeError, ValueError, LookupError) as error:
        raise BadInput(f"--judge {name} cannot read the text ({first_line(error)}); take another "
                       "judge") from None
    if not (np.isfinite(score.nll).all() and score.tokens.sum()):
        raise BadInput(f"--judge {name} gives NaN, or sees no token in the text; take another")
    return score


def train_judge(path, args, data):
    """Run train.py for the judge of this run, unless there is a whole one."""
    if Path(path).exists():
        state = checkpoint.load(path)
        if state["step"] >= state["updates"]:
            return
    print(f"{path} is not there or not finished: training it", flush=True)
    command = [sys.executable, str(Path(__file__).parent.with_name("train.py")), "--stage=judge",
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


def check_judge(path, meta, data):
    """Can it judge this text?"""
    if meta["process"] != "ar" or meta["tokenizer"] != data.spec:
        raise BadInput(f"{path} cannot judge this text: it is a {meta['process']} model, or of "
                       "another tokenizer; train one with train.py --stage judge")
    if meta["step"] < meta["updates"]:
        raise BadInput(f"{path} has done {meta['step']} of {meta['updates']} updates; finish it "
                       "with train.py --stage judge --resume")
    if meta["data_key"] != data.key:
        raise BadInput(f"{path} was trained on other text than {data.source} and cannot judge it; "
                       "take --judge ar or another file")


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
        ids = tokenizer(data.tokenizer.decode(row), add_special_tokens=False, truncation=True,
                        max_length=longest).input_ids
        return ids or [0]                   # of no text: one token, which is not counted

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return neural_judge(device, forward, encode_row, decode)


# ---- controls: texts that are not good, whatever a single column says ---------------------------

def sample_ngram(model, num_texts, length, seed, temperature=1.0):
    """Texts of evaluate.NGram. A token follows its longest context with the share n / (n + a), else
    a shorter one; in a context with odds n(tokens, c)^(1 / temperature).  -> (num_texts, length)"""
    rng = np.random.default_rng(seed)
    tempered = [np.append(0, (np.diff(sums) ** (1 / temperature)).cumsum())
                for _, sums in model.tables]
    x = np.zeros((num_texts, length), np.int64)
    for i in range(length):
        token = rng.integers(model.K, size=num_texts)
        for k, (grams, sums) in enumerate(model.tables[:i + 1]):
            context = model.codes(x[:, i - k:i + 1], k)[:, 0]     # x[:, i] is 0 as yet
            ends = np.searchsorted(grams, [context, context + model.K])
            n = np.diff(sums[ends], axis=0)[0]
            low, high = tempered[k][ends]
            goal = low + rng.random(num_texts) * (high - low)
            at = np.searchsorted(tempered[k], goal, "right").clip(max=len(grams)) - 1
            is_long = rng.random(num_texts) * (n + model.a) < n
            token = np.where(is_long, grams[at] % model.K, token)
        x[:, i] = token
    return x


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
        few = sample_ngram(ngram, min(num_texts, 256), length, seed, temperature)
        if np.mean([entropy(row) for row in few]) < target:
            low = temperature
        else:
            high = temperature
    return sample_ngram(ngram, num_texts, length, seed, temperature), temperature


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


# ---- two judges, and checks ---------------------------------------------------------------------

def disagreement(records, key):
    """A sentence on the rows that the judge of `key` orders otherwise than the first, or ""."""
    swapped = []
    for a, b in combinations([r for r in records if r["gen_ppl"] and r[key]], 2):
        first, other = math.log(a["gen_ppl"] / b["gen_ppl"]), math.log(a[key] / b[key])
        if first * other < 0:
            labels = [" ".join(cell(r, k) for k in COLUMNS.split()[:4] if k in r) for r in (a, b)]
            swapped.append((min(abs(first), abs(other)), " and ".join(labels)))
    if not swapped:
        return f"gen_ppl and {key}, two judges, order the rows alike"
    return (f"gen_ppl and {key}, two judges, order {len(swapped)} pairs of rows differently, most "
            f"of all {max(swapped)[1]}")


def check_flags(args):
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


def check_number(n, with_mauve):
    if n < (MIN_MAUVE if with_mauve else MIN_TEXTS):
        raise BadInput(f"{n} texts a row, by --num_texts or as half of the held-out ones: an "
                       f"interval needs {MIN_TEXTS}, and MAUVE {MIN_MAUVE} for ten clusters")


def check_text(metas, data):
    """Can the texts of these networks, name -> meta, be compared with this one?"""
    for name, meta in metas.items():
        if meta["tokenizer"] != data.spec:
            raise BadInput(f"{name} has another tokenizer than {data.source}: give the --data that "
                           "it was trained on")
        if meta.get("data_key") != data.key:
            print(f'note: {name} was not trained on {data.source} as it is: what is "held-out" of '
                  "it may have been trained on")
