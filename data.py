# SPDX-License-Identifier: MIT
"""Text to tokens: a text file, a glob or a hub data set as one memory-mapped row of token ids.

Tokens are cached as uint16, keyed by content and tokenizer, and appended a group of documents at a
time beside a small JSON of how many are done: a killed run goes on where it stopped. Every byte is
the same whoever writes it and how often: two runs may tokenise the same text at once.
Validation is the end of the text: the last `val_fraction` of the tokens of files, of the documents
of a data set (of those at most `val_documents`). To reuse: copy this file alone.
"""
import glob
import gzip
import hashlib
import json
import lzma
import os
from pathlib import Path

import numpy as np
import tiktoken
import torch
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
        raise BadInput(f"the tokenizer {spec['name']!r} cannot be loaded ({type(error).__name__}); "
                       "use char or gpt2, and without a network set TIKTOKEN_CACHE_DIR") from None


def encode(tokenizer, text):
    if tokenizer.name == "char":
        if unknown := set(text) - set(tokenizer.decode(range(tokenizer.n_vocab))):
            raise BadInput("the text holds characters that the training data does not have: "
                           f"{' '.join(map(repr, sorted(unknown)[:9]))}; leave them out")
    return tokenizer.encode_ordinary(text)


def read_text(path):
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path[-3:], open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return file.read()
    except Exception as error:              # not UTF-8, not readable, a torn archive
        raise BadInput(f"{path} is no readable UTF-8 text ({error}); repair or drop it") from None


def find_documents(source):
    """-> number of documents, read(i, j) -> list of str, content key, is it a data set."""
    paths = sorted(filter(os.path.isfile, {source, *glob.glob(source, recursive=True)}))
    if paths:
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
        return len(paths), lambda i, j: [read_text(path) for path in paths[i:j]], digests, False
    if not source or "*" in source or source.endswith((".txt", ".gz", ".xz")):
        raise BadInput(f"there is no text file at {source!r}; check --data")
    try:
        import datasets
        name, _, config = source.partition(":")
        found = datasets.load_from_disk(source) if os.path.isdir(source) else \
            datasets.load_dataset(name, config or None, split="train")
        found = (found["train"] if isinstance(found, dict) else found).select_columns("text")
    except Exception as error:
        raise BadInput(f"{source!r} is no text file, and as a data set with a train split and a "
                       f"text column it gave {type(error).__name__}; without a network set HF_HOME "
                       "to a cache that has it or give a folder that save_to_disk wrote") from None
    return len(found), lambda i, j: found[i:j]["text"], [found._fingerprint, len(found)], True


def tokenize(source, tokenizer, cache, val_fraction, val_documents):
    """-> tokens (uint16 memmap), state: the tokenizer's "spec" and, of data sets, "val_start"."""
    n, read, content, is_dataset = find_documents(source)
    val_from = n - min(val_documents, int(n * val_fraction)) if is_dataset else n
    key = hashlib.sha256(json.dumps([content, tokenizer, val_from]).encode()).hexdigest()[:16]
    final, part, record = (Path(cache, key + end) for end in (".bin", ".part", ".json"))
    state = json.loads(record.read_text()) if record.exists() else {}
    if final.exists() and state:
        return np.memmap(final, np.uint16, "r"), state
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    if not state or part.stat().st_size < 2 * state["tokens"]:    # nothing done, or it is lost
        state = {"spec": {"name": tokenizer}, "documents": 0, "tokens": 0}
        if tokenizer == "char":
            groups = (read(i, i + GROUP) for i in range(0, n, GROUP))
            chars = {"\n"}.union(*(set(text) for group in groups for text in group))
            state["spec"]["chars"] = "".join(sorted(chars))
    bpe = get_tokenizer(state["spec"])
    between = encode(bpe, "\n\n") if tokenizer == "char" else [bpe.eot_token]
    with open(part, "r+b") as file:
        file.seek(2 * state["tokens"])
        for i in tqdm(range(state["documents"], n, GROUP), "tokens", unit="k texts", disable=None):
            rows = bpe.encode_ordinary_batch(read(i, i + GROUP), num_threads=os.cpu_count())
            for j, ids in enumerate(rows, i):
                file.write(np.uint16(between if j else []))
                if j == val_from:
                    state["val_start"] = file.tell() // 2
                file.write(np.uint16(ids))
            file.flush()
            os.fsync(file.fileno())         # the tokens are safe before the record says so
            state.update(documents=i + len(rows), tokens=file.tell() // 2)
            temporary = record.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(state))
            os.replace(temporary, record)
        file.truncate()
    if not state["tokens"]:
        raise BadInput(f"{source} holds no text; check --data")
    if not final.exists():                  # else another process was first
        os.replace(part, final)
    return np.memmap(final, np.uint16, "r"), state


class TextData:
    """.train, .val: rows of uint16 tokens; .K words; .spec rebuilds .tokenizer."""

    def __init__(self, source="data/shakespeare.txt", tokenizer="char", block_size=256,
                 cache="out/cache", val_fraction=0.04, val_documents=100_000):
        x, state = tokenize(source, tokenizer, cache, val_fraction, val_documents)
        at = state.get("val_start", len(x) - max(block_size, int(val_fraction * len(x))))
        if min(at, len(x) - at) < block_size:
            raise BadInput(f"{source} holds {len(x)} tokens, too few to train and to validate on "
                           f"blocks of {block_size}; give more text or smaller blocks")
        self.block_size, self.train, self.val, self.spec = block_size, x[:at], x[at:], state["spec"]
        self.tokenizer = get_tokenizer(self.spec)
        self.K = self.tokenizer.n_vocab

    def train_text(self, max_tokens=2 ** 26):
        return self.tokenizer.decode(self.train[:max_tokens].tolist())

    def blocks(self, tokens, start):                     # (B,) -> (B, L) int64, on the CPU
        rows = tokens[start[:, None].numpy() + np.arange(self.block_size)]
        return torch.from_numpy(rows.astype(np.int64))

    def batch(self, split, B, rng):
        tokens = self.train if split == "train" else self.val
        last = len(tokens) - self.block_size
        return self.blocks(tokens, torch.randint(last + 1, (B,), generator=rng))

    def val_blocks(self, n):
        """The same n blocks every time, evenly spread; fewer where the text has fewer."""
        whole = len(self.val) // self.block_size
        n = min(n, whole)
        return self.blocks(self.val, torch.arange(n) * whole // n * self.block_size)
