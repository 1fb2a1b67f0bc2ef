"""transformers' Trainer and TRL's trainers on adapted models, through both doors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dual_lora_kernels import (
    apply_dual_lora,
    create_dual_lora_optimizer,
    load_dual_lora,
    merge_dual_lora,
    set_gradient_columns,
)
from dual_lora_kernels.adapter import dual_lora_adapters
from dual_lora_kernels.trainer import DualLoraWarmupCallback

from .models import VOCABULARY, configuration, llama, logits, tokens
from .peft_models import config

DOORS = ("plain", "peft")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved base model."""
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, door: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if door == "peft":
        return get_peft_model(model, config())
    return apply_dual_lora(model, configuration())


def assert_same(model: nn.Module, expected: torch.Tensor) -> None:
    """Up to the rounding of products, which depends on where in memory weights lie: loaded ones are mapped files."""
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-5, atol=1e-5)


class Scales(TrainerCallback):
    """The scale, relative to the full one, that each step runs with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _, adapter = next(dual_lora_adapters(kwargs["model"]))
        self.seen.append(round(adapter.scale.item() / adapter.full_scale, 4))


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=2, logging_steps=1, report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", seed=0, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    warmup = DualLoraWarmupCallback(4)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[warmup, *callbacks])


@pytest.mark.parametrize("door", DOORS)
def test_checkpoints_are_adapters(door: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The worst is what the last step cannot be.
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(adapted(base, door), tmp_path / "run", **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    assert "missing keys" not in caplog.text
    weights = [file for file in best.glob("*.safetensors") if file.name.startswith(("adapter", "model"))]
    assert max(file.stat().st_size for file in weights) < (base / "model.safetensors").stat().st_size / 2

    loaded = logits(run.model.eval())
    again = AutoModelForCausalLM.from_pretrained(base)
    assert_same(load_dual_lora(again, best), loaded)
    assert_same(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), best), loaded)
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert_same(auto.from_pretrained(best), loaded)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("door", DOORS)
def test_a_resumed_run_ends_as_one_without_a_break(door: str, fraction: float, base: Path, tmp_path: Path) -> None:
    """With the same samples of columns: the Trainer saves PyTorch's random state."""
    scales = Scales()
    model = adapted(base, door)
    set_gradient_columns(model, fraction)
    whole = trainer(model, tmp_path / "run", scales)
    whole.train()
    assert scales.seen == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    rest = Scales()
    again = adapted(base, door)
    set_gradient_columns(again, fraction)
    resumed = trainer(again, tmp_path / "run", rest)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert rest.seen == [0.75, 1.0, 1.0, 1.0]
    assert_same(resumed.model, logits(whole.model.eval()))


def test_a_merged_model_is_saved_whole_again(base: Path, tmp_path: Path) -> None:
    model = adapted(base, "plain")
    expected = logits(model.eval())
    merge_dual_lora(model).save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(again, expected)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("door", DOORS)
def test_two_learning_rates(door: str, base: Path, tmp_path: Path) -> None:
    model = adapted(base, door)
    before = {name: (a.A.detach().clone(), a.C.detach().clone()) for name, a in dual_lora_adapters(model)}
    optimizer = create_dual_lora_optimizer(model, torch.optim.SGD, lr=0.0, direction_lr=0.1)
    run = trainer(model, tmp_path / "run")
    run.optimizer = optimizer
    run.train()
    for name, adapter in dual_lora_adapters(run.model):
        assert torch.equal(adapter.A, before[name][0])
        assert not torch.equal(adapter.C, before[name][1])


@pytest.mark.parametrize("door", DOORS)
def test_gradient_checkpointing_and_compilation_change_nothing(door: str, base: Path, tmp_path: Path) -> None:
    plain = trainer(adapted(base, door), tmp_path / "plain", save_strategy="no")
    plain.train()
    for options in (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ):
        run = trainer(adapted(base, door), tmp_path / "other", save_strategy="no", **options)
        run.train()
        torch.testing.assert_close(logits(run.model.eval()), logits(plain.model.eval()), rtol=1e-4, atol=1e-4)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, … and three special ones."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(VOCABULARY - 3))]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


TEXTS = [" ".join(f"w{(7 * row + 3 * column) % 50}" for column in range(8)) for row in range(16)]
SHORT: dict[str, Any] = {
    "max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "save_steps": 4, "max_length": 16, "bf16": False,
    "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1,
}  # fmt: skip


def test_trls_sft_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run = SFTTrainer(
        llama(), SFTConfig(str(tmp_path), **SHORT), train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer, peft_config=config(), callbacks=[DualLoraWarmupCallback(2)],
    )  # fmt: skip
    run.train()
    trained = logits(run.model.eval())
    assert not torch.equal(trained, logits(llama()))
    assert_same(load_dual_lora(llama(), tmp_path / "checkpoint-4"), trained)


def test_trls_dpo_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its reference is the same model with the adapter disabled."""
    pairs = {"prompt": [f"{text} " for text in TEXTS], "chosen": ["w1 w2"] * 16, "rejected": ["w3 w4"] * 16}
    run = DPOTrainer(
        llama(), args=DPOConfig(str(tmp_path), **SHORT), train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer, peft_config=config(), callbacks=[DualLoraWarmupCallback(2)],
    )  # fmt: skip
    run.train()
    rewards = [entry["rewards/margins"] for entry in run.state.log_history if "rewards/margins" in entry]
    assert rewards[-1] > rewards[0]
    with run.model.disable_adapter():
        assert_same(run.model, logits(llama()))


def test_trls_reference_of_a_trained_adapter(tokenizer: PreTrainedTokenizerFast, base: Path, tmp_path: Path) -> None:
    """It is a second adapter, a copy of the trained one. At the start both give the same logits: the loss is ln 2."""
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config(warmup_steps=3))
    trainer(model, tmp_path / "trained").train()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=True
    )
    pairs = {"prompt": [f"{text} " for text in TEXTS], "chosen": ["w1 w2"] * 16, "rejected": ["w3 w4"] * 16}
    run = DPOTrainer(
        again, args=DPOConfig(str(tmp_path / "dpo"), **SHORT), train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )  # fmt: skip
    run.train()
    assert float(run.state.log_history[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)
