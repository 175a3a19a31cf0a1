#!/usr/bin/env bash
# English novels with GPT-2's words, 55M parameters: every figure of results/novels.json.
#
#   bash results/novels.sh     teachers and judge, then whatever can be evaluated or trained next
#
# Stops at LIMIT seconds, writes results/novels.json from what is done, and goes on where it stopped
# when started again: some 20 minutes on two H200s, and as much for the knobs, neither yet in one go.
# TINY=1 tries everything on a CPU.
#   NOVELS   the texts, a glob of .txt[.gz|.xz]; a document each, the last 4 % (3 of 90) held out
#   OUT_DIR  runs, one folder each; its log/NAME.txt is what NAME printed
#   UPDATES  of a masked generator in its base setting; UNIFORM, RATE, FAKE: updates and the two
#            learning rates of a uniform one; the others are below
#   HOLD     a file: until it is there, something else is using GPU 0
set -uf -o pipefail                    # no globbing: $NOVELS goes to Python as it is
cd "$(dirname "$0")/.."
NOVELS=${NOVELS:-data/novels/*.txt.xz} OUT_DIR=${OUT_DIR:-out/novels} LIMIT=${LIMIT:-3600}
UPDATES=${UPDATES:-800} UNIFORM=${UNIFORM:-1200} RATE=${RATE:-1e-4} FAKE=${FAKE:-3e-4}
MASKED=${MASKED:-7000} DUO=${DUO:-4500} JUDGE=${JUDGE:-3000} DCD=${DCD:-1000}
NET="--tokenizer gpt2 --block_size 256 --size 8x6x384 --preset gpu"
TEXTS=512 KNOB_TEXTS=256 SEEDS="1 2 3" KNOB_SEEDS="1 2"
BATCH=64 MORE=3000 FEWER=250 FASTER=1
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)} WORKERS=${WORKERS:-2}       # workers a GPU
if [ "${TINY:-}" ]; then
    NET="--tokenizer char --block_size 32 --size 1x2x32 --preset laptop --no-compile --device cpu"
    UPDATES=4 UNIFORM=4 MASKED=12 DUO=12 JUDGE=8 DCD=5 MORE=6 FEWER=2 BATCH=8 TEXTS=16 KNOB_TEXTS=16
    SEEDS="1 2" KNOB_SEEDS=1 FASTER=9
    export RESULTS=$OUT_DIR/results                        # not those of a real run
fi
GPUS=$((GPUS > 0 ? GPUS : 1))
state=$OUT_DIR/state records=${RESULTS:-results}/novels list=$OUT_DIR/jobs
mkdir -p "$OUT_DIR/log" "$state" $records
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/$OUT_DIR/inductor}
export TORCHINDUCTOR_COMPILE_THREADS=6 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
teacher=$OUT_DIR/mdlm__teacher/teacher.pt duo=$OUT_DIR/duo__teacher/teacher.pt
dcd=$OUT_DIR/duo__dcd/dcd.pt judge=$OUT_DIR/judge/judge.pt

# ---- a list of jobs, and workers that take the first one that can start --------------------------

# NAME, the job it needs (- none), the GPU it wants (- any), seconds it may take, and its command
job() { echo "$@" >> "$list"; }

# A stage of a run, in the folder OUT_DIR/NAME: NAME NEEDS GPU SECONDS flags of train.py
train() {
    local name=$1; shift
    job "$name" "$1" "$2" "$3" python train.py $NET --data "$NOVELS" --out "$OUT_DIR/$name" "${@:4}"
}

# Records of a run, in results/novels/NAME.json, NAME = RUN or RUN@PART, so that no two processes write
# one file: NAME RUN SECONDS checkpoint, flags of evaluate.py
evaluate() {
    local name=$1 run=$2 seconds=$3 path=$4; shift 4
    job "eval.$name" "$run" - "$seconds" python evaluate.py --process "${name%%__*}" \
        --init_from "$path" --out "$OUT_DIR/eval/$name" --judge "$judge" \
        --metrics gen_ppl entropy distinct4 gm --records "$records/$name.json" "$@"
}

work() {                               # a worker on GPU $1
    local gpu=$1 name needs where seconds command again need ready
    export CUDA_VISIBLE_DEVICES=$gpu
    [ "$gpu" = 0 ] && [ "${HOLD:-}" ] && until [ -e "$HOLD" ]; do sleep 1; done
    while again=; do
        while read -r -u 3 name needs where seconds command; do
            [ -e "$state/$name.claim" ] && continue
            [ "$where" = - ] || [ $((where % GPUS)) = "$gpu" ] || continue
            [ $((SECONDS + seconds / FASTER)) -le "$LIMIT" ] || continue
            ready=yes                  # an evaluation needs the judge too
            for need in $needs $([[ $name = eval.* ]] && echo judge); do
                [ $need = - ] || [ -e "$state/$need.done" ] && continue
                ready=
                [ -e "$state/$need.claim" ] && [ ! -e "$state/$need.failed" ] && again=wait
            done
            [ "$ready" ] || continue
            mkdir "$state/$name.claim" 2>/dev/null || continue       # one worker can make it
            local began=$SECONDS outcome=done
            rm -rf "${OUT_DIR:?}/$name" "$records/${name#eval.}.json"
            timeout $((LIMIT - SECONDS)) $command > "$OUT_DIR/log/$name.txt" 2>&1 || outcome=failed
            touch "$state/$name.$outcome"
            echo "$SECONDS s: $name $outcome on GPU $gpu after $((SECONDS - began)) s"
            again=now
            break
        done 3< "$list"
        [ "$again" ] || return
        [ $again = now ] || sleep 1
    done
}

run_jobs() {
    local i name pids=()
    while read -r name _; do           # what is done stays done; what was cut off starts anew
        [ -e "$state/$name.done" ] || rm -rf "$state/$name.claim" "$state/$name.failed"
    done < "$list"
    for ((i = 0; i < GPUS * WORKERS; i++)); do work $((i % GPUS)) & pids+=($!); done
    wait "${pids[@]}"
}

# ---- what there is to do -------------------------------------------------------------------------

teachers() {
    job data - - 5 python results/novels.py tokens --data "$NOVELS" $NET
    train mdlm__teacher data 0 60 --process mdlm --stage teacher --updates "$MASKED"
    train duo__teacher data 1 60 --process duo --stage teacher --updates "$DUO"
    train judge data 0 60 --process mdlm --stage judge --updates "$JUDGE"
    train duo__dcd duo__teacher - 40 --process duo --stage dcd --init_from $duo --updates "$DCD"
}

IDLM="--stage idlm --batch_size $BATCH"

uniform() {                            # start update seed seconds
    local from; from=$duo$([ "$1" = dcd ] && echo " $dcd")
    train duo__idlm__$1__$2__$3 duo__$1 - $4 --process duo $IDLM --updates $UNIFORM --lr $RATE \
        --fake_lr $FAKE --uniform_update $2 --seed $3 --init_from $from
}

generators() {
    local seed update
    for seed in $SEEDS; do
        train mdlm__idlm__teacher__$seed mdlm__teacher - 40 --process mdlm $IDLM --updates $UPDATES \
            --seed $seed --init_from $teacher
    done
    for seed in $SEEDS; do
        uniform dcd hard $seed 60
    done
    for update in hard marginal soft; do
        uniform teacher $update 1 $([ $update = soft ] && echo 120 || echo 60)
        [ $update = hard ] || uniform dcd $update 1 $([ $update = soft ] && echo 120 || echo 60)
    done
}

knob() {                               # NAME VALUE seed seconds flags: one step off the base setting
    local run=mdlm__knob__$1__$2__$3
    knob_records $run $run             # first in the list: evaluated as soon as it is there
    train $run mdlm__teacher - $4 --process mdlm $IDLM --updates $UPDATES --seed $3 --init_from $teacher \
        "${@:5}"
}

knob_records() {                       # NAME RUN
    evaluate $1 $2 30 "$OUT_DIR/$2/idlm.pt" --steps 4 16 \
        --num_texts $KNOB_TEXTS --seed ${1##*__} --metrics gen_ppl entropy distinct4
}

knobs() {                              # the most informative first; the second seed afterwards
    local seed
    for seed in $KNOB_SEEDS; do
        knob_records mdlm__knob__base__base__$seed mdlm__idlm__teacher__$seed
        knob updates $MORE $seed 180 --updates $MORE
        knob pairing independent $seed 50 --pairing independent
        knob lr 1e-4 $seed 50 --lr 1e-4
        knob updates $FEWER $seed 30 --updates $FEWER
        knob fake_updates 2 $seed 70 --fake_updates 2
        knob lr 1e-5 $seed 50 --lr 1e-5
        knob fake_lr 1e-3 $seed 50 --fake_lr 1e-3
        knob fake_lr 1e-4 $seed 50 --fake_lr 1e-4
        knob batch $((BATCH * 2)) $seed 80 --batch_size $((BATCH * 2))
        knob batch $((BATCH / 2)) $seed 40 --batch_size $((BATCH / 2))
        knob fake_updates 4 $seed 100 --fake_updates 4
        knob ema 0.9 $seed 50 --ema 0.9
        knob ema 0.999 $seed 50 --ema 0.999
    done
}

evaluations() {                        # the longest first
    local run seed both="--ending ancestral greedy" few="--steps 4 8 16 64" texts="--num_texts $TEXTS"
    local many="--steps 1024" middle="--steps 256" masked="--steps 256 512 1024"
    [ "${TINY:-}" ] && many="--steps 9" middle="--steps 6" masked="--steps 5 7"
    local at="$texts"
    evaluate duo__teacher@many duo__teacher 60 $duo $many --ending ancestral $at
    evaluate mdlm__teacher@many mdlm__teacher 60 $teacher $masked $at
    evaluate mdlm__teacher@few mdlm__teacher 60 $teacher --steps 4 8 16 32 64 128 $at
    evaluate duo__teacher@few duo__teacher 60 $duo $few $both $at
    for seed in $SEEDS; do
        run=mdlm__idlm__teacher__$seed
        evaluate $run $run 60 $OUT_DIR/$run/idlm.pt --steps 1 2 4 8 16 32 64 $texts --seed $seed
        for run in dcd__hard dcd__marginal teacher__hard teacher__marginal dcd__soft teacher__soft; do
            [ $seed = 1 ] || [ $run = dcd__hard ] || continue
            run=duo__idlm__${run}__$seed
            evaluate $run $run 60 $OUT_DIR/$run/idlm.pt --steps 1 2 4 8 16 $both $texts --seed $seed
        done
    done
    evaluate duo__teacher@middle duo__teacher 60 $duo $middle --ending ancestral $at
    evaluate duo__dcd@few duo__dcd 60 $dcd $few $both $at
    evaluate duo__dcd@middle duo__dcd 60 $dcd $middle --ending ancestral $at
    job rows.mdlm mdlm__idlm__teacher__1 - 30 python results/novels.py rows "$OUT_DIR" \
        mdlm__teacher mdlm__idlm__teacher__1
    job rows.duo duo__idlm__dcd__marginal__1 - 30 python results/novels.py rows "$OUT_DIR" \
        duo__teacher duo__dcd duo__idlm__dcd__hard__1 duo__idlm__dcd__marginal__1
}

: > "$list"
LIMIT=$((LIMIT - 40))                  # for the texts and the merging
teachers; evaluations; generators; knobs; run_jobs
CUDA_VISIBLE_DEVICES=0 timeout 25 python results/novels.py text "$OUT_DIR"
python results/novels.py merge "$OUT_DIR" "$NOVELS"
ls "$state" | grep failed | sed "s|^|failed, see $OUT_DIR/log: |" || true
