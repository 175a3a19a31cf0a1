"""Checkpoints in and out. Run: python -m pytest tests/test_checkpoint.py"""
import collections
import json
import math
import os
import re
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

import checkpoint
from checkpoint import load, load_network, make_process, provenance, save
from data import BadInput
from model import DiT, ModelConfig
from teacher import Masked, Uniform

CHARS = "abcdefghijkl"                      # K = 12
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
    rng = torch.Generator().manual_seed(seed)
    weights = {key: torch.randn(shape, generator=rng) / math.sqrt(shape[-1])
               for key, shape in table(**sizes).items()}
    for key in weights:
        if "norm" in key:
            weights[key] = 1 + 0.1 * weights[key]
        if key.endswith("inv_freq"):
            n = len(weights[key])
            weights[key] = torch.tensor([10_000 ** (-i / n) for i in range(n)])
    return weights


def published(weights, x, sigma, heads, keep=None, dropout=0.0):
    """The network in plain torch and float64, from its description alone: one text at a time.

    x: (L,) tokens or (L, V) simplex rows; sigma: a float; keep: (layers, 2, L, D) what dropout
    leaves of what attention and MLP add.
    """
    w = {key.removeprefix("backbone."): value.double() for key, value in weights.items()}

    def norm(x, weight):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def turn(x):                            # (L, d): each pair (j, j + d/2) turns with position
        angle = torch.arange(len(x))[:, None] * w["rotary_emb.inv_freq"]
        first, second = x[:, :x.shape[1] // 2], x[:, x.shape[1] // 2:]
        return torch.cat([first * angle.cos() - second * angle.sin(),
                          first * angle.sin() + second * angle.cos()], 1)

    def silu(x):
        return x / (1 + (-x).exp())

    freqs = torch.tensor([math.exp(-math.log(10_000) * i / 128) for i in range(128)],
                         dtype=torch.float64)
    c = torch.cat([(sigma * freqs).cos(), (sigma * freqs).sin()])
    c = silu(linear(silu(linear(c, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    E = w["vocab_embed.embedding"]
    h = x.double() @ E if x.is_floating_point() else E[x]
    L, D = h.shape
    kept = torch.ones(99, 2, L, D) if keep is None else keep / (1 - dropout)
    for i in range(sum(key.endswith("norm1.weight") for key in w)):
        block = f"blocks.{i}."
        shift, scale, gate, shift2, scale2, gate2 = linear(c, block + "adaLN_modulation").split(D)
        qkv = linear(norm(h, w[block + "norm1.weight"]) * (1 + scale) + shift, block + "attn_qkv")
        q, k, v = qkv.split(D, 1)
        out = []
        for rows in torch.arange(D).split(D // heads):
            scores = turn(q[:, rows]) @ turn(k[:, rows]).T / math.sqrt(D // heads)
            out.append(torch.softmax(scores, 1) @ v[:, rows])
        h = h + gate * linear(torch.cat(out, 1), block + "attn_out") * kept[i, 0]
        u = linear(norm(h, w[block + "norm2.weight"]) * (1 + scale2) + shift2, block + "mlp.0")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))
        h = h + gate2 * linear(u, block + "mlp.2") * kept[i, 1]
    shift, scale = linear(c, "output_layer.adaLN_modulation").split(D)
    return linear(norm(h, w["output_layer.norm_final.weight"]) * (1 + scale) + shift,
                  "output_layer.linear")


def write(folder, weights, name="model.safetensors", **config):
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    return folder / name


CHAR = dict(tokenizer={"name": "char", "chars": CHARS})


def refused(*words, call=load_network, args=()):
    with pytest.raises(BadInput) as failure:
        call(*args)
    text = str(failure.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def small_net(seed=0, **settings):
    """A network of which every tensor is random, also those that start at 0."""
    rng = torch.Generator().manual_seed(seed)
    net = DiT(ModelConfig(**dict(vocab_size=13, num_layers=1, num_heads=2, width=16, cond_dim=8)
                          | settings))
    for w in net.parameters():
        w.data = torch.randn(w.shape, generator=rng) * 0.2
    return net.eval()


def state_of(net, process="mdlm", **more):
    return {"config": asdict(net.config), "process": process, **CHAR, "block_size": 8,
            "stage": "teacher", "step": 3, "ema": net.state_dict(), "args": {"lr": "0.1"},
            "commit": "abc", "data": "text.txt", "torch": str(torch.__version__)} | more


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


def test_a_kill_while_writing_leaves_the_last_good_file(tmp_path, monkeypatch):
    path, write_all = tmp_path / "x.pt", torch.save
    save(path, {"step": 1})

    def write_half(state, file):
        write_all(state, tmp_path / "whole")
        file.write((tmp_path / "whole").read_bytes()[:300])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", write_half)
        with pytest.raises(KeyboardInterrupt):
            save(path, {"step": 2})
    assert load(path) == {"step": 1}
    save(path, {"step": 3})
    assert load(path) == {"step": 3}


class Foreign:
    """An object whose reading runs code: it would make a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_foreign_pickled_code_is_never_run(tmp_path, suffix):
    path, trace = tmp_path / ("x" + suffix), tmp_path / "trace"
    torch.save({"ema": {}, "process": Foreign(trace)}, path)
    refused(str(path), call=load_network if suffix == ".ckpt" else load, args=[path])
    assert not trace.exists()
    torch.load(path, weights_only=False)    # the file is a real trap
    assert trace.exists()
    if suffix != ".ckpt":
        refused("pickled code", call=load, args=[path])


def test_a_checkpoint_that_is_missing_or_cut(tmp_path):
    refused("out/mdlm/none.pt", "python train.py", call=load, args=["out/mdlm/none.pt"])
    refused("python train.py", args=["out/mdlm/none.pt"])
    save(tmp_path / "x.pt", state_of(small_net()))
    whole = (tmp_path / "x.pt").read_bytes()
    for size in (0, 1, 3, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused("cut.pt", "truncated", call=load, args=[tmp_path / "cut.pt"])
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    refused("tensor.pt", call=load, args=[tmp_path / "tensor.pt"])


def test_load_network_gives_the_averaged_weights_and_the_rest(tmp_path):
    net, latest = small_net(0, latent_dim=4, dropout=0.5), small_net(1, latent_dim=4)
    state = state_of(net, main=latest.state_dict(), latent="gaussian", seed=1,
                     main_optimizer={"state": {0: torch.ones(3)}}, rng=torch.get_rng_state())
    save(tmp_path / "idlm.pt", state)
    found, meta = load_network(tmp_path / "idlm.pt", "cpu")
    assert same(found, net) and found.config == net.config and not found.training
    training_state = {"ema", "main", "main_optimizer", "rng"}
    assert meta == {key: value for key, value in state.items() if key not in training_state}
    assert load_network(str(tmp_path / "idlm.pt"), process="mdlm")[1] == meta


def test_a_checkpoint_of_ours_that_does_not_fit(tmp_path):
    path, net = tmp_path / "x.pt", small_net()
    save(path, state_of(net))
    refused("a mdlm network", "process duo", args=[path, "cpu", "duo"])
    weights = net.state_dict()
    save(path, state_of(net, ema={key: w for key, w in weights.items() if "norm1" not in key}))
    refused("blocks.0.norm1.weight", "Missing key", args=[path])
    save(path, state_of(net, tokenizer={"name": "char", "chars": "abc"}))
    refused("13 words", "tokenizer of 3", args=[path])
    save(path, state_of(net, process="ar"))
    refused("13 words", "tokenizer of 12", args=[path])


def test_make_process():
    spec = {"name": "char", "chars": CHARS}
    masked = make_process({"process": "mdlm", "tokenizer": spec})
    assert isinstance(masked, Masked) and masked.mask_id == masked.K == 12
    uniform = make_process({"process": "duo", "tokenizer": spec})
    assert isinstance(uniform, Uniform) and uniform.K == 12
    assert make_process({"process": "mdlm", "tokenizer": {"name": "gpt2"}}).mask_id == 50257
    assert make_process({"process": "duo", "tokenizer": {"name": "gpt2"}}).K == 50257
    refused("judge", call=make_process, args=[{"process": "ar", "tokenizer": spec}])


# ---- published checkpoints ----------------------------------------------------------------------

def test_a_published_checkpoint_computes_what_its_description_says(tmp_path, rng):
    """Logits of order 1, float32 against float64: 1e-5. Hard tokens, simplex rows, the softmax of
    logits, and the same rows as their entries that are not 0."""
    weights = synthetic()
    net, meta = load_network(write(tmp_path / "mdlm", weights, **CHAR))
    assert net.config == ModelConfig(V, LAYERS, HEADS, D, COND, dropout=0.1)
    assert meta["process"] == "mdlm" and meta["block_size"] == 1024 and meta["stage"] == "teacher"
    assert torch.allclose(DiT(net.config).rotary_emb.inv_freq, net.rotary_emb.inv_freq)
    sigma = torch.tensor([0.0, 1.3])
    x = torch.randint(V, (2, 9), generator=rng)
    soft = torch.rand(2, 9, V, generator=rng)
    logits = 3 * torch.randn(2, 9, V, generator=rng)
    top, ids = logits.softmax(-1).topk(4)
    sparse = torch.zeros(2, 9, V).scatter(-1, ids, top)
    for ours, theirs in [(x, x), (soft / soft.sum(-1, keepdim=True),) * 2,
                         (logits.softmax(-1), logits.softmax(-1)), ((top, ids), sparse)]:
        with torch.no_grad():
            found = net(ours, sigma)
        want = torch.stack([published(weights, row, s, HEADS)
                            for row, s in zip(theirs, sigma.tolist())])
        assert want.std() > 0.3 and (found - want).abs().max() < 1e-5
    other = torch.stack([published(weights, row, 0.5, HEADS) for row in x])
    with torch.no_grad():
        assert (net(x, sigma) - other).abs().max() > 1e-2             # the noise level matters


@torch.no_grad()
def test_dropout(tmp_path, rng, monkeypatch):
    """While training what attention and MLP add is dropped entry by entry, at another place each
    time, and the rest scaled up; afterwards nothing is."""
    weights = synthetic()
    net, _ = load_network(write(tmp_path / "mdlm", weights, **CHAR))
    x, sigma, seen, drawn = torch.randint(V, (2, 9), generator=rng), torch.zeros(2), [], net.drawn
    monkeypatch.setattr(net, "drawn", lambda h: seen.append(drawn(h)) or seen[-1])
    found = [net.train()(x, sigma), net(x, sigma), net.eval()(x, sigma)]
    keeps = [inputs[-1] for inputs in seen]
    assert keeps[2] is None and keeps[0].shape == (LAYERS, 2, 2, 9, D)
    for logits, keep in zip(found, keeps):
        want = torch.stack([published(weights, row, 0.0, HEADS, None if keep is None else
                                      keep[:, :, b], 0.1) for b, row in enumerate(x)])
        assert (logits - want).abs().max() < 1e-5
    n = keeps[0].numel()
    for keep, share in [(keeps[0], 0.9), (keeps[1], 0.9), (keeps[0] == keeps[1], 0.82)]:
        assert abs(keep.double().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_dropout_in_one_place():
    """Compiled for a GPU, a network draws what it keeps into one tensor. A second pass before the
    first one's backward is refused instead of taking the wrong mask."""
    net = small_net(0, dropout=0.5).train()
    net.keep = {}
    x, sigma = torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2)
    (*_, first), (*_, second) = (net.drawn(torch.zeros(2, 9, D)) for _ in range(2))
    assert first is second
    net(x, sigma).sum().backward()
    loss = net(x, sigma).sum()
    net(x, sigma)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert net.drawn(torch.zeros(1, 9, D))[-1].shape[2:] == (1, 9, D)


def test_every_source_of_the_same_tensors(tmp_path, monkeypatch, capsys):
    weights = synthetic(layers=1)
    plain = {key: w.clone() for key, w in weights.items()}
    net, meta = load_network(write(tmp_path / "a", weights, **CHAR))
    assert load_network(tmp_path / "a")[1] == meta
    sources = [tmp_path / "a", write(tmp_path / "b", plain, "w.pt", **CHAR),
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
    return key.replace("weight", "wait") if key.endswith("weight") else key + "_"


@pytest.mark.parametrize("key", [key for key in table() if "blocks.0" not in key])
def test_a_tensor_that_is_missing_renamed_misshapen_or_too_many(tmp_path, key):
    name = key.removeprefix("backbone.")
    tells_sizes = name in ("vocab_embed.embedding", "sigma_map.mlp.0.weight")
    whole, missing = synthetic(), f"KeyError '{name}'" if tells_sizes else "Missing key"
    weights = {k: w for k, w in whole.items() if k != key}
    refused(name, missing, args=[write(tmp_path / "missing", weights, **CHAR)])
    weights[rename(key)] = whole[key]
    refused(name, missing, args=[write(tmp_path / "renamed", weights, **CHAR)])
    for wrong in (torch.cat([whole[key]] * 2), whole[key][None]):
        weights = whole | {key: wrong}
        refused(name, args=[write(tmp_path / "shape", weights, **CHAR)])
    weights = whole | {rename(key): whole[key].clone()}
    refused(rename(name), "Unexpected key", args=[write(tmp_path / "more", weights, **CHAR)])


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
    refused("EMA", "last.ckpt", args=[write(tmp_path / "mdlm", found, "last.ckpt")])


@pytest.mark.parametrize("name, words, flag, config, process", [
    ("mdlm-owt", 13, None, {}, "mdlm"),
    ("duo", 13, None, {}, "duo"),
    ("duo-distilled", 12, None, {}, "duo"),
    ("idlm-dcd", 13, None, {}, "duo"),
    ("idlm-mdlm", 13, None, {}, "mdlm"),
    ("nameless", 13, None, {}, "mdlm"),
    ("nameless", 12, "duo", {}, "duo"),
    ("nameless", 12, None, {"model_type": "DUO"}, "duo"),
    ("mdlm", 13, None, {"process": "duo"}, "duo"),
    ("duo", 13, "mdlm", {}, "mdlm"),
])
def test_which_process_it_is(tmp_path, name, words, flag, config, process):
    path = write(tmp_path / name, synthetic(layers=1, V=words), **CHAR, **config)
    assert load_network(path, "cpu", flag)[1]["process"] == process


@pytest.mark.parametrize("name, words, flag, config, sentence", [
    ("mdlm", 13, "duo", {"model_type": "mdlm"}, ["mdlm", "duo"]),
    ("mdlm", 13, "mdlm", {"process": "duo"}, ["mdlm", "duo"]),
    ("mdlm", 12, None, {}, ["12 words", "tokenizer of 12"]),
    ("duo", 14, None, {}, ["14 words", "tokenizer of 12"]),
    ("mdlm", 13, None, {"hidden_dim": 256}, ["config.json", "vocab_embed.embedding", "256"]),
    ("mdlm", 13, None, {"n_blocks": 3}, ["config.json", "blocks.2.norm1.weight"]),
    ("mdlm", 13, None, {"cond_dim": 16}, ["config.json", "sigma_map.mlp.0.weight"]),
    ("mdlm", 13, None, {"n_heads": 4}, ["config.json", "rotary_emb.inv_freq"]),
    ("mdlm", 13, None, {"n_heads": 3}, ["3 heads"]),
    ("mdlm", 13, None, {"vocab_size": 12}, ["vocab_embed.embedding", "[12, 128]"]),
])
def test_contradictions(tmp_path, name, words, flag, config, sentence):
    path = write(tmp_path / name, synthetic(layers=2, V=words), **CHAR, **config)
    refused(*sentence, args=[path, "cpu", flag])


def test_without_a_config_it_is_gpt2(tmp_path):
    """The published vocabularies: 50,258 with a mask or, uniform, with an unused last word."""
    weights = synthetic(V=50258, D=64, layers=1)
    _, meta = load_network(write(tmp_path / "mdlm-owt", weights))
    assert meta["tokenizer"] == {"name": "gpt2"} and make_process(meta).mask_id == 50257
    net, meta = load_network(write(tmp_path / "duo", weights))
    assert make_process(meta).K == 50257 and net.config.vocab_size == 50258
    assert meta["config"] == asdict(net.config) and net.config.num_heads == 1
    refused("13 words", "50257", args=[write(tmp_path / "small-mdlm", synthetic(layers=1))])


def test_a_padded_uniform_vocabulary_predicts_words_only(tmp_path, rng):
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
        refused("model.safetensors", "truncated", args=[path])
    path.write_bytes(whole)
    path.with_name("config.json").write_text('{"process": "mdl')
    refused("config.json", "JSONDecodeError", args=[path])
    (tmp_path / "empty").mkdir()
    refused("empty", "0 files", args=[tmp_path / "empty"])
    for name in ("a.pt", "b.pt"):
        save(tmp_path / "two" / name, state_of(small_net()))
    refused("two", "2 files", args=[tmp_path / "two"])
    refused("vocab_embed", args=[write(tmp_path / "other", {"other.weight": torch.ones(2)})])

    import huggingface_hub

    def offline(name, **kwargs):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("somebody/nothing", "HF_HOME", "local folder", args=["somebody/nothing"])


# ---- export -------------------------------------------------------------------------------------

@pytest.mark.parametrize("process, words, latent_dim, latent_words", [
    ("mdlm", 13, 0, 0), ("mdlm", 13, 6, 0), ("mdlm", 13, 0, 5), ("duo", 12, 0, 0),
    ("duo", 13, 0, 0)])
def test_export_and_import_are_the_identity(tmp_path, process, words, latent_dim, latent_words):
    net = small_net(vocab_size=words, latent_dim=latent_dim, latent_words=latent_words,
                    dropout=0.25)
    save(tmp_path / "idlm.pt", state_of(net, process, stage="idlm", latent="gaussian"))
    net, meta = load_network(tmp_path / "idlm.pt")
    checkpoint.export(net, meta, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        again, found = load_network(source)
        assert same(again, net) and again.config == net.config and found == meta
    wanted = table(V=words, D=16, cond=8, layers=1, head=8)
    if latent_dim:
        wanted["backbone.latent_proj.weight"] = (16, latent_dim)
    if latent_words:
        wanted["backbone.frequencies"] = (5, words - 1)
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {key: tuple(w.shape) for key, w in stored.items()} == wanted
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_dim"], config["n_blocks"], config["n_heads"], config["model_length"],
            config["cond_dim"], config["vocab_size"]) == (16, 1, 2, 8, 8, words)
    refused("mdlm" if process == "duo" else "duo",
            args=[tmp_path / "out", "cpu", "mdlm" if process == "duo" else "duo"])


def test_one_law_of_words_serves_all_passes(tmp_path):
    """Of checkpoints from before each number of passes had its own."""
    net, law = small_net(latent_words=3), torch.rand(V - 1)
    state = state_of(net)
    state["ema"]["frequencies"] = law
    checkpoint.save(tmp_path / "old.pt", state)
    again, _ = load_network(tmp_path / "old.pt")
    assert all(torch.equal(again.word_frequencies(n), law) for n in (1, 2, 3, 16, 100))


def test_export_never_overwrites(tmp_path):
    net = small_net()
    meta = {key: value for key, value in state_of(net).items() if key != "ema"}
    checkpoint.export(net, meta, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    refused("holds a network", call=checkpoint.export, args=[small_net(1), meta, tmp_path])
    os.remove(tmp_path / "config.json")
    refused("holds a network", call=checkpoint.export, args=[small_net(1), meta, tmp_path])
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_export_in_half_precision(tmp_path):
    net = small_net()
    meta = {key: value for key, value in state_of(net).items() if key != "ema"}
    checkpoint.export(net, meta, tmp_path, torch.bfloat16)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(w.dtype == (torch.float32 if "inv_freq" in key else torch.bfloat16)
               for key, w in stored.items())
    again = load_network(tmp_path)[0].state_dict()
    assert all(torch.equal(again[key], w if "inv_freq" in key else w.bfloat16().float())
               for key, w in net.state_dict().items())


# ---- provenance ---------------------------------------------------------------------------------

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
    monkeypatch.setenv("PATH", str(tmp_path))            # no git here
    assert provenance(7, torch.device("cpu"))["commit"] == "unknown"


def random_network(rng):
    net = DiT(ModelConfig(9, 2, 2, 16, cond_dim=8))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) / 4
    return net


def test_a_frozen_network_computes_the_same(rng):
    """Matrices cast once give bit for bit what autocast gives by casting them at every pass."""
    net, x, sigma = random_network(rng), torch.randint(9, (3, 5), generator=rng), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        before, frozen = net(x, sigma), net.freeze(torch.bfloat16)(x, sigma)
    assert before.dtype == torch.bfloat16 and torch.equal(before, frozen)
    assert before.requires_grad and not frozen.requires_grad
    assert net.blocks[0].attn_qkv.weight.dtype == torch.bfloat16
    assert net.blocks[0].norm1.weight.dtype == net.vocab_embed.embedding.dtype == torch.float32


def test_compiled_gelu_is_the_same_function(rng, monkeypatch):
    net, x = random_network(rng).double(), torch.randint(9, (3, 5), generator=rng)
    eager = net(x, torch.rand(3).double().zero_())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(eager, net(x, torch.zeros(3).double()), rtol=1e-12, atol=1e-14)
    assert not torch.equal(eager, net(x, torch.zeros(3).double()))       # the other branch has run
