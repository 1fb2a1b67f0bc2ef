"""Dual LoRA layers whose weight is split over a mesh of processes by tensor parallelism.

ΔW is made element by element, so a block of it needs its rows of B and D and its columns of A and C alone, and each
process computes the block that it has, with the bits of the whole:

                          weight, B, D, bias   A, C        X            Y            summed over the mesh in backward
    by rows (column-wise) split by rows        replicated  replicated   split        ∂X; ∂A and ∂C, in one collective
    by columns (row-wise) weight, A, C split   B, D        split        partial sums ∂B and ∂D, in one; in forward Y

H of a block is complete over all tokens of the call, so ``ste="clip"`` clips what the whole layer would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .column_sampling import draw
from .sharding import described, is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .adapter import DualLoraAdapter

ROWS, COLUMNS = 0, 1
"""The dimension of W [out_features, in_features] that is split."""
_SPLIT = ("out_features", "in_features")
_ADVICE = "split by DualLoraColwiseParallel or DualLoraRowwiseParallel, and gathered by fully_shard's hooks in a call"


FourFactors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A, B, C and D."""


class Split(NamedTuple):
    """How tensor parallelism splits a layer: over which mesh, and which dimension of W."""

    mesh: DeviceMesh
    dim: int


def split_of(A: torch.Tensor, B: torch.Tensor) -> Split:
    """How a layer with these factors is split. Raises ValueError where they are not distributed as the table says."""
    from torch.distributed.tensor import Replicate, Shard

    if is_sharded(A) and is_sharded(B) and A.device_mesh == B.device_mesh and A.device_mesh.ndim == 1:
        for dim, placements in ((ROWS, (Replicate(), Shard(0))), (COLUMNS, (Shard(1), Replicate()))):
            if (*A.placements, *B.placements) == placements:
                return Split(A.device_mesh, dim)
    layouts = [described(factor) if is_sharded(factor) else "a plain tensor" for factor in (A, B)]
    raise ValueError(f"factors: got A as {layouts[0]} and B as {layouts[1]}, expected them {_ADVICE}")


def split_of_weight(weight: torch.Tensor, transposed: bool) -> Split:
    """How a base weight is split, which `transposed` has as [in_features, out_features]. ValueError where it is not."""
    from torch.distributed.tensor import Shard

    if is_sharded(weight) and weight.device_mesh.ndim == 1 and isinstance(weight.placements[0], Shard):
        dim = weight.placements[0].dim
        return Split(weight.device_mesh, 1 - dim if transposed else dim)
    layout = described(weight) if is_sharded(weight) else "a plain tensor"
    raise ValueError(f"weight: got {layout}, expected it {_ADVICE}")


def base_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W0ᵀ + b of a layer that is split, [out_features, in_features], without an adapter: a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, dim = split_of_weight(weight, transposed=False)
    if not is_sharded(input):
        input = DTensor.from_local(input, mesh, [Replicate() if dim == ROWS else Shard(-1)], run_check=False)
    return nn.functional.linear(input, weight, bias)


def check_divides(mesh: DeviceMesh, dim: int, features: int, layer: str = "the layer") -> None:
    """Raise ValueError unless `mesh` is one-dimensional and its size divides the features that it splits."""
    if mesh.ndim != 1:
        raise ValueError(f"mesh: got {mesh.ndim} dimensions, expected one, of tensor parallelism: mesh['tp'], say")
    if features % mesh.size():
        raise ValueError(
            f"mesh: got {mesh.size()} processes, expected a number that divides {layer}'s {_SPLIT[dim]}, {features}"
        )


@torch.no_grad()
def split_adapter(adapter: DualLoraAdapter, split: Split, source: int | None = 0) -> None:
    """Distribute the factors of an adapter as a layer that is split so needs them.

    All processes get parts of what the mesh's process `source` has; with None, of what they have themselves.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, dim = split
    for name, own_dim in (("A", COLUMNS), ("B", ROWS), ("C", COLUMNS), ("D", ROWS)):
        factor = getattr(adapter, name)
        placement = Shard(own_dim) if own_dim == dim else Replicate()
        parts = distribute_tensor(factor.detach(), mesh, [placement], src_data_rank=source)
        setattr(adapter, name, nn.Parameter(parts, requires_grad=factor.requires_grad))


def linear(
    compute: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor | None,
    factors: FourFactors,
    bias: torch.Tensor | None,
    sample_size: int | None = None,
) -> torch.Tensor:
    """The layer on this process's block: a DTensor, split by its last dimension or of partial sums.

    `compute(input, weight, factors, bias, origin)` does so with plain tensors. With a `sample_size`, the whole layer's,
    it also gets random numbers by which to sample the block's columns, on which all processes agree. `input` is a
    DTensor, or a plain tensor: the whole one for a layer split by rows, this process's part for one split by columns.
    Raises ValueError where input, weight or bias are not distributed as the factors need.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    A, B, C, D = factors
    mesh, dim = split_of(A, B)
    _check_parts(weight, bias, mesh, dim)
    wanted = Replicate() if dim == ROWS else Shard(-1)
    if not is_sharded(input):
        _check_width(input, A, mesh, dim)
        input = DTensor.from_local(input, mesh, [wanted], run_check=False)
    elif input.device_mesh != mesh:
        raise ValueError(f"input: got a DTensor over {input.device_mesh}, expected one over {mesh}, as the factors are")
    x = input.redistribute(placements=[wanted]).to_local(grad_placements=[Partial()] if dim == ROWS else None)
    first = mesh.get_local_rank()  # of equal parts: see check_divides
    whole = A.shape[1]
    if dim == ROWS:
        (A, C), B, D = _Replicated.apply(mesh, A, C), _local(B), _local(D)
        origin = first * B.shape[0], 0
    else:
        (B, D), A, C = _Replicated.apply(mesh, B, D), _local(A), _local(C)
        origin = 0, first * A.shape[1]
    if bias is not None:
        bias = _local(bias) if dim == ROWS else _added_once(bias, mesh)
    draws = () if sample_size is None else (_common_draws(A, sample_size, whole, mesh),)
    y = compute(x, None if weight is None else _local(weight), (A, B, C, D), bias, origin, *draws)
    return DTensor.from_local(y, mesh, [Shard(-1) if dim == ROWS else Partial()], run_check=False)


class _Replicated(torch.autograd.Function):
    """Replicated parameters as plain tensors; their gradients, partial sums, are summed in one collective."""

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.mesh = mesh
        return tuple(_local(parameter).view(parameter.shape) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        import torch.distributed as dist
        from torch.distributed.tensor import DTensor, Replicate

        needs = ctx.needs_input_grad[1:]
        partial = [grad for grad, needed in zip(grads, needs, strict=True) if needed]
        flat = torch.cat([grad.flatten() for grad in partial])
        dist.all_reduce(flat, group=ctx.mesh.get_group())
        sums = iter(flat.split([grad.numel() for grad in partial]))
        return None, *(
            DTensor.from_local(next(sums).view(grad.shape), ctx.mesh, [Replicate()], run_check=False)
            if needed
            else None
            for grad, needed in zip(grads, needs, strict=True)
        )


def _common_draws(A: torch.Tensor, sample_size: int, in_features: int, mesh: DeviceMesh) -> torch.Tensor:
    """What `draw` gives the mesh's first process for a block's part of a sample of the layer's `in_features`.

    Processes with all of X's columns sample the same ones by it, as a layer that is not split would.
    """
    from torch.distributed import _functional_collectives as collectives

    draws = draw(max(1, round(sample_size * A.shape[1] / in_features)), A.device)
    shared: torch.Tensor = collectives.wait_tensor(collectives.broadcast(draws, 0, mesh.get_group()))
    return shared


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _added_once(bias: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor | None:
    """The bias in the mesh's first process alone: the partial sums are added up afterwards."""
    is_first = mesh.get_local_rank() == 0
    if not bias.requires_grad:
        return _local(bias) if is_first else None
    (whole,) = _Replicated.apply(mesh, bias)
    own: torch.Tensor = whole
    # Every process takes part in the sum of its gradient. No product with 0, which makes NaN of infinity.
    return own if is_first else own.masked_fill(torch.ones_like(own, dtype=torch.bool), 0)


def _check_parts(weight: torch.Tensor | None, bias: torch.Tensor | None, mesh: DeviceMesh, dim: int) -> None:
    """Raise ValueError unless weight and bias are distributed as a layer that is split so needs them."""
    from torch.distributed.tensor import Replicate, Shard

    for name, tensor, placement in (
        ("weight", weight, Shard(dim)),
        ("bias", bias, Shard(0) if dim == ROWS else Replicate()),
    ):
        if tensor is None:
            continue
        if not is_sharded(tensor) or tensor.device_mesh != mesh or tensor.placements != (placement,):
            layout = described(tensor) if is_sharded(tensor) else "a plain tensor"
            raise ValueError(f"{name}: got {layout}, expected {placement} over {mesh}, as the factors need")


def _check_width(input: torch.Tensor, A: torch.Tensor, mesh: DeviceMesh, dim: int) -> None:
    """Raise ValueError unless a plain input is the whole one, or this process's part, whichever the layer takes."""
    expected = A.shape[1] if dim == ROWS else _local(A).shape[1]
    if input.dim() == 0 or input.shape[-1] != expected:
        part = "" if dim == ROWS else f", a {mesh.size()}th of in_features = {A.shape[1]}: this layer is row-wise"
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected [..., {expected}]{part}")
