"""What the suite measures: a file for each preset of ``python -m benchmarks``, imported when it is asked for.

Each has ``HELP``, ``add``, ``run`` and ``table``, as `benchmarks.command.Preset` says.
"""
