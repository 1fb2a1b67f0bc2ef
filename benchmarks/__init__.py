"""Benchmarks: what a Dual LoRA layer costs in time and memory, and what its rounding keeps.

`harness` is what all of them use, `layers` runs on any device, `gpu` is the session on one, and `compiler` looks at
what is compiled for chips that are not there. A benchmark runs as ``python -m benchmarks.<folder>.<name>`` from the
repository's root. It writes JSON, Markdown and, where it helps, a chart into ``benchmarks/results``.
"""
