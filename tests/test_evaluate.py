"""Metrics, judges, intervals, tables and figures.    python -m pytest tests/test_evaluate.py"""
import json
import math
import random
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import train
from data import BadInput, TextData
from evaluate import bootstrap, entropy, ngram_judge, ppl_at, summary
from generator import Sample
from model import DiT, ModelConfig
from teacher import Masked, Uniform

ROOT = Path(__file__).resolve().parent.parent
L = 32


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """200,000 characters of Shakespeare in blocks of L."""
    folder = tmp_path_factory.mktemp("data")
    text = (ROOT / "data/shakespeare.txt").read_text()[:200_000]
    (folder / "text.txt").write_text(text)
    found = TextData(str(folder / "text.txt"), "char", L, cache=str(folder / "cache"))
    found.path = folder / "text.txt"
    return found


def tiny(vocab_size, causal=False, seed=0):
    """A network whose output does depend on its input (a fresh one predicts the flat row)."""
    torch.manual_seed(seed)
    net = DiT(ModelConfig(vocab_size, num_layers=2, num_heads=2, width=16, cond_dim=8,
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


# ---- metrics ------------------------------------------------------------------------------------

def test_examples_of_the_docstrings():
    assert entropy(codes("abab")[0]) == pytest.approx(math.log(2))
    assert entropy(codes("aabc")[0]) == pytest.approx(1.5 * math.log(2))     # 1/2, 1/4, 1/4
    assert evaluate.repetition(codes("ababab", "abcdef")) == pytest.approx([1 / 3, 0])
    assert evaluate.distinct4(codes("abcde", "abcdf")) == pytest.approx([0.75, 0.75])
    assert evaluate.distinct4(codes("abcde", "abcde", "vwxyz")).mean() == pytest.approx(4 / 6)
    assert evaluate.whole_words("he cat's mew") == ["cat's"]
    assert evaluate.whole_words("\nO, 'tis 3 x_y!") == ["O", "'tis", "x", "y"]
    g, r = np.array([[1.0], [3.0]]), np.array([[0.0], [1.0]])
    assert evaluate.gradient_moment(g, r).mean() == pytest.approx(2)
    assert ppl_at(2.6, np.array([2.5, 2.7]), np.array([1.0, 1.4])) == pytest.approx(math.exp(1.2))


def test_four_grams_of_large_vocabularies_stay_apart():
    """Ids up to 65,535 fill all 64 bits: against tuples."""
    x = np.random.default_rng(0).choice([0, 1, 255, 65_535, 50_256], (5, 60))
    tuples = [tuple(row[i:i + 4]) for row in x.tolist() for i in range(57)]
    assert evaluate.distinct4(x).mean() == pytest.approx(len(set(tuples)) / len(tuples))
    per_text = [len(set(tuples[57 * i:57 * i + 57])) / 57 for i in range(5)]
    assert evaluate.repetition(x) == pytest.approx([1 - share for share in per_text])


def test_gradient_moment_is_unbiased():
    """d_i = mu + noise of variance 1 in P = 50 coordinates, m = 8 groups, |mu|^2 = 0.5. The square
    of the mean difference would be 0.5 + 50/8 = 6.75. Var <= 4 |mu|^2 / 8 + 2 P / 56 = 2.0, so the
    mean of 2,000 has sd 0.032; 0.15 is 4.7 of them: false alarm below 1e-5. The intervals of 200
    should cover 0.5 about 0.95 of the time, sd 0.015: below 0.85 has odds below 1e-6."""
    rng = np.random.default_rng(0)
    r = rng.normal(size=(2000, 8, 50)) * math.sqrt(0.5)
    g = rng.normal(size=(2000, 8, 50)) * math.sqrt(0.5) + 0.1
    values = [evaluate.gradient_moment(a, b) for a, b in zip(g, r)]
    assert abs(np.mean(values) - 0.5) < 0.15
    found = iter(values)
    assert coverage(0.5, lambda: (next(found),), 200) > 0.85


def coverage(truth, draw, n=400):
    hit = 0
    for i in range(n):
        x = bootstrap(*draw(), seed=i)
        low, high = summary("x", x)["x_ci"]
        hit += low <= truth <= high
    return hit / n


def test_interval_covers_what_it_should():
    """Ratios of a known mean (exponential sums over random lengths), 50 texts. Percentile intervals
    of 50 skewed values cover about 0.93 of the time; 400 trials have sd 0.013, so [0.88, 0.985] is
    missed with odds below 1e-4, while an interval half as wide covers 0.67."""
    rng = np.random.default_rng(0)

    def draw():
        b = rng.integers(5, 15, 50)
        return rng.gamma(b * 1.0, 2.0), b
    assert 0.88 < coverage(2.0, draw) < 0.985


def test_interval_of_distinct4():
    """Texts of a Zipf source: the intervals should cover the expected distinct-4 of as many texts
    (the mean over 300 draws) about 0.95 of the time. 300 trials have sd 0.013: below 0.88 is 5 of
    them, and not one miss has odds of 0.95^300 = 2e-7."""
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, 13) ** 1.2
    drawn = [evaluate.distinct4(rng.choice(12, (30, 40), p=p / p.sum())) for _ in range(300)]
    truth = np.mean([d.mean() for d in drawn])
    found = iter(drawn)
    assert 0.88 < coverage(truth, lambda: (next(found),), 300) < 1


def test_matched_gen_ppl_never_extrapolates():
    """log ppl = 3 H - 5 at H = 2.5, 2.9, 2.7: exact between, open outside; an interval with an end
    outside the curve is open at that end only."""
    H = np.array([2.5, 2.9, 2.7])
    for target in (2.5, 2.6, 2.85, 2.9):
        assert ppl_at(target, H, 3 * H - 5) == pytest.approx(math.exp(3 * target - 5))
    assert ppl_at(2.49, H, 3 * H - 5) == -np.inf and ppl_at(2.91, H, 3 * H - 5) == np.inf
    targets = np.concatenate([[2.85], np.random.default_rng(0).normal(2.85, 0.04, 1000)])
    found = summary("m", np.array([ppl_at(t, H, 3 * H - 5) for t in targets]))
    assert found["m"] == pytest.approx(math.exp(3.55))
    low, high = found["m_ci"]
    assert high is None and low == pytest.approx(math.exp(3 * 2.77 - 5), rel=0.05)
    assert summary("m", np.full(1001, np.inf)) == {"m": None, "m_ci": [None, None]}


def test_real_shuffled_and_repeated_text_are_told_apart(data):
    """By disjoint 95 % intervals of at least one metric each."""
    real = data.val_blocks(64).numpy()
    rng = np.random.default_rng(0)
    kinds = {"real": real, "shuffled": rng.permuted(real, axis=1),
             "repeated": np.tile(real[:, :8], (1, L // 8)),
             "copies": np.repeat(real[:1], len(real), 0)}
    score, found = ngram_judge(data), {}
    for kind, x in kinds.items():
        nll, counted, *_ = score(x)
        found[kind] = {"bits": bootstrap(nll, counted),
                       "repetition": bootstrap(evaluate.repetition(x)),
                       "entropy": bootstrap([entropy(row) for row in x]),
                       "distinct4": bootstrap(evaluate.distinct4(x))}
    ends = {kind: {k: summary(k, x)[k + "_ci"] for k, x in m.items()} for kind, m in found.items()}
    assert ends["shuffled"]["bits"][0] > ends["real"]["bits"][1] + 1
    assert ends["repeated"]["repetition"][0] > 0.5 > ends["real"]["repetition"][1]
    assert ends["repeated"]["entropy"][1] < ends["real"]["entropy"][0]
    assert ends["copies"]["distinct4"][1] < 0.1 < ends["real"]["distinct4"][0]
    assert ends["shuffled"]["entropy"] == pytest.approx(ends["real"]["entropy"])   # same characters


# ---- judges -------------------------------------------------------------------------------------

def test_causal_judge_against_step_by_step_scoring():
    """Token i + 1 from a pass over tokens <= i alone, in batches of any size; and no look ahead."""
    net = tiny(11, causal=True)
    x = np.random.default_rng(0).integers(0, 11, (5, 9))
    nll, counted, chars, grads = causal_judge(net)(x, groups=2)
    for row, total in zip(torch.from_numpy(x), nll):
        steps = 0.0
        for i in range(1, 9):
            logits = net(row[None, :i], torch.zeros(1))[0, -1]
            steps -= logits.double().log_softmax(-1)[row[i]].item()
        assert total == pytest.approx(steps, rel=1e-5)
    assert counted.tolist() == chars.tolist() == [8] * 5
    again, _, _, none = causal_judge(net)(x)
    assert again == pytest.approx(nll, rel=1e-6) and none is None and grads.shape == (2, 11 * 16)


def test_gradients_of_the_judge_against_autograd():
    net = tiny(11, causal=True)
    x = torch.randint(0, 11, (6, 9))
    grads = causal_judge(net)(x.numpy(), groups=3)[3]
    for i in range(3):
        part = x[2 * i:2 * i + 2]
        loss = torch.nn.functional.cross_entropy(net(part, torch.zeros(2))[:, :-1].flatten(0, 1),
                                                 part[:, 1:].flatten())
        wanted, = torch.autograd.grad(loss, net.output_layer.linear.weight)
        assert grads[i] == pytest.approx(wanted.flatten().numpy(), abs=1e-6)


def test_a_pretrained_judge_reads_text_with_its_own_tokenizer(data, monkeypatch):
    """A stand-in for transformers whose tokenizer drops spaces: texts of different lengths are
    padded without effect and cut at the longest input; nothing foreign is executed on loading."""
    net, asked = tiny(200, causal=True), []

    def own_ids(text):
        return [ord(c) % 200 for c in text if c != " "]

    class Tokenizer:
        def __call__(self, text, add_special_tokens, truncation, max_length):
            assert truncation and not add_special_tokens
            return types.SimpleNamespace(input_ids=own_ids(text)[:max_length])

        def decode(self, ids, clean_up_tokenization_spaces):
            return "?" * len(ids)

    class Model(torch.nn.Module):
        config = types.SimpleNamespace(max_position_embeddings=20)

        def forward(self, x, output_hidden_states):
            h = net.hidden(x, torch.zeros(len(x)))
            return types.SimpleNamespace(hidden_states=(None, h), logits=net.project(h))

    def loader(what):
        return types.SimpleNamespace(from_pretrained=lambda name, **kw: asked.append(kw) or what)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        AutoTokenizer=loader(Tokenizer()), AutoModelForCausalLM=loader(Model())))
    score = evaluate.find_judge("gpt2-large", data, torch.device("cpu"), None, {})
    assert all(kw["trust_remote_code"] is False for kw in asked) and asked[1]["use_safetensors"]
    x = data.val_blocks(4).numpy()
    nll, counted, chars, grads = score(x, 2)
    for row, total, n in zip(x, nll, counted):
        ids = torch.tensor([own_ids(data.tokenizer.decode(row.tolist()))[:20]])
        log_p = net(ids, torch.zeros(1)).log_softmax(-1)[0, :-1]
        assert n == ids.shape[1] - 1 <= 19
        assert total == pytest.approx(-log_p.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4)
    assert grads.shape == (2, 200 * 16)


def test_ngram_sums_to_one_and_is_its_formula(data):
    """Against a dictionary of counts and the recursion written out; the sum over all continuations
    of seen, unseen and cut-off contexts is 1."""
    K, x = data.K, data.train.tolist()
    grams = Counter(tuple(x[i:i + k]) for k in range(1, 7) for i in range(len(x) - k + 1))
    followed = Counter(tuple(x[i:i + k]) for k in range(6) for i in range(len(x) - k))

    def p(context, c):
        below = p(context[1:], c) if context else 1 / K
        return (grams[context + (c,)] + 20 * below) / (followed[context] + 20)

    score, rng = ngram_judge(data), random.Random(0)
    seen = data.val_blocks(3).numpy()[:, :8]
    unseen = np.array([[rng.randrange(K) for _ in range(8)] for _ in range(3)])
    for row in np.concatenate([seen, unseen]):
        row = tuple(row.tolist())
        wanted = [math.log(p(row[max(0, i - 5):i], row[i])) for i in range(1, 8)]
        row = np.array(row)
        assert score(row[None])[0] == pytest.approx([-sum(wanted)], rel=1e-9)
        for n in (1, 3, 7):
            longer = np.concatenate([np.repeat(row[None, :n], K, 0), np.arange(K)[:, None]], 1)
            before = score(row[None, :n])[0] if n > 1 else 0
            assert np.exp(before - score(longer)[0]).sum() == pytest.approx(1, abs=1e-9)


def test_ngram_knows_english(data):
    """Held-out text costs far less than a character's own frequency does (4.5 bits)."""
    nll, counted, *_ = ngram_judge(data)(data.val_blocks(100).numpy())
    assert 1.5 < nll.sum() / counted.sum() / math.log(2) < 3.5


# ---- the whole evaluation -----------------------------------------------------------------------

def ramp(data, spread):
    """A stand-in for generator.sample: real text in which the share `spread(temperature)` of the
    characters is replaced by ones drawn evenly, so entropy and perplexity rise with temperature."""
    def sample(net, process, n, length, steps, rng, temperature, ending, schedule):
        x = data.batch("train", n, rng)
        noise = torch.rand(x.shape, generator=rng) < spread(temperature)
        x = torch.where(noise, torch.randint(data.K, x.shape, generator=rng), x)
        return Sample(x, torch.full((n,), steps))
    return sample


def test_next_temperature():
    """Entropy 2.7 + 0.3 (T - 1): from 1 toward the target, a little beyond it, at most 6 times,
    above 0."""
    def sweep(target, start=1.0):
        done = [start]
        while more := evaluate.next_temperature(done, [2.7 + 0.3 * (T - 1) for T in done], target):
            done += more
        return done

    assert sweep(2.79) == sweep(2.75) == [1.0, 1.2, 1.4] and sweep(2.65) == [1.0, 0.9, 0.8, 0.7]
    assert sweep(2.72) == [1.0, 1.2, 0.9]
    assert sweep(9.0) == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0] and len(sweep(0.0)) == 6
    assert sweep(0.0, 0.5) == [0.5, 0.4, 0.3, 0.2, 0.1] and sweep(0.0, 0.82)[:3] == [0.82, 0.7, 0.6]


def test_records_of_a_sweep(data, monkeypatch):
    """The held-out row comes first, every metric has its interval around it, the matched gen_ppl
    lies on the curve where that encloses held-out entropy and is null where it does not, and a seed
    gives the same records."""
    nets = {"noisy": (tiny(5), Masked(data.K + 1), ["ancestral"])}

    def run(*temperatures):
        def sample(net, process, n, length, steps, rng, temperature, ending, schedule):
            found = ramp(data, lambda t: max(0, t - 0.9))(net, process, n, length, steps, rng,
                                                          temperature, ending, schedule)
            if temperature < 0.9:                          # less variety than held-out text
                found.tokens[:, L // 2:] = found.tokens[:, :L // 2]
            return found
        monkeypatch.setattr(evaluate, "sample", sample)
        found = evaluate.evaluate_models(nets, data, ngram_judge(data), steps=[4], num_texts=40,
                                         seed=3, temperatures=temperatures, judge_name="ngram")
        return [{k: v for k, v in record.items() if k != "seconds"} for record in found]
    records = run(0.8, 1.2)
    real, cold, hot = records
    assert real["model"] == "real text" and real["real"] and real["n_texts"] == 40
    assert cold["entropy"] < real["entropy"] < hot["entropy"]
    assert cold["gen_ppl"] < cold["gen_ppl_matched"] == hot["gen_ppl_matched"] < hot["gen_ppl"]
    share = (real["entropy"] - cold["entropy"]) / (hot["entropy"] - cold["entropy"])
    assert math.log(hot["gen_ppl_matched"]) == pytest.approx(
        (1 - share) * math.log(cold["gen_ppl"]) + share * math.log(hot["gen_ppl"]))
    for record in records:
        for name in set(evaluate.METRICS) - {"gm"}:
            low, high = record[name + "_ci"]
            assert low <= record[name] <= high and low < high, name
        assert record["bits_per_char"] == record["ngram_bits"]
        assert record["bits_per_char"] == pytest.approx(math.log2(record["gen_ppl"]))
    assert real["known_words"] > hot["known_words"] + 0.2
    assert run(0.8, 1.2) == records
    _, *hot = run(1.5, 1.9)
    assert all(r["entropy_ci"][0] > real["entropy_ci"][1] for r in hot)
    assert all((r["gen_ppl_matched"], r["gen_ppl_matched_ci"]) == (None, [None, None]) for r in hot)
    assert "gen_ppl_matched" not in run(1.0)[1]                # no sweep, no matching
    json.dumps(records, allow_nan=False)


def test_records_tell_how_texts_begin(data):
    """The same network with and without frequencies; at random positions neither has words first.
    What begins with words is sampled cold, and its rows of that temperature are those of a table."""
    nets = {}
    for name, words in (("words", 4), ("blank", 0)):
        torch.manual_seed(0)
        nets[name] = DiT(ModelConfig(data.K + 1, num_layers=1, num_heads=2, width=16, cond_dim=8,
                                     latent_words=words)).eval(), Masked(data.K + 1), ["ancestral"]
    def run(*temperatures):
        return evaluate.evaluate_models(nets, data, None, steps=[1], num_texts=8, metrics=["entropy"],
                                        temperatures=temperatures, schedules=["even", "linear"])[1:]
    assert [(r["model"], r["schedule"], r.get("begins"), r["temperature"]) for r in run()] == [
        ("words", "even", "words", 0.5), ("words", "linear", None, 1),
        ("blank", "even", None, 1), ("blank", "linear", None, 1)]
    assert all(map(evaluate.at_own_temperature, run()))
    assert [evaluate.at_own_temperature(r) for r in run(0.5, 1.0)] == [True, False] + [False, True] * 3
    assert [evaluate.at_own_temperature(r) for r in ({}, {"temperature": 1.0}, {"temperature": 0.7})
            ] == [True, True, False]                       # of real text; as recorded before


def test_gradient_moment_sees_what_is_real(data, monkeypatch):
    """Real text against other real text: around 0; characters drawn evenly: well above."""
    net = tiny(data.K, causal=True)

    def sample(net, process, n, length, steps, rng, temperature, ending, schedule):
        x = data.batch("val", n, rng)
        x = x if steps == 1 else torch.randint(data.K, x.shape, generator=rng)
        return Sample(x, torch.full((n,), steps))
    monkeypatch.setattr(evaluate, "sample", sample)
    nets = {"any": (tiny(5), Masked(data.K + 1), ["ancestral"])}
    real, same, even = evaluate.evaluate_models(
        nets, data, causal_judge(net), steps=[1, 2], num_texts=64, metrics=["gm", "gen_ppl"],
        temperatures=[1.0])
    assert even["gm_ci"][0] > 5 * max(abs(real["gm"]), abs(same["gm"]))
    assert "entropy" in same and "distinct4" not in same      # gen_ppl is never without its entropy


@pytest.fixture
def run_folder(data, tmp_path, monkeypatch):
    """Run folders of tiny networks that were never trained, below a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()

    def write(path, net, process, spec=data.spec):
        checkpoint.save(path, dict(
            config=vars(net.config), process=process, tokenizer=spec, block_size=L, stage="teacher",
            step=1, updates=1, data=str(data.path), ema=net.state_dict()))
    for process, names, V in (("mdlm", "teacher idlm", data.K + 1),
                              ("duo", "teacher dcd idlm", data.K)):
        for i, name in enumerate(names.split()):
            write(tmp_path / f"out/{process}/{name}.pt", tiny(V, seed=i), process)
    write(tmp_path / "out/mdlm/judge.pt", tiny(data.K, causal=True), "ar")
    write(tmp_path / "other.pt", tiny(5, causal=True), "ar", {"name": "char", "chars": "abcde"})
    return tmp_path


SMALL = ["--num_texts", "8", "--steps", "1", "2", "--device", "cpu"]


def test_from_checkpoints_to_table_and_figures(run_folder, capsys):
    """main(): both processes, records appended run after run, eval.json, figures, README table."""
    evaluate.main(SMALL + ["--temperatures", "0.7", "1", "--records", "results/laptop.json"])
    assert "real text" in capsys.readouterr().out.splitlines()[2]
    found = json.loads(Path("out/mdlm/eval.json").read_text())
    assert set(found["provenance"]) >= evaluate.PROVENANCE | {"judge"}
    assert len(found["records"]) == 1 + 2 * 2 * 2
    assert {"gm", "gen_ppl_matched", "ngram_bits", "passes"} <= set(found["records"][1])
    evaluate.main(SMALL + ["--process", "duo", "--judge", "out/mdlm/judge.pt", "--temperatures",
                           "1", "--records", "results/laptop.json", "--seed", "2"])
    records = json.loads(Path("results/laptop.json").read_text())
    assert len(records) == 9 + 1 + 3 * 2 * 2
    assert {r["sampler"] for r in records if r.get("process") == "duo"} == {"ancestral", "greedy"}
    assert all(r["commit"] and r["seed"] for r in records)
    evaluate.main(["--plot", "results/laptop.json"])
    for name in ("quality_vs_passes", "frontier"):
        assert Path(f"assets/{name}.png").read_bytes()[:4] == b"\x89PNG"
    Path("README.md").write_text("a\n<!-- table:laptop -->\nold\n<!-- /table:laptop -->\nz\n")
    evaluate.main(["--table"])
    text = Path("README.md").read_text()
    assert text.startswith("a\n<!-- table:laptop -->\n| process") and text.endswith("\nz\n")
    assert "old" not in text and "idlm" in text
    evaluate.main(["--table"])
    assert Path("README.md").read_text() == text


def test_short_table(run_folder, capsys):
    evaluate.short_table(Path("out/mdlm"), "mdlm", torch.device("cpu"), 5)
    lines = capsys.readouterr().out.splitlines()
    steps = [int(line.split("|")[4]) for line in lines if " idlm " in line]
    assert "real text" in lines[2] and steps == [1, 4, 8, 16]    # of 32 positions
    assert {r["seed"] for r in json.loads(Path("out/mdlm/eval.json").read_text())["records"]} == {5}


def test_a_missing_judge_is_trained(run_folder, monkeypatch, data):
    """The command is one that train.py takes."""
    def run(command):
        args = train.parse_args(command[2:])
        assert Path(command[1]).name == "train.py" and args.stage == "judge"
        assert (args.block_size, args.tokenizer, Path(args.data)) == (L, "char", data.path)
        (args.out / "judge.pt").write_bytes(Path("out/mdlm/judge.pt").read_bytes())
    monkeypatch.setattr(evaluate, "subprocess", types.SimpleNamespace(run=run))
    evaluate.main(SMALL + ["--process", "duo", "--models", "idlm", "--temperatures", "1"])
    assert json.loads(Path("out/duo/eval.json").read_text())["records"][0]["judge"] == "ar"


# ---- tables -------------------------------------------------------------------------------------

def test_runs_are_averaged_and_settings_kept_apart(tmp_path):
    """Three seeds, perplexities 3.0, 3.2, 3.4: 3.2 +- 0.2 (n - 1). Other temperatures are left out
    of a table without that column; a single run shows its bootstrap interval."""
    base = dict(process="mdlm", model="idlm", sampler="ancestral", steps=4, passes=4.0,
                temperature=1.0, judge="ngram", entropy=2.5, known_words=0.5, seconds=1.0)
    records = [base | dict(seed=s, commit=str(s), gen_ppl=b, gen_ppl_ci=[0.0, 9.0])
               for s, b in enumerate((3.0, 3.2, 3.4))]
    records += [base | dict(seed=0, steps=8, passes=7.5, gen_ppl=2.0),
                base | dict(seed=0, temperature=0.8, gen_ppl=1.23)]
    rows = evaluate.average(records)
    assert [(r["steps"], r["temperature"], r["runs"]) for r in rows] == [
        (4, 1.0, 3), (8, 1.0, 1), (4, 0.8, 1)]
    assert rows[0]["gen_ppl"] == pytest.approx(3.2)
    assert rows[0]["gen_ppl_ci"] == pytest.approx([3.0, 3.4])
    (tmp_path / "even.json").write_text(json.dumps(records))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table:even --><!-- /table:even -->\n"
                      "<!-- table:even -->x<!-- /table:even -->")
    evaluate.rewrite_tables(readme, tmp_path)
    text = readme.read_text()
    assert text.count("3.2 ± 0.2") == 2 and "1.23" not in text and "3 runs" in text
    swept = dict(model="a", gen_ppl=5.0, gen_ppl_matched=None, entropy=2.0)
    assert "not reached" in evaluate.records_table([swept])
    single = evaluate.records_table([swept | dict(gen_ppl_ci=[4.0, None])])
    assert "5 [4, open]" in single and len({len(line) for line in single.splitlines()}) == 1
    marked = [base | {"seed": 0, "distinct4": 0.125}, base | {"seed": 0, "knob": "lr", "value": "1e-4",
                                                              "distinct4": 0.25}]
    (tmp_path / "novels_masked.json").write_text(json.dumps(marked))
    readme.write_text("<!-- table:novels_masked --><!-- /table:novels_masked -->")
    evaluate.rewrite_tables(readme, tmp_path)
    assert "0.125" in readme.read_text() and "0.25" not in readme.read_text()
    readme.write_text("<!-- table:novels_masked.knob --><!-- /table:novels_masked.knob -->")
    evaluate.rewrite_tables(readme, tmp_path)              # the records that have the key
    assert "0.125" not in readme.read_text() and "1e-4" in readme.read_text()
    with pytest.raises(BadInput, match="toy.json"):
        readme.write_text("<!-- table:toy --><!-- /table:toy -->")
        evaluate.rewrite_tables(readme, tmp_path)


# ---- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, sentence", [
    (["--out", "nowhere"], "no generator in nowhere yet: run python train.py first"),
    (["--out", "nowhere", "--models", "idlm"], "nowhere/idlm.pt"),
    (["--judge", "other.pt"], "other.pt cannot judge this text"),
    (["--judge", "out/mdlm/teacher.pt"], "it is a mdlm model"),
    (["--num_texts", "7"], "7 texts to write .* needs 8"),
    (["--metrics", "entropy", "beauty"], "beauty: unknown, choose from gen_ppl"),
    (["--steps", "0"], "use positives"), (["--temperatures", "0"], "use positives"),
    (["--judge", "gpt2-large"], "pip install transformers"),
    (["--mauve"], "pip install mauve-text"),
    (["--plot", "none.json"], "no records at none.json")])
def test_bad_input(run_folder, monkeypatch, flags, sentence):
    monkeypatch.setitem(sys.modules, "transformers", None)     # as if neither were installed
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=sentence) as error:
        evaluate.main(SMALL + flags)
    assert "\n" not in str(error.value)


def test_ngram_is_for_characters():
    with pytest.raises(BadInput, match="for characters, not gpt2"):
        ngram_judge(types.SimpleNamespace(spec={"name": "gpt2"}))


def test_the_script_ends_with_one_sentence_and_a_code(tmp_path):
    found = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--device", "cpu"],
                           cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.startswith("evaluate.py: there is no generator in out/mdlm yet")
    assert len(found.stderr.splitlines()) == 1
