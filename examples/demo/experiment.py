"""The stages that the demo and its sweep share: obtain a base, load the target domain, adapt a fresh copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn
from transformers import AutoConfig, set_seed
from transformers.utils import logging as transformers_logging

from .data import (
    BlockDataset,
    Corpus,
    Encoder,
    InputError,
    encode_bytes,
    english_blocks,
    load_encoder,
    target_corpus,
)
from .models import METHODS, load_base, one_group, tiny_llama
from .options import Settings
from .training import TrainingRun, train

PRETRAINING_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Base:
    """The checkpoint that every method starts from, and what one of its tokens is called."""

    checkpoint: Path
    unit: str
    corpus: Corpus
    pretraining: TrainingRun | None


def prepare_base(settings: Settings, console: Console) -> Base:
    """Takes the user's checkpoint, or pre-trains the built-in model and saves it under the results folder."""
    transformers_logging.disable_progress_bar()  # a bar for each of many loads of a small checkpoint
    if settings.model is None:
        checkpoint = settings.out / "base"
        encode: Encoder = encode_bytes
        unit = "byte"
    else:
        try:
            config = AutoConfig.from_pretrained(settings.model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{settings.model}: transformers cannot read its config.json: {error}") from error
        longest = getattr(config, "max_position_embeddings", settings.block_size)
        if settings.block_size > longest:
            raise InputError(f"--block-size {settings.block_size} exceeds the model's {longest} positions")
        checkpoint = settings.model
        encode, unit = load_encoder(checkpoint, config.vocab_size)
    corpus = target_corpus(settings.text, encode, settings.block_size, settings.eval_blocks)
    console.print(
        f"Target: {corpus.name}: {len(corpus.train)} training, {len(corpus.validation)} validation and "
        f"{len(corpus.held_out)} held-out blocks of {settings.block_size} {unit}s"
    )
    pretraining = _pretrain(settings, checkpoint, console) if settings.model is None else None
    return Base(checkpoint, unit, corpus, pretraining)


def _pretrain(settings: Settings, checkpoint: Path, console: Console) -> TrainingRun:
    set_seed(settings.seed)
    model = tiny_llama(settings.hidden_size, settings.layers, settings.block_size)
    train_blocks, held_out_blocks = english_blocks(settings.block_size, settings.eval_blocks)
    console.print(
        f"Pre-training a byte-level Llama of {model.num_parameters():,} parameters on {len(train_blocks)} blocks "
        "of English documentation"
    )
    run = train(
        model,
        one_group(model, PRETRAINING_LEARNING_RATE),
        train_blocks,
        held_out_blocks,
        label="pre-training",
        out=settings.out,
        steps=settings.pretrain_steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        evaluations=1,
    )
    model.save_pretrained(checkpoint)
    return run


def adapt(
    settings: Settings, base: Base, method: str, learning_rate: float, held_out: BlockDataset, evaluations: int
) -> tuple[nn.Module, TrainingRun]:
    """Adapts a fresh copy of the base; every method sees the same batches in the same order."""
    chosen = METHODS[method]
    set_seed(settings.seed)
    model = chosen.prepare(load_base(base.checkpoint, settings.dtype), settings.rank)
    run = train(
        model,
        chosen.parameter_groups(model, learning_rate),
        base.corpus.train,
        held_out,
        label=chosen.label,
        out=settings.out,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        evaluations=evaluations,
        callbacks=chosen.callbacks(settings.steps),
    )
    return model, run
