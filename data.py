# SPDX-License-Identifier: MIT
"""Text to tokens: a text file, a glob or a hub data set as one memory-mapped row of token ids.

The row is cached as uint16, keyed by content and tokenizer, beside a small JSON of how far it is
done: a killed run goes on there, and of several processes one writes while the others wait. Memory
holds a group of documents (all of them once for `char`, to see which there are). A hub data set is
keyed by its name: once done, its row needs neither network nor data set. The last `val_fraction` of
the documents (at most `val_documents`) validate, or of the tokens where that is not one document.
To reuse: copy this file alone.
"""
import glob
import hashlib
import json
import math
import os
from pathlib import Path

import fsspec                               # comes with torch
import numpy as np
import tiktoken
import torch
from filelock import FileLock               # comes with torch
from tqdm import tqdm

GROUP = 1000                                # documents between two records of progress


class BadInput(ValueError):
    """What the user gave cannot work; the scripts end with this sentence alone."""


def get_tokenizer(spec):
    """spec: {"name": "gpt2"}, or {"name": "char", "chars": "..."}: word i is chars[i]."""
    if spec["name"] == "char":
        return tiktoken.Encoding("char", pat_str=r"[\s\S]", special_tokens={}, mergeable_ranks={
            char.encode(): i for i, char in enumerate(spec["chars"])})
    try:
        return tiktoken.get_encoding(spec["name"])
    except Exception as error:              # unknown, or its word list is not on this machine yet
        raise BadInput(f"tokenizer {spec['name']!r} gave {type(error).__name__}; use char or gpt2, "
                       "and without a network set TIKTOKEN_CACHE_DIR") from None


def encode(tokenizer, text):
    known = tokenizer.decode(range(tokenizer.n_vocab)) if tokenizer.name == "char" else text
    if unknown := sorted(set(text) - set(known)):
        raise BadInput(f"leave out {unknown[:9]}: the training data has no such characters")
    return tokenizer.encode_ordinary(text)


def read_text(path):
    try:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            return file.read()
    except Exception as error:              # not UTF-8, not readable, a torn archive
        raise BadInput(f"{path} is no readable UTF-8 text ({error}); repair or drop it") from None


def find_documents(source):
    """-> what tells this content from other content, a function -> number of documents, read(i, j)
    -> list of str. Of a hub data set only that function asks the hub."""
    paths = sorted(filter(os.path.isfile, {source, *glob.glob(source, recursive=True)}))
    if paths:
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
        return digests, lambda: (len(paths), lambda i, j: [read_text(path) for path in paths[i:j]])
    if not source or "*" in source or source.endswith((".txt", ".gz", ".xz")):
        raise BadInput(f"there is no text file at {source!r}; check --data")

    def load():
        try:
            import datasets
            name, _, config = source.partition(":")
            found = datasets.load_from_disk(source) if os.path.isdir(source) else \
                datasets.load_dataset(name, config or None, split="train")
            return (found["train"] if isinstance(found, dict) else found).select_columns("text")
        except Exception as error:
            raise BadInput(f"{source!r} as a data set with a train split and a text column gave "
                           f"{type(error).__name__}; give a folder that save_to_disk wrote, or set "
                           "HF_HOME to a cache that holds it") from None

    content = [load()._fingerprint] if os.path.isdir(source) else source
    return content, lambda: (len(found := load()), lambda i, j: found[i:j]["text"])


class TextData:
    """.train, .val: rows of uint16 tokens; .K words; .spec rebuilds .tokenizer."""

    def __init__(self, source="data/shakespeare.txt", tokenizer="char", block_size=256,
                 cache="out/cache", val_fraction=0.04, val_documents=100_000):
        content, open_documents = find_documents(source)
        key = json.dumps([content, tokenizer, val_fraction, val_documents])
        path = Path(cache, hashlib.sha256(key.encode()).hexdigest()[:16] + ".bin")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):            # a kill opens it
            state = self.tokenise(path, tokenizer, open_documents, val_fraction, val_documents)
        self.block_size, self.spec, n = block_size, state["spec"], state["tokens"]
        self.tokenizer = get_tokenizer(self.spec)
        self.K = self.tokenizer.n_vocab
        at = state["val_start"] or n - max(block_size, int(val_fraction * n))
        if min(at, n - at) < block_size:
            raise BadInput(f"{source} holds {n} tokens, too few to train and to validate on blocks "
                           f"of {block_size}; give more text or smaller blocks")
        self.train, self.val = np.split(np.memmap(path, np.uint16, "r", shape=n), [at])

    @staticmethod
    def tokenise(path, tokenizer, open_documents, val_fraction, val_documents):
        """Write what is missing of the row. -> its record"""
        path.touch()
        record, new = path.with_suffix(".json"), path.with_suffix(".tmp")
        state = json.loads(record.read_text()) if record.exists() else {"tokens": math.inf}
        lost = path.stat().st_size < 2 * state["tokens"]      # or nothing is done yet
        if not lost and state["documents"] == state["of"]:
            return state
        n, read = open_documents()
        if lost or state["of"] != n:
            state = {"spec": {"name": tokenizer}, "documents": 0, "of": n, "tokens": 0,
                     "val_start": 0}
            if tokenizer == "char":
                state["spec"]["chars"] = "".join(sorted({"\n"}.union(*read(0, n))))
        val_from, bpe = n - min(val_documents, int(n * val_fraction)), get_tokenizer(state["spec"])
        between = encode(bpe, "\n\n") if tokenizer == "char" else [bpe.eot_token]
        with open(path, "r+b") as file:
            file.seek(2 * state["tokens"])
            groups = range(state["documents"], n, GROUP)
            for i in tqdm(groups, f"groups of {GROUP} documents", leave=False, disable=None):
                rows = bpe.encode_ordinary_batch(read(i, i + GROUP))
                for j, ids in enumerate(rows, i):
                    file.write(np.uint16(between if j else []))
                    if j == val_from:
                        state["val_start"] = file.tell() // 2
                    file.write(np.uint16(ids))
                file.flush()
                os.fsync(file.fileno())     # the tokens are safe before the record says so
                state.update(documents=i + len(rows), tokens=file.tell() // 2)
                new.write_text(json.dumps(state))
                os.replace(new, record)
        return state

    def train_text(self, max_tokens=2 ** 26):
        return self.tokenizer.decode(self.train[:max_tokens].tolist())

    def blocks(self, tokens, start):                     # (B,) -> (B, L) int64, on the CPU
        rows = tokens[start[:, None].numpy() + np.arange(self.block_size)]
        return torch.from_numpy(rows.astype(np.int64))

    def batch(self, split, B, rng, part=slice(None)):
        """Random windows (B, L). part: which of the B are wanted; only they are read."""
        tokens = getattr(self, split)
        windows = len(tokens) - self.block_size + 1
        return self.blocks(tokens, torch.randint(windows, (B,), generator=rng)[part])

    def val_blocks(self, n):
        """The same n blocks every time, evenly spread; fewer where the text has fewer."""
        whole = len(self.val) // self.block_size
        n = min(n, whole)
        return self.blocks(self.val, torch.arange(n) * whole // n * self.block_size)
