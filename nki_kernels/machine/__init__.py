"""The machine: tensors, memory, one run's state, its trace, and the time the trace takes."""
