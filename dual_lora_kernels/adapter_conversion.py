"""Converting a saved adapter between this package's file and PEFT's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .adapter_files import write_adapter
from .adapter_state import check_value
from .peft_files import PEFT_CONFIG_FILE, write_peft_files
from .saved_adapter import open_adapter, weights_file
from .validation import check_choice

FORMATS = ("dual_lora", "peft")
_ABOUT = ("base_model_name_or_path", "task_type", "auto_mapping", "revision")
"""What PEFT's configuration says of the base model."""


class Conversion(NamedTuple):
    """What `convert_adapter` did: folder, formats, counts, and what is worth telling the user."""

    out: str
    source: str
    target: str
    layers: int
    tensors: int
    notes: tuple[str, ...]


def convert_adapter(
    folder: str | Path, out: str | Path, *, to: str | None = None, base_model: str | None = None
) -> Conversion:
    """Write the adapter in `folder` into `out`, in the other format or in that which `to` names, bit for bit.

    PEFT's files say which base model they are for, this package's do not: `base_model` is its name or path there. What
    PEFT's ``from_pretrained`` needs beyond that (``task_type``) is kept where `folder` has it.

    Raises:
        ValueError: `to` is unknown; `out` holds something; the adapter is damaged, has numbers that are not finite, or
            has layers whose options PEFT's format cannot tell apart.
        FileNotFoundError: `folder` holds no adapter.
        OSError: `out` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    adapter = open_adapter(folder)
    source = "peft" if (folder / PEFT_CONFIG_FILE).is_file() else "dual_lora"
    target = next(name for name in FORMATS if name != source) if to is None else to
    check_choice("to", target, FORMATS)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: got {str(out)!r}, which exists and is not empty, expected a new folder")
    adapter = adapter._replace(state=dict(adapter.state))
    file = str(weights_file(folder))
    for name, tensor in adapter.state.items():
        check_value(repr(file), name, tensor, tensor.dtype)
    notes = []
    if target == "dual_lora":
        write_adapter(out, adapter)
    else:
        about: dict[str, Any] = dict.fromkeys(_ABOUT)
        if source == "peft":
            settings = json.loads((folder / PEFT_CONFIG_FILE).read_bytes())
            about |= {name: settings.get(name) for name in _ABOUT}
        if base_model is not None:
            about["base_model_name_or_path"] = base_model
        if about["base_model_name_or_path"] is None:
            notes.append("it names no base model: AutoPeftModel cannot load it; PeftModel.from_pretrained(base, …) can")
        try:
            write_peft_files(out, adapter, about, {})
        except ValueError as error:
            raise ValueError(f"{file!r}: {error}") from error
    return Conversion(str(out), source, target, len(adapter.configs), len(adapter.state), tuple(notes))
