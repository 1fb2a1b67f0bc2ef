"""What transformers keeps on a model that it quantised: the dtype to dequantise to, and the configuration to forget."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from .layers import is_quantised, plain_layer, quantised_weight, why_not_readable

_logger = logging.getLogger("dual_lora_kernels")


def dequantised_dtypes(model: nn.Module, dtype: torch.dtype | None) -> dict[int, torch.dtype | None]:
    """The dtype that transformers' quantised models within `model` get when they are dequantised.

    By the identity of each of their modules: `dtype` if it is given, else their configuration's. Asked before they
    forget their quantisation.
    """
    own: dict[int, torch.dtype | None] = {}
    for inner in model.modules():
        if getattr(inner, "hf_quantizer", None) is not None:
            own |= dict.fromkeys(map(id, inner.modules()), _config_dtype(inner) if dtype is None else dtype)
    return own


def _config_dtype(model: nn.Module) -> torch.dtype | None:
    dtype = getattr(model.config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def let_trainer_train(model: nn.Module) -> None:
    """Mark transformers' quantised models within `model` as adapted, without which its Trainer refuses them."""
    for inner in model.modules():
        if getattr(inner, "hf_quantizer", None) is not None:
            inner._hf_peft_config_loaded = True  # type: ignore[assignment]  # an attribute of transformers'


def forget_quantisation(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dequantise what is still quantised in transformers' models within `model`, and let them forget that they were.

    Otherwise ``save_pretrained`` would write the quantisation's configuration, and loading would quantise the merged
    weights anew. transformers' own ``dequantize()`` reads weights wrongly that bitsandbytes has repacked on a CPU.
    """
    for inner in list(model.modules()):
        quantizer = getattr(inner, "hf_quantizer", None)
        if quantizer is None:
            continue
        own = _config_dtype(inner) if dtype is None else dtype
        left = {name: module for name, module in inner.named_modules() if is_quantised(module)}
        unreadable = {name: reason for name, module in left.items() if (reason := why_not_readable(module))}
        readable = [name for name in left if name not in unreadable]
        for name in readable:
            weight = quantised_weight(left[name]).dequantised()
            inner.set_submodule(name, plain_layer(left[name], weight if own is None else weight.to(own)))
        if readable:
            _logger.info("dequantised %d layers without adapters: %s, …", len(readable), readable[0])
        inner._hf_peft_config_loaded = False  # type: ignore[assignment]  # transformers'
        if unreadable:
            name, reason = next(iter(unreadable.items()))
            _logger.warning(
                "%d layers stay quantised, and so does the model: saved and loaded, its merged weights would be "
                "quantised anew. %s: %s",
                len(unreadable), name, reason,
            )  # fmt: skip
            continue
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            if flag in vars(inner):
                setattr(inner, flag, False)
        quantizer.remove_quantization_config(inner)
        if own is not None:
            _cast_rest(inner, own)


def _cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the other floating-point parameters of a model `dtype`, too: mixed ones could not be multiplied.

    PEFT's ``prepare_model_for_kbit_training`` has cast norms and embeddings up. What is rounded is warned of, and what
    transformers loads in fp32 whatever the dtype stays so.
    """
    in_fp32 = [
        *(getattr(model, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or () if dtype.itemsize == 2 else ()),
    ]
    rounded, offloaded = [], []
    for name, parameter in model.named_parameters():
        if parameter.dtype == dtype or not parameter.is_floating_point() or any(part in name for part in in_fp32):
            continue
        if parameter.is_meta:
            offloaded.append(name)
            continue
        other = parameter.detach().to(dtype)
        if not torch.equal(other.to(parameter.dtype), parameter):
            rounded.append(name)
        parameter.data = other
    model.config.dtype = dtype  # type: ignore[union-attr]  # transformers'
    for what, names in (
        ("rounded to %s, as the merged layers are", rounded),
        ("offloaded, and not cast to %s", offloaded),
    ):
        if names:
            _logger.warning(f"{what}: %s", dtype, ", ".join(names[:8]))


def report_compute_dtypes(layers: Iterable[tuple[nn.Module, torch.dtype | None]]) -> None:
    """Log where quantised layers computed in another dtype than their merged weights get.

    The merged weights are then not bit for bit what training used.
    """
    pairs = {(getattr(layer, "compute_dtype", None), dtype) for layer, dtype in layers}
    for own, dtype in pairs:
        if own is not None and dtype is not None and own != dtype:
            _logger.info(
                "merged to %s, while layers computed in %s: their weights in training were rounded to that", dtype, own
            )
