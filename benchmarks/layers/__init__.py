"""Benchmarks of layers on any device: steps against LoRA and DoRA, memory, the dither, the CPU backend's parts."""
