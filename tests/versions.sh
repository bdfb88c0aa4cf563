#!/usr/bin/env bash
# The tests on the oldest releases that requirements.txt allows, with the newest torch; .ci/run takes the newest of all.
# An older torch is not tried here, because pip has it with CUDA only, which is a download of 3 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed -E '/^torch/!s/^([a-z]+)>=([0-9.]+).*/\1==\2/' requirements.txt > "$work/oldest.txt"
python3 -m venv "$work/oldest"
"$work/oldest/bin/pip" install -q -r "$work/oldest.txt" -r tests/requirements.txt
"$work/oldest/bin/pip" freeze | grep -E "^(torch|transformers|peft|accelerate|datasets|modelscope|numpy|safetensors)=="
"$work/oldest/bin/python" -m pytest
