# SPDX-License-Identifier: MIT
"""Lists of records: JSON files, to which evaluations, benchmarks and the toy append.

    python experiments/collect.py results/hard_and_soft.json out/soft-1 update=soft lr=1e-4

adds the records of a run folder's eval.json to a list, with what an experiment varied in it. Real
text, which no setting changes, is listed once, and of what was varied says `data` alone.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from filelock import FileLock               # comes with torch       # noqa: E402

from checkpoint import run_script, write_json                        # noqa: E402
from data import BadInput                                            # noqa: E402


def read_records(path):
    """A list of records, or a dict as in eval.json, whose provenance then goes into each record."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(records, dict):
            records = [records["provenance"] | record for record in records["records"]]
        if not all(isinstance(record, dict) for record in records):
            raise TypeError("an entry is no record")
    except (ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{path} is no JSON list of records ({type(error).__name__}: {error}); it "
                       "stays as it is: repair it or name another file") from None
    return records


def append_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        earlier = read_records(path) if path.exists() else []
        write_json(path, earlier + records)


def main():
    records, folder, *stamps = sys.argv[1:]
    varied = dict(stamp.split("=") for stamp in stamps)
    of_text = {key: varied[key] for key in varied if key == "data"}
    path = Path(records)
    listed = [what_it_is(record) for record in (read_records(path) if path.exists() else [])]
    new = []
    for record in read_records(Path(folder, "eval.json")):
        if record["kind"] == "model":
            new.append(varied | record)
        elif what_it_is(of_text | record) not in listed:
            new.append(of_text | record)
    append_records(path, new)


def what_it_is(record):                     # of real text and controls
    keys = "kind", "model", "data", "process", "block_size", "seed", "n_texts", "judge", "judge_2"
    return [record.get(key) for key in keys]


if __name__ == "__main__":
    run_script(main)
