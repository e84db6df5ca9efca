# Each target does its own set-up: uv (bootstrapped where absent), a virtual environment, the locked packages.
PYTHON ?= python3.11
ARGS ?=
export UV_PYTHON_DOWNLOADS := never
export UV_PROJECT_ENVIRONMENT := .venv
unexport PYTHONDONTWRITEBYTECODE # compiling the libraries anew would cost each start three seconds

UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := $(UV) run --frozen --no-sync

.PHONY: demo test check bento setup clean

demo: setup ## the whole loop on a simulated shop; ARGS="--events FILE --mapping NAME"
	$(RUN) rapport demo $(ARGS)

test: setup ## the whole test suite
	$(RUN) pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup ## lint, format, types, import contracts, lock file
	$(UV) lock --check --offline --quiet || $(UV) lock --check --quiet
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) lint-imports

bento: setup ## the service as a bento, its requirements as they are locked
	$(UV) export --frozen --no-dev --no-emit-project --no-hashes --no-annotate --no-header --quiet --output-file deploy/bento/requirements.txt
	$(RUN) bentoml build --bentofile deploy/bento/bentofile.yaml .

setup: .venv/.locked

.venv/.locked: uv.lock pyproject.toml
	@command -v $(UV) >/dev/null || { $(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv==$(UV_VERSION); }
	$(UV) sync --frozen --quiet --python $(PYTHON)
	@touch $@

clean:
	rm -rf .venv .uv .rapport
