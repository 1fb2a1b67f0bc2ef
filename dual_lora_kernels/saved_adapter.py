"""Opening a saved adapter, whichever of the two formats it is in."""

from __future__ import annotations

from pathlib import Path

from .adapter import plain_name
from .adapter_files import WEIGHTS_FILE, Adapter, open_adapter_file
from .peft_files import PEFT_CONFIG_FILE, PEFT_WEIGHTS_FILE, open_peft_files
from .safetensors_file import LazyTensors


def open_adapter(folder: Path) -> Adapter:
    """What is in `folder`: an adapter of `save_dual_lora`, or one in PEFT's files. Names as `plain_name` gives them.

    Its `state` reads a tensor each time it is asked for one, from the file that was opened, so no more than that one is
    in memory. Raises FileNotFoundError where there is no adapter, ValueError where there are two, or files are damaged.
    """
    configs, state, modules_to_save = _open_as_saved(folder)
    assert isinstance(state, LazyTensors)
    return Adapter(
        {plain_name(name): config for name, config in configs.items()},
        state.renamed({plain_name(name): name for name in state}),
        tuple(map(plain_name, modules_to_save)),
    )


def weights_file(folder: Path) -> Path:
    """The file that `open_adapter` reads tensors from."""
    return folder / (PEFT_WEIGHTS_FILE if (folder / PEFT_CONFIG_FILE).is_file() else WEIGHTS_FILE)


def _open_as_saved(folder: Path) -> Adapter:
    if not (folder / PEFT_CONFIG_FILE).is_file():
        return open_adapter_file(folder)
    if (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"folder: got {str(folder)!r}, which holds two adapters, in {WEIGHTS_FILE} and in PEFT's files; expected "
            "one: remove the older"
        )
    return open_peft_files(folder)
