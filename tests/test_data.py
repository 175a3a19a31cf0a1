"""Text to tokens. Run: python -m pytest tests/test_data.py"""
import gzip
import json
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
from data import BadInput, TextData, encode, get_tokenizer

ROOT = Path(data.__file__).parent
TEXT = "In Æsop's fables\nthe fox said: “sour!”\t\n\n" * 40
END = 256                                   # the end-of-text token of byte_gpt2
PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")    # GPT-2's


@pytest.fixture
def byte_gpt2(monkeypatch):
    """Stands in for GPT-2's tokens, which may have to be fetched: GPT-2's rules, its tokens the
    bytes, end-of-text, and five pairs."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {pair: 257 + i for i, pair in enumerate([b"\n\n", b"  ", b" \n", b"la", b" l"])}
    tokenizer = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                                  special_tokens={"<|endoftext|>": END})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer)
    return tokenizer


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> path of a file in a folder of its own."""
    (tmp_path / "texts").mkdir()

    def write_file(content, name="text.txt"):
        path = tmp_path / "texts" / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(
            path.suffix, bytes)(content))
        return str(path)
    return write_file


@pytest.fixture
def load(tmp_path):
    def load_data(source, **settings):
        return TextData(source, **{"block_size": 16, "cache": str(tmp_path / "cache")} | settings)
    return load_data


def all_tokens(x):
    return np.concatenate([x.train, x.val]).tolist()


def text_of(x, tokens):
    return x.tokenizer.decode(np.ravel(tokens).tolist())


# ---- characters, and blocks of them -------------------------------------------------------------

def test_characters_are_numbered_in_order(load, write):
    x = load(write(TEXT))
    chars = sorted(set(TEXT))
    assert x.spec == {"name": "char", "chars": "".join(chars)} and x.K == len(chars)
    assert x.train.dtype == np.uint16 and isinstance(x.train, np.memmap) and not x.examples
    assert all_tokens(x) == [chars.index(char) for char in TEXT]
    assert text_of(x, all_tokens(x)) == TEXT


def test_a_newline_is_always_among_the_characters(load, write):
    x = load(write("ab" * 40))
    assert x.spec["chars"] == "\nab" and x.tokenizer.decode([0, 1, 2]) == "\nab"


def test_encode_is_undone_by_decode_of_a_rebuilt_tokenizer(load, write):
    tokenizer = get_tokenizer(load(write(TEXT)).spec)
    assert tokenizer.decode(encode(tokenizer, "fox\n“Æ”")) == "fox\n“Æ”"
    assert encode(tokenizer, "") == []


def test_batch_is_of_windows_of_the_text(load, write, rng):
    x = load(write(TEXT))
    x_0, free = x.batch("train", 64, rng)
    assert x_0.shape == (64, 16) and x_0.dtype == torch.int64 and x_0.device.type == "cpu"
    assert free is None
    val = text_of(x, x.val)
    assert all(text_of(x, row) in x.train_text() for row in x_0)
    assert all(text_of(x, row) in val for row in x.batch("val", 64, rng).x_0)
    again = torch.Generator().manual_seed(0)
    assert torch.equal(x.batch("train", 64, again).x_0, x_0)
    assert not torch.equal(x.batch("train", 64, again).x_0, x_0)


def test_part_of_a_batch_is_that_part_of_the_whole(load, write, rng):
    x = load(write(TEXT))
    whole = x.batch("train", 64, rng).x_0
    for part in (slice(1, None, 4), slice(0)):
        again = x.batch("train", 64, torch.Generator().manual_seed(0), part)
        assert torch.equal(again.x_0, whole[part])


def test_batch_reaches_the_first_and_the_last_window(load, write, rng):
    """Three windows fit; each is missing from 200 draws with odds (2/3)^200 < 1e-35."""
    x = load(write("abcdefghijklmnopqr" + "s" * 16))
    assert set(text_of(x, x.batch("train", 200, rng).x_0[:, 0])) == {"a", "b", "c"}


def test_val_blocks_are_spread_disjoint_and_the_same_every_time(load, write):
    x = load(write(TEXT), val_fraction=0.5)
    whole = x.val[:len(x.val) // 16 * 16].reshape(-1, 16).astype(np.int64)
    assert np.array_equal(x.val_blocks(10 ** 6).x_0, whole)
    some = x.val_blocks(5).x_0
    assert some.shape == (5, 16) and torch.equal(some, x.val_blocks(5).x_0)
    assert np.array_equal(some, whole[len(whole) * np.arange(5) // 5])


def test_a_damaged_cache_is_one_sentence(load, write, tmp_path):
    x = load(write(TEXT), block_size=len(TEXT) // 2)
    with open(tmp_path / "cache" / f"{x.key}.bin", "r+b") as file:
        file.write(b"\xff\xff")
    with pytest.raises(BadInput, match="damaged.*remove"):
        x.batch("train", 400, torch.Generator().manual_seed(0))


# ---- files, and what joins them -----------------------------------------------------------------

@pytest.fixture
def three(write):
    write("first\r\nline", "a.txt.xz")
    write("second", "b.txt")
    return os.path.dirname(write("third é", "c.txt.gz"))


def test_a_glob_joins_its_files_in_order(load, three):
    x = load(three + "/*.txt*", block_size=4)
    assert text_of(x, all_tokens(x)) == "first\nline\n\nsecond\n\nthird é"


def test_documents_are_joined_by_end_of_text(load, three, write, byte_gpt2):
    write("<|endoftext|>", "d.txt")         # text that looks like the token
    x = load(three + "/*.txt*", tokenizer="gpt2", block_size=4)
    assert x.spec == {"name": "gpt2"} and x.K == 262
    want = joined(["first\nline", "second", "third é"]) + [END, *b"<|endoftext|>"]
    assert all_tokens(x) == want


def test_a_folder_is_read_as_the_texts_in_it(load, three):
    x = load(three, block_size=2)
    assert text_of(x, all_tokens(x)) == "second"


def test_byte_order_marks_and_line_ends_of_windows_are_no_characters(load, write):
    plain = load(write("line\nof text\n" * 9, "plain.txt"))
    other = load(write("\ufeff" + "line\r\nof text\r\n" * 9, "windows.txt"))
    assert other.spec == plain.spec and all_tokens(other) == all_tokens(plain)


def test_the_default_text_is_there_from_any_folder(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    assert data.find_paths("data/shakespeare.txt") == [str(ROOT / "data/shakespeare.txt")]
    os.makedirs("data")
    os.rename(write("mine"), "data/shakespeare.txt")     # one in the working folder comes first
    assert data.find_paths("data/shakespeare.txt") == ["data/shakespeare.txt"]


def test_every_file_is_read_as_utf_8_whatever_the_machine_prefers(tmp_path, write):
    """Written, and read again, where a file without a named encoding is ASCII, and an error."""
    code = ("import sys, unittest.mock; sys.modules['torch'] = unittest.mock.MagicMock(); "
            "import data; [data.TextData('text.txt', block_size=16) for _ in range(2)]")
    os.rename(write(TEXT), tmp_path / "text.txt")
    subprocess.run([sys.executable, "-X", "warn_default_encoding",
                    "-W", "error::EncodingWarning:data", "-c", code], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"})


# ---- the cache ----------------------------------------------------------------------------------

def test_the_cache_follows_content_tokenizer_and_split(load, write, byte_gpt2, monkeypatch):
    x = load(write(TEXT))
    assert re.fullmatch("[0-9a-f]{16}", x.key)
    os.rename(write(TEXT), moved := write("", "moved.txt"))
    with monkeypatch.context() as patch:    # same content, other name: nothing is tokenised again
        patch.delattr(tiktoken.Encoding, "encode_ordinary_batch")
        assert all_tokens(load(moved)) == all_tokens(x) and load(moved).key == x.key
        assert load(moved, block_size=8).key == x.key
    others = [load(moved, tokenizer="gpt2"), load(moved, val_fraction=0.1)]
    others.append(load(write(TEXT + "x" * 50)))
    assert len({x.key, *(other.key for other in others)}) == 4
    assert len(all_tokens(others[2])) == len(TEXT) + 50


@pytest.mark.parametrize("record", ["", '{"spec": {"na'])
def test_an_empty_or_torn_record_counts_as_nothing_done(load, write, tmp_path, record):
    x = load(write(TEXT))
    path = tmp_path / "cache" / f"{x.key}.json"
    path.write_text(record)
    assert all_tokens(load(write(TEXT))) == all_tokens(x)
    assert json.loads(path.read_text(encoding="utf-8"))["done"]


def test_the_record_is_written_under_a_name_of_its_process_and_renamed(load, write, monkeypatch):
    written = []
    replace = Path.replace
    monkeypatch.setattr(os, "getpid", lambda: 4321)
    monkeypatch.setattr(Path, "replace", lambda new, path: written.append((
        new.name, path.name, json.loads(new.read_text())["done"])) or replace(new, path))
    name = load(write(TEXT)).key + ".json"
    assert written == [(name + ".4321", name, False), (name + ".4321", name, True)]


# ---- long texts, in pieces ----------------------------------------------------------------------

def test_pieces_give_the_tokens_of_the_whole(load, write, byte_gpt2, monkeypatch):
    """Random texts, half of them blanks, with words of up to 9 letters and runs of up to 9 blanks:
    shorter than a piece, so that each piece has a place where it can be cut."""
    draw = random.Random(0)
    text = ""
    for _ in range(3000):
        text += "".join(draw.choices("la'é1.", k=draw.randint(1, 9))) + draw.choice(" \n")
        text += "".join(draw.choices(" \n\u3000\t", k=draw.randint(0, 8)))
    whole = byte_gpt2.encode_ordinary(text)
    for size in (20, 37, 1000):
        monkeypatch.setattr(data, "PIECE", size)
        assert encode(byte_gpt2, text) == whole
        x = load(write(text), tokenizer="gpt2", cache=write("", str(size)) + "cache")
        assert all_tokens(x) == whole


def test_memory_is_bounded_by_the_piece_and_not_by_the_text(load, write, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 2 ** 10)
    monkeypatch.setattr(data, "GROUP", 4)
    source = write("some words of a text\n" * 20_000)
    load(write(TEXT, "other.txt"))          # what is loaded once
    tracemalloc.start()
    x = load(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(all_tokens(x)) == 420_000 and peak < 250_000


@pytest.mark.parametrize("run", [" ", "a"])
def test_a_million_of_one_character_does_not_panic(load, write, byte_gpt2, run):
    text = "x" + run * 1_100_000 + "y"
    x = load(write(text), tokenizer="gpt2")
    assert text_of(x, all_tokens(x)) == text
    assert byte_gpt2.decode(encode(byte_gpt2, text)) == text


# ---- what is held out ---------------------------------------------------------------------------

def test_of_one_text_the_last_tokens_are_held_out(load, write):
    x = load(write(TEXT), val_fraction=0.25)
    assert len(x.val) == len(TEXT) // 4
    assert x.train_text() + text_of(x, x.val) == TEXT
    assert x.train_text(max_tokens=10) == TEXT[:10]
    assert x.held_out == "the last 410 of 1,640 tokens (25.0%)"
    assert len(load(write(TEXT), val_fraction=0.0).val) == 16      # never less than a block


@pytest.mark.parametrize("sizes, val, said", [
    ([100] * 20, 100, "the last 1 of 20 documents, 100 of 2,038 tokens (4.9%)"),
    ([100] * 19 + [250], 250, "the last 1 of 20 documents, 250 of 2,188 tokens (11.4%)"),
    ([100] * 19 + [30], 78, "the last 78 of 1,968 tokens (4.0%)"),         # under half of 4 %
    ([100] * 19 + [1000], 117, "the last 117 of 2,938 tokens (4.0%)"),     # over three times
    ([10] * 20, 16, "the last 16 of 238 tokens (6.7%)"),                   # not even a block
])
def test_documents_are_held_out_where_they_are_near_their_share(load, write, sizes, val, said):
    for i, size in enumerate(sizes):
        path = write("ab" * (size // 2), f"{i:02}.txt")
    x = load(os.path.dirname(path))
    assert len(x.val) == val and x.held_out == said


# ---- examples -----------------------------------------------------------------------------------

SUMS = [(f"{a}+{b}=", f"{a + b}\\n!") for a in range(10) for b in range(5)]
LINES = "".join(f"{prompt}\t{answer}\n" for prompt, answer in SUMS)
PAIRS = [(prompt, answer.replace("\\n", "\n")) for prompt, answer in SUMS]


@pytest.mark.parametrize("name", ["sums.tsv", "sums.tsv.gz", "sums.tsv.xz"])
@pytest.mark.parametrize("tokenizer, padding", [("char", "\n"), ("gpt2", "<|endoftext|>")])
def test_an_example_is_prompt_answer_and_padding(load, write, byte_gpt2, name, tokenizer, padding,
                                                 rng):
    x = load(write(LINES, name), tokenizer=tokenizer, block_size=12)
    assert x.examples and isinstance(x.train, np.memmap) and x.train.dtype == np.uint16
    assert x.tokenizer.n_vocab == x.K and (tokenizer == "gpt2" or x.spec["chars"] ==
                                           "\n!+0123456789=")
    seen = set()
    for tokens, free in zip(*x.batch("train", 500, rng)):
        prompt, answer = text_of(x, tokens[~free]), text_of(x, tokens[free])
        end = PAIRS.index((prompt, answer.rstrip("\n") if padding == "\n" else
                           answer.replace(padding, "")))
        used = len("".join(PAIRS[end]))
        assert answer == PAIRS[end][1] + padding * (12 - used)
        seen.add(end)
    assert seen == set(range(48))           # the last 4 % are held out, each other one is drawn
    assert x.held_out == "the last 2 of 50 examples (4.0%)"


def test_free_is_where_the_model_writes(load, write):
    x = load(write(LINES, "sums.tsv"), block_size=8)
    x_0, free = x.val_blocks(1)
    assert text_of(x, x_0) == "9+3=12\n!"
    assert free.dtype == torch.bool and free.tolist() == [[False] * 4 + [True] * 4]


def test_held_out_examples_are_evenly_spread(load, write):
    x = load(write(LINES, "sums.tsv"), val_fraction=0.5)
    assert [text_of(x, row).rstrip("\n") for row in x.val_blocks(3).x_0] == [
        "".join(pair) for pair in (PAIRS[25], PAIRS[33], PAIRS[41])]
    assert len(x.val_blocks(99).x_0) == 25
    text = x.train_text()
    assert all("".join(pair) in text for pair in PAIRS[:25]) and len(text) == 25 * 16


def test_too_long_examples_are_left_out_and_counted(load, write, capsys):
    long = "p" * 10 + "\t" + "a" * 7 + "\n"
    fits = "p" * 10 + "\t" + "a" * 6 + "\n"
    x = load(write(long + fits + LINES + long, "sums.tsv"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 examples are left out" in said and "16 tokens" in said
    assert len(x.train) + len(x.val) == 51
    x = load(x.source, block_size=17)       # another length is another file
    assert len(x.train) + len(x.val) == 53 and "left out" not in capsys.readouterr().err


def test_the_files_of_a_glob_are_one_set_of_examples(load, write):
    write(LINES, "a.tsv")
    source = os.path.dirname(write("more\tof it\n", "b.tsv.gz")) + "/*.tsv*"
    x = load(source)
    last = [text_of(x, row).rstrip("\n") for row in x.val_blocks(2).x_0]
    assert last == ["".join(PAIRS[49]), "moreof it"]


# ---- data sets, and work that is killed ---------------------------------------------------------

DOCUMENTS = [f"Document {i}: " + "la " * (i % 5) + "é" * (i == 4) for i in range(11)]
DOCUMENTS += [None, "The end of it all."]   # a null row is an empty document
TEXTS = [document or "" for document in DOCUMENTS]


def joined(documents):
    tokenizer = tiktoken.get_encoding("gpt2")
    return [i for text in documents for i in [END, *tokenizer.encode_ordinary(text)]][1:]


def save(documents, path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    numbers = list(range(len(documents)))
    datasets.Dataset.from_dict({"id": numbers, "text": documents}).save_to_disk(str(path))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(DOCUMENTS, tmp_path_factory.mktemp("hub") / "saved")


def test_a_saved_data_set(load, folder, byte_gpt2):
    x = load(folder, tokenizer="gpt2", val_fraction=0.25, block_size=4)
    assert all_tokens(x) == joined(TEXTS)
    assert x.val.tolist() == joined(TEXTS[-3:])            # a quarter of 13, rounded
    assert x.held_out.startswith("the last 3 of 13 documents, ")
    x = load(folder, tokenizer="gpt2", val_fraction=0.25, block_size=4, val_documents=2)
    assert x.val.tolist() == joined(TEXTS[-2:])            # but at most two
    x = load(folder, block_size=4)
    assert text_of(x, all_tokens(x)) == "\n\n".join(TEXTS)


def test_a_data_set_with_splits_is_its_train_split(load, tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": {"text": ["abc" * 30]}, "test": {"text": ["xyz" * 30]}}
    splits = {name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    x = load(str(tmp_path / "saved"))
    assert text_of(x, all_tokens(x)) == "abc" * 30


def test_a_folder_with_another_data_set_is_another_text(load, tmp_path):
    for text in "abc", "xyz":
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        x = load(save([text * 30], tmp_path / "saved"))
        assert text_of(x, all_tokens(x)) == text * 30


class Killed(BaseException):
    pass


@pytest.mark.parametrize("loss, tokenizer", [
    ("nothing", "char"), ("nothing", "gpt2"), ("unwritten", "char"), ("torn", "char"),
    ("half", "gpt2"), ("everything", "char")])
def test_killed_anywhere_and_continued_gives_the_same_file(tmp_path, write, byte_gpt2, monkeypatch,
                                                           tokenizer, loss):
    """A kill at every fsync and in every writing of the record in turn, halfway. What the disk then
    holds of the bytes after the last record: all, none, or noise; or half of the row is gone, or
    all of it. Work that is on record is not redone. There are three groups, then the record that
    all is done."""
    monkeypatch.setattr(data, "GROUP", 5)
    fsync, write_text, batch = os.fsync, Path.write_text, tiktoken.Encoding.encode_ordinary_batch

    for i, text in enumerate(TEXTS):
        source = write(text, f"{i:02}.txt")

    def run(cache):
        return TextData(os.path.dirname(source), tokenizer, 4, cache=str(cache))
    whole = all_tokens(run(tmp_path / "cache"))
    kills = 0
    for kill_at in range(100):
        cache = tmp_path / f"cache{kill_at}"
        calls = []

        def dying(function):
            def call(target, *args, **settings):
                calls.append(function)
                if len(calls) == kill_at + 1:
                    if function is write_text:
                        write_text(target, args[0][:9], **settings)
                    raise Killed
                return function(target, *args, **settings)
            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying(fsync))
            patch.setattr(Path, "write_text", dying(write_text))
            try:
                run(cache)
                break                       # it lived through all its calls
            except Killed:
                kills += 1
        row = next(cache.glob("*.bin"))
        record = "".join(path.read_text() for path in cache.glob("*.json"))
        done = json.loads(record) if record else {"tokens": 0, "pieces": 0}
        kept = row.read_bytes()[:2 * done["tokens"]]
        if loss in ("half", "everything"):
            done["pieces"] = 0
        if loss == "everything":
            row.unlink()
        elif loss != "nothing":
            row.write_bytes({"unwritten": kept, "torn": kept + b"noise",
                             "half": kept[:len(kept) // 2]}[loss])
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(tiktoken.Encoding, "encode_ordinary_batch",
                          lambda self, texts: seen.extend(texts) or batch(self, texts))
            assert all_tokens(run(cache)) == whole
        assert seen == TEXTS[done["pieces"]:]
    assert kills == 4 * 2                   # each group is synced and recorded


def test_of_runs_at_once_one_writes_and_the_others_wait(load, folder, byte_gpt2, monkeypatch):
    monkeypatch.setattr(data, "GROUP", 3)
    seen, inner = [], tiktoken.Encoding.encode_ordinary_batch

    def slow(self, texts):
        time.sleep(0.02)
        return seen.extend(texts) or inner(self, texts)

    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary_batch", slow)
    with ThreadPoolExecutor(4) as pool:
        runs = [*pool.map(lambda _: load(folder, tokenizer="gpt2", block_size=4), range(4))]
    assert [all_tokens(x) for x in runs] == [joined(TEXTS)] * 4 and seen == TEXTS


def offline(*args, **settings):
    raise ConnectionError("no route\nto the hub")


def test_a_hub_data_set_is_read_like_a_saved_one(load, folder, byte_gpt2, monkeypatch):
    import datasets
    asked, saved = [], datasets.load_from_disk(folder)
    settings = dict(tokenizer="gpt2", block_size=4)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or saved)
    x = load("somebody/corpus:part", **settings)
    assert asked == [(("somebody/corpus", "part"), {"split": "train"})]
    assert all_tokens(x) == joined(TEXTS)
    monkeypatch.setattr(datasets, "load_dataset", offline)     # a whole row asks nobody,
    assert all_tokens(load("somebody/corpus:part", **settings)) == joined(TEXTS)
    for change in ({"tokenizer": "char"}, {"val_documents": 1}):
        with pytest.raises(BadInput):                          # but only where all is as it was
            load("somebody/corpus:part", **settings | change)


@pytest.mark.parametrize("changed", [TEXTS[::-1] + ["more"], ["€" + text for text in TEXTS]])
def test_a_hub_data_set_that_changed_is_begun_anew(load, folder, monkeypatch, changed):
    """Part of it is on record when it is killed; then the hub has other documents, or as many
    with other characters."""
    import datasets
    monkeypatch.setattr(data, "GROUP", 5)
    inner, groups = tiktoken.Encoding.encode_ordinary_batch, []

    def dying(self, texts):
        if groups:
            raise Killed
        return groups.append(1) or inner(self, texts)

    saved = datasets.load_from_disk(folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: saved)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tiktoken.Encoding, "encode_ordinary_batch", dying)
        load("somebody/corpus")
    saved = datasets.Dataset.from_dict({"text": changed})
    x = load("somebody/corpus")
    assert text_of(x, all_tokens(x)) == "\n\n".join(changed)


# ---- bad input: one sentence each, which names what is wrong and what to do ---------------------

def sentence(failure, *parts):
    text = str(failure.value)
    assert "\n" not in text and all(part in text for part in parts), text


@pytest.mark.parametrize("name, content, parts", [
    ("text.txt", "", ["text.txt", "0 tokens", "more text"]),
    ("text.txt", "too short", ["text.txt", "9 tokens", "blocks of 16"]),
    ("text.txt", b"\xff\xfe\x00", ["text.txt", "utf-8", "repair"]),
    ("text.txt.xz", lzma.compress(TEXT.encode())[:-40], ["text.txt.xz"]),
    ("text.txt.gz", gzip.compress(TEXT.encode())[:-20], ["text.txt.gz"]),
    ("text.jsonl", '{"text": "a"}\n' * 99, ["text.jsonl", "convert", "to .txt", "save_to_disk"]),
    ("text.json.gz", TEXT, ["text.json.gz", "convert", "to .txt"]),
    ("text.csv", TEXT, ["text.csv", "convert", "to .txt"]),
    ("text.parquet", TEXT, ["text.parquet", "convert", "to .txt"]),
    ("sums.tsv", "", ["sums.tsv", "0 examples"]),
    ("sums.tsv", "a\tb\n", ["sums.tsv", "1 examples"]),
    ("sums.tsv", "a\tb\nonly a prompt\n", ["sums.tsv", "line 2", "prompt<TAB>answer"]),
    ("sums.tsv", "a\tb\tc\n", ["sums.tsv", "line 1", "prompt<TAB>answer"]),
    ("sums.tsv", "a\tthe answer is longer than that\n" * 9, ["sums.tsv", "0 examples", "of 16"]),
])
def test_a_file_that_cannot_serve(load, write, name, content, parts):
    path = Path(write("", "empty.txt")).with_name(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):                      # the second time there may be a cache
        with pytest.raises(BadInput) as failure:
            load(str(path))
        sentence(failure, *parts)


@pytest.mark.parametrize("source", ["", "no/such.txt", "no/such/*", "no/such.tsv.gz", "a::b"])
def test_no_file_there(load, source):
    with pytest.raises(BadInput) as failure:
        load(source)
    sentence(failure, repr(source), "--data")


@pytest.mark.parametrize("odd", [["a", "list"], 7, {"a": "dict"}])
def test_a_row_that_holds_no_string(load, tmp_path, odd):
    source = save([None, odd], tmp_path / "saved")
    with pytest.raises(BadInput) as failure:
        load(source)
    sentence(failure, "document 1", str(odd), "not " + type(odd).__name__)


def test_a_data_set_that_cannot_be_had(load, tmp_path, folder, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadInput) as failure:
        load("somebody/openwebtext")
    sentence(failure, "somebody/openwebtext", "HF_HOME", "save_to_disk", "ConnectionError")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as failure:
        load(str(tmp_path / "empty"))
    sentence(failure, "empty", "save_to_disk")


def test_unknown_characters_and_tokenizers(load, write, monkeypatch):
    tokenizer = load(write(TEXT)).tokenizer
    with pytest.raises(BadInput) as failure:
        encode(tokenizer, "fox€\x00")
    sentence(failure, "'€'", r"'\x00'")
    assert "'f'" not in str(failure.value)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(BadInput) as failure:
        get_tokenizer({"name": "gpt2"})
    sentence(failure, "gpt2", "TIKTOKEN_CACHE_DIR")


def test_a_vocabulary_that_16_bits_cannot_number(load, write):
    letters = [chr(i) for i in range(2 ** 16 + 2 ** 12) if not 0xD800 <= i < 0xE000]
    with pytest.raises(BadInput) as failure:
        load(write("".join(letters + [chr(2 ** 17 + i) for i in range(2 ** 12)])))
    sentence(failure, "char", "65536", "gpt2")


def test_blocks_wrapped_in_end_of_text(load, write, byte_gpt2, rng):
    """As the released code cuts them: [eos], L - 2 tokens, [eos]."""
    x = load(write("ab" * 500, "text.txt"), tokenizer="gpt2", block_size=8, wrap_eos=True)
    eos = x.tokenizer.eot_token
    for x_0, _ in (x.batch("train", 4, rng), x.val_blocks(2)):
        assert (x_0[:, [0, -1]] == eos).all() and (x_0[:, 1:-1] != eos).all()
