# SPDX-License-Identifier: MIT
"""Text to tokens: files or a data set become one memory-mapped row of token ids.

The way of a text: documents (files, or rows of a data set) -> pieces, short enough for the memory
-> tokens, appended to a file of uint16 -> blocks of L tokens, which the networks read. The file is
cached by content and tokenizer, beside a small JSON of what is done: a killed run goes on there,
and of several processes one writes while the others wait. A hub data set is cached by its name:
once done, it needs neither network nor data set.

Examples (.tsv): a line is prompt<TAB>answer, and \\n in it a newline. It becomes a row of
1 + L: the prompt's length, its tokens, the answer's, padding. The model writes all but the prompt.
To reuse: copy this file alone.
"""
import glob
import hashlib
import io
import json
import os
import re
import sys
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from filelock import FileLock               # comes with torch, as fsspec does
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

PIECE = 2 ** 14                             # characters that are tokenised in one call
GROUP = 256                                 # pieces between two records of what is done


class BadInput(ValueError):
    """What the user gave cannot work; the scripts end with this sentence alone."""


class Batch(NamedTuple):
    x_0: torch.Tensor                       # (B, L) int64 on the CPU
    free: torch.Tensor | None               # (B, L) bool: the model writes there; None: everywhere


# ---- tokens -------------------------------------------------------------------------------------

def get_tokenizer(spec):
    """spec: {"name": "gpt2"}, or {"name": "char", "chars": "..."}: token i is chars[i]."""
    name = spec["name"]
    try:
        if name == "char":
            ranks = {char.encode(): i for i, char in enumerate(spec["chars"])}
            tokenizer = tiktoken.Encoding(
                name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={})
        else:
            tokenizer = tiktoken.get_encoding(name)
    except Exception as error:              # unknown, or its tokens are not on this machine yet
        raise BadInput(f"tokenizer {name!r} gave {type(error).__name__}; use char or gpt2, and "
                       "without a network set TIKTOKEN_CACHE_DIR") from None
    if tokenizer.n_vocab > 2 ** 16:
        raise BadInput(f"tokenizer {name!r} has {tokenizer.n_vocab} tokens, and uint16 numbers "
                       "65536; use gpt2")
    return tokenizer


def cut(file):
    """Pieces of less than 2 * PIECE characters, which give the tokens of the whole text.

    No token of GPT-2 goes on from a non-blank to a blank, so a piece ends there. A long run without
    such a place is cut anywhere, because tiktoken panics at a million blanks.
    """
    rest = ""
    while chunk := file.read(PIECE):
        rest += chunk
        if len(rest) >= PIECE:
            piece = re.match(r"(?s).*\S(?=[ \n])|.*", rest)[0]
            yield piece
            rest = rest[len(piece):]
    yield rest


def encode(tokenizer, text):
    """A list of tokens; BadInput for a character which the training data does not have."""
    if tokenizer.name == "char":
        chars = tokenizer.decode(range(tokenizer.n_vocab))
        if unknown := sorted(set(text) - set(chars)):
            raise BadInput(f"leave out {unknown[:9]}: the training data has no such characters")
    pieces = cut(io.StringIO(text))
    return [token for piece in pieces for token in tokenizer.encode_ordinary(piece)]


# ---- documents: paths of files, or rows {"text": ...} of a data set -----------------------------

def find_paths(source):
    """Of a file, a glob, a folder's .txt, or a file beside this one; none of a data set."""
    paths = []
    for pattern in source, f"{source}/*.txt", f"{Path(__file__).parent}/{source}":
        files = filter(os.path.isfile, {pattern, *glob.glob(pattern, recursive=True)})
        paths = paths or sorted(files)
    is_table = re.search(r"(?m)\.(jsonl?|csv|parquet)(\.gz|\.xz)?$", "\n".join(paths) or source)
    if is_table or not paths and re.search(r"^$|[*?]|::|\.(txt|tsv|gz|xz)$", source):
        raise BadInput(f"there is no plain text at {source!r}: --data takes .txt or .tsv, also as "
                       ".gz or .xz, or a data set; convert .json, .csv or .parquet to .txt, or "
                       "load it with datasets and give the folder that save_to_disk writes")
    return paths


def load_rows(source):
    """A hub data set, name or name:config, or the folder of one."""
    try:
        import datasets
        name, _, config = source.partition(":")
        if os.path.isdir(source):
            rows = datasets.load_from_disk(source)
        else:
            rows = datasets.load_dataset(name, config or None, split="train")
        if isinstance(rows, dict):
            rows = rows["train"]
        return rows.select_columns("text")
    except Exception as error:
        raise BadInput(f"{source!r} as a data set with a train split and a text column gave "
                       f"{type(error).__name__}; give a folder that save_to_disk wrote, or set "
                       "HF_HOME to a cache that holds it") from None


def read_pieces(documents, examples):
    """Yields (number of a document, [its first piece]), then (0, [a further piece]) as often as
    it has some; of examples (0, [prompt, answer])."""
    for number, document in enumerate(tqdm(documents, leave=False, disable=None)):
        try:
            if isinstance(document, str):
                file = LocalFileSystem().open(
                    document, "rt", encoding="utf-8-sig", compression="infer")
            else:
                file = io.StringIO(document["text"])        # null: an empty document
            with file:
                for i, text in enumerate(file if examples else cut(file), 1):
                    texts = [text]
                    if examples:
                        texts = text.rstrip("\n").replace(r"\n", "\n").split("\t")
                        if len(texts) != 2:
                            raise ValueError(f"line {i} is not prompt<TAB>answer")
                    yield 0 if examples or i > 1 else number, texts
        except Exception as error:          # not UTF-8, not readable, a torn archive, no string
            raise BadInput(f"document {number}, {document!s:.300}, cannot be used ({error}); "
                           "repair or drop it") from None


# ---- the file of tokens -------------------------------------------------------------------------

class TextData:
    """.train, .val: uint16, (N,) tokens of a text or (N, 1 + L) rows of examples. .K: how many
    tokens there are; .spec rebuilds .tokenizer; .key stands for content, tokenizer and split;
    .held_out says what .val is. wrap_eos: every block begins and ends with end-of-text."""

    def __init__(self, source="data/shakespeare.txt", tokenizer="char", block_size=256,
                 cache="out/cache", wrap_eos=False, val_fraction=0.04, val_documents=100_000):
        self.source = source
        self.wrap_eos = wrap_eos
        self.block_size = block_size
        paths = find_paths(source)
        self.examples = any(re.search(r"\.tsv(\.gz|\.xz)?$", path) for path in paths)
        self.span = 1 if self.examples else block_size
        self.width = 1 + block_size if self.examples else 1
        files = paths or glob.glob(f"{source}/**/state.json", recursive=True)   # of save_to_disk
        content = [os.path.getsize(file) and hashlib.sha256(np.memmap(file, mode="r")).hexdigest()
                   for file in files]       # an empty file cannot be mapped
        key = json.dumps([content or source, tokenizer, val_fraction, val_documents, self.width])
        self.key = hashlib.sha256(key.encode()).hexdigest()[:16]
        os.makedirs(cache, exist_ok=True)
        path = Path(cache, f"{self.key}.bin")
        with FileLock(f"{path}.lock"):      # a kill opens it
            state = self.tokenise(path, paths, tokenizer, val_fraction, val_documents)
        self.spec = state["spec"]
        self.tokenizer = get_tokenizer(self.spec)
        self.K = self.tokenizer.n_vocab
        self.split(path, state)

    def tokenise(self, path, paths, name, val_fraction, val_documents):
        """Append what is missing to the file of tokens, a group of pieces at a time. -> record"""
        record = path.with_suffix(".json")
        try:
            state = json.loads(record.read_text(encoding="utf-8"))
            lost = path.stat().st_size < 2 * state["tokens"]
        except (FileNotFoundError, ValueError):     # no record yet, or empty, or torn
            lost = True
        if not lost and state["done"]:
            return state
        documents = paths or load_rows(self.source)
        n = len(documents)
        version = getattr(documents, "_fingerprint", None)      # of a data set, which may change
        if lost or state["version"] != version:
            spec = {"name": name}
            if name == "char":
                chars = {"\n"}
                for _, texts in read_pieces(documents, self.examples):
                    chars.update(*texts)
                spec["chars"] = "".join(sorted(chars))
            share = min(val_fraction, val_documents / (n or 1))
            state = {"spec": spec, "version": version, "done": False, "pieces": 0, "tokens": 0,
                     "documents": n, "share": share, "held": round(n * share), "val_start": 0}
        tokenizer = get_tokenizer(state["spec"])
        between = encode(tokenizer, "\n\n") if name == "char" else [tokenizer.eot_token]
        pieces = islice(read_pieces(documents, self.examples), state["pieces"], None)
        with open(path, "ab") as file:
            file.truncate(2 * state["tokens"])
            while not state["done"]:
                group = list(islice(pieces, GROUP))
                rows = self.encode_all(tokenizer, [texts for _, texts in group], between[:1])
                for (number, _), tokens in zip(group, rows):
                    if number:
                        tokens = between + tokens
                        if number == n - state["held"]:
                            state["val_start"] = state["tokens"] + len(between)
                    state["tokens"] += len(tokens)
                    file.write(np.uint16(tokens))
                file.flush()
                os.fsync(file.fileno())     # the tokens are safe before the record says so
                state["pieces"] += len(group)
                state["done"] = not group
                new = Path(f"{record}.{os.getpid()}")
                new.write_text(json.dumps(state), encoding="utf-8")
                new.replace(record)
        return state

    def encode_all(self, tokenizer, group, padding):
        """The tokens of each piece, or the row of each example, [] where it is too long."""
        if not self.examples:
            return tokenizer.encode_ordinary_batch([text for text, in group])
        rows = []
        for texts in group:
            prompt, answer = [encode(tokenizer, text) for text in texts]
            room = self.block_size - len(prompt + answer)
            row = [len(prompt)] + prompt + answer + padding * room
            rows.append(row if room >= 0 else [])
        return rows

    def split(self, path, state):
        """Hold out the last documents, or of the tokens where those are far from their share."""
        n = state["tokens"] // self.width
        unit = "examples" if self.examples else "tokens"
        if self.examples and state["pieces"] > n:
            print(f"{self.source}: {state['pieces'] - n} examples are left out, longer than "
                  f"{self.block_size} tokens", file=sys.stderr)
        asked = n * state["share"]
        start = state["val_start"] or n
        part = f"{state['held']} of {state['documents']} documents, "
        if not max(self.span, asked / 2) <= n - start <= asked * 3:
            start = n - max(self.span, int(asked))
            part = ""
        held = n - start
        if start < self.span:
            raise BadInput(f"{self.source} holds {n} {unit}, too few to train and to validate on "
                           f"blocks of {self.block_size}; give more text or other blocks")
        self.held_out = f"the last {part}{held:,} of {n:,} {unit} ({held / n:.1%})"
        shape = (n, self.width) if self.examples else n
        rows = np.memmap(path, np.uint16, "r", shape=shape)
        self.train = rows[:start]
        self.val = rows[start:]

    def train_text(self, max_tokens=2 ** 26):
        """The training text, or its beginning, for counts of words and n-grams."""
        tokens = self.train[:, 1:] if self.examples else self.train
        return self.tokenizer.decode(tokens.flat[:max_tokens].tolist())

    def blocks(self, tokens, start):        # start: (B,)
        places = start[:, None] * self.width + np.arange(self.examples + self.block_size)
        rows = torch.from_numpy(tokens.reshape(-1)[places].astype(np.int64))
        x_0 = rows[:, self.examples:]
        if self.wrap_eos:
            x_0[:, [0, -1]] = self.tokenizer.eot_token
        if (x_0 >= self.K).any():
            raise BadInput(f"{self.train.filename} is damaged: it has tokens beyond the {self.K} "
                           "of its tokenizer; remove it")
        free = torch.arange(self.block_size) >= rows[:, :1] if self.examples else None
        return Batch(x_0, free)

    def batch(self, split, B, rng, part=slice(None)):
        """Random blocks. part: which of the B are wanted; only they are read."""
        tokens = getattr(self, split)
        starts = len(tokens) - self.span + 1
        return self.blocks(tokens, torch.randint(starts, (B,), generator=rng)[part].numpy())

    def val_blocks(self, n):
        """The same n blocks every time, evenly spread; fewer where there are fewer."""
        whole = len(self.val) // self.span
        n = min(n, whole)
        return self.blocks(self.val, np.arange(n) * whole // n * self.span)
