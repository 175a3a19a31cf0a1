# SPDX-License-Identifier: MIT
"""Words that texts begin with: how varied should they be, how cold the network?

    python results/words.py out/mdlm/idlm.pt --records results/words.json

A generator's texts, begun with words by their frequency in training text to each power, at each
temperature of the network. Per power the curve over temperatures is read at the entropy of held-out
text, as in evaluate.py; --judge as there. Records are appended.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import evaluate
from data import TextData

METRICS = "gen_ppl entropy known_words distinct4 gm".split()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("generator")
    p.add_argument("--records", type=Path, required=True)
    p.add_argument("--powers", nargs="+", type=float, default=[1.0, 0.85, 0.7])
    p.add_argument("--temperatures", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.85, 1.0])
    p.add_argument("--steps", nargs="+", type=int, default=[1, 4, 16])
    p.add_argument("--judge", default="ngram")
    p.add_argument("--num_texts", type=int, default=256)
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    net, meta = checkpoint.load_network(args.generator, "cpu", "mdlm")
    data = TextData(meta["data"], meta["tokenizer"]["name"], meta["block_size"])
    process, folder = checkpoint.make_process(meta), Path(args.generator).parent
    judge = evaluate.find_judge(args.judge, data, torch.device("cpu"), folder, meta)
    count, found = torch.tensor(np.bincount(data.train, minlength=data.K)).double(), []
    for power in args.powers:
        net.set_frequencies(count ** power)
        records = evaluate.evaluate_models(
            {"idlm": (net, process, ["ancestral"])}, data, judge, steps=args.steps, seed=args.seed,
            temperatures=args.temperatures, num_texts=args.num_texts, metrics=METRICS,
            judge_name=Path(args.judge).stem)
        found += [r if r["real"] else r | {"power": power} for r in records[bool(found):]]
    earlier = evaluate.load_records(args.records) if args.records.exists() else []
    provenance = checkpoint.provenance(args.seed, "cpu")
    evaluate.write_json(args.records, earlier + [provenance | r for r in found[bool(earlier):]])
    print(evaluate.records_table(found, evaluate.TABLES["words"]))


if __name__ == "__main__":
    main()
