# SPDX-License-Identifier: MIT
"""Rewrite every table of README.md and docs/*.md from its JSON; draw the figure of evaluate.py.

    python experiments/tables.py             a block <!-- table:NAME --> ... <!-- /table:NAME -->
    python experiments/tables.py --check     only say which page differs, exit 1
    python evaluate.py --plot JSON ...       plot() below

NAME has an entry in TABLES, and its records are those of results/NAME.json (or of Table.file). Rows
are grouped by the named keys and by nothing else: records that agree in them are runs, which must
differ in `seed`. Several runs: mean ± standard deviation over seeds. One run: ± half of the 95 %
interval over texts.
"""
import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint                                                    # noqa: E402
from data import BadInput                                            # noqa: E402
from evaluate import half_width, read_records                        # noqa: E402

BLOCK = re.compile(r"(<!-- table:([\w.]+) -->\n).*?(<!-- /table:\2 -->)", re.DOTALL)
MARK = re.compile(r"<!-- /?table:[^>]*>")
PERPLEXITIES = ("gen_ppl", "bits_per_char")
BESIDE = {"entropy", "distinct4", "repetition"}           # of every table with a perplexity


class Table(NamedTuple):
    """keys: what a row is; columns: what is measured; wanted(record): does it belong in it."""
    keys: str
    columns: str
    wanted: Callable = lambda record: True
    file: str = ""


def at_temperature_1(record):               # and what has none: real text
    return record.get("kind") == "control" or record.get("temperature") in (None, 1)


def on_first_page(record):                  # of a generator few passes, of its teacher many
    settings = {"idlm": [("random", 4), ("random", 16), ("even", 4), ("even", 16)],
                "teacher": [("random", 16), ("random", 256), ("even", 16)]}.get(record["model"])
    is_wanted = not settings or (record["order"], record["steps"]) in settings
    return is_wanted and at_temperature_1(record)


def of_few_passes(record):                  # and what has none: real text
    return record.get("steps", 4) <= 16 and record.get("ending") != "map"


def of_sudoku(record):                      # eight rows, all of 16 passes; 9 x 9 without puzzles
    wanted = {(4, "mdlm"): ("teacher", "idlm", "idlm independent"), (4, "duo"): ("teacher", "idlm"),
              (9, "mdlm"): ("idlm",), (9, "duo"): ("teacher", "idlm")}
    choice = record.get("order") or record.get("ending")
    is_wanted = record["model"] in wanted[record["size"], record["process"]]
    is_wanted = is_wanted and record.get("empty", False) == (record["size"] == 9)
    return is_wanted and record["steps"] == 16 and choice in ("random", "ancestral")


def is_grid(size):                          # with fewer than four passes hardly one is right
    return lambda record: record["size"] == size and record.get("steps", 4) >= 4


def is_empty_9(record):                     # of variants 16 steps are enough
    is_variant = record["model"] in ("idlm long", "idlm slow")
    return is_grid(9)(record) and (record.get("steps") == 16 or not is_variant)


def is_empty_4(record):                     # of the masked process
    is_wanted = record["model"] in ("teacher", "idlm") and record["steps"] >= 4
    return record["size"] == 4 and is_wanted and record["order"] in ("random", "shuffled")


def is_puzzle(record):                      # 9 x 9
    chosen = "random", "confident", "ancestral"
    choice = record.get("order") or record.get("ending")
    return record["size"] == 9 and choice in chosen and record["steps"] in (1, 2, 4, 8, 16)


def is_order_9(record):                     # those of ties have a table of their own
    return record["size"] == 9 and record["order"] not in ("token_ties", "token_any")


def is_tie_9(record):                       # token, token_ties, token_any
    is_wanted = record["size"] == 9 and record["steps"] == 81
    return is_wanted and record["order"].startswith("token")


def has(key, value):                        # -> a function: is it so in this record?
    return lambda record: record[key] == value


def is_timed(record):
    return record["name"] in ("train mdlm B8", "train hard B8", "train soft B8",
                              "sample mdlm 16 B8", "sample duo 4 B8")


OF_NOVELS = "gen_ppl entropy distinct4 repetition mauve"
OF_TEXT = "bits_per_char entropy distinct4 repetition known_words mauve_2"
OF_ORDERS = "rules valid entropy agreement js seen"
OF_UPDATES = Table("model update lr fake_lr ending steps",
                   "gen_ppl entropy distinct4 repetition overlap", file="hard_and_soft")
TABLES = {
    "laptop": Table("model order steps", "bits_per_char entropy distinct4 repetition mauve_2",
                    on_first_page),
    "laptop_masked": Table("model order steps", OF_TEXT, file="laptop"),
    "laptop_uniform": Table("model ending steps", OF_TEXT),
    "updates": Table("process model updates lr order ending steps", OF_TEXT),
    "characters": OF_UPDATES._replace(wanted=has("data", "characters")),
    "soft_novels": OF_UPDATES._replace(wanted=has("data", "novels")),
    "novels_masked": Table("model lr updates order steps", OF_NOVELS, has("process", "mdlm"),
                           "novels"),
    "novels_uniform": Table("model update lr updates ending steps", OF_NOVELS,
                            has("process", "duo"), "novels"),
    "box": Table("process model lr updates order ending steps", "gen_ppl entropy distinct4 "
                 "repetition overlap known_words mauve", of_few_passes),
    "headline": Table("model order steps", "bits_per_char bits_per_char_2 entropy distinct4 "
                      "repetition overlap known_words mauve_2"),
    "curves": Table("model order steps", "passes gen_ppl entropy distinct4 repetition overlap "
                    "known_words mauve", at_temperature_1, file="headline_curves"),
    "sudoku": Table("size process model order ending steps", "rules valid entropy js seen",
                    of_sudoku, "sudoku sudoku_empty"),
    "sudoku_4": Table("process model order ending steps", "passes excess rules valid entropy "
                      "agreement js kl seen solved_8 solved_6 solved_5", is_grid(4), "sudoku"),
    "sudoku_9": Table("process model order ending steps",
                      "passes excess rules valid entropy agreement", is_grid(9), "sudoku"),
    "puzzles": Table("process model order ending steps", "solved_40 solved_32 solved_26",
                     is_puzzle, "sudoku"),
    "sudoku_empty_4": Table("model order steps", "excess rules valid js kl seen", is_empty_4,
                            "sudoku_empty"),
    "sudoku_empty_9": Table("process model order ending steps",
                            "passes excess rules valid entropy agreement", is_empty_9,
                            "sudoku_empty"),
    "orders_4": Table("model order steps", OF_ORDERS, has("size", 4), "orders"),
    "orders_9": Table("model order steps", OF_ORDERS, is_order_9, "orders"),
    "orders_empty": Table("model order steps", OF_ORDERS),
    "ties": Table("model order steps", "rules valid entropy agreement js seen", has("steps", 16)),
    "ties_9": Table("model order steps", OF_ORDERS, is_tie_9, "orders"),
    "visited": Table("states order steps", "rules valid entropy js seen"),
    "orders_text": Table("model order steps", "bits_per_char entropy distinct4 repetition "
                         "known_words", file="orders_text"),
    "speed": Table("name", "passes median_ms ms_per_pass peak_gib theirs_passes theirs_ms "
                   "theirs_ms_per_pass theirs_gib", is_timed,
                   file="bench_h200 authors_h200"),
    "scaling": Table("L B V machine", "median_ms p10_ms p90_ms tokens_per_s peak_gib tflop mfu"),
}


def group(records, keys):
    """[(values of the keys, records)], in the order in which they come."""
    groups = {}
    for record in records:
        groups.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return list(groups.items())


def number(value):
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(value):
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def cell(runs, column):
    """Mean ± standard deviation of several runs; of one, ± half of its interval over texts."""
    values = [run.get(column) for run in runs]
    if all(value is None for value in values):
        return "not reached" if "matched" in column and column in runs[0] else "–"
    if None in values:                      # no mean of those runs alone that reached it
        return f"{values.count(None)} of {len(values)} not reached"
    if not all(isinstance(value, (int, float)) for value in values):
        return ", ".join(dict.fromkeys(map(str, values)))
    if len(values) > 1:
        deviation = statistics.stdev(values)
        text = number(statistics.fmean(values))
        return f"{text} ± {spread(deviation)}" if deviation else text
    interval = runs[0].get(f"{column}_ci")
    if not interval:
        return number(values[0])
    if None in interval:
        return f"{number(values[0])} ± open"
    return f"{number(values[0])} ± {spread(half_width(interval))}"


def table_of(name, table, records):
    """-> markdown: the rows, then a line on runs, texts and judges."""
    keys, columns = table.keys.split(), table.columns.split()
    if any(column.startswith(PERPLEXITIES) for column in columns) and BESIDE - {*columns}:
        raise BadInput(f"table {name} has a perplexity without {sorted(BESIDE - {*columns})}: add "
                       "these columns")
    groups = group([record for record in records if table.wanted(record)], keys)
    if not groups:
        raise BadInput(f"table {name} has no rows: no record of its JSON is wanted")
    for values, runs in groups:
        seeds = [run.get("seed") for run in runs]
        if len({*seeds}) < len(seeds):
            raise BadInput(f"table {name}: {len(runs)} records agree in {dict(zip(keys, values))} "
                           f"and have seeds {seeds}; group by one more key, or drop doubles")
    rows = []
    for values, runs in groups:
        cells = ["–" if value is None else str(value) for value in values]
        rows.append(cells + [cell(runs, column) for column in columns])
    shown = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows)]
    header = [(keys + columns)[i] for i in shown]
    lines = [header, ["---"] * len(header)] + [[row[i] for i in shown] for row in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\n{caption(table, name, groups)}\n"


def caption(table, name, groups):
    runs = sorted({len(runs) for _, runs in groups})
    several = [n for n in runs if n > 1]
    parts = []
    if several:
        parts.append(f"mean ± standard deviation over {' or '.join(map(str, several))} seeds")
    if 1 in runs:
        measured = any(key.endswith("_ci") for _, (run, *_) in groups for key in run)
        over_texts = ", ± half of the 95 % interval over texts" if measured else ""
        parts.append(("rows of one seed" if several else "one seed") + over_texts)
    records = [run for _, runs in groups for run in runs]
    for key, words in (("n_texts", "texts a row"), ("judge", "judge"), ("judge_2", "second judge")):
        values = sorted({str(r[key]) for r in records if key in r})
        if values:
            shown = " or ".join(values)
            parts.append(f"{shown} {words}" if key == "n_texts" else f"{words} {shown}")
    files = " and ".join(f"`results/{file}.json`" for file in (table.file or name).split())
    return f"{files}: {'; '.join(parts)}."


def side_by_side(records):
    """Our times, and in the same record what the authors' code takes for the same."""
    theirs = {record["name"]: record for record in records if record["code"] != "ours"}
    joined = []
    for record in records:
        if record["code"] == "ours":
            rival = theirs.get(record["name"], {})
            joined.append(record | {"theirs_passes": rival.get("passes"),
                                    "theirs_ms": rival.get("median_ms"),
                                    "theirs_ms_per_pass": rival.get("ms_per_pass"),
                                    "theirs_gib": rival.get("peak_gib")})
    return joined


def fill(text, page, results):
    """The text of a page with its tables as the JSON has them."""
    def block(match):
        begin, name, end = match.groups()
        if name not in TABLES:
            raise BadInput(f"{page} has a table {name!r}, which experiments/tables.py has no entry "
                           f"for: there are {', '.join(TABLES)}")
        records = []
        for file in (TABLES[name].file or name).split():
            path = Path(results, file + ".json")
            if not path.exists():
                raise BadInput(f"{page} has a table {name!r} and there is no {path}: run the "
                               "script of experiments/ that writes it")
            records += read_records(path)
        if name == "speed":                 # two programs, side by side
            records = side_by_side(records)
        return begin + table_of(name, TABLES[name], records) + end

    blocks = BLOCK.findall(text)
    if 2 * len(blocks) != len(MARK.findall(text)):
        raise BadInput(f"{page}: a table needs <!-- table:NAME -->, each on a line, and a later "
                       "<!-- /table:NAME --> of the same name")
    return BLOCK.sub(block, text)


def pages(root=ROOT):
    return [Path(root, "README.md"), *sorted(Path(root, "docs").glob("*.md"))]


def differing(root=ROOT):
    """-> {page: its text as the JSON has it}, of the pages that are otherwise."""
    texts = {}
    for page in filter(Path.exists, pages(root)):
        text = page.read_text(encoding="utf-8")
        filled = fill(text, page, Path(root, "results"))
        if filled != text:
            texts[page] = filled
    return texts


# ---- the figure ---------------------------------------------------------------------------------

STYLES = (("black", "-", "o"), ("C0", "--", "s"), ("C1", "-.", "^"), ("C2", ":", "D"),
          ("C3", (0, (8, 2, 2, 2, 2, 2)), "v"), ("C4", (0, (1, 3)), "P"))
POINTS = "*xd+"                             # real text, then the controls
SIZE = 17                                   # of letters: readable at half of the page's width


def means(records, by, *keys):
    """Lists of means over the records (seeds) of equal `by`, in its order, one list a key."""
    groups = [runs for _, runs in sorted(group(records, [by]))]
    return [[statistics.fmean(run[key] for run in runs) for runs in groups] for key in keys]


def plot(paths, folder="assets"):
    """Two panels: perplexity against entropy over temperature, at the steps that were swept most;
    and MAUVE, or distinct4 without it, against passes, at the temperature nearest to 1. Dashes and
    markers tell the lines apart in black and white, too.  -> path of the figure"""
    from matplotlib.figure import Figure
    records = [record for path in paths for record in read_records(path)
               if record.get("gen_ppl") and "kind" in record]
    y = "mauve" if any("mauve" in record for record in records) else "distinct4"
    records = [record for record in records if y in record]
    of_models = [record for record in records if record["kind"] == "model"]
    lines = group(of_models, ["process", "model", "order", "ending"])
    names = [" ".join(filter(None, values)) for values, _ in lines]
    if not 0 < len(lines) <= len(STYLES):
        raise BadInput(f"a figure takes 1 to {len(STYLES)} lines with a perplexity, not "
                       f"{len(lines)} ({', '.join(names)}): evaluate with a judge, and choose by "
                       "--models, --order and --ending")
    figure = Figure((13, 7.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (_, line), (color, dashes, marker) in zip(names, lines, STYLES):
        style = {"color": color, "ls": dashes, "marker": marker, "ms": 9, "lw": 2.5}
        swept = group(line, ["steps"])
        (steps,), curve = max(swept, key=lambda item: (len(item[1]), -abs(item[0][0] - 16)))
        left.plot(*means(curve, "temperature", "entropy", "gen_ppl"), **style,
                  label=f"{name}, left: {steps} steps")
        nearest = min((run["temperature"] for run in line), key=lambda T: abs(T - 1))
        at_nearest = [run for run in line if run["temperature"] == nearest]
        right.plot(*means(at_nearest, "steps", "passes", y), **style)
    others = [record for record in records if record["kind"] != "model"]
    for (values, runs), marker in zip(group(others, ["model"]), POINTS):
        style = {"color": "black", "ls": "none", "marker": marker, "ms": 15, "mew": 2.5}
        left.plot(*means(runs, "model", "entropy", "gen_ppl"), **style, label=values[0])
        (level,), = means(runs, "model", y)
        right.axhline(level, color="gray", lw=1)
        right.plot(1, level, **style, transform=right.get_yaxis_transform(), clip_on=False)
    finish(left, right, records[0]["judge"], y)
    figure.legend(loc="outside lower center", ncols=2, fontsize=SIZE - 2, frameon=False,
                  handlelength=3.5)
    path = Path(folder, Path(paths[0]).stem + ".png")
    checkpoint.write_whole(path, lambda file: figure.savefig(file, format="png"))
    print(f"wrote {path}")
    return path


def finish(left, right, judge, y):
    from matplotlib.ticker import LogFormatter
    left.set(yscale="log")
    left.set_xlabel("entropy, nats; along a line: temperature", size=SIZE)
    left.set_ylabel(f"perplexity, judge {judge}", size=SIZE)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    right.set_xscale("log", base=2)
    right.set_xlabel("network passes", size=SIZE)
    right.set_ylabel(y, size=SIZE)
    right.xaxis.set_major_formatter("{x:g}")
    for ax in (left, right):
        ax.tick_params(labelsize=SIZE - 2, which="both")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)


# ---- command line -------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    texts = differing()
    for page, text in texts.items():
        if not args.check:
            checkpoint.write_whole(page, lambda file: file.write(text.encode("utf-8")))
        print(f"{page.relative_to(ROOT)}: {'differs' if args.check else 'rewritten'}")
    if args.check and texts:
        raise BadInput("run python experiments/tables.py")


if __name__ == "__main__":
    checkpoint.run_script(main)
