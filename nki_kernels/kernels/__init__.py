"""Plain NKI kernels. They import `nki` and their own shared pieces, nothing else."""
