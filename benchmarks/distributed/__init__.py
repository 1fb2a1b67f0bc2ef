"""Many GPUs, on paper: what Dual LoRA and LoRA need in memory, communication and time on each layout."""
