"""From a saved adapter to its report: each layer's factors and base weight are read, measured and let go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import dual_lora_kernels

from .. import analysis
from ..backends import Block, DenseBase, Factors
from ..base_checkpoint import BaseCheckpoint, StoredWeight
from ..saved_layers import SavedLayers
from ..spectra import spectrum
from .report import AdapterReport, AgainstBase, LayerReport, Similarity, Spectrum

Progress = Callable[[int, int, float], None]
"""Told how many layers are done, of how many, and what share of the work that is."""


class _Named(NamedTuple):
    """An adapter and its name in the report."""

    name: str
    layers: SavedLayers


@torch.no_grad()
def inspect_adapter(
    folder: str | Path,
    base: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    *,
    spectra: bool = True,
    progress: Progress | None = None,
) -> AdapterReport:
    """Inspect the adapter in `folder`, of this package's format or PEFT's, on the CPU.

    One layer's factors are in memory at a time, and of ΔW and W0 no more than the workspace; with `spectra` a few
    hundred columns of ΔW as well, and a layer with less outputs than inputs whole where its spectrum is exact.

    Args:
        base: folder of the model that it was trained on, for the figures beside W0.
        compare: folders of other adapters for the same model.
        spectra: whether to compute singular values, which takes most of the time.
        progress: called after each layer.

    Raises:
        FileNotFoundError: a folder holds no adapter, or no model.
        ValueError: files are damaged or do not fit each other, or a tensor holds NaN or infinity; the message names
            file and tensor.
    """
    (own_name, own), *others = _open([Path(folder), *map(Path, compare)])
    names = sorted(own.adapter.configs, key=_depth_first)  # PEFT's files have layer 10 before layer 2
    shapes = {name: own.shape(name) for name in names}
    for other in others:
        _check_alike(other, shapes)
    with ExitStack() as stack:
        weights: Mapping[str, StoredWeight] = {}
        if base is not None:
            weights = stack.enter_context(BaseCheckpoint(base)).layers(shapes)
        work, done, layers = sum(map(math.prod, shapes.values())), 0, []
        for name, shape in shapes.items():
            layers.append(_layer(own, others, name, weights.get(name), spectra))
            done += math.prod(shape)
            if progress is not None:
                progress(len(layers), len(shapes), done / work)
    return AdapterReport(
        adapter=own_name,
        base=None if base is None else Path(base).resolve().name,
        compared=tuple(other.name for other in others),
        adapter_bytes=own.file.stat().st_size,
        layers=tuple(layers),
        modules_to_save=own.adapter.modules_to_save,
        version=dual_lora_kernels.__version__,
        backend=analysis.backend_of(analysis.block(own.factors(layers[0].name))).name,
    )


def _open(folders: list[Path]) -> list[_Named]:
    """The adapters, by names that tell them apart: the last parts of their paths, as many as it takes."""
    paths = [folder.resolve() for folder in folders]
    twice = next((path for index, path in enumerate(paths) if path in paths[:index]), None)
    if twice is not None:
        raise ValueError(f"compare: got {str(twice)!r} twice, the inspected one included, expected others")
    counts = range(1, max(len(path.parts) for path in paths) + 1)
    candidates = (["/".join(path.parts[-count:]) for path in paths] for count in counts)
    names = next(names for names in candidates if len(set(names)) == len(names))
    return [_Named(name, SavedLayers.open(folder)) for name, folder in zip(names, folders, strict=True)]


def _check_alike(other: _Named, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ValueError where an adapter to compare with is for other layers."""
    common = [name for name in shapes if name in other.layers.adapter.configs]
    if not common:
        raise ValueError(f"compare: {str(other.layers.file)!r} has none of the inspected adapter's layers")
    for name in common:
        its = other.layers.shape(name)
        if its != shapes[name]:
            raise ValueError(
                f"compare: {name} in {str(other.layers.file)!r} is {its}, expected {shapes[name]}, as inspected"
            )


def _layer(
    own: SavedLayers, others: Sequence[_Named], name: str, weight: StoredWeight | None, spectra: bool
) -> LayerReport:
    config, factors = own.adapter.configs[name], own.factors(name)
    compared = {other.name: other.layers.factors(name) for other in others if name in other.layers.adapter.configs}
    whole = analysis.block(factors)
    try:
        found = analysis.figures(analysis.row_panels(whole) if weight is None else _blocks(whole, weight), compared)
    except ValueError as error:
        also = "" if weight is None else f", base weight {weight.name} in {str(weight.file.path)!r}"
        raise ValueError(f"{name} in {str(own.file)!r}{also}: {error}") from error
    update, magnitude, direction = _spectra(factors) if spectra else (None, None, None)
    depth, kind = _place(name)
    return LayerReport(
        name=name,
        depth=depth,
        kind=kind,
        shape=factors.shape,
        r1=config.r1,
        r2=config.r2,
        alpha=config.alpha,
        scale=float(factors.scale),
        parameters=sum(factor.numel() for factor in factors[:4]),
        frozen=found.frozen,
        negative=found.negative / found.entries,
        norm=found.norm,
        magnitudes=found.magnitudes,
        base=None if weight is None else _against(found, weight.dtype),
        update=update,
        magnitude=magnitude,
        direction=direction,
        similarities=tuple(_similarity(found, other) for other in compared),
    )


def _against(found: analysis.Figures, dtype: torch.dtype) -> AgainstBase:
    return AgainstBase(str(dtype).removeprefix("torch."), found.relative_norm, found.rounded_away)


def _similarity(found: analysis.Figures, other: str) -> Similarity:
    overlap = found.overlaps[other]
    return Similarity(
        other, found.cosine(other), overlap.equal_signs / found.entries, overlap.both_active / found.entries
    )


def _blocks(whole: Block, weight: StoredWeight) -> Iterator[Block]:
    """The layer in the blocks that its stored weight is read in."""
    for (row, column), stored in weight.blocks(analysis.block_entries() * weight.dtype.itemsize):
        rows, columns = stored.shape
        block = whole.rows(row, row + rows).columns(column, column + columns)
        yield block._replace(base=DenseBase(stored))


def _spectra(factors: Factors) -> list[Spectrum]:
    """Of ΔW, W_m and W_d."""

    def panels(of: Factors) -> Iterator[torch.Tensor]:
        return map(analysis.computed, analysis.row_panels(analysis.block(of)))

    matrices = (factors, analysis.magnitude(factors), analysis.direction(factors))
    return [spectrum(partial(panels, matrix), factors.shape, sum(factors.ranks)) for matrix in matrices]


def _depth_first(name: str) -> float:
    """The depth; layers without one, which are heads mostly, come last."""
    depth, _ = _place(name)
    return math.inf if depth is None else depth


def _place(name: str) -> tuple[int | None, str]:
    """(depth, kind) of a layer: the first number in its name, and what follows that."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return None, name
    return int(parts[at]), ".".join(parts[at + 1 :]) or name
