# SPDX-License-Identifier: MIT
"""Networks in and out: our checkpoints, the published ones, and export in the published layout.

    ours        a dict: "config", "process", "tokenizer", "ema" (the weights that are used) and more
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

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from data import BadInput
from model import FITTED, DiT, ModelConfig
from teacher import Masked, Uniform

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")      # of files of weights
PUBLISHED = {"n_blocks": "num_layers", "n_heads": "num_heads", "hidden_dim": "width",
             "model_length": "block_size"}               # their name in config.json: ours


def write_whole(path, write):
    """Under `path` there is at any time the whole old file or the whole new one."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
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
            return load_file(path)
        # Lightning files hold settings and a tokenizer too: such objects become empty shells
        shell = type("Shell", (), {"__init__": lambda *_: None, "__setstate__": lambda *_: None})
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) \
            if path.suffix == ".ckpt" else ()
        with torch.serialization.safe_globals([(shell, name) for name in foreign]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:              # each kind of damage raises something else
        what = "holds pickled code" if "GLOBAL" in str(error) else "is truncated or no checkpoint"
        raise BadInput(f"{path} {what} ({type(error).__name__}); fetch or write it again") from None


def find_weights(name):
    """A file, a folder with one file of weights, or a hub name -> the file."""
    path = Path(name)
    if not path.exists() and name.count("/") == 1 and path.suffix not in SUFFIXES:
        try:
            from huggingface_hub import snapshot_download
            path = Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
        except Exception as error:
            raise BadInput(f"{name} is no file or folder, and the hub gave {type(error).__name__}; "
                           "give a local folder, or set HF_HOME to a cache that has it") from None
    if path.is_dir():
        files = [*path.glob("*.safetensors")] or [p for p in path.iterdir() if p.suffix in SUFFIXES]
        if len(files) != 1:
            raise BadInput(f"{name} holds {len(files)} files of weights; name the file")
        path = files[0]
    return path


def read_published(found, stated, name, process):
    """-> weights, meta. Sizes are as config.json (`stated`) has them, else as the tensors."""
    if "state_dict" in found:               # Lightning, which may hold more networks than this one
        plain = {key: w for key, w in found["state_dict"].items() if key.startswith("backbone.")}
        shadow = (found.get("ema") or {}).get("shadow_params", ())   # in the order of parameters
        keys = [key for key in plain if shadow and not key.endswith("inv_freq")]
        print(f"{name}: took the {'EMA' if shadow else 'plain'} weights", file=sys.stderr)
        if len(keys) != len(shadow):
            raise ValueError(f"{len(shadow)} tensors of EMA for {len(keys)} parameters")
        found = plain | dict(zip(keys, shadow))
    weights = {key.removeprefix("backbone."): w for key, w in found.items()}
    hints = f"mdlm {name} {process or ''} {stated.get('model_type', '')}".lower()
    V, D = weights["vocab_embed.embedding"].shape
    meta = asdict(ModelConfig(V)) | {
        "process": re.findall("mdlm|duo|dcd", hints)[-1].replace("dcd", "duo"),
        "tokenizer": {"name": "gpt2"}, "stage": "teacher", "block_size": 1024, "width": D,
        "num_layers": len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
        "num_heads": D // 64, "cond_dim": len(weights["sigma_map.mlp.0.weight"]), "dropout": 0.1}
    meta |= {PUBLISHED.get(key, key): value for key, value in stated.items()}
    config = {field.name: meta.pop(field.name) for field in fields(ModelConfig)}
    return weights, meta | {"config": config}


def load_network(name_or_path, device="cpu", process=None):
    """-> net (DiT, eval mode, EMA weights), meta (a dict: all but weights and training state).
    process: which one a published checkpoint is, where its config.json or name does not tell."""
    name = str(name_or_path)
    path = find_weights(name)
    found, beside = load(path), path.with_name("config.json")
    try:
        if {"ema", "config", "process"} <= found.keys():     # ours: what is no state of a module
            weights, meta = found["ema"], {key: x for key, x in found.items() if not isinstance(
                x, (dict, torch.Tensor)) or key in ("config", "tokenizer", "args")}
        else:
            stated = json.loads(beside.read_text()) if beside.exists() else {}
            weights, meta = read_published(found, stated, name, process)
        net = DiT(ModelConfig(**meta["config"]))
        law = weights.get("frequencies")
        if law is not None and law.dim() == 1:               # of old: one for all numbers of passes
            weights = weights | {"frequencies": law.expand(len(FITTED), -1)}
        net.load_state_dict(weights)        # strict: names what is missing, misshapen or too much
    except Exception as error:
        raise BadInput(f"{name} does not fit the sizes in its config.json, or else those of its "
                       "vocab_embed.embedding and sigma_map.mlp.0.weight: "
                       f"{type(error).__name__} {' '.join(str(error).split())[:999]}") from None
    K, V, is_a = num_words(meta), net.config.vocab_size, meta["process"]
    fitting = {"mdlm": [K + 1], "duo": [K, K + 1], "ar": [K]}.get(is_a, [])
    if V not in fitting or process not in (None, is_a):
        raise BadInput(f"{name} is a {is_a} network of {V} words, which does not fit process "
                       f"{process or is_a} with a tokenizer of {K} words; give its --process or "
                       "another checkpoint")
    return net.to(device).eval(), meta


def num_words(meta):
    spec = meta["tokenizer"]
    return len(spec["chars"]) if spec["name"] == "char" else 50_257


def make_process(meta):
    if meta["process"] == "ar":
        raise BadInput("a judge has no noising process; give a teacher or generator")
    K = num_words(meta)                     # some uniform checkpoints carry an unused word K + 1
    return Masked(K + 1) if meta["process"] == "mdlm" else Uniform(K)


def export(net, meta, folder, dtype=None):
    """Write config.json and model.safetensors in the published layout; never over another file."""
    stated, path = Path(folder, "config.json"), Path(folder, "model.safetensors")
    if stated.exists() or path.exists():
        raise BadInput(f"{folder} holds a network already; choose another folder")
    config = {key: x for key, x in meta.items() if key != "config"} | asdict(net.config)
    config |= {theirs: config[ours] for theirs, ours in PUBLISHED.items()}
    weights = {f"backbone.{key}": w.to("cpu", None if key.endswith("inv_freq") else dtype)
               for key, w in net.state_dict().items()}
    data = to_bytes(weights, {"format": "pt"})
    write_whole(path, lambda file: file.write(data))
    write_whole(stated, lambda file: file.write(json.dumps(config, indent=1).encode()))


def provenance(seed, device):
    """Where a figure comes from; paths in the command are relative."""
    command = " ".join(["python", *sys.argv])
    command = re.sub(r"(?<=[ =])/\S+", lambda path: os.path.relpath(path[0]), command)
    git = subprocess.run("git describe --always --exclude='*' --dirty=+dirty", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    cuda, cpu = torch.device(device).type == "cuda", f"{device}, {torch.get_num_threads()} threads"
    return {"command": command, "commit": git.stdout.strip() or "unknown", "seed": seed,
            "device": torch.cuda.get_device_name(device) if cuda else cpu,
            "torch": str(torch.__version__),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
