# SPDX-License-Identifier: MIT
"""Add the records of a run folder's eval.json to a list, with what an experiment varied in it.

    python experiments/collect.py results/hard_and_soft.json out/soft-1 update=soft lr=1e-4
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import run_script                                    # noqa: E402
from evaluate import append_records, read_records                    # noqa: E402


def main():
    records, folder, *stamps = sys.argv[1:]
    varied = dict(stamp.split("=") for stamp in stamps)
    new = [varied | record for record in read_records(Path(folder, "eval.json"))]
    append_records(Path(records), new)


if __name__ == "__main__":
    run_script(main)
