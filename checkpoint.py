# SPDX-License-Identifier: MIT
"""Networks in and out: our checkpoints, the published ones, and export in the published layout.

    ours        out/<run>/teacher.pt, a dict: "config" (ModelConfig), "process" (mdlm, duo or ar),
                "tokenizer", "block_size", "stage", "step", "ema" (the weights that are used),
                where it comes from (`provenance`); and what only train.py --resume reads
    published   tensors under `backbone.`, with model.py's names: hub name, folder, .safetensors,
                torch file or Lightning .ckpt; a config.json beside them is believed and checked

Only tensors and plain values are ever unpickled. To reuse: copy this file and what it imports.
"""
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path

import safetensors.torch
import torch

from data import BadInput
from model import DiT, ModelConfig
from teacher import Masked, Uniform

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")      # of files of weights
PUBLISHED = {"n_blocks": "num_layers", "n_heads": "num_heads", "hidden_dim": "width",
             "model_length": "block_size"}               # their name in config.json: ours


def write_whole(path, write):
    """Under `path` there is at any time the whole old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path, checkpoint):
    write_whole(path, lambda file: torch.save(checkpoint, file))


def load(path):
    """A dict of tensors and plain values; no code that the file may hold is run."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint at {path}; run python train.py first")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".json":
            return dict(json.loads(path.read_text()))
        # Lightning files hold settings and a tokenizer too: such objects become empty shells
        shell = type("Shell", (), {"__init__": lambda *_: None, "__setstate__": lambda *_: None})
        foreign = () if path.suffix != ".ckpt" else \
            torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(shell, name) for name in foreign]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:              # each kind of damage raises something else
        what = "holds pickled code and was not opened" if "GLOBAL" in str(error) else \
            f"is truncated or no checkpoint ({type(error).__name__})"
        raise BadInput(f"{path} {what}; fetch or write it again, best as safetensors") from None


def find_weights(name):
    """A file, a folder with one file of weights, or a hub name -> the file."""
    path = Path(name)
    if not path.exists() and name.count("/") == 1 and path.suffix not in SUFFIXES:
        try:
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
        except Exception as error:
            raise BadInput(f"{name} is no file or folder, and the hub gave {type(error).__name__}; "
                           "check the name, and without a network set HF_HOME to a cache that "
                           "holds it or give a local folder") from None
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or \
            sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if len(files) != 1:
            raise BadInput(f"{name} holds {len(files)} files of weights; name the file")
        path = files[0]
    return path


def guess_process(text):
    found = re.findall("mdlm|duo|dcd", text.lower())
    return found and ("mdlm" if found[-1] == "mdlm" else "duo")


def read_published(found, path, name, process):
    """-> weights, meta. Sizes are as config.json states them, else as the tensors have them."""
    weights = found.get("state_dict", found)
    if "state_dict" in found:               # Lightning, which may hold more networks than this one
        weights = {key: w for key, w in weights.items() if key.startswith("backbone.")}
        shadow = (found.get("ema") or {}).get("shadow_params", ())   # in the order of parameters
        print(f"{name}: took the {'EMA' if shadow else 'plain'} weights", file=sys.stderr)
        keys = [key for key in weights if not key.endswith("inv_freq")]
        if shadow and [w.shape for w in shadow] != [weights[key].shape for key in keys]:
            raise BadInput(f"{name}: the {len(shadow)} tensors of its EMA do not fit its "
                           f"{len(keys)} parameters; fetch it as safetensors")
        weights |= dict(zip(keys, shadow))
    weights = {key.removeprefix("backbone."): w for key, w in weights.items()}
    beside = path.with_name("config.json")
    stated = load(beside) if beside.exists() else {}
    stated = {PUBLISHED.get(key, key): value for key, value in stated.items()}
    for key in ("vocab_embed.embedding", "sigma_map.mlp.0.weight"):
        if getattr(weights.get(key), "ndim", 0) != 2:
            raise BadInput(f"{name} is no network of this kind: {key} is missing or no matrix")
    V, D = weights["vocab_embed.embedding"].shape
    blocks = [int(key.split(".")[1]) for key in weights if re.match(r"blocks\.\d+\.", key)]
    meta = asdict(ModelConfig(V)) | {
        "width": D, "num_layers": max(blocks, default=-1) + 1, "num_heads": max(1, D // 64),
        "cond_dim": len(weights["sigma_map.mlp.0.weight"]), "dropout": 0.1,
        "block_size": 1024, "tokenizer": {"name": "gpt2"}, "stage": "teacher",
        "process": guess_process(stated.get("model_type", "")) or process
        or guess_process(name) or "mdlm"} | stated
    config = {field.name: meta.pop(field.name) for field in fields(ModelConfig)}
    if "tokenizer" not in stated:           # not our export: its other entries mean nothing here
        meta = {key: meta[key] for key in ("process", "tokenizer", "block_size", "stage")}
    return weights, meta | {"config": config}


def load_network(name_or_path, device="cpu", process=None):
    """-> net (DiT, eval mode, EMA weights), meta (a dict: all but weights and training state).

    process: which a published checkpoint is; else config.json tells, or its name.
    """
    name = str(name_or_path)
    path = find_weights(name)
    found = load(path)
    if {"ema", "config", "process"} <= found.keys():     # one of ours
        weights, meta = found["ema"], {k: x for k, x in found.items() if is_plain(x)}
    else:
        weights, meta = read_published(found, path, name, process)
    K, V, is_a = num_words(meta["tokenizer"]), meta["config"]["vocab_size"], meta["process"]
    fits = V in {"mdlm": [K + 1], "duo": [K, K + 1], "ar": [K]}.get(is_a, [])
    if not fits or process not in (None, is_a):
        raise BadInput(f"{name} is a {is_a} network, its vocab_embed.embedding has {V} words: this "
                       f"does not fit process {process or is_a} with a tokenizer of {K} words")
    try:
        net = DiT(ModelConfig(**meta["config"]))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name}: {error}") from None
    have, want = ({key: tuple(getattr(w, "shape", "?")) for key, w in state.items()}
                  for state in (weights, net.state_dict()))
    wrong = [f"{key} ({have.get(key, 'missing')} where {want.get(key, 'nothing')} belongs)"
             for key in want | have if have.get(key) != want.get(key)]
    if wrong:
        raise BadInput(f"{name}: {len(wrong)} tensors do not fit its config.json, or else its "
                       "vocab_embed.embedding and sigma_map.mlp.0.weight: "
                       f"{', '.join(wrong[:9])}{', ...' * (len(wrong) > 9)}")
    net.load_state_dict(weights)
    return net.to(device).eval(), meta


def is_plain(x):
    try:
        return json.dumps(x) is not None
    except (TypeError, ValueError):
        return False


def num_words(spec):
    return len(spec["chars"]) if spec["name"] == "char" else 50_257


def make_process(meta):
    if meta["process"] == "ar":
        raise BadInput("a judge has no noising process; give a teacher or generator")
    K = num_words(meta["tokenizer"])        # some uniform checkpoints carry an unused word K + 1
    return Masked(K + 1) if meta["process"] == "mdlm" else Uniform(K)


def export(net, meta, folder, dtype=None):
    """Write config.json and model.safetensors in the published layout; never over another file."""
    paths = [Path(folder, file) for file in ("config.json", "model.safetensors")]
    for path in paths:
        if path.exists():
            raise BadInput(f"{path} exists; remove it or choose another folder")
    config = {key: x for key, x in meta.items() if key != "config" and is_plain(x)}
    config |= asdict(net.config)
    config |= {theirs: config[ours] for theirs, ours in PUBLISHED.items()}
    weights = {f"backbone.{key}": w.to("cpu", None if key.endswith("inv_freq") else dtype)
               for key, w in net.state_dict().items()}
    for path, content in zip(paths, (json.dumps(config, indent=1).encode(),
                                     safetensors.torch.save(weights, {"format": "pt"}))):
        write_whole(path, lambda file: file.write(content))


def provenance(seed, device):
    """Where a figure comes from; paths in the command are relative."""
    command = " ".join(["python", *sys.argv])
    command = re.sub(r"(?<=[ =])/\S+", lambda path: os.path.relpath(path[0]), command)
    git = subprocess.run("git describe --always --exclude='*' --dirty=+dirty", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    device = torch.device(device)
    return {"command": command, "commit": git.stdout.strip() or "unknown",
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seed": seed}
