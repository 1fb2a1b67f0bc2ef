"""Finding the layers that a configuration names in a model."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .adaptable import is_linear, is_pefts, why_not_adaptable
from .config import ALL_LINEAR
from .validation import overlaps_itself

_logger = logging.getLogger("dual_lora_kernels")
_HEADS = ("classifier", "score")
"""Names of classification heads in the models that keep no backbone apart; PEFT's list begins with them."""
_MOST_NAMED = 12
"""How many candidates an error message lists."""


def find_targets(
    model: nn.Module, targets: str | Sequence[str], excluded: Sequence[str] = (), whole: Iterable[str] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to adapt, by name, and the reasons why ``"all-linear"`` leaves others alone, by name.

    `whole`: full names of modules that are trained whole; nothing in them is a target. A module that occurs at several
    places in the model is returned under each of its names. Raises ValueError if no layer matches, if a listed name
    matches no layer, if a layer that is asked for by name cannot be adapted, or if PEFT has adapted the model.
    """
    _refuse_peft(model)
    modules = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and not any(names_it(target, name) for target in excluded)
        and not any(f"{name}.".startswith(f"{module}.") for module in whole)
    }
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    if targets == ALL_LINEAR:
        refused = why_not_suited(model, linears)
        chosen = {name: module for name, module in linears.items() if name not in refused}
        if not chosen:
            why = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "it has no linear layers"
            raise ValueError(f"target_modules: got {targets!r}, which matches nothing in {type(model).__name__}: {why}")
        return chosen, refused

    if isinstance(targets, str):
        chosen = {name: module for name, module in modules.items() if re.fullmatch(targets, name)}
        unmatched = [] if chosen else [targets]
    else:
        hits = {t: [name for name in modules if names_it(t, name)] for t in targets}
        unmatched = [target for target, names in hits.items() if not names]
        chosen = {name: modules[name] for names in hits.values() for name in names}
    if unmatched:
        raise ValueError(
            f"target_modules: got {unmatched}, expected names in {type(model).__name__}, which has {_named(linears)}"
        )
    bypassed = _bypassed_by_a_fused_path(model)
    for name, module in chosen.items():
        reason = _why_not(module, bypassed)
        if reason is not None:
            raise ValueError(f"target_modules: {name!r} cannot be adapted: {reason}")
    return chosen, {}


def find_whole(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules of `DualLoraConfig.modules_to_save`, by full name.

    Raises ValueError if a name matches none, or a module whose weight is tied to another's: it would train both, and
    the adapter's file would not say so.
    """
    if names is None:
        return _new_head(model)
    modules = {name: module for name, module in model.named_modules() if name}
    found = {target: [name for name in modules if names_it(target, name)] for target in names}
    missing = [target for target, hits in found.items() if not hits]
    if missing:
        raise ValueError(f"modules_to_save: got {missing}, expected names of modules in {type(model).__name__}")
    whole = {name: modules[name] for hits in found.values() for name in hits}
    refuse_tied("modules_to_save", model, whole)
    return whole


def refuse_tied(argument: str, model: nn.Module, whole: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a module that is to be trained whole shares a parameter with one outside of it."""
    for name, module in whole.items():
        if _is_tied(model, module):
            raise ValueError(
                f"{argument}: {name!r} has a weight that is tied to another module's; expected one of its own: load "
                "the model with tie_word_embeddings=False, or use PEFT, which trains a copy"
            )


def _is_tied(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` shares a parameter, or its memory, with a module of `model` outside of it."""
    outside = [
        tensor
        for other in _without(model, module)
        for tensor in (*other._parameters.values(), *other._buffers.values())
        if tensor is not None
    ]
    identities = {id(tensor) for tensor in outside}
    ranges = [_memory(tensor) for tensor in outside if _is_addressed(tensor)]
    for parameter in module.parameters():
        if id(parameter) in identities:
            return True
        if _is_addressed(parameter):
            device, start, end = _memory(parameter)
            if any(other == device and start < its_end and its_start < end for other, its_start, its_end in ranges):
                return True
    return False


def _without(model: nn.Module, module: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` that can be reached past `module`; parts of it, too, that another module has as well."""
    if model is not module:
        yield model
        for child in model.children():
            yield from _without(child, module)


def _new_head(model: nn.Module) -> dict[str, nn.Module]:
    """What transformers puts on a backbone to classify and the like: usually new, so it is no use frozen.

    A language model's head is an output embedding, and not new. Parts that are tied to others (detection models share
    their heads among layers) stay frozen; the log names them.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or output is not None:
        return {}
    backbone = model._modules.get(prefix)
    heads = {
        name: child
        for name, child in model.named_children()
        if (name in _HEADS if backbone is None else child is not backbone) and any(True for _ in child.parameters())
    }
    tied = [name for name, head in heads.items() if _is_tied(model, head)]
    if tied:
        _logger.warning("not trained: %s, whose weights are tied to other modules'", ", ".join(tied))
    return {name: head for name, head in heads.items() if name not in tied}


def _refuse_peft(model: nn.Module) -> None:
    """PEFT's adapters and prompt encoders have linear layers, which would be taken for the model's own."""
    found = {name: type(module).__name__ for name, module in model.named_modules() if is_pefts(module)}
    if found:
        name = max(found, key=lambda name: name.count("."))  # its wrappers say less than an adapted layer
        raise ValueError(
            f"model: got {type(model).__name__}, whose {name!r} is PEFT's ({found[name]}), expected one without other "
            "adapters: call merge_and_unload(), unload() or, for prompts, get_base_model() first"
        )


def names_it(target: str, name: str) -> bool:
    """Whether a listed target is a layer's full name or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that more than one module of `model` owns, or that share memory.

    Tied weights are one parameter at first, but ``load_state_dict(assign=True)`` turns them into two views of one
    storage. Views that interleave without a common element also count as shared, and so do tensors whose own elements
    overlap.
    """
    tensors = [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    shared = {identity for identity, count in Counter(map(id, tensors)).items() if count > 1}
    addressed = {id(tensor): tensor for tensor in tensors if _is_addressed(tensor)}
    shared |= {identity for identity, tensor in addressed.items() if overlaps_itself(tensor)}
    ranges = sorted((*_memory(tensor), identity) for identity, tensor in addressed.items())
    for index, (device, _, end, identity) in enumerate(ranges):
        for other_device, other_start, _, other in ranges[index + 1 :]:
            if other_device != device or other_start >= end:
                break
            shared |= {identity, other}
    return shared


def _is_addressed(tensor: torch.Tensor) -> bool:
    """Whether the addresses of a tensor's elements can be looked up."""
    if is_lazy(tensor) or tensor.is_meta or type(tensor.data) is not torch.Tensor:
        return False
    return tensor.layout == torch.strided and tensor.numel() > 0


def _memory(tensor: torch.Tensor) -> tuple[str, int, int]:
    """(device, first byte, end) of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.itemsize


def _bypassed_by_a_fused_path(model: nn.Module) -> set[int]:
    """Identities of linear layers whose weight nn.TransformerEncoderLayer reads in eval mode without calling them."""
    encoders = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    return {id(linear) for encoder in encoders for linear in (encoder.linear1, encoder.linear2)}


def why_not_suited(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why ``"all-linear"`` leaves linear layers of `model` alone: a reason for each that it does, by name."""
    shared, bypassed = shared_weights(model), _bypassed_by_a_fused_path(model)
    return {name: reason for name, module in linears.items() if (reason := _unsuited(model, module, shared, bypassed))}


def report_stacked_experts(model: nn.Module) -> None:
    """Log the experts that ``"all-linear"`` leaves out, since they are most of such a model's weights.

    transformers' mixtures of experts keep the weights of all their experts in 3-D tensors.
    """
    found = {
        name: [key for key, parameter in module._parameters.items() if parameter is not None and parameter.dim() == 3]
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() or "expert" in name.rpartition(".")[2].lower()
    }
    experts = {name: tensors for name, tensors in found.items() if tensors}
    if experts:
        name, tensors = next(iter(experts.items()))
        _logger.warning(
            "the experts are not adapted: in %d modules they are one 3-D tensor and no linear layers (%s: %s)",
            len(experts), name, ", ".join(tensors),
        )  # fmt: skip


def _unsuited(model: nn.Module, module: nn.Module, shared: set[int], bypassed: set[int]) -> str | None:
    """Why ``"all-linear"`` leaves a linear layer alone; None if it does not."""
    get_head = getattr(model, "get_output_embeddings", None)
    if callable(get_head) and get_head() is module:
        return "output head"
    if id(module._parameters.get("weight")) in shared:
        return "its weight is tied to another module's"
    return _why_not(module, bypassed)


def _why_not(module: nn.Module, bypassed: set[int]) -> str | None:
    if id(module) in bypassed:
        return "nn.TransformerEncoderLayer's fused inference reads its weight without calling it"
    return why_not_adaptable(module)


def _named(linears: Mapping[str, nn.Module]) -> str:
    if not linears:
        return "no linear layers"
    last_parts = list(Counter(name.rpartition(".")[2] for name in linears))
    more = f" and {len(last_parts) - _MOST_NAMED} more" if len(last_parts) > _MOST_NAMED else ""
    return f"linear layers named {', '.join(last_parts[:_MOST_NAMED])}{more}"
