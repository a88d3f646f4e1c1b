import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(("module", "cases"), [("interpreted", 24), ("interpreted_prologue", 18), ("interpreted_kv", 19)])
def test_kernels_under_the_interpreter(module, cases):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.ops.kernels.{module}"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("ok ") == cases
