"""Benchmarks of the kernels: ``python -m bench list | run | host`` from a clone."""
