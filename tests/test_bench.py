"""experiments/bench.py: its clock, its FLOPs, its update, and its records.

Run: python -m pytest tests/test_bench.py
"""
import json
import time

import pytest
import torch

import rows
import train
from data import BadInput
from experiments import bench
from teacher import Masked, Uniform

TINY = "--block_size 16 --size 2x2x32 --batch_size 2 --no-compile --device cpu".split()
FLAGS = {"mdlm": ["--process", "mdlm"], "hard": ["--process", "duo"],
         "soft": ["--process", "duo", "--update", "soft"]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """30 tokens and two rounds; the switches that a case sets are put back."""
    monkeypatch.setattr(bench, "K", 30)
    monkeypatch.setattr(bench, "ITERS", 2)
    monkeypatch.setattr(bench, "WARMUP", 1)
    monkeypatch.setattr(rows, "COMPILE", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # so small, no faster on two
    yield
    torch.set_num_threads(threads)


def settings(kind, *flags):
    """As run_case makes them. -> settings, process"""
    s = train.settings_of(train.parse_args([*"--preset owt".split(), *TINY, *FLAGS[kind], *flags]),
                          "idlm")
    s.micro_batch, s.num_micro = s.batch_size, 1
    return s, Masked(31) if kind == "mdlm" else Uniform(30)


# ---- the command --------------------------------------------------------------------------------

def test_all_cases_print_a_line_and_add_a_record(tmp_path, capsys):
    path = tmp_path / "records.json"
    path.write_text('[{"name": "earlier"}]')               # is added to
    bench.main(["--all", "--records", str(path), *TINY])
    earlier, *records = json.loads(path.read_text())
    assert earlier == {"name": "earlier"}
    train_names = [f"train {kind} B2" for kind in ("mdlm", "hard", "soft")]
    names = train_names + ["sample mdlm 16 B2"] * 2 + ["sample duo 4 B2"] * 2
    assert [r["name"] for r in records] == names
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == names
    for r in records:
        assert 0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"]
        assert r["tokens_per_s"] == pytest.approx(1e3 * 2 * 16 / r["median_ms"], rel=0.01, abs=1)
        assert r["recompilations"] == 0
        assert {"commit", "torch", "device", "date", "command", "seed"} <= r.keys()
        assert "mfu" not in r and "peak_gib" not in r      # not measured on a CPU
        if r["name"].startswith("sample"):
            assert r["passes"] <= int(r["name"].split()[2])
            assert r["ms_per_pass"] == pytest.approx(r["median_ms"] / r["passes"], abs=0.01)


def test_a_file_that_is_no_list_of_records_is_refused_before_any_work(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr(bench, "run_case", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(BadInput, match="notes.json"):
        bench.main(["train", "--records", str(path), *TINY])
    assert path.read_text() == '{"a": 1}'


def test_an_unknown_case_is_refused():
    with pytest.raises(BadInput, match="sampling is no case"):
        bench.main(["sampling"])


def test_recompilation_ends_in_an_error_after_the_record(tmp_path, monkeypatch):
    record = {"name": "train mdlm B2", "L": 16, "size": "2x2x32", "recompilations": 1}
    monkeypatch.setattr(bench, "run_case", lambda *_: record)
    with pytest.raises(BadInput, match="train mdlm B2"):
        bench.main(["train", "--records", str(tmp_path / "records.json"), *TINY])
    assert len(json.loads((tmp_path / "records.json").read_text())) == 3


def test_authors_times_stand_beside_a_case_of_the_same_shape_alone(capsys):
    record = {"name": "sample mdlm 16 B8", "L": 1024, "size": "12x12x768", "median_ms": 64.0,
              "ms_per_pass": 4.0}
    bench.show(record)
    assert "ms_per_pass 34.8" in capsys.readouterr().out
    bench.show({**record, "L": 512})
    assert "authors" not in capsys.readouterr().out


def test_authors_records_are_whole():
    """Their N steps are N + 1 passes, and time per pass is time over passes."""
    for r in bench.read_records(bench.AUTHORS):
        if r["name"].startswith("sample"):
            assert r["passes"] == r["steps"] + 1 == int(r["name"].split()[2]) + 1
            assert r["ms_per_pass"] == pytest.approx(r["median_ms"] / r["passes"], abs=0.06)
        else:
            assert r["median_ms"] == pytest.approx(r["fake_ms"] + r["generator_ms"])


# ---- the clock and the FLOPs --------------------------------------------------------------------

def test_clock_leaves_the_warm_up_out(monkeypatch):
    """A first round of 0.3 s stands for a compilation, the others sleep 5 ms, never less. One graph
    is compiled in the warm-up, one after it."""
    calls = []

    def one_round():
        calls.append(0)
        bench.counters["stats"]["unique_graphs"] += len(calls) in (1, 3)
        time.sleep(0.3 if len(calls) == 1 else 0.005)

    times, compiled = bench.measure(one_round, iters=3, cuda=False)
    assert len(times) == 3 and all(5 <= ms < 250 for ms in times)
    assert compiled == 1


@pytest.mark.parametrize("kind, trunks", [("mdlm", 9), ("hard", 9), ("soft", 11)])
def test_flops_are_those_of_the_formula(kind, trunks):
    """An update is a forward of the generator, three of the fake, and three of the generator, one
    of teacher and fake each; `soft` goes back through those. A trunk forward is 24 D^2 FLOPs a
    token and layer, and small beside it here are head, attention and noise level."""
    s, process = settings(kind, "--size", "1x1x256", "--block_size", "64", "--dropout", "0")
    counted = bench.count_flops(bench.training, s, process)
    trunk = 24 * 256 ** 2 * 2 * 64
    assert trunks * trunk < counted < 1.15 * trunks * trunk


def test_flops_count_no_row_twice(monkeypatch):
    """Chunked rows are projected again in the backward pass; the count is as if they were not."""
    s, process = settings("hard")
    s.seed = 5
    whole = bench.count_flops(bench.training, s, process)
    monkeypatch.setattr(rows, "KEEP_ELEMENTS", 64)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 256)
    assert bench.count_flops(bench.training, s, process) == whole
    assert (rows.KEEP_ELEMENTS, rows.CHUNK_ELEMENTS) == (64, 256)


def test_a_case_may_have_another_vocabulary(monkeypatch):
    seen = []

    def training(s, process):
        seen.append(process.K)
        return lambda: None

    monkeypatch.setattr(bench, "training", training)
    record = bench.run_case("scaling", "mdlm", [*TINY, "--vocab", "50"])
    assert bench.run_case("scaling", "mdlm", TINY)["V"] == 30
    assert record["V"] == 50
    assert seen == [50, 30]


def test_a_vocabulary_without_a_choice_is_refused():
    with pytest.raises(BadInput, match="--vocab"):
        bench.run_case("scaling", "mdlm", [*TINY, "--vocab", "1"])


# ---- what is measured ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["mdlm", "hard", "soft"])
def test_an_update_moves_generator_fake_and_average(kind, monkeypatch):
    """Every parameter of both; the teacher stays. Each call is one more step of train.distil."""
    runs = []
    monkeypatch.setattr(bench, "Synthetic", lambda *args: runs.append(Synthetic(*args)) or runs[0])
    s, process = settings(kind, "--lr", "1e-3", "--fake_lr", "1e-3", "--ema", "0.5")
    s.warmup = 1
    update = bench.training(s, process)
    run, = runs
    nets = run.net, run.fake, run.optim.ema, run.teacher
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    update()
    moved = [[not torch.equal(p, q) for p, q in zip(net.parameters(), old)]
             for net, old in zip(nets, before)]
    assert all(moved[0]) and all(moved[1]) and all(moved[2]) and not any(moved[3])
    update()
    assert run.step == 2


Synthetic = bench.Synthetic
