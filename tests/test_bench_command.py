"""The suite's command line, by a preset that measures nothing, and its self-check."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import dual_lora_kernels
from benchmarks import command
from benchmarks.harness import self_check
from benchmarks.harness.environment import commit, environment, missing_backend
from benchmarks.harness.results import Case, Measurement, Results, read
from benchmarks.harness.timing import Quartiles
from dual_lora_kernels import cli
from dual_lora_kernels.backends.native import NativeBackend
from dual_lora_kernels.commands.bench import import_suite

ROOT = Path(__file__).parents[1]


def _results(options: argparse.Namespace, console: Console) -> Results | None:
    console.print("measuring")
    case = Case(
        {"kind": "step", "tokens": options.tokens},
        "floor",
        {"floor": Measurement((1.0, 2.0)), "lora": Measurement((2.0, 4.0))},
    )
    options.failed = options.part
    return None if options.nothing else Results("layer", "", environment(torch.device("cpu")), (case,))


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=3)
    parser.add_argument("--part")
    parser.add_argument("--nothing", action="store_true")
    parser.add_argument("--else", dest="document", action="store_const", const="something-else")
    parser.set_defaults(rounds=4)


@pytest.fixture(autouse=True)
def preset(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = SimpleNamespace(
        HELP="measures nothing",
        add=_add,
        run=_results,
        table=lambda case: ("Steps", ["subject", "×"], [[n, f"{case.ratio(n).median:g}"] for n in case.subjects]),
    )
    monkeypatch.setattr(command, "load", lambda _: planted)
    monkeypatch.setattr(command, "self_check", lambda *_: Quartiles(1.09, 1.1, 1.11))
    monkeypatch.setattr(command, "missing_backend", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_both_commands_measure_show_and_write_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["layer", "--tokens", "5", "--out", str(tmp_path)]
    assert command.main([*arguments, "--name", "mine"]) == 0
    assert cli.main(["bench", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Steps") == 2
    (mine,), (other,) = tmp_path.glob("*/mine.json"), tmp_path.glob("*/layer.json")
    assert str(mine) in re.sub(r"\n", "", shown)
    results = read(mine)
    assert results.command == "python -m benchmarks layer --tokens 5 --out DIR --name mine"
    assert read(other).command == "dual-lora bench layer --tokens 5 --out DIR"
    assert read(other).cases == results.cases
    assert results.self_check == {"lower": 1.09, "median": 1.1, "upper": 1.11}
    assert results.notes == ()
    assert results.cases[0].ratio("lora").median == 2.0


def test_what_a_preset_measures_besides_has_a_name_of_its_own(tmp_path: Path) -> None:
    """It neither replaces the preset's own results nor is refused for them."""
    for arguments in ([], ["--else"], ["--else", "--name", "mine"]):
        assert command.main(["layer", *arguments, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*/*")} == {"layer.json", "something-else.json", "mine.json"}


def test_a_part_that_failed_is_the_exit_status_of_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["layer", "--part", "models: no memory", "--out", str(tmp_path)]) == 1
    assert "failed: models: no memory" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/layer.json"))) == 1


def test_where_nothing_was_measured_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["layer", "--nothing", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) is None
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_command_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["layer", f"--out={tmp_path}"]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob("*/layer.json")
    assert read(path).command == "python -m benchmarks layer --out=DIR"
    assert command.main(arguments) == 0
    before = path.read_bytes()
    capsys.readouterr()
    assert command.main([*arguments, "--tokens", "5"]) == 1
    captured = capsys.readouterr()
    assert "measuring" not in captured.out
    assert "--name: got 'layer'" in captured.err
    assert path.read_bytes() == before


def test_a_missing_native_backend_is_said_and_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "missing_backend", missing_backend)
    monkeypatch.setattr(NativeBackend, "why_unavailable", lambda _: "not compiled")
    assert command.main(["layer", "--out", str(tmp_path)]) == 0
    assert "dual_lora is the eager backend: not compiled" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/layer.json")
    assert read(path).notes == ("dual_lora is the eager backend: not compiled",)


def test_a_commit_differs_where_its_code_does(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    for name in ("README.md", "benchmarks/results/a.json", "benchmarks/command.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    git("add", ".")
    git("commit", "-m", "all")
    clean = commit(tmp_path)
    assert clean is not None
    assert clean[-1] != "+"
    for name, suffix in (("README.md", ""), ("benchmarks/results/a.json", ""), ("benchmarks/command.py", "+")):
        (tmp_path / name).write_text("changed")
        assert commit(tmp_path) == clean + suffix


def test_json_is_all_of_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["layer", "--json", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["preset"] == "layer"
    assert "measuring" in captured.err


def test_quick_results_do_not_replace_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "MACHINES", tmp_path / "machines")
    assert command.main(["layer", "--quick"]) == 0
    assert not (tmp_path / "machines").exists()
    assert command.main(["layer"]) == 0
    assert len(list((tmp_path / "machines").glob("*/layer.json"))) == 1


def test_a_self_check_that_fails_is_said_and_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "self_check", lambda *_: Quartiles(0.9, 1.0, 1.3))
    assert command.main(["layer", "--out", str(tmp_path)]) == 0
    assert "SELF-CHECK FAILED" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/layer.json")
    assert ["SELF-CHECK FAILED" in note for note in read(path).notes] == [True]


@pytest.mark.parametrize(
    "arguments",
    ["", "speed", "layer --rounds 0", "layer --threads two", "layer --name a/b", "layer --tokens", "--quick layer"],
)
def test_wrong_usage_is_told_with_the_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(arguments.split())
    assert refused.value.code == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert command.main(["layer", "--out", str(tmp_path / "file" / "below")]) == 1
    captured = capsys.readouterr()
    assert "measuring" not in captured.out
    assert captured.err.startswith("dual-lora bench: ")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "benchmarks.presets.model", None)  # importing it is an ImportError
    assert cli.main(["bench", "model"]) == 1
    assert "dual-lora bench: preset 'model' cannot be imported: " in capsys.readouterr().err
    assert cli.main(["bench", "model", "--json"]) == 1
    assert "pip install" in json.loads(capsys.readouterr().out)["error"]


def _installed_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_lora_kernels, "__file__", str(folder / "site-packages" / "dual_lora_kernels" / "x.py"))


def test_the_suite_is_found_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _installed_in(tmp_path, monkeypatch)
    monkeypatch.chdir(ROOT)
    import_suite()


def test_where_there_is_no_suite_the_error_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _installed_in(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "layer"]) == 1
    error = capsys.readouterr().err
    assert "not beside the package, not in this folder" in error
    assert "a clone of that version" in error
    assert error.count("\n") == 1


def test_the_suite_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _installed_in(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "command.py").write_text("")
    (tmp_path / "dual_lora_kernels").mkdir()
    (tmp_path / "dual_lora_kernels" / "_version.py").write_text('__version__ = "0.0.9"\n')
    expected = f"has those of 0.0.9, expected those of dual_lora_kernels {dual_lora_kernels.__version__}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        import_suite()


def test_another_package_called_benchmarks_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks", SimpleNamespace(__file__="elsewhere/benchmarks/__init__.py"))
    with pytest.raises(ValueError, match="another package of this name, elsewhere"):
        import_suite()


def test_the_self_check_does_a_tenth_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of products, in rounds as all subjects have them; what it sees depends on the machine."""
    products = {"as it is": 0, "planted": 0}

    def counted(subjects: dict[str, object], *, rounds: int, **_: object) -> dict[str, list[float]]:
        for name, run in subjects.items():
            with torch.profiler.profile() as recorded:
                run()  # type: ignore[operator]
            products[name] = sum(event.name == "aten::mm" for event in recorded.events())
        return {name: [float(count)] * rounds for name, count in products.items()}

    monkeypatch.setattr(self_check, "interleaved", counted)
    seen = self_check.self_check(torch.device("cpu"))
    assert products["planted"] / products["as it is"] == self_check.PLANTED == pytest.approx(seen.median)
    assert self_check.warning(seen) is None


@pytest.mark.parametrize(("median", "trusted"), [(1.0, False), (1.051, True), (1.149, True), (1.16, False)])
def test_a_planted_difference_that_is_not_seen_is_warned_of(median: float, trusted: bool) -> None:
    assert (self_check.warning(Quartiles(1.0, median, 1.2)) is None) is trusted
