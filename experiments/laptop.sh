#!/usr/bin/env bash
# The README's first table: the default run on three seeds, 256 texts a row; and docs/laptop.md.
#
#   bash experiments/laptop.sh               six minutes a seed on two CPU cores, and ten to evaluate
#   PROCESS=duo bash experiments/laptop.sh   the uniform process
set -euo pipefail
PROCESS=${PROCESS:-mdlm} SEEDS=${SEEDS:-1 2 3}
judge=out/laptop-judge/judge.pt

python3 train.py --preset laptop --stage judge --out out/laptop-judge
for seed in $SEEDS; do
    out="out/laptop-$PROCESS-$seed"
    python3 train.py --preset laptop --process "$PROCESS" --seed "$seed" --out "$out"
    python3 evaluate.py --process "$PROCESS" --out "$out" --seed "$seed" --judge ngram "$judge" --mauve --num_texts 256 \
        --steps 4 16 256 --metrics known_words --ending ancestral map
    python3 experiments/collect.py "out/laptop-$PROCESS.json" "$out" data=characters
done
