"""Benchmarks of the relay: see README.md."""
