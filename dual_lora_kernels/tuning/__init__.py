"""``dual-lora tune``: times the Triton kernels' tile shapes on the GPU at hand and rewrites its entries."""
