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
--mauve   with each judge but ngram, against real texts; "real text (other half)" is the ceiling.
          Features: its last hidden state, the mean over the counted positions. (The last position
          alone lets a 6-gram pass: 0.96 beside 0.97 of real text, the mean 0.73 beside 0.95;
          SmolLM2-135M, 200 texts of 64 characters.) Compare at equal judge and number of texts
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
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock               # comes with torch
from tqdm import tqdm

import checkpoint
import rows
from checkpoint import number
from data import BadInput, TextData
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
    smoothing of MacKay and Peto."""

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
    if name.endswith(".pt"):
        return run_judge(name, device, data)
    from experiments.measures import hub_judge
    return hub_judge(name, device, data)


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
        from experiments import measures
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
                ratios["gm" + suffix] = measures.gradient_moment(score.grads, real.grads), 1
            if "mauve" in self.metrics and score.features is not None:
                record["mauve" + suffix] = measures.mauve(score.features, real.features)
        if self.answers is not None and setting["kind"] == "model":
            record |= measures.exact_match(tokens, self.answers)
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
        with checkpoint.prepare(net, dtype):
            batches.append(sample(net, process, *part.shape, steps, rng, prompt=part, **choice))
    tokens, passes = (torch.cat(parts) for parts in zip(*batches))
    return tokens.numpy(), passes.double().mean().item()


def model_rows(nets, settings, prompts, measure, real, temperatures, sweep):
    """-> records. nets: name -> (net, process); settings: (name, {"order" or "ending": choice},
    steps); real: the resampled metrics of held-out text."""
    from experiments.measures import following, match_entropy
    records = []
    base = measure.base
    for name, choice, steps in (bar := tqdm(settings, leave=False, disable=None)):
        curve = []
        todo = list(temperatures)
        for temperature in todo:                           # which may grow on the way
            bar.set_description(f"{name} {' '.join(choice.values())} {steps} at {temperature:g}")
            began = time.time()
            tokens, passes = write_texts(*nets[name], prompts, steps, base["seed"], base["dtype"],
                                         temperature=temperature, **choice)
            curve.append(measure(tokens, kind="model", model=name, **choice, steps=steps,
                                 passes=passes, temperature=temperature,
                                 seconds=time.time() - began))
            if sweep:
                todo += following(todo, curve, real)
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
    path.parent.mkdir(parents=True, exist_ok=True)
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


# ---- command line -------------------------------------------------------------------------------

def parse_args(argv=None):
    p = checkpoint.Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = p.add_argument
    add("--process", choices=("mdlm", "duo"), default="mdlm")
    add("--out", type=Path, help="run folder, default out/<process>")
    add("--models", nargs="+", choices=MODELS, help="default: all that are there")
    add("--init_from", help="one more model: a checkpoint, folder or hub name")
    add("--data", help="default: what the model was trained on")
    add("--cache", default="out/cache", help="folder of tokenised text")
    add("--judge", nargs="+", default=["ar"], help="see above")
    add("--steps", nargs="+", type=number(int, 1),
        help=f"passes at most, default {STEPS}; the masked teacher also {TEACHER_STEPS}")
    add("--temperatures", nargs="+", type=number(float, 1e-3, 1e3), default=[1.0], help="default 1")
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
    add("--seed", type=number(int, 0, 2 ** 32 - 1), default=1)
    add("--device", help="cuda, mps or cpu; default: the first that is there")
    add("--dtype", choices=checkpoint.DTYPES, help="of sampling; bfloat16: by autocast")
    add("--no-compile", action="store_true", help="nothing compiles")
    args = p.parse_args(argv)
    args.out = args.out or Path("out", args.process)
    args.teacher_steps = TEACHER_STEPS if args.process == "mdlm" and not args.steps else []
    args.steps = args.steps or STEPS
    check_args(args)
    return args


def check_args(args):
    if len(args.judge) > len(SUFFIXES) or "none" in args.judge[not args.sweep:]:
        raise BadInput(f"--judge {' '.join(args.judge)}: give {len(SUFFIXES)} at most, and none "
                       "stands alone, without --sweep")
    if args.mauve:
        from experiments.measures import check_mauve
        check_mauve(args)
    if args.records and args.records.exists():
        read_records(args.records)                         # before the hours of work, not after


def load_models(args, device):
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
        nets[name] = net, checkpoint.make_process(metas[name])
    return nets, metas


def load_data(args, metas):
    meta = next(iter(metas.values()))
    source = args.data or meta.get("data")
    if not source:
        raise BadInput(f"{args.init_from} does not say which text to compare with: add --data")
    published = {"wrap_eos": meta["tokenizer"]["name"] == "gpt2"}
    data = TextData(source, meta["tokenizer"]["name"], meta["block_size"], cache=args.cache,
                    wrap_eos=meta.get("defining", published)["wrap_eos"])
    for name, meta in metas.items():
        if meta["tokenizer"] != data.spec:
            raise BadInput(f"{name} has another tokenizer than {source}: give the --data "
                           "that it was trained on")
        if meta.get("data_key") != data.key:
            print(f'note: {name} was not trained on {source} as it is: what is "held-out" of it '
                  "may have been trained on")
    if args.exact_match and not data.examples:
        raise BadInput(f"--exact_match needs examples with answers, and {source} has none")
    return data


def held_out(data, num_texts, least):
    """-> two halves of held-out blocks (N, L); of the first one, prompts and answers (N, L), -1
    where free. An answer ends with the first token of its padding; what follows may be anything."""
    x, free = data.val_blocks(2 * num_texts)
    n = len(x) // 2
    if n < least:
        raise BadInput(f"{n} texts a row, by --num_texts or as half of the held-out ones: an "
                       f"interval needs {GROUPS}, and MAUVE {MIN_MAUVE} for ten clusters")
    x = x[:2 * n]
    first, second = x[::2], x[1::2].numpy()
    if free is None:
        return first.numpy(), second, torch.full_like(first, -1), None
    from experiments.measures import answers_of
    free = free[:2 * n:2]
    answers = answers_of(first, free, data)
    return first.numpy(), second, torch.where(free, -1, first), answers


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
    nets, metas = load_models(args, device)
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
        from experiments.measures import control_rows
        records += control_rows(measure, data, texts, args.seed)
    records += model_rows(nets, settings_of(args, nets, data.block_size), prompts, measure,
                          resampled, args.temperatures, args.sweep)
    provenance = checkpoint.provenance(args.seed, device)
    checkpoint.write_json(args.out / "eval.json", {"provenance": provenance, "records": records})
    if args.records:
        append_records(args.records, [provenance | record for record in records])
    print(records_table(records, columns))
    print(f"{len(texts)} texts of {data.block_size} tokens a row; judge {', '.join(args.judge)}; "
          f"± half of the 95 % interval over texts; more in {args.out / 'eval.json'}")
    for suffix in list(judges)[1:]:
        from experiments.measures import disagreement
        print(disagreement(records, "gen_ppl" + suffix))


def short_table(out, process, device, seed, no_compile=False, cache="out/cache"):
    """What training ends with: few rows and texts, and no judge that needs training."""
    try:
        spec = checkpoint.load(Path(out, "teacher.pt"))["tokenizer"]
        args = parse_args([
            f"--out={out}", f"--process={process}", f"--seed={seed}", f"--cache={cache}",
            f"--device={device}", "--steps", "4", "16", "--ending=map", "--num_texts=32",
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
