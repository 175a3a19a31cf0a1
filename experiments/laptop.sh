#!/usr/bin/env bash
# The README's first table: the default run on three seeds, 256 texts a row.
#
#   bash experiments/laptop.sh               six minutes a seed on two CPU cores, and three to evaluate
#   PROCESS=duo bash experiments/laptop.sh   the uniform process
set -euo pipefail
PROCESS=${PROCESS:-mdlm} SEEDS=${SEEDS:-1 2 3} RECORDS=${RECORDS:-out/laptop-$PROCESS.json}
for seed in $SEEDS; do
    out="out/laptop-$PROCESS-$seed"
    python3 train.py --preset laptop --process "$PROCESS" --seed "$seed" --out "$out"
    python3 evaluate.py --process "$PROCESS" --out "$out" --seed "$seed" --judge ngram --num_texts 256 \
        --steps 4 16 256 --metrics known_words --ending ancestral map
    python3 experiments/collect.py "$RECORDS" "$out" data=characters
done
