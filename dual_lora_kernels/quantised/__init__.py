"""W0 in a quantised format: what a weight's tensors mean, and how libraries' layers keep them."""
