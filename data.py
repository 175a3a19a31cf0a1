# SPDX-License-Identifier: MIT
"""Text to tokens: a text file, a glob or a hub data set as one memory-mapped row of token ids.

The row is cached as uint16, keyed by content and tokenizer, beside a small JSON of how far it is
done: a killed run goes on there. The last `val_fraction` of the documents (at most `val_documents`)
validate, or of the tokens where that is not one document. To reuse: copy this file alone.
"""
import glob
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import fsspec                               # comes with torch
import numpy as np
import tiktoken
import torch
from tqdm import tqdm

GROUP = 1000                                # documents between two records of progress


class BadInput(ValueError):
    """What the user gave cannot work; the scripts end with this sentence alone."""


@contextmanager
def or_else(sentence):
    try:
        yield
    except Exception as error:              # whatever a library raises
        raise BadInput(f"{sentence} ({type(error).__name__})") from None


def get_tokenizer(spec):
    """spec: {"name": "gpt2"}, or {"name": "char", "chars": "..."}: word i is chars[i]."""
    if spec["name"] == "char":
        words = {char.encode(): i for i, char in enumerate(spec["chars"])}
        return tiktoken.Encoding("char", pat_str=r"[\s\S]", mergeable_ranks=words, special_tokens={})
    with or_else(f"the tokenizer {spec['name']!r} cannot be loaded; use char or gpt2, and without a "
                 "network set TIKTOKEN_CACHE_DIR"):
        return tiktoken.get_encoding(spec["name"])


def encode(tokenizer, text):
    known = tokenizer.decode(range(tokenizer.n_vocab)) if tokenizer.name == "char" else text
    if unknown := sorted(set(text) - set(known)):
        raise BadInput("leave out the characters that the training data does not have: "
                       + " ".join(map(repr, unknown[:9])))
    return tokenizer.encode_ordinary(text)


def read_text(path):
    with or_else(f"{path} is no readable UTF-8 text; repair or drop it"), \
            fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
        return file.read()


def find_documents(source):
    """-> their number, read(i, j) -> list of str, what tells this content from other content."""
    paths = sorted(filter(os.path.isfile, {source, *glob.glob(source, recursive=True)}))
    if paths:
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
        return len(paths), lambda i, j: [read_text(path) for path in paths[i:j]], digests
    if not source or "*" in source or source.endswith((".txt", ".gz", ".xz")):
        raise BadInput(f"there is no text file at {source!r}; check --data")
    with or_else(f"{source!r} is no text file, and no data set with a train split and a text column; "
                 "without a network set HF_HOME to a cache or give a folder of save_to_disk"):
        import datasets
        name, _, config = source.partition(":")
        found = datasets.load_from_disk(source) if os.path.isdir(source) else \
            datasets.load_dataset(name, config or None, split="train")
        found = (found["train"] if isinstance(found, dict) else found).select_columns("text")
        return len(found), lambda i, j: found[i:j]["text"], [found._fingerprint]


class TextData:
    """.train, .val: rows of uint16 tokens; .K words; .spec rebuilds .tokenizer."""

    def __init__(self, source="data/shakespeare.txt", tokenizer="char", block_size=256,
                 cache="out/cache", val_fraction=0.04, val_documents=100_000):
        n, read, content = find_documents(source)
        val_from = n - min(val_documents, int(n * val_fraction))
        key = hashlib.sha256(json.dumps([content, tokenizer, val_from]).encode()).hexdigest()[:16]
        path, record = Path(cache, key + ".bin"), Path(cache, key + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        state = json.loads(record.read_text()) if record.exists() else None
        if not state or path.stat().st_size < 2 * state["tokens"]:    # nothing done, or it is lost
            state = {"spec": {"name": tokenizer}, "documents": 0, "tokens": 0, "val_start": 0}
            if tokenizer == "char":
                state["spec"]["chars"] = "".join(sorted({"\n"}.union(*read(0, n))))
        self.block_size, self.spec, bpe = block_size, state["spec"], get_tokenizer(state["spec"])
        self.tokenizer, self.K = bpe, bpe.n_vocab
        with open(path, "r+b") as file:
            file.seek(2 * state["tokens"])
            for i in tqdm(range(state["documents"], n, GROUP), "tokens", leave=False, disable=None):
                for j, ids in enumerate(bpe.encode_ordinary_batch(read(i, i + GROUP)), i):
                    if j:
                        file.write(np.uint16(encode(bpe, "\n\n") if ... else [bpe.eot_token]))
