"""Parallel styles for ``parallelize_module``: PyTorch's own serve ``nn.Linear`` and ``nn.Embedding`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from ..adapter import DualLoraAdapter, dual_lora_adapters
from ..linear import DualLoraLinear
from ..model import check_not_distributed
from ..sharding import is_sharded
from ..tensor_parallel import COLUMNS, ROWS, Split, check_divides, split_adapter


class _DualLoraParallel(ParallelStyle):
    """A style that splits one dimension of W."""

    dim: int

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or (Replicate() if self.dim == ROWS else Shard(-1))
        self.output_layouts = output_layouts or (Shard(-1) if self.dim == ROWS else Replicate())
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        why = why_not_parallel(module)
        if why is not None:
            raise TypeError(f"module: got {type(module).__name__}, expected an adapted linear layer: {why}")
        base, adapters = parts_of(module)
        check_divides(device_mesh, self.dim, (base.out_features, base.in_features)[self.dim])
        for adapter in adapters:
            split_adapter(adapter, Split(device_mesh, self.dim), self.src_data_rank)
        self._split_base(base, device_mesh, bool(getattr(module, "transposed", False)))
        module.register_forward_pre_hook(lambda _, args: self._prepare_input(args, device_mesh))
        module.register_forward_hook(lambda _, __, output: self._prepare_output(output))
        return module

    def _split_base(self, base: nn.Module, mesh: DeviceMesh, transposed: bool) -> None:
        for name in ("weight", "bias"):
            parameter = base._parameters.get(name)
            if parameter is None:
                continue
            placement: Placement = Shard(0) if self.dim == ROWS else Replicate()
            if name == "weight":
                placement = Shard(1 - self.dim if transposed else self.dim)
            parts = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=self.src_data_rank)
            base.register_parameter(name, nn.Parameter(parts, requires_grad=parameter.requires_grad))

    def _prepare_input(self, args: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
        """Say how a plain input is distributed. The layer does the rest, and takes a plain one for what it wants."""
        wanted = Replicate() if self.dim == ROWS else Shard(-1)
        if self.input_layouts == wanted:
            return args
        if not args:
            raise TypeError("input: got it by keyword, expected it as the first argument, as its layout is stated")
        if is_sharded(args[0]):
            return args
        return DTensor.from_local(args[0], mesh, [self.input_layouts], run_check=False), *args[1:]

    def _prepare_output(self, output: DTensor) -> torch.Tensor:
        output = output.redistribute(placements=[self.output_layouts])
        return output.to_local() if self.use_local_output else output


class DualLoraColwiseParallel(_DualLoraParallel):
    """``ColwiseParallel`` for an adapted layer: W, B, D and the bias are split by rows, A and C are replicated.

    Args: as of PyTorch's ``ColwiseParallel``.

    Raises (from ``parallelize_module``):
        TypeError: the module is no adapted linear layer, or a quantised one.
        ValueError: the mesh has several dimensions, or its size does not divide out_features.
    """

    dim = ROWS


class DualLoraRowwiseParallel(_DualLoraParallel):
    """``RowwiseParallel`` for an adapted layer: W, A and C are split by columns, B, D and the bias are replicated.

    Args: as of PyTorch's ``RowwiseParallel``. Raises as `DualLoraColwiseParallel`, for in_features.
    """

    dim = COLUMNS


def parallelize_dual_lora(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: Mapping[str, ParallelStyle | str] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """``parallelize_module`` of an adapted model, by a plan that was written for the model without adapters.

    Args:
        model: with Dual LoRA layers, of either door. It is changed in place.
        mesh: one-dimensional: ``mesh["tp"]`` of a larger one.
        plan: styles by module names, with ``*`` for any part, as ``parallelize_module`` takes them; ``"colwise"`` and
            ``"rowwise"`` stand for PyTorch's own. Their counterparts here take an adapted layer's place. Default: the
            plan that a transformers model comes with, as far as it is column-wise and row-wise.
        src_data_rank: the process of the mesh that all others get their values from; None: each uses its own.

    Returns:
        `model`.

    Raises:
        ValueError: there is no plan; a name matches no module; the mesh has several dimensions, or its size does not
            divide what a layer splits, or the heads; the model is in the hands of DDP or ``fully_shard`` already.
        TypeError: an argument is of another type, or a style does not fit its module. Nothing has been changed in
            either case.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: got {mesh!r}, expected a DeviceMesh of one dimension")
    if plan is not None and not isinstance(plan, Mapping):
        raise TypeError(f"plan: got {type(plan).__name__}, expected styles by module names")
    check_not_distributed(model)
    inner = model
    if plan is None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # PEFT's
        plan = {name: style for name, style in (getattr(inner, "tp_plan", None) or {}).items() if style in _NAMED}
        _check_heads(inner, mesh)
    if not plan:
        raise ValueError("plan: got none, and the model brings none; expected styles by module names")
    styles = {}
    modules = dict(inner.named_modules())
    for pattern, given in plan.items():
        style = _NAMED[given]() if isinstance(given, str) and given in _NAMED else given
        if not isinstance(style, ParallelStyle):
            raise TypeError(f"plan[{pattern!r}]: got {given!r}, expected a ParallelStyle, 'colwise' or 'rowwise'")
        named = [name for name in modules if _matches(pattern, name)]
        if not named:
            raise ValueError(f"plan: got {pattern!r}, which matches no module of {type(inner).__name__}")
        for name in named:
            styles[name] = _suited(name, modules[name], style, mesh)
    parallelize_module(inner, mesh, styles, src_data_rank=src_data_rank)
    return model


def _check_heads(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise ValueError where a transformers model's own plan would cut through an attention head."""
    for option in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(getattr(model, "config", None), option, None)
        if isinstance(heads, int) and heads % mesh.size():
            raise ValueError(f"mesh: got {mesh.size()} processes, expected a number that divides {option}, {heads}")


_NAMED = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def _matches(pattern: str, name: str) -> bool:
    """As ``parallelize_module``: part by part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _suited(name: str, module: nn.Module, style: ParallelStyle, mesh: DeviceMesh) -> ParallelStyle:
    """The style for a module, checked: this package's in place of PyTorch's for adapted layers."""
    if not any(True for _ in dual_lora_adapters(module)):
        if isinstance(style, _DualLoraParallel):
            raise TypeError(f"plan: got {type(style).__name__} for {name}, a {type(module).__name__} without adapter")
        if isinstance(style, ColwiseParallel | RowwiseParallel) and not isinstance(module, nn.Linear | nn.Embedding):
            raise TypeError(
                f"plan: got {type(style).__name__} for {name}, a {type(module).__name__}, expected it for linear "
                "layers and embeddings"
            )
        return style
    if isinstance(style, ColwiseParallel | RowwiseParallel):
        own = DualLoraColwiseParallel if isinstance(style, ColwiseParallel) else DualLoraRowwiseParallel
        style = own(
            input_layouts=style.input_layouts[0],
            output_layouts=style.output_layouts[0],
            use_local_output=style.use_local_output,
        )
    if isinstance(style, _DualLoraParallel):
        why = why_not_parallel(module)
        if why is not None:
            raise TypeError(f"plan: got {type(style).__name__} for {name}: {why}")
        base, _ = parts_of(module)
        check_divides(mesh, style.dim, (base.out_features, base.in_features)[style.dim], name)
    return style


def why_not_parallel(module: nn.Module) -> str | None:
    """Why a module cannot be split by the styles of this file; None if it can."""
    if not isinstance(module, DualLoraLinear) and not hasattr(module, "dual_adapter"):
        return "it is no adapted layer itself"
    base, adapters = parts_of(module)
    if not isinstance(base._parameters.get("weight"), nn.Parameter) or not base.weight.is_floating_point():  # type: ignore[operator, union-attr]
        return "its weight is quantised, whose blocks tensor parallelism would cut"
    if any(map(is_sharded, (*base.parameters(recurse=False), *(adapter.A for adapter in adapters)))):
        return "it has been sharded already"
    if isinstance(module, DualLoraLinear) and module.merged:
        return "it is merged: call unmerge() first"
    return None


def parts_of(module: nn.Module) -> tuple[Any, list[DualLoraAdapter]]:
    """(what holds the base weight, the adapters) of an adapted layer of either door."""
    if isinstance(module, DualLoraLinear):
        return module, [module]
    return module.base_layer, list(module.dual_adapter.values())  # type: ignore[union-attr, operator, arg-type]
