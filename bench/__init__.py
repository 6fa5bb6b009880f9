"""Benchmarks: every provider of the entropy and its gradient, in paired rounds, as rows of data."""
