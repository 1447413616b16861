# make demo: set up, run the whole pipeline on real clips, show the result
# make test: set up, pass the tests
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out/demo
bin    := $(VENV)/bin

.PHONY: demo test setup assets lint format lock clean

demo: setup
	$(bin)/python -m pipelines.demo --output $(OUT)

test: setup
	$(bin)/ruff check . && $(bin)/ruff format --check .
	$(bin)/python -m pytest --numprocesses 2 --dist loadfile

setup: $(VENV)/.installed assets

# Rebuilt only when what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: use make PYTHON=python3.11")'
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[pose,test]'
	@touch $@

# Real human clips and pose networks: fetched once into the cache, checked by hash.
assets: $(VENV)/.installed
	@$(bin)/python -m entprog.media.assets

lint: $(VENV)/.installed
	$(bin)/ruff check . && $(bin)/ruff format --check .

format: $(VENV)/.installed
	$(bin)/ruff check --fix . ; $(bin)/ruff format .

# What was tested, exactly.
lock: $(VENV)/.installed
	$(bin)/python -m pip freeze --exclude-editable | sed 's/^\(torch==[0-9.]*\)+.*/\1/' > requirements.lock

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis
