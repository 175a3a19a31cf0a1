#!/usr/bin/env bash
# Uniform process: the exact update `hard` beside the published `soft`, at three pairs of rates.
#
#   NAME=characters bash experiments/hard_and_soft.sh teachers             Shakespeare's characters
#   NAME=novels DATA='folder/*.txt' TOKENIZER=gpt2 ... teachers            English novels, GPT-2's BPE
#   NAME=characters SEED=1 bash experiments/hard_and_soft.sh generators    then for seeds 1, 2, 3
#
# One GPU; writes out/NAME/ and appends to out/hard_and_soft.json. Other sizes: the variables.
set -euo pipefail
NAME=${NAME:-characters} SEED=${SEED:-1} DATA=${DATA:-data/shakespeare.txt} TOKENIZER=${TOKENIZER:-char}
TEACHER=${TEACHER:-4000} DCD=${DCD:-1000} JUDGE=${JUDGE:-2000} UPDATES=${UPDATES:-500} TEXTS=${TEXTS:-512}
FLAGS=${FLAGS:---preset gpu} EVAL=${EVAL:-} RECORDS=${RECORDS:-out/hard_and_soft.json}
run="out/$NAME"
common="--process duo --tokenizer $TOKENIZER $FLAGS"

train() { python3 train.py $common --data "$DATA" "$@"; }

if [ "$1" = teachers ]; then
    train --stage teacher --updates "$TEACHER" --out "$run"
    train --stage dcd --updates "$DCD" --out "$run"
    train --stage judge --updates "$JUDGE" --out "$run"
    python3 evaluate.py --process duo --out "$run" --models teacher dcd --judge "$run/judge.pt" \
        --steps 4 16 --ending ancestral greedy --num_texts "$TEXTS" --records "$RECORDS" $EVAL
    exit
fi

for setting in "hard 1e-4 3e-4" "soft 1e-4 3e-4" "soft 1e-5 1e-4" "hard 1e-6 1e-6" "soft 1e-6 1e-6"; do
    read -r update lr fake_lr <<< "$setting"
    out="$run-$update-$lr-$SEED"
    train --stage idlm --update "$update" --lr "$lr" --fake_lr "$fake_lr" --updates "$UPDATES" \
        --batch_size 64 --seed "$SEED" --init_from "$run/teacher.pt" --start_from "$run/dcd.pt" --out "$out"
    python3 evaluate.py --process duo --out "$out" --models idlm --judge "$run/judge.pt" \
        --steps 4 16 --ending ancestral greedy map --num_texts "$TEXTS" --seed "$SEED" --records "$RECORDS" $EVAL
    rm -f "$out"/*.resume.pt
done
