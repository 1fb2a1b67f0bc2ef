"""Benchmarks: what a Dual LoRA layer costs in time and memory, and what its rounding keeps.

Each runs as ``python -m benchmarks.<name>`` from the repository's root, and writes JSON, Markdown and, where it helps,
a chart into ``benchmarks/results``.
"""
