# make demo    from nothing to a trained, evaluated run: installs, prepares a corpus, trains on 2 ranks with ZeRO-2
# make test    installs what is missing and runs the whole test suite, in two processes
# make lint    ruff and mypy
# make bench   every benchmark but capacity.py, which takes hours; each prints a table of ratios
#
# make demo CORPUS=openclipart      the other corpus (needs apt-get: the packages are Debian's)
# make demo ARGS="schedule.length='2 epochs'"     any setting of the recipe

PYTHON ?= python3
VENV ?= .venv
CORPUS ?= emoji
ARGS ?=
# One rank for each GPU; two on the CPU where there is none.
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); [ "$$n" -gt 0 ] && echo $$n || echo 2)
# DeepSpeed warns where it has to find out for itself that there is no GPU.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo DS_ACCELERATOR=cpu)
RUN ?= runs/demo-$(CORPUS)-$(shell date +%Y%m%d-%H%M%S)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := test

# Test tools are cheap beside torch, so there is one environment, whichever target comes first.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[emoji,build-ops,fairscale,cluster,download,duplicates,imagenet,dev]'
	touch $@

# Two jobs of the deepspeed launcher on one machine would collide on its fixed port, so a free one is asked for.
demo: $(INSTALLED)
	$(BIN)/scale-wsl prepare $(CORPUS) --out data/$(CORPUS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(ACCELERATOR) $(BIN)/deepspeed --log_level error --num_accelerators $(RANKS) --master_port \
	  $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') \
	  recipes/pretrain.py --recipe recipes/pretrain/$(CORPUS).yaml --ds_config zero2.json run.folder=$(RUN) $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	for script in $(filter-out benchmarks/capacity.py,$(wildcard benchmarks/*.py)); do OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
