"""The scripts of examples/distributed, started as their users start them, on two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dual_lora_kernels.adapter_files import WEIGHTS_FILE
from dual_lora_kernels.peft_files import PEFT_WEIGHTS_FILE

ROOT = Path(__file__).parents[1]
STEPS = 24


def _torchrun(layout: str, out: Path, *more: str) -> list[str]:
    own = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ["-m", "examples.distributed.finetune", "--layout", layout, "--out", str(out)]
    return [*own, *script, "--steps", str(STEPS), "--save-every", "2", "--sequence", "32", *more]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _run(command: list[str]) -> str:
    ended = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return ended.stdout + ended.stderr


def _losses(out: Path) -> dict[int, float]:
    """By step; a step that was made twice counts the second time."""
    return {line["step"]: line["loss"] for line in map(json.loads, (out / "losses.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "fsdp-tp"])
def test_each_layout(layout: str, tmp_path: Path) -> None:
    _run(_torchrun(layout, tmp_path, "--merge"))
    losses = _losses(tmp_path)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.2
    assert (tmp_path / "adapter" / WEIGHTS_FILE).is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_run_of_which_a_process_is_killed_goes_on_when_it_is_started_again(tmp_path: Path) -> None:
    """By hand: torchrun's own restart over gloo also fails now and then with a script that only adds numbers up."""
    _run(_torchrun("fsdp", tmp_path / "whole"))
    out = tmp_path / "killed"
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(_torchrun("fsdp", out), cwd=ROOT, env=_environment(), **pipes) as process:
        deadline = time.monotonic() + 120
        while not (out / "checkpoints" / "step-00000002").exists():
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            assert process.poll() is None, "it ended before its first checkpoint"
            time.sleep(0.02)
        os.kill(psutil.Process(process.pid).children()[-1].pid, signal.SIGKILL)
        _, messages = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "Signal 9" in messages
    assert max(_losses(out)) < STEPS
    _run(_torchrun("fsdp", out))
    assert _losses(out) == _losses(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "adapter" / WEIGHTS_FILE)
    for name, tensor in load_file(out / "adapter" / WEIGHTS_FILE).items():
        assert torch.equal(tensor, expected[name]), name


ENGINES = {
    "ddp": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"],
    "fsdp2": ["--config_file", "examples/distributed/fsdp2.yaml"],
}
"""Options of ``accelerate launch``. ``--multi_gpu`` starts processes on CPUs too; ``--cpu`` starts one."""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trainer_by_accelerate(engine: str, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", *ENGINES[engine]]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    said = _run([*launch, "--module", "examples.distributed.with_trainer", "--steps", "6", "--out", str(tmp_path)])
    losses = [float(found) for found in re.findall(r"'loss': '([\d.]+)'", said)]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2
    for folder in ("adapter", "checkpoint-3", "checkpoint-6"):
        tensors = load_file(tmp_path / folder / PEFT_WEIGHTS_FILE)
        shapes = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in tensors.items() if "q_proj" in name}
        assert shapes == {"A": (8, 128), "B": (128, 8), "C": (8, 128), "D": (128, 8), "scale": ()}
