#!/bin/bash
# Trains the emoji theatre on one GPU in pieces of so many seconds (of `encode` and `long`: clips), each in a call of its
# own or several in one:
#     bash tests/yardsticks/theatre_gpu.sh judge 740 encode 34000 long 2000 coarse 300 60s 590 score
# `encode` takes so many clips of 4 s, `long` so many of 16 s and half as many of 60 s. `coarse` trains on clips of 4 s with
# two latent frames in a token, at half the cost; `60s` goes on from it with one frame in a token and clips of all three
# lengths.
# Needs data/theatre/sprites.webp (`lingen data fetch theatre`). The pieces that train take seconds: they train at a
# constant rate for the first of them, look how far they came, and lower the rate over as many steps as fit into the
# rest (SHARE percent; 5 of `coarse`, 50 of `60s`): nobody has to know the GPU's speed. What is to be kept is put into
# $OUT: weights/denoiser.safetensors in bfloat16, in the folder that `lingen demo --checkpoint` takes; judge.safetensors;
# logs and metrics. PYTHON names the interpreter, MORE further overrides of the denoiser's recipe, START other weights
# that `60s` goes on from (empty: none). `encode` and `long` draw clips once, in $WORKERS processes (14), and keep their
# latents in $SHARDS: drawn anew for each step, clips of 2.4 MB come to the GPU at some 400 a second, which is less than half of what
# it trains on.
set -ufo pipefail # f: patterns of shards are not for this shell
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} out=$(realpath -m "${OUT:-runs/out}") workers=${WORKERS:-14} shards=${SHARDS:-/dev/shm/theatre}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
[ -f data/theatre/sprites.webp ] || { echo "data/theatre/sprites.webp is missing: lingen data fetch theatre" >&2; exit 2; }
mkdir -p "$out/weights"
always=(data.workers="$workers" train.checkpoint_every=2000 train.validate_every=5000 train.validation_samples=64 train.sample_every=0 sample.prompts=[] train.log_every=50)

# fit SECONDS RUN WORDS...: a signal after so many seconds; the run saves a checkpoint and exits with 75.
fit() {
    local seconds=$1 run=$2
    shift 2
    timeout --foreground --signal=TERM --kill-after=90 "$seconds" $python -m lingen fit --run "runs/$run" "$@" \
        "${always[@]}" >> "$out/$run.log" 2>&1
    local code=$?
    echo "$run: exit code $code, $SECONDS s"
}

# train SECONDS SHARE RUN STAGE WORDS...: a stage in the time, of which so many percent lower the rate.
train() {
    local seconds=$1 share=${SHARE:-$2} run=$3 stage=$4 of="stages.$4.train"
    shift 4
    set -- --recipe theatre_128 --stage "$stage" "$@"
    fit $((seconds * (100 - share) / 100)) "$run" "$@" "$of.steps=1000000" "$of.decay=constant"
    local done steps
    done=$(find "runs/$run/stages/$stage" -maxdepth 1 -name 'step-*' | sort | tail -n 1 | sed 's/.*step-0*//')
    steps=$((${done:-0} * 100 / (100 - share))) # to their end: a stage that is cut off leaves no weights
    fit $((seconds + 120)) "$run" "$@" "$of.steps=$steps" "$of.decay={name: wsd, share: $(printf 0.%02d "$share")}"
    echo "$run $stage: $steps steps"
}

# encode FRAMES CLIPS HELD: latents of so many clips of a length and of held-out ones. A part that ends early is begun
# again, once, and goes on: nothing trains on shards of which some are missing.
encode() {
    local set=$shards/$1 job each words="--device cpu data.workers=0 stages.4s.data.frames=$1"
    local -A parts=()
    words="lingen encode --recipe theatre_128 --stage 4s $words"
    part() {
        OMP_NUM_THREADS=1 $python -m $words --out "$set" --part "$1/$workers" "${@:2}" >> "$out/encode.log" 2>&1
    }
    each=("data.synthetic.clips=$2" "data.synthetic.seed=$(($1 - 48))") # other stories in other lengths
    for job in $(seq "$workers"); do
        part "$job" "${each[@]}" &
        parts[$!]=$job
    done
    $python -m $words --out "$set-held" --validation "data.synthetic.held_out=$3" >> "$out/encode.log" 2>&1
    for job in "${!parts[@]}"; do
        wait "$job" || part "${parts[$job]}" "${each[@]}" || exit 1
    done
    echo "encode $1 frames: $(du -sh "$set" | cut -f1), $SECONDS s"
}

# of_shards STAGE: what has it train on what was encoded for it, if anything was.
of_shards() {
    local of=48
    [ "$1" = 60s ] && of='*[0-9]'
    [ -d "$shards" ] && printf '%s ' "stages.$1.data."{synthetic=null,"shards.video=$shards/$of/*.tar"} \
        "stages.$1.data.validation.video=$shards/$of-held/*.tar"
}

keep() {
    $python -m lingen export "runs/$1" --precision bf16 --out "$out/weights/$2.safetensors"
    cp "runs/$1/metrics.csv" "$out/metrics_$2.csv"
}

while [ $# -gt 0 ]; do
    seconds=${2:-0}
    case $1 in
    judge) # on a CPU it takes an hour
        $python -m tests.yardsticks.theatre train --minutes "$((seconds / 24))e-1" --workers "$workers" \
            --out "$out/start.safetensors"
        $python -m tests.yardsticks.theatre train --minutes "$(((seconds - 20) / 8))e-1" --workers "$workers" \
            --start "$out/start.safetensors" --out "$out/judge.safetensors"
        ;;
    encode)
        encode 48 "$seconds" 90
        ;;
    long)
        encode 192 "$seconds" 21
        encode 720 $((seconds / 2)) 8
        ;;
    coarse)
        train "$seconds" 5 theatre-coarse 4s 'model.patch=[2,1,1]' stages.4s.data.batch.video=32 $(of_shards 4s) ${MORE:-}
        $python -m tests.yardsticks.theatre finer --weights runs/theatre-coarse/stages/4s/weights.safetensors \
            --out runs/finer.safetensors
        ;;
    60s)
        start=${START-runs/finer.safetensors}
        train "$seconds" 50 theatre-60s 60s $(of_shards 60s) ${start:+init=$start} ${MORE:-}
        keep theatre-60s denoiser
        ;;
    score)
        $python -m tests.yardsticks.theatre sample --weights "$out/weights" --batch 30 --out "$out/clips.npz"
        $python -m tests.yardsticks.theatre score --judge "$out/judge.safetensors" --clips "$out/clips.npz" \
            --out "$out/theatre.json"
        $python -m tests.yardsticks.theatre sample --weights "$out/weights" --prompts 50 --seconds 60 --events 6 \
            --batch 2 --sheet 4 --out "$out/stories.npz"
        $python -m tests.yardsticks.theatre score --judge "$out/judge.safetensors" --clips "$out/stories.npz" \
            --out "$out/theatre_60s.json"
        shift
        continue
        ;;
    *) echo "usage: $0 [judge SECONDS] [encode CLIPS] [long CLIPS] [coarse SECONDS] [60s SECONDS] [score]" >&2; exit 2 ;;
    esac
    shift 2
done
ls -l "$out" "$out/weights"
