# `make demo` and `make test` need nothing but Python 3.11 or later with venv and pip: they install what they use into
# $(VENV), at the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
BIN = $(VENV)/bin
SOURCES = src tests scripts benchmarks examples docs/hooks
RESULTS = benchmarks/results
ONE_THREAD = OMP_NUM_THREADS=1 $(BIN)/python
# What a function returns is one text without a name, however many lines it has.
DOCSTRINGS = {"returns_multiple_items": false, "returns_named_value": false}

.PHONY: demo test test-fast test-newest test-distributed test-gpu-path test-browser test-ecosystem docs quality style bench bench-full hf-suite clean

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python scripts/demo.py

# One thread a process: there are as many processes as cores. They take files in the order of tests/conftest.py.
WORKERS = --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

# For whoever edits a gate or a layer: the quick tests of models/, in one process, in under a minute.
test-fast: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models -m "not slow and not distributed and not browser"

# The same tests with the newest versions that pyproject.toml allows, in an environment of their own. Only torch is held
# at its version in constraints.txt: a newer one would bring gigabytes of CUDA on Linux.
test-newest:
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)" setuptools
	$(NEWEST_VENV)/bin/pip install --quiet --editable '.[dev,eval]'
	$(NEWEST_VENV)/bin/pip list --format freeze | grep -E '^(torch|transformers|accelerate|datasets|tokenizers)='
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(WORKERS)

# What takes several processes minutes; up to four of them at once.
test-distributed: $(BIN)/.installed
	$(BIN)/python -m pytest -m distributed

# What a GPU runs, on a CPU: Triton's interpreter, fake CUDA tensors, compiled steps, and benchmarks/gpu.py at tiny sizes.
test-gpu-path: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval,gpu-path]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu_path
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu.py --device cpu --tiny --again --output build/gpu-tiny.md

# Pages in a headless Chromium, which has to be there: apt-get install chromium chromium-driver.
test-browser: $(BIN)/.installed
	MOE_HF_BROWSER=required $(BIN)/python -m pytest -m browser

# The notebooks, from the first cell to the last, a minute or two each on a free core.
.PHONY: notebooks
notebooks: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,eval,notebooks]'
	$(BIN)/ruff check notebooks
	$(BIN)/ruff format --check notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m notebooks tests/docs/test_notebooks.py

# Other libraries on the models (docs/integrations.md).
test-ecosystem: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ecosystem,eval]'
	$(BIN)/python -m pytest tests/ecosystem

# The site, in build/site. A dead link, a page without a place or a docstring's warning fails.
docs: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs,eval]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in build/site: open build/site/index.html"

# Style, and docstrings from which an API reference builds without a warning.
quality: $(BIN)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	! $(BIN)/griffe dump moe_hf -s src -d google -D '$(DOCSTRINGS)' -f -L WARNING -o /dev/null 2>&1 | grep .

style: $(BIN)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# A look at each in four minutes; `make bench-full` writes benchmarks/results/ in about an hour.
bench: $(BIN)/.installed
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/lstm.py --rounds 1
	$(BIN)/python benchmarks/training.py --tokens 1024 --rounds 1 --models MoE-256
	$(BIN)/python benchmarks/generation.py --batches 1 --contexts 1024 --rounds 1
	$(BIN)/python benchmarks/translation.py --batches 1 --rounds 1
	$(BIN)/python benchmarks/memory.py --rounds 1
	$(BIN)/python benchmarks/growth.py --tokens 256 --rounds 1

bench-full: $(BIN)/.installed
	$(ONE_THREAD) benchmarks/experts.py --full --output $(RESULTS)/experts.md
	$(ONE_THREAD) benchmarks/lstm.py --output $(RESULTS)/lstm.md
	$(ONE_THREAD) benchmarks/training.py --output $(RESULTS)/training.md
	$(ONE_THREAD) benchmarks/training.py --tokens 2048 --output $(RESULTS)/training-2048.md
	$(ONE_THREAD) benchmarks/generation.py --batches 1 --contexts 128 1024 8192 --output $(RESULTS)/generation.md
	$(ONE_THREAD) benchmarks/generation.py --batches 32 --contexts 128 1024 --output $(RESULTS)/generation-batch-32.md
	$(ONE_THREAD) benchmarks/translation.py --output $(RESULTS)/translation.md
	$(ONE_THREAD) benchmarks/balanced_slots.py --full --output $(RESULTS)/balanced-slots.md
	$(ONE_THREAD) benchmarks/memory.py --output $(RESULTS)/memory.md
	MOE_HF_KEEP_MEMORY=0 $(ONE_THREAD) benchmarks/softmax.py --output $(RESULTS)/softmax.md
	$(ONE_THREAD) benchmarks/growth.py --output $(RESULTS)/growth.md
	$(ONE_THREAD) benchmarks/offload.py --output $(RESULTS)/offload.md
	$(ONE_THREAD) benchmarks/sharding.py --output $(RESULTS)/sharding.md
	$(ONE_THREAD) benchmarks/compile.py --output $(RESULTS)/compile.md
	$(ONE_THREAD) benchmarks/decoding.py --output $(RESULTS)/decoding.md

# Transformers' own common model tests, from the source package of the installed version.
hf-suite: $(BIN)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt parameterized
	$(BIN)/python tests/hf_suite/run.py

# Removes what was installed and built. Models in runs/ stay.
clean:
	rm -rf $(VENV) $(NEWEST_VENV) build dist src/*.egg-info src/moe_hf/native/*.so .pytest_cache .ruff_cache .hypothesis
