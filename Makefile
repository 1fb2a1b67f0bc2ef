# Every target makes its own virtual environment; nothing needs to be prepared.
VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
# The CPU build on machines where that is what pip finds; a GPU user installs their own torch first (README).
TORCH := torch==2.13.0
OLDEST_TRITON := 3.6.0
OUT ?= results/demo
# The tests' operations are small: threads that spin between them cost minutes on a machine that others use too.
export OMP_WAIT_POLICY ?= PASSIVE

# One process for each core; what takes long is Python and compilers, not products.
PARALLEL := -n auto --dist worksteal

# `make sanitize`: the runtimes come before Python, which was built without them; GCC's, as their names are.
SANITIZED := DUAL_LORA_SANITIZE=address,undefined DUAL_LORA_NATIVE=require
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell $(CXX) -print-file-name=$(name)))
REPORTS := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTEST_ADDOPTS=--capture=sys

.PHONY: help demo test deepspeed test-eager test-triton test-few-machines test-machines sanitize cross lint kernels docs bench publish gpu-session ratios clean

help:
	@echo "make demo   fine-tune a small Llama with Dual LoRA, LoRA, DoRA and fully; compare, save, reload, merge, plot"
	@echo "make test   run the test suite, then its numerical part on the Triton kernels in Triton's interpreter"
	@echo "make test-machines  the numerical tests under all settings that stand in for other machines (a quarter of an hour)"
	@echo "make sanitize  the native kernels' tests on a build with the address and undefined-behaviour sanitizers"
	@echo "make cross  this machine's instruction sets, and ARM's in an emulator, against the portable kernels, bit for bit;"
	@echo "            needs g++-aarch64-linux-gnu and qemu-user-static"
	@echo "make deepspeed  install DeepSpeed, which compiles, and run its tests on two CPU processes"
	@echo "make lint   ruff and mypy"
	@echo "make docs   build the documentation site into build/site; any warning is an error"
	@echo "make kernels  compile every kernel for every chip; fail on spills, too much shared memory, no matrix unit"
	@echo "make bench  the suite's presets on this machine, half an hour: layers, decoding, merging, growth, a model"
	@echo "make publish  every results table and picture of README and docs/ from benchmarks/results"
	@echo "make gpu-session  on a GPU, in 8 minutes: numerics, rooflines, layers, models, into benchmarks/results/machines"
	@echo "make ratios a layer's step and decoding against bounds on ratios, in half a minute, beside whatever else runs"
	@echo "make clean  remove the virtual environment and build products"

# torch first and pinned, then the project against it: an unpinned torch or an isolated build fetches gigabytes.
$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*.inc csrc/vectors/*.h)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel numpy
	$(PYTHON) -c "import torch; assert torch.torch_version.TorchVersion(torch.__version__) >= (2, 11)" 2>/dev/null \
		|| $(PIP) install $(TORCH)
	$(PIP) install --no-build-isolation -e ".[test,lint,docs]"
	touch $@

demo: $(VENV)/.installed
	$(PYTHON) -m examples.demo --out $(OUT)

test: test-eager test-triton test-few-machines

test-eager: $(VENV)/.installed
	$(PYTHON) -m pytest $(PARALLEL)

# Settings that stand in for other processors, libraries' paths and thread counts (benchmarks/harness/machines.py).
test-few-machines: $(VENV)/.installed
	$(PYTHON) -m tests.machines

test-machines: $(VENV)/.installed
	$(PYTHON) -m tests.machines --every

# Triton's interpreter is Python and NumPy: more threads only get into each other's way.
test-triton: $(VENV)/.installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(PARALLEL)

# Not among the test extra: it is large, and compiles an operation on its first run (g++).
deepspeed: $(VENV)/.installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) install --no-build-isolation ninja "deepspeed>=0.19"
	DS_ACCELERATOR=cpu PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON) -m pytest -q tests/test_deepspeed.py

# A copy under build/, so that the installed library stays as it is. A finding ends the process, and so the tests; pytest
# would keep its report if it captured more than Python's output.
sanitize: $(VENV)/.installed
	rm -rf build/sanitize
	mkdir -p build/sanitize
	cp -r csrc dual_lora_kernels dual_lora_command.py benchmarks tests setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/dual_lora_kernels/_native*
	cd build/sanitize && $(SANITIZED) $(abspath $(PYTHON)) setup.py -q build_ext --inplace
	cd build/sanitize && $(SANITIZED) $(REPORTS) LD_PRELOAD="$(RUNTIMES)" $(abspath $(PYTHON)) -m pytest tests/test_native*.py tests/test_quantised.py

# The kernels need no torch: any Python with setuptools will do.
cross: $(VENV)/.installed
	$(PYTHON) csrc/check/compare_kernels.py
	$(PYTHON) csrc/check/compare_kernels.py arm64 aarch64-linux-gnu-g++ qemu-aarch64-static

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# With the newest Triton and with the oldest that is supported, which GPU machines have: it needs more registers and memory.
kernels: $(VENV)/.installed build/triton-$(OLDEST_TRITON)
	$(PYTHON) -m benchmarks.compiler.static_report --check --out results/kernels
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PYTHON) -m benchmarks.compiler.static_report --check --out results/kernels-oldest

build/triton-$(OLDEST_TRITON): $(VENV)/.installed
	$(PIP) install -q --no-deps --upgrade --target $@ triton==$(OLDEST_TRITON)

# mkdocs.yml makes warnings errors, but --quiet would not count them. The variable silences an advertisement of Material's.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build

ratios: $(VENV)/.installed
	$(PYTHON) -m benchmarks.ratio_check

gpu-session: $(VENV)/.installed
	$(PYTHON) -m benchmarks gpu

bench: $(VENV)/.installed
	for preset in layer decode merge scale model; do $(PYTHON) -m benchmarks $$preset || exit 1; done

publish: $(VENV)/.installed
	$(PYTHON) -m benchmarks.publish

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis dual_lora_kernels/_native*
