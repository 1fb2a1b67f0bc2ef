"""Which layers can be adapted, what their weight's orientation is, and why others cannot."""

from __future__ import annotations

import sys
import types

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .adapter import DualLoraAdapter
from .hooks import has_aligning_hook
from .quantised.layers import is_quantised, why_not_readable
from .sharding import described, is_sharded, whole_shape
from .transformers_parallel import rules_of, why_not_split
from .validation import SUPPORTED_DTYPES

_CALL = ("__call__", "_wrapped_call_impl", "_call_impl")
"""The methods of nn.Module between a call and ``forward``."""
_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS = tuple(
    f"_{name}_hooks"
    for name in (
        "forward", "forward_pre", "backward", "backward_pre",
        "state_dict", "state_dict_pre", "load_state_dict_pre", "load_state_dict_post",
    )
)  # fmt: skip


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in_features, out_features]: transformers' Conv1D, as in GPT-2."""
    defining = sys.modules.get("transformers.pytorch_utils")  # who has such a layer has imported it
    return (
        defining is not None and isinstance(module, defining.Conv1D) and type(module).forward is defining.Conv1D.forward
    )


def is_pefts(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, or of a tuner's for PEFT."""
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of some kind, adaptable or not."""
    return isinstance(module, nn.Linear) or is_transposed(module) or is_quantised(module)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an adaptable linear layer."""
    if is_quantised(module):
        return module.in_features, module.out_features  # type: ignore[return-value]  # numbers
    rows, columns = whole_shape(module.get_parameter("weight"))
    return (rows, columns) if is_transposed(module) else (columns, rows)


def why_not_adaptable(module: nn.Module) -> str | None:
    """None if `module` is a linear layer that `DualLoraLinear.from_linear` can stand in for, else the reason.

    Adaptable: ``nn.Linear``, transformers' Conv1D, and subclasses that keep their forward, with a floating-point weight
    of the layer's own and nothing beside weight and bias: what is not understood would be dropped silently. Adaptable
    are also the quantised layers that `quantised_weight` reads; they stay as they are, inside the adapted layer.
    """
    kind = type(module).__name__
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        return f"this {kind}'s {names} is computed by a parametrization, which replacing the layer would drop"
    if isinstance(module, DualLoraAdapter):
        return "it has a Dual LoRA adapter already"
    if is_pefts(module):
        return f"it is PEFT's {kind}, and adapted already"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter would have no effect"
    quantised = is_quantised(module)
    if not (quantised or is_transposed(module)) and not (
        isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ):
        return f"{kind} is not a linear layer with nn.Linear's forward"
    if hasattr(module, "_hf_hook") and not has_aligning_hook(module):
        return (
            f"this {kind} has accelerate's {type(module._hf_hook).__name__}, which replacing it would drop; "
            "remove it by accelerate.hooks.remove_hook_from_module"
        )
    # accelerate leaves the class's own forward on the instance when it takes its hooks off.
    own_forward = types.MethodType(type(module).forward, module)
    replaced = "_old_forward" if has_aligning_hook(module) else "forward"
    rules = rules_of(module)
    if rules is None and vars(module).get(replaced, own_forward) != own_forward:
        return f"this {kind}'s forward was replaced on the instance (unsloth does that)"
    for name in _CALL:
        if name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name):
            return f"{kind}'s {name} is not nn.Module's, and may do more than forward"
    reason = (
        why_not_readable(module) if quantised else _why_not_plain(module, "weight") or _why_not_plain(module, "bias")
    )
    if reason is not None:
        return f"{kind}'s {reason}"
    if quantised:
        if any(getattr(module, name) for name in _CALL_HOOKS):
            return f"this {kind} has hooks, and would not be called any more; register them on the adapted layer"
        return None
    if rules is not None:
        reason = why_not_split(rules, *linear_features(module))
        if reason is not None:
            return f"{kind}: {reason}"
    others = [*module._parameters.keys() - {"weight", "bias"}, *module._buffers, *module._modules]
    if others or type(module).get_extra_state is not nn.Module.get_extra_state:
        return f"{kind} has {', '.join(sorted(others)) or 'extra state'} beside weight and bias"
    if any(getattr(module, name) for name in _HOOKS):
        return f"this {kind} has hooks, which replacing it would drop; register them afterwards"
    return None


def _why_not_plain(module: nn.Module, name: str) -> str | None:
    """None if the weight or bias that `module` computes with is a dense floating-point parameter, else the reason."""
    parameter = module._parameters.get(name)
    if getattr(module, name, None) is not parameter or (name == "weight" and parameter is None):
        return f"{name} is computed, not a parameter (weight_norm?)"
    if parameter is None:
        return None
    if is_lazy(parameter):
        return f"{name} has no shape yet; run it once first"
    shape = whole_shape(parameter)
    fits = len(shape) == 2 if name == "weight" else shape == linear_features(module)[1:]
    if not fits or parameter.dtype not in SUPPORTED_DTYPES:
        return f"{name} is packed or quantised ({parameter.dtype}, shape {tuple(parameter.shape)})"
    if parameter.layout != torch.strided:
        return f"{name} has the layout {parameter.layout}, and is not dense"
    if is_sharded(parameter) and rules_of(module) is None:
        return f"{name} is sharded ({described(parameter)}); adapt the model before parallelize_module and fully_shard"
    if type(parameter.data) is not torch.Tensor and not is_sharded(parameter):
        return f"{name} is a {type(parameter.data).__name__}, a tensor subclass (quantised?)"
    return None
