# make demo      demonstrations -> fine-tuning -> comparison report (reports/demo/index.html)
# make test      the test suite and every library notebook
# make install   only the environment: .venv, with pip, from constraints.txt
#
# Variables
#   PYTHON=...       interpreter for .venv (3.11 or newer; found by itself otherwise)
#   TORCH_INDEX=...  package index to take torch from, when your default index serves a build that you do not want; for the
#                    CPU wheel:  make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   EXTRAS=...       optional parts, e.g. EXTRAS=video,lora (see pyproject.toml)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test headline peers bench-data bench-policies equality parity readme notebooks lab clean

VENV := .venv
DRAWING := (6[78]0|7[56]0|8[012]0)_
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH_INDEX ?=
EXTRAS ?=
LEROBOT ?= .venv-lerobot/bin/python
TFDS ?= .venv-tfds/bin/python
PYTHON ?= $(shell tools/find_python.sh)
export OMP_NUM_THREADS ?= 1

help:
	@awk '/^#/ {sub(/^# ?/, ""); print; next} {exit}' Makefile
	@echo; echo "Others: headline (three seeds, hours), peers (environments of LeRobot and tfds, for the benchmarks), bench-data, bench-policies, equality, parity, readme, notebooks, lab, clean"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11 or newer was found: install one, or call make with PYTHON=/path/to/python." >&2; exit 1; fi
	@[ -x $(BIN)/python ] || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing packages into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[hdf5,jax,onnx,lora,tracking$(EXTRAS:%=,%)]"
	$(BIN)/python -m ipykernel install --sys-prefix --name vla_nb --display-name "Python (vla_nb)" >/dev/null
	@tools/system_gl.sh
	@touch $@

demo: install
	@$(BIN)/vla-nb experiment run demo

headline: install
	@$(BIN)/vla-nb experiment run headline

# Peers run in environments of their own, made by `make peers`; LEROBOT=... and TFDS=... name the python of others.
peers:
	@tools/peers.sh $(PYTHON) $(TORCH_INDEX)

bench-data: install
	@for p in $(LEROBOT) $(TFDS); do [ -x $$p ] || { echo "$$p is missing: run make peers." >&2; exit 1; }; done
	-$(BIN)/python benchmarks/data_loader.py --lerobot=$(LEROBOT)
	-$(BIN)/python benchmarks/data_convert.py --lerobot=$(LEROBOT)
	-$(BIN)/python benchmarks/data_scale.py
	-$(BIN)/python benchmarks/rlds_steps.py --tfds=$(TFDS)
	@$(BIN)/python tools/bench_page.py && echo "reports/benchmarks/data.md written"

bench-policies: install
	@[ -x $(LEROBOT) ] || { echo "$(LEROBOT) is missing: run make peers." >&2; exit 1; }
	-$(BIN)/python benchmarks/policies.py --lerobot=$(LEROBOT)
	@$(BIN)/python tools/bench_page.py && echo "reports/benchmarks/policies.md written"

test: install
	@mkdir -p outputs/tests
	$(BIN)/python -m pytest tests --junitxml=outputs/tests/junit.xml
	$(BIN)/nbdev-test --n-workers 2 --skip-file-re '$(DRAWING)'
	@for n in $$(ls nbs/*/*.ipynb | grep -E '/$(DRAWING)'); do $(BIN)/nbdev-test $$n || exit 1; done   # a renderer belongs to one thread

parity: install
	@$(BIN)/python tools/parity.py

equality: install
	@$(BIN)/python tools/equality.py

readme: install
	@$(BIN)/python tools/readme.py

notebooks: install
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

lab: install
	@$(BIN)/jupyter lab nbs

clean:
	rm -rf build dist _proc .pytest_cache *.egg-info
	find nbs tests vla_nb tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
	@echo "kept: $(VENV), data, outputs, reports"
