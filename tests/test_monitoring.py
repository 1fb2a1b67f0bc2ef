"""Figures of adapters in training: against the formula, through both doors, and in a Trainer's logs."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, settings
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.monitoring import DualLoraMonitor, dual_lora_statistics
from dual_lora_kernels.trainer import DualLoraStatisticsCallback, DualLoraWarmupCallback

from . import monitoring_cases as cases
from .exact_adapters import lost, make_exact, products
from .models import configuration, llama, tokens
from .peft_models import config, weights
from .processes import Processes

NAMES = ("frozen", "negative", "update_norm", "relative_norm", "rounded_away")


def plain(seed: int = 0) -> nn.Module:
    return make_exact(apply_dual_lora(llama(dtype=torch.bfloat16), configuration()), seed)


def pefts(seed: int = 0) -> nn.Module:
    return make_exact(get_peft_model(llama(dtype=torch.bfloat16), config()), seed)


DOORS = {"plain": plain, "peft": pefts}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """W0 by the adapter's name."""
    found = {name: layer.weight.detach() for name, layer in dual_lora_layers(model)}
    return found | {f"{name}.dual_adapter.default": weight for name, weight in weights(model).items()}


def spelled_out(model: nn.Module) -> dict[str, float]:
    """The figures from whole matrices."""
    bases = base_weights(model)
    rows = [(*products(adapter), bases[name]) for name, adapter in dual_lora_adapters(model)]
    entries = sum(p.numel() for p, *_ in rows)
    norms = [float(update.double().norm()) for _, _, update, _ in rows]
    relative = [norm / float(weight.double().norm()) for norm, (*_, weight) in zip(norms, rows, strict=True)]
    losses = sum(int(lost(update, weight).sum()) for _, _, update, weight in rows)
    figures = (
        sum(int((p <= 0).sum()) for p, *_ in rows) / entries,
        sum(int((q <= 0).sum()) for _, q, *_ in rows) / entries,
        statistics.median(norms),
        statistics.median(relative),
        losses / sum(int((update != 0).sum()) for _, _, update, _ in rows),
    )
    return {f"dual_lora/{name}": figure for name, figure in zip(NAMES, figures, strict=True)}


@pytest.mark.parametrize("door", DOORS)
def test_figures_are_the_formulas(door: str, backend: str) -> None:
    model = DOORS[door]()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with settings(backend=backend):
        found = dual_lora_statistics(model, rows=None)
    assert found == pytest.approx(spelled_out(model), rel=1e-12)  # fp64's rounding of sums
    assert found["dual_lora/rounded_away"] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_sample_is_of_panels_over_the_whole_layer() -> None:
    """Of 300 rows, 128 in two panels: the first 64, and those from 192 on."""
    model = make_exact(apply_dual_lora(nn.Sequential(nn.Linear(20, 300)), DualLoraConfig(r1=3, r2=2)))
    ((_, adapter),) = dual_lora_adapters(model)
    p, q, update = (torch.cat([matrix[:64], matrix[192:256]]) for matrix in products(adapter))
    weight = torch.cat([model[0].weight[:64], model[0].weight[192:256]])
    found = dual_lora_statistics(model, rows=128)
    assert found["dual_lora/frozen"] == pytest.approx(float((p <= 0).double().mean()))
    assert found["dual_lora/negative"] == pytest.approx(float((q <= 0).double().mean()))
    norm = float(update.double().norm())
    assert found["dual_lora/update_norm"] == pytest.approx(norm * math.sqrt(300 / 128))
    assert found["dual_lora/relative_norm"] == pytest.approx(norm / float(weight.double().norm()))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 299, 300, 301])
def test_any_number_of_rows(rows: int) -> None:
    model = make_exact(apply_dual_lora(nn.Sequential(nn.Linear(20, 300)), DualLoraConfig(r1=3, r2=2)))
    found, whole = dual_lora_statistics(model, rows=rows), dual_lora_statistics(model, rows=None)
    assert 0 < found["dual_lora/negative"] < 1
    assert (found == whole) == (rows >= 300)


def test_only_adapters_that_train_count() -> None:
    """TRL keeps a copy of the trained one as its reference."""
    model = pefts()
    expected = dual_lora_statistics(model)
    model.add_adapter("reference", config())
    assert dual_lora_statistics(model) == expected
    model.requires_grad_(False)
    assert dual_lora_statistics(model) != expected


@pytest.mark.parametrize("door", DOORS)
def test_a_merged_weight_is_no_base(door: str) -> None:
    model = DOORS[door]()
    if door == "plain":
        for _, layer in dual_lora_layers(model):
            layer.merge()
    else:
        model.merge_adapter()
    assert dual_lora_statistics(model).keys() == {f"dual_lora/{name}" for name in NAMES[:3]}


@pytest.mark.parametrize("door", DOORS)
def test_sign_churn_is_what_has_changed_since_the_last_call(door: str) -> None:
    model = DOORS[door]()
    monitor = DualLoraMonitor(model, rows=None)
    assert monitor.statistics()["dual_lora/sign_churn"] == 0
    entries = changed = 0
    with torch.no_grad():
        for index, (_, adapter) in enumerate(dual_lora_adapters(model)):
            _, before, _ = products(adapter)
            (adapter.C if index % 2 else adapter.D).mul_(-1)
            _, after, _ = products(adapter)
            entries += before.numel()
            changed += int(((before > 0) != (after > 0)).sum())
    assert monitor.statistics()["dual_lora/sign_churn"] == pytest.approx(changed / entries, abs=1e-15)
    assert 0.5 < changed / entries < 1, "where Q is 0 the sign stays"
    assert monitor.statistics()["dual_lora/sign_churn"] == 0


def test_churn_needs_the_same_layer_before() -> None:
    model = pefts()
    monitor = DualLoraMonitor(model)
    model.add_adapter("second", config())
    model.set_adapter("second")
    found = monitor.statistics()
    assert "dual_lora/sign_churn" not in found
    assert monitor.statistics()["dual_lora/sign_churn"] == 0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got LlamaForCausalLM without Dual LoRA layers"):
        dual_lora_statistics(llama())
    model = plain()
    with pytest.raises(ValueError, match="rows: got 0"):
        dual_lora_statistics(model, rows=0)
    model.model.layers[1].mlp.up_proj.B.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"model: model\.layers\.1\.mlp\.up_proj: the update holds NaN"):
        dual_lora_statistics(model)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp kept", "tp"])
def test_sharded_factors_are_gathered(two: Processes, layout: str) -> None:
    """Sharded weights are not: the figures beside W0 are left out."""
    for whole, found in two.run(cases.statistics, layout):
        assert found.pop("dual_lora/sign_churn") == 0
        left_out = set() if layout == "ddp" else {"dual_lora/relative_norm", "dual_lora/rounded_away"}
        assert found == {name: figure for name, figure in whole.items() if name not in left_out}


def test_the_older_fsdp_has_to_gather(two: Processes) -> None:
    for whole, found, said in two.run(cases.statistics_of_the_older_fsdp):
        assert found == whole
        assert "FSDP1 keep it in parts" in said


def trained(
    door: str, folder: Path, every: int | None, *callbacks: TrainerCallback, resume: str | None = None, **options: Any
) -> Trainer:
    """A Trainer after six steps, with figures logged at `every` few of them."""
    torch.manual_seed(1)
    model = DOORS[door]()
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=2, use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, lr_scheduler_type="constant", seed=0, **{"report_to": [], "logging_steps": 1} | options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[DualLoraWarmupCallback(4), *callbacks])
    if every is not None:
        trainer.add_callback(DualLoraStatisticsCallback(trainer, every_n_steps=every))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Trainer, name: str) -> dict[int, float]:
    """What was logged under a name, by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


@pytest.mark.parametrize("door", DOORS)
def test_figures_reach_tensorboard_and_training_is_the_same(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(events))
    run = trained(door, tmp_path / "with", 2, report_to=["tensorboard"])
    expected = trained(door, tmp_path / "without", None)
    assert history(run, "loss") == history(expected, "loss")
    assert list(history(run, "loss")) == [1, 2, 3, 4, 5, 6]
    state = expected.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.model.state_dict().items())

    written = EventAccumulator(str(events)).Reload()
    for name in (*NAMES, "sign_churn"):
        seen = history(run, f"dual_lora/{name}")
        assert list(seen) == [2, 4, 6]
        scalars = written.Scalars(f"train/dual_lora/{name}")
        assert {event.step: event.value for event in scalars} == pytest.approx(seen, rel=1e-6)  # fp32 in its files
    assert any(history(run, "dual_lora/sign_churn").values())
    last = dual_lora_statistics(run.model)
    assert {name: history(run, name)[6] for name in last} == last


@pytest.mark.parametrize("door", DOORS)
def test_a_resumed_run_logs_on(door: str, tmp_path: Path) -> None:
    """Also the churn, which is since the checkpoint at first: it is the whole run's where both have steps there."""
    whole = trained(door, tmp_path / "run", 2)
    resumed = trained(door, tmp_path / "run", 2, resume=str(tmp_path / "run" / "checkpoint-4"))
    for name in (*NAMES, "sign_churn"):
        seen, again = history(whole, f"dual_lora/{name}"), history(resumed, f"dual_lora/{name}")
        assert list(again) == [2, 4, 6]  # the log of the checkpoint's run, and on
        assert again == pytest.approx(seen, rel=1e-3), "loaded weights lie elsewhere in memory, so products may differ"


@pytest.mark.parametrize("every", [1, 3])
def test_figures_come_beside_other_steps_of_the_log(every: int, tmp_path: Path) -> None:
    run = trained("plain", tmp_path, every, logging_steps=2)
    assert list(history(run, "loss")) == [2, 4, 6]
    assert list(history(run, "dual_lora/frozen")) == list(range(every, 7, every))


class Ruin(TrainerCallback):
    """Writes NaN into a factor after the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            _, adapter = next(dual_lora_adapters(kwargs["model"]))
            adapter.A.data.fill_(math.nan)


def test_training_goes_on_without_figures_where_a_factor_is_nan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dual_lora_kernels"):
        run = trained("plain", tmp_path, 2, Ruin(), save_strategy="no")  # NaN is not saved
    assert list(history(run, "dual_lora/frozen")) == [2]
    assert run.state.global_step == 6
    said = [record.getMessage() for record in caplog.records if "no statistics" in record.getMessage()]
    assert [text.partition(":")[0] for text in said] == [f"no statistics of the adapter at step {n}" for n in (4, 6)]


def test_a_model_without_adapters_is_refused_at_once(tmp_path: Path) -> None:
    trainer = Trainer(llama(), TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[]))
    callback = DualLoraStatisticsCallback(trainer, every_n_steps=1)
    with pytest.raises(ValueError, match="without Dual LoRA layers"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    with pytest.raises(ValueError, match="every_n_steps: got 0"):
        DualLoraStatisticsCallback(trainer, every_n_steps=0)
