"""Builds the package: the native CPU backend from csrc/, where possible. The metadata is in pyproject.toml.

Without a C++17 compiler or without PyTorch's headers the package installs and works all the same, on the eager backend;
a line says so, and `dual-lora doctor` repeats the reason from _native_build.json. Environment variables:

DUAL_LORA_NATIVE    ``auto`` (default), ``require`` (fail where it cannot be compiled) or ``skip``
DUAL_LORA_SANITIZE  a list for the compiler's -fsanitize=, such as ``address,undefined`` (`make sanitize`)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import site
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

PACKAGE = "dual_lora_kernels"
LEAST_TORCH = (2, 11)
"""The version of the stable ABI that the binary asks for; it runs on this PyTorch and every later one."""
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-g0"]
"""No contraction: W = W0 + ΔW is a separate addition, in the reference's bits."""
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
"""GCC 12 warns of its own AVX-512 intrinsics, page after page; Clang does not know the warning."""
INSTRUCTION_SETS = Path(__file__).with_name("csrc") / "instruction_sets.inc"
_LISTED = re.findall(
    r'^DUAL_LORA_INSTRUCTION_SET\((\w+), (\w+),.*?"([^"]*)"\)$',
    INSTRUCTION_SETS.read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
KERNELS = {
    machine: {name: flags.split() for name, own, flags in reversed(_LISTED) if own in (machine, "any")}
    for machine in ("x86_64", "arm64", "other")
}
"""Architecture → the instruction sets to compile kernels for, with their flags; what takes longest comes first."""
REMEDY = "install the package again, with --no-build-isolation"


class Unbuildable(Exception):
    """Why the native backend is not compiled, in words for the user."""


def architecture() -> str:
    """A key of `KERNELS`."""
    names = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}
    return names.get(platform.machine().lower(), "other")


def torch_folder() -> Path:
    """PyTorch's installation: this interpreter's, or (in pip's isolated build) that of the environment built for.

    The stable ABI needs its headers and a library to link, not an import.
    """
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    found += [Path(folder) / "torch" for folder in site.getsitepackages()]
    for folder in found:
        about = folder / "version.py"
        if about.exists():
            version = re.search(r"__version__ = '((\d+)\.(\d+).*)'", about.read_text(encoding="utf-8"))
            if version is None or (int(version[2]), int(version[3])) >= LEAST_TORCH:
                return folder
            least = ".".join(map(str, LEAST_TORCH))
            raise Unbuildable(f"PyTorch was {version[1]} when the package was installed, it needs {least}: {REMEDY}")
    raise Unbuildable(f"PyTorch was not there when the package was installed: {REMEDY}")


class BuildNative(build_ext):
    """Compiles each instruction set's kernels with flags of their own, and records how it went."""

    def run(self) -> None:
        mode = os.environ.get("DUAL_LORA_NATIVE", "auto")
        if mode not in ("auto", "require", "skip"):
            raise SystemExit(f"DUAL_LORA_NATIVE: got {mode!r}, expected 'auto', 'require' or 'skip'")
        # While building in place, the base class changes what this path means.
        library = Path(self.get_ext_fullpath(f"{PACKAGE}._native"))
        library.unlink(missing_ok=True)  # one of an earlier build would not fit the sources
        reason = self.compile(mode)
        library.parent.mkdir(parents=True, exist_ok=True)
        about = {"missing": reason} if reason else {"kernels": list(KERNELS[architecture()])}
        library.with_name("_native_build.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        if reason and mode == "require":
            raise SystemExit(f"DUAL_LORA_NATIVE=require: {reason}")
        if reason:
            print(f"{PACKAGE}: the native CPU backend is left out, CPUs will run 'eager': {reason}", file=sys.stderr)

    def compile(self, mode: str) -> str | None:
        """Build the library; what kept it from being built, if anything did."""
        if mode == "skip":
            return "DUAL_LORA_NATIVE=skip was set when the package was installed"
        if sys.platform == "win32":
            return "csrc/ is written for GCC and Clang"
        try:
            super().run()
        except Unbuildable as error:
            return str(error)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            print(error, file=sys.stderr)
            command = self.compiler.compiler_so_cxx[0]
            if shutil.which(command) is None:
                return f"there was no C++ compiler {command!r}: install one, or set CXX, then install the package again"
            return f"csrc/ did not compile with {command!r}; `pip install -v` shows why"
        return None

    def build_extension(self, ext: Extension) -> None:
        torch = torch_folder()
        sanitizers = os.environ.get("DUAL_LORA_SANITIZE")
        checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
        after = checks if sanitizers else []  # behind the kernels' own flags: the last -O counts
        target = LEAST_TORCH[0] << 56 | LEAST_TORCH[1] << 48
        stable = [f"-DTORCH_TARGET_VERSION={target:#x}", "-isystem", str(torch / "include")]
        jobs = {f"csrc/{name}.cpp": flags for name, flags in KERNELS[architecture()].items()}
        jobs |= {"csrc/capability.cpp": [], "csrc/operators.cpp": stable}

        def compile_one(job: tuple[str, list[str]]) -> str:
            source, flags = job
            objects: list[str] = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, *flags, *after], depends=ext.depends
            )
            return objects[0]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs.items()))
        link = [f"-fsanitize={sanitizers}"] if sanitizers else []
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]  # PyTorch is in the process before this library is
        else:
            link += [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=link, target_lang="c++", build_temp=self.build_temp
        )


if __name__ == "__main__":
    setup(
        # No Python in it: the "limited API" is kept by every Python, which setuptools then says in the names.
        ext_modules=[
            Extension(
                f"{PACKAGE}._native",
                sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
                depends=sorted(str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)),
                language="c++",
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
