"""Benchmarks on quantised bases: memory and time of a step, what re-quantising loses."""
