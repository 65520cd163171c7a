"""Benchmarks against named peers, and experiments. Nothing in the other folders imports this one."""
