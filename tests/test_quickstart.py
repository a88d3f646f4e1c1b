"""The README's main job, on the pretrained weights, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_quickstart():
    result = run("--bps", "4", "--sentences", "32", "--no-compile")
    assert result.returncode == 0, result.stderr
    assert "37 linear layers, 10,764,288 weights" in result.stdout
    assert "43,057,152 (float32) -> 5,382,144" in result.stdout
    assert "4.0000" in result.stdout
    assert float(re.search(r"weight SNR +([\d.]+)", result.stdout)[1]) > 22
    assert float(re.search(r"embedding +([\d.]+) mean", result.stdout)[1]) > 0.96


def test_quickstart_refuses():
    result = run("--bps", "7.3")
    assert result.returncode == 2
    assert "bps must be a multiple of 1/8 from 1.75 to 6.0 for lattice 'e8', got 7.3" in result.stderr
