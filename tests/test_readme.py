"""The README says what is true: its files, commands and figures.   python -m pytest tests/test_readme.py

`python tests/test_readme.py` brings the README's line counts and costs up to date.
"""
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
PAGES = README, ROOT / "results/README.md"
PROVENANCE = {"command", "commit", "device", "torch", "date", "seed"}


def program():
    return sorted(ROOT.glob("*.py"))


def lines(path):
    return len(path.read_text().splitlines())


def commands():
    text = "\n\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    found = [line for block in blocks for line in block.splitlines()]
    found += [code.replace("\n", " ") for code in re.findall(r"`(python [^`]*)`", text)]
    return [line for line in found if line.startswith("python ") and ".py" in line]


def test_every_file_is_in_the_table_with_its_length():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README.read_text(), re.MULTILINE))
    assert rows == {path.name: str(lines(path)) for path in program()}


def test_files_named_exist():
    for page in PAGES:
        for name in re.findall(r"(?:assets|results|tests|data)/[\w./]+\.\w+", page.read_text()):
            assert (ROOT / name).exists(), name


def test_links_lead_somewhere():
    """Links to other files, and to headings as GitHub names them."""
    for page in PAGES:
        for path, heading in re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", page.read_text()):
            there = page.parent / path if path else page
            assert there.exists(), path
            headings = re.findall(r"^#+ (.*)", there.read_text(), re.M) if heading else []
            named = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert not heading or heading in named, (page.name, heading)


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    """Every command of the README passes its script's own parser; nothing is run."""
    words = shlex.split(command.replace("S --", "1 --"))[1:]
    words = ["1" if word == "S" else word for word in words]
    script, argv = words[0], words[1:]
    if script == "toy.py" or script == "bench.py" or script.startswith("tests/"):
        text = (ROOT / script).read_text()
        assert all(flag in text for flag in argv if flag.startswith("--"))
    else:
        __import__(script[:-3]).parse_args(argv)


def costs():
    """What an IDLM run of the paper costs on the GPU of results/bench_h200.json, as a table: each
    update is batch_size * block_size tokens, and an accumulated pass is a measured iteration."""
    import train
    owt, found = train.PRESETS["owt"], json.loads((ROOT / "results/bench_h200.json").read_text())
    runs = {r["name"]: r for r in found if r["name"].startswith("train ") and "extra" not in r}
    rows = []
    for flags, kind in (("", "mdlm"), ("--process duo", "hard"),
                        ("--process duo --uniform_update soft", "soft")):
        r = runs[f"train {kind} B{owt['micro_batch']}"]
        assert (r["L"], f"{r['layers']}x12x{r['width']}") == (owt["block_size"], owt["size"])
        hours = 1000 * owt["batch_size"] * owt["block_size"] / r["tokens_per_s"] / 3600
        days = hours / 24 * owt["idlm"]["updates"] / 1000
        name = f"`{flags}`" if flags else "masked"
        rows.append(f"| {name} | {r['tokens_per_s']:,} | {hours:.1f} | {days:.1f} | "
                    f"{r['peak_gib']:.1f} |")
    return "\n".join(["| flags | tokens/s | hours per 1,000 updates | days for "
                      f"{owt['idlm']['updates']:,} | peak GiB |", "|---|---|---|---|---|", *rows])


COSTS = re.compile(r"(?<=<!-- costs -->\n).*?(?=\n<!-- /costs -->)", re.DOTALL)


def test_costs_come_from_the_results():
    assert COSTS.findall(README.read_text()) == [costs()], "run python tests/test_readme.py"


def test_results_say_where_they_come_from():
    files = sorted((ROOT / "results").glob("*.json"))
    assert files
    for path in files:
        records = json.loads(path.read_text())
        assert isinstance(records, list) and records, path.name
        for record in records:
            assert PROVENANCE <= record.keys(), (path.name, PROVENANCE - record.keys())
            if record.get("gen_ppl") is not None:
                assert record["entropy"] is not None                 # never one without the other


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_come_from_the_results(page, tmp_path):
    import evaluate
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text())
    evaluate.rewrite_tables(copy, ROOT / "results")
    assert copy.read_text() == page.read_text(), "run python evaluate.py --table"


if __name__ == "__main__":
    text = README.read_text()
    for path in program():
        text = re.sub(rf"^(\| `{path.name}` \| )\d+", rf"\g<1>{lines(path)}", text, flags=re.MULTILINE)
    README.write_text(COSTS.sub(lambda match: costs(), text))
