"""What a checkpoint has beside its weights: configuration, tokenizer, templates, code, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".tflite", ".npz", ".index.json",
)  # fmt: skip
_LEFT_OUT = ("README.md", "config.json", "adapter_config.json", "dual_lora_config.json")
"""The model card speaks of the base; config.json is written by itself; an adapter's settings are no model's."""
COPIED_FOLDERS = ("additional_chat_templates",)
_LARGEST = 256 * 2**20
"""Bytes of one such file. Tokenizers have some ten MB."""


def other_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder to be copied, as paths relative to it.

    Raises ValueError for a file that is none of the folder's own (a symbolic link out of it, other than to the blobs of
    a Hugging Face cache: a downloaded folder could point at the user's keys, and the merged one may be published), for
    pipes and devices, and for files of over 256 MiB.
    """
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _LEFT_OUT]
    files = [path for path in found if not path.name.endswith(_WEIGHTS) and not path.is_dir()]
    for name in COPIED_FOLDERS:
        if (folder / name).is_dir():
            files += [path for path in (folder / name).iterdir() if not path.is_dir()]
    for path in files:
        check_own(folder, path)
    return sorted(path.relative_to(folder) for path in files)


def check_own(folder: Path, path: Path) -> None:
    """Raise ValueError unless `path` is a regular file of moderate size in `folder`, or in its cache's blobs."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle, before Python 3.13
        raise ValueError(f"base: {str(path)!r} cannot be followed: {error}") from error
    home = folder.resolve()
    cache = home.parent.parent / "blobs"  # models--owner--name/{snapshots/<commit>, blobs}
    allowed = [home, cache] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"base: {str(path)!r} is a link out of the folder, to {str(real)!r}, expected a file of the folder's own, "
            "since it would be copied into the merged model"
        )
    if not real.is_file():
        raise ValueError(f"base: {str(path)!r} is no regular file, expected one, or none")
    if real.stat().st_size > _LARGEST:
        raise ValueError(f"base: {str(path)!r} has {real.stat().st_size:,} bytes, expected {_LARGEST:,} at most")


def copy_files(folder: Path, names: list[Path], out: Path) -> None:
    """Copy files by their relative paths."""
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
