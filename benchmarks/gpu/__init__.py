"""The session on a GPU: the numerical suite, rooflines, layer cells and memory, measured within minutes."""
