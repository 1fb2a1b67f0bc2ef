"""Text sources, tokenisation into blocks, and the split into training, validation and held-out blocks."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer

Encoder = Callable[[str], list[int]]

BYTE_VOCABULARY = 256
TRAINING_CHARACTERS = 2_000_000
"""More than the longest run reads; keeps the tokenisation of the standard library to about a second."""

_EXCLUDED_FOLDERS = {
    "test", "tests", "idle_test",  # asked for: tests are another kind of text
    "site-packages", "dist-packages", "__pycache__",  # not the standard library
    "encodings",  # character tables
    "pydoc_data",  # the pre-training text
}  # fmt: skip


class InputError(Exception):
    """A checkpoint or text that the user named cannot be used; the message says why."""


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Fixed-length sequences for causal language modelling; the model itself shifts the labels."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = self.blocks[index]
        return {"input_ids": block, "labels": block}


@dataclass(frozen=True)
class Corpus:
    """One domain. ``validation`` chooses learning rates, ``held_out`` is only ever reported."""

    name: str
    train: BlockDataset
    validation: BlockDataset
    held_out: BlockDataset


def encode_bytes(text: str) -> list[int]:
    """The built-in model's vocabulary: one token per byte of UTF-8."""
    return list(text.encode("utf-8"))


def load_encoder(checkpoint: Path, vocabulary: int) -> tuple[Encoder, str]:
    """The checkpoint's tokeniser and what one of its tokens is called.

    A checkpoint of 256 tokens without a tokeniser is one that this demo saved: its tokens are bytes.
    """
    if vocabulary == BYTE_VOCABULARY and not any(checkpoint.glob("tokenizer*")):
        return encode_bytes, "byte"
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} holds no tokeniser that transformers can load: {error}") from error

    def encode(text: str) -> list[int]:
        # verbose=False: the text is cut into blocks afterwards, so exceeding the model's length is no mistake.
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode, "token"


def english_blocks(block_size: int, eval_blocks: int) -> tuple[BlockDataset, BlockDataset]:
    """The help topics that every Python install carries, about 460 kB of English prose, in bytes.

    The last twentieth is held out.
    """
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    cut = len(text) * 19 // 20
    return (
        to_blocks(text[:cut], encode_bytes, block_size),
        to_blocks(text[cut:], encode_bytes, block_size, eval_blocks),
    )


def standard_library_files() -> list[Path]:
    """The standard library's .py files without tests, in an order that depends on their relative paths alone.

    The order is by checksum, so that any prefix of it mixes packages instead of starting with the letter A.
    """
    root = Path(sysconfig.get_path("stdlib"))

    def included(relative: Path) -> bool:
        folders_excluded = _EXCLUDED_FOLDERS.intersection(relative.parts[:-1])
        return not folders_excluded and not relative.name.startswith("_sysconfigdata")

    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(filter(included, relative), key=_path_checksum)]


def _path_checksum(relative: Path) -> tuple[int, str]:
    name = relative.as_posix()
    return zlib.crc32(name.encode("utf-8")), name


def standard_library_texts() -> tuple[str, str, str]:
    """Training, validation and held-out text from disjoint files: every tenth to each of the last two."""
    files = standard_library_files()
    if len(files) < 10:
        raise InputError("this Python carries no .py sources of its standard library; pass --text FILE")
    validation, held_out = files[1::10], files[::10]
    kept_back = {*validation, *held_out}
    return (
        _read([path for path in files if path not in kept_back], TRAINING_CHARACTERS),
        _read(validation, TRAINING_CHARACTERS),
        _read(held_out, TRAINING_CHARACTERS),
    )


def _read(files: list[Path], characters: int) -> str:
    """The files' text, whole files, until it reaches the given length."""
    parts: list[str] = []
    length = 0
    for path in files:
        if length >= characters:
            break
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(parts[-1])
    return "\n".join(parts)


def file_texts(path: Path) -> tuple[str, str, str]:
    """The first 80 % of a file for training, then 10 % for validation and 10 % held out: contiguous, so disjoint."""
    text = path.read_text(encoding="utf-8")
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    return text[:first], text[first:second], text[second:]


def to_blocks(text: str, encode: Encoder, block_size: int, count: int | None = None) -> BlockDataset:
    """Cuts the text into blocks of ``block_size`` tokens; with ``count``, that many at most, evenly spread over it."""
    ids = torch.tensor(encode(text), dtype=torch.long)
    blocks = ids[: len(ids) // block_size * block_size].view(-1, block_size)
    if len(blocks) == 0:
        raise InputError(f"the text has {len(ids)} tokens, fewer than one block of {block_size}")
    if count is not None and count < len(blocks):
        blocks = blocks[torch.arange(count) * len(blocks) // count]
    return BlockDataset(blocks)


def target_corpus(text_file: Path | None, encode: Encoder, block_size: int, eval_blocks: int) -> Corpus:
    """The domain to adapt to: the user's file, or the standard library's sources."""
    if text_file is None:
        name, texts = "standard library sources", standard_library_texts()
    else:
        name, texts = text_file.name, file_texts(text_file)
    train, validation, held_out = texts
    return Corpus(
        name,
        to_blocks(train, encode, block_size),
        to_blocks(validation, encode, block_size, eval_blocks),
        to_blocks(held_out, encode, block_size, eval_blocks),
    )
