"""Scales that rise with the optimiser's steps, whoever calls them."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dual_lora_kernels import DualLoraConfig as PlainConfig
from dual_lora_kernels import DualLoraLinear, apply_dual_lora, load_dual_lora, save_dual_lora
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.automatic_warmup import _warming
from dual_lora_kernels.peft import DualLoraConfig

X = torch.randn(3, 6)


def net(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    shared = {"r1": 2, "r2": 2, "target_modules": ["0", "1"], "warmup_steps": 4}
    return get_peft_model(base, DualLoraConfig(**shared | options))


def factors_of(model: nn.Module) -> list[float]:
    """Each adapter's scale over its full one."""
    return [adapter.scale.item() / adapter.full_scale for _, adapter in dual_lora_adapters(model)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_scale_rises_with_each_step(kind: type[torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = optimizer_of(model, kind)
    for expected in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0):
        assert factors_of(model) == pytest.approx([expected] * 2)
        step(model, optimizer)
    assert not any(adapter in _warming for _, adapter in dual_lora_adapters(model))


def test_without_it_the_scale_is_full_from_the_start() -> None:
    assert factors_of(net(warmup_steps=0)) == [1.0, 1.0]


def test_accumulated_gradients_count_once_and_other_optimisers_do_not() -> None:
    model, other = net(), nn.Linear(6, 5)
    optimizer, others = optimizer_of(model), optimizer_of(other)
    model(X).sum().backward()
    step(model, optimizer)
    step(other, others)
    assert factors_of(model) == pytest.approx([0.5, 0.5])


def test_an_optimiser_for_each_group_counts_once() -> None:
    model = net()
    groups: dict[str, list[nn.Parameter]] = {"AB": [], "CD": []}
    for _, adapter in dual_lora_adapters(model):
        groups["AB"] += [adapter.A, adapter.B]
        groups["CD"] += [adapter.C, adapter.D]
    optimizers = [torch.optim.SGD(group, 1e-2) for group in groups.values()]
    model(X).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert factors_of(model) == pytest.approx([0.5, 0.5])


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = net()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert factors_of(again) == pytest.approx([0.5, 0.5])
    optimizer = optimizer_of(again)
    seen = []
    for _ in range(4):
        step(again, optimizer)
        seen.append(factors_of(again)[0])
    assert seen == pytest.approx([0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("pickled", [False, True])
def test_copies_warm_up_by_themselves(pickled: bool) -> None:
    model = net()
    step(model, optimizer_of(model))
    other = pickle.loads(pickle.dumps(model)) if pickled else copy.deepcopy(model)
    step(other, optimizer_of(other))
    assert factors_of(model) == pytest.approx([0.5, 0.5])
    assert factors_of(other) == pytest.approx([0.75, 0.75])


def test_adapters_that_do_not_train_stay() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(r1=2, r2=2, target_modules=["0"], warmup_steps=4))
    step(model, optimizer_of(model))
    found = {name.rpartition(".")[2]: a.scale.item() / a.full_scale for name, a in dual_lora_adapters(model)}
    assert found == pytest.approx({"default": 0.5, "other": 1.0})  # full until it trains
    model.set_adapter("other")
    step(model, optimizer_of(model))
    found = {name.rpartition(".")[2]: a.scale.item() / a.full_scale for name, a in dual_lora_adapters(model)}
    assert found == pytest.approx({"default": 0.5, "other": 0.5})


def test_what_is_gone_is_forgotten() -> None:
    before = len(_warming)
    model = net()
    assert len(_warming) == before + 2
    del model
    import gc

    gc.collect()
    assert len(_warming) <= before


@pytest.mark.parametrize("steps", [-1, 2.5, True])
def test_steps_out_of_range(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"^warmup_steps: got .*, expected a number of steps, 0 or more"):
        DualLoraConfig(warmup_steps=steps)


def test_training_without_warm_up_is_told(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level("INFO")
    net().save_pretrained(tmp_path)
    PeftModel.from_pretrained(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), tmp_path)
    assert "warm-up" not in caplog.text
    net(warmup_steps=0)
    assert "no warm-up: the update's scale is full from the start" in caplog.text


def test_an_adapter_that_never_trains_keeps_its_scale() -> None:
    model = net()
    model.add_adapter("other", DualLoraConfig(r1=2, r2=2, target_modules=["0", "1"], warmup_steps=4))
    optimizer = optimizer_of(model)
    for _ in range(6):
        step(model, optimizer)
    found = {name.rpartition(".")[2]: a.scale.item() / a.full_scale for name, a in dual_lora_adapters(model)}
    assert found == pytest.approx({"default": 1.0, "other": 1.0})


def test_an_earlier_checkpoint_warms_up_again(tmp_path: Path) -> None:
    model = net()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    model.save_pretrained(tmp_path)
    for _ in range(6):
        step(model, optimizer)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert factors_of(model) == pytest.approx([0.5, 0.5])
    optimizer = optimizer_of(model)
    for expected in (0.75, 1.0, 1.0):
        step(model, optimizer)
        assert factors_of(model) == pytest.approx([expected] * 2)


@pytest.mark.parametrize("saved", [False, True])
def test_a_scale_that_was_set_stays(saved: bool, tmp_path: Path) -> None:
    model = net()
    for _, adapter in dual_lora_adapters(model):
        adapter.set_scale(2 * adapter.full_scale)
    if saved:
        model.save_pretrained(tmp_path)
        model = net()
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    step(model, optimizer_of(model))
    assert factors_of(model) == pytest.approx([2.0, 2.0])


def test_states_from_before_there_was_a_warm_up_are_read() -> None:
    adapter = DualLoraLinear(3, 2)
    state = {key: value for key, value in vars(adapter).items() if "warmup" not in key}
    other = DualLoraLinear.__new__(DualLoraLinear)
    other.__setstate__(state)
    assert torch.equal(other(torch.ones(1, 3)), adapter(torch.ones(1, 3)))


class Around(torch.optim.Optimizer):
    """Steps another optimiser, as ZeRO's and Lookahead's do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


def test_an_optimiser_within_another_counts_once() -> None:
    model = net()
    optimizer = Around(optimizer_of(model))
    step(model, optimizer)
    step(model, optimizer)
    assert factors_of(model) == pytest.approx([0.75, 0.75])


def test_a_step_that_raised_is_not_for_ever() -> None:
    model = net()
    optimizer = optimizer_of(model)

    def fail() -> float:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fail)
    step(model, optimizer)
    assert factors_of(model) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kept", [False, True])
def test_an_optimiser_that_is_made_anew_after_a_step_that_raised_counts(kept: bool) -> None:
    """As when memory runs out in a step, and the run begins again; a traceback may keep the old optimiser."""
    model = net()
    old = [optimizer_of(model)]

    def fail() -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        old[0].step(fail)
    if not kept:
        old.clear()
    optimizer = optimizer_of(model)
    for _ in range(5):
        step(model, optimizer)
    assert factors_of(model) == pytest.approx([1.0, 1.0])


def test_a_scale_that_is_refused_ends_no_warm_up() -> None:
    model = net()
    for _, adapter in dual_lora_adapters(model):
        with pytest.raises(ValueError, match=r"^scale: got nan"):
            adapter.set_scale(float("nan"))
    step(model, optimizer_of(model))
    assert factors_of(model) == pytest.approx([0.5, 0.5])


def test_an_average_that_is_ahead_of_its_count_is_not_lowered() -> None:
    model = net()
    averaged = AveragedModel(model, use_buffers=True)
    optimizer = optimizer_of(model)
    for _ in range(6):
        step(model, optimizer)
    for (_, own), (_, other) in zip(dual_lora_adapters(model), dual_lora_adapters(averaged), strict=True):
        other.scale.copy_(own.scale)
    step(averaged.module, optimizer_of(averaged.module))
    assert factors_of(averaged) == pytest.approx([1.0, 1.0])


def test_the_plain_door_goes_on_from_a_loaded_scale(tmp_path: Path) -> None:
    model = apply_dual_lora(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), PlainConfig(r1=2, r2=2))
    save_dual_lora(model, tmp_path)
    for _, layer in dual_lora_adapters(model):
        layer.warm_up(4)
    load_dual_lora(model, tmp_path)
    step(model, optimizer_of(model))
    assert factors_of(model) == [1.0, 1.0]


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_an_adapter_from_the_same_configuration_takes_the_scale(scale: float) -> None:
    """TRL makes the reference so, of an adapter that is warming up as well."""
    model = net()
    for _ in range(round(scale * 4) - 1):
        step(model, optimizer_of(model))
    model.add_adapter("ref", model.peft_config["default"])
    assert factors_of(model) == pytest.approx([scale] * 4)
    step(model, optimizer_of(model))
    found = {name.rpartition(".")[2]: a.scale.item() / a.full_scale for name, a in dual_lora_adapters(model)}
    assert found == pytest.approx({"default": scale + 0.25, "ref": scale})


def test_an_inactive_adapter_has_one_scale_on_all_layers() -> None:
    """Also on layers that it is the first to adapt."""
    model = net(target_modules=["0"])
    model.add_adapter("other", DualLoraConfig(r1=2, r2=2, target_modules=["0", "1"], warmup_steps=4))
    found = [a.scale.item() / a.full_scale for name, a in dual_lora_adapters(model) if name.endswith("other")]
    assert found == [1.0, 1.0]


def test_an_optimiser_of_copies_counts_where_deepspeed_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's hold copies of the parameters, and make a step for each group (tests/test_deepspeed.py)."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    model = net()
    copies = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    groups = [torch.optim.SGD(half, lr=0.1) for half in (copies[:3], copies[3:])]
    seen = []
    for _ in range(5):
        for _ in range(2):  # gradients are accumulated
            model(X).square().sum().backward()
        for optimizer in groups:
            optimizer.step()
        seen.append(factors_of(model)[0])
    assert seen == pytest.approx([0.5, 0.75, 1.0, 1.0, 1.0])


def test_another_models_optimiser_does_not_count_where_deepspeed_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    model, other = net(), nn.Linear(2, 2)
    optimizer, another = optimizer_of(model), torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        another.step()
        optimizer.step()
    assert factors_of(model) == pytest.approx([0.75, 0.75])


def test_an_optimiser_of_copies_does_not_count_elsewhere() -> None:
    model = net()
    model(X).square().sum().backward()
    torch.optim.SGD([parameter.detach().clone().requires_grad_() for parameter in model.parameters()], lr=0.1).step()
    assert factors_of(model) == pytest.approx([0.25, 0.25])
