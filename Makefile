# make demo      set up, run the whole pipeline on real clips, show the result
# make test      set up, pass the tests but the slowest; make test-all: all of them
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out/demo
bin    := $(VENV)/bin

# uv knows the package index of pip's environment too; where it cannot reach one, pip goes on.
export UV_DEFAULT_INDEX ?= $(or $(PIP_INDEX_URL),https://pypi.org/simple)
pip := $(bin)/python -m pip install --quiet --no-compile
install = { test -x $(bin)/uv && $(bin)/uv pip install --quiet --python $(bin)/python $(1); } || \
	{ echo "without uv this takes minutes"; $(pip) $(1); }

# A run has some ten processes. Where no bytecode lies on disk, each compiles what it imports: up to 7 s of CPU. So it is
# always written, and set-up imports once what most of them import, in two processes side by side. What nobody imports is
# not compiled: pip would, for 8 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all setup assets lint format lock clean

demo: setup
	$(bin)/python -m pipelines.demo --output $(OUT)

# A file stays in one process, and files are begun in the order of tests/conftest.py.
pytest := $(bin)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint assets
	$(pytest) -m "not slow"

test-all: lint assets
	$(pytest)

setup: $(VENV)/.installed assets

# Rebuilt only when what is to be installed changes. What was tested, by hash, without a search for versions that go
# together; but torch as pip's own configuration gives it: for the CPU, or for a GPU with all that it needs.
$(VENV)/.installed: pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: use make PYTHON=python3.11")'
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@$(pip) --constraint constraints.txt uv || true
	@$(call install,--no-deps --require-hashes --requirement requirements.lock)
	@$(pip) --constraint constraints.txt torch
	@$(call install,--no-deps --editable .)
	@$(bin)/python -c 'import mlflow, ray.tune, ray.train.torch' & $(bin)/python -c 'import pipelines.training.worker' && wait $$!
	@touch $@

# Real human clips and pose networks: fetched once into the cache, checked by hash.
assets: $(VENV)/.installed
	@$(bin)/python -m entprog.media.assets

lint: $(VENV)/.installed
	$(bin)/ruff check . && $(bin)/ruff format --check .

format: $(VENV)/.installed
	$(bin)/ruff check --fix . ; $(bin)/ruff format .

# After a change of versions: what constraints.txt and pyproject.toml ask for, everything else as it was.
# torch and what it alone needs are left to pip.
lock: $(VENV)/.installed
	echo 'torch ; python_version < "3"' > $(VENV)/without-torch.txt
	$(bin)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--custom-compile-command "make lock" --constraint constraints.txt --overrides $(VENV)/without-torch.txt \
		--extra pose --extra test pyproject.toml --output-file requirements.lock

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis
