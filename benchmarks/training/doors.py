"""What the door costs: `apply_dual_lora` beside PEFT's ``get_peft_model``, in the Trainer and in generation.

    python -m benchmarks.training.doors --threads 2

One unit of training is a Trainer run of 4 steps, 4 × 64 tokens; of generation, 32 tokens from 8, greedily, batch 1.
Every adapter is on all linear layers of a small Llama, at equal trainable parameters.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, merge_dual_lora
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.peft import DualLoraConfig as PeftDualLoraConfig

from ..harness import report
from ..harness.environment import environment, sentence
from ..harness.timing import Quartiles, Seconds, interleaved, quartiles, ratios

STEM = "cpu_doors"
HEADINGS = ("", "median ms", "× plain door", "quartiles")
STEPS, SEQUENCE, BATCH, NEW_TOKENS = 4, 64, 4, 32
VOCABULARY = 512
_RANK = 16
TRAINED = ("LoRA (PEFT)", "plain door", "PEFT's door")


def base_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same for all."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(name: str, hidden: int, layers: int) -> nn.Module:
    """The model by one way of adapting it, or by none."""
    model = base_model(hidden, layers)
    if name == "base":
        base: nn.Module = model
        return base
    torch.manual_seed(1)
    if name == "LoRA (PEFT)":
        config: Any = LoraConfig(r=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    elif name == "PEFT's door":
        config = PeftDualLoraConfig(r1=_RANK, r2=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        return apply_dual_lora(model, DualLoraConfig(r1=_RANK, r2=_RANK))
    tuned: nn.Module = get_peft_model(model, config)
    return tuned


def trainings(hidden: int, layers: int, folder: str) -> dict[str, Callable[[], object]]:
    """A Trainer run for each way."""
    rows = torch.randint(2, VOCABULARY, (STEPS * BATCH, SEQUENCE), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_strategy="no",
    )  # fmt: skip
    trainers = {
        name: Trainer(adapted(name, hidden, layers), copy.deepcopy(arguments), train_dataset=data) for name in TRAINED
    }
    for trainer in trainers.values():
        trainer.remove_callback(PrinterCallback)
    return {name: trainer.train for name, trainer in trainers.items()}


def generations(hidden: int, layers: int) -> dict[str, Callable[[], object]]:
    """Greedy generation for each way, also from W that is kept and from merged weights."""

    def generate(model: nn.Module) -> Callable[[], object]:
        rows = torch.arange(2, 10)[None]
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        model.eval()
        return lambda: model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)  # type: ignore[operator]

    runs = {name: generate(adapted(name, hidden, layers)) for name in ("base", *TRAINED)}
    kept = adapted("plain door", hidden, layers).eval()
    for _, layer in dual_lora_layers(kept):
        layer.prepare()
    runs["plain door, prepared"] = generate(kept)
    runs["merged"] = generate(merge_dual_lora(adapted("plain door", hidden, layers)))
    return runs


def rows(seconds: Seconds, part: int) -> list[tuple[str, Quartiles, Quartiles]]:
    """(way, ms for one of `part` parts of a unit, ratio to the plain door)."""
    return [
        (name, quartiles([value * 1e3 / part for value in values]), ratios(seconds, name, "plain door"))
        for name, values in seconds.items()
    ]


def cells(table: Sequence[tuple[str, Quartiles, Quartiles]]) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``."""
    return [
        (name, f"{times.median:.2f}", f"{ratio.median:.3f}", f"{ratio.lower:.3f} to {ratio.upper:.3f}")
        for name, times, ratio in table
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.doors", description="What the door costs.")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 64 (256)")
    parser.add_argument("--layers", type=int, default=4, help="blocks (4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, about = Console(), environment(torch.device("cpu"))
    shape = options.hidden, options.layers
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT calls is deprecated in transformers
        trained = interleaved(trainings(*shape, folder), rounds=options.rounds, warmup=2, device=cpu, console=console)
        generated = interleaved(generations(*shape), rounds=options.rounds, warmup=2, device=cpu, console=console)
    title = f"Doors: Llama of {shape[1]} layers, hidden {shape[0]}, fp32, r1=r2={_RANK}"
    tables = {
        f"a Trainer's step of {BATCH} × {SEQUENCE} tokens": rows(trained, STEPS),
        "a generated token": rows(generated, NEW_TOKENS),
    }
    paragraphs = [f"# {title}"]
    for what, table in tables.items():
        report.print_table(f"{title}: {what}", HEADINGS, cells(table), console)
        paragraphs += [f"Time of {what}:", report.markdown_table(HEADINGS, cells(table))]
    reading = "Each round runs every way once; a ratio is the median over rounds of the ratio within a round."
    document = {
        "settings": {"hidden": shape[0], "layers": shape[1], "rounds": options.rounds},
        "environment": about,
        "seconds": {"training": trained, "generation": generated},
    }
    report.write(options.out, STEM, document, [*paragraphs, reading, sentence(about)])


if __name__ == "__main__":
    main()
