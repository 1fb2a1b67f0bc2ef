"""Fine-tuning on several processes, devices and nodes."""
