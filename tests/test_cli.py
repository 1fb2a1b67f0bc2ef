"""The command line: `dual-lora doctor` says what `resolve_backend` does, in the backends' own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dual_lora_command
import dual_lora_kernels
from dual_lora_kernels import available_backends, backends, cli, set_default_backend, set_strategy, set_workspace_bytes
from dual_lora_kernels.backends import candidates, resolve_backend
from dual_lora_kernels.backends import triton as triton_backend
from dual_lora_kernels.backends.eager import EagerBackend
from dual_lora_kernels.backends.native import NativeBackend
from dual_lora_kernels.backends.triton import TritonBackend

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
LAYERS = {
    "bf16": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
    "fp64": (torch.float64, torch.float64),
}
"""Name → compute dtype and factors' dtype of the layers that the doctor is asked about."""

Doctor = Callable[[], tuple[str, dict[str, Any]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the doctor on a machine that works, both ways: the text and the JSON object."""

    def run() -> tuple[str, dict[str, Any]]:
        assert cli.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == 0
        return text, json.loads(capsys.readouterr().out)

    return run


def _subprocess(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dual_lora_kernels.cli", *arguments]
    changing = ("DUAL_LORA_CPU_CAPABILITY", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in changing} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def _strings(facts: object) -> Iterator[str]:
    """Every string among the JSON's values."""
    if isinstance(facts, str):
        yield facts
    elif isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            yield from _strings(value)


def test_the_doctor_names_what_resolve_backend_picks(doctor: Doctor) -> None:
    text, facts = doctor()
    found = {
        (device["device"], dtype): layers
        for device in facts["devices"]
        for layers in device["layers"]
        for dtype in layers["dtypes"]
    }
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert {("cpu", name) for name in LAYERS} <= found.keys()
    assert {(gpu, name) for gpu in gpus for name in LAYERS} <= found.keys()
    for (device, name), layers in found.items():
        picked = resolve_backend("auto", torch.device(device), *LAYERS[name])
        assert (layers["backend"], layers["description"]) == (picked.name, picked.description())
        assert f"{', '.join(layers['dtypes'])} layers run on '{picked.name}': {picked.description()}" in text


def test_every_backend_is_listed_with_its_own_reason(doctor: Doctor) -> None:
    text, facts = doctor()
    for layers in facts["devices"][0]["layers"]:
        for dtype in layers["dtypes"]:
            reasons = [[backend.name, reason] for backend, reason in candidates("auto", CPU, *LAYERS[dtype])]
            assert [list(item) for item in layers["reasons"].items()] == reasons
    for name, reason in reasons:
        assert name in text
        assert reason is None or f"{name}: no, {reason}" in text


def test_text_and_json_agree(doctor: Doctor) -> None:
    text, facts = doctor()
    for string in _strings(facts):
        assert string in text
    assert facts["versions"]["dual_lora_kernels"] == dual_lora_kernels.__version__
    assert facts["versions"]["PyTorch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()


def test_a_backend_that_is_not_available_shows_its_reason(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_import_failure", lambda: "triton is missing: pip install triton")
    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: "there was no compiler")
    text, facts = doctor()
    assert "triton: no, triton is missing: pip install triton" in text
    assert "native: no, there was no compiler" in text
    assert "bf16, fp32, fp64 layers run on 'eager'" in text
    assert facts["devices"][0]["layers"][0]["reasons"]["native"] == "there was no compiler"


def test_a_backend_after_the_one_that_runs_stands_by(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: None)
    monkeypatch.setattr(NativeBackend, "description", lambda _: "a stand-in")
    text, _ = doctor()
    assert "native: chosen" in text
    assert "eager: stands by" in text


def test_dtypes_that_disagree_are_told_apart(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(_: object, device: torch.device, compute_dtype: torch.dtype, factor_dtype: torch.dtype) -> str | None:
        return "it has no fp32" if compute_dtype == torch.float32 else None

    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: None)
    monkeypatch.setattr(NativeBackend, "description", lambda _: "a stand-in")
    monkeypatch.setattr(NativeBackend, "why_not", why_not)
    text, facts = doctor()
    assert "bf16, fp64 layers run on 'native'" in text
    assert "fp32 layers run on 'eager'" in text
    assert [layers["dtypes"] for layers in facts["devices"][0]["layers"]] == [["bf16", "fp64"], ["fp32"]]


def test_every_device_that_pytorch_can_use_is_listed(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "xpu"):
        module = getattr(torch, name)
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda: 2)
        monkeypatch.setattr(module, "get_device_name", lambda index, name=name: f"A {name} device, number {index}")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(TritonBackend, "why_unavailable", lambda _: None)
    monkeypatch.setattr(TritonBackend, "description", lambda _: "a stand-in")
    monkeypatch.setattr(TritonBackend, "why_not", lambda _, device, *__: None if device.index else "too old")
    text, facts = doctor()
    runs = {device["device"]: device["layers"][0]["backend"] for device in facts["devices"]}
    assert runs.pop("cpu") in ("native", "eager")
    assert runs == {"cuda:0": "eager", "cuda:1": "triton", "mps": "eager", "xpu:0": "eager", "xpu:1": "triton"}
    assert "cuda:1: A cuda device, number 1" in text
    assert "triton: no, too old" in text
    assert "\nmps: " in text
    assert "bf16, fp32 layers run on" in text.partition("\nmps: ")[2], "MPS has no fp64"


def test_settings_that_change_what_runs_are_shown(doctor: Doctor) -> None:
    text, facts = doctor()
    assert "strategy auto, workspace 32 MiB" in text
    assert "default backend" not in text
    set_default_backend("eager")
    set_strategy("panels")
    set_workspace_bytes(2**24)
    text, facts = doctor()
    assert "strategy panels, workspace 16 MiB, default backend eager" in text
    assert (facts["default_backend"], facts["strategy"], facts["workspace_bytes"]) == ("eager", "panels", 2**24)


def test_a_machine_that_no_backend_serves_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", {"eager": EagerBackend()})
    monkeypatch.setattr(EagerBackend, "why_not", lambda *_: "it is asleep")
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "layers cannot run: no backend serves them" in text
    assert "eager: no, it is asleep" in text


def test_it_runs_as_a_module_and_shows_variables_that_change_what_runs() -> None:
    plain = _subprocess("doctor")
    assert plain.returncode == 0, plain.stderr
    assert "\nTRITON_INTERPRET=" not in plain.stdout
    interpreted = _subprocess("doctor", "--json", TRITON_INTERPRET="1")
    assert interpreted.returncode == 0, interpreted.stderr
    facts = json.loads(interpreted.stdout)
    assert facts["environment"] == {"TRITON_INTERPRET": "1"}
    if "triton" in available_backends():
        assert facts["devices"][0]["layers"][0]["reasons"]["triton"] == "Triton's interpreter is for tests"


@pytest.mark.skipif("native" not in available_backends(), reason="the native backend reads the variable")
def test_a_variable_that_makes_every_call_fail_is_a_failure() -> None:
    done = _subprocess("doctor", DUAL_LORA_CPU_CAPABILITY="quantum")
    assert done.returncode == 1, done.stderr
    assert "layers cannot run: 'native': DUAL_LORA_CPU_CAPABILITY: got 'quantum'" in done.stdout
    assert "DUAL_LORA_CPU_CAPABILITY=quantum" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["cure"], ["doctor", "--fast"]])
def test_wrong_arguments_are_refused_with_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(arguments)
    assert refused.value.code == 2
    assert "usage: dual-lora" in capsys.readouterr().err


def test_the_installed_command_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"dual-lora": "dual_lora_command:main"}
    assert dual_lora_command.main.__doc__


def test_a_missing_pytorch_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    program = "import sys, dual_lora_command; sys.exit(dual_lora_command.main())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("dual-lora: the package cannot be imported (ModuleNotFoundError: No module named 'torch')")
    assert "PyTorch ≥ 2.11" in line
