"""Metrics, judges, controls, records, tables, figure.    python -m pytest tests/test_evaluate.py"""
import json
import math
import re
import shutil
import sys
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import generator
import train
from data import BadInput, TextData
from evaluate import NGram, Score, bootstrap, entropy, summary
from experiments import measures, tables
from experiments.measures import ppl_at, sample_ngram
from generator import Sample
from model import DiT, ModelConfig
from teacher import Masked

ROOT = Path(__file__).resolve().parent.parent
L = 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200,000 characters of Shakespeare in blocks of L: 250 of them are held out."""
    folder = tmp_path_factory.mktemp("data")
    text = (ROOT / "data/shakespeare.txt").read_text(encoding="utf-8")[:200_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return TextData(str(folder / "text.txt"), "char", L, cache=str(folder / "cache"))


@pytest.fixture(scope="module")
def ngram(data):
    return NGram(data, 6)


def tiny(vocab_size, causal=False, seed=0):
    """A network whose output does depend on its input (a fresh one predicts the flat row)."""
    torch.manual_seed(seed)
    net = DiT(ModelConfig(vocab_size, num_layers=1, num_heads=2, width=16, cond_dim=8, dropout=0.0,
                          causal=causal))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def codes(*texts):
    return np.array([[ord(c) for c in text] for text in texts])


def causal_judge(net):
    def forward(x):
        h = net.hidden(x, torch.zeros(len(x)))
        return h, net.project(h)
    return evaluate.neural_judge(net.device, forward, list, lambda ids: "x" * len(ids))


BASE = {"process": "mdlm", "block_size": L, "seed": 1, "dtype": "float32", "judge": "a judge"}
COLUMNS = "gen_ppl bits_per_char entropy distinct4 repetition overlap known_words".split()


# ---- metrics ------------------------------------------------------------------------------------

def test_examples_of_the_docstrings():
    assert entropy(codes("abab")[0]) == pytest.approx(math.log(2))
    assert entropy(codes("aabc")[0]) == pytest.approx(1.5 * math.log(2))     # 1/2, 1/4, 1/4
    assert evaluate.repetition(codes("ababab", "abcdef")) == pytest.approx([1 / 3, 0])
    assert evaluate.distinct4(codes("abcde", "abcdf")) == pytest.approx([0.75, 0.75])
    assert evaluate.distinct4(codes("abcde", "abcde", "vwxyz")).mean() == pytest.approx(4 / 6)
    assert measures.overlap(codes("abcde", "abcdf")) == pytest.approx([0.5, 0.5])
    assert measures.overlap(codes("abcdef", "abcdxx", "abcdab")) == pytest.approx([1 / 3] * 3)
    assert measures.overlap(codes("aaaaab", "aaaaaa")) == pytest.approx([0.5, 1])   # different ones
    assert measures.whole_words("he cat's mew") == ["cat's"]
    assert measures.whole_words("\nO, 'tis 3 x_y!") == ["O", "'tis", "x", "y"]
    assert measures.whole_words("cut") == measures.whole_words("") == []
    g, r = np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]])
    assert measures.gradient_moment(g, r).mean() == pytest.approx(2)
    assert ppl_at(2.6, np.array([2.5, 2.7]), np.array([1.0, 1.4])) == pytest.approx(math.exp(1.2))


def test_wilson_interval_solves_its_equation():
    """Its ends are the shares q for which (p - q)^2 = z^2 q (1 - q) / n."""
    for right, n in ((0, 10), (3, 10), (10, 10), (450, 1000)):
        p, ends = measures.wilson(right, n)
        assert p == right / n
        for q in ends:
            assert (p - q) ** 2 == pytest.approx(1.96 ** 2 * q * (1 - q) / n, abs=1e-12)
        assert ends[0] <= p <= ends[1] and ends[0] < ends[1]


def test_four_grams_of_large_vocabularies_stay_apart():
    """Ids up to 65,535 fill all 64 bits: against tuples."""
    x = np.random.default_rng(0).choice([0, 1, 255, 65_535, 50_256], (5, 60))
    tuples = [tuple(row[i:i + 4]) for row in x.tolist() for i in range(57)]
    assert evaluate.distinct4(x).mean() == pytest.approx(len(set(tuples)) / len(tuples))
    texts = [set(tuples[57 * i:57 * i + 57]) for i in range(5)]
    assert evaluate.repetition(x) == pytest.approx([1 - len(text) / 57 for text in texts])
    after = texts[1:] + texts[:1]
    assert measures.overlap(x) == pytest.approx([len(a & b) / len(a) for a, b in zip(texts, after)])


def test_gradient_moment_is_unbiased(fewer_resamples):
    """d_i = mu + noise of variance 1 in P = 50 coordinates, m = 8 groups, |mu|^2 = 0.5. The square
    of the mean difference would be 0.5 + 50/8 = 6.75. Var <= 4 |mu|^2 / 8 + 2 P / 56 = 2.0, so the
    mean of 2,000 has sd 0.032; 0.15 is 4.7 of them: false alarm below 1e-5. The intervals of 200
    should cover 0.5 about 0.95 of the time, sd 0.015: below 0.85 has odds below 1e-6."""
    rng = np.random.default_rng(0)
    r = rng.normal(size=(2000, 8, 50)) * math.sqrt(0.5)
    g = rng.normal(size=(2000, 8, 50)) * math.sqrt(0.5) + 0.1
    values = [measures.gradient_moment(a, b) for a, b in zip(g, r)]
    assert abs(np.mean(values) - 0.5) < 0.15
    drawn = iter(values)
    assert coverage(0.5, lambda: (next(drawn),), 200) > 0.85


@pytest.fixture
def fewer_resamples(monkeypatch):
    """300 instead of 1,000, which cost most of the time."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 300)
    evaluate.resamples.cache_clear()
    yield
    evaluate.resamples.cache_clear()


def coverage(truth, draw, n):
    hit = 0
    for i in range(n):
        x = bootstrap(*draw(), seed=i)
        low, high = summary("x", x)["x_ci"]
        hit += low <= truth <= high
    return hit / n


def test_interval_covers_what_it_should(fewer_resamples):
    """Ratios of a known mean (gamma sums over random lengths), 50 texts. Percentile intervals of 50
    skewed values cover about 0.93 of the time; 400 trials have sd 0.013, so [0.88, 0.985] is missed
    with odds below 1e-4, while an interval half as wide covers 0.67."""
    rng = np.random.default_rng(0)

    def draw():
        b = rng.integers(5, 15, 50)
        return rng.gamma(b * 1.0, 2.0), b
    assert 0.88 < coverage(2.0, draw, 400) < 0.985


def test_interval_of_distinct4(fewer_resamples):
    """Texts of a Zipf source: the intervals should cover the expected distinct-4 of as many texts
    (the mean over 300 draws) about 0.95 of the time. 300 trials have sd 0.013: below 0.88 is 5 of
    them, and not one miss has odds of 0.95^300 = 2e-7."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 13) ** 1.2
    draws = [evaluate.distinct4(rng.choice(12, (30, 40), p=p / p.sum())) for _ in range(300)]
    truth = np.mean([d.mean() for d in draws])
    drawn = iter(draws)
    assert 0.88 < coverage(truth, lambda: (next(drawn),), 300) < 1


def test_matched_gen_ppl_never_extrapolates():
    """log ppl = 3 H - 5 at H = 2.5, 2.9, 2.7: exact between, open outside; an interval with an end
    outside the curve is open at that end only."""
    H = np.array([2.5, 2.9, 2.7])
    for target in (2.5, 2.6, 2.85, 2.9):
        assert ppl_at(target, H, 3 * H - 5) == pytest.approx(math.exp(3 * target - 5))
    assert ppl_at(2.49, H, 3 * H - 5) == -np.inf and ppl_at(2.91, H, 3 * H - 5) == np.inf
    targets = np.concatenate([[2.85], np.random.default_rng(0).normal(2.85, 0.04, 1000)])
    matched = summary("m", np.array([ppl_at(t, H, 3 * H - 5) for t in targets]))
    assert matched["m"] == pytest.approx(math.exp(3.55))
    low, high = matched["m_ci"]
    assert high is None and low == pytest.approx(math.exp(3 * 2.77 - 5), rel=0.05)
    assert summary("m", np.full(1001, np.inf)) == {"m": None, "m_ci": [None, None]}


def test_next_temperature():
    """Entropy 2.7 + 0.3 (T - 1): from 1 toward the target, a little beyond it, at most 6 times,
    above 0."""
    def sweep(target, start=1.0):
        done = [start]
        while more := measures.next_temperature(done, [2.7 + 0.3 * (T - 1) for T in done], target):
            done += more
        return done

    assert sweep(2.79) == sweep(2.75) == [1.0, 1.2, 1.4] and sweep(2.65) == [1.0, 0.9, 0.8, 0.7]
    assert sweep(2.72) == [1.0, 1.2, 0.9]
    assert sweep(9.0) == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0] and len(sweep(0.0)) == 6
    assert sweep(0.0, 0.5) == [0.5, 0.4, 0.3, 0.2, 0.1] and sweep(0.0, 0.82)[:3] == [0.82, 0.7, 0.6]


# ---- judges -------------------------------------------------------------------------------------

def test_causal_judge_against_step_by_step_scoring(monkeypatch):
    """Token i + 1 from a pass over tokens <= i alone, whatever is read at once; and no look ahead.
    The features are the mean of the hidden states that tokens are counted from."""
    net = tiny(11, causal=True)
    x = np.random.default_rng(0).integers(0, 11, (5, 9))
    score = causal_judge(net)(x, groups=2)
    for row, total, feature in zip(torch.from_numpy(x), score.nll, score.features):
        steps = 0.0
        for i in range(1, 9):
            logits = net(row[None, :i], torch.zeros(1))[0, -1]
            steps -= logits.double().log_softmax(-1)[row[i]].item()
        assert total == pytest.approx(steps, rel=1e-5)
        hidden = net.hidden(row[None], torch.zeros(1))[0, :8]
        assert feature == pytest.approx(hidden.mean(0).detach().numpy(), abs=1e-5)
    assert score.tokens.tolist() == score.chars.tolist() == [8] * 5
    monkeypatch.setattr(evaluate, "JUDGE_TOKENS", 1)          # a text at a time
    again = causal_judge(net)(x)
    assert again.nll == pytest.approx(score.nll, rel=1e-6) and again.grads is None
    assert causal_judge(net)(x, 2).grads == pytest.approx(score.grads, abs=1e-6)


def test_gradients_of_the_judge_against_autograd():
    net = tiny(11, causal=True)
    x = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(0))
    grads = causal_judge(net)(x.numpy(), groups=3).grads
    for i in range(3):
        part = x[2 * i:2 * i + 2]
        loss = torch.nn.functional.cross_entropy(net(part, torch.zeros(2))[:, :-1].flatten(0, 1),
                                                 part[:, 1:].flatten())
        wanted, = torch.autograd.grad(loss, net.output_layer.linear.weight)
        assert grads[i] == pytest.approx(wanted.flatten().numpy(), abs=1e-6)


def stand_in(net, asked):
    """transformers with one model, whose tokenizer drops spaces and whose longest input is 20."""
    class Tokenizer:
        def __call__(self, text, add_special_tokens, truncation, max_length):
            assert truncation and not add_special_tokens
            return types.SimpleNamespace(input_ids=ids_of(text)[:max_length])

        def decode(self, ids, clean_up_tokenization_spaces):
            return "?" * len(ids)

    class Model(torch.nn.Module):
        config, dtype = types.SimpleNamespace(max_position_embeddings=20), torch.float32

        def forward(self, x, output_hidden_states):
            h = net.hidden(x, torch.zeros(len(x)))
            return types.SimpleNamespace(hidden_states=(None, h), logits=net.project(h))

    def loader(what):
        def from_pretrained(name, **options):
            asked.append((name, options))
            return what
        return types.SimpleNamespace(from_pretrained=from_pretrained)
    return types.SimpleNamespace(AutoTokenizer=loader(Tokenizer()),
                                 AutoModelForCausalLM=loader(Model()))


def ids_of(text):
    """Without spaces and short words, so that texts are shorter than 20 ids, too."""
    return [ord(c) % 200 for word in text.split() if len(word) > 4 for c in word]


@pytest.mark.parametrize("name, place, file", [("gpt2-large", "gpt2-large", None),
                                               ("folder/small.gguf", "folder", "small.gguf")])
def test_a_pretrained_judge_reads_text_with_its_tokenizer(data, monkeypatch, name, place, file):
    """Texts of different lengths are padded without effect and cut at the longest input; nothing
    foreign is executed on loading; a .gguf is named beside its folder."""
    net, asked = tiny(200, causal=True), []
    monkeypatch.setitem(sys.modules, "transformers", stand_in(net, asked))
    score = evaluate.load_judge(name, None, torch.device("cpu"), data)
    assert [place, place] == [where for where, _ in asked]
    assert all(options.get("gguf_file") == file for _, options in asked)
    assert all(options["trust_remote_code"] is False for _, options in asked)
    assert asked[1][1]["use_safetensors"]
    x = data.val_blocks(4).x_0.numpy()
    scores = score(x, 2)
    for row, total, n, feature in zip(x, scores.nll, scores.tokens, scores.features):
        ids = torch.tensor([ids_of(data.tokenizer.decode(row.tolist()))[:20]])
        hidden = net.hidden(ids, torch.zeros(1))[0, :-1]
        assert feature == pytest.approx(hidden.mean(0).detach().numpy(), abs=1e-4)
        log_p = net(ids, torch.zeros(1)).log_softmax(-1)[0, :-1]
        assert n == ids.shape[1] - 1 <= 19
        assert total == pytest.approx(-log_p.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4)
    assert scores.grads.shape == (2, 200 * 16)


def test_ngram_sums_to_one_and_is_its_formula(data):
    """Against a dictionary of counts and the recursion written out; the sum over all continuations
    of seen, unseen and cut-off contexts is 1. Of 30,000 characters."""
    K = data.K
    few = types.SimpleNamespace(train=data.train[:30_000], K=K, examples=False, block_size=L)
    ngram, x = NGram(few, 6), few.train.tolist()
    grams = Counter(tuple(x[i:i + k]) for k in range(1, 7) for i in range(len(x) - k + 1))
    followed = Counter(tuple(x[i:i + k]) for k in range(6) for i in range(len(x) - k))

    def p(context, c):
        below = p(context[1:], c) if context else 1 / K
        return (grams[context + (c,)] + 20 * below) / (followed[context] + 20)

    seen = np.array(x[10_000:10_024]).reshape(3, 8)
    unseen = np.random.default_rng(0).integers(K, size=(3, 8))
    for row in np.concatenate([seen, unseen]):
        tokens = tuple(row.tolist())
        wanted = [math.log(p(tokens[max(0, i - 5):i], tokens[i])) for i in range(1, 8)]
        assert ngram(row[None]).nll == pytest.approx([-sum(wanted)], rel=1e-9)
        for n in (1, 3, 7):
            longer = np.concatenate([np.repeat(row[None, :n], K, 0), np.arange(K)[:, None]], 1)
            before = ngram(row[None, :n]).nll if n > 1 else 0
            assert np.exp(before - ngram(longer).nll).sum() == pytest.approx(1, abs=1e-9)


def test_ngram_samples_its_law():
    """Two tokens and a context of one: all 8 texts of length 3 against exp(-nll) (and the first
    token's own law), 20,000 draws. The largest of 8 is off by 4.5 sd with odds below 1e-4."""
    x = np.random.default_rng(0).choice(2, 60, p=[0.8, 0.2]).astype(np.uint16)
    data = types.SimpleNamespace(train=x, K=2, examples=False, block_size=3)
    model = NGram(data, 2)
    texts = np.array([[i >> 2, i >> 1 & 1, i & 1] for i in range(8)])
    first = (np.bincount(x) + 20 / 2) / (60 + 20)
    law = first[texts[:, 0]] * np.exp(-model(texts).nll)
    assert law.sum() == pytest.approx(1)
    drawn = sample_ngram(model, 20_000, 3, seed=0) @ [4, 2, 1]
    shares = np.bincount(drawn, minlength=8) / 20_000
    assert np.all(np.abs(shares - law) < 4.5 * np.sqrt(law * (1 - law) / 20_000))
    cold = sample_ngram(model, 20_000, 3, seed=0, temperature=0.5)
    assert cold.mean() < (texts.mean(1) * law).sum() - 0.02    # ones are rarer than zeros


# ---- controls -----------------------------------------------------------------------------------

def test_words_are_shuffled_and_spaces_stay(data):
    """The same tokens; spaces and newlines at the same places among the words."""
    rng = np.random.default_rng(0)
    for row in data.val_blocks(20).x_0.numpy():
        shuffled = measures.shuffle_words(row, data.tokenizer, rng)
        text, other = (data.tokenizer.decode(x.tolist()) for x in (row, shuffled))
        assert re.split(r"\S+", text) == re.split(r"\S+", other)
        assert sorted(text.split()) == sorted(other.split())
    long = np.array(data.tokenizer.encode("the cat sat on the mat and so on"))
    shuffled = measures.shuffle_words(long, data.tokenizer, np.random.default_rng(1))
    assert not np.array_equal(long, shuffled)


def test_words_of_bpe_take_their_space_along():
    pieces = [b"The", b" walk", b"ing", b"\n", b" man", b"<|endoftext|>", b" x"]
    tokenizer = types.SimpleNamespace(decode_single_token_bytes=lambda token: pieces[token])
    for seed in range(20):
        x = measures.shuffle_words(np.arange(7), tokenizer, np.random.default_rng(seed)).tolist()
        assert sorted(x) == list(range(7)) and x.index(2) == x.index(1) + 1   # " walking"
        assert [x.index(3) < x.index(5)] == [True]


def test_every_control_is_exposed_by_a_column(data):
    """For each control some metric's 95 % interval lies apart from real text's: whatever fools one
    column, the table shows it. And the entropy of the n-gram texts is that of held-out text."""
    blocks = data.val_blocks(250).x_0.numpy()
    measure = evaluate.Measure(data, {"": evaluate.ngram_of(data)}, blocks[1::2], BASE)
    real, _ = measure(blocks[::2], kind="real")
    shuffled, repeated, ngrams = measures.control_rows(measure, data, blocks[::2], seed=0)

    def exposed(record):
        return {name for name in COLUMNS if record[f"{name}_ci"][0] > real[f"{name}_ci"][1]
                or record[f"{name}_ci"][1] < real[f"{name}_ci"][0]}
    assert "gen_ppl" in exposed(shuffled) and shuffled["entropy"] == pytest.approx(real["entropy"])
    assert {"overlap", "distinct4"} <= exposed(repeated)
    assert repeated["overlap"] == pytest.approx(1 - measures.overlap(blocks[1::2]).mean())
    assert "known_words" in exposed(ngrams)
    assert abs(ngrams["entropy"] - real["entropy"]) < 0.03
    assert abs(real["overlap"]) < 0.05


# ---- the whole evaluation -----------------------------------------------------------------------

def ramp(data, spread):
    """A stand-in for generator.sample: real text in which the share `spread(temperature)` of the
    characters is replaced by ones drawn evenly, so entropy and perplexity rise with temperature;
    below 0.9 the second half of a text is its first half again."""
    def sample(net, process, n, length, steps, rng, *, temperature, order, prompt):
        x = data.batch("train", n, rng).x_0
        noise = torch.rand(x.shape, generator=rng) < spread(temperature)
        x = torch.where(noise, torch.randint(data.K, x.shape, generator=rng), x)
        if temperature < 0.9:
            x[:, L // 2:] = x[:, :L // 2]
        return Sample(x, torch.full((n,), steps))
    return sample


def test_records_of_a_sweep(data, ngram, monkeypatch):
    """Every metric has its interval around it, the matched gen_ppl lies on the curve where that
    encloses held-out entropy and is null where it does not, and a seed gives the same records."""
    monkeypatch.setattr(evaluate, "sample", ramp(data, lambda t: max(0, t - 0.9)))
    blocks = data.val_blocks(80).x_0.numpy()
    base = BASE | {"judge": "ngram", "judge_2": "again"}
    measure = evaluate.Measure(data, {"": ngram, "_2": ngram}, blocks[1::2], base)
    real, resampled = measure(blocks[::2], kind="real", model="real text")

    def run(*temperatures, sweep=False):
        rows = evaluate.model_rows({"noisy": (tiny(5), Masked(data.K + 1))},
                                   [("noisy", {"order": "even"}, 4)],
                                   torch.full((40, L), -1), measure, resampled, temperatures, sweep)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    cold, hot = records = run(0.8, 1.2)
    assert cold["entropy"] < real["entropy"] < hot["entropy"]
    assert cold["gen_ppl"] < cold["gen_ppl_matched"] == hot["gen_ppl_matched"] < hot["gen_ppl"]
    share = (real["entropy"] - cold["entropy"]) / (hot["entropy"] - cold["entropy"])
    assert math.log(hot["gen_ppl_matched"]) == pytest.approx(
        (1 - share) * math.log(cold["gen_ppl"]) + share * math.log(hot["gen_ppl"]))
    assert hot["gen_ppl_matched_2"] == hot["gen_ppl_matched"] and hot["judge_2"] == "again"
    for record in [real, *records]:
        for name in COLUMNS:
            low, high = record[name + "_ci"]
            assert low - 1e-9 <= record[name] <= high + 1e-9, name
            assert low < high or name == "repetition", name   # cold texts: each repeats its half
        assert record["bits_per_char"] == record["bits_per_char_2"]
        assert record["bits_per_char"] == pytest.approx(math.log2(record["gen_ppl"]))
        assert record.items() >= (base | {"n_texts": 40}).items()
    assert hot.items() >= {"model": "noisy", "kind": "model", "order": "even", "steps": 4,
                           "passes": 4.0, "temperature": 1.2}.items()
    assert real["known_words"] > hot["known_words"] + 0.2
    assert run(0.8, 1.2) == records
    hotter = run(1.5, 1.9)
    assert all(r["entropy_ci"][0] > real["entropy_ci"][1] for r in hotter)
    assert {(r["gen_ppl_matched"], *r["gen_ppl_matched_ci"]) for r in hotter} == {(None,) * 3}
    assert "gen_ppl_matched" not in run(1.0)[0]               # no curve, no matching
    swept = run(1.2, sweep=True)
    assert [r["temperature"] for r in swept] == [1.2, 1.1, 1.0, 0.9]
    assert swept[0]["gen_ppl_matched"] is not None


def test_a_text_depends_on_seed_and_batch_alone(data, monkeypatch):
    """More texts leave the whole batches as they are, and batches and seeds differ."""
    monkeypatch.setattr(evaluate, "sample", ramp(data, lambda t: 0))
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 4 * L)

    def write(n, seed):
        prompts = torch.full((n, L), -1)
        return evaluate.write_texts(tiny(5), None, prompts, 1, seed, "float32", temperature=1.0,
                                    order="even")[0]
    few, more = write(8, 1), write(19, 1)
    assert more.shape == (19, L) and np.array_equal(more[:8], few)
    assert len(np.unique(more, axis=0)) == 19 and not np.array_equal(write(8, 2), few)


def test_gradient_moment_sees_what_is_real(data, monkeypatch):
    """Real text against other real text: around 0; characters drawn evenly: well above. And no
    perplexity stands without entropy, distinct4 and repetition."""
    blocks = data.val_blocks(250).x_0.numpy()
    judge = {"": causal_judge(tiny(data.K, causal=True))}
    measure = evaluate.Measure(data, judge, blocks[1::2], BASE, ["gm"])
    real, _ = measure(blocks[::2])
    even, _ = measure(np.random.default_rng(0).integers(data.K, size=(125, L)))
    assert even["gm_ci"][0] > 5 * abs(real["gm"])
    assert {"gen_ppl", "entropy", "distinct4", "repetition"} <= real.keys()
    assert "overlap" not in real


def test_mauve_takes_the_features_of_the_judge(data, monkeypatch):
    """Two halves of real text score higher than real text against noise; without the package, a
    stand-in for it that gets both sets of features."""
    blocks = data.val_blocks(240).x_0.numpy()
    noise = np.random.default_rng(0).integers(data.K, size=(120, L))
    judge = {"": causal_judge(tiny(data.K, causal=True))}

    def compute_mauve(p_features, q_features, verbose):
        assert p_features.shape == q_features.shape == (120, 16)
        return types.SimpleNamespace(mauve=math.exp(-abs(p_features - q_features).mean(0).sum()))
    monkeypatch.setitem(sys.modules, "mauve", types.SimpleNamespace(compute_mauve=compute_mauve))
    measure = evaluate.Measure(data, judge, blocks[1::2], BASE, ["mauve"])
    assert measure(blocks[::2])[0]["mauve"] > measure(noise)[0]["mauve"]


def test_mauve_itself_needs_neither_text_nor_network(monkeypatch):
    """Of the package, features are enough: no transformers, no model."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    p, q, far = rng.normal(size=(120, 8)), rng.normal(size=(120, 8)), rng.normal(3, 1, (120, 8))
    assert measures.mauve(p, q) > 0.8 > 0.2 > measures.mauve(p, far)


@pytest.mark.parametrize("broken, sentence", [
    (lambda x, groups: Score(np.full(len(x), np.nan), np.full(len(x), 9), None), "gives NaN"),
    (lambda x, groups: Score(np.zeros(len(x)), np.zeros(len(x)), None), ".*sees no token"),
    (lambda x, groups: torch.zeros(3)[x], "cannot read the text .IndexError")])
def test_a_judge_that_cannot_judge(data, broken, sentence):
    with pytest.raises(BadInput, match=f"--judge a judge {sentence}"):
        evaluate.Measure(data, {"": broken}, data.val_blocks(9).x_0.numpy(), BASE)


# ---- from checkpoints ---------------------------------------------------------------------------

def save_network(path, net, process, data, **changes):
    checkpoint.save(path, dict(
        config=vars(net.config), process=process, tokenizer=data.spec, block_size=L,
        stage="teacher", step=1, updates=1, data=data.source, data_key=data.key,
        ema=net.state_dict()) | changes)


@pytest.fixture(scope="module")
def networks(data, tmp_path_factory):
    """Run folders of tiny networks that were never trained."""
    folder = tmp_path_factory.mktemp("networks")
    for process, names, V in (("mdlm", "teacher idlm", data.K + 1),
                              ("duo", "teacher dcd idlm", data.K)):
        for i, name in enumerate(names.split()):
            save_network(folder / f"out/{process}/{name}.pt", tiny(V, seed=i), process, data)
    judge = tiny(data.K, causal=True)
    save_network(folder / "out/mdlm/judge.pt", judge, "ar", data)
    save_network(folder / "half.pt", judge, "ar", data, updates=2)
    save_network(folder / "elsewhere.pt", judge, "ar", data, data_key="0")
    save_network(folder / "other.pt", tiny(5, causal=True), "ar", data,
                 tokenizer={"name": "char", "chars": "abcde"})
    return folder


@pytest.fixture
def run_folder(networks, tmp_path, monkeypatch):
    """A working folder with a copy of them. -> the folder"""
    shutil.copytree(networks, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ["--num_texts", "16", "--steps", "1", "2", "--device", "cpu"]


def test_from_checkpoints_to_table_and_figure(run_folder, capsys):
    """main(): both processes, records appended run after run, eval.json, the figure."""
    evaluate.main(SMALL + ["--temperatures", "0.7", "1", "--controls", "--judge", "ar", "ngram",
                           "--records", "results/both.json"])
    lines = capsys.readouterr().out.splitlines()
    assert "real text" in lines[2] and re.search(r"\d ±\d", lines[2])
    assert lines[-2].startswith("16 texts of 32 tokens a row; judge ar, ngram")
    assert re.match(r"gen_ppl and gen_ppl_2, two judges, order \d+ pairs of rows", lines[-1])
    written = json.loads(Path("out/mdlm/eval.json").read_text())
    assert {"command", "commit", "seed", "device", "torch", "date"} <= written["provenance"].keys()
    assert len(written["records"]) == 1 + 3 + 2 * 2 * 2 * 2
    assert {r["model"] for r in written["records"]} == {
        "real text", "real, words shuffled", "real, one repeated", "n-gram", "teacher", "idlm"}
    evaluate.main(SMALL + ["--process", "duo", "--judge", "out/mdlm/judge.pt", "--ending", "greedy",
                           "map", "--records", "results/both.json", "--seed", "2"])
    records = json.loads(Path("results/both.json").read_text())
    assert len(records) == 20 + 1 + 3 * 2 * 2
    assert {r.get("ending") for r in records if r["process"] == "duo"} == {None, "greedy", "map"}
    assert all(r["commit"] and r["seed"] and r["n_texts"] == 16 for r in records)
    evaluate.main(["--plot", "out/mdlm/eval.json"])
    assert Path("assets/eval.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(BadInput, match="1 to 6 lines with a perplexity, not 10"):
        evaluate.main(["--plot", "results/both.json"])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_precision_of_sampling(run_folder, monkeypatch, dtype):
    seen = set()

    def sample(net, *args, **options):
        seen.add(net.output_layer.linear.weight.dtype)
        return generator.sample(net, *args, **options)
    monkeypatch.setattr(evaluate, "sample", sample)
    evaluate.main(SMALL + ["--dtype", dtype, "--models", "idlm", "--judge", "none"])
    assert {r["dtype"] for r in evaluate.read_records("out/mdlm/eval.json")} == {dtype}
    assert seen == {getattr(torch, dtype)}


def test_short_table(run_folder, data, monkeypatch, capsys):
    """Even steps of 32 positions are at most 32; whatever is wrong costs one line."""
    monkeypatch.setattr(evaluate, "sample", ramp(data, lambda t: 0.1))
    evaluate.short_table(Path("out/mdlm"), "mdlm", torch.device("cpu"), 5)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    rows = [tuple(cell.strip() for cell in line[1:4]) for line in lines[2:-1]]
    assert rows == [("real text", "–", "–")] + [
        (model, order, n) for model in ("teacher", "idlm") for order in ("random", "even")
        for n in ("4", "16", *(["256"] if order == "random" else ["32"]) * (model == "teacher"))]
    assert {r["seed"] for r in evaluate.read_records("out/mdlm/eval.json")} == {5}
    evaluate.short_table(Path("nowhere"), "mdlm", torch.device("cpu"), 5)
    out = capsys.readouterr().out
    assert out.startswith("no table: ") and out.count("\n") == 1


def test_a_missing_judge_is_trained(run_folder, monkeypatch, data):
    """The command is one that train.py takes, with the flags of this run; where it fails, one
    sentence."""
    status = 0

    def run(command):
        args = train.parse_args(command[2:])
        assert Path(command[1]).name == "train.py" and args.stage == "judge" and args.resume
        assert (args.block_size, args.tokenizer, args.data) == (L, "char", data.source)
        assert (str(args.device), args.cache, args.no_compile) == ("cpu", "c", True)
        Path(args.out, "judge.pt").write_bytes(Path("out/mdlm/judge.pt").read_bytes())
        return types.SimpleNamespace(returncode=status)
    monkeypatch.setattr(measures, "subprocess", types.SimpleNamespace(run=run))
    flags = SMALL + ["--process", "duo", "--models", "idlm", "--cache", "c", "--no-compile"]
    evaluate.main(flags)
    assert {r["judge"] for r in evaluate.read_records("out/duo/eval.json")} == {"ar"}
    Path("out/duo/judge.pt").unlink()
    status = 3
    with pytest.raises(BadInput, match="training it ended with status 3"):
        evaluate.main(flags)


def test_other_text_may_have_been_trained_on(run_folder, capsys):
    Path("b.txt").write_text(Path(evaluate.checkpoint.load("out/mdlm/idlm.pt")["data"])
                             .read_text(encoding="utf-8")[::-1], encoding="utf-8")
    flags = SMALL + ["--models", "idlm", "--judge", "none"]
    evaluate.main(flags + ["--data", "b.txt"])
    assert 'idlm was not trained on b.txt as it is: what is "held-out"' in capsys.readouterr().out
    evaluate.main(flags)
    assert "held-out" not in capsys.readouterr().out


def test_exact_match(tmp_path, monkeypatch):
    """A stand-in for the sampler that keeps the held-out prompt and answers, by the number asked,
    rightly with noise behind the end; rightly, but goes on; or wrongly. Only the first is right."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i}+{i}=\t{2 * i}\n" for i in range(100, 1000)]
    Path("sums.tsv").write_text("".join(lines))
    data = TextData("sums.tsv", "char", 16, cache="cache")
    save_network(Path("out/mdlm/idlm.pt"), tiny(data.K + 1), "mdlm", data, block_size=16)
    answered = []

    def sample(net, process, n, length, steps, rng, *, temperature, order, prompt):
        x = torch.randint(data.K, (n, length), generator=rng)
        for row, start in zip(x, prompt):
            text = data.tokenizer.decode(start[start >= 0].tolist())
            number = int(text[:3])
            assert text == f"{number}+{number}=" and (start[len(text):] == -1).all()
            kind = len(answered) % 3
            ending = [f"{2 * number}\n", f"{2 * number}7", f"{2 * number + 1}\n"][kind]
            tokens = torch.tensor(data.tokenizer.encode(text + ending))
            row[:len(tokens)] = tokens
            answered.append(kind == 0)
        return Sample(x, torch.full((n,), steps))
    monkeypatch.setattr(evaluate, "sample", sample)
    evaluate.main(["--exact_match", "--judge", "none", "--order", "even", "--steps", "4",
                   "--device", "cpu", "--num_texts", "17"])
    real, record = evaluate.read_records("out/mdlm/eval.json")
    assert len(answered) == 17 and sum(answered) == 6 and "exact_match" not in real
    assert (record["exact_match"], record["exact_match_ci"]) == measures.wilson(6, 17)


# ---- records ------------------------------------------------------------------------------------

def test_records_are_appended_whole(tmp_path):
    """A dict as in eval.json becomes a list whose records hold their provenance."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"provenance": {"commit": "a"}, "records": [{"x": 1}, {"x": 2}]}))
    evaluate.append_records(path, [{"commit": "b", "x": 3}])
    assert json.loads(path.read_text()) == [
        {"commit": "a", "x": 1}, {"commit": "a", "x": 2}, {"commit": "b", "x": 3}]
    with ThreadPoolExecutor(4) as pool:                       # four at once: none is lost
        list(pool.map(lambda n: evaluate.append_records(path, [{"n": n}]), range(40)))
    assert sorted(r["n"] for r in evaluate.read_records(path)[3:]) == list(range(40))


@pytest.mark.parametrize("text, reason", [
    ('[{"x": 1}', "JSONDecodeError"), ('{"mine": 1}', "KeyError"), ("[1, 2]", "an entry is no rec"),
    ("3", "TypeError")])
def test_what_is_no_list_of_records_stays(run_folder, text, reason):
    path = Path("r.json")
    path.write_text(text)
    with pytest.raises(BadInput, match=f"r.json is no JSON list of records .*{reason}") as error:
        evaluate.main(SMALL + ["--records", "r.json", "--judge", "none"])
    assert path.read_text() == text and "\n" not in str(error.value)
    assert not Path("out/mdlm/eval.json").exists()            # and no work is lost, either


def test_cells():
    record = {"gen_ppl": 12.345, "gen_ppl_ci": [11.9, 12.7], "gen_ppl_matched": None, "steps": 4,
              "entropy": 2.0, "entropy_ci": [None, 3.0], "seconds": 12345.6, "gm": 1500.0,
              "gm_ci": [1200.0, 1800.0], "overlap": 0.1, "overlap_ci": [0.1, 0.1 + 1e-16]}
    assert [evaluate.cell(record, key) for key in (
        "gen_ppl", "gen_ppl_matched", "steps", "entropy", "seconds", "order", "gm", "overlap")] == [
        "12.3 ±0.4", "not reached", "4", "2 ±open", "12346", "–", "1500 ±300", "0.1 ±0"]
    table = evaluate.records_table([record, {"model": "a", "gen_ppl_2": 1.0}]).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "model", "steps", "gen_ppl_matched", "gen_ppl", "gen_ppl_2", "entropy", "overlap",
        "gm"]
    assert len({len(line) for line in table}) == 1


def test_judges_that_disagree():
    """a and b are ordered alike, c differs from both; a and c most of all."""
    rows = [{"model": m, "steps": 4, "gen_ppl": x, "gen_ppl_2": y}
            for m, x, y in (("a", 10.0, 20.0), ("b", 12.0, 22.0), ("c", 20.0, 10.0))]
    assert measures.disagreement(rows, "gen_ppl_2") == (
        "gen_ppl and gen_ppl_2, two judges, order 2 pairs of rows differently, most of all a 4 and "
        "c 4")
    assert measures.disagreement(rows[:2], "gen_ppl_2").endswith("alike")


# ---- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, sentence", [
    (["--out", "nowhere"], "no generator in nowhere yet: run python train.py first"),
    (["--out", "nowhere", "--models", "idlm"], "nowhere/idlm.pt"),
    (["--judge", "other.pt"], "other.pt cannot judge this text"),
    (["--judge", "out/mdlm/teacher.pt"], "it is a mdlm model"),
    (["--judge", "half.pt"], "half.pt has done 1 of 2 updates"),
    (["--judge", "elsewhere.pt"], "elsewhere.pt was trained on other text"),
    (["--judge", "none", "--sweep"], "none stands alone, without --sweep"),
    (["--judge", "ngram", "none", "--mauve"], "none stands alone"),
    (["--judge", "ngram", "--mauve"], "needs the hidden states of a judge"),
    (["--judge", "out/mdlm/judge.pt", "--mauve"], "16 texts a row.*MAUVE 100 for ten clusters"),
    (["--num_texts", "15"], "15 texts a row.*an interval needs 16"),
    (["--steps", "0"], "--steps: 0 is not in 1"), (["--temperatures", "0"], "0 is not in 0.001"),
    (["--temperatures", "nan"], "nan is not in 0.001"),
    (["--temperatures", "inf"], "inf is not in 0.001"), (["--seed", "-1"], "-1 is not in 0"),
    (["--judge", "gpt2-large"], "pip install -r requirements-eval.txt"),
    (["--exact_match"], "needs examples with answers"),
    (["--device", "cuda"], "--device cuda")])
def test_bad_input(run_folder, monkeypatch, flags, sentence):
    monkeypatch.setitem(sys.modules, "transformers", None)     # as if it were not installed
    monkeypatch.setattr(measures, "find_spec", lambda name: True)
    with pytest.raises(BadInput, match=sentence) as error:
        evaluate.main(SMALL + ["--judge", "none"] + flags)
    assert "\n" not in str(error.value)


def test_mauve_without_its_package(monkeypatch):
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="--mauve needs a package: pip install -r requirements-eval"):
        evaluate.main(["--mauve"])


def test_controls_need_training_text(data):
    few = types.SimpleNamespace(examples=False, train=data.train[:1000], source="few.txt")
    with pytest.raises(BadInput, match="few.txt has too little of"):
        measures.control_rows(None, few, None, 1)


def test_ngram_is_for_characters(data):
    bpe = types.SimpleNamespace(spec={"name": "gpt2"})
    with pytest.raises(BadInput, match="for characters, not gpt2"):
        evaluate.load_judge("ngram", None, None, bpe)


def test_the_script_ends_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="^evaluate.py: there is no generator in out/mdlm yet"):
        checkpoint.run_script(evaluate.main)


# ---- tables of the pages ------------------------------------------------------------------------

def test_tables_of_the_pages_equal_their_json():
    """`python experiments/tables.py` would change nothing; an unknown table is an error, too."""
    assert tables.differing() == {}


ROW = dict(process="mdlm", model="idlm", kind="model", order="even", steps=4, passes=4.0, seed=1,
           temperature=1.0, judge="ngram", n_texts=64, bits_per_char=2.5,
           bits_per_char_ci=[2.4, 2.6], entropy=2.9, distinct4=0.5, repetition=0.0)
PAGE = "a\n<!-- table:laptop -->\nold\n<!-- /table:laptop -->\nz\n"


def filled(records, folder, page=PAGE, name="laptop"):
    (folder / f"{name}.json").write_text(json.dumps(records))
    return tables.fill(page, "README.md", folder)


def test_runs_are_averaged_over_seeds_and_settings_kept_apart(tmp_path):
    """Three seeds, 2.3, 2.5, 2.7: 2.5 ± 0.2 (n - 1). Other temperatures are not wanted in this
    table; a single run shows its interval over texts."""
    records = [ROW | {"seed": s, "bits_per_char": x} for s, x in enumerate((2.3, 2.5, 2.7))]
    records += [ROW | {"steps": 16}, ROW | {"temperature": 0.8, "bits_per_char": 1.23}]
    text = filled(records, tmp_path)
    assert text.startswith("a\n<!-- table:laptop -->\n| model | order | steps | bits_per_char |")
    assert text.endswith("<!-- /table:laptop -->\nz\n") and "old" not in text
    assert "| idlm | even | 4 | 2.5 ± 0.2 | 2.9 | 0.5 | 0 |" in text
    assert "| idlm | even | 16 | 2.5 ± 0.1 |" in text and "1.23" not in text
    assert "over 3 seeds; rows of one seed, ± half of the 95 % interval over texts; 64" in text
    assert filled(records, tmp_path, text) == text


@pytest.mark.parametrize("records, page, sentence", [
    ([ROW, ROW], PAGE, "have seeds .1, 1.; group by one more key"),
    ([], PAGE, "table laptop has no rows"),
    ([ROW], PAGE.replace("laptop", "none"), "has a table 'none', which experiments/tables.py has"),
    ([ROW], PAGE.replace("laptop", "headline"), "there is no .*headline.json"),
    ([ROW], PAGE.replace("/table:laptop", "/table:novels"), "of the same name"),
    ([ROW], "<!-- table:laptop -->", "of the same name")])
def test_a_table_that_cannot_be_filled(tmp_path, records, page, sentence):
    with pytest.raises(BadInput, match=sentence):
        filled(records, tmp_path, page)


def test_no_table_has_a_perplexity_alone():
    for name, table in tables.TABLES.items():
        columns = table.columns.split()
        if "gen_ppl" in columns or "bits_per_char" in columns:
            assert {"entropy", "distinct4", "repetition"} <= set(columns), name
    bad = tables.Table("model", "gen_ppl entropy")
    with pytest.raises(BadInput, match="a perplexity without .'distinct4', 'repetition'."):
        tables.table_of("bad", bad, [ROW])


def test_collect(tmp_path, monkeypatch):
    """What was varied goes to a model's records; real text stands once."""
    from experiments import collect
    real = {"kind": "real", "model": "real text", "seed": 1}
    model = {"kind": "model", "model": "idlm", "seed": 1}
    eval_json = {"provenance": {"commit": "c"}, "records": [real, model]}
    (tmp_path / "eval.json").write_text(json.dumps(eval_json), encoding="utf-8")
    path = tmp_path / "all.json"
    for lr in "1e-4", "3e-5":
        argv = ["collect.py", str(path), str(tmp_path), "data=novels", f"lr={lr}"]
        monkeypatch.setattr(sys, "argv", argv)
        collect.main()
    stamp = {"data": "novels", "commit": "c"}
    assert collect.read_records(path) == [
        stamp | real, stamp | model | {"lr": "1e-4"}, stamp | model | {"lr": "3e-5"}]
