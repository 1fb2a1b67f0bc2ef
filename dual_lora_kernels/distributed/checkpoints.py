"""Checkpoints of a training run: what trains and its optimiser, whole or not there, for any number of processes.

They are PyTorch's distributed checkpoints: every process writes its own parts, and another layout reads them. They hold
the adapter, not the base model.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .. import automatic_warmup
from ..adapter import dual_lora_adapters, plain_name, unwrapped
from ..adapter_state import SAVED_TENSORS, check_tensor_gathered, saved_modules
from ..sharding import copy_into, reshard
from ..validation import check_positive_int
from .processes import in_rank_0

_logger = logging.getLogger("dual_lora_kernels")
_NAME = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished"
_OLD = f".old{_UNFINISHED}"


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    stateful: Mapping[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Write ``folder/step-<step>``, remove all but the `keep` newest, and return its path.

    All processes have to call this; `folder` is one that all of them see. The checkpoint gets its name once every
    process has written its part, so a process that dies meanwhile leaves the earlier ones, and a ``.unfinished`` folder
    that the next call removes. It has each process's random state of PyTorch, too.

    Args:
        folder: of this run's checkpoints alone: the newest is the one of the highest step. Made if need be.
        step: optimiser steps so far.
        model: what of it trains is saved, and the scales of its adapters (of either door).
        optimizer: saved by parameters' names.
        stateful: objects with ``state_dict`` and ``load_state_dict`` by name: a scheduler, a sampler.
        keep: checkpoints left, this one included.

    Raises:
        ValueError, TypeError: `step` or `keep` is no positive integer; nothing of `model` trains; DeepSpeed's ZeRO-3 or
            FSDP1 keeps it in parts, and has checkpoints of its own; `optimizer` holds other parameters than the
            model's; one of `stateful` lacks a method.
        OSError: the folder cannot be written.
    """
    folder, step, keep = Path(folder), check_positive_int("step", step), check_positive_int("keep", keep)
    state = _state(model, optimizer, stateful)
    target = folder / f"step-{step:08d}"
    unfinished = target.with_suffix(_UNFINISHED)
    in_rank_0(lambda: _clear(folder))
    save(state | {"random": _random_states()}, checkpoint_id=str(unfinished))
    in_rank_0(lambda: _finish(unfinished, target, keep))
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, the same for all processes; None if there is none."""
    finished: list[Path] = []
    in_rank_0(lambda: finished.extend(_finished(Path(folder))))
    newest: list[Path | None] = [finished[-1] if finished else None]
    if dist.is_initialized():
        dist.broadcast_object_list(newest, src=0)
    return newest[0]


def load_checkpoint(
    checkpoint: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    stateful: Mapping[str, Any] | None = None,
) -> int:
    """Load what `save_checkpoint` wrote, and return its step. Arguments as there.

    The model has to be adapted, and sharded, before; it may be sharded otherwise than when it was saved. All processes
    have to call this. A process gets the random state of PyTorch that the one of its rank had, if there was one.

    Raises:
        ValueError: `checkpoint` is no finished checkpoint, or lacks something of the model, or has it in other shapes.
    """
    if checkpoint is None:
        raise ValueError("checkpoint: got None, expected a folder: latest_checkpoint found none")
    checkpoint = Path(checkpoint)
    match = _NAME.fullmatch(checkpoint.name)
    if match is None or not (checkpoint / ".metadata").is_file():
        raise ValueError(f"checkpoint: got {str(checkpoint)!r}, expected a folder that save_checkpoint has finished")
    state = _state(model, optimizer, stateful)
    saved = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    _check_fits(checkpoint, saved, state["model"])
    random = {name: each for name, each in _random_states().items() if f"random.{name}" in saved}
    state["model"] = {name: tensor.clone() for name, tensor in state["model"].items()}  # loading may fail
    try:
        load(state | {"random": random}, checkpoint_id=str(checkpoint))
    except CheckpointException as error:
        reason = next(iter(error.failures.values()), (error,))[0]
        raise ValueError(f"checkpoint: got {str(checkpoint)!r}, which does not fit: {reason}") from error
    if optimizer is not None:
        set_optimizer_state_dict(unwrapped(model), optimizer, state["optimizer"])
    own = _trained(model)
    for name, tensor in state["model"].items():
        copy_into(own[name], tensor)
    for _, adapter in dual_lora_adapters(model):
        automatic_warmup.resume(adapter)
    for name, random_state in random.items():
        torch.cuda.set_rng_state(random_state) if name.endswith("cuda") else torch.set_rng_state(random_state)
    step = int(match.group(1))
    _logger.info("loaded step %d from %s", step, checkpoint)
    return step


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, stateful: Mapping[str, Any] | None
) -> dict[str, Any]:
    trained = _trained(model)
    if not any(tensor.requires_grad for tensor in trained.values()):
        raise ValueError(f"model: got a {type(model).__name__} of which nothing trains, expected an adapted model")
    for name, each in (stateful or {}).items():
        if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
            raise TypeError(f"stateful[{name!r}]: got {type(each).__name__}, expected state_dict and load_state_dict")
    if optimizer is not None:
        known = set(map(id, unwrapped(model).parameters()))
        if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "optimizer: got one with other parameters than the model's, expected one that was made after the model "
                "was adapted and spread"
            )
    state: dict[str, Any] = {"model": {name: tensor.detach() for name, tensor in trained.items()}}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(unwrapped(model), optimizer)
    return state | {f"stateful.{name}": each for name, each in (stateful or {}).items()}


def _random_states() -> dict[str, torch.Tensor]:
    """PyTorch's random state in this process, of the CPU and of its GPU, by rank and device."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    states = {f"rank{rank}_cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"rank{rank}_cuda"] = torch.cuda.get_rng_state()
    return states


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What of a model trains, its adapters, and modules saved whole, by name."""
    inner = unwrapped(model)
    reshard(inner)
    state: dict[str, torch.Tensor] = {
        plain_name(name): parameter for name, parameter in inner.named_parameters() if parameter.requires_grad
    }
    for name, module in saved_modules(inner):
        state |= {f"{name}.{plain_name(key)}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    for prefix, adapter in dual_lora_adapters(inner):
        for tensor_name in SAVED_TENSORS:
            state[f"{prefix}.{tensor_name}".lstrip(".")] = getattr(adapter, tensor_name)
    for name, tensor in state.items():
        check_tensor_gathered(name, tensor)
    return state


def _check_fits(checkpoint: Path, saved: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless the checkpoint with the metadata `saved` has what the model has, in its shapes."""
    for name, tensor in state.items():
        entry = saved.get(f"model.{name}")
        shape = None if entry is None else tuple(getattr(entry, "size", ()))
        if shape != tuple(tensor.shape):
            has = "nothing" if shape is None else f"shape {shape}"
            raise ValueError(
                f"checkpoint: got {str(checkpoint)!r}, which has {has} for {name}, expected {tuple(tensor.shape)}: it "
                "was saved with other ranks or of another model"
            )


def _finished(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest last."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / ".metadata").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _clear(folder: Path) -> None:
    """Make the folder, and remove what was not finished; a checkpoint that was about to be replaced is put back."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"step-*{_OLD}"):
        before = old.with_suffix("").with_suffix("")
        if not before.exists():
            os.replace(old, before)
    for path in folder.glob(f"step-*{_UNFINISHED}"):
        shutil.rmtree(path)


def _finish(unfinished: Path, target: Path, keep: int) -> None:
    if target.exists():  # a run that went back
        os.replace(target, target.with_suffix(_OLD))
    os.replace(unfinished, target)
    _clear(target.parent)
    for path in _finished(target.parent)[:-keep]:
        if path != target:
            shutil.rmtree(path)
