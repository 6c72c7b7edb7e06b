"""Tests, one folder per room. A package, so that `bench` can read the error rule."""
