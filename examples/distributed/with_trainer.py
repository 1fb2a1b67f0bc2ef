"""The same by transformers' Trainer, on the engine that accelerate's configuration names: DDP, FSDP, DeepSpeed.

    accelerate launch --multi_gpu --num_processes 2 --module examples.distributed.with_trainer
    accelerate launch --config_file examples/distributed/fsdp2.yaml --module examples.distributed.with_trainer

``--multi_gpu`` starts several processes on CPUs too, where ``--cpu`` starts one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from dual_lora_kernels import DualLoraConfig, apply_dual_lora, create_dual_lora_optimizer
from dual_lora_kernels.trainer import DualLoraWarmupCallback

from ..demo.data import BYTE_VOCABULARY, encode_bytes, load_encoder, target_corpus


class DualLoraTrainer(Trainer):
    """A Trainer whose optimiser has a rate for each group, under DeepSpeed too, which ignores ``optimizers=``."""

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with Dual LoRA's parameter groups."""
        if self.optimizer is None:
            own = self.model if model is None else model
            self.optimizer = create_dual_lora_optimizer(own, lr=self.args.learning_rate)
        return self.optimizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="examples.distributed.with_trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a transformers model; default: a small random Llama")
    parser.add_argument("--text", type=Path, help="text file to train on; default: the standard library's sources")
    parser.add_argument("--rank", type=int, default=8, help="of each of the two groups of factors")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/with-trainer"))
    options = parser.parse_args()

    encode = encode_bytes if options.model is None else load_encoder(options.model, 0)[0]
    blocks = target_corpus(options.text, encode, 128, 1).train
    # Before the model: under ZeRO-3 it is what makes models in parts.
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=max(1, options.steps // 2),
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if torch.cuda.is_available() else "gloo",
    )
    torch.manual_seed(0)
    model = _model(options.model)
    apply_dual_lora(model, DualLoraConfig("all-linear", r1=options.rank, r2=options.rank, alpha=2.0 * options.rank))
    trainer = DualLoraTrainer(
        model, arguments, train_dataset=blocks, callbacks=[DualLoraWarmupCallback(max(1, options.steps // 5))]
    )
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))


def _model(folder: Path | None) -> nn.Module:
    if folder is not None:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        return model
    config = LlamaConfig(
        vocab_size=BYTE_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    random: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return random


if __name__ == "__main__":
    main()
