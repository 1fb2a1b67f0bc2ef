"""Compiles and runs compare_kernels.cpp with setup.py's flags, for this machine or, emulated, for another.

python csrc/check/compare_kernels.py [ARCHITECTURE COMPILER EMULATOR]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from setup import FLAGS, KERNELS, architecture  # noqa: E402


def main(target: str, compiler: str, *emulator: str) -> int:
    missing = [tool for tool in (compiler, *emulator) if shutil.which(tool) is None]
    if missing:
        needed = "; Debian has them as g++-aarch64-linux-gnu and qemu-user-static" if target == "arm64" else ""
        print(f"compare_kernels for {target}: needs {' and '.join(missing)}{needed}", file=sys.stderr)
        return 2
    build = ROOT / "build" / "compare_kernels" / target
    build.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[str, list[str]]) -> str:
        name, flags = job
        result = str(build / f"{Path(name).stem}.o")
        command = [compiler, *FLAGS, *flags, "-c", f"csrc/{name}.cpp", "-o", result]
        subprocess.run(command, cwd=ROOT, check=True)
        return result

    jobs = KERNELS[target] | {"capability": [], "check/compare_kernels": ["-Wall", "-Wextra"]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs.items()))
    program = str(build / "compare_kernels")
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return subprocess.run([*emulator, program], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or [architecture(), os.environ.get("CXX", "g++")])))
