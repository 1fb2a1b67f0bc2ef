"""Benchmarks: what Dual LoRA costs in time and memory, from one layer to a whole model, and what its rounding keeps.

``python -m benchmarks PRESET`` is the suite: `command` is its command line, `presets` says what is measured, `harness`
is what all have in common, and `publish` shows the results in the documents. The other folders have what presets
measure with, and studies of their own, which run as ``python -m benchmarks.<folder>.<name>`` from the root.
"""
