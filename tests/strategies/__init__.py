"""Hypothesis strategies shared by the tests, and nothing else."""
