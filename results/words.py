# SPDX-License-Identifier: MIT
"""Words that texts begin with: how varied should they be, how cold the network?

    python results/words.py out/mdlm/idlm.pt --records results/words.json
    python results/words.py out/mdlm/idlm.pt --fit --records results/words_fitted.json

A generator's texts, begun with words by their frequency in training text to each power, at each
temperature of the network. Per power the curve over temperatures is read at the entropy of held-out
text, as in evaluate.py; --judge as there. With --fit the power is fitted anew for each temperature
and number of passes, as train.py does for sampling's own. Records are appended.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock               # comes with torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import evaluate
import generator
import train
from data import TextData

METRICS = "gen_ppl entropy known_words distinct4 gm".split()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("generator")
    p.add_argument("--records", type=Path, required=True)
    p.add_argument("--powers", nargs="+", type=float, default=[1.0, 0.85, 0.7])
    p.add_argument("--temperatures", nargs="+", type=float, default=[0.3, 0.5, 0.7, 0.85, 1.0])
    p.add_argument("--steps", nargs="+", type=int, default=[1, 4, 16])
    p.add_argument("--fit", action="store_true", help="see above")
    p.add_argument("--judge", default="ngram")
    p.add_argument("--num_texts", type=int, default=256)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--label", help="of the records: their variant")
    p.add_argument("--device", default="cpu")
    p.add_argument("--commit", help="where git is missing")
    args = p.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    net, meta = checkpoint.load_network(args.generator, device, "mdlm")
    data = TextData(meta["data"], meta["tokenizer"]["name"], meta["block_size"])
    process, folder = checkpoint.make_process(meta), Path(args.generator).parent
    judge = evaluate.find_judge(args.judge, data, device, folder, meta)
    count, found = torch.tensor(np.bincount(data.train, minlength=data.K)).double(), []
    own, half = generator.own_temperature, train.has_bfloat16(device)
    x_0 = data.batch("train", 8 * train.FIT_TEXTS, torch.Generator().manual_seed(args.seed))

    def record(steps, temperatures, **setting):
        records = evaluate.evaluate_models(
            {"idlm": (net, process, ["ancestral"])}, data, judge, steps=steps, seed=args.seed,
            temperatures=temperatures, num_texts=args.num_texts, metrics=METRICS,
            judge_name=Path(args.judge).stem)
        found.extend(r if r["real"] else r | setting for r in records[bool(found):])

    if not args.fit:
        for power in args.powers:
            net.set_frequencies(count ** power)
            record(args.steps, args.temperatures, power=power)
    for steps in args.steps * args.fit:
        for temperature in dict.fromkeys([own(net, process, steps, "even"), *args.temperatures]):
            net.set_frequencies(count)
            net.freeze(torch.bfloat16 if half else None)
            generator.own_temperature = lambda *_: temperature         # of fit_words
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                power = train.fit_words(net, process, x_0, torch.Generator().manual_seed(1), steps)
            generator.own_temperature = own
            record([steps], [temperature], fitted_power=power)
    label = {"variant": args.label} if args.label else {}
    provenance = checkpoint.provenance(args.seed, device)
    provenance["commit"] = args.commit or provenance["commit"]
    with FileLock(f"{args.records}.lock"):                 # others may append, too
        earlier = evaluate.load_records(args.records) if args.records.exists() else []
        evaluate.write_json(args.records, earlier + [
            provenance | (r if r["real"] else label | r) for r in found[bool(earlier):]])
    print(evaluate.records_table(found, evaluate.TABLES["words"]))


if __name__ == "__main__":
    main()
