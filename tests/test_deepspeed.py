"""Training by DeepSpeed's ZeRO-2 and ZeRO-3 computes what one process does, and what it keeps in parts is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dual_lora_kernels import dual_lora_state_dict, save_dual_lora
from dual_lora_kernels.adapter_files import WEIGHTS_FILE

from . import deepspeed_cases as cases
from .distributed_cases import adapted
from .models import llama
from .processes import Processes

DTYPES = [torch.float32, torch.bfloat16]
STAGES = [2, 3]


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    """Two processes of this file's own: DeepSpeed replaces nn.functional.linear for the rest of a process's life."""
    processes = Processes(2)
    yield processes
    processes.end()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_training(pair: Processes, stage: int, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for result in pair.run(cases.train, stage, dtype, 20):
        assert result["loss"] <= 4 * eps
        assert result["gradients"] <= 64 * eps
        assert result["losses"][:5] == pytest.approx(result["expected"][:5], rel=16 * eps)
        # A free run may take another way where a last bit turns a sign.
        assert result["losses"] == pytest.approx(result["expected"], rel=0, abs=0.05)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("door", ["own", "peft"])
@pytest.mark.parametrize("way", cases.IN_PARTS)
def test_a_base_model_in_parts_is_adapted(pair: Processes, saved_model: Path, way: str, door: str) -> None:
    for result in pair.run(cases.adapt_in_parts, way, door, saved_model):
        assert result["losses"] == pytest.approx(result["expected"], rel=16 * torch.finfo(result["dtype"]).eps)


def test_what_needs_whole_parameters_says_so(pair: Processes, tmp_path: Path) -> None:
    for messages in pair.run(cases.refusals, tmp_path / "adapter"):
        for case, message in messages.items():
            assert "expected the whole: within deepspeed.zero.GatheredParameters(" in message, f"{case}: {message}"


@pytest.mark.parametrize("stage", STAGES)
def test_the_files_are_one_processs(pair: Processes, stage: int, tmp_path: Path) -> None:
    model = adapted()
    save_dual_lora(model, tmp_path / "one" / "own")
    model.save_pretrained(tmp_path / "one" / "peft")  # type: ignore[operator]
    pair.run(cases.save, stage, tmp_path)
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*")]
    for rank in ("0", "1"):
        assert len(list((tmp_path / rank).glob("*/*"))) == len(names)
        for name in names:
            assert (tmp_path / rank / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    # The engine's own names would begin with "module.".
    assert load_file(tmp_path / "0" / "own" / WEIGHTS_FILE).keys() == dual_lora_state_dict(model).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_loads_it(pair: Processes, stage: int, tmp_path: Path) -> None:
    save_dual_lora(adapted(), tmp_path)
    pair.run(cases.load, stage, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_merging(pair: Processes, stage: int, dtype: torch.dtype) -> None:
    pair.run(cases.merge, stage, dtype)


@pytest.mark.parametrize("stage", STAGES)
def test_a_prepared_layer_notices_a_step(pair: Processes, stage: int) -> None:
    pair.run(cases.prepare, stage)


@pytest.mark.parametrize("door", ["own", "peft"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_rises_once_a_step(pair: Processes, stage: int, door: str) -> None:
    steps = range(1, cases.WARM_UP + 2)
    expected = [min(1.0, part / cases.WARM_UP) for step in steps for part in (step, step + 1)]
    for parts in pair.run(cases.warm_up, stage, door):
        assert parts == pytest.approx(expected)
