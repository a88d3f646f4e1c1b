"""Tests that run on all cores (`-n auto`) have one each: threads of several processes on the same cores wait for each other."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
