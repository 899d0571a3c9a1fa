#!/bin/bash
# Trains the emoji theatre on one GPU in pieces that go on where they stopped:
#     bash tests/yardsticks/theatre_gpu.sh tae|judge|4s|long|out      (all of them: in this order)
# Needs data/theatre/sprites.webp (`lingen data fetch theatre`). A piece ends itself after LIMIT seconds (520); the same
# command goes on. What is to be kept is put into $OUT: weights/{denoiser,autoencoder}.safetensors in bfloat16, which is
# the folder that `lingen demo --checkpoint` takes; judge.safetensors; metrics. PYTHON names the interpreter.
# Where the run folders are gone, INIT=FOLDER (of such weights) begins from them instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python} limit=${LIMIT:-520} out=${OUT:-runs/out} workers=${WORKERS:-14}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
[ -f data/theatre/sprites.webp ] || { echo "data/theatre/sprites.webp is missing: lingen data fetch theatre" >&2; exit 2; }
[ -d "${INIT:-/nowhere}" ] && [ ! -d runs/theatre_tae ] && tae=$INIT/autoencoder.safetensors || tae=runs/theatre_tae
mkdir -p "$out/weights"

# A signal after the limit: the run saves a checkpoint and exits with 75.
lingen() {
    local code=0
    timeout --signal=TERM --kill-after=60 "$limit" "$python" -m lingen "$@" || code=$?
    [ $code -eq 0 ] || [ $code -eq 75 ] || [ $code -eq 124 ] || exit $code
}

case ${1:-} in
tae)   # TAE_STEPS: 2,500 are about four minutes
    lingen fit --recipe theatre_tae_128 --run runs/theatre_tae train.steps="${TAE_STEPS:-2500}" data.workers="$workers"
    lingen eval tae --run runs/theatre_tae --clips 24 --out "$out/tae"
    ;;
judge) # on the CPU it takes an hour
    "$python" -m tests.yardsticks.theatre train --minutes "${MINUTES:-3}" --workers "$workers" --out "$out/judge.safetensors"
    "$python" -m tests.yardsticks.theatre check --judge "$out/judge.safetensors" --out "$out/judge.json"
    ;;
4s)    # STEPS: as many as fit into about seven minutes; a first call with STEPS=100 tells how fast they are
    lingen fit --recipe theatre_128 --run runs/theatre --stage 4s autoencoder.path="$tae" data.workers="$workers" \
        stages.4s.train.steps="${STEPS:-3000}" ${INIT:+init=$INIT/denoiser.safetensors}
    ;;
long)  # 16 s and 60 s, from what 4 s has learned
    lingen fit --recipe theatre_128 --run runs/theatre autoencoder.path="$tae" data.workers="$workers" \
        stages.4s.train.steps="${STEPS:-3000}" stages.16s.train.steps="${STEPS_16:-400}" \
        stages.60s.train.steps="${STEPS_60:-200}" ${INIT:+init=$INIT/denoiser.safetensors}
    ;;
out) ;;
*) echo "usage: $0 tae|judge|4s|long|out" >&2; exit 2 ;;
esac

for pair in theatre_tae:autoencoder theatre:denoiser; do
    run=runs/${pair%%:*} file=$out/weights/${pair##*:}.safetensors
    if ls "$run"/stages/*/weights.safetensors >/dev/null 2>&1; then
        "$python" -m lingen export --run "$run" --precision bf16 --out "$file"
        cp "$run/metrics.csv" "$out/metrics_${pair##*:}.csv"
    fi
done
ls -l "$out" "$out/weights"
