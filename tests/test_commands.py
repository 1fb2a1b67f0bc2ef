"""The commands on saved files: what they print, their JSON, exit statuses, and errors in a line."""

from __future__ import annotations

import functools
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dual_lora_kernels import cli
from dual_lora_kernels.checkpoint_merge import merge
from dual_lora_kernels.commands import common

from .checkpoints import write_tensors
from .merged_checkpoints import save_adapter, save_base, tensors
from .models import llama

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    save_base(llama(dtype=torch.bfloat16), tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """(help, the words of its example)."""
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    (example,) = (line.split() for line in text.splitlines() if line.startswith(f"  dual-lora {command} "))
    return text, example


@pytest.mark.parametrize("command", ["doctor", "bench", "merge", "inspect", "convert", "tune"])
def test_help_has_an_example_and_says_what_statuses_mean(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, example = help_of(command, capsys)
    assert "Exit status: 0 " in text
    assert "--json" in text
    for option in (word for word in example if word.startswith("--")):
        assert f" {option}" in text.partition("example")[0], "the example's options are explained"


@pytest.mark.parametrize("command", ["merge", "convert", "inspect"])
def test_examples_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, example = help_of(command, capsys)
    assert cli.main(example[1:]) == 1, "its folders do not exist here"
    assert f"dual-lora {command}: " in capsys.readouterr().err


def test_merging_in_words_and_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, errors = run(capsys, "merge", here / "base", here / "adapter", here / "out", "--verify")
    assert status == 0
    assert f"{here / 'out'}: " in text
    assert "14 weights merged by backend" in text
    assert "verified by backend" in text
    assert "Traceback" not in errors
    status, text, _ = run(
        capsys, "merge", here / "base", here / "adapter", here / "out", "--dtype", "fp32", "--overwrite", "--json"
    )
    summary: dict[str, Any] = json.loads(text)
    assert status == 0
    assert (summary["merged"], summary["verification"], summary["resumed"]) == (14, None, 0)
    assert json.loads((here / "out" / "config.json").read_text())["dtype"] == "float32"


def test_converting_in_words_and_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = run(capsys, "convert", here / "adapter", here / "peft")
    assert status == 0
    assert "14 layers, 70 tensors, from dual_lora to peft format" in text
    status, text, _ = run(capsys, "convert", here / "peft", here / "back", "--json")
    assert status == 0
    assert json.loads(text)["target"] == "dual_lora"
    assert tensors(here / "back").keys() == tensors(here / "adapter").keys()


@pytest.mark.parametrize("command", ["merge", "convert", "inspect"])
def test_errors_are_a_line_that_names_file_and_tensor(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(here / "adapter", lambda state: state[f"{LAYER}.A"].view(-1)[:1].fill_(torch.nan))
    arguments = {
        "merge": ["merge", here / "base", here / "adapter", here / "out"],
        "convert": ["convert", here / "adapter", here / "out"],
        "inspect": ["inspect", here / "adapter", "--html", here / "out"],
    }[command]
    status, text, errors = run(capsys, *arguments)
    (line,) = (line for line in errors.splitlines() if not line.startswith("[dual_lora_kernels]"))
    assert (status, text) == (1, "")
    assert line.startswith(f"dual-lora {command}: ")
    assert f"{LAYER}.A" in line
    assert "nan" in line
    status, text, _ = run(capsys, *arguments, "--json")
    assert status == 1
    assert f"{LAYER}.A" in json.loads(text)["error"]
    assert not (here / "out").exists()
    (here / "adapter" / "dual_lora_model.safetensors").write_bytes(b"\x80\x02.")
    status, text, errors = run(capsys, *arguments)
    assert status == 1
    assert "dual_lora_model.safetensors" in errors


@pytest.mark.parametrize(
    "arguments", ["merge a b", "merge a b c --dtype int8", "convert a", "convert a b --to lora", "inspect"]
)
def test_wrong_usage_is_told_with_the_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(arguments.split())
    assert refused.value.code == 2
    assert f"usage: dual-lora {arguments.split()[0]}" in capsys.readouterr().err


def test_ctrl_c_is_a_line(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "write_shard", interrupted)
    status, _, errors = run(capsys, "merge", here / "base", here / "adapter", here / "out")
    assert status == common.INTERRUPTED
    assert errors.splitlines()[-1] == "dual-lora merge: interrupted"
    assert not (here / "out").exists()


def test_the_bar_shows_bytes_and_the_time_left(here: Path) -> None:
    """On a terminal, which a pseudo-terminal is, on stderr; and none elsewhere."""
    command = [sys.executable, "-m", "dual_lora_kernels.cli", "merge", "base", "adapter"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
    quiet = subprocess.run([*command, "quiet"], cwd=here, env=environment, capture_output=True, text=True, check=True)
    assert "MB" not in quiet.stderr
    main, other = pty.openpty()
    process = subprocess.Popen([*command, "out"], cwd=here, env=environment, stdout=subprocess.PIPE, stderr=other)
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"14 weights merged" in output
    assert b"model-0000" in shown
    assert b"kB" in shown
    assert b"B/s" in shown


@pytest.mark.parametrize("name", ["[/]", "[red]", "{task}"])
def test_the_bar_takes_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a base may be called what would be markup for the bar."""
    shown = io.StringIO()
    console = functools.partial(Console, file=shown, force_terminal=True, width=200)
    monkeypatch.setattr(common, "Console", lambda **_: console())
    with common.byte_bar() as progress:
        progress(f"{name}.safetensors", 1, 2)
    assert f"{name}.safetensors" in shown.getvalue()


def test_an_adapter_of_another_method_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "lora").mkdir()
    (here / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (here / "lora" / "adapter_model.safetensors").write_bytes(b"")
    status, _, errors = run(capsys, "merge", here / "base", here / "lora", here / "out")
    assert status == 1
    assert "peft_type: got 'LORA', expected 'DUAL_LORA'" in errors


def test_a_reader_that_goes_away_is_no_traceback(here: Path) -> None:
    """As ``| head -1`` does."""
    command = [
        sys.executable,
        "-m",
        "dual_lora_kernels.cli",
        "inspect",
        str(here / "adapter"),
        "--json",
        "--no-spectra",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 1
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
