#!/bin/bash
# Makes the demo model from nothing but moby_dick.jsonl, in some ten minutes on two cores:
#
#     bash examples/moby_dick/train.sh OUT
#
# OUT/hf is as good as model/; to the bit it depends on the machine and the versions.
# PYTHON=.venv/bin/python chooses the interpreter; a run that was stopped goes on. What follows OUT are
# options of train/pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/moby_dick
out=${1:?say where to: train.sh OUT}
python=${PYTHON:-python}
mkdir -p "$out"

test -f "$out/qwen.tiktoken" ||
    "$python" train/tokenizer.py --data $here/moby_dick.jsonl --size 1024 --out "$out/qwen.tiktoken"
"$python" train/pretrain.py --recipe pretrain --model $here/config.json \
    --tokenizer "$out/qwen.tiktoken" --data $here/moby_dick.jsonl --eval-share 0.05 \
    --length 256 --rows 16 --steps 600 --warmup 50 --learning-rate 3e-3 --dtype float32 \
    --remat none --eval-every 100 --save-every 100 --out "$out/run" --resume "${@:2}"
"$python" convert/to_hf.py "$out/run/model" "$out/hf" --dtype bfloat16
