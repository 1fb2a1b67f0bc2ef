"""Runnable examples of dual_lora_kernels (not installed with the package)."""
