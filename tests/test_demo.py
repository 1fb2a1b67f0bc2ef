"""The demo end to end, in small: its outputs exist and its claims hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from examples.demo import __main__ as demo
from examples.demo import data, sweep
from examples.demo.models import METHODS

SIZES = {
    "pretrain-steps": 60,
    "steps": 10,
    "batch-size": 4,
    "block-size": 64,
    "eval-blocks": 8,
    "rank": 4,
    "hidden-size": 32,
    "layers": 2,
}
TINY = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    assert demo.main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_outputs_exist(results_folder: Path) -> None:
    assert (results_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    markdown = (results_folder / "results.md").read_text(encoding="utf-8")
    assert all(method.label in markdown for method in METHODS.values())
    assert (results_folder / "adapter" / "dual_lora_config.json").is_file()
    assert (results_folder / "base" / "config.json").is_file()


def test_results_make_sense(results_folder: Path) -> None:
    results = json.loads((results_folder / "results.json").read_text(encoding="utf-8"))
    runs = results["runs"]
    assert set(runs) == set(METHODS)
    for run in runs.values():
        assert len(run["train_losses"]) == 10
        assert all(math.isfinite(loss) for loss in run["train_losses"])
        assert [step for step, _ in run["held_out"]][-1] == 10
        assert run["tokens_per_second"] > 0
    assert sum(results["pretraining"]["train_losses"][-6:]) / 6 < math.log(data.BYTE_VOCABULARY)
    assert runs["full"]["trainable_parameters"] == runs["full"]["total_parameters"] == results["base_parameters"]
    assert runs["dual_lora"]["trainable_parameters"] == runs["lora"]["trainable_parameters"]
    assert runs["dora"]["trainable_parameters"] > runs["lora"]["trainable_parameters"]


def test_logits_survive_saving_and_merging(results_folder: Path) -> None:
    results = json.loads((results_folder / "results.json").read_text(encoding="utf-8"))
    check = results["verification"]
    assert check["reloaded_difference"] == 0.0
    assert check["merged_difference"] <= 4 * check["rounding_noise"] < 1e-3
    assert check["layers_adapted"] == 14
    assert check["layers_left"] == 0
    assert results["failures"] == []


def test_checkpoint_and_text_options(results_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "verse.txt"
    text.write_text("Tyger Tyger, burning bright, in the forests of the night.\n" * 200, encoding="utf-8")
    chosen = [*TINY, "--model", str(results_folder / "base"), "--text", str(text), "--methods", "dual_lora"]
    assert demo.main([*chosen, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["pretraining"] is None
    assert results["corpus"] == "verse.txt"
    assert results["runs"]["dual_lora"]["held_out"][-1][1] < results["base_loss"]


def test_other_architecture_with_its_own_tokeniser(tmp_path: Path) -> None:
    checkpoint = tmp_path / "gpt2"
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "import": 1, "def": 2, "return": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(checkpoint)
    config = GPT2Config(vocab_size=4, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(checkpoint)
    chosen = [*TINY, "--model", str(checkpoint), "--methods", "dual_lora", "--dtype", "bfloat16"]
    assert demo.main([*chosen, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["unit"] == "token"
    assert results["verification"]["layers_adapted"] == 4


def test_sweep_reports_every_rate(results_folder: Path, tmp_path: Path) -> None:
    chosen_methods = ["dual_lora", "full"]
    chosen = [*TINY, "--steps", "2", "--model", str(results_folder / "base"), "--methods", *chosen_methods]
    assert sweep.main([*chosen, "--out", str(tmp_path)]) == 0
    losses = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert {method: len(by_rate) for method, by_rate in losses.items()} == {
        method: len(sweep.RATES[method]) for method in chosen_methods
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder is not a folder"),
        (["--model", "."], "holds no config.json"),
        (["--text", "no/such/file"], "no/such/file is not a file"),
        (["--rank", "3"], "must be even"),
        (["--steps", "0"], "0 is not a positive number"),
        (["--learning-rate", "lorra=1e-3"], "METHOD=RATE"),
        (["--learning-rate", "lora=-1"], "must be positive"),
    ],
)
def test_bad_options_end_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("short", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        demo.main([*TINY, "--text", str(text), "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "fewer than one block of 64" in capsys.readouterr().err


def test_split_is_disjoint_and_without_tests() -> None:
    files = data.standard_library_files()
    assert len(files) > 200
    assert len(set(files)) == len(files)
    assert not any("test" in path.parts or "site-packages" in path.parts for path in files)
    assert files == data.standard_library_files()
