"""The pages: links lead somewhere, commands are understood, tables are those of their JSON.

    python -m pytest tests/test_readme.py
"""
import importlib.util
import re
import shlex
import sys

import pytest

from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path.name for path in ROOT.glob("*.py")]


def code(page):
    """Lines of the page's code blocks, and commands within its sentences."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]*)`", re.sub(r"(?ms)^```.*?^```", "", text))
    return lines + spans


def commands():
    """Every `python <script of ours> ...` or `torchrun ... <script>`, without what follows it."""
    found = set()
    for page in PAGES:
        for line in code(page):
            match = re.match(r"(?:OMP\S+ )?(?:python|torchrun)\s.*?(\b\w+\.py\b.*)", line)
            if match and match[1].split()[0] in SCRIPTS and not re.search(r"\.\.\.|…", match[1]):
                found.add(re.split(r"\s+(?:#|\||>|&&|;)|\s{3,}", match[1])[0])
    return sorted(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To files of the repository, and to headings as GitHub names them."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", text)
    links += re.findall(r'src="([^"]*)()"', text)
    for target, heading in links:
        if "://" in target or target.startswith("mailto:"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            named = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in named, (page.name, heading)


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command, monkeypatch):
    """By the script's own parser; nothing is run."""
    script, *argv = shlex.split(command)
    if "--help" in argv:
        return
    module = __import__(script.removesuffix(".py"))
    if hasattr(module, "parse_args"):
        module.parse_args(argv)
    else:                                   # a parser inside of its main
        text = (ROOT / script).read_text(encoding="utf-8")
        assert all(flag.split("=")[0] in text for flag in argv if flag.startswith("--"))


def test_there_are_commands():
    assert any(command.startswith("train.py") for command in commands())
    assert any(command.startswith("sample.py") for command in commands())


def test_tables_are_those_of_their_json():
    path = ROOT / "experiments" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = tables
    spec.loader.exec_module(tables)
    assert not tables.differing(ROOT), "run python experiments/tables.py"
