"""Saving and loading of spread models: each function is one process's part of a test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dual_lora_kernels import (
    DualLoraWarmup,
    dual_lora_state_dict,
    load_dual_lora,
    load_dual_lora_state_dict,
    merge_dual_lora,
    save_dual_lora,
    set_gradient_columns,
)
from dual_lora_kernels.distributed import (
    latest_checkpoint,
    load_checkpoint,
    parallelize_dual_lora,
    save_checkpoint,
    save_merged,
)
from dual_lora_kernels.distributed.processes import in_rank_0
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.sharding import full

from .distributed_cases import LAYOUTS, adapted, batch, loss_of, optimiser
from .distributed_cases import _mean as mean
from .distributed_cases import _own_rows as own_rows
from .distributed_layers import peft_model
from .models import llama, tokens


def spread(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return LAYOUTS[name].spread(adapted(dtype))


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(tensor) for name, tensor in dual_lora_state_dict(model).items()}


def save(name: str, folder: Path) -> None:
    """The adapter in this package's format, and in PEFT's by ``save_pretrained``."""
    model = spread(name)
    save_dual_lora(model, folder / "own")
    inner: Any = getattr(model, "module", model)
    inner.save_pretrained(folder / "peft", is_main_process=dist.get_rank() == 0)
    dist.barrier()


def load(name: str, folder: Path) -> None:
    """Saved values arrive in an adapted, spread model."""
    model = spread(name)
    with torch.no_grad():
        for tensor in dual_lora_state_dict(model).values():
            tensor.zero_()
    load_dual_lora(model, folder)
    expected = dual_lora_state_dict(adapted())
    for key, tensor in _whole(model).items():
        assert torch.equal(tensor, expected[key]), key


def load_after_a_call(name: str, folder: Path) -> None:
    """``fully_shard`` leaves some parameters gathered after a call; what is written into those would be lost."""
    model = spread(name)
    own = own_rows(batch(0), LAYOUTS[name])
    with torch.no_grad():
        loss_of(model, own)
    save_dual_lora(model, folder / "first")
    state = {key: torch.full_like(tensor, 0.25) for key, tensor in dual_lora_state_dict(adapted()).items()}
    loss_of(model, own)
    load_dual_lora_state_dict(model, state)
    loss_of(model, own).backward()
    for key, tensor in _whole(model).items():
        assert torch.equal(tensor, state[key]), key
    load_dual_lora(model, folder / "first")
    loss_of(model, own)
    save_merged(model, folder / "merged")
    assert next(iter(dual_lora_layers(model)))[1].merged is False
    expected = merge_dual_lora(adapted()).state_dict()
    for file in (folder / "merged").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            assert torch.equal(tensor, expected[key]), key


def merge_after_a_call(door: str) -> None:
    """PEFT's merge and unmerge, and this package's refusal, where the root of ``fully_shard`` is gathered."""
    model: Any = adapted() if door == "own" else peft_model()
    fully_shard(model)
    own = tokens(dist.get_world_size())[dist.get_rank()][None]
    with torch.no_grad():
        before = model(own).logits.clone()
        if door == "own":
            with pytest.raises(ValueError, match="with a sharded weight"):
                merge_dual_lora(model)
        else:
            model.merge_adapter()
            torch.testing.assert_close(model(own).logits, before)
            model.unmerge_adapter()
        assert torch.equal(model(own).logits, before)


def refuse_on_two_meshes(folder: Path, kind: str) -> str:
    """Some layers are spread over all four processes and the first over two of them; or each over another pair."""
    model: Any = adapted()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {f"model.layers.*.mlp.{name}_proj": style for name, style in PLAN.items()}
    parallelize_dual_lora(model, mesh["tp"], plan)
    for block in model.model.layers:
        fully_shard(block.self_attn, mesh=mesh["dp"])
    if kind == "one within the other":
        fully_shard(model, mesh=mesh["dp"])
    (folder / "file").write_text("")
    dist.barrier()
    try:
        save_dual_lora(model, folder / "file")
    except OSError as error:
        return str(error)
    return "nothing was raised"


PLAN = {"gate": "colwise", "up": "colwise", "down": "rowwise"}


def save_part_of_a_state_dict(folder: Path) -> str:
    model: Any = spread("fsdp")
    try:
        model.save_pretrained(folder, is_main_process=dist.get_rank() == 0, state_dict={})
    except ValueError as error:
        return str(error)
    return "nothing was raised"


class _Stubborn(Exception):
    """Holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("no")
        self.held = (number for number in ())


def raise_what_does_not_pickle() -> str:
    def act() -> None:
        raise _Stubborn

    try:
        in_rank_0(act)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def save_while_warming_up(folder: Path) -> tuple[list[float], list[float]]:
    """PyTorch makes an optimiser's state by a step without effect, in every save where it has none of its own."""
    model = spread("fsdp")
    for _, layer in dual_lora_layers(model):
        layer.warm_up(8)
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [layer.scale.item() for _, layer in dual_lora_layers(model)]
    for step in (1, 2):
        own.zero_grad()
        path = save_checkpoint(folder, step, model, own)
    load_checkpoint(path, model, own)
    return before, [layer.scale.item() for _, layer in dual_lora_layers(model)]


def refuse_to_save(folder: Path) -> None:
    """An error of the first process, which alone writes, is every process's; and one that a part alone has."""
    model = spread("fsdp")
    (folder / "file").write_text("")
    dist.barrier()
    with pytest.raises(OSError, match="expected one that an adapter can be written to"):
        save_dual_lora(model, folder / "file")
    layer = next(iter(dual_lora_state_dict(model).values()))
    if dist.get_rank() == 1:
        layer.to_local().fill_(torch.nan)  # type: ignore[operator]
    with pytest.raises(ValueError, match="expected finite values"):
        save_dual_lora(model, folder / "other")
    assert not (folder / "other").exists()


class _Run:
    """A run that can be interrupted: model, optimiser and warm-up."""

    def __init__(self, name: str) -> None:
        self.layout = LAYOUTS[name]
        self.model = spread(name)
        self.optimizer = optimiser(self.model)
        self.warmup = DualLoraWarmup(self.model, 4)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss = loss_of(self.model, own_rows(batch(step), self.layout))
            loss.backward()
            self.optimizer.step()
            self.warmup.step()
            losses.append(mean(loss))
        return losses

    def save(self, folder: Path, step: int) -> Path:
        return save_checkpoint(folder, step, self.model, self.optimizer, {"warmup": self.warmup})

    def load(self, folder: Path) -> int:
        checkpoint = latest_checkpoint(folder)
        assert checkpoint is not None
        return load_checkpoint(checkpoint, self.model, self.optimizer, {"warmup": self.warmup})


def resume(name: str, other: str, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 2 to 4 as they were, and after resuming in another layout from step 2."""
    run = _Run(name)
    run.steps(0, 2)
    path = run.save(folder, 2)
    assert path.name == "step-00000002"
    went_on = run.steps(2, 5)
    again = _Run(other)
    assert again.load(folder) == 2
    return went_on, again.steps(2, 5)


def resume_samples(folder: Path) -> tuple[list[float], list[float]]:
    """`resume` in the same layout, with samples of columns that processes draw by themselves."""
    torch.manual_seed(100 + dist.get_rank())
    runs = []
    for _ in range(2):
        run = _Run("ddp")
        run.model.train()
        set_gradient_columns(run.model, 0.5)
        runs.append(run)
    runs[0].steps(0, 2)
    runs[0].save(folder, 2)
    went_on = runs[0].steps(2, 6)
    assert runs[1].load(folder) == 2
    return went_on, runs[1].steps(2, 6)


def several(folder: Path) -> None:
    """The newest two stay, and an unfinished one goes."""
    run = _Run("fsdp")
    if dist.get_rank() == 0:
        (folder / "step-00000009.unfinished").mkdir(parents=True)
        (folder / "step-00000007").mkdir()  # without metadata: not one
    dist.barrier()
    for step in (3, 2, 10, 11):
        run.save(folder, step)
        latest = latest_checkpoint(folder)
        assert latest is not None
        assert latest.name == f"step-{max(step, 3):08d}"
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000007", "step-00000010", "step-00000011"]


@contextmanager
def _killed_while_writing() -> Iterator[None]:
    """Process 1 is killed once it has written half of its part."""
    write = FileSystemWriter.write_data

    def half(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
        if dist.get_rank() != 1:
            return write(self, plan, planner)
        result = write(self, plan, planner)
        for path in Path(self.path).glob("__1_*"):
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    with mock.patch.object(FileSystemWriter, "write_data", half):
        yield


def killed(folder: Path) -> list[float]:
    """Step 2 is saved; saving step 3 ends process 1. Not reached there."""
    run = _Run("fsdp")
    run.steps(0, 2)
    run.save(folder, 2)
    run.steps(2, 3)
    with _killed_while_writing():
        run.save(folder, 3)
    return []


def after_the_kill(folder: Path) -> tuple[list[float], list[float]]:
    """Losses of steps 2 to 4 of a run without a kill, and of one from what the killed run left."""
    run, again = _Run("fsdp"), _Run("fsdp")
    run.steps(0, 2)
    assert again.load(folder) == 2
    return run.steps(2, 5), again.steps(2, 5)


def misfits(folder: Path) -> dict[str, str]:
    """The messages of what cannot be loaded or saved, by a word for each."""
    run = _Run("fsdp")
    run.save(folder, 1)
    other = LAYOUTS["fsdp"].spread(adapted(r1=5))
    file = folder / "file"
    file.write_text("")
    dist.barrier()
    cases = {
        "ranks": lambda: load_checkpoint(folder / "step-00000001", other),
        "no checkpoint": lambda: load_checkpoint(folder / "step-00000005", other),
        "no name": lambda: load_checkpoint(folder, other),
        "step": lambda: save_checkpoint(folder, 0, other),
        "frozen": lambda: save_checkpoint(folder, 1, llama().requires_grad_(False)),
        "a file": lambda: save_checkpoint(file, 1, other),
        "none": lambda: load_checkpoint(latest_checkpoint(folder / "empty"), other),  # type: ignore[arg-type]
        "another optimiser": lambda: save_checkpoint(folder, 1, other, run.optimizer),
        "a number": lambda: save_checkpoint(folder, 1, other, None, {"n": 3}),
        "no scheduler": lambda: load_checkpoint(folder / "step-00000001", run.model, None, {"other": run.warmup}),
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
            messages[name] = "nothing was raised"
        except (ValueError, TypeError, OSError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


def merge(name: str, dtype: torch.dtype, folder: Path) -> None:
    """The files hold the bits of merging in one process; the model computes as before; W0 is back."""
    from transformers import AutoModelForCausalLM

    model = spread(name, dtype)
    before = _logits(model, name)
    save_merged(model, folder)
    assert torch.equal(_logits(model, name), before)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = merge_dual_lora(adapted(dtype)).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    leftovers = [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]
    assert not leftovers
    assert not (folder / "sharded").exists()
    with pytest.raises(ValueError, match="which exists, expected a new one"):
        save_merged(model, folder)


def _logits(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        rows = own_rows(tokens(dist.get_world_size()), LAYOUTS[name])
        return model(rows).logits.clone()  # type: ignore[no-any-return]


def merge_what_overflows(folder: Path) -> None:
    """One process alone has the element that would overflow: all refuse, and nothing is written or changed."""
    model = spread("fsdp", torch.float16)
    for layer in model.modules():
        if hasattr(layer, "scale"):
            layer.scale.fill_(1e6)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="overflow"):
        save_merged(model, folder)
    assert not folder.exists()
