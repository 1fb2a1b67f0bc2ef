"""Adapters, checkpoints and merged models of spread models are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dual_lora_kernels import save_dual_lora
from dual_lora_kernels.adapter_files import WEIGHTS_FILE
from dual_lora_kernels.distributed import latest_checkpoint

from . import distributed_cases as cases
from . import distributed_files as files
from .processes import Failed, Processes

SPREAD = ["ddp", "fsdp", "fsdp offload", "fsdp wrapped", "fsdp wrapped layers", "fsdp kept", "tp", "fsdp tp"]


@pytest.mark.parametrize("layout", SPREAD)
def test_every_layout_writes_the_same_files(two: Processes, layout: str, tmp_path: Path) -> None:
    model = cases.adapted()
    save_dual_lora(model, tmp_path / "one" / "own")
    model.save_pretrained(tmp_path / "one" / "peft")  # type: ignore[operator]
    two.run(files.save, layout, tmp_path / "two")
    expected = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*"))
    assert sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").glob("*/*")) == expected
    for name in expected:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize("layout", SPREAD)
def test_every_layout_loads_it(two: Processes, layout: str, tmp_path: Path) -> None:
    save_dual_lora(cases.adapted(), tmp_path)
    assert (tmp_path / WEIGHTS_FILE).is_file()
    two.run(files.load, layout, tmp_path)


def test_four_processes_save_and_load(four: Processes, tmp_path: Path) -> None:
    four.run(files.save, "fsdp tp", tmp_path)
    four.run(files.load, "fsdp", tmp_path / "own")
    four.run(files.load, "fsdp tp", tmp_path / "peft")


@pytest.mark.parametrize("door", ["own", "peft"])
def test_merging_what_a_call_left_gathered(two: Processes, door: str) -> None:
    two.run(files.merge_after_a_call, door)


@pytest.mark.parametrize("layout", ["fsdp", "fsdp kept"])
def test_what_a_call_left_gathered_is_saved_and_loaded(two: Processes, layout: str, tmp_path: Path) -> None:
    two.run(files.load_after_a_call, layout, tmp_path)


@pytest.mark.parametrize("kind", ["one within the other", "side by side"])
def test_an_error_reaches_processes_of_other_meshes(four: Processes, kind: str, tmp_path: Path) -> None:
    for said in four.run(files.refuse_on_two_meshes, tmp_path, kind):
        assert "expected one that an adapter can be written to" in said


def test_a_part_of_a_state_dict_is_refused_and_nobody_waits(two: Processes, tmp_path: Path) -> None:
    said = two.run(files.save_part_of_a_state_dict, tmp_path)
    assert said[0].startswith("state_dict: got none of model.layers.0")
    assert said[1] == "nothing was raised"


def test_an_error_that_cannot_be_sent_is_told_in_words(two: Processes) -> None:
    assert two.run(files.raise_what_does_not_pickle) == ["RuntimeError: _Stubborn: no"] * 2


def test_saving_counts_no_step(two: Processes, tmp_path: Path) -> None:
    for before, after in two.run(files.save_while_warming_up, tmp_path):
        assert before == after


def test_who_cannot_save_says_so_everywhere(two: Processes, tmp_path: Path) -> None:
    two.run(files.refuse_to_save, tmp_path)


@pytest.mark.parametrize(
    ("layout", "other"),
    [("ddp", "fsdp"), ("fsdp", "tp"), ("tp", "ddp"), ("fsdp tp", "fsdp wrapped"), ("fsdp kept", "fsdp")],
)
def test_resuming_in_another_layout(two: Processes, layout: str, other: str, tmp_path: Path) -> None:
    """Losses of fp32 runs, of which no sign turns in three steps."""
    for went_on, again in two.run(files.resume, layout, other, tmp_path):
        assert again == pytest.approx(went_on, rel=2e-6)


def test_a_resumed_run_draws_the_same_samples(two: Processes, tmp_path: Path) -> None:
    for went_on, again in two.run(files.resume_samples, tmp_path):
        assert again == went_on


def test_a_checkpoint_is_whole_or_not_there(two: Processes, tmp_path: Path) -> None:
    two.run(files.several, tmp_path)


def test_a_process_that_is_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path, two: Processes) -> None:
    own = Processes(2)
    with pytest.raises(Failed, match="process 1: the process ended"):
        own.run(files.killed, tmp_path)
    own.end()
    assert (tmp_path / "step-00000003.unfinished").is_dir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000002"
    for went_on, again in two.run(files.after_the_kill, tmp_path):
        assert again == went_on


MISFITS = {
    "ranks": "which has shape (3, 32) for model.layers.0.self_attn.q_proj.A, expected (5, 32)",
    "no checkpoint": "expected a folder that save_checkpoint has finished",
    "no name": "expected a folder that save_checkpoint has finished",
    "step": "step: got 0, expected a positive integer",
    "frozen": "model: got a LlamaForCausalLM of which nothing trains",
    "a file": "FileExistsError",
    "none": "checkpoint: got None, expected a folder: latest_checkpoint found none",
    "another optimiser": "optimizer: got one with other parameters than the model's",
    "a number": "stateful['n']: got int, expected state_dict and load_state_dict",
    "no scheduler": "which does not fit: Missing key in checkpoint state_dict: stateful.other",
}


def test_what_does_not_fit_is_refused(two: Processes, tmp_path: Path) -> None:
    for messages in two.run(files.misfits, tmp_path):
        for case, message in MISFITS.items():
            assert message in messages[case], f"{case}: {messages[case]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", SPREAD)
def test_a_merged_model_from_parts(two: Processes, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    two.run(files.merge, layout, dtype, tmp_path / "merged")


def test_a_merged_model_from_four_parts(four: Processes, tmp_path: Path) -> None:
    four.run(files.merge, "fsdp tp", torch.bfloat16, tmp_path / "merged")


def test_what_would_overflow_is_not_merged(two: Processes, tmp_path: Path) -> None:
    two.run(files.merge_what_overflows, tmp_path / "merged")
