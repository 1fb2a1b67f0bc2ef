"""Adapters go from one door to the other by PEFT's files."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from dual_lora_kernels import DualLoraLinear, apply_dual_lora, load_dual_lora, merge_dual_lora, save_dual_lora
from dual_lora_kernels.linear import dual_lora_layers
from dual_lora_kernels.pretrained import save_pretrained

from .models import configuration, gpt2, llama, logits
from .peft_models import config
from .test_modules_to_save import classifier, step


def tuned(model: Any, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, config(**options)).eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_plain_door_reads_what_peft_saved(make: Any, tmp_path: Path) -> None:
    model = tuned(make(), rank_pattern={r".*0.*(q_proj|c_attn)": (5, 4)}, alpha_pattern={"up_proj": 2.0}, ste="xnor")
    model.save_pretrained(tmp_path)
    again = load_dual_lora(make(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    for _, layer in dual_lora_layers(again):
        assert layer.ste == "xnor"
    ranks = {(layer.r1, layer.r2) for _, layer in dual_lora_layers(again)}
    assert ranks == {(3, 2), (5, 4)}


def test_the_plain_door_reads_modules_to_save(tmp_path: Path) -> None:
    model = tuned(classifier(), task_type="SEQ_CLS", target_modules=["query", "value"]).train()
    step(model)
    model.eval().save_pretrained(tmp_path)
    again = load_dual_lora(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.classifier.dense.weight.requires_grad


@pytest.mark.parametrize("make", [llama, gpt2])
def test_peft_reads_what_save_pretrained_of_the_plain_door_wrote(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = apply_dual_lora(make(), configuration(rounding="nearest"))
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "model.safetensors"
    }  # fmt: skip
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert {type(module).__name__ for name, module in again.named_modules() if name.endswith("c_attn")} <= {"Linear"}
    assert torch.equal(logits(load_dual_lora(make(), tmp_path)), logits(model))


def test_layers_of_other_ranks_and_a_head_go_through(tmp_path: Path) -> None:
    model = apply_dual_lora(classifier(), configuration(["query", "value"]))
    step(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_names_that_are_the_ends_of_others(tmp_path: Path) -> None:
    """``fc`` is adapted, ``block.fc`` is not."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = torch.nn.Linear(4, 4), torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})
            self.config = None

        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["fc"](self.fc(x))

    torch.manual_seed(0)
    base = Net()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = apply_dual_lora(base, configuration(r"fc"))
    model.save_pretrained(tmp_path)
    other = Net()
    other.load_state_dict(state)
    again = PeftModel.from_pretrained(other, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), model(x))
    assert type(again.base_model.model.block["fc"]) is torch.nn.Linear


def test_options_that_peft_has_once_must_be_the_same(tmp_path: Path) -> None:
    model = apply_dual_lora(llama(), configuration())
    model.model.layers[0].self_attn.q_proj.ste = "xnor"
    with pytest.raises(ValueError, match=r"has ste 'clip', others 'xnor'; expected the same in all layers"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_pushing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^push_to_hub: got True, expected False: upload the folder"):
        apply_dual_lora(llama(), configuration()).save_pretrained(tmp_path, push_to_hub=True)


def test_a_models_own_folder_is_not_overwritten(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"^save_directory: got .*, which holds a model"):
        apply_dual_lora(llama(), configuration()).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: got 'LORA', expected 'DUAL_LORA'"),
        ({"alpha": 0}, "alpha: got 0, expected"),
        ({"rank_pattern": {"q_proj": "many"}}, "rank_pattern"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    tuned(llama()).save_pretrained(tmp_path)
    _edit(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"^folder: .*{message}"):
        load_dual_lora(llama(), tmp_path)


def test_trained_biases_are_not_dropped(tmp_path: Path) -> None:
    tuned(gpt2(), bias="dual_lora_only").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"bias is no adapter's and of no module in modules_to_save"):
        load_dual_lora(gpt2(), tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    tuned(llama()).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = load_file(weights)
    state["base_model.model.model.layers.0.self_attn.q_proj.dual_adapter.A"].fill_(float("nan"))
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"q_proj\.A: got nan, expected finite"):
        load_dual_lora(llama(), tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_dual_lora(llama(), tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"which has no adapter_model\.safetensors"):
        load_dual_lora(llama(), tmp_path)


def test_a_hub_id_is_no_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"'someone/adapter'.* huggingface_hub.snapshot_download returns"):
        load_dual_lora(llama(), "someone/adapter")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_save_their_own_adapter(copier: Any, tmp_path: Path) -> None:
    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    other = copier(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.A.mul_(2.0)
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path)), logits(other))
    assert not torch.equal(logits(other), logits(model))


def test_a_folder_holds_one_format(tmp_path: Path) -> None:
    model = apply_dual_lora(llama(), configuration())
    save_dual_lora(model, tmp_path / "own")
    model.save_pretrained(tmp_path / "pefts")
    with pytest.raises(ValueError, match=r"^save_directory: got .* which holds an adapter of save_dual_lora's"):
        model.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"^folder: got .* which holds an adapter in PEFT's files"):
        save_dual_lora(model, tmp_path / "pefts")
    shutil.copytree(tmp_path / "own", tmp_path / "pefts", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"^folder: .* which holds two adapters.*remove the older"):
        load_dual_lora(llama(), tmp_path / "pefts")


def test_models_within_the_one_that_was_adapted_save_the_adapter_too(tmp_path: Path) -> None:
    container = nn.ModuleDict({"language": llama(), "other": llama()})
    apply_dual_lora(container, configuration(r"language\..*q_proj"))
    container["language"].save_pretrained(tmp_path / "language")
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path / "language")), logits(container["language"]))
    container["other"].save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "config.json").exists()
    merge_dual_lora(container)["language"].save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()


def test_patterns_whose_order_pefts_json_loses(tmp_path: Path) -> None:
    """The first key that fits decides; ``.*q_proj`` fits all that ``layers.0.self_attn.q_proj`` does."""
    model = tuned(llama(), rank_pattern={"layers.0.self_attn.q_proj": (4, 5), ".*q_proj": 2})
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path)), logits(model))


def test_pefts_older_file_is_named(tmp_path: Path) -> None:
    tuned(llama()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors; save it again"):
        load_dual_lora(llama(), tmp_path)


def test_layers_whose_ranks_differ_keep_them(tmp_path: Path) -> None:
    """``proj`` and ``block.proj``: the first one's name is the end of the second's."""

    class Net(nn.Module):
        config = None

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.block = nn.Linear(4, 4), nn.Module()
            self.block.proj = nn.Linear(4, 4)

        save_pretrained = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block.proj(self.proj(x))

    model = Net()
    for parent, rank in ((model, 2), (model.block, 3)):
        options = {"r1": rank, "r2": rank, "alpha": float(rank), "init_std": 0.3}
        parent.proj = DualLoraLinear.from_linear(parent.proj, **options)
    save_pretrained(model, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), tmp_path)(x), model(x))
    torch.testing.assert_close(load_dual_lora(Net(), tmp_path)(x), model(x))


def test_a_model_whose_part_was_merged_is_saved_whole(tmp_path: Path) -> None:
    model = apply_dual_lora(llama(), configuration(["q_proj"]))
    merge_dual_lora(model.model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), logits(model), rtol=1e-5, atol=1e-5)
