"""Where a checkpoint has a layer's weight, how it is oriented, and its blocks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dual_lora_kernels.base_checkpoint import _CONV1D_MODELS, BaseCheckpoint

from .merged_checkpoints import save_base
from .models import gpt2, llama


def checkpoint(folder: Path, state: dict[str, torch.Tensor], **config: object) -> BaseCheckpoint:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return BaseCheckpoint(folder)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    transposed=st.booleans(),
    budget=st.integers(1, 4000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_blocks_make_up_the_weight(
    shape: tuple[int, int], transposed: bool, budget: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    weight = torch.randn(shape).to(dtype)
    stored = weight.t().contiguous() if transposed else weight
    folder = tmp_path_factory.mktemp("base") / "base"
    with checkpoint(folder, {"h.0.a.weight": stored}, model_type="gpt2" if transposed else "llama") as base:
        found = base.layer("h.0.a", shape)
        assert (found.shape, found.dtype, found.transposed) == (shape, dtype, transposed)
        whole = torch.full(shape, torch.nan, dtype=dtype)
        row_bytes = stored.shape[1] * dtype.itemsize
        for (row, column), block in found.blocks(budget):
            assert block.numel() * dtype.itemsize <= max(budget, row_bytes)
            whole[row : row + block.shape[0], column : column + block.shape[1]] = block
    assert torch.equal(whole, weight)


@pytest.mark.parametrize(
    ("layer", "stored"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("transformer.h.0.q", "h.0.q"),
        ("h.0.q", "transformer.h.0.q"),
        ("model.language_model.layers.0.q", "language_model.model.layers.0.q"),
        ("model.language_model.layers.0.q", "model.layers.0.q"),
        ("model.visual.blocks.0.qkv", "visual.blocks.0.qkv"),
    ],
)
def test_names_with_a_prefix_more_or_less(layer: str, stored: str, tmp_path: Path) -> None:
    state = {f"{stored}.weight": torch.zeros(3, 2), "vision_tower.layers.0.q.weight": torch.zeros(3, 2)}
    with checkpoint(tmp_path, state) as base:
        assert base.layer(layer, (3, 2)).name == f"{stored}.weight"


@pytest.mark.parametrize("layer", ["decoder.block.0.q", "model.layers.1.q", "encoder.block.0.k", "q", "0.q"])
def test_other_names_are_not_guessed(layer: str, tmp_path: Path) -> None:
    """An encoder's weight is not the decoder's, however alike their names are."""
    state = {f"{name}.weight": torch.zeros(3, 2) for name in ("encoder.block.0.q", "model.layers.0.q")}
    with checkpoint(tmp_path, state) as base, pytest.raises(ValueError, match=f"{layer}.weight"):
        base.layer(layer, (3, 2))


def test_several_that_could_be_meant(tmp_path: Path) -> None:
    state = {f"{name}.layers.0.q.weight": torch.zeros(3, 2) for name in ("text", "vision")}
    with checkpoint(tmp_path, state) as base, pytest.raises(ValueError, match=r"could be meant: text\..*, vision\."):
        base.layer("layers.0.q", (3, 2))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_would_be_read_without_end_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """A pipe, a device, and a file that fills the memory."""
    base = save_base(llama(), tmp_path / "base")
    (base / name).unlink()
    os.mkfifo(base / name)
    with pytest.raises(ValueError, match=rf"{name}' is no regular file, expected JSON"):
        BaseCheckpoint(base)
    (base / name).unlink()
    (base / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name}' is no regular file, expected JSON"):
        BaseCheckpoint(base)
    (base / name).unlink()
    (base / name).touch()
    os.truncate(base / name, 2**40)  # no block of it is on the disk
    with pytest.raises(ValueError, match=rf"{name}' has 1,099,511,627,776 bytes, expected 100,000,000 at most"):
        BaseCheckpoint(base)


def test_the_models_of_conv1d_are_those_of_transformers() -> None:
    """Whose blocks have no linear layer of the other orientation: clvp's, for one, have both."""
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    for path in folder.glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        if "import Conv1D" in text:
            config = path.with_name(path.name.replace("modeling_", "configuration_")).read_text(encoding="utf-8")
            found |= set(re.findall(r'model_type = "([\w-]+)"', config))
    assert set(_CONV1D_MODELS) == {name for name in found if not name.startswith("clvp")}


def test_square_weights_of_gpt2_are_transposed_and_its_head_is_not(tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "gpt2")
    with BaseCheckpoint(base) as found:
        assert found.layer("transformer.h.0.attn.c_proj", (32, 32)).transposed
        head = found.layer("lm_head", (61, 32))
        assert (head.name, head.transposed, head.is_tied) == ("transformer.wte.weight", False, True)
    base = save_base(llama(), tmp_path / "llama")
    with BaseCheckpoint(base) as found:
        assert not found.layer("model.layers.0.self_attn.q_proj", (32, 32)).transposed
        assert not found.layer("lm_head", (61, 32)).is_tied
