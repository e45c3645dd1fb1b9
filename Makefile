# make demo [SOURCE=stamps] | make demo-tasks [SOURCE=stamps] | make test | make faults [TRIES=8] | make fuzz | make compiled | make lint; .venv is set up first; safe to repeat
SOURCE ?= shapes
PYTHON ?= python3
TRIES ?= 24
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); [ $$n -gt 0 ] && echo $$n || echo 2)
DEMO_CONFIG := $(if $(filter shapes,$(SOURCE)),demo,demo_$(SOURCE))
DEMO_DIR := $(if $(filter shapes,$(SOURCE)),runs/demo,runs/demo-$(SOURCE))

.PHONY: install demo demo-tasks test faults fuzz compiled lint clean
install: $(VENV)/.installed

# torch first and pinned: a looser requirement may pull another build of several GB
$(VENV)/.installed: setup.py constraints.txt constraints_demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 is needed; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); } || { \
	  echo "$(PYTHON) cannot make a virtual environment; run: sudo apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,stamps]'
	$(BIN)/python -m pip install -q --no-deps -r constraints_demo.txt
	@touch $@

demo: install
	@case "$(SOURCE)" in shapes|stamps) ;; *) echo "SOURCE is $(SOURCE); choose shapes or stamps"; exit 1;; esac
	$(BIN)/deepspeed --num_gpus $(RANKS) mvptr_ds/train.py --deepspeed ds_configs/z2.json --config $(DEMO_CONFIG) train.resume=never
	$(BIN)/python mvptr_ds/eval.py $(DEMO_DIR)

# after a demo: four tasks, fine-tuned from scratch and from what the demo has learnt
demo-tasks: install
	$(BIN)/python tools/demo_tasks.py --demo $(DEMO_DIR)

# two files at a time, each with one thread: those that start ranks or a cluster wait most of the time
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# kills, hangs and poisons ranks at random instants and compares what runs come to with undisturbed ones; then, as root with
# Debian's SLURM, a node that dies, a preemption and a resume on fewer nodes. The limit: four ranks on two cores are slow
faults: install
	$(BIN)/python tools/dev/faults.py --tries $(TRIES) --ranks 2 --out runs/faults
	$(BIN)/python tools/dev/faults.py --tries $$(( ($(TRIES) + 1) / 2 )) --ranks 4 --limit 60 --out runs/faults-of-4
	$(BIN)/python -m pytest tests/slurm -m faults

# 100,000 damaged tars, records, features and pictures: each is read or refused, nothing else
fuzz: install
	$(BIN)/python -m tests.fuzz --inputs 100000

# every Triton kernel for A100 and H100, which need not be there: registers, spills and loads
compiled: install
	$(BIN)/python -m pytest -m compiled tests/unit/test_compile_kernels.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) runs .cache build *.egg-info
