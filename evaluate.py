# SPDX-License-Identifier: MIT
"""How good and how diverse is the text at N passes, against the teacher and against real text?

    python evaluate.py                                   the masked run of out/mdlm
    python evaluate.py --process duo --ending greedy     the uniform run of out/duo
    python evaluate.py --judge gpt2-large --init_from kekchpek/idlm-mdlm --data "novels/*.txt"
    python evaluate.py --plot results/laptop.json        both figures of assets/
    python evaluate.py --table          every table of README.md and results/README.md

Low entropy buys low perplexity, so every setting is swept over the sampling temperature, and the
headline gen_ppl_matched is read off that curve at the entropy of held-out text (the first row);
where the curve does not reach that far it is null. Intervals: bootstrap over texts, 95 %.

--judge   ar: our causal DiT on the same training text, trained by train.py where it is missing
          ngram: of characters, ready in seconds, and a column of its own anyway       none
          FILE.pt: another run's judge           any other name: a model of transformers
Counted: every token but a text's first, which has no context; end-of-text like any other. A model
of transformers reads the decoded text with its own tokenizer, cut to its longest input.
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import idlm_loss
from data import BadInput, TextData
from generator import SCHEDULES, own_temperature, sample, words_first
from teacher import Masked
from train import has_bfloat16, pick_device

METRICS = "gen_ppl bits_per_char entropy known_words distinct4 repetition gm ngram_bits".split()
STEPS = {"mdlm": [1, 4, 8, 16, 64, 256], "duo": [1, 4, 8, 16, 64]}
MODELS, MIN_TEXTS, RESAMPLES, GROUPS = ("teacher", "dcd", "idlm"), 8, 1000, 16
# Columns of the table on the terminal, and of the README's from results/NAME.json: those records
# that have none of these keys, or for NAME.KEY those that have KEY alone of them
VIEWS = {"extra", "knob", "screen", "row_entropy", "held_out_nll"}
TABLES = {
    "": f"process model sampler steps passes temperature gen_ppl_matched {' '.join(METRICS)} "
        "mauve seconds",
    "laptop": "process model latent start sampler schedule temperature steps passes bits_per_char "
        "entropy known_words",
    "novels": "process model start update sampler steps passes gen_ppl_matched gen_ppl entropy "
        "distinct4 gm",
    "novels_grid": "model start update sampler steps gen_ppl_matched gen_ppl entropy distinct4 gm",
    "novels_tuned.knob": "knob value sampler steps gen_ppl_matched gen_ppl entropy distinct4",
    "knobs.knob": "knob value steps gen_ppl_matched gen_ppl entropy known_words distinct4",
    "novels_knobs": "model schedule steps passes gen_ppl_matched gen_ppl entropy distinct4 gm",
    "novels_masked.knob": "knob value steps gen_ppl_matched gen_ppl entropy distinct4",
    "novels.row_entropy": "process model start update t_tilde row_entropy",
    "novels_grid.row_entropy": "process model start update t_tilde row_entropy",
    "laptop_start": "start steps gen_ppl_matched gen_ppl entropy known_words",
    "laptop_latent": "latent steps gen_ppl_matched gen_ppl entropy known_words",
    "laptop_words": "latent steps gen_ppl_matched gen_ppl entropy known_words distinct4",
    "laptop_share": "variant steps gen_ppl entropy known_words distinct4",
    "laptop_spaced": "variant steps gen_ppl entropy known_words distinct4",
    "laptop_axes": "variant steps gen_ppl_matched gen_ppl entropy known_words distinct4 overlap_excess",
    "onepass_cold": "variant temperature fitted_power steps gen_ppl_matched gen_ppl entropy known_words "
        "distinct4 gm",
    "words_fitted": "variant steps temperature fitted_power gen_ppl entropy known_words distinct4 gm",
    "words": "power steps temperature gen_ppl_matched gen_ppl entropy known_words distinct4 gm",
    "laptop_onepass": "variant steps gen_ppl_matched gen_ppl entropy known_words",
    "onepass": "data block_size variant n_texts schedule steps gen_ppl_matched gen_ppl entropy "
        "known_words distinct4 gm copied",
    "onepass.screen": "variant sampler schedule steps gen_ppl_matched gen_ppl entropy known_words "
        "copied",
    "ship": "model schedule begins steps passes gen_ppl_matched gen_ppl entropy known_words "
        "distinct4 repetition",
    "updates": "update steps gen_ppl_matched gen_ppl entropy known_words",
    "own_token": "words update own_token steps gen_ppl_matched gen_ppl entropy known_words",
    "pairing_steps": "pairing steps gen_ppl_matched gen_ppl entropy known_words",
    "pairing": "model pairing steps gen_ppl_matched gen_ppl entropy known_words",
    "schedule": "model judge schedule steps passes gen_ppl_matched gen_ppl entropy known_words",
    "even": "model schedule steps passes gen_ppl entropy known_words distinct4 repetition",
    "beta": "latent texts beta steps gen_ppl_matched gen_ppl entropy known_words",
    "bench_h100": "name change median_ms peak_gib tokens_per_s mfu commit",
    "bench_h200": "name median_ms authors_ms peak_gib authors_gib tokens_per_s mfu commit"}
# Numbers that are no results, so that runs which differ in one are told apart
SETTINGS = {"temperature", "lr", "fake_lr", "ema", "scale", "share", "t_tilde", "beta",
            "power"}
PROVENANCE = {"command", "commit", "device", "torch", "date", "seed"}


# ---- metrics: a number per text, whose mean (or ratio of sums) is the metric --------------------

def entropy(tokens):                                       # (L,) -> nats
    """Unigram entropy of one text. Of "abab": two words of share 1/2, so log 2 = 0.693."""
    p = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return -(p * np.log(p)).sum()


def four_grams(tokens):                                    # (N, L) -> each text's different 4-grams
    x, n = tokens.astype(np.uint64), tokens.shape[1] - 3   # ids are below 2^16: four fit 64 bits
    return [np.unique(g) for g in sum(x[:, j:n + j] << np.uint64(16 * j) for j in range(4))]


def repetition(tokens):                                    # (N, L) -> (N,)
    """Share of a text's 4-grams that stand earlier in it. "ababab": abab baba abab, so 1/3."""
    return 1 - np.array([len(g) for g in four_grams(tokens)]) / (tokens.shape[1] - 3)


def distinct4(tokens):                                     # (N, L) -> (N,)
    """Different 4-grams of all texts over all their 4-grams; compare at equal numbers of texts.

    "abcde", "abcdf": abcd bcde | abcd bcdf, 3 different of 4: 0.75. Resampled texts would repeat
    each other, so the spread is the jackknife's: what a text adds is the share of its 4-grams that
    no other text has (1/2, 1/2), shifted here to the mean 0.75.
    """
    grams, n = four_grams(tokens), tokens.shape[1] - 3
    every, at, texts = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    text = np.repeat(np.arange(len(grams)), [len(g) for g in grams])
    added = np.bincount(text, texts[at] == 1) / n
    return added - added.mean() + len(every) / (len(tokens) * n)


def whole_words(text):
    """Runs of letters and apostrophes but those cut by the text's ends. "he cat's mew": cat's"""
    runs = re.finditer(r"(?:[^\W\d_]|')+", text)
    return [run[0] for run in runs if 0 < run.start() and run.end() < len(text)]


def gradient_moment(g, r):                                 # (m, P), (m, P) -> (m,)
    """Squared distance of the judge's mean gradients on generated and real text (arXiv 2603.20155):
    the mean of <d_i, d_j>, i != j, d_i = g_i - r_i from group i of the texts. Groups are
    independent, so noise adds nothing, as it would to the square of one mean difference.

    One parameter, two groups, g = (1, 3), r = (0, 1): d = (1, 2), so 2; the plain square is 2.25.
    """
    d = torch.as_tensor(g) - torch.as_tensor(r)            # where they are: over 1 GB for GPT-2's
    gram = (d @ d.T).cpu().double().numpy()
    with_others = (gram.sum(1) - np.diag(gram)) / (len(gram) - 1)
    return 2 * with_others - with_others.mean()            # a pair's noise is in both its groups


@lru_cache(maxsize=2)                                      # drawn once for all metrics of a record
def resamples(n, seed):                                    # -> (1 + RESAMPLES, n): how often each
    W = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.concatenate([np.ones_like(W[:1]), W]).astype(float)


def bootstrap(a, b=1, seed=0):                             # (N,), (N,) -> (1 + RESAMPLES,)
    """sum(a) / sum(b), first of the texts, then of resampled texts."""
    a, b = np.broadcast_arrays(np.asarray(a, float), b)
    W = resamples(len(a), seed)
    with np.errstate(invalid="ignore"):
        return W @ a / (W @ b)


def summary(name, x):
    """The value and the central 95 % of its resamples. What lies beyond the measured is None."""
    ends = np.quantile(x[1:], [0.025, 0.975], method="nearest")
    value, *ends = (float(v) if np.isfinite(v) else None for v in (x[0], *ends))
    return {name: value, name + "_ci": ends}


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
    if min(entropies) + margin < target < max(entropies) - margin or len(done) == most:
        return []
    hotter = max(entropies) - margin <= target
    found = round(max(done) + 0.2 if hotter else min(done) - 0.1, 1)
    return [found] * (found > 0)


# ---- judges: score(tokens (N, L), groups) -> nll, counted tokens, characters: (N,) each; gradients

def ngram_judge(data, order=6, a=20.0):
    """p_k(c | k characters) = (n(context c) + a p_{k-1}(c)) / (n(context) + a), p_{-1} = 1 / K
    (MacKay and Peto's smoothing): sums to 1. Reads up to 16.8M characters of training text."""
    if data.spec["name"] != "char":
        raise BadInput(f"--judge ngram is for characters, not {data.spec['name']} tokens: take ar")

    def codes(x, k):                                       # (..., L) -> (..., L - k): k + 1 in one
        return sum(x[..., j:x.shape[-1] - k + j] * data.K ** (k - j) for j in range(k + 1))

    def count(keys, n, code):
        i = np.searchsorted(keys, code).clip(max=len(keys) - 1)
        return n[i] * (keys[i] == code)

    train, tables = np.asarray(data.train[:2 ** 24], dtype=np.int64), []
    for k in range(min(order, int(62 / math.log2(data.K)))):         # codes stay below 2^62
        grams, n = np.unique(codes(train, k), return_counts=True)
        contexts, of = np.unique(grams // data.K, return_inverse=True)
        tables.append(((grams, n), (contexts, np.bincount(of, n))))

    def score(tokens, groups=0):
        x, p = tokens.astype(np.int64), np.full(tokens.shape, 1 / data.K)
        for k, (grams, contexts) in enumerate(tables[:x.shape[1]]):
            code = codes(x, k)
            p[:, k:] = (count(*grams, code) + a * p[:, k:]) / (count(*contexts, code // data.K) + a)
        counted = np.full(len(x), x.shape[1] - 1)
        return -np.log(p[:, 1:]).sum(1), counted, counted, None
    return score


def neural_judge(device, forward, encode, decode):
    """A causal network. forward: ids (B, L) -> hidden (B, L, D), logits (B, L, V); encode: a text's
    tokens -> ids; decode: list of ids -> str."""
    @torch.no_grad()
    def score(tokens, groups=0):
        """With groups of texts: also each group's gradient, nats per token, in the last matrix,
        mean of (p - onehot) h^T: where the text meets the hidden state; they stay on the
        device."""
        ids = [torch.as_tensor(encode(row), dtype=torch.int64) for row in tokens]
        x = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)   # causal: padding goes unseen
        counted = torch.tensor([max(0, len(row) - 1) for row in ids])
        counts = torch.arange(x.shape[1] - 1) < counted[:, None]
        nll, grads, parts = [], [], groups or -(-x.numel() // 8192)
        for part, here in zip(x.tensor_split(parts), counts.tensor_split(parts)):
            part, here = part.to(device), here.to(device)
            h, logits = forward(part)
            log_p, target = logits[:, :-1].float().log_softmax(-1), part[:, 1:, None]
            nll.append(-(log_p.gather(-1, target)[..., 0] * here).sum(1))
            if groups:
                error = log_p.exp().scatter_add_(-1, target, -torch.ones_like(log_p[..., :1]))
                error = error * here[..., None] / here.sum()
                grads.append(torch.einsum("blv,bld->vd", error, h[:, :-1].float()).flatten())
        chars = np.array([len(decode(row[1:].tolist())) for row in ids])
        return (torch.cat(nll).double().cpu().numpy(), counted.numpy(), chars,
                torch.stack(grads) if groups else None)
    return score


def find_judge(name, data, device, out, meta):
    """-> score, or None for --judge none."""
    if name in ("none", "ngram"):
        return ngram_judge(data) if name == "ngram" else None
    if name == "ar" or name.endswith(".pt"):
        path = out / "judge.pt" if name == "ar" else Path(name)
        found = checkpoint.load(path) if path.exists() else {}
        if name == "ar" and found.get("step", -1) < found.get("updates", 0):
            print(f"{path} is not there or not finished: training it", flush=True)
            flags = {k: meta[k] for k in ("process", "data", "block_size")} | {
                "tokenizer": data.spec["name"], "device": device, "out": out, "stage": "judge"}
            subprocess.run([sys.executable, Path(__file__).with_name("train.py"), "--resume",
                            *(f"--{k}={v}" for k, v in flags.items())])
        net, found = checkpoint.load_network(path, device)
        if found["process"] != "ar" or found["tokenizer"] != data.spec:
            raise BadInput(f"{path} cannot judge this text: it is a {found['process']} model, or "
                           f"of another tokenizer; train one on {meta['data']} with --stage judge")
        return neural_judge(
            device,
            lambda x: (h := net.hidden(x, torch.zeros(len(x))), net.project(h)[..., :data.K]),
            list, data.tokenizer.decode)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        net = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False,
                                                   use_safetensors=True).to(device).eval()
    except (ImportError, OSError) as error:
        raise BadInput(f"--judge {name} cannot be loaded ({str(error).splitlines()[0]}): check the "
                       "name, pip install transformers, or take --judge ar") from None
    longest = getattr(net.config, "max_position_embeddings", 1024)
    return neural_judge(
        device, lambda x: ((y := net(x, output_hidden_states=True)).hidden_states[-1], y.logits),
        lambda row: own(data.tokenizer.decode(list(row)), add_special_tokens=False, truncation=True,
                        max_length=longest).input_ids,
        lambda ids: own.decode(ids, clean_up_tokenization_spaces=False))


# ---- evaluation ---------------------------------------------------------------------------------

def evaluate_models(nets, data, judge, *, steps, temperatures=None, num_texts=64, seed=1,
                    metrics=METRICS, mauve=False, judge_name=None, schedules=("even",)):
    """Records, held-out text first. nets: name -> (net, process, samplers); judge may be None.
    temperatures: by default the one that sampling has, then 0.2 hotter or 0.1 colder until the curve
    of each setting has the entropy of held-out text well inside, at most 6; []: that one alone.
    schedules: see generator.step_times."""
    if unknown := set(metrics) - set(METRICS):
        raise BadInput(f"--metrics {' '.join(unknown)}: unknown, choose from {' '.join(METRICS)}")
    L, n_real = data.block_size, min(num_texts, len(data.val) // data.block_size // 2)
    if n_real < MIN_TEXTS:
        raise BadInput(f"{num_texts} texts to write and {n_real} held-out ones: an interval needs "
                       f"{MIN_TEXTS} of both; raise --num_texts or hold out more text")
    blocks, is_char = data.val_blocks(2 * n_real).numpy(), data.spec["name"] == "char"
    groups = min(GROUPS, n_real) if "gm" in metrics else 0
    reference = judge(blocks[1::2], groups)[3] if judge else None    # blocks[0::2]: the first row
    known = set(whole_words(data.train_text())) if is_char and "known_words" in metrics else None
    ngram = ngram_judge(data) if is_char and "ngram_bits" in metrics else None
    records = []

    def decode(tokens):
        return [data.tokenizer.decode(row.tolist()) for row in tokens]

    def measure(tokens, **setting):                        # -> record, {name: (1 + RESAMPLES,)}
        per_text = {"entropy": ([entropy(row) for row in tokens],),
                    "distinct4": (distinct4(tokens),), "repetition": (repetition(tokens),)}
        if known:
            words = [whole_words(text) for text in decode(tokens)]
            per_text["known_words"] = ([sum(word in known for word in text) for text in words],
                                       [len(text) for text in words])
        if ngram:
            nll, counted, *_ = ngram(tokens)
            per_text["ngram_bits"] = nll / math.log(2), counted
        if judge:
            nll, counted, chars, grads = judge(tokens, groups)
            per_text |= {"gen_ppl": (nll, counted), "bits_per_char": (nll / math.log(2), chars)}
            if grads is not None:
                per_text["gm"] = (gradient_moment(grads, reference),)
        x = {name: bootstrap(*ab, seed=(seed, len(records))) for name, ab in per_text.items()}
        if judge:
            x["gen_ppl"] = np.exp(x["gen_ppl"])
        record = setting | dict(judge=judge_name, n_texts=len(tokens), seed=seed, block_size=L)
        for name in METRICS:                               # no gen_ppl goes without its entropy
            if name in x and name in {*metrics, "entropy"}:
                record |= summary(name, x[name])
        if mauve:
            from mauve import compute_mauve
            record["mauve"] = float(compute_mauve(
                p_text=decode(tokens), q_text=decode(blocks[1::2]), verbose=False).mauve)
        records.append(record)
        return record, x

    record, real = measure(blocks[0::2], model="real text", real=True)
    target = record["entropy"]
    settings = [(name, sampler, schedule, n) for name in nets for sampler in nets[name][2]
                for schedule in schedules for n in steps]
    for name, sampler, schedule, n in (bar := tqdm(settings, leave=False, disable=None)):
        (net, process, _), curve = nets[name], []
        how = {"begins": "words"} if words_first(net, process, schedule) else \
            {"latent": "gaussian"} if net.config.latent_dim else {}
        half, own = has_bfloat16(net.device), own_temperature(net, process, n, schedule)
        net.freeze(torch.bfloat16 if half else None)
        todo = [*(temperatures or [own])]
        for temperature in todo:                           # which may grow on the way
            bar.set_description(f"{name} {sampler} {n} {schedule} steps at {temperature}")
            rng, began = torch.Generator().manual_seed(seed), time.time()
            with torch.autocast(net.device.type, dtype=torch.bfloat16, enabled=half):
                tokens, nfe = sample(net, process, num_texts, L, n, rng, temperature=temperature,
                                     ending=sampler, schedule=schedule)
            curve.append(measure(
                tokens.numpy(), seconds=time.time() - began, model=name, sampler=sampler, steps=n,
                schedule=schedule, process="mdlm" if isinstance(process, Masked) else "duo",
                real=False, passes=nfe.double().mean().item(), temperature=temperature,
                own_temperature=temperature == own, dtype="bfloat16" if half else "float32", **how))
            if judge and temperatures is None:
                todo += next_temperature(todo, [r["entropy"] for r, _ in curve], target)
        if judge and len(curve) > 1:
            entropies, ppls = (np.stack([x[k] for _, x in curve]).T for k in ("entropy", "gen_ppl"))
            matched = np.array([*map(ppl_at, real["entropy"], entropies, np.log(ppls))])
            for record, _ in curve:
                record |= summary("gen_ppl_matched", matched)
    return records


# ---- tables and figures -------------------------------------------------------------------------

def load_records(path):
    if not Path(path).exists():
        raise BadInput(f"there are no records at {path}: write them with python evaluate.py")
    found = json.loads(Path(path).read_text())
    return found["records"] if isinstance(found, dict) else found


def write_json(path, found):                               # a record a line
    text = json.dumps(found, allow_nan=False).replace('{"', '\n{"') + "\n"
    checkpoint.write_whole(path, lambda file: file.write(text.encode()))


def average(records):
    """A row per setting. Records that differ in seed, provenance and results (floats) alone are
    its runs: their mean, and as interval mean -+ standard deviation."""
    groups, rows = {}, []
    for r in records:
        key = {k: v for k, v in r.items() if k not in {*PROVENANCE, "train_command"}
               and v is not None and (k in SETTINGS or not isinstance(v, (float, list)))}
        groups.setdefault(repr(sorted(key.items())), []).append(r)
    for runs in groups.values():
        rows.append(dict(runs[0], runs=len(runs)))
        for key in {k for r in runs[1:] for k in r} - SETTINGS:
            values = [r.get(key) for r in runs]
            if None in values:                             # no mean of the runs that reached it
                rows[-1][key] = None
            elif all(isinstance(value, float) for value in values):
                mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
                rows[-1] |= {key: mean, key + "_ci": [mean - sd, mean + sd]}
    return rows


def cell(record, key):
    value, ci = record.get(key), record.get(key + "_ci")
    if key == "gen_ppl_matched" and key in record and value is None:
        return "not reached"                               # the sweep misses held-out entropy
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if ci and record.get("runs", 1) > 1:
        if ci[1] == value:
            return text
        return f"{text} ± {ci[1] - value:.2g}"
    if ci and key.startswith("gen_ppl"):
        text += " [{}, {}]".format(*("open" if end is None else f"{end:.3g}" for end in ci))
    return text


def at_own_temperature(record):                            # of sampling; of real text: none
    return record.get("own_temperature", record.get("temperature") in (None, 1))


def records_table(records, columns=TABLES[""]):
    """Aligned markdown, for the terminal too; without the columns that no record has."""
    columns = [c for c in columns.split() if any(c in r for r in records)]
    rows = [columns] + [[cell(r, c) for c in columns] for r in records]
    width = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * w for w in width])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, width))} |" for row in rows)


def rewrite_tables(readme="README.md", results="results"):
    """Fill every block between <!-- table:NAME --> and <!-- /table:NAME --> from NAME.json."""
    def block(match):
        begin, name, end = match.groups()
        file, _, key = name.partition(".")
        records = load_records(Path(results, file + ".json"))
        rows = average([r for r in records if VIEWS & r.keys() == {key} - {""}])
        if "temperature" not in (columns := TABLES.get(name, TABLES[""])):
            rows = [r for r in rows if at_own_temperature(r)]
        runs = {r["runs"] for r in rows if not r.get("real")} or {1}
        many = " or ".join(str(n) for n in sorted(runs) if n > 1)
        what = f"mean ± standard deviation of {many} runs, " * bool(many) + \
            "one run, in brackets 95 % intervals over texts where there are any" * (1 in runs)
        what = what.strip(", ").replace("s, one", "s; else one")
        return f"{begin}\n{records_table(rows, columns)}\n\n`results/{file}.json`: {what}\n{end}"
    text = re.sub(r"(<!-- table:([\w.]+) -->).*?(<!-- /table:\2 -->)", block,
                  Path(readme).read_text(), flags=re.DOTALL)
    checkpoint.write_whole(readme, lambda file: file.write(text.encode()))


def plot(records, folder="assets"):
    """quality_vs_passes.png: gen_ppl against passes, the matched one where there was a sweep, else
    that of sampling's own temperature with its entropies. frontier.png: gen_ppl against entropy."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
    rows = [r for r in average(records) if r.get("gen_ppl") and not VIEWS & r.keys()]
    if not (real := [r for r in rows if r.get("real")]) or len(real) == len(rows):
        raise BadInput("there is no gen_ppl to plot: evaluate with a judge first")
    matched = any(r.get("gen_ppl_matched") for r in rows)
    mixed = len({r.get("schedule", "linear") for r in rows if r not in real}) > 1
    for name, x, y in (("quality_vs_passes", "passes", "gen_ppl" + "_matched" * matched),
                       ("frontier", "entropy", "gen_ppl")):
        figure, lines, colors = Figure((7.5, 5), dpi=180, layout="constrained"), {}, {}
        ax = figure.subplots()
        for r in rows:
            if r not in real and r.get(y) and (x == "entropy" or at_own_temperature(r)):
                how = " ".join(str(r[k]) for k in ("latent", "start", "update") if r.get(k))
                line = f"{r['process']} {r['model']} {how}, {r['sampler']}".replace(" ,", ",")
                line += f", {r.get('schedule', 'linear')} steps" * mixed
                line = line, r["steps"] * (x == "entropy")
                lines.setdefault(line, []).append(r)
        for (model, steps), line in lines.items():
            found = [r["entropy"] for r in line]
            label = None if model in colors else model + (
                "" if matched or x == "entropy" else
                f", entropy {min(found):.2f} to {max(found):.2f}")
            color = colors.setdefault(model, f"C{len(colors)}")
            bars = [[abs(r[y] - (end or r[y])) for end in r[y + "_ci"]] for r in line]
            ax.errorbar([r[x] for r in line], [r[y] for r in line], np.transpose(bars), marker="o",
                        ms=4, lw=1.3, elinewidth=0.8, capsize=2, color=color, label=label)
            if x == "entropy":
                ax.annotate(steps, (line[-1][x], line[-1][y]), (5, 3), color=color, fontsize=7,
                            textcoords="offset points")
        ax.axhline(real[0]["gen_ppl"], color="black", ls="--", lw=1,
                   label=f"held-out text, entropy {real[0]['entropy']:.2f}")
        if x == "entropy":
            ax.axvline(real[0][x], color="black", ls="--", lw=1)
            ax.set_xlabel("entropy, nats (along a line: temperature; at its end: steps)")
        else:
            ax.set_xscale("log", base=2)
            ax.set_xlabel("network passes")
            ax.xaxis.set_major_formatter("{x:g}")
        ax.set(yscale="log", ylabel=f"{y}, judge {real[0]['judge']}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        ax.grid(alpha=0.25, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, fontsize=6.5, loc="outside lower center", ncols=2)
        figure.savefig(Path(folder, name + ".png"))


# ---- command line -------------------------------------------------------------------------------

def short_table(out, process, device, seed):
    """What training ends with: each model's own temperature, no judge that needs training."""
    spec = checkpoint.load(Path(out, "teacher.pt"))["tokenizer"]
    main(["--out", str(out), "--process", process, "--device", str(device), "--seed", str(seed),
          "--temperatures", "--ending", "greedy", "--metrics", "bits_per_char", "known_words",
          "--judge", "ngram" if spec["name"] == "char" else "none"])


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--process", choices=STEPS, default="mdlm")
    add("--out", type=Path, help="run folder, default out/<process>")
    add("--models", nargs="+", choices=MODELS, help="default: all that are there")
    add("--init_from", help="one more model: a checkpoint, folder or hub name")
    add("--data", default="", help="default: what the model was trained on")
    add("--judge", default="ar", help="see above")
    add("--steps", nargs="+", type=int, help=f"network passes at most, default {STEPS}")
    add("--temperatures", nargs="*", type=float,
        help="default: sampling's own, then whatever brackets the entropy of held-out text; no\n"
             "number: its own alone")
    add("--ending", nargs="+", choices=("ancestral", "greedy", "greedy-published"),
        default=["ancestral", "greedy"], help="last step of the uniform process")
    add("--schedule", nargs="+", choices=SCHEDULES, help="of the steps, default even; see sample.py")
    add("--num_texts", type=int, help="per setting, default 64 on a CPU, else 512")
    add("--metrics", nargs="+", default=METRICS, help=" ".join(METRICS))
    add("--mauve", action="store_true", help="MAUVE too, where mauve-text is installed")
    add("--records", type=Path, help="append the records to this list, such as results/laptop.json")
    add("--plot", nargs="?", const="", metavar="JSON", help="draw JSON, or out/<process>/eval.json")
    add("--table", action="store_true", help="rewrite the tables of both README.md")
    add("--seed", type=int, default=1)
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    args = p.parse_args(argv)
    args.out = args.out or Path("out", args.process)
    if min(args.steps or [1]) < 1 or min(args.temperatures or [1]) <= 0:
        raise BadInput(f"--steps {args.steps} --temperatures {args.temperatures}: use positives")
    if args.mauve and not find_spec("mauve"):
        raise BadInput("--mauve needs a package: pip install mauve-text")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.table:
        for page in filter(Path.exists, map(Path, ("README.md", "results/README.md"))):
            rewrite_tables(page)
    if args.plot is not None:
        plot(load_records(args.plot or args.out / "eval.json"))
    if args.table or args.plot is not None:
        return
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")
    # In few steps the uniform sampler asks the head at most rows: fused, at half the memory traffic.
    idlm_loss.COMPILE = device.type == "cuda" and args.process == "duo"
    torch._dynamo.config.cache_size_limit = 64
    names = args.models or [n for n in MODELS if (args.out / f"{n}.pt").exists()]
    if not args.models and not args.init_from and "idlm" not in names:
        raise BadInput(f"there is no generator in {args.out} yet: run python train.py first, or "
                       "name what there is with --models")
    paths = {n: args.out / f"{n}.pt" for n in names}
    if args.init_from:
        paths[args.init_from] = args.init_from
    loaded = {n: checkpoint.load_network(path, device, args.process) for n, path in paths.items()}
    meta = next(iter(loaded.values()))[1]
    meta["data"] = args.data or meta.get("data")
    if not meta["data"]:
        raise BadInput(f"{args.init_from} does not say which text to compare with: add --data")
    data = TextData(meta["data"], meta["tokenizer"]["name"], meta["block_size"])
    if wrong := [n for n in loaded if loaded[n][1]["tokenizer"] != data.spec]:
        raise BadInput(f"{wrong[0]} has another tokenizer than {meta['data']}: give its own --data")
    endings = args.ending if args.process == "duo" else ["ancestral"]
    nets = {n: (net, checkpoint.make_process(m), endings) for n, (net, m) in loaded.items()}
    judge = find_judge(args.judge, data, device, args.out, meta)
    # even steps of the masked process are no more than there are positions
    most = math.inf if args.process == "duo" else meta["block_size"]
    args.steps = args.steps or [n for n in STEPS[args.process] if n <= most]
    records = evaluate_models(
        nets, data, judge, steps=args.steps, temperatures=args.temperatures, seed=args.seed,
        num_texts=args.num_texts or (64 if device.type == "cpu" else 512), metrics=args.metrics,
        mauve=args.mauve, judge_name=args.judge,
        schedules=args.schedule or ["even" if args.process == "mdlm" else "linear"])
    provenance = checkpoint.provenance(args.seed, device) | {"judge": args.judge}
    write_json(args.out / "eval.json", {"provenance": provenance, "records": records})
    if args.records:
        earlier = load_records(args.records) if args.records.exists() else []
        write_json(args.records, earlier + [provenance | r for r in records])
    print(f"{records_table(records)}\n{records[0]['n_texts']} texts of {data.block_size} tokens a "
          f"row, judge {args.judge}; all intervals in {args.out / 'eval.json'}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"evaluate.py: {error}")
