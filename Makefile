# Two commands to start with: `make demo` grades an example class, `make test` runs everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test test-fast soak notebooks bundle benchmark lint clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## grade an example class of seven with nbgrader's own commands
	$(BIN)/python -m autograder.demo

test: $(VENV)/installed  ## everything: tests, every solution replayed, freshness of what is generated
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests
	TQDM_DISABLE=1 $(BIN)/python -m pytest -q -p no:cacheprovider --nbval --nbval-sanitize-with solutions/nbval_sanitize.cfg solutions

test-fast: $(VENV)/installed  ## the loop for daily work, without notebooks and classes
	$(BIN)/ruff check . && $(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow" tests

soak: $(VENV)/installed  ## the solution regraded 200 times, mutants and alternatives with other seeds, long fuzzing
	DIFFLAB_TEST_REPEATS=200 $(BIN)/python -m pytest -q -n 2 tests/test_accuracy.py -k again_and_again
	DIFFLAB_FUZZ_EXAMPLES=5000 $(BIN)/python -m pytest -q -n 2 tests/attacks/test_fuzz.py
	for seed in 1000 2000 3000; do DIFFLAB_TEST_SEED=$$seed $(BIN)/python -m pytest -q -n 2 tests/test_accuracy.py || exit 1; done

SAMPLE = $(BIN)/difflab sample --from solutions/lab04_training/lab04_training.ipynb --checkpoint mnist-t300 --num-samples 64 --force
notebooks: $(VENV)/installed  ## build and execute every notebook, and the rubric, from solutions/*.py
	$(BIN)/python -m autograder build
	$(BIN)/python docs/samplers.py
	$(BIN)/python docs/pictures.py
	$(SAMPLE) --method ddpm --out docs/lab04-ddpm.png
	$(SAMPLE) --method ddim --num-steps 50 --out docs/lab04-ddim50.png
	$(SAMPLE) --method ddim --num-steps 20 --out docs/lab04-ddim20.png

bundle: $(VENV)/installed  ## write difflab-students.zip: all that students receive, and no solution
	$(BIN)/python -m autograder bundle

benchmark: $(VENV)/installed  ## time and memory of grading a notebook and a class; what sampling loops cost
	$(BIN)/python benchmarks/grading.py
	$(BIN)/python benchmarks/course.py
	$(BIN)/python benchmarks/cached_loop.py

lint: $(VENV)/installed  ## format the code and check it
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:  ## remove the environment and everything generated locally
	rm -rf $(VENV) demo build dist *.egg-info

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[grading,cluster,acceleration,dev]"
	touch $@
