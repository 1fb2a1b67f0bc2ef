"""The demo's command line: every option, its default, and the checks made before any work starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .models import METHODS

LONG_FACTOR = 8
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """One run of the demo. Sizes are in tokens, which are bytes for the built-in model."""

    out: Path
    model: Path | None = None
    text: Path | None = None
    methods: tuple[str, ...] = tuple(METHODS)
    pretrain_steps: int = 300
    steps: int = 80
    batch_size: int = 4
    block_size: int = 128
    eval_blocks: int = 64
    rank: int = 16
    hidden_size: int = 256
    layers: int = 4
    dtype: str = "float32"
    seed: int = 0
    learning_rates: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.batch_size * self.block_size

    def learning_rate(self, method: str) -> float:
        """The peak learning rate of a method: the user's, or the one found by the sweep."""
        return self.learning_rates.get(method, METHODS[method].learning_rate)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _checkpoint_folder(text: str) -> Path:
    folder = Path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{folder} holds no config.json, so it is not a transformers checkpoint")
    return folder


def _text_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as UTF-8 text: {error}") from error
    return path


def _method_rate(text: str) -> tuple[str, float]:
    method, separator, rate = text.partition("=")
    if not separator or method not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD=RATE with METHOD one of {', '.join(METHODS)}")
    try:
        value = float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rate!r} in {text!r} is not a number") from None
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"the learning rate in {text!r} must be positive and finite")
    return method, value


def build_parser(prog: str, description: str, default_out: str) -> argparse.ArgumentParser:
    """The options that the demo and its sweep share."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=default_out, help="folder that the results are written to")
    add(
        "--model",
        type=_checkpoint_folder,
        metavar="PATH",
        help="local transformers checkpoint to adapt instead of pre-training the built-in model",
    )
    add(
        "--text",
        type=_text_file,
        metavar="FILE",
        help="UTF-8 text to adapt to instead of the standard library's sources; its end is held out",
    )
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), help="methods to compare")
    add("--learning-rate", nargs="+", type=_method_rate, metavar="METHOD=RATE", help="override a method's rate")
    add("--long", action="store_true", help=f"{LONG_FACTOR} times as many steps, pre-training and adaptation alike")
    for name, kind, text in (
        ("pretrain-steps", _positive, "optimiser steps of pre-training"),
        ("steps", _positive, "optimiser steps of each adaptation"),
        ("batch-size", _positive, "sequences in a step"),
        ("block-size", _positive, "tokens in a sequence"),
        ("eval-blocks", _positive, "held-out sequences"),
        ("rank", _positive, "LoRA's and DoRA's rank; Dual LoRA gets half of it for each of its two groups"),
        ("hidden-size", _positive, "width of the built-in model, a multiple of 8"),
        ("layers", _positive, "layers of the built-in model"),
        ("seed", int, "seed of initialisation and data order"),
    ):
        add(f"--{name}", type=kind, default=getattr(Settings, name.replace("-", "_")), help=text)
    add("--dtype", choices=DTYPES, default=Settings.dtype, help="dtype of the base model")
    return parser


def settings_from(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Settings:
    """Parses the command line; exits through ``parser.error`` when an option makes no sense."""
    parsed = parser.parse_args(arguments)
    if parsed.rank % 2:
        parser.error(f"--rank {parsed.rank} must be even: Dual LoRA splits it between two groups")
    if parsed.hidden_size % 8:
        parser.error(
            f"--hidden-size {parsed.hidden_size} must be a multiple of 8: 4 attention heads, each of even width"
        )
    if parsed.block_size < 2:
        parser.error("--block-size must be at least 2: the loss predicts the next token")
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {parsed.out} cannot be created: {error.strerror}")
    factor = LONG_FACTOR if parsed.long else 1
    return Settings(
        out=parsed.out,
        model=parsed.model,
        text=parsed.text,
        methods=tuple(dict.fromkeys(parsed.methods)),
        pretrain_steps=parsed.pretrain_steps * factor,
        steps=parsed.steps * factor,
        batch_size=parsed.batch_size,
        block_size=parsed.block_size,
        eval_blocks=parsed.eval_blocks,
        rank=parsed.rank,
        hidden_size=parsed.hidden_size,
        layers=parsed.layers,
        dtype=parsed.dtype,
        seed=parsed.seed,
        learning_rates=dict(parsed.learning_rate or ()),
    )
