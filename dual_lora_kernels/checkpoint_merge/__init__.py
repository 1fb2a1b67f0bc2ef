"""Merging adapters into checkpoints on disk, in bounded memory: `merge_checkpoint`."""

from .merge import MergeSummary, merge_checkpoint
from .verify import Verification

__all__ = ["MergeSummary", "Verification", "merge_checkpoint"]
