.PHONY: setup kernels sanitize check format lint types contracts test slow walk docs

PYTHON ?= python
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all

setup:  ## a fresh environment's one command
	$(PYTHON) -m pip install -e '.[dev]'

kernels:  ## builds the native kernels in place; `setup` has done it once
	$(PYTHON) setup.py -q build_ext --inplace

sanitize:  ## kernel tests under AddressSanitizer and UBSan, by GCC; leaves a plain build
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(PYTHON) setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(PYTHON) -m pytest -q -n 0 tests/qat/kernels tests/qat/runtime/test_fused.py
	$(PYTHON) setup.py -q build_ext --inplace --force

check: format lint types contracts test

format:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m pyright --pythonpath "$$($(PYTHON) -c 'import sys; print(sys.executable)')"

contracts:
	$(PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-logo'])"

test:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

slow:  ## minutes; before a release
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow

walk:  ## every command of README, quickstart and guides, as printed; minutes
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m walk -x

docs:  ## the documentation site, into build/site; needs the extra `docs`
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet --strict
