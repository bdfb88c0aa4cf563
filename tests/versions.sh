#!/usr/bin/env bash
# The tests on the oldest releases that requirements.txt allows (.ci/run takes the newest), then checkpoints of each of
# the two read by the other. About 20 minutes on two cores. Where pip finds no CPU build of the oldest torch it fetches
# a CUDA build, which works without a GPU: 3 GB to download, 8 GB in TMPDIR.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages=$(sed -nE 's/^([a-z]+)>=.*/\1/p' requirements.txt | paste -sd '|')
cp requirements.txt "$work/newest.txt"
sed -E "s/^($packages)>=([0-9.]+)[^ ]*/\1==\2/" requirements.txt > "$work/oldest.txt" # torch>=2.6,<2.14: torch==2.6
for which in oldest newest; do
  python3 -m venv "$work/$which"
  "$work/$which/bin/pip" install -q -r "$work/$which.txt" -r tests/requirements.txt
  echo "$which: $("$work/$which/bin/pip" freeze | grep -E "^($packages|huggingface[_-]hub|tokenizers)==" | paste -sd ' ')"
done

"$work/oldest/bin/python" -m pytest

quietly() { # silent unless it fails
  "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}
for kind in --lora ""; do
  for pair in "oldest newest" "newest oldest"; do
    read -r writer reader <<< "$pair"
    ckpt=$work/$writer$kind
    quietly "$work/$writer/bin/python" train.py $kind --model tests/tiny-qwen --data tests/sample.jsonl --epochs 1 \
      --batch_size 16 --learning_rate 2e-3 --output_dir "$ckpt"
    quietly "$work/$writer/bin/python" evaluate.py --ckpt "$ckpt" --output_dir "$work/expected"
    echo -n "checkpoint of train.py $kind on the $writer releases, evaluated on the $reader: "
    code=0
    "$work/$reader/bin/python" evaluate.py --ckpt "$ckpt" --output_dir "$work/found" > "$work/log" 2>&1 || code=$?
    if [ $code = 2 ]; then
      tail -1 "$work/log" | grep "^error: " # refused in one line
      continue
    fi
    [ $code = 0 ] || { cat "$work/log"; exit 1; }
    "$work/newest/bin/python" - "$work/expected" "$work/found" << 'PYTHON'
import json, pathlib, sys
import pytest


def leaves(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


for name in ("eval-test.json", "predictions-test.jsonl"):
    expected, found = ((pathlib.Path(folder) / name).read_text(encoding="utf-8") for folder in sys.argv[1:])
    if name.endswith("l"):
        expected, found = (f"[{','.join(text.strip().split(chr(10)))}]" for text in (expected, found))
    assert leaves(json.loads(found)) == pytest.approx(leaves(json.loads(expected)), abs=1e-5), name
print("equal")
PYTHON
  done
done
