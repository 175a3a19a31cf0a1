#!/usr/bin/env bash
# English novels with GPT-2's words, 55M parameters: every figure of results/novels*.json.
#
#   bash results/novels.sh     teachers and judge, then whatever can be evaluated or trained next
#
# Stops at LIMIT seconds, writes results/NAME.json from what is done, and goes on where it stopped
# when started again. TINY=1 tries everything on a CPU.
#   NOVELS   the texts, a glob of .txt[.gz|.xz]; a document each, the last 4 % (3 of 90) held out
#   OUT_DIR  runs, one folder each; its log/NAME.txt is what NAME printed
#   NAME     of the records: results/NAME.json, novels if not given
#   PARTS    of masked, uniform, tune (uniform knobs), knobs (of the masked generators)
#   UPDATES  of a masked generator (rate 3e-5); UNIFORM, RATE, FAKE, UBATCH, UFLAGS: updates, the
#            two learning rates, batch and further flags of a uniform one; HEAD: start__update of
#            that with every seed; KNOB, TUNE: updates of those whose knobs are turned, masked and
#            uniform
set -uf -o pipefail                    # no globbing: $NOVELS goes to Python as it is
cd "$(dirname "$0")/.."
NOVELS=${NOVELS:-data/novels/*.txt.xz} OUT_DIR=${OUT_DIR:-out/novels} LIMIT=${LIMIT:-3600}
UPDATES=${UPDATES:-800} UNIFORM=${UNIFORM:-2000} RATE=${RATE:-1e-4} FAKE=${FAKE:-3e-4}
UBATCH=${UBATCH:-64} UFLAGS=${UFLAGS:-} TUNE=${TUNE:-600}
MASKED=${MASKED:-7000} DUO=${DUO:-4500} JUDGE=${JUDGE:-3000} DCD=${DCD:-1000} KNOB=${KNOB:-400}
PARTS=${PARTS:-masked uniform tune knobs} HEAD=${HEAD:-dcd__hard}
NET="--tokenizer gpt2 --block_size 256 --size 8x6x384 --preset gpu"
TEXTS=512 KNOB_TEXTS=256 SEEDS="1 2 3" KNOB_SEEDS="1 2"
BATCH=64 MORE=3000 FEWER=100 FASTER=1
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)} WORKERS=${WORKERS:-2}       # workers a GPU
if [ "${TINY:-}" ]; then
    NET="--tokenizer char --block_size 32 --size 1x2x32 --preset laptop --no-compile --device cpu"
    UPDATES=4 UNIFORM=4 MASKED=12 DUO=12 JUDGE=8 DCD=5 MORE=6 FEWER=2 BATCH=8 TEXTS=16 KNOB_TEXTS=16
    UBATCH=4 KNOB=3 TUNE=3
    SEEDS="1 2" KNOB_SEEDS=1 FASTER=9
    export RESULTS=$OUT_DIR/results                        # not those of a real run
fi
GPUS=$((GPUS > 0 ? GPUS : 1))
state=$OUT_DIR/state records=${RESULTS:-results}/novels list=${LIST:-$OUT_DIR/jobs}
mkdir -p "$OUT_DIR/log" "$state" $records
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/$OUT_DIR/inductor}
export TORCHINDUCTOR_COMPILE_THREADS=6 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
teacher=$OUT_DIR/mdlm__teacher/teacher.pt duo=$OUT_DIR/duo__teacher/teacher.pt
dcd=$OUT_DIR/duo__dcd/dcd.pt judge=$OUT_DIR/judge/judge.pt

# ---- a list of jobs, and workers that take the first one that can start --------------------------

# NAME, the jobs it needs (comma-separated, - none), the GPU it wants (- any), seconds it may take,
# and its command
job() { echo "$@" >> "$list"; }

# A stage of a run, in the folder OUT_DIR/NAME: NAME NEEDS GPU SECONDS flags of train.py
train() {
    local name=$1
    job "$name" "$2" "$3" "$4" python train.py $NET --data "$NOVELS" --out "$OUT_DIR/$name" "${@:5}"
}

# flags of evaluate.py that every evaluation has: NAME CHECKPOINT
judged() {
    echo --process "${1%%__*}" --init_from "$2" --out "$OUT_DIR/eval/$1" --judge "$judge" --schedule linear \
        --records "$records/$1.json"
}

# Records of a run, in results/novels/NAME.json, NAME = RUN or RUN@PART, so that no two processes write
# one file: NAME RUN SECONDS checkpoint, flags of evaluate.py
evaluate() {
    job "eval.$1" "$2,judge" - "$3" python evaluate.py $(judged "$1" "$4") "${@:5}"
}

# A generator and its records, in one process: NAME NEEDS SECONDS "flags of evaluate.py", of train.py
generate() {
    job "$1" "$2,judge" - "$3" python results/novels.py chain train $NET --data "$NOVELS" \
        --out "$OUT_DIR/$1" --stage idlm "${@:5}" -- evaluate $(judged "$1" "$OUT_DIR/$1/idlm.pt") $4
}

give_up() { echo "not run: $2" > "$OUT_DIR/log/$1.txt" && touch "$state/$1.failed"; }

work() {                               # a worker on GPU $1
    local gpu=$1 name needs where seconds command again need ready
    export CUDA_VISIBLE_DEVICES=$gpu
    while again=; do
        while read -r -u 3 name needs where seconds command; do
            [ -e "$state/$name.claim" ] && continue
            [ "$where" = - ] || [ $((where % GPUS)) = "$gpu" ] || continue
            [ -e "$state/$name.failed" ] && continue
            if [ $((SECONDS + seconds / FASTER)) -gt "$LIMIT" ]; then
                give_up "$name" "no time left"
                continue
            fi
            ready=yes
            for need in ${needs//,/ }; do
                [ $need = - ] || [ -e "$state/$need.done" ] && continue
                ready=
                [ -e "$state/$need.failed" ] && give_up "$name" "needs $need" && continue
                again=wait             # also for what nobody has begun: another GPU will
            done
            [ "$ready" ] || continue
            mkdir "$state/$name.claim" 2>/dev/null || continue       # one worker can make it
            local began=$SECONDS outcome=done
            echo "$command" > "$state/$name.command"
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

BOTH="--ending ancestral greedy" TIMES="--schedule linear cosine"
ALL="--metrics gen_ppl entropy distinct4 gm --num_texts $TEXTS"
FEW="--metrics gen_ppl entropy distinct4 --num_texts $KNOB_TEXTS --steps 4 16"
many="--steps 1024" middle="--steps 256" masked="--steps 256 512 1024"
[ "${TINY:-}" ] && many="--steps 9" middle="--steps 6" masked="--steps 5 7"
# what the preset had when these figures were made
IDLM="--process mdlm --init_from $teacher --batch_size $BATCH --micro_batch 128 --fake_updates 1 --latent state --lr 3e-5 --fake_lr 3e-4 --ema 0.99 --dropout 0.1"

teachers() {
    job data - - 5 python results/novels.py tokens --data "$NOVELS" $NET
    train duo__teacher data 1 60 --process duo --stage teacher --updates "$DUO"
    train judge data 0 60 --process mdlm --stage judge --updates "$JUDGE"
    train mdlm__teacher data 0 60 --process mdlm --stage teacher --updates "$MASKED"
    train duo__dcd duo__teacher 1 40 --process duo --stage dcd --init_from $duo --updates "$DCD"
}

masked() {
    local seed
    evaluate mdlm__teacher@many mdlm__teacher 60 $teacher $masked $TIMES $ALL
    evaluate mdlm__teacher@few mdlm__teacher 60 $teacher --steps 4 8 16 64 $TIMES $ALL
    for seed in $SEEDS; do
        generate mdlm__idlm__teacher__$seed mdlm__teacher 90 \
            "--steps 1 2 4 8 16 32 64 $TIMES --seed $seed $ALL" $IDLM --updates $UPDATES --seed $seed
    done
    job rows.mdlm mdlm__idlm__teacher__1 - 30 python results/novels.py rows "$OUT_DIR" \
        mdlm__teacher mdlm__idlm__teacher__1
}

uniform_teachers() {                   # the longest first
    evaluate duo__teacher@many duo__teacher 60 $duo $many --ending ancestral --temperatures 1 0.9 $ALL
    evaluate duo__teacher@few duo__teacher 60 $duo --steps 4 8 16 64 $BOTH $ALL
    evaluate duo__teacher@middle duo__teacher 60 $duo $middle --ending ancestral $ALL
    evaluate duo__dcd@few duo__dcd 60 $dcd --steps 4 8 16 64 $BOTH $ALL
}

# A uniform generator: NAME NEEDS SEED SECONDS UPDATES "flags of evaluate.py", of train.py
uniform() {
    generate $1 $2 $4 "$6 --seed $3" --process duo --batch_size $UBATCH --updates $5 --lr $RATE \
        --fake_lr $FAKE --seed $3 "${@:7}"
}

uniforms() {                           # each start and update once, HEAD with every seed
    local seed run start update from steps
    for seed in $SEEDS; do
        for run in $HEAD teacher__hard teacher__marginal dcd__hard dcd__marginal teacher__soft \
                dcd__soft; do
            [ $seed = 1 ] || [ $run = $HEAD ] || continue
            grep -q "^duo__idlm__${run}__$seed " "$list" && continue
            start=${run%%__*} update=${run##*__} from=$duo steps="4 16"
            [ $start = dcd ] && from="$duo $dcd"
            [ $run = $HEAD ] && steps="1 2 4 8 16"
            uniform duo__idlm__${run}__$seed duo__$start $seed 70 $UNIFORM "--steps $steps $BOTH $ALL" \
                --init_from $from --uniform_update $update $UFLAGS
        done
    done
    job rows.duo duo__idlm__${HEAD}__1 - 30 python results/novels.py rows "$OUT_DIR" \
        duo__teacher duo__idlm__${HEAD}__1
}

tune() {                               # of a uniform generator: KNOB VALUE flags, one step off
    try() {
        uniform duo__knob__$1__$2__1 duo__${start:-teacher} 1 60 $TUNE "$FEW $BOTH" \
            --init_from $duo ${from:-} --uniform_update hard $UFLAGS "${@:3}"
    }
    try base base
    start=dcd from=$dcd try start dcd
    for update in marginal soft; do
        try update $update --uniform_update $update
        start=dcd from=$dcd try update ${update}_from_dcd --uniform_update $update
    done
    try pairing independent --pairing independent
    try pairing matched --pairing matched
    try own_token ignored --uniform_update hard:ignored
    try lr 3e-5 --lr 3e-5
    try lr 3e-4 --lr 3e-4
    try fake_updates 2 --fake_updates 2
}

knob() {                               # NAME VALUE seed seconds flags: one step off the base setting
    generate mdlm__knob__$1__$2__$3 mdlm__teacher $4 "$FEW --seed $3" $IDLM --updates $KNOB --seed $3 \
        "${@:5}"
}

knobs() {                              # the most informative first; the second seed afterwards
    local seed
    evaluate mdlm__knob__base__teacher__1 mdlm__teacher 30 $teacher $FEW
    for seed in $KNOB_SEEDS; do
        knob base base $seed 40
        knob pairing independent $seed 40 --pairing independent
        knob lr 1e-4 $seed 40 --lr 1e-4
        knob lr 1e-5 $seed 40 --lr 1e-5
        knob fake_updates 2 $seed 50 --fake_updates 2
        knob fake_updates 4 $seed 70 --fake_updates 4
        knob fake_lr 1e-3 $seed 40 --fake_lr 1e-3
        knob fake_lr 1e-4 $seed 40 --fake_lr 1e-4
        knob batch $((BATCH * 2)) $seed 60 --batch_size $((BATCH * 2))
        knob batch $((BATCH / 2)) $seed 40 --batch_size $((BATCH / 2))
        knob updates $FEWER $seed 30 --updates $FEWER
        knob updates $((3 * KNOB)) $seed 80 --updates $((3 * KNOB))
        knob ema 0.9 $seed 40 --ema 0.9
        knob ema 0.999 $seed 40 --ema 0.999
    done
    for seed in $KNOB_SEEDS; do
        knob updates $MORE $seed 180 --updates $MORE
    done
}

: > "$list"
LIMIT=$((LIMIT - 40))                  # for the texts and the merging
teachers
[[ $PARTS = *masked* ]] && masked
[[ $PARTS = *tune* ]] && tune
[[ $PARTS = *uniform* ]] && uniforms && uniform_teachers
[[ $PARTS = *knobs* ]] && knobs
[ "${LIST_ONLY:-}" ] && exit           # for workers that are at it already
run_jobs
[[ $PARTS = *masked* ]] && CUDA_VISIBLE_DEVICES=0 timeout 25 python results/novels.py text "$OUT_DIR"
python results/novels.py merge "$OUT_DIR" "$NOVELS"
ls "$state" | grep failed | sed "s|^|failed, see $OUT_DIR/log: |" || true
