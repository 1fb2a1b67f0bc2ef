"""Tensors of which every process holds a part: PyTorch's DTensors, as tensor parallelism and ``fully_shard`` make them.

Collective, so that every process of the tensor's mesh has to call them: `full`, `copy_into`, `draw_normal`, `agree` and
`in_first`. DeepSpeed's parameters are no DTensors; `whole_shape` and `check_gathered` know of them.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_Value = TypeVar("_Value")


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor, replicated ones included."""
    defining = sys.modules.get("torch.distributed.tensor")  # who has such a tensor has imported it; that takes seconds
    return defining is not None and isinstance(tensor, defining.DTensor)


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's shape; of a parameter that DeepSpeed's ZeRO-3 keeps in parts, and empty meanwhile, the whole's."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def check_gathered(name: str, tensor: torch.Tensor, dim: int | None = None) -> None:
    """Raise ValueError for a parameter that DeepSpeed's ZeRO-3 or FSDP1 keeps in parts at present.

    FSDP1's parts are flat, and known by that alone: `dim` is what a matrix has.
    """
    if tuple(tensor.shape) != whole_shape(tensor) or dim not in (None, tensor.dim()):
        raise ValueError(
            f"{name}: got a parameter of shape {tuple(tensor.shape)}, as DeepSpeed's ZeRO-3 and FSDP1 keep it in parts "
            "between calls, expected the whole: within deepspeed.zero.GatheredParameters(list(model.parameters())) or "
            "FullyShardedDataParallel.summon_full_params(model), in every process"
        )


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; a plain one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_block(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(this process's part, the indices of its first element in the whole tensor); may have no elements."""
    if not is_sharded(tensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # what its checkpoints use

    local = tensor.to_local()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(local.shape) == tuple(shape), f"a part of {tuple(local.shape)}, by the placements {tuple(shape)}"
    return local, tuple(offset)


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole `tensor`, if it were distributed as `like` is."""
    local, offset = local_block(like)
    return tensor[tuple(slice(first, first + size) for first, size in zip(offset, local.shape, strict=True))]


@torch.no_grad()
def copy_into(own: torch.Tensor, value: torch.Tensor) -> None:
    """Give `own` the values of `value`: whole, the same in every process, or distributed in any way."""
    if not is_sharded(own):
        own.copy_(full(value))
    elif is_sharded(value) and value.placements == own.placements and value.device_mesh == own.device_mesh:
        own.to_local().copy_(value.to_local())
    else:
        own.to_local().copy_(part_like(full(value), own))


@torch.no_grad()
def draw_normal(own: torch.Tensor, std: float) -> None:
    """Fill `own` from N(0, std²); a sharded one with parts of one draw, which the mesh's first process makes.

    DTensor's own random numbers are one draw on GPUs alone.
    """
    if not is_sharded(own) or own.is_meta:
        own.normal_(0.0, std)
        return
    import torch.distributed as dist

    whole = torch.empty(own.shape, dtype=own.dtype, device=own.to_local().device).normal_(0.0, std)
    for group in own.device_mesh.get_all_groups():
        dist.broadcast(whole, group=group, group_src=0)
    copy_into(own, whole)


def reshard(model: nn.Module) -> None:
    """Let ``fully_shard`` take gathered parameters back: what is written into those is lost.

    It leaves some gathered after a forward pass: the root's, and all with ``reshard_after_forward=False``.
    """
    defining = sys.modules.get("torch.distributed.fsdp")
    if defining is not None:
        for module in model.modules():
            if isinstance(module, defining.FSDPModule):
                module.reshard()


def portable(error: Exception) -> Exception:
    """An exception that can be sent to other processes: `error`, or its words where it cannot."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def agree(problem: _Value | None, tensor: torch.Tensor) -> _Value | None:
    """What any process of `tensor`'s mesh has that is not None: who raises alone leaves the others waiting."""
    if not is_sharded(tensor):
        return problem
    import torch.distributed as dist

    for group in tensor.device_mesh.get_all_groups():  # one dimension after the other: a grid is covered then
        problems: list[_Value | None] = [None] * group.size()
        dist.all_gather_object(problems, problem, group=group)
        problem = next((each for each in problems if each is not None), None)
    return problem


def is_first(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether this process is the first of the meshes that `tensors` are distributed over; True for plain ones."""
    coordinates = [tensor.device_mesh.get_coordinate() for tensor in tensors if is_sharded(tensor)]
    return not any(coordinate is None or any(coordinate) for coordinate in coordinates)


def in_first(tensors: Iterable[torch.Tensor], action: Callable[[], None]) -> None:
    """Let the first process of the meshes of `tensors` act, and all raise what it raises; all end together.

    With plain tensors every process acts by itself.
    """
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    error: Exception | None = None
    if is_first(sharded):
        try:
            action()
        except Exception as raised:
            if not sharded:
                raise
            error = portable(raised)
    for tensor in {tensor.device_mesh: tensor for tensor in sharded}.values():  # tensors can lie over several meshes
        error = agree(error, tensor)
    if error is not None:
        raise error


def described(tensor: DTensor) -> str:
    """The placements of a distributed tensor, for messages."""
    mesh: DeviceMesh = tensor.device_mesh
    names = mesh.mesh_dim_names or tuple(f"dimension {index}" for index in range(mesh.ndim))
    return ", ".join(f"{placement!r} over {name}" for placement, name in zip(tensor.placements, names, strict=True))
