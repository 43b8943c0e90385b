"""Measures the proxy beside its peers, in interleaved rounds on one machine: ``python -m benchmarks``."""
