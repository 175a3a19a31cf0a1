"""Text to tokens. Run: python -m pytest tests/test_data.py"""
import gzip
import lzma
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
from data import BadInput, TextData, encode, get_tokenizer

TEXT = "In Æsop's fables\nthe fox said: “sour!”\t\n\n" * 40


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def byte_gpt2(monkeypatch):
    """Stands in for GPT-2's word list, which may have to be fetched: bytes, and end-of-text 256."""
    tokenizer = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", special_tokens={"<|endoftext|>": 256},
                                  mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer)


def load(tmp_path, source, **settings):
    return TextData(source, cache=str(tmp_path / "cache"), **{"block_size": 16} | settings)


def all_tokens(x):
    return np.concatenate([x.train, x.val]).tolist()


# ---- characters ---------------------------------------------------------------------------------

def test_characters_are_numbered_in_order(tmp_path, source):
    x = load(tmp_path, source)
    chars = sorted(set(TEXT))
    assert x.spec == {"name": "char", "chars": "".join(chars)} and x.K == len(chars)
    assert x.train.dtype == np.uint16 and isinstance(x.train, np.memmap)
    assert all_tokens(x) == [chars.index(char) for char in TEXT]
    assert x.tokenizer.decode(all_tokens(x)) == TEXT


def test_encode_is_undone_by_decode_of_a_rebuilt_tokenizer(tmp_path, source):
    tokenizer = get_tokenizer(load(tmp_path, source).spec)
    assert tokenizer.decode(encode(tokenizer, "fox\n“Æ”")) == "fox\n“Æ”"
    assert encode(tokenizer, "") == []


def test_validation_is_the_end_and_training_the_rest(tmp_path, source):
    x = load(tmp_path, source, val_fraction=0.25)
    assert len(x.val) == len(TEXT) // 4
    assert x.train_text() + x.tokenizer.decode(x.val.tolist()) == TEXT
    assert x.train_text(max_tokens=10) == TEXT[:10]
    assert len(load(tmp_path, source, val_fraction=0.0).val) == 16     # never less than a block


def test_batch_is_of_windows_of_the_text(tmp_path, source, rng):
    x = load(tmp_path, source)
    rows = x.batch("train", 64, rng)
    assert rows.shape == (64, 16) and rows.dtype == torch.int64 and rows.device.type == "cpu"
    train, val = x.train_text(), x.tokenizer.decode(x.val.tolist())
    assert all(x.tokenizer.decode(row.tolist()) in train for row in rows)
    assert all(x.tokenizer.decode(row.tolist()) in val for row in x.batch("val", 64, rng))
    for part in (slice(1, None, 4), slice(0)):
        again = x.batch("train", 64, torch.Generator().manual_seed(0), part)
        assert torch.equal(again, rows[part])
    again = x.batch("train", 64, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again) and not torch.equal(rows, x.batch("train", 64, rng))


def test_batch_reaches_the_first_and_the_last_window(tmp_path, rng):
    """Three windows fit; each is missing from 200 draws with odds (2/3)^200 < 1e-35."""
    path = tmp_path / "short.txt"
    path.write_text("abcdefghijklmnopqr" + "s" * 16)
    x = load(tmp_path, str(path))
    first = x.batch("train", 200, rng)[:, 0].tolist()
    assert set(x.tokenizer.decode(first)) == {"a", "b", "c"}


def test_val_blocks_are_spread_disjoint_and_the_same_every_time(tmp_path, source):
    x = load(tmp_path, source, val_fraction=0.5)
    whole = x.val[:len(x.val) // 16 * 16].reshape(-1, 16).astype(np.int64)
    assert np.array_equal(x.val_blocks(10 ** 6), whole)
    some = x.val_blocks(5)
    assert some.shape == (5, 16) and torch.equal(some, x.val_blocks(5))
    places = len(whole) * np.arange(5) // 5
    assert len(set(places)) == 5 and np.array_equal(some, whole[places])


# ---- files and documents ------------------------------------------------------------------------

def write_three(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    with gzip.open(tmp_path / "c.txt.gz", "wt", encoding="utf-8") as file:
        file.write("third é")
    with lzma.open(tmp_path / "a.txt.xz", "wt", encoding="utf-8") as file:
        file.write("first\r\nline")
    return str(tmp_path / "*.txt*")


def test_a_glob_joins_its_files_in_order(tmp_path):
    x = load(tmp_path, write_three(tmp_path), block_size=4)
    assert x.tokenizer.decode(all_tokens(x)) == "first\nline\n\nsecond\n\nthird é"
    x = load(tmp_path, str(tmp_path / "*.txt*"), block_size=4, val_fraction=0.4)
    assert x.tokenizer.decode(x.val.tolist()) == "third é"       # one whole document of three


def test_documents_are_joined_by_end_of_text(tmp_path, byte_gpt2):
    (tmp_path / "d.txt").write_text("<|endoftext|>")     # text that looks like the token
    x = load(tmp_path, write_three(tmp_path), tokenizer="gpt2", block_size=4)
    assert x.spec == {"name": "gpt2"} and x.K == 257
    parts = ["first\nline", "second", "third é", "<|endoftext|>"]
    want = [list(part.encode()) for part in parts]
    assert all_tokens(x) == want[0] + [256] + want[1] + [256] + want[2] + [256] + want[3]


def test_the_cache_follows_content_and_tokenizer(tmp_path, source, byte_gpt2, monkeypatch):
    first = all_tokens(load(tmp_path, source))
    other = all_tokens(load(tmp_path, source, tokenizer="gpt2"))
    assert other == list(TEXT.encode())
    moved = tmp_path / "moved.txt"
    os.rename(source, moved)
    with monkeypatch.context() as patch:    # same content, other name: nothing is tokenised again
        patch.delattr(tiktoken.Encoding, "encode_ordinary_batch")
        assert all_tokens(load(tmp_path, str(moved))) == first
    moved.write_text(TEXT + "x" * 50)
    assert len(all_tokens(load(tmp_path, str(moved)))) == len(first) + 50


# ---- data sets, and work that is killed ---------------------------------------------------------

DOCUMENTS = [f"Document {i}: " + "la " * (i % 5) + "é" * (i == 4) for i in range(11)]
DOCUMENTS += ["", "end."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path_factory.mktemp("hub") / "saved")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"id": list(range(13)), "text": DOCUMENTS}).save_to_disk(path)
    return path


def joined(documents):
    return [i for document in documents for i in [256, *document.encode()]][1:]


def test_a_saved_data_set_and_its_validation_documents(tmp_path, folder, byte_gpt2):
    x = load(tmp_path, folder, tokenizer="gpt2", val_fraction=0.25, block_size=4)
    assert all_tokens(x) == joined(DOCUMENTS)
    assert x.val.tolist() == joined(DOCUMENTS[-3:])        # a quarter of 13, rounded down
    x = load(tmp_path, folder, tokenizer="gpt2", val_fraction=0.25, block_size=4, val_documents=1)
    assert x.val.tolist() == list(b"end.") and x.train.tolist()[-1] == 256
    x = load(tmp_path, folder, block_size=4, val_fraction=0.05)      # not one document: of tokens
    assert len(x.val) == len(all_tokens(x)) // 20
    assert x.tokenizer.decode(all_tokens(x)) == "\n\n".join(DOCUMENTS)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
@pytest.mark.parametrize("loss", ["nothing", "unwritten", "torn", "everything"])
def test_killed_anywhere_and_continued_gives_the_same_file(tmp_path, folder, byte_gpt2, monkeypatch,
                                                           tokenizer, loss):
    """A kill at every fsync and in every writing of the record in turn, halfway. What the disk then
    holds of the bytes after the last record: all, none, or noise; or the whole file is gone. Work
    that is on record is not redone."""
    monkeypatch.setattr(data, "GROUP", 3)
    fsync, write_text, batch = os.fsync, Path.write_text, tiktoken.Encoding.encode_ordinary_batch
    settings = dict(tokenizer=tokenizer, block_size=4)
    whole = all_tokens(load(tmp_path, folder, **settings))
    kills = 0
    for kill_at in range(100):
        cache = tmp_path / f"cache{kill_at}"
        calls = []

        def dying(function):
            def call(target, *args):
                calls.append(function)
                if len(calls) == kill_at + 1:
                    if function is write_text:
                        write_text(target, args[0][:9])
                    raise Killed
                return function(target, *args)
            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(fsync))
            patch.setattr(Path, "write_text", dying(write_text))
            try:
                TextData(folder, cache=str(cache), **settings)
                break                       # it lived through all its calls
            except Killed:
                kills += 1
        part = next(cache.glob("*.bin"))
        record = "".join(file.read_text() for file in cache.glob("*.json"))
        records = calls[:-1].count(write_text) if record else 0
        if loss != "nothing":
            done = data.json.loads(record)["tokens"] if record else 0
            kept = part.read_bytes()[:2 * done] if loss != "everything" else b""
            part.write_bytes(kept + b"noise" * (loss == "torn"))
            records *= loss != "everything"
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(tiktoken.Encoding, "encode_ordinary_batch",
                          lambda self, texts, **k: seen.extend(texts) or batch(self, texts, **k))
            assert all_tokens(TextData(folder, cache=str(cache), **settings)) == whole
        assert seen == DOCUMENTS[3 * records:]
    assert kills == 5 * 2                   # five groups, each synced and recorded


def test_of_runs_at_once_one_writes_and_the_others_wait(tmp_path, folder, byte_gpt2, monkeypatch):
    monkeypatch.setattr(data, "GROUP", 3)
    seen, inner = [], tiktoken.Encoding.encode_ordinary_batch

    def slow(self, texts):
        time.sleep(0.05)
        return seen.extend(texts) or inner(self, texts)

    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary_batch", slow)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: all_tokens(load(tmp_path, folder, tokenizer="gpt2",
                                                     block_size=4)), range(4))]
    assert found == [joined(DOCUMENTS)] * 4 and seen == DOCUMENTS


# ---- bad input ----------------------------------------------------------------------------------

def sentence(failure, *words):
    text = str(failure.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("content, words", [
    ("", ["text.txt", "0 tokens"]),
    ("too short", ["text.txt", "9 tokens", "blocks of 16"]),
    (b"\xff\xfe\x00", ["text.txt", "UTF-8"]),
])
def test_a_file_that_cannot_serve(tmp_path, content, words):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):                      # the second time there is a cache
        with pytest.raises(BadInput) as failure:
            load(tmp_path, str(path))
        sentence(failure, *words)


def test_a_torn_archive(tmp_path):
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode())[:-40])
    with pytest.raises(BadInput) as failure:
        load(tmp_path, str(path))
    sentence(failure, "text.txt.xz")


@pytest.mark.parametrize("source", ["", "no/such.txt", "no/such/*.txt", "no/such.txt.gz"])
def test_no_file_there(tmp_path, source):
    with pytest.raises(BadInput) as failure:
        load(tmp_path, source)
    sentence(failure, source, "--data")


def test_a_data_set_that_cannot_be_had(tmp_path, folder, monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto the hub")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadInput) as failure:
        load(tmp_path, "somebody/openwebtext")
    sentence(failure, "somebody/openwebtext", "HF_HOME", "save_to_disk", "ConnectionError")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as failure:
        load(tmp_path, str(tmp_path / "empty"))
    sentence(failure, "save_to_disk")


def test_a_hub_data_set_is_read_like_a_saved_one(tmp_path, folder, byte_gpt2, monkeypatch):
    import datasets
    asked, saved = [], datasets.load_from_disk(folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or saved)
    x = load(tmp_path, "somebody/corpus:part", tokenizer="gpt2", block_size=4)
    assert asked == [(("somebody/corpus", "part"), {"split": "train"})]
    assert all_tokens(x) == joined(DOCUMENTS)

    def offline(*args, **kwargs):
        raise ConnectionError
    monkeypatch.setattr(datasets, "load_dataset", offline)    # a whole row asks nobody,
    x = load(tmp_path, "somebody/corpus:part", tokenizer="gpt2", block_size=4)
    assert all_tokens(x) == joined(DOCUMENTS)
    for changed in ({"block_size": 4}, {"tokenizer": "gpt2", "val_documents": 1}):
        with pytest.raises(BadInput):                          # but only where all is as it was
            load(tmp_path, "somebody/corpus:part", **changed)


def test_a_hub_data_set_that_changed_is_begun_anew(tmp_path, folder, byte_gpt2, monkeypatch):
    """Half of it is on record when it is killed; then the hub has other documents, and more."""
    import datasets
    monkeypatch.setattr(data, "GROUP", 5)
    saved, groups = datasets.load_from_disk(folder), []
    inner = tiktoken.Encoding.encode_ordinary_batch
    longer = datasets.Dataset.from_dict({"text": DOCUMENTS[::-1] + ["more"]})

    def dying(self, texts):
        if groups:
            raise Killed
        return groups.append(1) or inner(self, texts)

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: saved)
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken.Encoding, "encode_ordinary_batch", dying)
        with pytest.raises(Killed):
            load(tmp_path, "somebody/corpus", tokenizer="gpt2", block_size=4)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: longer)
    x = load(tmp_path, "somebody/corpus", tokenizer="gpt2", block_size=4)
    assert all_tokens(x) == joined(DOCUMENTS[::-1] + ["more"])


def test_unknown_characters_and_tokenizers(tmp_path, source, monkeypatch):
    tokenizer = load(tmp_path, source).tokenizer
    with pytest.raises(BadInput) as failure:
        encode(tokenizer, "fox€\x00")
    sentence(failure, "'€'", r"'\x00'")
    assert "'f'" not in str(failure.value)

    def offline(name):
        raise ConnectionError(name)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput) as failure:
        get_tokenizer({"name": "gpt2"})
    sentence(failure, "gpt2", "TIKTOKEN_CACHE_DIR")
