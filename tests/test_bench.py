"""bench.py: its clock, its FLOP units, its iteration, the KV cache of the rival, and a toy run.

    python -m pytest -q tests/test_bench.py
"""
import argparse
import copy
import json
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import idlm_loss
from data import BadInput
from model import DiT, ModelConfig
from teacher import Masked, Uniform

TINY = ("--device cpu --no-compile --block_size 16 --num_layers 2 --width 32 --num_heads 2 "
        "--vocab 65 --iters 2 --batch_size 2").split()


@pytest.fixture
def args():
    device = torch.device("cpu")
    return argparse.Namespace(
        mode="train", process="duo", uniform_update="hard", latent="state", betas=(1.0, 1.0),
        own_token="weighed", batch_size=2, block_size=128, num_layers=2, num_heads=2, width=64,
        iters=3, dropout=0.1, ema=True, compile=False, device=device, cuda=False,
        where={"device": "NVIDIA H200"}, amp=torch.autocast("cpu", enabled=False))


@pytest.fixture(autouse=True)
def settings_of_main(monkeypatch):
    """main() sets three global switches; they are put back after every test."""
    monkeypatch.setattr(idlm_loss, "COMPILE", False)
    precision = torch.get_float32_matmul_precision()
    limit = torch._dynamo.config.cache_size_limit
    yield
    torch.set_float32_matmul_precision(precision)
    torch._dynamo.config.cache_size_limit = limit


def test_toy_run_of_all_cases_ends_in_a_line_of_json(capsys, tmp_path):
    bench.main(["--all", "--process", "duo", "--records", str(tmp_path / "records.json"), *TINY])
    records = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert records == json.loads((tmp_path / "records.json").read_text())
    assert [r["name"] for r in records] == [
        "train mdlm B2", "train hard B2", "train marginal B2", "train soft B2",
        "sample mdlm 16 B8", "sample mdlm 16 B32", "sample greedy 4 B8", "sample greedy 4 B32",
        "rival B1", "rival B8", "rival B32"]
    for r in records:
        assert 0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"]
        assert r["tokens_per_s"] == round(1e3 * r["B"] * r["L"] / r["median_ms"])
        assert r["V"] == (65 if r["process"] == "mdlm" else 64)
        assert r["mfu"] is None and r["peak_gib"] is None and "authors_ms" not in r   # not measured
        assert {"commit", "torch", "device", "date", "command", "seed", "compile_s"} <= r.keys()
        assert r["recompilations"] == 0


@pytest.mark.parametrize("flags, name", [
    ("train --process duo --update soft --no-ema", "train soft B2"),
    ("sample --process duo --ending ancestral --steps 2", "sample ancestral 2 B2"),
    ("rival", "rival B2")])
def test_one_case_by_its_flags(flags, name, capsys):
    bench.main(flags.split() + TINY)
    record, = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["name"] == name


def test_a_size_of_zero_is_refused():
    with pytest.raises(BadInput, match="below 1"):
        bench.main(["train", *TINY, "--iters", "0"])


def test_clock_keeps_warm_up_apart_and_times_the_parts(args):
    """A first call of 0.3 s stands for a compilation; the parts sleep 4 and 8 ms, never less. One
    graph is compiled in warm-up, two after it: those two are counted."""
    calls = []

    def first():
        calls.append(0)
        bench.counters["stats"]["unique_graphs"] += len(calls) in (1, 4, 5)
        time.sleep(0.3 if len(calls) == 1 else 0.004)

    parts = [first, lambda: time.sleep(0.008)]
    parts, record = bench.measure(args, "sleep", 100, parts, warmup=3)
    assert len(calls) == 6 and record["iters"] == 3
    assert 4 <= parts[0] < 150 and 8 <= parts[1] < 150 and 12 <= record["median_ms"] < 150
    assert record["compile_s"] >= 0.1 and record["recompilations"] == 2
    assert record["mfu"] is None                             # no units, no guess


def test_mfu_of_the_papers_masked_iteration_by_hand(args):
    """SPEC: 9 trunk units of 1.7 TFLOP and 3.5 head units of 0.63 are 17.5 TFLOP: at 989 TFLOP/s
    17.7 ms. An iteration of T ms thus has an MFU of 17.7 / T, and an unknown device has none."""
    args.batch_size, args.block_size, args.num_layers, args.width = 8, 1024, 12, 768
    masked = 50258, [lambda: time.sleep(0.02)], bench.UNITS["mdlm"], 1
    record = bench.measure(args, "masked", *masked)[1]
    assert record["mfu"] * record["median_ms"] == pytest.approx(17.7, rel=0.02)
    args.where = {"device": "some other card"}
    assert bench.measure(args, "masked", *masked)[1]["mfu"] is None


class Products(TorchDispatchMode):
    """FLOPs of the matrix products whose sizes n, k, m are counted(n, k, m); attention's calls."""

    def __init__(self, counted):
        super().__init__()
        self.counted, self.flops, self.forward, self.backward = counted, 0, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ("mm", "addmm"):
            (n, k), m = args[-2].shape, args[-1].shape[1]
            self.flops += 2 * n * k * m * self.counted({n, k, m})
        self.forward += "scaled_dot_product" in name and "backward" not in name
        self.backward += "scaled_dot_product" in name and "backward" in name
        return op(*args, **(kwargs or {}))


def products(args, process, rng, counted):
    """Those of one iteration."""
    parts = bench.iteration(args, process, rng)
    with Products(counted) as found:
        for part in parts:
            part()
    return found


@pytest.mark.parametrize("kind", ["mdlm", "hard", "marginal", "soft"])
def test_units_are_the_products_that_an_iteration_computes(kind, args, rng):
    """24 D^2 FLOPs a token, layer and weights unit, by the sizes of the products that run; an
    attention unit a forward call, two a backward call."""
    args.process, args.uniform_update = ("mdlm", "hard") if kind == "mdlm" else ("duo", kind)
    args.width, tokens, D = 48, 2 * 128, 48
    process = Masked(5) if kind == "mdlm" else Uniform(4)
    counted = products(args, process, rng, lambda sizes: sizes <= {tokens, D, 3 * D, 4 * D})
    weights, attention, _ = bench.UNITS[kind]
    assert counted.flops == weights * tokens * args.num_layers * 24 * D * D
    assert counted.forward + 2 * counted.backward == attention * args.num_layers


@pytest.mark.parametrize("kind", ["hard", "marginal"])
def test_uniform_head_units(kind, args, rng):
    """The unit does not count the draws, which project the kept positions of both losses anew."""
    args.uniform_update, args.width, K, D, tokens = kind, 48, 7, 48, 2 * 128
    counted = products(args, Uniform(K), rng, lambda sizes: K in sizes)
    drawn = counted.flops / (2 * D * K) - bench.UNITS[kind][2] * tokens
    assert drawn == int(drawn) and 0.4 * tokens < drawn < 1.6 * tokens


@pytest.mark.parametrize("kind", ["mdlm", "hard", "soft"])
def test_an_iteration_updates_generator_fake_and_average(kind, args, rng, monkeypatch):
    """Every parameter of both gets a gradient and moves, by AdamW's first step of lr 1e-6; the
    teacher stays; the average moves by 1e-4 of what the generator did (in float64, to be seen)."""
    nets, averages, lerp = [], [], torch._foreach_lerp_
    network = bench.network
    monkeypatch.setattr(bench, "network", lambda *a, **k: nets.append(network(*a, **k).double())
                        or nets[-1])
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda average, weights, share: averages.append(
        (average, [x.clone() for x in average])) or lerp(average, weights, share))
    args.process, args.uniform_update = ("mdlm", "hard") if kind == "mdlm" else ("duo", kind)
    args.dropout, args.block_size = 0.0, 32
    parts = bench.iteration(args, Masked(9) if kind == "mdlm" else Uniform(8), rng)
    generator, fake, teacher = nets
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    for part in parts:
        part()
    for net, old in zip(nets, before):
        moved = [not torch.equal(p, q) for p, q in zip(net.parameters(), old)]
        assert not any(moved) if net is teacher else all(moved)
    (average, old), = averages
    for a, o, p in zip(average, old, generator.parameters()):
        assert torch.allclose(a - o, 1e-4 * (p.detach() - o), rtol=1e-3, atol=1e-15)


def test_writing_with_a_cache_equals_writing_without():
    """The same draws, the whole text through the causal network at every token, in float64."""
    torch.manual_seed(0)
    net = DiT(ModelConfig(50, num_layers=3, num_heads=2, width=32, causal=True)).double().eval()
    for block in net.blocks:                 # a new network is the identity and predicts nothing
        torch.nn.init.ones_(block.adaLN_modulation.bias)
    torch.nn.init.normal_(net.output_layer.linear.weight, std=0.5)
    L, B = 24, 3
    u, first = torch.rand(L, B, dtype=torch.float64), torch.randint(50, (B, 1))
    text = first
    with torch.no_grad():
        for i in range(L):
            logits = net(text, torch.zeros(B))[:, -1]
            text = torch.cat([text, idlm_loss.sample_categorical(logits, u[i])[:, None]], dim=1)
    tokens = torch.cat([first, first.new_zeros(B, L)], dim=1)
    write = bench.cached_writer(copy.deepcopy(net), tokens, u)
    for _ in range(2):                                       # a second text starts from nothing
        tokens[:, 1:] = 0
        write()
        assert torch.equal(tokens, text)
    assert len(text[:, 1:].unique()) > 20                    # and the comparison is of something
    with torch.no_grad():                                    # that depends on the past
        last = net(text[:, :-1], torch.zeros(B))[:, -1].softmax(-1)
        alone = net(text[:, -2:-1], torch.zeros(B))[:, -1].softmax(-1)
    assert (last - alone).abs().max() > 0.05
