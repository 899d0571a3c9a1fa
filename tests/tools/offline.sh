#!/bin/bash
# Wheels of what a machine with torch, lightning and transformers, but without a network, lacks to run lingen and its
# tests from a checkout:
#     bash tests/tools/offline.sh DIR [PYTHON VERSION, such as 3.12]
# There: pip install --no-index --no-deps --target SITE DIR/*.whl, and PYTHONPATH=SITE:CHECKOUT.
set -euo pipefail
dir=${1:?a folder for the wheels} version=${2:-$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
platforms=()
for glibc in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
python -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$dir" \
    av beartype braceexpand ftfy omegaconf open-clip-torch scenedetect-headless wcwidth webdataset
du -sh "$dir"
