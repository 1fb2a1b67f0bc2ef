"""What of a model is its adapter: the tensors of the adapted layers, and modules that are trained and saved whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .adapter import FACTOR_NAMES, plain_modules, plain_name
from .adapter_files import Adapter, layer_config
from .linear import dual_lora_layers, layers_to
from .sharding import check_gathered, full, is_first, is_sharded, reshard
from .validation import SUPPORTED_DTYPES, check_finite

SAVED_TENSORS = (*FACTOR_NAMES, "scale")
_MARK = "_saved_with_dual_lora"
"""The attribute of modules that `DualLoraConfig.modules_to_save` names; copies and pickles of a model keep it."""


def mark_as_saved(module: nn.Module, saved: bool = True) -> None:
    """Let `module` be trained and saved whole, or not any more."""
    if saved:
        setattr(module, _MARK, True)
        module.requires_grad_(True)
    elif _MARK in vars(module):
        delattr(module, _MARK)


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that is saved whole, each once, without wrappers' names."""
    return ((name, module) for name, module in plain_modules(model) if _MARK in vars(module))


def dual_lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors alone, detached, not copied: what `save_dual_lora` saves.

    These are ``<layer>.A``, ``.B``, ``.C``, ``.D`` and ``.scale`` of each adapted layer, and the state of the modules
    that `DualLoraConfig.modules_to_save` names. Sharded ones are DTensors; do not call it within a forward pass of
    ``fully_shard``'s, which it would take the gathered ones from. Raises ValueError where the model has no Dual LoRA
    layers, or where DeepSpeed's ZeRO-3 or FSDP1 keeps them in parts.
    """
    reshard(model)
    state = adapter_tensors(model)
    for name, tensor in state.items():
        check_tensor_gathered(name, tensor)
    return {name: tensor.detach() for name, tensor in state.items()}


def check_tensor_gathered(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a tensor of an adapter that an engine keeps in parts: see `check_gathered`."""
    check_gathered(f"model: {name}", tensor, 2 if name.rpartition(".")[2] in FACTOR_NAMES else None)


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `dual_lora_state_dict` returns, as the model has it: parameters and buffers."""
    state = {
        f"{name}.{tensor}": getattr(layer, tensor)
        for name, layer in layers_to("save", model, "save_pretrained()")
        for tensor in SAVED_TENSORS
    }
    for name, module in saved_modules(model):
        state |= {f"{name}.{plain_name(key)}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return state


def adapter_of(model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None) -> Adapter:
    """The adapter of `model`, to be saved. `state_dict`: the model's, where its own tensors are sharded, say.

    Sharded tensors are gathered one by one, so all processes have to call this; the first one alone keeps them, and the
    others get an adapter without tensors. Raises ValueError where there is none, or where it holds what could not be
    loaded: see `check_value`.
    """
    given = {plain_name(name): tensor for name, tensor in (state_dict or {}).items()}
    reshard(model)
    own = adapter_tensors(model)
    missing = [name for name, tensor in own.items() if name not in given and is_sharded(tensor)]
    if state_dict is not None and missing:  # other processes, which were given none, do not help to gather it
        raise ValueError(f"state_dict: got none of {missing[0]}, which is sharded, expected the whole model's")
    state = {name: given.get(name, tensor) for name, tensor in own.items()}
    keeps = is_first(state.values())
    for name, tensor in list(state.items()):
        check_tensor_gathered(name, tensor)
        whole = full(tensor.detach())
        check_value("model", name, whole, whole.dtype)
        if not keeps:
            del state[name]
        else:
            state[name] = whole.cpu() if is_sharded(tensor) else whole
    configs = {name: layer_config(layer) for name, layer in dual_lora_layers(model)}
    # A module that is saved whole can have one tensor under two names.
    seen: set[int] = set()
    for name, tensor in state.items():
        dense = tensor.contiguous()
        state[name] = dense.clone() if dense.data_ptr() in seen else dense
        seen.add(dense.data_ptr())
    return Adapter(configs, state, tuple(name for name, _ in saved_modules(model)))


def check_value(argument: str, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless `value` holds finite numbers that `dtype` can hold too, or integers of that dtype."""
    if value.is_meta:
        raise ValueError(f"{argument}: {name} is on the meta device, expected a tensor with values")
    if not dtype.is_floating_point and value.dtype == dtype:  # a buffer of a module that is saved whole
        return
    if value.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(map(str, SUPPORTED_DTYPES))
        raise ValueError(f"{argument}: {name} is of {value.dtype}, expected one of {supported}")
    check_finite(f"{argument}: {name}", value)
    if value.dtype != dtype:
        check_finite(f"{argument}: {name} in the model's {dtype}", value.to(dtype))
