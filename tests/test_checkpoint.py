"""Networks in and out of files; how a script ends; which device and precision.

    python -m pytest tests/test_checkpoint.py
"""
import collections
import io
import json
import math
import os
import random
import re
import shutil
import sys
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

import checkpoint
from checkpoint import export, load, load_network, make_process, provenance, run_script, save
from conftest import ROOT, refused, seeded
from data import BadInput
from model import DiT, ModelConfig
from teacher import Masked, Uniform

CHARS = "abcdefghijkl"                      # K = 12
CHAR_SPEC = {"name": "char", "chars": CHARS}
V, D, COND, LAYERS, HEADS = 13, 128, 8, 2, 2


def table(V=V, D=D, cond=COND, layers=LAYERS, head=64):
    """Names and shapes of a published checkpoint, in its order."""
    shapes = {"vocab_embed.embedding": (V, D),
              "sigma_map.mlp.0.weight": (cond, 256), "sigma_map.mlp.0.bias": (cond,),
              "sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,),
              "rotary_emb.inv_freq": (head // 2,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm1.weight": (D,),
                   f"blocks.{i}.attn_qkv.weight": (3 * D, D), f"blocks.{i}.attn_out.weight": (D, D),
                   f"blocks.{i}.norm2.weight": (D,),
                   f"blocks.{i}.mlp.0.weight": (4 * D, D), f"blocks.{i}.mlp.0.bias": (4 * D,),
                   f"blocks.{i}.mlp.2.weight": (D, 4 * D), f"blocks.{i}.mlp.2.bias": (D,),
                   f"blocks.{i}.adaLN_modulation.weight": (6 * D, cond),
                   f"blocks.{i}.adaLN_modulation.bias": (6 * D,)}
    shapes |= {"output_layer.norm_final.weight": (D,),
               "output_layer.linear.weight": (V, D), "output_layer.linear.bias": (V,),
               "output_layer.adaLN_modulation.weight": (2 * D, cond),
               "output_layer.adaLN_modulation.bias": (2 * D,)}
    return {"backbone." + key: shape for key, shape in shapes.items()}


def synthetic(seed=0, **sizes):
    """Random weights of that layout."""
    rng = seeded(seed)
    weights = {key: torch.randn(shape, generator=rng) / math.sqrt(shape[-1])
               for key, shape in table(**sizes).items()}
    for key in weights:
        if "norm" in key:
            weights[key] = 1 + 0.1 * weights[key]
        if key.endswith("inv_freq"):
            n = len(weights[key])
            weights[key] = torch.tensor([10_000 ** (-i / n) for i in range(n)])
    return weights


def write(folder, weights, name="model.safetensors", **config):
    """A folder as on the hub: weights and, where there are entries, a config.json. -> the file"""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    return folder / name


CHAR = dict(tokenizer=CHAR_SPEC)


def small_net(seed=0, **settings):
    """A network of which every tensor is random, also those that start at 0."""
    rng = seeded(seed)
    sizes = dict(vocab_size=13, num_layers=1, num_heads=2, width=16, cond_dim=8)
    net = DiT(ModelConfig(**sizes | settings))
    for w in net.parameters():
        w.data = torch.randn(w.shape, generator=rng) * 0.2
    return net.eval()


def state_of(net, process="mdlm", **more):
    """What train.py saves of a network."""
    return {"config": asdict(net.config), "process": process, **CHAR, "block_size": 8,
            "stage": "teacher", "step": 3, "updates": 3, "ema": net.state_dict(), "commit": "abc",
            "data": "text.txt", "torch": str(torch.__version__)} | more


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- our own files ------------------------------------------------------------------------------

def test_save_and_load(tmp_path):
    state = {"x": torch.arange(5), "nested": {"y": [1, 2.5, None, "z"]}}
    save(tmp_path / "deep" / "x.pt", state)
    found = load(tmp_path / "deep" / "x.pt")
    assert torch.equal(found["x"], state["x"]) and found["nested"] == state["nested"]
    assert os.listdir(tmp_path / "deep") == ["x.pt"]


class Foreign:
    """An object whose reading runs code: it would make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_foreign_pickled_code_is_never_run(tmp_path, suffix):
    path, trace = tmp_path / f"x{suffix}", tmp_path / "trace"
    torch.save({"ema": {}, "process": Foreign(trace)}, path)
    refused(lambda: load_network(path), str(path))
    if suffix != ".ckpt":
        refused(lambda: load(path), "holds pickled code")
    assert not trace.exists()
    torch.load(path, weights_only=False)    # the file is a real trap
    assert trace.exists()


def test_a_checkpoint_that_is_missing_or_cut(tmp_path):
    refused(lambda: load_network("out/mdlm/none.pt"), "no checkpoint at out/mdlm/none.pt",
            "run python train.py first")
    save(tmp_path / "x.pt", state_of(small_net()))
    whole = (tmp_path / "x.pt").read_bytes()
    for size in (0, 1, 3, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused(lambda: load_network(tmp_path / "cut.pt"), "cut.pt is damaged")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    refused(lambda: load_network(tmp_path / "tensor.pt"), "tensor.pt")
    for found in ({}, {"ema": {}, "config": {}, "process": "mdlm"}, {"ema": 1}):
        save(tmp_path / "odd.pt", found)
        refused(lambda: load_network(tmp_path / "odd.pt"), "odd.pt cannot be used")


def flipped(whole, draw):
    """One random bit of a file is another."""
    data = bytearray(whole)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_a_flipped_bit_is_seen(kind, tmp_path):
    """40 random bits: either the file is refused, or what is loaded is equal, since the bit lay
    between the tensors."""
    net = small_net()
    save(tmp_path / "x.pt", state_of(net))
    path = tmp_path / "x.pt"
    if kind == "export":
        export(*load_network(path), tmp_path / "out")
        path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    draw = random.Random(0)
    seen = 0
    for _ in range(40):
        path.write_bytes(flipped(whole, draw))
        try:
            assert same(load_network(path)[0], net)
        except BadInput:
            seen += 1
    assert seen == 40 if kind == "export" else seen > 20
    path.write_bytes(whole)
    assert same(load_network(path)[0], net)


def test_load_network_gives_the_averaged_weights_and_the_rest(tmp_path):
    net, latest = small_net(0, dropout=0.5), small_net(1)
    state = state_of(net, seed=1, data_key="00ff")
    save(tmp_path / "idlm.resume.pt", state | {"state": {"main": latest.state_dict()}})
    found, meta = load_network(tmp_path / "idlm.resume.pt", "cpu")
    assert same(found, net) and found.config == net.config and not found.training
    assert all(p.requires_grad for p in found.parameters())
    del state["ema"]
    assert meta == state
    assert load_network(str(tmp_path / "idlm.resume.pt"), process="mdlm")[1] == meta


@pytest.mark.parametrize("changed, words", [
    ({"process": "duo", "tokenizer": {"name": "char", "chars": "abc"}}, ["13 tokens", "of 3"]),
    ({"tokenizer": {"name": "char", "chars": "abc"}}, ["13 tokens", "tokenizer of 3"]),
    ({"process": "ar"}, ["13 tokens", "tokenizer of 12"]),
    ({"process": "sedd"}, ["sedd"]),
    ({"process": 7}, ["process 7 is no str"]),
    ({"stage": None}, ["stage None is no str"]),
    ({"block_size": "many"}, ["block_size 'many' is no int"]),
    ({"block_size": 0}, ["blocks of 0"]), ({"block_size": 2 ** 40}, ["blocks of"]),
    ({"step": "x"}, ["step 'x' is no int"]), ({"updates": 1.5}, ["updates 1.5 is no int"]),
    ({"tokenizer": "char"}, ["TypeError"]), ({"tokenizer": {}}, ["KeyError 'name'"]),
    ({"tokenizer": {"name": "char", "chars": 12}}, ["TypeError"]),
    ({"tokenizer": {"name": "char", "chars": "abcdefghijkk"}}, ["tokenizer of 11"]),
    ({"config": {}}, ["KeyError"]), ({"config": 3}, ["TypeError"])])
def test_metadata_is_checked_before_anything_is_built(changed, words, tmp_path):
    save(tmp_path / "x.pt", state_of(small_net()) | changed)
    refused(lambda: load_network(tmp_path / "x.pt"), "x.pt cannot be used", *words)


@pytest.mark.parametrize("name, value", [
    ("num_layers", 10 ** 9), ("num_layers", "two"), ("num_layers", 2), ("num_layers", 0),
    ("num_heads", 0), ("num_heads", 3), ("num_heads", 4), ("num_heads", None),
    ("width", 10 ** 9), ("width", 32), ("width", -16), ("width", 16.0),
    ("cond_dim", 10 ** 9), ("cond_dim", 16), ("vocab_size", 10 ** 12), ("vocab_size", 12),
    ("causal", "no"), ("causal", 0)])
def test_sizes_that_the_tensors_do_not_have(name, value, tmp_path):
    """Refused at once, without memory for what the file claims."""
    state = state_of(small_net())
    state["config"][name] = value
    save(tmp_path / "x.pt", state)
    refused(lambda: load_network(tmp_path / "x.pt"), "x.pt cannot be used")


@pytest.mark.parametrize("missing", ["process", "tokenizer", "stage", "block_size", "step",
                                     "updates", "config", "ema"])
def test_a_missing_key(missing, tmp_path):
    state = state_of(small_net())
    del state[missing]
    save(tmp_path / "x.pt", state)
    refused(lambda: load_network(tmp_path / "x.pt"), "x.pt cannot be used")


def test_tensors_that_do_not_fit(tmp_path):
    path, net = tmp_path / "x.pt", small_net()
    weights = net.state_dict()
    save(path, state_of(net, ema={key: w for key, w in weights.items() if "norm2" not in key}))
    refused(lambda: load_network(path), "Missing key", "blocks.0.norm2.weight")
    save(path, state_of(net))
    refused(lambda: load_network(path, "cpu", "duo"), "a mdlm network", "process duo")


@pytest.mark.parametrize("name", ["output_layer.linear.bias", "rotary_emb.inv_freq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(name, value, tmp_path):
    """One sentence instead of texts of blanks."""
    net = small_net()
    net.state_dict()[name][0] = value
    save(tmp_path / "x.pt", state_of(net))
    refused(lambda: load_network(tmp_path / "x.pt"), "not finite", "--lr")


@pytest.mark.parametrize("removed", [{"latent_words": 8}, {"latent_dim": 64}])
def test_a_generator_of_an_earlier_kind(removed, tmp_path):
    """The sentence names the last commit that reads it, for a checkpoint and an exported folder."""
    net = small_net()
    state = state_of(net)
    state["config"] |= {"latent_dim": 0, "latent_words": 0, "latent_scale": 1.0} | removed
    state["ema"]["frequencies"] = torch.ones(5, 12)
    save(tmp_path / "old.pt", state)
    refused(lambda: load_network(tmp_path / "old.pt"), "earlier kind", "cefa7b7")
    weights = {f"backbone.{key}": w for key, w in state["ema"].items()}
    write(tmp_path / "mdlm", weights, **CHAR, **state["config"])
    refused(lambda: load_network(tmp_path / "mdlm"), "earlier kind", "cefa7b7")
    del state["ema"]["frequencies"]
    for key in removed:
        state["config"][key] = 0
    save(tmp_path / "teacher.pt", state)    # its teacher is what a teacher is today
    assert same(load_network(tmp_path / "teacher.pt")[0], net)


def test_make_process():
    masked = make_process({"process": "mdlm", "tokenizer": CHAR_SPEC})
    assert isinstance(masked, Masked) and masked.mask_id == masked.K == 12
    uniform = make_process({"process": "duo", "tokenizer": CHAR_SPEC})
    assert isinstance(uniform, Uniform) and uniform.K == 12
    assert make_process({"process": "mdlm", "tokenizer": {"name": "gpt2"}}).mask_id == 50257
    assert make_process({"process": "duo", "tokenizer": {"name": "gpt2"}}).K == 50257
    refused(lambda: make_process({"process": "ar", "tokenizer": CHAR_SPEC}), "judge")


def test_the_key_of_weights():
    """Equal for equal weights, another for any other: one entry, or the same entries elsewhere."""
    net = small_net()
    key = checkpoint.weights_key(net)
    assert key == checkpoint.weights_key(small_net()) and re.fullmatch("[0-9a-f]{16}", key)
    bias = net.output_layer.linear.bias.data
    bias[3] = bias[3].nextafter(torch.tensor(9.0))
    assert checkpoint.weights_key(net) != key


# ---- published checkpoints ----------------------------------------------------------------------

def test_a_published_checkpoint(tmp_path, rng):
    """Sizes from the tensors; the very tensors; the logits of a network that holds them."""
    weights = synthetic()
    net, meta = load_network(write(tmp_path / "mdlm", weights, **CHAR))
    assert net.config == ModelConfig(V, LAYERS, HEADS, D, COND)
    assert (meta["process"], meta["block_size"], meta["stage"]) == ("mdlm", 1024, "teacher")
    assert meta["step"] >= meta["updates"]                 # a finished teacher
    found = net.state_dict()
    assert {f"backbone.{key}" for key in found} == weights.keys()
    assert all(torch.equal(weights[f"backbone.{key}"], w) for key, w in found.items())
    other = DiT(net.config)
    assert torch.allclose(other.rotary_emb.inv_freq, net.rotary_emb.inv_freq)
    other.load_state_dict(found)
    x = torch.randint(V, (2, 9), generator=rng)
    assert torch.equal(net(x, torch.rand(2).zero_()), other(x, torch.zeros(2)))


def test_every_source_of_the_same_tensors(tmp_path, monkeypatch, capsys):
    weights = synthetic(layers=1)
    plain = {key: w.clone() for key, w in weights.items()}
    net, meta = load_network(write(tmp_path / "a", weights, **CHAR))
    assert load_network(tmp_path / "a")[1] == meta
    sources = [write(tmp_path / "b", plain, "w.pt", **CHAR), tmp_path / "b",
               write(tmp_path / "c", plain, "pytorch_model.bin", **CHAR),
               write(tmp_path / "d", {"state_dict": plain}, "last.ckpt", **CHAR), tmp_path / "d"]
    assert all(same(load_network(source)[0], net) for source in sources)
    assert "last.ckpt: took the plain weights" in capsys.readouterr().err
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **kwargs: asked.append(name) or str(tmp_path / "a"))
    found, meta = load_network("somebody/tiny-duo-v1.5")
    assert asked == ["somebody/tiny-duo-v1.5"] and same(found, net) and meta["process"] == "duo"


def rename(key):
    return key.replace("weight", "wait") if key.endswith("weight") else f"{key}_"


@pytest.mark.parametrize("key", [key for key in table(layers=1) if "mlp.2" not in key])
def test_a_tensor_that_is_missing_renamed_misshapen_or_too_much(tmp_path, key):
    name = key.removeprefix("backbone.")
    whole = synthetic(layers=1)
    without = {k: w for k, w in whole.items() if k != key}
    wrong = [without, without | {rename(key): whole[key]}, whole | {key: whole[key][None].clone()},
             whole | {key: torch.cat([whole[key]] * 2)}]
    for weights in wrong:
        refused(lambda: load_network(write(tmp_path / "mdlm", weights, **CHAR)), "cannot be used")
    weights = whole | {rename(key): whole[key].clone()}
    refused(lambda: load_network(write(tmp_path / "mdlm", weights, **CHAR)), rename(name))


class Settings(dict):
    """As in a Lightning file: an object with a state, which must not come alive."""
    alive = []

    def __init__(self, *args):
        self.alive.append(self)

    def __reduce__(self):
        return Settings, (1, 2), {"x": 1}

    def __setstate__(self, state):
        self.alive.append(state)


def test_a_lightning_file_gives_its_average_and_runs_nothing(tmp_path, capsys):
    weights, average = synthetic(0), synthetic(1)
    shadow = [w for key, w in average.items() if not key.endswith("inv_freq")]
    found = {"state_dict": weights | {"teacher.x": torch.ones(2)}, "epoch": 3,
             "ema": {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow},
             "hyper_parameters": {"config": Settings(), "tokenizer": Settings(),
                                  "more": collections.defaultdict(dict)}}
    path = write(tmp_path / "mdlm", found, "last.ckpt", **CHAR)
    Settings.alive.clear()
    net, _ = load_network(path)
    assert Settings.alive == []
    assert all(torch.equal(net.state_dict()[key.removeprefix("backbone.")], w)
               for key, w in average.items())
    assert "last.ckpt: took the EMA weights" in capsys.readouterr().err
    found["ema"]["shadow_params"] = shadow[:-1]
    refused(lambda: load_network(write(tmp_path / "mdlm", found, "last.ckpt")), "EMA", "last.ckpt")


@pytest.mark.parametrize("name, V, flag, config, process", [
    ("mdlm-owt", 13, None, {}, "mdlm"),
    ("duo", 13, None, {}, "duo"),
    ("duo-distilled", 12, None, {}, "duo"),
    ("idlm-dcd", 13, None, {}, "duo"),
    ("idlm-mdlm", 13, None, {}, "mdlm"),
    ("nameless", 13, None, {}, "mdlm"),
    ("nameless", 12, "duo", {}, "duo"),
    ("nameless", 12, None, {"model_type": "DUO"}, "duo"),
    ("mdlm", 13, None, {"process": "duo"}, "duo"),
    ("duo", 13, "mdlm", {}, "mdlm")])
def test_which_process_it_is(tmp_path, name, V, flag, config, process):
    """The file's own words before the flag before its name."""
    path = write(tmp_path / name, synthetic(layers=1, V=V), **CHAR, **config)
    assert load_network(path, "cpu", flag)[1]["process"] == process


@pytest.mark.parametrize("name, V, flag, config, words", [
    ("mdlm", 13, "duo", {"model_type": "mdlm"}, ["mdlm", "duo"]),
    ("mdlm", 13, "mdlm", {"process": "duo"}, ["mdlm", "duo"]),
    ("mdlm", 12, None, {}, ["12 tokens", "tokenizer of 12"]),
    ("duo", 14, None, {}, ["14 tokens", "tokenizer of 12"]),
    ("mdlm", 13, None, {"hidden_dim": 256}, ["'width': 256", "'width': 128"]),
    ("mdlm", 13, None, {"n_blocks": 3}, ["'num_layers': 3", "'num_layers': 2"]),
    ("mdlm", 13, None, {"cond_dim": 16}, ["'cond_dim': 16", "'cond_dim': 8"]),
    ("mdlm", 13, None, {"n_heads": 4}, ["rotary_emb.inv_freq"]),
    ("mdlm", 13, None, {"n_heads": 3}, ["3 heads"]),
    ("mdlm", 13, None, {"vocab_size": 12}, ["12 tokens"]),
    ("mdlm", 13, None, {"n_blocks": 10 ** 9}, ["'num_layers': 1000000000"]),
    ("mdlm", 13, None, {"model_length": "long"}, ["block_size 'long' is no int"]),
    ("mdlm", 13, None, {"sha256": "00"}, ["not as they were exported together"])])
def test_contradictions_of_a_config(tmp_path, name, V, flag, config, words):
    path = write(tmp_path / name, synthetic(V=V), **CHAR, **config)
    refused(lambda: load_network(path, "cpu", flag), *words)


def test_without_a_config_it_is_gpt2(tmp_path):
    """The published vocabularies: 50,258 with a mask or, uniform, with an unused last token."""
    weights = synthetic(V=50258, D=64, layers=1)
    _, meta = load_network(write(tmp_path / "mdlm-owt", weights))
    assert meta["tokenizer"] == {"name": "gpt2"} and make_process(meta).mask_id == 50257
    net, meta = load_network(write(tmp_path / "duo", weights))
    assert make_process(meta).K == 50257 and net.config.vocab_size == 50258
    assert meta["config"] == asdict(net.config) and net.config.num_heads == 1
    path = write(tmp_path / "mdlm", synthetic(layers=1))
    refused(lambda: load_network(path), "13 tokens", "50257")


def test_a_padded_uniform_vocabulary_predicts_tokens_only(tmp_path, rng):
    net, meta = load_network(write(tmp_path / "duo", synthetic(layers=1), **CHAR))
    process = make_process(meta)
    x_t = process.prior(2, 5, rng)
    log_probs = process.log_probs(net(x_t, torch.ones(2)), x_t)
    assert log_probs.shape == (2, 5, 12)
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 5))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "mdlm", synthetic(layers=1), **CHAR)
    whole = path.read_bytes()
    for size in (0, 7, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(lambda: load_network(path), "model.safetensors is damaged")
    path.write_bytes(whole)
    for text in ('{"process": "mdl', "[]", "3", "\x00"):
        path.with_name("config.json").write_text(text, encoding="utf-8")
        refused(lambda: load_network(path), "cannot be used")
    (tmp_path / "empty").mkdir()
    refused(lambda: load_network(tmp_path / "empty"), "empty", "0 files")
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "two" / name, state_of(small_net()))
    refused(lambda: load_network(tmp_path / "two"), "two", "2 files")
    path = write(tmp_path / "other", {"other": torch.ones(2)})
    refused(lambda: load_network(path), "vocab_embed")

    import huggingface_hub

    def offline(name, **kwargs):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(lambda: load_network("somebody/nothing"), "HF_HOME", "local folder")


# ---- export -------------------------------------------------------------------------------------

@pytest.mark.parametrize("process, V", [("mdlm", 13), ("duo", 12), ("duo", 13)])
def test_export_and_import_are_the_identity(tmp_path, process, V, rng):
    """Tensors, logits and what is said of them; names and sizes are the published ones."""
    net = small_net(vocab_size=V, dropout=0.25)
    save(tmp_path / "idlm.pt", state_of(net, process, stage="idlm", defining={"clip": math.inf}))
    net, meta = load_network(tmp_path / "idlm.pt")
    export(net, meta, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    x = torch.randint(12, (2, 5), generator=rng)
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        again, found = load_network(source)
        assert same(again, net) and again.config == net.config
        assert torch.equal(again(x, torch.ones(2)), net(x, torch.ones(2)))
        assert all(found[key] == value for key, value in meta.items() if key != "defining")
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tuple(w.shape) for key, w in stored.items()} == table(
        V=V, D=16, cond=8, layers=1, head=8)
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    assert "Infinity" not in text           # which is no JSON
    config = json.loads(text)
    assert (config["hidden_dim"], config["n_blocks"], config["n_heads"], config["model_length"],
            config["cond_dim"], config["vocab_size"]) == (16, 1, 2, 8, 8, V)
    other = "mdlm" if process == "duo" else "duo"
    refused(lambda: load_network(tmp_path / "out", "cpu", other), process, other)


def exported(tmp_path):
    """-> the folder of an export, its network, the text of its config.json"""
    net = small_net()
    meta = {key: value for key, value in state_of(net).items() if key != "ema"}
    export(net, meta, tmp_path / "out")
    return tmp_path / "out", net, (tmp_path / "out/config.json").read_text(encoding="utf-8")


def test_every_flip_in_a_config_is_seen(tmp_path):
    """A bit is another, or a character; in the checksum and its name at every place."""
    folder, net, text = exported(tmp_path)
    path = folder / "config.json"
    data = text.encode("utf-8")
    draw = random.Random(0)
    changed = []
    for place in [*range(0, len(data) - 80, 3), *range(len(data) - 80, len(data))]:
        character = draw.choice([c for c in b' 07aAfg_",:{' if c != data[place]])
        byte = character if place % 2 else data[place] ^ 1 << draw.randrange(8)
        changed.append(data[:place] + bytes([byte]) + data[place + 1:])
    changed += [data[:-2], data + b" ", data.replace(b"sha256", b"sha-256")]
    assert len(changed) > 200 and b'"sha256"' in data[-80:]
    for other in changed:
        path.write_bytes(other)
        refused(lambda: load_network(folder), "out cannot be used")
    path.write_bytes(data.replace(b"\n", b"\r\n"))        # what git makes of it on Windows
    assert same(load_network(folder)[0], net)


def test_files_of_two_exports_do_not_mix(tmp_path):
    folder, _, text = exported(tmp_path)
    meta = {key: value for key, value in state_of(small_net()).items() if key != "ema"}
    export(small_net(), meta | {"step": 5}, tmp_path / "other")
    same_weights = (tmp_path / "other/model.safetensors").read_bytes()
    assert same_weights == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "other/config.json").read_text(encoding="utf-8") != text
    export(small_net(1), meta, tmp_path / "third")
    (tmp_path / "third/config.json").replace(folder / "config.json")
    refused(lambda: load_network(folder), "not as they were exported together")


def test_an_earlier_export_is_read(tmp_path):
    """It states the checksum of the weights alone; an entry of its config may have been changed,
    the weights not."""
    folder, net, text = exported(tmp_path)
    config = json.loads(text)
    weights = folder / "model.safetensors"
    config["sha256"] = checkpoint.checksum(weights.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"seed": 7}), encoding="utf-8")
    found, meta = load_network(folder)
    assert same(found, net) and meta["seed"] == 7
    write(folder, {key: w + 1 for key, w in safetensors.torch.load_file(weights).items()})
    refused(lambda: load_network(folder), "not as they were exported together")


def test_the_shipped_model_is_whole(tmp_path):
    shipped = ROOT / "assets/shakespeare/idlm"
    assert load_network(shipped)[1]["stage"] == "idlm"
    shutil.copytree(shipped, tmp_path / "idlm")
    config = tmp_path / "idlm/config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("1500", "1501"), encoding="utf-8")
    refused(lambda: load_network(tmp_path / "idlm"), "not as they were exported together")


def test_export_never_overwrites(tmp_path):
    net = small_net()
    meta = {key: value for key, value in state_of(net).items() if key != "ema"}
    export(net, meta, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    refused(lambda: export(small_net(1), meta, tmp_path), "holds a network")
    os.remove(tmp_path / "config.json")
    refused(lambda: export(small_net(1), meta, tmp_path), "holds a network")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_export_in_half_precision(tmp_path):
    net = small_net()
    meta = {key: value for key, value in state_of(net).items() if key != "ema"}
    export(net, meta, tmp_path, torch.bfloat16)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == (torch.float32 if "inv_freq" in key else torch.bfloat16)
               for key, w in stored.items())
    again = load_network(tmp_path)[0].state_dict()
    assert all(torch.equal(again[key], w if "inv_freq" in key else w.bfloat16().float())
               for key, w in net.state_dict().items())


# ---- how a script ends --------------------------------------------------------------------------

def ended(main, monkeypatch):
    """-> what run_script leaves for stderr, one line; its exit status is then 1"""
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert "\n" not in end.value.code
    return end.value.code


def raising(error):
    def main():
        raise error
    return main


def test_one_sentence(monkeypatch):
    line = ended(raising(torch.OutOfMemoryError("CUDA out of memory.\nTried")), monkeypatch)
    assert line.startswith("train.py: the GPU's memory is full") and "stays" in line
    assert all(flag in line for flag in ("--micro_batch", "--batch_size", "--num_texts"))
    assert ended(raising(BadInput("no")), monkeypatch) == "train.py: no"
    assert "--resume" in ended(raising(KeyboardInterrupt()), monkeypatch)
    line = ended(lambda: open("none/x"), monkeypatch)
    assert "No such file or directory: 'none/x'" in line and "stays" in line
    assert "'utf-8' codec" in ended(lambda: b"\xff".decode("utf-8"), monkeypatch)
    with pytest.raises(ZeroDivisionError):                 # a bug is no user's error
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize("script, status", [("sample.py", 0), ("train.py", 1)])
def test_a_pipe_that_closes(script, status, monkeypatch, tmp_path):
    """Quiet: a number is no sentence. But a training that nobody reads has not been finished."""
    with monkeypatch.context() as patch, open(tmp_path / "out", "w") as stdout:
        patch.setattr("sys.stdout", stdout)
        patch.setattr("sys.argv", [script])
        with pytest.raises(SystemExit) as end:
            run_script(raising(BrokenPipeError()))
    assert end.value.code == status


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_terminal_survives(encoding, monkeypatch):
    """What it cannot show is replaced."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    run_script(lambda: print("a · é ☃ b"))
    shown = terminal.buffer.getvalue().decode(encoding)
    assert shown.startswith("a ") and shown.rstrip().endswith(" b")
    assert ("☃" in shown) == (encoding == "utf-8") and ("é" in shown) == (encoding != "ascii")


@pytest.mark.parametrize("kind, low, high, text, value", [
    (int, 1, 9, "9", 9), (float, 0, math.inf, "1e-3", 1e-3), (int, 0, 2 ** 62, "0", 0)])
def test_numbers_within_bounds(kind, low, high, text, value):
    assert checkpoint.number(kind, low, high)(text) == value


@pytest.mark.parametrize("kind, text", [
    (int, "0"), (int, "10"), (int, "1.5"), (int, "x"), (int, "9" * 5000), (float, "nan"),
    (float, "inf"), (float, "-1"), (float, "")])
def test_numbers_out_of_bounds(kind, text):
    p = checkpoint.Parser()
    p.add_argument("--n", type=checkpoint.number(kind, 1, 9))
    line = refused(lambda: p.parse_args([f"--n={text}"]), "--n", "--help")
    assert "usage" not in line


# ---- device and precision -----------------------------------------------------------------------

def test_device_of_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert checkpoint.pick_device(None) == checkpoint.pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert checkpoint.pick_device(None) == torch.device("cuda:3")
    assert checkpoint.pick_device("cpu") == torch.device("cpu")
    assert checkpoint.pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "cuda:x", "tpu"):
        refused(lambda: checkpoint.pick_device(name), f"--device {name}: this machine", "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(lambda: checkpoint.pick_device("cuda"), "--device cuda", "cpu")


@pytest.mark.parametrize("is_native", [True, False])
def test_bfloat16_only_where_it_is_not_emulated(is_native, monkeypatch):
    """A T4 says that it has bfloat16, and emulates it; --dtype goes before all."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or is_native)
    found = checkpoint.pick_dtype(None, torch.device("cuda"))
    assert found == ("bfloat16" if is_native else "float32")
    assert checkpoint.pick_dtype("float64", torch.device("cuda")) == "float64"


@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("float64", torch.float64),
                                         ("bfloat16", torch.bfloat16)])
def test_prepare(name, dtype, rng):
    net = small_net()
    x = torch.randint(12, (2, 5), generator=rng)
    with checkpoint.prepare(net, name):
        assert net(x, torch.ones(2)).dtype == dtype
    assert not any(p.requires_grad for p in net.parameters())


# ---- files and provenance -----------------------------------------------------------------------

def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    records = [{"a": 1, "b": "ß"}, {"a": 2}]
    checkpoint.write_json(path, records)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == records and len(text.splitlines()) == 3
    with pytest.raises(ValueError):
        checkpoint.write_json(path, [{"a": math.nan}])
    assert path.read_text(encoding="utf-8") == text and os.listdir(tmp_path) == ["x.json"]


def test_provenance_is_complete_and_names_no_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py"), "--data", str(tmp_path / "x.txt"),
                                     f"--out={tmp_path}/run", "--lr", "1e-4", "a/b"])
    found = provenance(7, "cpu")
    assert found["command"] == "python train.py --data x.txt --out=run --lr 1e-4 a/b"
    assert found["seed"] == 7 and found["torch"] == torch.__version__
    save(tmp_path / "x.pt", found)          # plain values, which a checkpoint can hold
    assert load(tmp_path / "x.pt") == found
    assert found["device"] == f"cpu, {torch.get_num_threads()} threads"
    assert set(found) == {"command", "commit", "device", "torch", "date", "seed"}
    assert str(tmp_path) not in str(found)
    assert re.fullmatch(r"[0-9a-f]{7,}(\+dirty)?|unknown", found["commit"])
    monkeypatch.setenv("PATH", str(tmp_path))              # no git here
    assert provenance(7, torch.device("cpu"))["commit"] == "unknown"
