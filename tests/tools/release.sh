#!/bin/bash
# What a release should have seen on a machine with GPUs, one after the other; a failure stops nothing that follows:
#     bash tests/tools/release.sh [OUT] [PART ...]
# Parts, all by default: suite, gpu (the main recipe on one GPU), gpus (all GPUs: speed, equality, events), fit (a small
# model's loop), bench (the tables of docs/performance.md, measured again). OUT (default: release) gets a log of each part and
# what it measured. PYTHON names the interpreter, JOBS the processes of the suite (14). 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-release}
shift || true
parts=("$@")
[ $# -gt 0 ] || parts=(suite gpu gpus fit bench)
python=${PYTHON:-python} failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
mkdir -p "$out"
suite() { "$python" -m pytest -n "${JOBS:-14}" -v; } # -v: what failed is named at once, should time run out
gpu() { "$python" -m tests.soak gpu --keep "$out/gpu"; }
gpus() { "$python" -m tests.soak gpus --keep "$out/gpus" --json "$out/gpus.json"; }
fit() {
    local wrong=0
    for how in off graph; do
        "$python" -m lingen bench fit --recipe emoji_64 --steps 20 train.compile=$how --out "$out/fit_$how.json" || wrong=1
    done
    return $wrong
}
bench() {
    local wrong=0
    "$python" -m lingen bench model --recipe t2v_68s --grid 34x32x32 --grid 136x32x32 --twins dit --out "$out/model.json" || wrong=1
    for what in kernels "stock --grid 34x32x32 --grid 136x32x32" "training --grid 34x32x32" tae; do
        # shellcheck disable=SC2086
        "$python" -m lingen bench $what --out "$out/${what%% *}.json" || wrong=1
    done
    return $wrong
}
for part in "${parts[@]}"; do
    case $part in
        suite | gpu | gpus | fit | bench) ;;
        *) echo "There is no part '$part': suite, gpu, gpus, fit, bench." >&2 && exit 2 ;;
    esac
    SECONDS=0
    "$part" > "$out/$part.log" 2>&1
    code=$?
    echo "$part: exit code $code after $SECONDS s, $out/$part.log"
    [ $code -eq 0 ] || failed=1
done
exit $failed
