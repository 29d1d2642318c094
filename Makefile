# Two commands for a new user: `make demo` and `make test`. Each builds its own environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test docs export notebooks bench dist

demo: $(VENV)/done ## Train on real digits, fold, compare, export, load, predict
	$(BIN)/python demo.py

test: $(VENV)/done ## Every notebook and every test
	$(BIN)/python -m pytest

docs: $(VENV)/done ## The site, in _docs
	$(BIN)/python -W ignore docs/build.py

export: $(VENV)/done ## Write the package and README.md from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

notebooks: $(VENV)/done ## Run every notebook and save what it shows
	$(BIN)/python tools/notebooks.py
	$(BIN)/python tools/readme.py

bench: $(VENV)/done ## Everything in benchmarks/, one after the other (resumable, hours)
	$(BIN)/python -m pip install --quiet onnx onnxscript onnxruntime
	cd benchmarks && for args in coverage.py "coverage.py --sources pytorchcv" "coverage.py --sources torchvision" "coverage.py --timm-limit 10" "peers.py --all" beyond.py latency.py "latency.py --compile" cost.py numerics.py fuzz.py; do ../$(BIN)/python $$args || exit 1; done

dist: $(VENV)/done ## A wheel and an sdist
	$(BIN)/python -m build

$(VENV)/done: settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
