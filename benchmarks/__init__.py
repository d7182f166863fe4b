"""Benchmarks: each prints what it measured and writes JSON under `benchmarks/results`."""
