# Each target makes .venv and installs by itself; a second call is instant.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: compare test test-all test-machines check clean

compare: $(STAMP)  ## compare decoding methods on the bundled pair, offline
	$(BIN)/specbeam compare $(ARGS)

test: $(STAMP)  ## everything but the heavy tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not heavy" $(ARGS)

test-all: $(STAMP)  ## also what needs a browser (Debian: apt-get install chromium) or minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser,figures,kernels]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)
	$(MAKE) test-machines

test-machines: $(STAMP)  ## Ray, Hydra's launchers, two processes, lm-eval, the notebook, a server: 20 minutes, large packages
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[dev,ray,sweep,parallel,notebook,lm-eval]' 'transformers[serving]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/experiment/test_ray_executor.py tests/experiment/test_launch.py \
	  tests/experiment/test_reliability.py tests/test_placement.py tests/test_lm_eval.py tests/test_notebook.py \
	  tests/baselines/test_transformers_serve.py $(ARGS)

check: $(STAMP)  ## style and types
	$(BIN)/ruff check src tests recipes benchmarks
	$(BIN)/mypy src

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv dist build outputs .pytest_cache .mypy_cache .ruff_cache
