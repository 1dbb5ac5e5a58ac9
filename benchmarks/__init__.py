"""Timings and other figures that would be too slow or too noisy for a test; see `python -m benchmarks --help`."""
