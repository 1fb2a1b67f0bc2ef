"""``save_pretrained`` of an adapted transformers model saves the adapter, as PEFT does, and its Trainer can resume.

transformers would write a state dict that ``from_pretrained`` reads as the bare base model, with a warning only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from .adapter import plain_name, unwrapped
from .adapter_files import WEIGHTS_FILE
from .adapter_state import adapter_of, adapter_tensors
from .linear import dual_lora_layers
from .peft_files import write_peft_files
from .sharding import in_first, is_sharded, reshard

TRAINER_WEIGHTS_FILE = "model.safetensors"
"""What transformers' Trainer reads to resume or to load the best checkpoint: the adapter by the model's own names."""


def save_adapters_by_save_pretrained(model: nn.Module) -> None:
    """Make ``save_pretrained`` of `model`, and of transformers' models within it, write the adapter.

    A model around `model` that is not given here cannot be known; it goes on to save its whole state.
    """
    for inner in unwrapped(model).modules():
        if hasattr(type(inner), "save_pretrained") and hasattr(inner, "config") and any(dual_lora_layers(inner)):
            inner.save_pretrained = partial(save_pretrained, inner)  # type: ignore[assignment]  # a method would not pickle
            # The Trainer warns of every key that a checkpoint lacks, but not if these are just what saving leaves out.
            own = adapter_tensors(inner).keys()
            base = {name for name in inner.state_dict() if plain_name(name) not in own}
            inner._keys_to_ignore_on_save = base  # type: ignore[assignment]


def save_models_by_save_pretrained(model: nn.Module) -> None:
    """Undo `save_adapters_by_save_pretrained`."""
    for inner in unwrapped(model).modules():
        if isinstance(vars(inner).get("save_pretrained"), partial):
            del inner.save_pretrained, inner._keys_to_ignore_on_save


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the adapter of `model` into a folder, in PEFT's format: adapter_config.json, adapter_model.safetensors.

    `load_dual_lora`, PEFT and, where PEFT is installed and `dual_lora_kernels.peft` imported, ``from_pretrained`` read
    it. For transformers' Trainer the same tensors are in model.safetensors too. `state_dict`: the model's, where its
    own tensors are sharded. The whole model: ``merge_dual_lora(model).save_pretrained``.

    Raises as `save_dual_lora` does, and ValueError where layers differ in more than ranks and alpha, for `push_to_hub`,
    or for a folder that holds a model or an adapter of `save_dual_lora`'s.
    """
    if not any(dual_lora_layers(model)):  # a part of it has been merged by itself
        for attribute in ("save_pretrained", "_keys_to_ignore_on_save"):
            vars(model).pop(attribute, None)
        whole: Any = model
        whole.save_pretrained(save_directory, is_main_process, state_dict, push_to_hub=push_to_hub, **options)
        return
    if push_to_hub:
        raise ValueError("push_to_hub: got True, expected False: upload the folder by huggingface_hub.upload_folder")
    for file, holds in (("config.json", "a model"), (WEIGHTS_FILE, "an adapter of save_dual_lora's")):
        if (Path(save_directory) / file).exists():
            raise ValueError(
                f"save_directory: got {str(save_directory)!r}, which holds {holds}, expected another folder"
            )
    reshard(model)
    tensors = adapter_tensors(model).values() if state_dict is None else ()
    if not is_main_process and not any(map(is_sharded, tensors)):  # all take part in gathering sharded tensors
        return
    adapter = adapter_of(model, state_dict)

    def write() -> None:
        names = {plain_name(name): name for name in model.state_dict()}  # with those of blocks compiled one by one
        own = {names.get(name, name): tensor for name, tensor in adapter.state.items()}
        resuming = {TRAINER_WEIGHTS_FILE: save(own, metadata={"format": "pt"})}
        write_peft_files(Path(save_directory), adapter, _about(model), resuming)

    in_first(tensors, write)


def _about(model: nn.Module) -> dict[str, Any]:
    """What PEFT's files say of the base model, for ``AutoPeftModel`` to make it again."""
    kind = type(model)
    is_causal = kind.__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": "CAUSAL_LM" if is_causal else None,
        "auto_mapping": None if is_causal else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    }
