#!/bin/bash
# The ablation study of docs/results.md on one GPU, many runs at once: a small model waits for its kernels to be launched,
# so that several share a GPU well. Each process of `lingen ablate --part` has its own share of the runs in one folder.
#     SECONDS_ALL=380 bash tests/yardsticks/ablate_gpu.sh
# Ended by the clock, every run keeps its rows; the same command goes on. What is to be kept is put into $OUT/study.tgz:
# everything but checkpoints. PYTHON names the interpreter; PARTS: processes; SEEDS; MORE: further overrides.
set -uo pipefail
cd "$(dirname "$0")/../.."
begun=$SECONDS
python=${PYTHON:-python} out=${OUT:-runs/range} parts=${PARTS:-13} seeds=${SEEDS:-5} limit=${SECONDS_ALL:-380}
read -ra more <<< "${MORE:-}"
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out/logs"
"$python" -m tests.yardsticks.range_clips data/range || exit 1
# piece SECONDS WORDS...: one process, which a signal ends after so many seconds.
piece() {
    timeout --signal=TERM --kill-after=25 "$((limit - SECONDS + begun))" "$python" -m lingen ablate "$@" ${more[@]+"${more[@]}"}
    echo "$(date -u +%T) ended with $?"
}
for part in $(seq "$parts"); do
    piece --recipe tests/yardsticks/range.yaml --out "$out/study" --variants no_te no_ma no_review attention \
        --seeds "$seeds" --part "$part/$parts" > "$out/logs/part-$part.log" 2>&1 &
done
piece --recipe tests/yardsticks/range_adapt.yaml --out "$out/adapt" --variants attention --seeds "${SEEDS_ADAPT:-1}" \
    --part 1/1 > "$out/logs/adapt.log" 2>&1 &
while [ -n "$(jobs -r)" ]; do
    sleep 10
    echo "$((SECONDS - begun)) s: $(tail -qn 1 "$out"/study/*/metrics.csv "$out"/adapt/*/metrics.csv 2> /dev/null |
        cut -d, -f1,2 | tr '\n' ' ')"
done
wait
tar czf "$out/study.tgz" -C "$out" --exclude=stages --exclude=tensorboard study adapt logs
"$python" -m tests.yardsticks.ablate_tables "$out/study" "$out/adapt"
ls -l "$out/study.tgz"
