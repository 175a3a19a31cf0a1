#!/usr/bin/env bash
# English novels, GPT-2's BPE, L 256, 8x6x384 (55M parameters): how many passes does a generator save?
#
#   export DATA='folder/*.txt'
#   bash experiments/novels.sh judge                               one for all rows
#   PROCESS=mdlm SEED=1 bash experiments/novels.sh teacher         duo: and the DCD student; then for seeds 1, 2, 3
#   PROCESS=mdlm SEED=1 bash experiments/novels.sh generators
#   PROCESS=mdlm SEED=1 bash experiments/novels.sh evaluate        teacher and student
#   PROCESS=mdlm SEED=1 bash experiments/novels.sh longer          3 and 10 times the updates
#
# One GPU; writes out/novels/ and appends to out/novels.json. Other sizes: the variables. All but `longer` has run, on three
# seeds, with TEXTS=512 and the generator's rates 1e-4 and, masked, 3e-5: SETTINGS='hard 1e-4 3e-4,hard 3e-5 3e-4'.
set -euo pipefail
PROCESS=${PROCESS:-mdlm} SEED=${SEED:-1} CACHE=${CACHE:-out/cache} RECORDS=${RECORDS:-out/novels.json}
TEACHER=${TEACHER:-2000} DCD=${DCD:-400} JUDGE_UPDATES=${JUDGE_UPDATES:-1500} UPDATES=${UPDATES:-400} TEXTS=${TEXTS:-256}
FLAGS=${FLAGS:---preset gpu} RUN=${RUN:-out/novels}
if [ "$PROCESS" = mdlm ]; then
    SETTINGS=${SETTINGS:-hard 1e-4 3e-4}    # --update is for the uniform process alone
else
    SETTINGS=${SETTINGS:-hard 1e-4 3e-4,soft 1e-5 3e-5}
fi
teacher="$RUN/$PROCESS-$SEED"
start="$teacher/teacher.pt"
if [ "$PROCESS" = duo ]; then start="$teacher/dcd.pt"; fi

train() {
    python3 train.py --tokenizer gpt2 --data "$DATA" --cache "$CACHE" $FLAGS --seed "$SEED" "$@"
}
evaluate() {
    python3 evaluate.py --process "$PROCESS" --judge "$RUN/judge/judge.pt" --mauve --cache "$CACHE" \
        --num_texts "$TEXTS" --seed "$SEED" --metrics overlap "$@"
}
generate() {                                # number of updates
    while IFS=, read -r -d, setting; do
        read -r update lr fake_lr <<< "$setting"
        out="$teacher-$update-$lr-$1"
        train --process "$PROCESS" --stage idlm --update "$update" --lr "$lr" --fake_lr "$fake_lr" --updates "$1" \
            --batch_size 64 --init_from "$teacher/teacher.pt" --start_from "$start" --out "$out"
        evaluate --out "$out" --models idlm --steps 2 4 8 16 32
        python3 experiments/collect.py "$RECORDS" "$out" update="$update" lr="$lr" fake_lr="$fake_lr" updates="$1"
    done <<< "$SETTINGS,"
}

case "$1" in
judge)
    train --stage judge --updates "$JUDGE_UPDATES" --out "$RUN/judge" ;;
teacher)
    train --process "$PROCESS" --stage teacher --updates "$TEACHER" --out "$teacher"
    if [ "$PROCESS" = duo ]; then
        train --process duo --stage dcd --updates "$DCD" --batch_size 64 --out "$teacher"
    fi ;;
generators)
    generate "$UPDATES" ;;
longer)
    generate $((3 * UPDATES))
    generate $((10 * UPDATES)) ;;
evaluate)
    if [ "$PROCESS" = mdlm ]; then
        evaluate --out "$teacher" --models teacher --steps 4 16 64 256 1024
    else
        evaluate --out "$teacher" --models teacher --steps 64 1024 --ending ancestral
        python3 experiments/collect.py "$RECORDS" "$teacher"
        evaluate --out "$teacher" --models teacher dcd --steps 4 8 16
    fi
    python3 experiments/collect.py "$RECORDS" "$teacher" ;;
esac
