"""Tests of the repository itself: arrows between rooms, house rules, the wheel, the README."""
