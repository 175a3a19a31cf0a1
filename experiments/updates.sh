#!/usr/bin/env bash
# Do more updates of the generator help? Characters, one teacher of experiments/laptop.sh, which runs first.
#
#   PROCESS=mdlm bash experiments/updates.sh             fifty minutes of a CPU core; then duo
#
# Writes a folder a setting and appends to out/updates.json. A setting: updates, the generator's rate, the fake's.
set -euo pipefail
PROCESS=${PROCESS:-mdlm} SEED=${SEED:-1} TEXTS=${TEXTS:-1500}
SETTINGS=${SETTINGS:-350 3e-4 1e-3,1050 3e-4 1e-3,3500 3e-4 1e-3,1050 1e-4 1e-3}
run="out/laptop-$PROCESS-$SEED"
start="$run/teacher.pt"
if [ "$PROCESS" = duo ]; then start="$run/dcd.pt"; fi

while IFS=, read -r -d, setting; do
    read -r updates lr fake_lr <<< "$setting"
    out="$run-$updates-$lr"
    python3 train.py --preset laptop --process "$PROCESS" --stage idlm --seed "$SEED" --init_from "$run/teacher.pt" \
        --start_from "$start" --updates "$updates" --lr "$lr" --fake_lr "$fake_lr" --out "$out"
    python3 evaluate.py --process "$PROCESS" --out "$out" --models idlm --seed "$SEED" --judge ngram out/laptop-judge/judge.pt \
        --mauve --num_texts "$TEXTS" --steps 4 16 --metrics known_words --ending ancestral map
    python3 experiments/collect.py out/updates.json "$out" updates="$updates" lr="$lr" fake_lr="$fake_lr"
done <<< "$SETTINGS,"
