# Everything starts from here: each target sets up what it needs, in a fresh clone too.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench bench-cpu bench-cuda sanitize clean

demo: $(READY)
	$(BIN)/batchnorm compare --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py
	cd web && npm run --silent check
	$(BIN)/sphinx-build -q -W -b html docs docs/_build

# Python changes are seen at once (editable install); new packages, the build and web/ install again.
SOURCES := $(shell find src -name __init__.py) $(wildcard src/batchnorm/kernels/cpu/* src/batchnorm/kernels/autograd/*) $(shell find web -path web/node_modules -prune -o -type f -print)
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch numpy scikit-build-core cmake ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[all]' --group test --group check
	touch $@

# Timings: best on a machine that does nothing else. With DEVICE=cuda by the python at hand, not by
# one of ours: a machine with a GPU has a torch for its driver.
DEVICE ?= cpu
PYTHON ?= python3
bench: bench-$(DEVICE)

bench-cpu: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt --group bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.exactness
	$(BIN)/python -m benchmarks.resnet

bench-cuda:
	PYTHONPATH=src $(PYTHON) -m benchmarks.cuda

# The fuzz test of the CPU kernels under the address and undefined-behaviour sanitizers.
sanitize: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DSANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize --target batchnorm_cpu
	BATCHNORM_CPU_LIBRARY=build/sanitize/libbatchnorm_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/kernels/test_kernels.py tests/kernels/test_fuzz.py tests/kernels/test_update.py -k "not lesser"

clean:
	rm -rf $(VENV) build runs web/node_modules docs/_build
