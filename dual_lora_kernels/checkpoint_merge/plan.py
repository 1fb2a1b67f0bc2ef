"""What a merged checkpoint consists of: for every tensor of every file, where its numbers come from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..base_checkpoint import EMBEDDINGS, BaseCheckpoint, StoredWeight, is_head, piece_rows
from ..safetensors_file import DTYPES, LazyTensors, SafetensorsFile, StoredTensor, byte_count, format_name
from ..saved_layers import SavedLayers
from ..validation import SUPPORTED_DTYPES, check_finite

_WITH_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How classes are called whose output heads transformers may tie to the input embedding."""
_AT_A_TIME = 16 * 2**20
"""Bytes of a module saved whole that are checked at once."""


class Update(NamedTuple):
    """ΔW of one layer of one adapter."""

    layers: SavedLayers
    layer: str

    @property
    def rounding(self) -> str:
        """How the layer rounds."""
        return self.layers.adapter.configs[self.layer].rounding


class Output(NamedTuple):
    """One tensor of the merged checkpoint: a stored one, cast to `dtype` (the format's name), and updates in order."""

    source: SafetensorsFile
    tensor: str
    dtype: str
    updates: tuple[Update, ...] = ()
    transposed: bool = False

    @property
    def entry(self) -> StoredTensor:
        """The stored tensor's place."""
        return self.source.tensors[self.tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return byte_count(self.dtype, self.entry.shape)


@dataclass(frozen=True)
class Plan:
    """A merged checkpoint: tensors by file and name, what its config.json and index say, and what to tell the user.

    `config` and `index` are None where there is none, or where the base's own file is right.
    """

    shards: Mapping[str, Mapping[str, Output]]
    config: Mapping[str, Any] | None
    index: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for outputs in self.shards.values() for output in outputs.values())

    def merged(self) -> list[str]:
        """The names of tensors that are updated."""
        return [name for outputs in self.shards.values() for name, output in outputs.items() if output.updates]


def make_plan(base: BaseCheckpoint, adapters: Sequence[SavedLayers], dtype: torch.dtype | None) -> Plan:
    """The plan of merging adapters one after the other into `base`, in `dtype` (default: each tensor's own).

    Raises ValueError where an adapter does not fit the base, or is damaged; the message names file and tensor.
    """
    shards = {
        file.path.name: {name: _as_it_is(file, name, dtype) for name in file.tensors} for file in base.files.values()
    }
    own = {tensor: file.path.name for tensor, file in base.tensors.items()}
    notes, unties = [], False
    for layers in adapters:
        for name, output, place in _replaced(base, layers, dtype):
            if name not in own:
                own[name] = place
                notes.append(f"{name} is new: the adapter has it, the base does not; config.json is not changed for it")
            shards[own[name]][name] = output
            unties |= is_head(name.rpartition(".")[0])
        for layer, weight in _layers(base, layers).items():
            name = f"{layer}.weight" if weight.is_tied else weight.name
            file = own.setdefault(name, weight.file.path.name)
            present = shards[file].get(name, _as_it_is(weight.file, weight.name, dtype))
            updates = (*present.updates, Update(layers, layer))
            shards[file][name] = present._replace(updates=updates, transposed=weight.transposed)
            unties |= is_head(layer)
    _check_tied(base, own, adapters)
    unties &= bool(base.config.get("tie_word_embeddings", True))
    if unties:
        notes.append("the output head has a weight of its own now: tie_word_embeddings is false in config.json")
    if dtype is None:
        notes += _other_dtype(base, shards)
    return Plan(shards, _config(base.config, dtype, unties), _index(base, shards), tuple(notes))


def _check_tied(base: BaseCheckpoint, names: Iterable[str], adapters: Sequence[SavedLayers]) -> None:
    """Raise ValueError where an adapter has an embedding whole that an output head without a weight of its own uses.

    PEFT trains a copy of the embedding, and the head goes on with the base's: loading would tie it to the copy.
    """
    generates = any(str(name).endswith(_WITH_HEADS) for name in base.config.get("architectures") or ())
    if not generates or not base.config.get("tie_word_embeddings", True):
        return
    if any(is_head(name.rpartition(".")[0]) for name in names):
        return
    for layers in adapters:
        for key in layers.adapter.state:
            if key.endswith(EMBEDDINGS):
                raise ValueError(
                    f"{str(layers.file)!r}: {key} is saved whole, and in {str(base.folder)!r} the output head is tied "
                    "to it, which in training kept the base's weight: merge in memory"
                )


def _other_dtype(base: BaseCheckpoint, shards: Mapping[str, Mapping[str, Output]]) -> list[str]:
    """A note where from_pretrained, which loads in the dtype that config.json names, would round merged weights."""
    named = base.config.get("dtype") or base.config.get("torch_dtype")
    merged = {output.dtype for outputs in shards.values() for output in outputs.values() if output.updates}
    dtypes = {str(DTYPES[name]).removeprefix("torch.") for name in merged}
    if not isinstance(named, str) or dtypes <= {named}:
        return []
    return [
        f"merged weights are in {', '.join(sorted(dtypes))}, config.json says {named}: loading in that rounds them to "
        "nearest, other than training did; --dtype casts the base first, as from_pretrained did before training"
    ]


def _as_it_is(file: SafetensorsFile, tensor: str, dtype: torch.dtype | None) -> Output:
    stored = file.tensors[tensor].dtype
    return Output(file, tensor, format_name(dtype) if dtype and DTYPES.get(stored) in SUPPORTED_DTYPES else stored)


def _layers(base: BaseCheckpoint, layers: SavedLayers) -> dict[str, StoredWeight]:
    """Where the base has the weights of an adapter's layers, whose factors fit each other."""
    shapes = {layer: layers.shape(layer) for layer in layers.adapter.configs}
    try:
        return base.layers(shapes)
    except ValueError as error:
        raise ValueError(f"{str(layers.file)!r}: {error}") from error


def _replaced(base: BaseCheckpoint, layers: SavedLayers, dtype: torch.dtype | None) -> list[tuple[str, Output, str]]:
    """(name, output, file where a new one goes) of the tensors of modules that an adapter has whole."""
    adapter = layers.adapter
    assert isinstance(adapter.state, LazyTensors)
    found = []
    for key in adapter.state:
        if key.rpartition(".")[0] in adapter.configs:
            continue
        if not any(key.startswith(f"{module}.") for module in adapter.modules_to_save):
            raise ValueError(f"{str(layers.file)!r}: {key} is of no adapted layer and of no module in modules_to_save")
        _check_finite(layers, key)
        name = base.find(key) or key
        output = _as_it_is(adapter.state.file, adapter.state.stored_name(key), dtype)
        if name in base.tensors:
            stored = base.tensors[name].tensors[name]
            if output.entry.shape != stored.shape:
                raise ValueError(
                    f"{str(layers.file)!r}: {key} has shape {output.entry.shape}, expected the base's {stored.shape}: "
                    "is it of another model?"
                )
            if output.entry.dtype != stored.dtype and not _are_numbers(output.entry, stored):
                raise ValueError(
                    f"{str(layers.file)!r}: {key} is of {output.entry.dtype}, expected the base's {stored.dtype}"
                )
            output = output._replace(dtype=_as_it_is(base.tensors[name], name, dtype).dtype)
        found.append((name, output, next(reversed(base.files))))
    return found


def _are_numbers(*entries: StoredTensor) -> bool:
    return all(DTYPES.get(entry.dtype) in SUPPORTED_DTYPES for entry in entries)


def _check_finite(layers: SavedLayers, key: str) -> None:
    """Raise ValueError for NaN and infinity in a tensor of a module that an adapter has whole; read in pieces."""
    assert isinstance(layers.adapter.state, LazyTensors)
    file, stored, entry = (
        layers.adapter.state.file,
        layers.adapter.state.stored_name(key),
        layers.adapter.state.entry(key),
    )
    if not _are_numbers(entry):
        return
    step = piece_rows(entry, _AT_A_TIME) if entry.shape else 1
    for start in range(0, entry.shape[0] if entry.shape else 1, step):
        part = file.read_rows(stored, start, min(start + step, entry.shape[0])) if entry.shape else file.read(stored)
        check_finite(f"{str(layers.file)!r}: {key}", part)


def _config(config: Mapping[str, Any], dtype: torch.dtype | None, unties: bool) -> dict[str, Any] | None:
    """The base's config.json with what merging changes; None where that is nothing."""
    if not config or (dtype is None and not unties):
        return None
    changed = copy.deepcopy(dict(config))
    inner = [changed, *(part for part in changed.values() if isinstance(part, dict))]
    if dtype is not None:
        for part in inner:
            for key in ("dtype", "torch_dtype"):
                if isinstance(part.get(key), str):
                    part[key] = str(dtype).removeprefix("torch.")
        if not {"dtype", "torch_dtype"} & changed.keys():
            changed["torch_dtype"] = str(dtype).removeprefix("torch.")  # the name that every version reads
    if unties:
        changed["tie_word_embeddings"] = False
        for part in inner[1:]:
            if part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
    return changed


def _index(base: BaseCheckpoint, shards: Mapping[str, Mapping[str, Output]]) -> dict[str, Any] | None:
    if base.index is None:
        return None
    total = sum(output.nbytes for outputs in shards.values() for output in outputs.values())
    metadata = base.index.get("metadata")
    metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
    if isinstance(metadata.get("total_parameters"), int):
        metadata["total_parameters"] += sum(
            math.prod(output.entry.shape)
            for outputs in shards.values()
            for name, output in outputs.items()
            if name not in base.tensors
        )
    weights = {name: file for file, outputs in shards.items() for name in outputs}
    return {
        **base.index,
        "metadata": metadata,
        "weight_map": dict(sorted(weights.items())),
    }
