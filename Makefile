# Two commands set everything up on a machine that has Python 3.10 or newer: `make demo` and
# `make test`. Each makes .venv where it is missing and installs into it what is not there yet, so
# the second time is quick. To make .venv with another Python: make demo PYTHON=python3.12

PYTHON  ?= python3
VENV    := .venv/bin/python
RUNTIME := .venv/requirements.installed
DEV     := .venv/requirements-dev.installed
EXTRA   := .venv/requirements-extra.installed
MODERN  := -c 'import sys; sys.exit(sys.version_info < (3, 10))'

.PHONY: help demo app test test-slow lint bench setup setup-dev
.NOTPARALLEL:      # two installations into one .venv get in each other's way
.DELETE_ON_ERROR:  # what was made by half is made anew next time

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME)  ## train on the shipped digits, sample from the result, plot the loss
	@rm -rf checkpoints/demo samples/demo samples/samples_demo_*
	$(VENV) diffuser.py --mode train --dataset digits --experiment_name demo
	$(VENV) diffuser.py --mode inference --experiment_name demo --yes --num_images 100 --save_dir samples/demo
	$(VENV) plot_loss.py --no-show samples/samples_demo_*
	@echo && \
	echo "Samples drawn in training:  $$(ls -d samples/samples_demo_*)/" && \
	echo "Samples of the result:      samples/demo/grid.png" && \
	echo "Loss:                       $$(ls -d samples/samples_demo_*)/loss.png" && \
	echo "All of it on one page:      $$(ls -d samples/samples_demo_*)/report.html"

app: $(RUNTIME) $(EXTRA)  ## draw, edit and train in a browser
	$(VENV) app.py --open

test: lint  ## run the linter and the fast tests
	OMP_NUM_THREADS=1 $(VENV) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(DEV)  ## run the tests that take minutes
	$(VENV) -m pytest -m slow

lint: $(DEV)  ## run the linter
	$(VENV) -m ruff check .

bench: $(DEV)  ## image quality on the digits and speed on MNIST-sized images, beside other programs
	$(VENV) benchmarks/quality.py --dataset digits --minutes 1
	$(VENV) benchmarks/speed.py --rounds 1

setup: $(RUNTIME)  ## only install what the programs need

setup-dev: $(DEV)  ## only install what the tests need as well

# .venv/NAME.installed is newer than NAME.txt as long as the packages listed there are installed.

.venv/%.installed: %.txt requirements.txt $(VENV)
	@$(VENV) $(MODERN) || { \
	  echo ".venv holds a Python older than 3.10: delete the folder .venv and try again" >&2; exit 1; }
	@$(VENV) -m pip --version >/dev/null 2>&1 || $(VENV) -m ensurepip
	$(VENV) -m pip install -r $<
	@touch $(RUNTIME) $@

$(VENV):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "$(PYTHON) not found: install Python 3.10 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" $(MODERN) || { \
	  echo "$(PYTHON) is not Python 3.10 or newer: install one, or name one: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear .venv
