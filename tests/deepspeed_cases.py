"""Models in the hands of DeepSpeed: each function is one process's part of a test.

Of parameters that ZeRO-3 could keep whole, because they are small or soon needed again, none are here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from dual_lora_kernels import (
    apply_dual_lora,
    dual_lora_parameter_groups,
    dual_lora_state_dict,
    load_dual_lora,
    load_dual_lora_state_dict,
    merge_dual_lora,
    prepared,
    save_dual_lora,
)
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.linear import dual_lora_layers

from .distributed_cases import LAYOUTS, ROWS, adapted, batch, loss_of, optimiser
from .distributed_cases import _mean as mean
from .distributed_cases import _own_rows as own_rows
from .models import configuration, llama, logits
from .peft_models import config as peft_configuration

WARM_UP = 4
"""Steps of the warm-ups."""


def deepspeed() -> Any:
    """The library: it reads the environment when it is imported, and changes PyTorch for the whole process.

    A name for each pool of processes: DeepSpeed's shared memory is named by address and port.
    """
    port = 10_000 + os.getppid() % 50_000
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    library = importlib.import_module("deepspeed")
    library.init_distributed("gloo")
    return library


def settings(stage: int, accumulation: int = 1) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False} | {f"stage3_{name}": 0 for name in kept},
        "steps_per_print": 10**9,
    }


def engine_of(
    model: nn.Module, stage: int, accumulation: int = 1, optimizer: torch.optim.Optimizer | None = None
) -> Any:
    """DeepSpeed's engine around an adapted model."""
    return deepspeed().initialize(
        model=model, optimizer=optimizer or optimiser(model), config=settings(stage, accumulation)
    )[0]


def gathered(model: nn.Module, changes: bool = False) -> AbstractContextManager[None]:
    """Within it every parameter is whole. If it `changes` them, the first process's values stay."""
    return deepspeed().zero.GatheredParameters(  # type: ignore[no-any-return]
        list(model.parameters()), modifier_rank=0 if changes else None
    )


def _backward(engine: Any, step: int) -> float:
    """The mean of the processes' losses on their rows of a batch."""
    loss = loss_of(engine, own_rows(batch(step), LAYOUTS["ddp"]))
    engine.backward(loss)
    return mean(loss)


def _step(engine: Any, step: int) -> float:
    loss = _backward(engine, step)
    engine.step()
    return loss


def _reference_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One process's step on the whole batch."""
    optimizer.zero_grad()
    loss = loss_of(model, batch(step))
    loss.backward()
    optimizer.step()
    return loss.item()


def train(stage: int, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Losses of `steps` steps, and from the reference's state in some of them the error of loss and gradients."""
    reference, model = adapted(dtype), adapted(dtype)
    truth, engine = optimiser(reference), engine_of(model, stage)
    assert all((p.numel() == 0) == (stage == 3) for p in model.parameters())
    losses, expected, loss_errors, gradient_errors = [], [], [], []
    for step in range(steps):
        if step % 7 == 0:
            again = adapted(dtype)
            load_dual_lora_state_dict(again, dual_lora_state_dict(reference))
            loss, gradients = _gradients(engine_of(again, stage), step)
        whole = _reference_step(reference, truth, step)
        if step % 7 == 0:
            loss_errors.append(abs(loss - whole) / whole)
            gradient_errors += [
                _error(gradients[name], p) for name, p in reference.named_parameters() if p.requires_grad
            ]
        expected.append(whole)
        losses.append(_step(engine, step))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    return {"losses": losses, "expected": expected, "loss": max(loss_errors), "gradients": max(gradient_errors)}


def _gradients(engine: Any, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients, by name."""
    whole = importlib.import_module("deepspeed.utils").safe_get_full_grad
    loss = _backward(engine, step)
    return loss, {name: whole(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def _error(gradient: torch.Tensor, parameter: nn.Parameter) -> float:
    assert parameter.grad is not None
    return float((gradient - parameter.grad).norm() / parameter.grad.norm())


def _within_init(_: Path) -> nn.Module:
    with deepspeed().zero.Init(config_dict_or_path=settings(3)):
        model: nn.Module = llama()
    return model


def _after_init(_: Path) -> nn.Module:
    model: nn.Module = llama()
    deepspeed().zero.Init(module=model, config_dict_or_path=settings(3))
    return model


def _from_pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In the dtype that DeepSpeed's configuration says while it loads: the one that is asked for is not heeded."""
    section = {"bf16": {"enabled": dtype == torch.bfloat16}}
    told = HfDeepSpeedConfig(settings(3) | section)  # as long as it lives, from_pretrained makes models in parts
    model: nn.Module = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    del told
    assert {p.dtype for p in model.parameters()} == {dtype}
    return model


IN_PARTS: dict[str, Callable[[Path], nn.Module]] = {
    "within zero.Init": _within_init,
    "by zero.Init afterwards": _after_init,
    "from_pretrained": _from_pretrained,
    "from_pretrained in bf16": lambda folder: _from_pretrained(folder, torch.bfloat16),
}
"""Ways to a base model that ZeRO-3 keeps in parts before it is adapted; one is loaded from a folder."""


def _through(door: str, base: nn.Module, steps: int = 0) -> nn.Module:
    """`base` adapted, the same in every process; the scale rises in `steps` steps."""
    torch.manual_seed(5)
    if door == "peft":
        model: nn.Module = get_peft_model(base, peft_configuration(warmup_steps=steps))
        return model
    model = apply_dual_lora(base, configuration())
    for _, adapter in dual_lora_adapters(model) if steps else ():
        adapter.warm_up(steps)
    return model


def adapt_in_parts(way: str, door: str, folder: Path) -> dict[str, Any]:
    """Losses of a model whose base was in parts when it was adapted, and of one that never was; the base's dtype."""
    deepspeed()
    base = IN_PARTS[way](folder)
    assert not any(p.numel() for p in base.parameters())
    dtype = next(base.parameters()).dtype
    whole = llama(dtype=dtype)
    with gathered(base):
        whole.load_state_dict(base.state_dict())
    reference, model = _through(door, whole), _through(door, base)
    truth, engine = optimiser(reference), engine_of(model, 3)
    expected = [_reference_step(reference, truth, step) for step in range(4)]
    losses = [_step(engine, step) for step in range(4)]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    return {"losses": losses, "expected": expected, "dtype": dtype}


def refusals(folder: Path) -> dict[str, str]:
    """The messages of what needs whole parameters, outside GatheredParameters; the model stays as it is."""
    state = {name: tensor.clone() for name, tensor in dual_lora_state_dict(adapted()).items()}
    own, peft = engine_of(adapted(), 3), engine_of(_through("peft", llama()), 3)
    model, layer = own.module, next(layer for _, layer in dual_lora_layers(own))
    cases: dict[str, Callable[[], object]] = {
        "save_dual_lora": lambda: save_dual_lora(own, folder),
        "save_pretrained": lambda: model.save_pretrained(folder),
        "dual_lora_state_dict": lambda: dual_lora_state_dict(own),
        "load_dual_lora_state_dict": lambda: load_dual_lora_state_dict(own, state),
        "merge": layer.merge,
        "prepare": layer.prepare,
        "to_linear": layer.to_linear,
        "delta_weight": layer.delta_weight,
        "merge_dual_lora": lambda: merge_dual_lora(model),
        "prepared": lambda: prepared(model).__enter__(),
        "merge_adapter": lambda: peft.module.merge_adapter(),
        "merge_and_unload": lambda: peft.module.merge_and_unload(),
    }
    before = [logits(own), logits(peft)]
    messages = {}
    for name, case in cases.items():
        try:
            case()
            messages[name] = "nothing was raised"
        except ValueError as error:
            messages[name] = str(error)
    assert all(map(torch.equal, before, [logits(own), logits(peft)]))
    assert not folder.exists()
    return messages


def save(stage: int, folder: Path) -> None:
    """The adapter in this package's format and in PEFT's: each process in a folder of its own."""
    engine = engine_of(adapted(), stage)
    own = folder / str(dist.get_rank())
    with gathered(engine):
        save_dual_lora(engine, own / "own")
        engine.module.save_pretrained(own / "peft")


def load(stage: int, folder: Path) -> None:
    """Saved values arrive, in parts again after GatheredParameters, and calls compute with them."""
    model = adapted()
    with torch.no_grad():
        for tensor in dual_lora_state_dict(model).values():
            tensor.zero_()
    engine, reference = engine_of(model, stage), adapted()
    with gathered(engine, changes=True):
        load_dual_lora(engine, folder)
    with gathered(engine):
        found = {name: tensor.clone() for name, tensor in dual_lora_state_dict(engine).items()}
    expected = dual_lora_state_dict(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.testing.assert_close(logits(engine), logits(reference))


def merge(stage: int, dtype: torch.dtype) -> None:
    """Within GatheredParameters merging writes one process's bits, and W0 comes back."""
    engine, base = engine_of(adapted(dtype), stage), llama(dtype=dtype).state_dict()
    expected = merge_dual_lora(adapted(dtype)).state_dict()
    layers = dict(dual_lora_layers(engine))
    with gathered(engine, changes=True):
        for layer in layers.values():
            layer.merge()
    logits(engine)  # in parts again meanwhile
    with gathered(engine, changes=True):
        for name, layer in layers.items():
            assert torch.equal(layer.weight, expected[f"{name}.weight"]), name
            layer.unmerge()
    logits(engine)
    with gathered(engine):
        for name, layer in layers.items():
            assert torch.equal(layer.weight, base[f"{name}.weight"]), name
        found = merge_dual_lora(engine.module).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def prepare(stage: int) -> None:
    """A prepared layer serves calls until a step changes its factors, which their versions do not count."""
    engine = engine_of(adapted(), stage)
    layers = [layer for _, layer in dual_lora_layers(engine)]
    before = logits(engine)
    with gathered(engine):
        for layer in layers:
            layer.prepare()
        inside = logits(engine.module) if stage == 2 else before  # ZeRO-3's hooks would release what is gathered
    torch.testing.assert_close(inside, before)
    assert all(layer.prepared for layer in layers)
    _step(engine, 0)
    stepped = logits(engine)
    assert not any(layer.prepared for layer in layers)
    assert not torch.allclose(stepped, before)
    for layer in layers:
        layer.release()
    assert torch.equal(stepped, logits(engine))


def warm_up(stage: int, door: str) -> list[float]:
    """Parts of the full scale after each batch; every second one ends in a step, of two groups of parameters."""
    model = _through(door, llama(), WARM_UP)
    optimizer = torch.optim.AdamW(dual_lora_parameter_groups(model, 1e-2, direction_lr=5e-3))
    assert len(optimizer.param_groups) == 2
    engine = engine_of(model, stage, accumulation=2, optimizer=optimizer)
    parts: list[float] = []
    for step in range(2 * WARM_UP + 2):
        _step(engine, step)
        found = {round(adapter.scale.item() / adapter.full_scale, 6) for _, adapter in dual_lora_adapters(engine)}
        assert len(found) == 1, found
        parts += found
    return parts
