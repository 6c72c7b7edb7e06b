"""References in NumPy float64, written from the mathematics. Imports nothing of this project."""
