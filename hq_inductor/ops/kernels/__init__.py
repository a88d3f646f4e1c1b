"""Triton kernels, nothing else: no torch, no launch decisions."""
