# SPDX-License-Identifier: MIT
"""The measures of headline tables, behind flags of evaluate.py.

    --sweep         perplexity where the curve over temperature has held-out entropy
    --mauve         MAUVE on a judge's features
    --controls      texts that some column must expose
    --judge NAME    a pretrained judge: a hub model, or a .gguf file
    --exact_match   the share of prompts answered exactly
    gm              the gradient moment
"""
import math
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from data import BadInput
from evaluate import COLUMNS, cell, entropy, first_line, neural_judge, ngram_of, summary


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


def answers_of(x_0, free, data):                           # (N, L) x2 -> (N, L), -1: any token
    """What exact_match asks. An answer ends with the first token of its padding; what follows may
    be anything."""
    padding = data.tokenizer.encode_ordinary("\n")[0] if data.spec["name"] == "char" else \
        data.tokenizer.eot_token
    is_padding = (x_0 != padding).flip(1).cumsum(1).flip(1) == 0
    answers = torch.where(free, x_0, -1)
    answers[:, 1:][is_padding[:, :-1]] = -1
    return answers.numpy()


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



def check_mauve(args):
    if {*args.judge} <= {"none", "ngram"}:
        raise BadInput(f"--mauve needs the hidden states of a judge and {args.judge[0]} has none: "
                       "add ar, or leave --mauve out")
    if not find_spec("mauve"):
        raise BadInput("--mauve needs a package: pip install -r requirements-eval.txt")


def mauve(p, q):                                           # (N, D), (M, D) -> 0 ... 1
    """MAUVE (arXiv 2102.01454) of two sets of features, a row a text: 1 where they are alike."""
    from mauve import compute_mauve
    return float(compute_mauve(p_features=p, q_features=q, verbose=False).mauve)



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



def following(temperatures, curve, real):
    entropies = [record["entropy"] for record, _ in curve]
    return next_temperature(temperatures, entropies, real["entropy"][0])


def match_entropy(curve, real):
    """Add gen_ppl_matched, read off the curve of a setting at the entropy of held-out text."""
    entropies = np.stack([x["entropy"] for _, x in curve], 1)
    for key in [key for key in real if key.startswith("gen_ppl")]:
        log_ppls = np.log(np.stack([x[key] for _, x in curve], 1))
        x = np.array([ppl_at(*point) for point in zip(real["entropy"], entropies, log_ppls)])
        for record, _ in curve:
            record |= summary(key.replace("gen_ppl", "gen_ppl_matched"), x)



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
    return (f"gen_ppl and {key}, two judges, order {len(swapped)} pairs of rows "
                        f"differently, most of all {max(swapped)[1]}")
