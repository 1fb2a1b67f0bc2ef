"""Layers split by tensor parallelism, and models that cannot be: each function is one process's part of a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from dual_lora_kernels import (
    DualLoraConfig,
    DualLoraLinear,
    apply_dual_lora,
    draw_columns,
    dual_lora_merged,
    merge_dual_lora,
    reference,
)
from dual_lora_kernels.column_sampling import choose
from dual_lora_kernels.distributed import DualLoraColwiseParallel, DualLoraRowwiseParallel, parallelize_dual_lora
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.sharding import full, local_block

from .distributed_cases import LAYOUTS, adapted, loss_of
from .models import llama, tokens

WIDE, NARROW, TOKENS = 40, 24, 16


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> DualLoraLinear:
    """The same in every process, with an update of W0's size."""
    torch.manual_seed(3)
    own = DualLoraLinear(
        NARROW, WIDE, dtype=dtype, **{"r1": 4, "r2": 3, "alpha": 2.0, "init_std": 0.3, "clip_bound": 1e-3} | options
    )
    assert own.bias is not None
    own.bias.requires_grad_(True)
    return own


STYLES = {"colwise": DualLoraColwiseParallel, "rowwise": DualLoraRowwiseParallel}


def split(own: DualLoraLinear, style: str, **options: Any) -> nn.Module:
    given = {"input_layouts": Shard(-1)} if style == "rowwise" else {}
    return parallelize_module(own, mesh(), STYLES[style](**given | options))  # type: ignore[arg-type, no-any-return]


def own_input(x: torch.Tensor, style: str) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous() if style == "rowwise" else x


def weight_bits(style: str, dtype: torch.dtype) -> None:
    """X = I reads W out; partial sums of a row-wise layer add zeros."""
    whole, own = layer(dtype), split(layer(dtype), style)
    expected = dual_lora_merged(whole.weight, *whole.factors(), whole.scale)
    with torch.no_grad():
        whole.bias.zero_()  # type: ignore[union-attr]
        full_bias, _ = local_block(own.bias)  # type: ignore[arg-type]
        full_bias.zero_()
        read = own(own_input(torch.eye(NARROW, dtype=dtype), style)).t()
    rows = expected.chunk(dist.get_world_size())[dist.get_rank()] if style == "colwise" else expected
    assert torch.equal(read, rows)
    part, origin = local_block(own.merged_with(own.weight))  # type: ignore[operator, arg-type]
    slices = tuple(slice(first, first + size) for first, size in zip(origin, part.shape, strict=True))
    assert torch.equal(part, expected[slices])


def bits_of_every_part(name: str, dtype: torch.dtype) -> None:
    """The merged part that each process has of each layer of a model is the slice of the unsharded W."""
    reference, model = adapted(dtype), LAYOUTS[name].spread(adapted(dtype))
    own = dict(dual_lora_layers(model))
    for layer_name, truth in dual_lora_layers(reference):
        expected = dual_lora_merged(truth.weight, *truth.factors(), truth.scale)
        part, origin = local_block(own[layer_name].merged_with(own[layer_name].weight))
        slices = tuple(slice(first, first + size) for first, size in zip(origin, part.shape, strict=True))
        assert torch.equal(part, expected[slices]), layer_name


def gradients(style: str, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, float]:
    """Relative errors of output and gradients against the whole layer's, with a bound that clips many entries."""
    whole, own = layer(dtype), split(layer(dtype), style, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, NARROW, generator=generator).to(dtype)
    grad = torch.randn(2, TOKENS // 2, WIDE, generator=generator).to(dtype)
    truth_x, part_x = x.clone().requires_grad_(), own_input(x, style).clone().requires_grad_()
    truth = whole(truth_x)
    truth.backward(grad)
    y = own(part_x)
    dim = getattr(options.get("output_layouts", Shard(-1) if style == "colwise" else None), "dim", None)

    def own_part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if dim is None else tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]

    y.backward(own_part(grad))
    assert truth_x.grad is not None
    errors = {"output": _error(y, own_part(truth)), "input": _error(part_x.grad, own_input(truth_x.grad, style))}
    for name in ("A", "B", "C", "D", "bias"):
        grad = getattr(own, name).grad
        assert grad.placements == getattr(own, name).placements
        errors[name] = _error(full(grad), getattr(whole, name).grad)
    return errors


def sampled(style: str) -> dict[str, float]:
    """Errors of the factors' gradients from a sample of columns, which the mesh's first process draws for all.

    A row-wise layer's processes have columns of their own, and sample those by the same random numbers.
    """
    whole, own = layer(), split(layer(gradient_columns=0.5), style)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(TOKENS, width, generator=generator) for width in (NARROW, WIDE))
    parts = x.chunk(dist.get_world_size() if style == "rowwise" else 1, -1)
    draws = draw_columns(parts[0].shape[1], 0.5, generator=torch.Generator().manual_seed(0))
    weights = [torch.zeros(part.shape[1]).index_add_(0, *choose(part, draws)) for part in parts]
    truth = reference.linear_gradients(
        grad, x, whole.weight.detach(), *(f.detach() for f in whole.factors()), whole.scale,
        clip_bound=whole.clip_bound, weights=torch.cat(weights),
    )  # fmt: skip
    torch.manual_seed(dist.get_rank())
    y = own(own_input(x, style))
    y.backward(grad.chunk(dist.get_world_size(), -1)[dist.get_rank()] if style == "colwise" else grad)
    return {name: _error(full(getattr(own, name).grad), getattr(truth, name)) for name in "ABCD"}


def gradients_without_a_sum(style: str) -> dict[str, float]:
    """`gradients` where the collective that sums replicated factors' gradients is left out."""
    with mock.patch.object(dist, "all_reduce", return_value=None):
        return gradients(style, torch.float32, {})


def collectives() -> dict[str, int]:
    """How many sums of gradients a column-wise and a row-wise layer's backward pass take, by style."""
    counts = {}
    for style in STYLES:
        own, calls = split(layer(), style), []
        own.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
        y = own(own_input(torch.randn(4, NARROW), style))
        with mock.patch.object(dist, "all_reduce", lambda *_, calls=calls, **__: calls.append(1)):
            y.sum().backward()
        counts[style] = len(calls)
    return counts


def _error(value: Any, truth: Any) -> float:
    return float((value.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def llama_of_three_heads() -> nn.Module:
    config = LlamaConfig(
        vocab_size=16, hidden_size=48, intermediate_size=48, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3,
    )  # fmt: skip
    return apply_dual_lora(LlamaForCausalLM(config), DualLoraConfig("all-linear", r1=2, r2=2))


def refusals() -> dict[str, str]:
    """The messages of what cannot be, by a word for each."""

    class Model(nn.Module):
        def __init__(self, width: int = WIDE) -> None:
            super().__init__()
            self.up, self.plain, self.down = nn.Linear(NARROW, width), nn.Linear(8, 8), nn.Linear(width, NARROW)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x))  # type: ignore[no-any-return]

    def model(width: int = WIDE) -> nn.Module:
        return apply_dual_lora(Model(width), config)

    config = DualLoraConfig(["up", "down"], r1=4, r2=3)
    own = mesh()
    cases: dict[str, Callable[[], Any]] = {
        "divides": lambda: parallelize_dual_lora(model(41), own, {"up": "colwise"}),
        "divides by style": lambda: parallelize_module(model(41), own, {"down": DualLoraRowwiseParallel()}),
        "dimensions": lambda: parallelize_dual_lora(
            model(), init_device_mesh("cpu", (1, dist.get_world_size())), {"up": "colwise"}
        ),
        "no plan": lambda: parallelize_dual_lora(model(), own),
        "no such name": lambda: parallelize_dual_lora(model(), own, {"side": "colwise"}),
        "no style": lambda: parallelize_dual_lora(model(), own, {"up": "diagonal"}),
        "not adapted": lambda: parallelize_dual_lora(model(), own, {"plain": DualLoraColwiseParallel()}),
        "not adapted, by style": lambda: parallelize_module(model(), own, {"plain": DualLoraColwiseParallel()}),
        "twice": lambda: parallelize_dual_lora(
            parallelize_dual_lora(model(), own, {"up": "colwise"}), own, {"up": "rowwise"}
        ),
        "no mesh": lambda: parallelize_dual_lora(model(), 2, {"up": "colwise"}),  # type: ignore[arg-type]
        "a list": lambda: parallelize_dual_lora(model(), own, ["up"]),  # type: ignore[arg-type]
        "an activation": lambda: parallelize_dual_lora(nn.Sequential(model(), nn.GELU()), own, {"1": "colwise"}),
        "heads": lambda: parallelize_dual_lora(llama_of_three_heads(), own),
        "tp after fully_shard": lambda: parallelize_dual_lora(fully_shard(model()), own, {"up": "colwise"}),
        "by keyword": lambda: parallelize_dual_lora(
            model(), own, {"up": DualLoraColwiseParallel(input_layouts=Shard(0))}
        ).up(input=torch.ones(2, NARROW)),  # type: ignore[union-attr, operator]
        "whole input": lambda: parallelize_dual_lora(model(), own, {"down": "rowwise"})(torch.ones(2, NARROW)),
        "part of an input": lambda: parallelize_dual_lora(model(), own, {"up": "colwise"})(torch.ones(2, 6)),
        "prepare": lambda: parallelize_dual_lora(model(), own, {"up": "colwise"}).up.prepare(),  # type: ignore[union-attr, operator]
        "merge": lambda: merge_dual_lora(fully_shard(model())),
        "after DDP": lambda: apply_dual_lora(DistributedDataParallel(Model()), config),
        "after fully_shard": lambda: apply_dual_lora(fully_shard(Model()), config),
        "after parallelize_module": lambda: apply_dual_lora(
            parallelize_module(Model(), own, {"up": ColwiseParallel(), "down": RowwiseParallel()}), config
        ),
        "outside": lambda: fully_shard(model()).up.forward(torch.ones(2, NARROW)),  # type: ignore[union-attr, operator]
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
            messages[name] = "nothing was raised"
        except (ValueError, TypeError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def verbs_of_peft() -> dict[str, Any]:
    """PEFT's verbs on a model that `parallelize_dual_lora` has split: errors against the whole one, and refusals."""
    whole, own = peft_model(), parallelize_dual_lora(peft_model(), mesh())
    errors = {}
    with torch.no_grad():
        errors["call"] = _error(own(tokens()).logits, whole(tokens()).logits)
        with own.disable_adapter(), whole.disable_adapter():  # type: ignore[operator]
            errors["disabled"] = _error(own(tokens()).logits, whole(tokens()).logits)
        for model in (own, whole):
            model.merge_adapter()  # type: ignore[operator]
        errors["merged"] = _error(own(tokens()).logits, whole(tokens()).logits)
        for model in (own, whole):
            model.unmerge_adapter()  # type: ignore[operator]
        errors["unmerged"] = _error(own(tokens()).logits, whole(tokens()).logits)
        own.add_adapter("other", own.peft_config["default"])  # type: ignore[operator, index, union-attr]
        own.set_adapter("other")  # type: ignore[operator]
        assert own(tokens()).logits.isfinite().all()
        config = own.peft_config["default"]  # type: ignore[index, union-attr]
        own.delete_adapter("default")  # type: ignore[operator]
        own.delete_adapter("other")  # type: ignore[operator]
        with whole.disable_adapter():  # type: ignore[operator]
            base = own.base_model.model(tokens())  # type: ignore[operator, union-attr]
            errors["without adapters"] = _error(base.logits, whole(tokens()).logits)
        own.add_adapter("third", config)  # type: ignore[operator]
        own.set_adapter("third")  # type: ignore[operator]
        assert own(tokens()).logits.isfinite().all()
    said = {}
    for name, case in {
        "mixed batch": lambda: own(tokens(), adapter_names=["third", "third"]),
        "unload": own.merge_and_unload,
        "after DDP": lambda: peft_model(DistributedDataParallel(llama())),
    }.items():
        try:
            case()  # type: ignore[operator]
            said[name] = "nothing was raised"
        except ValueError as error:
            said[name] = str(error)
    return {"errors": errors, "said": said}


def peft_model(base: nn.Module | None = None) -> nn.Module:
    from peft import get_peft_model

    from dual_lora_kernels.peft import DualLoraConfig as PeftConfig

    torch.manual_seed(7)
    options = {"r1": 4, "r2": 3, "alpha": 1.0, "init_std": 0.3, "target_modules": "all-linear"}
    own: nn.Module = get_peft_model(llama() if base is None else base, PeftConfig(**options)).eval()
    return own


def merged_then_sharded() -> None:
    """W0 comes back into a layer that was sharded while it was merged."""
    own = layer()
    before = own.weight.detach().clone()
    own.merge()
    fully_shard(own)
    own.unmerge()
    assert torch.equal(full(own.weight), before)


def reset_uneven() -> None:
    """Rows that the processes do not divide evenly: one draw, the same factors in every layout."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = DualLoraLinear(10, 6, r1=3, r2=2)
    parallelize_module(own, both["tp"], DualLoraColwiseParallel())
    fully_shard(own, mesh=both["dp"])
    own.reset_adapter_parameters()
    for factor in own.factors():
        whole = full(factor.detach())
        assert 0.005 < whole.std() < 0.05
        everywhere = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, whole.contiguous())
        assert all(torch.equal(each, whole) for each in everywhere)


def transformers_plan(folder: Path, door: str, dtype: torch.dtype) -> dict[str, float]:
    """A model that ``from_pretrained(tp_plan="auto")`` has split, adapted by either door, against the whole one."""
    from transformers import AutoModelForCausalLM

    def adapt(model: Any) -> Any:
        options = {"r1": 4, "r2": 3, "alpha": 1.0, "init_std": 0.3}
        torch.manual_seed(7)  # the split model takes its values from the first process
        if door == "own":
            return apply_dual_lora(model, DualLoraConfig("all-linear", **options))  # type: ignore[arg-type]
        from peft import get_peft_model

        from dual_lora_kernels.peft import DualLoraConfig as PeftConfig

        return get_peft_model(model, PeftConfig(target_modules="all-linear", **options))

    whole = adapt(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    torch.manual_seed(dist.get_rank())
    own = adapt(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto"))
    loss, truth = loss_of(own, tokens()), loss_of(whole, tokens())
    loss.backward()
    truth.backward()
    errors = {"loss": abs(loss.item() - truth.item()) / truth.item()}
    expected = dict(whole.named_parameters())
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert expected[name].grad is not None
            errors[name] = _error(full(parameter.grad), expected[name].grad)
    with torch.no_grad():
        for model in (own, whole):
            model.eval()
        errors["evaluation"] = _error(own(tokens()).logits, whole(tokens()).logits)
    return errors
