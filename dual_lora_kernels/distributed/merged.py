"""Merged models from shards: every process merges and writes its own parts, and no process holds the whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ..adapter import plain_name, unwrapped
from ..adapter_state import SAVED_TENSORS
from ..linear import DualLoraLinear, layers_to
from ..quantised_linear import QuantisedDualLoraLinear
from ..sharding import reshard
from .processes import in_rank_0

_MOST_BYTES = 5_000_000_000
"""Of one file; the size that transformers writes."""


@torch.no_grad()
def save_merged(model: nn.Module, folder: str | Path) -> Path:
    """Write the merged model, sharded or not, into `folder` in the format of transformers, and return the folder.

    All processes have to call this; `folder` is one that all of them see. Each merges the part of each weight that it
    holds, with the bits that the whole would get, and writes it; then the first process puts the parts together, a file
    of at most 5 GB at a time. W0 is copied to host memory meanwhile, and is back at the end, so training can go
    on. Weights have the dtype that they have in the model, and the names of the model before it was adapted.

    Raises:
        ValueError: `model` has no Dual LoRA layers, quantised ones or tied ones; `folder` exists; a factor or a merged
            weight would not be finite. Nothing has been changed or written then.
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    reshard(model)
    layers = dict(layers_to("merge", model, "save_pretrained(), and merge the saved adapter into the base model"))
    inner = unwrapped(model)
    shared = [name for name, same in _names(inner).items() if len(same) > 1 and any(n in layers for n in same)]
    for name, layer in layers.items():
        if isinstance(layer, QuantisedDualLoraLinear):
            raise ValueError(f"model: {name} is quantised, expected dense layers: save the adapter, and merge that")
    if shared:
        raise ValueError(f"model: the adapted {shared[0]} is tied to another module, expected a weight of its own")
    in_rank_0(lambda: _check_free(folder))
    for name, layer in layers.items():
        try:
            layer.check_mergeable()
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    in_rank_0(lambda: shutil.rmtree(unfinished, ignore_errors=True))
    with _merged(layers):
        state = _plain_state(inner, layers)
        files = _files(state)
        writer = HuggingFaceStorageWriter(
            str(unfinished), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
        )
        save(state, storage_writer=writer)
    in_rank_0(lambda: _finish(inner, unfinished, folder))
    return folder


@contextmanager
def _merged(layers: Mapping[str, DualLoraLinear]) -> Iterator[None]:
    """With the layers merged, which were not."""
    changed = [layer for layer in layers.values() if not layer.merged]
    try:
        for layer in changed:
            layer.merge()
        yield
    finally:
        for layer in changed:
            if layer.merged:
                layer.unmerge()


def _names(model: nn.Module) -> dict[str, list[str]]:
    """By the first name of every parameter, the modules that own it."""
    owners: dict[int, list[str]] = {}
    first: dict[int, str] = {}
    for wrapped, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(wrapped)
        first.setdefault(id(parameter), name)
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name: owners[identity] for identity, name in first.items()}


def _plain_state(model: nn.Module, layers: Mapping[str, DualLoraLinear]) -> dict[str, torch.Tensor]:
    """The merged model's tensors by the plain model's names, each once: tied ones are tied again when it is loaded."""
    factors = {f"{name}.{tensor}" for name in layers for tensor in SAVED_TENSORS}
    once = {plain_name(name) for name, _ in model.named_parameters()}
    every = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    state = {
        name: tensor.detach()
        for name, tensor in ((plain_name(wrapped), tensor) for wrapped, tensor in model.state_dict().items())
        if name not in factors and (name in once or name not in every)
    }
    return state | {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}


def _files(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The number of the file that each tensor is written to, from 1."""
    files, size, index = {}, 0, 1
    for name, tensor in state.items():
        own = tensor.numel() * tensor.itemsize
        if size and size + own > _MOST_BYTES:
            index, size = index + 1, 0
        files[name], size = index, size + own
    return files


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"folder: got {str(folder)!r}, which exists, expected a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)


def _finish(model: Any, unfinished: Path, folder: Path) -> None:
    """Complete the folder, and give it its name."""
    shutil.rmtree(unfinished / "sharded", ignore_errors=True)
    for settings in ("config", "generation_config"):
        if hasattr(getattr(model, settings, None), "save_pretrained"):
            getattr(model, settings).save_pretrained(unfinished)
    os.replace(unfinished, folder)
