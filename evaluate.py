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
To reuse: copy the metrics; they need numpy alone, as do overlap and whole_words in
experiments/measures.py, where every column lies that may be left out.
"""
import argparse
import math
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
import rows
from checkpoint import number
from data import BadInput, TextData
from experiments.collect import append_records, read_records
from generator import ENDINGS, ORDERS, sample

METRICS = ["overlap", "known_words", "gm"]                # those that may be left out
COLUMNS = ("model order ending steps passes temperature gen_ppl_matched gen_ppl bits_per_char "
           "entropy distinct4 repetition overlap known_words mauve gm exact_match")
SUFFIXES = "", "_2", "_3", "_4"                           # of the columns of each judge
STEPS = [1, 4, 8, 16, 64]
TEACHER_STEPS = [256]      # more ones, of the masked teacher
MODELS = "teacher", "dcd", "idlm"
RESAMPLES = 1000
BATCH_TOKENS = 2 ** 17     # written at once, whatever --num_texts
JUDGE_TOKENS = 2 ** 12     # read at once: 50,257 logits each are 0.8 GB
NGRAM_TOKENS = 2 ** 24     # of training text that an n-gram model counts


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
    every, texts = np.unique(np.concatenate(grams), return_counts=True)
    alone = [(texts[np.searchsorted(every, row)] == 1).sum() for row in grams]
    n = tokens.shape[1] - 3
    added = np.array(alone) / n
    return added - added.mean() + len(every) / (len(tokens) * n)


@lru_cache(maxsize=2)                                      # drawn once for all metrics and rows
def resamples(n, seed):                                    # -> (1 + RESAMPLES, n): counts of a text
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.vstack([np.ones(n), counts])


def bootstrap(a, b=1, seed=0):                             # (N,), (N,) -> (1 + RESAMPLES,)
    """sum(a) / sum(b), first of the texts, then of resampled texts."""
    counts = resamples(len(a), seed)
    with np.errstate(invalid="ignore"):                    # 0 / 0: there is none
        return counts @ a / (counts @ np.broadcast_to(b, len(a)))


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
    grads: torch.Tensor = None              # (groups, P), see experiments/measures.py


class NGram:
    """p_k(c | k tokens) = (n(tokens, c) + a p_{k-1}(c)) / (n(tokens) + a), p_{-1} = 1 / K, the
    smoothing of MacKay and Peto."""

    def __init__(self, data, order, a=20.0):
        train = data.train[:NGRAM_TOKENS].astype(np.int64)[..., data.examples:]
        self.K = data.K
        self.a = a
        self.tables = []
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


@lru_cache(maxsize=1)                       # counted once for a judge and a control
def ngram_of(data):
    """6-grams of characters, bigrams of BPE tokens."""
    return NGram(data, 6 if data.spec["name"] == "char" else 2)


def neural_judge(device, forward, encode_row, decode):
    """A causal network. forward: ids (B, L) -> hidden (B, L, D), logits (B, L, V); encode_row: a
    text's tokens -> ids; decode: list of ids -> str."""
    @torch.no_grad()
    def score(tokens, groups=0):
        """groups of texts: the metric gm compares their gradients."""
        from experiments.measures import Gradients
        ids = [torch.tensor(encode_row(row)) for row in tokens.tolist()]
        size = max(1, JUDGE_TOKENS // max(map(len, ids)))
        gradients = Gradients(len(ids), groups)
        nll = []
        features = []
        for i in range(0, len(ids), size):
            x = pad_sequence(ids[i:i + size], batch_first=True, padding_value=-1).to(device)
            target = x[:, 1:, None]
            counts = target >= 0
            h, logits = forward(x.clamp(min=0))            # causal: padding goes unseen
            h = h[:, :-1]
            log_p = logits[:, :-1].log_softmax(-1)
            nll += (-log_p.gather(-1, target.clamp(min=0)) * counts).sum((1, 2)).tolist()
            features.append((h * counts).sum(1) / counts.sum(1).clamp(min=1))
            gradients.add(i, h, log_p, target)
        counted = np.array([len(row) - 1 for row in ids])
        chars = np.array([len(decode(row[1:].tolist())) for row in ids])
        return Score(np.array(nll), counted, chars, torch.cat(features).cpu().numpy(),
                     gradients.means())
    return score


def run_judge(path, device, data):
    """A judge that train.py wrote."""
    from experiments.measures import check_judge
    net, meta = checkpoint.load_network(path, device)
    check_judge(path, meta, data)

    def forward(x):
        h = net.hidden(x, torch.zeros(len(x)))
        return h, net.project(h)
    return neural_judge(device, forward, list, data.tokenizer.decode)


def load_judge(name, args, device, data):
    """-> a function (tokens (N, L), groups) -> Score"""
    from experiments.measures import hub_judge, train_judge
    if name == "ngram":
        if data.spec["name"] != "char":
            raise BadInput(f"--judge ngram is for characters, not {data.spec['name']} tokens: "
                           "take ar")
        return ngram_of(data)
    if name == "ar":
        name = f"{args.out}/judge.pt"
        train_judge(name, args, data)
    if name.endswith(".pt"):
        return run_judge(name, device, data)
    return hub_judge(name, device, data)


# ---- evaluation ---------------------------------------------------------------------------------

class Measure:
    """measure(tokens (N, L), **setting) -> record, {metric: (1 + RESAMPLES,)}

    judges      suffix of their columns -> judge
    reference   (N, L) held-out tokens, which overlap, gm and mauve compare with
    base        what every record holds
    metrics     of METRICS, and "mauve"
    answers     (N, L) tokens, -1 where any will do: what exact_match asks of a model's texts
    """

    def __init__(self, data, judges, reference, base, metrics=METRICS, answers=None):
        from experiments.measures import Extras
        self.judges = judges
        self.base = base
        self.metrics = metrics
        self.extras = Extras(metrics, data, reference, self.scores(reference), answers)

    def scores(self, tokens):
        from experiments.measures import ask
        return {suffix: ask(judge, self.base["judge" + suffix], tokens, "gm" in self.metrics)
                for suffix, judge in self.judges.items()}

    def __call__(self, tokens, **setting):
        record = self.base | setting | {"n_texts": len(tokens)}

        def mean(a, b=1):
            return bootstrap(a, b, record["seed"])

        x = {"entropy": mean([entropy(row) for row in tokens]),
             "distinct4": mean(distinct4(tokens)),
             "repetition": mean(repetition(tokens))}
        scores = self.scores(tokens)
        for suffix, score in scores.items():
            x["gen_ppl" + suffix] = np.exp(mean(score.nll, score.tokens))
            x["bits_per_char" + suffix] = mean(score.nll / math.log(2), score.chars)
        resampled, values = self.extras(tokens, scores, record)
        x |= resampled
        record |= values
        for name in x:
            record |= summary(name, x[name])
        return record, x


def write_texts(net, process, prompts, steps, seed, dtype, **choice):
    """prompts (N, L), -1 where free -> tokens (N, L), mean number of passes.

    In batches of fixed size, each with a generator made from (seed, batch): memory is bounded
    whatever N is, and more texts leave the first batches as they are.
    """
    batches = []
    for i, part in enumerate(prompts.split(max(1, BATCH_TOKENS // prompts.shape[1]))):
        state = np.random.SeedSequence([seed, i]).generate_state(1)  # 32 bits: torch reads no more
        rng = torch.Generator().manual_seed(state.item())
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
    for name, choice, steps in tqdm(settings, leave=False, disable=None):
        curve = []
        todo = list(temperatures)
        for temperature in todo:                           # which may grow on the way
            began = time.time()
            tokens, passes = write_texts(*nets[name], prompts, steps, base["seed"], base["dtype"],
                                         temperature=temperature, **choice)
            curve.append(measure(tokens, kind="model", model=name, **choice, steps=steps,
                                 passes=passes, temperature=temperature,
                                 seconds=time.time() - began))
            if sweep:
                todo += following(todo, curve, real)
        match_entropy(curve, real)
        records += [record for record, _ in curve]
    return records


# ---- table --------------------------------------------------------------------------------------

def half_width(interval):                   # of equal texts 0, not a rounding error
    return round((interval[1] - interval[0]) / 2, 9)


def cell(record, key):
    """12.3 ±0.4: the value and half its interval."""
    value = record.get(key)
    interval = record.get(key + "_ci")
    if value is None:
        return "not reached" if "matched" in key and key in record else "–"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if not interval:
        return text
    if None in interval:
        return text + " ±open"
    half = half_width(interval)
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
    from experiments.measures import check_flags
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
    add("--order", nargs="+", choices=ORDERS, default=ORDERS[:2], help="masked; random, even")
    add("--ending", nargs="+", choices=ENDINGS, default=ENDINGS, help="uniform process, else all")
    add("--num_texts", type=int, help="a row, default 64 on a CPU, else 512")
    add("--metrics", nargs="*", choices=METRICS, default=METRICS,
        help="beside gen_ppl, bits_per_char, entropy, distinct4 and repetition")
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
    check_flags(args)
    return args


def load_models(args, device):
    """-> {name: (net, process)}, the text to compare with"""
    from experiments.measures import check_text
    names = args.models or [n for n in MODELS if (args.out / f"{n}.pt").exists()]
    if not (args.models or args.init_from or "idlm" in names):
        raise BadInput(f"there is no generator in {args.out} yet: run python train.py first, or "
                       "name what there is with --models")
    paths = {name: args.out / f"{name}.pt" for name in names}
    if args.init_from:
        paths[args.init_from] = args.init_from
    nets = {}
    metas = {}
    for name, path in paths.items():
        net, metas[name] = checkpoint.load_network(path, device, args.process)
        nets[name] = net, checkpoint.make_process(metas[name])
    data = load_data(args, next(iter(metas.values())))
    check_text(metas, data)
    return nets, data


def load_data(args, meta):
    """The text that a network of this `meta` was trained on, or --data."""
    source = args.data or meta.get("data")
    if not source:
        raise BadInput(f"{args.init_from} does not say which text to compare with: add --data")
    name = meta["tokenizer"]["name"]
    wrap_eos = meta.get("defining", {}).get("wrap_eos", name == "gpt2")
    return TextData(source, name, meta["block_size"], cache=args.cache, wrap_eos=wrap_eos)


def held_out(data, num_texts):
    """-> two halves of held-out blocks (N, L), and prompts of the first one, -1 where free."""
    x, free = data.val_blocks(2 * num_texts)
    n = len(x) // 2 * 2
    prompts = torch.full_like(x, -1) if free is None else x.masked_fill(free, -1)
    return x[:n:2].numpy(), x[1:n:2].numpy(), prompts[:n:2]


def settings_of(args, names, length):
    """-> [(name of a network, {"order" or "ending": choice}, steps)]"""
    key, choices = ("order", args.order) if args.process == "mdlm" else ("ending", args.ending)
    settings = []
    for name in names:
        for choice in choices:
            steps = args.steps + args.teacher_steps * (name == "teacher")
            if choice in ORDERS[1:]:                       # a step reveals a position or more
                steps = [min(n, length) for n in steps]
            settings += [(name, {key: choice}, n) for n in sorted({*steps})]
    return settings


def evaluate(args, columns=COLUMNS):
    """Everything between the flags and the table."""
    from experiments import measures
    device = checkpoint.pick_device(args.device)
    dtype = checkpoint.pick_dtype(args.dtype, device)
    torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
    rows.COMPILE = device.type == "cuda" and not args.no_compile
    nets, data = load_models(args, device)
    num_texts = args.num_texts or (64 if device.type == "cpu" else 512)
    texts, reference, prompts = held_out(data, num_texts)
    measures.check_number(len(texts), args.mauve)
    answers = measures.answers_of(texts, prompts, data) if args.exact_match else None
    base = {"process": args.process, "block_size": data.block_size, "seed": args.seed,
            "dtype": dtype}
    judges = {}
    for suffix, name in zip(SUFFIXES, args.judge):
        base["judge" + suffix] = name
        if name != "none":
            judges[suffix] = load_judge(name, args, device, data)
    measure = Measure(data, judges, reference, base, args.metrics + ["mauve"] * args.mauve, answers)
    real, resampled = measure(texts, kind="real", model="real text" + " (other half)" * args.mauve)
    records = [real]
    if args.controls:
        records += measures.control_rows(measure, data, texts, args.seed)
    records += model_rows(nets, settings_of(args, nets, data.block_size), prompts, measure,
                          resampled, args.temperatures, args.sweep)
    path = args.out / "eval.json"
    checkpoint.write_json(path, {"provenance": checkpoint.provenance(args.seed, device),
                                 "records": records})
    if args.records:
        append_records(args.records, read_records(path))
    print(records_table(records, columns))
    print(f"{len(texts)} texts of {data.block_size} tokens a row; judge {', '.join(args.judge)}; "
          f"± half of the 95 % interval over texts; more in {path}")
    for suffix in list(judges)[1:]:
        print(measures.disagreement(records, "gen_ppl" + suffix))


def short_table(out, process, device, seed, no_compile=False, cache="out/cache"):
    """What training ends with: few rows and texts, and no judge that needs training."""
    try:
        spec = checkpoint.load(Path(out, "teacher.pt"))["tokenizer"]
        args = parse_args([
            f"--out={out}", f"--process={process}", f"--seed={seed}", f"--cache={cache}",
            f"--device={device}", "--steps", "4", "16", "--ending=map", "--num_texts=32",
            "--metrics=known_words", "--judge=ngram" if spec["name"] == "char" else "--judge=none"])
        args.no_compile = no_compile
        args.teacher_steps = TEACHER_STEPS
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
