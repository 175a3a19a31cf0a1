#!/usr/bin/env bash
# Uniform process: the exact update `hard` beside the published `soft`, at our rates and the paper's.
#
#   NAME=characters bash experiments/hard_and_soft.sh teachers             Shakespeare's characters
#   NAME=novels DATA='folder/*.txt' TOKENIZER=gpt2 ... teachers            English novels, GPT-2's BPE
#   NAME=characters SEED=1 bash experiments/hard_and_soft.sh generators    then for seeds 1, 2, 3
#
# One GPU; writes out/NAME/ and appends to out/hard_and_soft.json. Other sizes: the variables. With
# DCD=0 generators start as the teacher; with JUDGE_UPDATES=0 the judge is the character n-gram.
set -euo pipefail
NAME=${NAME:-characters} SEED=${SEED:-1} DATA=${DATA:-data/shakespeare.txt} TOKENIZER=${TOKENIZER:-char}
TEACHER=${TEACHER:-4000} DCD=${DCD:-1000} JUDGE_UPDATES=${JUDGE_UPDATES:-2000} UPDATES=${UPDATES:-500} TEXTS=${TEXTS:-512}
FLAGS=${FLAGS:---preset gpu} CACHE=${CACHE:-out/cache} RECORDS=${RECORDS:-out/hard_and_soft.json}
SETTINGS=${SETTINGS:-hard 1e-4 3e-4,soft 1e-4 3e-4,hard 1e-6 1e-6,soft 1e-6 1e-6}
run="out/$NAME"
start="$run/teacher.pt"
judge=ngram
if [ "$DCD" != 0 ]; then start="$run/dcd.pt"; fi
if [ "$JUDGE_UPDATES" != 0 ]; then judge="$run/judge.pt"; fi

train() {
    python3 train.py --process duo --tokenizer "$TOKENIZER" --data "$DATA" --cache "$CACHE" $FLAGS --seed "$SEED" "$@"
}
evaluate() {
    python3 evaluate.py --process duo --judge "$judge" --cache "$CACHE" --num_texts "$TEXTS" --seed "$SEED" \
        --ending ancestral greedy map --metrics overlap "$@"
}

if [ "$1" = teachers ]; then
    train --stage teacher --updates "$TEACHER" --out "$run"
    if [ "$DCD" != 0 ]; then train --stage dcd --updates "$DCD" --out "$run"; fi
    if [ "$JUDGE_UPDATES" != 0 ]; then train --stage judge --updates "$JUDGE_UPDATES" --out "$run"; fi
    evaluate --out "$run" --models teacher --steps 4 16 64
    python3 experiments/collect.py "$RECORDS" "$run" data="$NAME"
    exit
fi

while IFS=, read -r -d, setting; do
    read -r update lr fake_lr <<< "$setting"
    out="$run-$update-$lr-$SEED"
    train --stage idlm --update "$update" --lr "$lr" --fake_lr "$fake_lr" --updates "$UPDATES" \
        --batch_size 64 --init_from "$run/teacher.pt" --start_from "$start" --out "$out"
    evaluate --out "$out" --models idlm --steps 4 16
    python3 experiments/collect.py "$RECORDS" "$out" data="$NAME" update="$update" lr="$lr" fake_lr="$fake_lr"
done <<< "$SETTINGS,"
