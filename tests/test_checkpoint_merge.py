"""Merging on disk gives the weights that training computed with, in a checkpoint that needs nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dual_lora_kernels import (
    convert_adapter,
    dual_lora_merge_,
    load_dual_lora,
    merge_checkpoint,
    merge_dual_lora,
    save_dual_lora,
)
from dual_lora_kernels.adaptable import is_transposed
from dual_lora_kernels.checkpoint_merge import shards
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.peft import DualLoraConfig as PeftDualLoraConfig

from .checkpoints import write_tensors
from .merged_checkpoints import assert_same_weights, content, equal_bits, load_base, save_adapter, save_base, tensors
from .models import gpt2, llama, logits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {}),
    "gpt2": (gpt2, {}),  # Conv1D, some of them square, and a tied output head that is not adapted
    "tied head": (lambda: llama(tied=True), {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2's tied head": (gpt2, {"target_modules": ["lm_head", "c_proj"]}),
    "untied head": (llama, {"target_modules": ["lm_head", "down_proj"]}),
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, not in whole tiles, and several groups of pieces a file."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 1000)
    monkeypatch.setattr(shards, "PANEL_UNIT", 1)
    monkeypatch.setattr(shards, "_GROUP_BYTES", 5000)


@torch.no_grad()
def used_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """W of every adapted layer as its forward pass uses it: the identity reads it out exactly."""
    found = {}
    for name, layer in dual_lora_layers(model):
        identity = torch.eye(layer.in_features, dtype=layer.weight.dtype)
        found[name] = layer.adapted_linear(identity, layer._oriented_weight(), None).t().contiguous()
    return found


@pytest.mark.parametrize("form", ["dual_lora", "peft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_those_of_training(name: str, dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    make, options = MODELS[name]
    base = save_base(make().to(dtype), tmp_path / "base")
    trained = save_adapter(base, tmp_path / "adapter", **options)
    folder = tmp_path / "adapter"
    if form == "peft":
        convert_adapter(folder, tmp_path / "peft")
        folder = tmp_path / "peft"
    summary = merge_checkpoint(base, folder, tmp_path / "out", verify=True)
    assert summary.merged == len(list(dual_lora_layers(trained)))
    assert summary.verification is not None
    assert summary.verification.weights == sum(layer.weight.numel() for _, layer in dual_lora_layers(trained))

    merged = load_base(tmp_path / "out")
    modules = dict(merged.named_modules())
    for layer, weight in used_weights(trained).items():
        own = modules[layer].weight.detach()
        assert equal_bits(own.t().contiguous() if is_transposed(modules[layer]) else own, weight), layer
    expected = merge_dual_lora(trained)
    if "head" not in name:
        assert_same_weights(merged, expected)
    assert torch.equal(logits(merged), logits(expected))


def test_the_head_gets_a_weight_of_its_own_and_the_embedding_stays(tmp_path: Path) -> None:
    base = save_base(llama(tied=True), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    summary = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert equal_bits(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert any("tie_word_embeddings" in note for note in summary.notes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in after.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "shards"])
def test_what_is_in_the_folder(shard: str, tmp_path: Path) -> None:
    """The base's files and tensors in its order, none of this package's, and nothing hidden; inputs stay."""
    base = save_base(llama(), tmp_path / "base", shard)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    save_adapter(base, tmp_path / "adapter")
    before = content(tmp_path)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    found, own = content(tmp_path / "out"), content(base)
    left_out = {"README.md", "pytorch_model.bin", ".hidden", "original/params.json"}
    assert found.keys() == own.keys() - left_out
    weights = {name for name in own if name.endswith(".safetensors")}
    assert {name for name in found.keys() - weights if found[name] != own[name]} <= {"model.safetensors.index.json"}
    assert not any(b"dual" in content.lower() for name, content in found.items() if name not in weights)
    for name in weights:
        with safe_open(base / name, "pt") as one, safe_open(tmp_path / "out" / name, "pt") as other:
            assert one.offset_keys() == other.offset_keys()
            assert one.metadata() == other.metadata()
    assert {name: data for name, data in content(tmp_path).items() if not name.startswith("out/")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_it_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    trained = save_adapter(base, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    program = (
        "import sys; sys.modules['dual_lora_kernels'] = sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, dtype='auto')\n"
        f"torch.save(model.state_dict(), {str(tmp_path / 'state')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    expected = merge_dual_lora(trained).state_dict()
    state = torch.load(tmp_path / "state")
    assert state.keys() == expected.keys()
    assert all(equal_bits(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_is_what_from_pretrained_does(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base")
    trained = save_adapter(base, tmp_path / "adapter", dtype=dtype)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype=dtype, verify=True)
    assert_same_weights(load_base(tmp_path / "out"), merge_dual_lora(trained))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert str(dtype).removeprefix("torch.") in (saved.get("dtype"), saved.get("torch_dtype"))


def test_several_adapters_are_merged_one_after_the_other(tmp_path: Path) -> None:
    base = save_base(llama(dtype=torch.bfloat16), tmp_path / "base")
    models = [
        save_adapter(base, tmp_path / f"adapter{seed}", seed=seed, target_modules=targets)
        for seed, targets in ((1, ["q_proj", "up_proj"]), (2, ["q_proj"]))
    ]
    merge_checkpoint(base, [tmp_path / "adapter1", tmp_path / "adapter2"], tmp_path / "out", verify=True)
    before, after = tensors(base), tensors(tmp_path / "out")
    for name, tensor in before.items():
        expected = tensor.clone()
        for model in models:
            layer = dict(dual_lora_layers(model)).get(name.removesuffix(".weight"))
            if layer is not None:
                dual_lora_merge_(expected, layer.A, layer.B, layer.C, layer.D, layer.scale)
        assert equal_bits(after[name], expected), name
    other = merge_checkpoint(base, [tmp_path / "adapter2", tmp_path / "adapter1"], tmp_path / "other")
    assert other.merged == 4
    assert content(tmp_path / "other") != content(tmp_path / "out"), "each rounds by itself"


def test_modules_that_are_saved_whole_replace_the_bases(tmp_path: Path) -> None:
    base = save_base(llama(dtype=torch.bfloat16), tmp_path / "base")
    model = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head", "model.norm"])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_dual_lora(model, tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", verify=True)
    assert_same_weights(load_base(tmp_path / "out"), merge_dual_lora(model))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm", torch.full((32,), torch.nan), "got nan, expected finite values"),
        ("lm_head", torch.full((61, 32), torch.inf), "got inf, expected finite values"),
        ("model.norm", torch.ones(32, dtype=torch.int64), "is of I64, expected the base's F32"),
        ("model.norm", torch.ones(32, dtype=torch.bool), "is of BOOL, expected the base's F32"),
        ("model.norm", torch.ones(31), r"has shape \(31,\), expected the base's \(32,\)"),
        ("model.embed_tokens", torch.ones(61, 32), "is of no adapted layer and of no module in modules_to_save"),
        ("model.norm_", torch.ones(32), "is of no adapted layer and of no module in modules_to_save"),
    ],
)
def test_modules_that_are_refused(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head", "model.norm"])
    write_tensors(tmp_path / "adapter", lambda state: state.update({f"{name}.weight": tensor}))
    with pytest.raises(ValueError, match=rf"dual_lora_model\.safetensors': {name}\.weight:? {message}"):
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_pefts_adapter_of_an_output_head(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT saves a copy of an adapted head's W0 with it."""
    base = save_base(llama(tied=tied, dtype=dtype), tmp_path / "base")
    torch.manual_seed(1)
    options = {"r1": 3, "r2": 2, "alpha": 1.0, "init_std": 0.3}
    model = get_peft_model(load_base(base), PeftDualLoraConfig(target_modules=["lm_head", "q_proj"], **options))
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.lm_head.base_layer.weight" in tensors(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    loaded = load_dual_lora(load_base(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert torch.equal(logits(load_base(tmp_path / "out")), logits(merge_dual_lora(loaded)))


def test_an_embedding_that_is_saved_whole_under_a_tied_head(tmp_path: Path) -> None:
    """PEFT trains a copy of it, and leaves the head the base's."""
    for tied in (True, False):
        base = save_base(llama(tied=tied), tmp_path / f"base{tied}")
        config = PeftDualLoraConfig(target_modules=["q_proj"], r1=3, r2=2, modules_to_save=["embed_tokens"])
        get_peft_model(load_base(base), config).save_pretrained(tmp_path / f"adapter{tied}")
    with pytest.raises(ValueError, match=r"safetensors': model\.embed_tokens\.weight is saved whole, and .* is tied"):
        merge_checkpoint(tmp_path / "baseTrue", tmp_path / "adapterTrue", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(tmp_path / "baseFalse", tmp_path / "adapterFalse", tmp_path / "out")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_that_loading_would_round_to_is_said(key: str, tmp_path: Path) -> None:
    """transformers loads, and trains, in config.json's dtype, whatever the tensors have."""
    base = save_base(llama(), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    (base / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
    trained = save_adapter(base, tmp_path / "adapter")
    (note,) = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out").notes
    assert note.startswith("merged weights are in float32, config.json says bfloat16: ")
    assert merge_checkpoint(base, tmp_path / "adapter", tmp_path / "cast", dtype=torch.bfloat16).notes == ()
    assert_same_weights(load_base(tmp_path / "cast"), merge_dual_lora(trained))


def test_a_new_module_is_added_and_said(tmp_path: Path) -> None:
    """A classification head, say, of which the base knows nothing."""
    base = save_base(llama(), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter", modules_to_save=["model.norm"])
    weights = tmp_path / "adapter" / "dual_lora_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["dual_lora_config"]) | {"modules_to_save": ["model.norm", "score"]}
    head = torch.randn(3, 32)
    save_file(
        load_file(weights) | {"score.weight": head}, weights, {**metadata, "dual_lora_config": json.dumps(settings)}
    )
    summary = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert equal_bits(tensors(tmp_path / "out")["score.weight"], head)
    assert [note for note in summary.notes if note.startswith("score.weight is new")]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert (tmp_path / "out" / index["weight_map"]["score.weight"]).exists()


def test_a_backbone_saved_by_itself_has_other_names(tmp_path: Path) -> None:
    """The Hub's GPT-2 has ``h.0.attn…``, the module ``transformer.h.0.attn…``; and the other way round."""
    model = gpt2()
    whole = save_base(model, tmp_path / "whole")
    backbone = save_base(model.transformer, tmp_path / "backbone")
    trained = save_adapter(whole, tmp_path / "adapter")
    merge_checkpoint(backbone, tmp_path / "adapter", tmp_path / "out")
    merge_checkpoint(whole, tmp_path / "adapter", tmp_path / "other")
    own, other = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert not any(name.startswith("transformer.") for name in own)
    assert all(equal_bits(tensor, other[f"transformer.{name}"]) for name, tensor in own.items())
    assert_same_weights(load_base(tmp_path / "out"), merge_dual_lora(trained))


def test_names_that_transformers_writes_otherwise_are_found(tmp_path: Path) -> None:
    """``language_model.model.layers`` on disk is the module ``model.language_model.layers``."""
    base = save_base(llama(), tmp_path / "base", "1GB")
    save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    state = {f"language_model.{name}": tensor for name, tensor in tensors(base).items()}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    weights = tmp_path / "adapter" / "dual_lora_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    moved = {name.replace("model.layers", "model.language_model.layers"): t for name, t in load_file(weights).items()}
    text = metadata["dual_lora_config"].replace("model.layers", "model.language_model.layers")
    save_file(moved, weights, {**metadata, "dual_lora_config": text})
    (tmp_path / "adapter" / "dual_lora_config.json").unlink()
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    after = tensors(tmp_path / "out")
    changed = {name for name, tensor in after.items() if not equal_bits(tensor, state[name])}
    assert changed == {f"language_model.model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}


def test_a_checkpoint_that_may_be_overwritten(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    for seed in (1, 2):
        save_adapter(base, tmp_path / f"adapter{seed}", seed=seed)
    merge_checkpoint(base, tmp_path / "adapter1", tmp_path / "out")
    first = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: got '.*/out', which exists, expected .*--overwrite"):
        merge_checkpoint(base, tmp_path / "adapter2", tmp_path / "out")
    assert content(tmp_path / "out") == first
    (tmp_path / "out" / "mine").write_text("of the old one")
    merge_checkpoint(base, tmp_path / "adapter2", tmp_path / "out", overwrite=True)
    merge_checkpoint(base, tmp_path / "adapter2", tmp_path / "new")
    assert content(tmp_path / "out") == content(tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter1", "adapter2", "out", "new"}


def test_the_progress_adds_up(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter")
    told: list[tuple[str, int, int]] = []
    summary = merge_checkpoint(
        base, tmp_path / "adapter", tmp_path / "out", verify=True, progress=lambda *news: told.append(news)
    )
    for verifying in (False, True):
        own = [news for news in told if news[0].startswith("verifying") == verifying]
        assert [done for _, done, _ in own] == sorted(done for _, done, _ in own)
        assert own[-1][1:] == (summary.bytes, summary.bytes)


def test_an_adapted_model_goes_on_from_a_merged_one(tmp_path: Path) -> None:
    """A merged checkpoint is a base like any other."""
    base = save_base(llama(dtype=torch.bfloat16), tmp_path / "base")
    save_adapter(base, tmp_path / "adapter1")
    merge_checkpoint(base, tmp_path / "adapter1", tmp_path / "out")
    trained = save_adapter(tmp_path / "out", tmp_path / "adapter2", seed=2)
    again = load_dual_lora(load_base(tmp_path / "out"), tmp_path / "adapter2")
    assert torch.equal(logits(again), logits(trained))
