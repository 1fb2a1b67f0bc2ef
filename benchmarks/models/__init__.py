"""Whole transformers models with random weights: their shapes, every method on them, and their steps."""
