# `make demo` and `make test` need nothing but Python 3.11 or later with venv and pip: they install what they use into
# $(VENV), at the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = src tests scripts benchmarks examples

.PHONY: demo test test-distributed quality style bench hf-suite clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python scripts/demo.py

test: $(BIN)/.installed
	$(BIN)/python -m pytest

# What takes several processes minutes; up to four of them at once.
test-distributed: $(BIN)/.installed
	$(BIN)/python -m pytest -m distributed

quality: $(BIN)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(BIN)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/lstm.py
	$(BIN)/python benchmarks/training.py --tokens 2048
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/translation.py
	$(BIN)/python benchmarks/balanced_slots.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/softmax.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/offload.py
	$(BIN)/python benchmarks/sharding.py

# Transformers' own common model tests, from the source package of the installed version.
hf-suite: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt parameterized
	$(BIN)/python tests/hf_suite/run.py

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
