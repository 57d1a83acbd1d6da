"""Floating point: where a right formula fails, and verdicts from differences of values alone."""
