"""Every example as a user runs it, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    result = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_checkpoint():
    pytest.importorskip("transformers", minversion="5")
    out = run("transformers_checkpoint.py", "--no-measure")
    assert "37 of 37 linear layers, 10,764,288 weights" in out
    assert "5,382,144 bytes = 4.0000 bits per weight" in out and "identical outputs" in out
    assert int(re.search(r"headers +([\d,]+) bytes", out)[1].replace(",", "")) < 60_000
