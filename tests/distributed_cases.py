"""Models spread over processes, and what they compute: each function is one process's part of a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from dual_lora_kernels import apply_dual_lora, dual_lora_state_dict, load_dual_lora_state_dict, save_dual_lora
from dual_lora_kernels.adapter import plain_name, unwrapped
from dual_lora_kernels.distributed import parallelize_dual_lora, save_checkpoint
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.sharding import full

from .models import VOCABULARY, configuration, llama

ROWS, LENGTH = 8, 9


class Layout(NamedTuple):
    """How a model is spread: over how many processes at least, and by what."""

    name: str
    spread: Callable[[nn.Module], nn.Module]
    splits_batch: bool
    """Whether each process, or each group of tensor parallelism, has rows of its own."""


def _blocks(model: nn.Module) -> Any:
    return model.model.layers  # type: ignore[union-attr]


def _fsdp(model: nn.Module, **options: Any) -> nn.Module:
    for block in _blocks(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def _checkpointed(model: nn.Module) -> nn.Module:
    assert isinstance(model, LlamaForCausalLM)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _fsdp(model.train())


def _wrapped(model: nn.Module) -> nn.Module:
    """As accelerate does it: each block inside a wrapper, whose name PyTorch's state dict leaves out."""
    blocks = _blocks(model)
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    return _fsdp(model.train())


def _wrapped_layers(model: nn.Module) -> nn.Module:
    """Each adapted layer of the feed-forward parts in a wrapper of its own."""
    for block in _blocks(model):
        block.mlp.gate_proj = checkpoint_wrapper(block.mlp.gate_proj)
    return _fsdp(model.train())


def _tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelize_dual_lora(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))


def _both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    return _fsdp(parallelize_dual_lora(model, mesh["tp"]), mesh=mesh["dp"])


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("ddp", DistributedDataParallel, True),
        Layout("ddp static graph", lambda m: DistributedDataParallel(m, static_graph=True), True),
        Layout("ddp unused", lambda m: DistributedDataParallel(m, find_unused_parameters=True), True),
        Layout("fsdp", _fsdp, True),
        Layout("fsdp offload", lambda m: _fsdp(m, offload_policy=CPUOffloadPolicy(pin_memory=False)), True),
        Layout("fsdp checkpointing", _checkpointed, True),
        Layout("fsdp wrapped", _wrapped, True),
        Layout("fsdp wrapped layers", _wrapped_layers, True),
        Layout("fsdp kept", lambda m: _fsdp(m, reshard_after_forward=False), True),
        Layout("tp", _tensor_parallel, False),
        Layout("fsdp tp", _both, True),
    )
}


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The same in every process."""
    model = apply_dual_lora(llama(dtype=dtype), configuration(**options))
    torch.manual_seed(5)
    for _, layer in dual_lora_layers(model):
        layer.reset_adapter_parameters()
    return model


def batch(step: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def _own_rows(tokens: torch.Tensor, layout: Layout) -> torch.Tensor:
    if not layout.splits_batch:
        return tokens
    groups = dist.get_world_size() // (2 if layout.name == "fsdp tp" else 1)
    return tokens.chunk(groups)[dist.get_rank() // (dist.get_world_size() // groups)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]


def _mean(loss: torch.Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train_by_the_older_fsdp(folder: Path) -> dict[str, Any]:
    """Losses under FSDP1, whose parameters are flat between calls, and what saving says of that."""
    reference, model = (
        adapted(),
        FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu")),
    )
    truth, own = optimiser(reference), optimiser(model)
    expected = [_step(reference, batch(step), truth).item() for step in range(5)]
    losses = [_mean(_step(model, _own_rows(batch(step), LAYOUTS["fsdp"]), own)) for step in range(5)]
    said = []
    for save in (save_dual_lora, lambda model, folder: save_checkpoint(folder, 1, model)):
        try:
            save(model, folder)
            said.append("nothing was raised")
        except ValueError as error:
            said.append(str(error))
    return {"losses": losses, "expected": expected, "said": said}


def train_in_mixed_precision() -> float:
    """``param_dtype=bfloat16`` rounds the factors for a call: the error against a model with such factors."""
    reference, model = adapted(torch.bfloat16), adapted()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.no_grad():
        for own, other in zip(model.parameters(), reference.parameters(), strict=True):
            other.data = own.detach().to(torch.bfloat16)
    spread = _fsdp(model, mp_policy=policy)
    loss_of(reference, batch(0)).backward()
    loss_of(spread, _own_rows(batch(0), LAYOUTS["fsdp"])).backward()
    return _gradient_error(spread, reference)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of what trains, whole, by name."""
    found = {plain_name(name): p.grad for name, p in unwrapped(model).named_parameters() if p.requires_grad}
    return {name: full(grad).clone() for name, grad in found.items() if grad is not None}


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(name: str, dtype: torch.dtype, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Losses of `steps` steps, and from the reference's state in each of them the error of loss and gradients.

    Step by step from the same state, since a sign that a last bit turns takes a free run elsewhere.
    """
    layout = LAYOUTS[name]
    reference = adapted(dtype, **options)
    model = layout.spread(adapted(dtype, **options))
    truth, own = optimiser(reference), optimiser(model)
    losses, expected, loss_errors, gradient_errors = [], [], [], []
    for step in range(steps):
        tokens = batch(step)
        expected.append(_step(reference, tokens, truth))
        losses.append(_mean(_step(model, _own_rows(tokens, layout), own)))
    again = layout.spread(adapted(dtype, **options))
    for step in range(0, steps, 4):
        load_dual_lora_state_dict(again, dual_lora_state_dict(reference))
        reference.zero_grad()
        again.zero_grad()
        tokens = batch(100 + step)
        whole, loss = loss_of(reference, tokens), loss_of(again, _own_rows(tokens, layout))
        whole.backward()
        loss.backward()
        loss_errors.append(abs(_mean(loss) - whole.item()) / whole.item())
        gradient_errors.append(_gradient_error(again, reference))
        _step(reference, batch(200 + step), truth)
    return {"losses": losses, "expected": expected, "loss": max(loss_errors), "gradients": max(gradient_errors)}


def _step(model: nn.Module, tokens: torch.Tensor, own: torch.optim.Optimizer) -> torch.Tensor:
    own.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    own.step()
    return loss.detach()


def _gradient_error(model: nn.Module, reference: nn.Module) -> float:
    """The largest relative error of a factor's gradient in norm."""
    found, truth = gradients(model), gradients(reference)
    assert found.keys() == truth.keys()
    return max(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)
