# SPDX-License-Identifier: MIT
"""Networks in and out; which device, which precision; how a script ends.

    ours        a dict: "config", "process", "tokenizer", "ema" (the weights that are used) and more
    published   tensors under `backbone.`, with model.py's names: hub name, folder, .safetensors,
                torch file or Lightning .ckpt; a config.json beside them is believed and checked

Only tensors and plain values are ever unpickled. To reuse: copy this file and what it imports.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock, Timeout      # comes with torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from data import BadInput
from model import DiT, ModelConfig
from teacher import Masked, Uniform

DTYPES = "float64", "float32", "bfloat16"
SUFFIXES = ".safetensors", ".ckpt", ".pt", ".bin"        # of files of weights
PUBLISHED = {"n_blocks": "num_layers", "n_heads": "num_heads", "hidden_dim": "width",
             "model_length": "block_size"}               # their name in config.json: ours
KINDS = {"process": str, "stage": str, "causal": bool, "block_size": int, "step": int,
         "updates": int}


# ---- how a script ends --------------------------------------------------------------------------

last_line = [""]                            # stage and step of training, for Ctrl-C

def run_script(main):
    """main(), ended by one sentence on what the user or the operating system got wrong."""
    for stream in sys.stdout, sys.stderr:                # terminals that are not UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)
    name = Path(sys.argv[0]).name
    try:
        main()
        sys.stdout.flush()
    except BadInput as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped by Ctrl-C{last_line[0]}; what was saved before stays: "
                 "start again, train.py with --resume")
    except BrokenPipeError:                              # `| head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(name != "sample.py")                    # other work has not been finished
    except torch.OutOfMemoryError:
        sys.exit(f"{name}: the GPU's memory is full; lower --micro_batch, --batch_size or "
                 "--num_texts; what was saved before stays")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{name}: {error}; what was saved before stays")


class Parser(argparse.ArgumentParser):
    """Ends a wrong command line with one sentence, without a page of usage."""

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def number(kind, low, high=math.inf):
    """A type for argparse: numbers from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in {low} ... {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


def network_size(text):
    """A type for argparse: layers x heads x width."""
    layers, heads, width = map(int, text.split("x"))
    if min(layers, heads, width) < 1 or width % (2 * heads) or layers > 1000:
        raise argparse.ArgumentTypeError(f"{text}: at most 1000 layers, and an even width of each "
                                         "head")
    return text


def pick_device(name):
    there = ["cuda"] * torch.cuda.is_available()
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = name or there[0]
    if name not in there:
        raise BadInput(f"--device {name}: this machine has {there}; drop the flag for the first")
    rank = os.environ.get("LOCAL_RANK")
    return torch.device(f"cuda:{rank}" if name == "cuda" and rank else name)


def has_bfloat16(device):
    """Does autocast to bfloat16 pay? On a GPU not where it is emulated (T4, V100), on a CPU only
    with matrix units for it (AMX), and there not to train a narrow network."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def can_compile(device):
    """On a CPU torch.compile needs a C++ compiler."""
    if device.type == "cpu":
        return any(map(shutil.which, ("g++", "clang++", "cl")))
    return device.type == "cuda"


def pick_dtype(name, device):
    return name or ("bfloat16" if has_bfloat16(device) else "float32")


def prepare(net, dtype):
    """For writing texts: net frozen in dtype; -> the autocast to run it under."""
    dtype = pick_dtype(dtype, net.device)
    net.freeze(torch.bfloat16 if dtype == "bfloat16" else None)
    if dtype == "float64":
        net.double()
    return torch.autocast(net.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


# ---- files --------------------------------------------------------------------------------------

def write_whole(path, write):
    """Under `path` there is at any time the whole earlier file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """One record a line where `value` is a list."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False).replace('{"', '\n{"') + "\n"
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def lock_folder(folder):
    """A lock that a kill opens: one run at a time writes to a folder, by its several processes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(Path(folder, f".lock{os.environ.get('RANK', 0)}")).acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another process is writing to {folder}: wait for it, or choose another "
                       "folder with --out") from None


def checksum(data):
    return hashlib.sha256(data).hexdigest()


def save(path, checkpoint):
    try:
        write_whole(path, lambda file: torch.save(checkpoint, file))
    except RuntimeError as error:           # torch hides a full disk behind an error of its own
        raise error.__context__ or error


class Shell:
    """What a Lightning file holds beside tensors (settings, a tokenizer) becomes this."""

    def __init__(self, *_):
        pass

    __setstate__ = __init__


def load(path):
    """A dict of tensors and plain values; no code that the file may hold is run."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint at {path}; run python train.py first, for a "
                       "uniform network with --process duo")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.ZipFile(path).testzip():              # reads all: a flipped bit is seen
            raise ValueError("checksum")
        foreign = ()
        if path.suffix == ".ckpt":
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Shell, name) for name in foreign]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:              # each kind of damage raises something else
        what = "holds pickled code" if "GLOBAL" in str(error) else "is damaged or no checkpoint"
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
        files = list(path.glob("*.safetensors")) or [
            file for file in path.iterdir() if file.suffix in SUFFIXES]
        if len(files) != 1:
            raise BadInput(f"{name} holds {len(files)} files of weights; name the file")
        path = files[0]
    return path


# ---- networks -----------------------------------------------------------------------------------

def read_stated(path):
    """config.json beside the weights. An export states the checksum of its own text, in which the
    weights' checksum stands in that place; an earlier one states that of the weights."""
    beside = path.with_name("config.json")
    if not beside.exists():
        return {}
    text = beside.read_text(encoding="utf-8")
    stated = json.loads(text)
    written = str(stated.get("sha256"))
    weights = checksum(path.read_bytes())
    both = checksum(text.replace(written, weights).encode("utf-8"))
    if written not in (weights, both) and re.search("sha256|[0-9a-f]{64}", text):
        raise ValueError(f"{path.name} and config.json are not as they were exported together")
    return stated


def read_lightning(found, name):
    """A Lightning file may hold more networks than the one wanted, and averaged weights."""
    plain = {key: w for key, w in found["state_dict"].items() if key.startswith("backbone.")}
    shadow = (found.get("ema") or {}).get("shadow_params", ())       # in the order of parameters
    keys = [key for key in plain if shadow and not key.endswith("inv_freq")]
    print(f"{name}: took the {'EMA' if shadow else 'plain'} weights", file=sys.stderr)
    if len(keys) != len(shadow):
        raise ValueError(f"{len(shadow)} tensors of EMA for {len(keys)} parameters")
    return plain | dict(zip(keys, shadow))


def sizes_of(weights):
    """The network's sizes as its tensors have them."""
    V, D = weights["vocab_embed.embedding"].shape
    return {"vocab_size": V, "width": D, "num_layers": sum("norm1" in key for key in weights),
            "cond_dim": len(weights["sigma_map.mlp.0.weight"])}


def read_published(found, stated, name, process):
    """-> weights, meta. Sizes are as config.json (`stated`) has them, else as the tensors."""
    if "state_dict" in found:
        found = read_lightning(found, name)
    weights = {key.removeprefix("backbone."): w for key, w in found.items()}
    hints = f"mdlm {name} {process or ''} {stated.get('model_type', '')}".lower()
    sizes = sizes_of(weights)
    meta = asdict(ModelConfig(0)) | sizes | dict(
        num_heads=sizes["width"] // 64,
        process=re.findall("mdlm|duo|dcd", hints)[-1].replace("dcd", "duo"),
        tokenizer={"name": "gpt2"}, stage="teacher", step=0, updates=0, block_size=1024)
    for key, value in stated.items():
        meta[PUBLISHED.get(key, key)] = value
    meta["config"] = {}                     # check_meta collects it
    return weights, meta


def check_meta(meta, process):
    """What a file says of itself: types, bounds and sense, before anything is built. -> config"""
    stated = meta | meta["config"]
    if stated.get("latent_dim") or stated.get("latent_words"):
        raise ValueError("it is a generator of an earlier kind; commit cefa7b7 is the last that "
                         "reads it, or distil its teacher again")
    for key, kind in KINDS.items():
        if type(stated[key]) is not kind:
            raise ValueError(f"{key} {stated[key]!r} is no {kind.__name__}")
    if not 1 <= stated["block_size"] <= 2 ** 20:
        raise ValueError(f"blocks of {stated['block_size']} tokens: at least 1, at most 2^20")
    K = num_tokens(meta)
    is_a = meta["process"]
    fitting = {"mdlm": [K + 1], "duo": [K, K + 1], "ar": [K]}.get(is_a, [])
    if stated["vocab_size"] not in fitting or process not in (None, is_a):
        raise ValueError(f"it is a {is_a} network of {stated['vocab_size']} tokens, which does not "
                         f"fit process {process or is_a} with a tokenizer of {K} tokens; give its "
                         "--process or another checkpoint")
    return {field.name: stated[field.name] for field in fields(ModelConfig)}


def load_network(name_or_path, device="cpu", process=None):
    """-> net (DiT, eval mode, EMA weights), meta (a dict: all but weights and training state).

    process: which one a published checkpoint is, where its config.json or name does not tell.
    """
    name = str(name_or_path)
    path = find_weights(name)
    meta = load(path)
    try:
        if {"ema", "config", "process"} <= meta.keys():
            weights = meta.pop("ema")
            meta.pop("state", None)
        else:
            weights, meta = read_published(meta, read_stated(path), name, process)
        meta["config"] = check_meta(meta, process)
        if not sizes_of(weights).items() <= meta["config"].items():        # before memory is taken
            raise ValueError(f"{meta['config']}, but its tensors have {sizes_of(weights)}")
        net = DiT(ModelConfig(**meta["config"]))
        net.load_state_dict(weights)        # strict: names what does not fit
        if not all(w.isfinite().all() for w in weights.values()):
            raise ValueError("it holds weights that are not finite; train it at a lower --lr")
    except Exception as error:              # each kind of misfit raises something else
        reason = " ".join(str(error).split())[:999]
        raise BadInput(f"{name} cannot be used: {type(error).__name__} {reason}") from None
    return net.to(device).eval(), meta


def num_tokens(meta):
    spec = meta["tokenizer"]
    return len(set(spec["chars"])) if spec["name"] == "char" else 50_257


def make_process(meta):
    if meta["process"] == "ar":
        raise BadInput("a judge has no noising process; give a teacher or generator")
    K = num_tokens(meta)                    # some uniform checkpoints carry an unused token K
    return Masked(K + 1) if meta["process"] == "mdlm" else Uniform(K)


def weights_key(net):
    """16 hexadecimal digits that tell these weights from others."""
    return checksum(to_bytes(net.state_dict()))[:16]


def export(net, meta, folder, dtype=None):
    """Write config.json and model.safetensors in the published layout; never over another file."""
    stated = Path(folder, "config.json")
    path = Path(folder, "model.safetensors")
    if stated.exists() or path.exists():
        raise BadInput(f"{folder} holds a network already; choose another folder")
    weights = {}
    for key, w in net.state_dict().items():
        weights[f"backbone.{key}"] = w.to("cpu", None if key.endswith("inv_freq") else dtype)
    data = to_bytes(weights, {"format": "pt"})
    config = meta | asdict(net.config)
    for key in "config", "defining":
        config.pop(key, None)
    for theirs, ours in PUBLISHED.items():
        config[theirs] = config[ours]
    config["sha256"] = checksum(data)
    write_json(stated, config)
    config["sha256"] = checksum(stated.read_bytes())
    write_whole(path, lambda file: file.write(data))
    write_json(stated, config)


def provenance(seed, device):
    """Where a figure comes from; paths in the command are relative."""
    command = " ".join(["python", *sys.argv])
    command = re.sub(r"(?<=[ =])/\S+", lambda path: os.path.relpath(path[0]), command)
    git = subprocess.run("git describe --always --exclude=* --dirty=+dirty", shell=True,
                         cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    where = f"{device}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {"command": command, "commit": git.strip() or "unknown", "seed": seed,
            "device": where, "torch": str(torch.__version__),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
