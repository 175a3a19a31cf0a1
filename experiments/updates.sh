#!/usr/bin/env bash
# Do more updates of the generator help? Characters, the masked teacher of `--preset gpu --size 6x4x256`.
#
#   bash experiments/headline.sh train                   teacher and judge first
#   bash experiments/updates.sh                          then ten minutes of a GPU
#
# Appends to out/updates.json. SETTINGS: updates, rate of the generator, rate of the fake.
set -euo pipefail
RUN=${RUN:-out/shakespeare} RECORDS=${RECORDS:-out/updates.json} FLAGS=${FLAGS:---preset gpu} TEXTS=${TEXTS:-390}
SETTINGS=${SETTINGS:-150 1e-4 3e-4,500 1e-4 3e-4,1500 1e-4 3e-4,5000 1e-4 3e-4,15000 1e-4 3e-4,1500 3e-5 3e-4,5000 3e-5 3e-4}

while IFS=, read -r -d, setting; do
    read -r updates lr fake_lr <<< "$setting"
    out="$RUN-$updates-$lr"
    python3 train.py $FLAGS --stage idlm --init_from "$RUN/teacher.pt" --updates "$updates" --lr "$lr" --fake_lr "$fake_lr" \
        --out "$out"
    python3 evaluate.py --out "$out" --models idlm --judge "$RUN/judge.pt" --mauve --num_texts "$TEXTS" --steps 4 8 16 64 \
        --order random even shuffled --metrics overlap known_words
    python3 experiments/collect.py "$RECORDS" "$out" updates="$updates" lr="$lr" fake_lr="$fake_lr"
done <<< "$SETTINGS,"
