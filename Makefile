# `make help` lists what can be made.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
LLADA := $(BIN)/python -m llada_lightning
JOBS ?= 2
# One more than the two cores: a test often waits for the processes that it has started.
WORKERS ?= 3
GPU_JOBS ?= 8
FIGURES ?= runs/benchmarks
SOURCE ?= data/books.jsonl.xz
TABLES ?= runs/study
STUDY2 := tune-arm tune-arm-long tune-llada tune-easy tune-block4 tune-block16 tune-uniform rules-arm rules-llada \
  arm-5e9 arm-2e10 arm-8e10 arm-3e11 llada easy block4 block16 uniform seeds-easy seeds few-arm few-llada few
STUDY2_MORE := largest warmup few-long

.PHONY: help setup setup-dev docs docs-serve quickstart study2-cpu study2-cpu-more study2-gpu study-cpu study-gpu study-report study2-report paper-rehearsal test test-lowest test-slow lint format notebooks bench bench-gpu gpu-check clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}' | sed 's|[$$](TABLES)|$(TABLES)|'

setup: $(VENV)/.ready  ## the package and what it needs, in .venv, pinned by constraints.txt

setup-dev: $(VENV)/.ready-dev  ## the same and what tests, notebooks and benchmarks need

# uv installs several times as fast as pip, which brings it where it is not at hand. UV=false leaves all to pip.
UV ?= $(or $(shell command -v uv 2>/dev/null),$(BIN)/uv)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet --constraint $(CONSTRAINTS)
# Where Python may not write bytecode, each start would compile it again: then it is compiled at once, as pip does.
UV_INSTALL := $(UV) pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) \
  $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
TORCH := "$(shell sed -n 's/^ *"\(torch[<>=][^"]*\)",$$/\1/p' pyproject.toml)"
TORCH_BACKEND ?= auto

# uv does not read pip's settings. So pip installs all where they replace the index, or where uv fails.
# litdata asks for torchvision, whose build on PyPI wants CUDA: beside a CPU build of torch it breaks
# `import lightning`, and nothing here uses it.
define install
	@{ ! $(PIP) config list | grep -E '[.](no-index|index-url)=' >/dev/null && $(UV_INSTALL) --editable "$(1)"; } \
	  || $(PIP_INSTALL) --editable "$(1)"
	@$(BIN)/python -c "import torchvision" 2>/dev/null || { \
	  echo "torchvision is taken out again, as expected: litdata brings it in, this build of torch has no use for it, and nothing here needs it. No harm is done."; \
	  $(PIP) uninstall --quiet --yes torchvision; }
	$(BIN)/python -c "import lightning"
	@touch $@
endef

# The build of torch is pip's choice where pip's settings name an index or wheels: they were made for this machine.
# Else uv takes the build for the driver of the GPU, or for none. Where both fail, it is what PyPI has.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("error: $(PYTHON) is older than Python 3.10; name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@command -v $(UV) >/dev/null || $(PIP_INSTALL) uv || true
	@$(PIP) config list | grep -E 'index|find-links' >/dev/null || $(UV_INSTALL) --torch-backend $(TORCH_BACKEND) $(TORCH) || true
	$(PIP_INSTALL) --no-deps $(TORCH)
	$(call install,.)
	@$(BIN)/python -c "import torch; print('torch', torch.__version__)"

$(VENV)/.ready-dev: $(VENV)/.ready
	$(call install,.[dev])

$(VENV)/.ready-docs: $(VENV)/.ready
	$(call install,.[docs])

# The theme would print on every build how long it is going to be kept.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(VENV)/.ready-docs  ## the site of docs/ and of the docstrings: site/index.html
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.ready-docs  ## the same on this machine at port 8000, anew whenever a page changes
	$(BIN)/python -m mkdocs serve

quickstart: setup  ## the compute multiplier of two recipes of llada, at toy size: runs/quickstart/report.html
	$(LLADA) prepare --source python-stdlib --out data/quickstart --vocab-size 512 --val-fraction 0.1
	$(LLADA) sweep run quickstart --jobs $(JOBS)
	$(LLADA) collect runs/quickstart --out runs/quickstart/results.csv
	$(LLADA) curves runs/quickstart/results.csv --convention total --out runs/quickstart
	$(LLADA) report runs/quickstart/results.csv --convention total

# The second study. Its runs are alike on all processors but for rounding; one thread a run makes it the same everywhere.
study2-cpu study2-cpu-more study2-gpu: export OMP_NUM_THREADS = 1

# Of other sources `llada prepare` says itself what is wrong with them.
source_is_there = @test "$(SOURCE)" != data/books.jsonl.xz -o -e "$(SOURCE)" \
  || { echo "error: '$(SOURCE)' is not there; name the books: make $@ SOURCE=books.jsonl.xz" >&2; exit 2; }

study2-cpu: setup  ## the second study from nothing (SOURCE=books.jsonl.xz; two idle cores: 3 h 40 min): runs/study2/report.md
	$(source_is_there)
	$(LLADA) prepare --source $(SOURCE) --out data/study2 --vocab-size 512 --val-fraction 0.15
	$(call study2_sweeps,$(STUDY2))
	$(BIN)/python experiments/study2/policies.py runs/study2-cpu --jobs $(JOBS)
	$(study2_page)

study2-cpu-more: setup  ## after it, what reviewers asked for (two idle cores: 35 minutes): the same page
	@test -e data/study2 || { echo "error: data/study2 is not there; begin with make study2-cpu" >&2; exit 2; }
	$(call study2_sweeps,$(STUDY2_MORE))
	$(study2_page)

study2_sweeps = for sweep in $(1); do $(LLADA) sweep run sweeps/study2-cpu-$$sweep.yaml --jobs $(JOBS) || exit; done

define study2_page
	for runs in runs/study2-cpu-*; do $(LLADA) collect $$runs --out runs/study2/$${runs#runs/study2-cpu-}.csv || exit; done
	$(LLADA) collect runs/study2-cpu --out runs/study2/results.csv
	cp experiments/study2/cpu/forecast.json runs/study2/
	$(LLADA) curves runs/study2/results.csv --convention total --out runs/study2
	$(BIN)/python experiments/study2/report.py runs/study2 --out runs/study2/report.md
endef

study2-gpu: setup  ## the second study on one GPU (SOURCE=books.jsonl.xz), in parts of any length: runs/study2-gpu/report.html
	$(source_is_there)
	$(LLADA) prepare --source $(SOURCE) --out data/study2-gpu --vocab-size 258 --val-fraction 0.15
	LLADA="$(LLADA)" JOBS=$(GPU_JOBS) experiments/study2/gpu.sh

# Sweeps of the first study, one after the other: what is done is skipped, and a signal stops the whole.
sweeps = $(foreach sweep,$(2),$(LLADA) sweep run sweeps/study-$(1)-$(sweep).yaml --jobs $(3) &&) true

study-cpu: setup  ## the study's small twin from nothing (SOURCE=books.jsonl.xz; two cores: three and a half hours): $(TABLES)/report.md
	$(source_is_there)
	$(LLADA) prepare --source $(SOURCE) --out data/study --vocab-size 512 --val-fraction 0.15
	$(call sweeps,cpu,tune-arm tune-llada arm-least arm-low arm llada seeds repeats ablations short,$(JOBS))
	$(LLADA) collect runs/study-cpu --out $(TABLES)/cpu/results.csv
	for table in tune seeds repeats iid lengths; do \
	  $(LLADA) collect runs/study-cpu-$$table --out $(TABLES)/cpu/$$table.csv || exit; done
	$(LLADA) collect runs/study-cpu runs/study-cpu-short --out $(TABLES)/cpu/short.csv
	$(BIN)/python experiments/study/histories.py runs/study-cpu $(TABLES)/cpu/history.csv
	$(BIN)/python experiments/study/histories.py runs/study-cpu-repeats $(TABLES)/cpu/repeats-history.csv
	$(BIN)/python experiments/study/variance.py runs/study-cpu/llada-107k-* data/study $(TABLES)/cpu/variance.json
	$(LLADA) curves $(TABLES)/cpu/results.csv --out $(TABLES)/cpu
	$(BIN)/python experiments/study/report.py --cpu $(TABLES)/cpu --out $(TABLES)/report.md

study-gpu: setup  ## the large study on one GPU (SOURCE=books.jsonl.xz; an H100: about a quarter of an hour): $(TABLES)/report.md
	$(source_is_there)
	$(LLADA) prepare --source $(SOURCE) --out data/study-gpu --vocab-size 4096 --val-fraction 0.15
	$(call sweeps,gpu,tune-arm tune-llada arm-least arm-between arm llada seeds,$(GPU_JOBS))
	$(LLADA) collect runs/study-gpu --out $(TABLES)/gpu/results.csv
	for table in tune seeds; do $(LLADA) collect runs/study-gpu-$$table --out $(TABLES)/gpu/$$table.csv || exit; done
	$(BIN)/python experiments/study/histories.py runs/study-gpu $(TABLES)/gpu/history.csv
	$(LLADA) curves $(TABLES)/gpu/results.csv --out $(TABLES)/gpu
	$(BIN)/python experiments/study/report.py --gpu $(TABLES)/gpu --out $(TABLES)/report.md

paper-rehearsal: setup-dev  ## the paper's scalability study at a toy size, killed once and resumed: runs/paper-rehearsal/paper.png
	PATH="$(abspath $(BIN)):$$PATH" experiments/paper/rehearsal/run.sh

study-report: setup  ## docs/study.md, its figures and fits from the committed tables of both studies
	for study in cpu gpu; do \
	  $(LLADA) curves experiments/study/$$study/results.csv --out experiments/study/$$study || exit; done
	$(BIN)/python experiments/study/report.py

study2-report: setup  ## docs/study2.md, its figures and fits from the committed tables of the second study
	$(LLADA) curves experiments/study2/cpu/results.csv --convention total --out experiments/study2/cpu
	$(BIN)/python experiments/study2/report.py

test: setup-dev  ## lint, types and tests
	$(MAKE) lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Where neither pip's settings nor uv lead to a CPU build of the lowest torch, this downloads that for CUDA: 5 GB.
test-lowest:  ## the tests with the lowest supported versions of the dependencies, in .venv-lowest
	$(MAKE) setup-dev VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: setup-dev  ## the tests that take minutes: kills, soaks, coverage of the fits' intervals in full
	$(BIN)/python -m pytest -m slow

lint: setup-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: setup-dev  ## run the notebooks: text and tables stay in them, figures in notebooks/rendered/
	$(BIN)/python notebooks/render.py

bench: setup-dev  ## speed and size on this machine's CPU, each a ratio in one run: runs/benchmarks/*.json and tables
	$(BIN)/python benchmarks/train_speed.py --preset cpu --json $(FIGURES)/train_speed.json
	$(BIN)/python benchmarks/growth.py --device cpu --repeats 1 --json $(FIGURES)/growth.json
	$(BIN)/python benchmarks/long_run.py --json $(FIGURES)/long_run.json
	$(BIN)/python benchmarks/start_cost.py --repeats 1 --json $(FIGURES)/start_cost.json
	$(BIN)/python benchmarks/sweep_speed.py --json $(FIGURES)/sweep_speed.json
	$(BIN)/python benchmarks/curves_overlay.py --objectives llada --steps 200 --out $(FIGURES)
	$(BIN)/python benchmarks/fit_overhead.py --json $(FIGURES)/fit_overhead.json
	$(BIN)/python benchmarks/stream_speed.py --json $(FIGURES)/stream_speed.json
	$(BIN)/python benchmarks/prepare_speed.py --json $(FIGURES)/prepare_speed.json
	$(BIN)/python benchmarks/fit_speed.py --json $(FIGURES)/fit_speed.json
	$(BIN)/python benchmarks/sampler_speed.py --json $(FIGURES)/sampler_speed.json
	$(BIN)/python benchmarks/scoring_speed.py --device cpu --json $(FIGURES)/scoring_speed.json
	$(BIN)/python benchmarks/policy_speed.py --device cpu --json $(FIGURES)/policy_speed.json
	$(BIN)/python benchmarks/objective_speed.py --device cpu --json $(FIGURES)/objective_speed.json
	$(BIN)/python benchmarks/level_cost.py --device cpu --json $(FIGURES)/level_cost.json

bench-gpu: setup-dev  ## the training step on this machine's GPU; without one tiny sizes, and its figures marked as missing
	$(BIN)/python benchmarks/train_speed.py --preset h200 --json $(FIGURES)/train_speed_gpu.json
	$(BIN)/python benchmarks/growth.py --device cuda --repeats 1 --json $(FIGURES)/growth_gpu.json

# A machine with a GPU often has torch and no network: without an environment of ours, its own Python is taken.
gpu-check:  ## all that only a GPU can show, in eight minutes (WHEELS=DIR: of what it lacks): runs/benchmarks/gpu_check.md
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) --out $(FIGURES)

clean:  ## remove the environment and caches; data and runs stay
	rm -rf $(VENV) .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis
