"""What setup.py, pyproject.toml, MANIFEST.in and the Makefile have to agree on."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
setuptools = pytest.importorskip("setuptools")
if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without their source tree", allow_module_level=True)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What setup.py defines, and what it tells setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: told.update(arguments))
    monkeypatch.chdir(ROOT)
    return SimpleNamespace(**runpy.run_path("setup.py", run_name="__main__"), told=told)


def test_every_source_is_compiled_for_some_architecture(script: SimpleNamespace) -> None:
    compiled = {f"csrc/{name}.cpp" for kernels in script.KERNELS.values() for name in kernels}
    compiled |= {"csrc/capability.cpp", "csrc/operators.cpp"}
    assert compiled == {path.as_posix() for path in Path("csrc").glob("*.cpp")}
    assert compiled == set(script.told["ext_modules"][0].sources)


def test_a_source_distribution_has_the_headers() -> None:
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text().splitlines()


def test_the_least_pytorch_and_python_are_those_of_the_metadata(script: SimpleNamespace) -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    least = ".".join(map(str, script.LEAST_TORCH))
    assert f'"torch>={least}"' in metadata
    python = re.search(r'requires-python = ">=3\.(\d+)"', metadata)
    assert python is not None
    assert script.told["options"]["bdist_wheel"]["py_limited_api"] == f"cp3{python[1]}"


@pytest.mark.parametrize(("version", "reason"), [(None, "was not there"), ("2.10.1+cpu", "was 2.10.1.cpu when")])
def test_no_or_an_old_pytorch_is_named(
    version: str | None, reason: str, script: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    with pytest.raises(script.Unbuildable, match=reason):
        script.torch_folder()


@pytest.mark.parametrize(
    ("mode", "succeeds", "message"),
    [
        ("auto", True, "no C.. compiler '/nonexistent'"),
        ("skip", True, "DUAL_LORA_NATIVE=skip was set"),
        ("require", False, "DUAL_LORA_NATIVE=require: there was no C.. compiler '/nonexistent'"),
        ("sometimes", False, "DUAL_LORA_NATIVE: got 'sometimes', expected 'auto', 'require' or 'skip'"),
    ],
)
def test_a_build_without_a_compiler(mode: str, succeeds: bool, message: str, tmp_path: Path) -> None:
    """It says why, and leaves no library of an earlier build behind."""
    library = tmp_path / "dual_lora_kernels/_native.abi3.so"
    library.parent.mkdir()
    library.touch()
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path),
    ]
    missing = {"CC": "/nonexistent", "CXX": "/nonexistent", "DUAL_LORA_NATIVE": mode}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | missing, capture_output=True, text=True)
    assert (done.returncode == 0) == succeeds
    assert re.search(message, done.stderr)
    if mode != "sometimes":
        assert not library.exists()
        reason = json.loads(library.with_name("_native_build.json").read_text())["missing"]
        assert reason in done.stderr


def test_wheels_have_all_that_is_not_python() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "dual_lora_kernels"
    others = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts and "_native" not in path.name
    }
    assert others == set(data["dual_lora_kernels"])


def test_make_rebuilds_and_cleans_what_is_compiled() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^\$\(VENV\)/\.installed:.*csrc/\*\.cpp csrc/\*\.h csrc/\*\.inc csrc/vectors/\*\.h", makefile, re.MULTILINE
    )
    assert {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")} == {
        "csrc",
        "csrc/vectors",
    }
    assert re.search(r"rm -rf .* dual_lora_kernels/_native\*", makefile)
