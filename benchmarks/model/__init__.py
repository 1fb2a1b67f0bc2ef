"""A model of what a layer's step takes on a GPU that is not there, from compiled kernels and the chip's ceilings."""
