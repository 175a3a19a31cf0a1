#!/usr/bin/env bash
# The README's first table: the default run on three seeds, 256 texts a row; and docs/laptop.md.
#
#   bash experiments/laptop.sh               six minutes a seed on two CPU cores, and ten to evaluate
#   PROCESS=duo bash experiments/laptop.sh   the uniform process
#   bash experiments/laptop.sh updates       seed 1's generator, trained again with fewer and more updates
set -euo pipefail
PROCESS=${PROCESS:-mdlm} SEEDS=${SEEDS:-1 2 3}
judge=out/laptop-judge/judge.pt

evaluate() {
    python3 evaluate.py --process "$PROCESS" --judge ngram "$judge" --mauve --metrics known_words "$@"
}

if [ ! -e "$judge" ]; then
    python3 train.py --preset laptop --stage judge --out out/laptop-judge
fi
if [ "${1:-}" = updates ]; then
    for updates in 100 350 1000 3500; do
        run="out/laptop-$PROCESS-1" out="out/laptop-$PROCESS-1-$updates" start=teacher
        if [ "$PROCESS" = duo ]; then start=dcd; fi
        python3 train.py --preset laptop --process "$PROCESS" --stage idlm --updates "$updates" --out "$out" \
            --init_from "$run/teacher.pt" --start_from "$run/$start.pt"
        evaluate --out "$out" --models idlm --num_texts 512 --steps 4 16 --ending map
        python3 experiments/collect.py "out/updates-$PROCESS.json" "$out" updates="$updates"
    done
    exit
fi
for seed in $SEEDS; do
    out="out/laptop-$PROCESS-$seed"
    if [ ! -e "$out/idlm.pt" ]; then
        python3 train.py --preset laptop --process "$PROCESS" --seed "$seed" --out "$out"
    fi
    evaluate --out "$out" --seed "$seed" --num_texts 256 --steps 4 16 256 --ending ancestral map
    python3 experiments/collect.py "out/laptop-$PROCESS.json" "$out" data=characters
done
