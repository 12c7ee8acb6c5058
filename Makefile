# Targets build the environment they need by themselves; see tools/bootstrap.py.
PROFILE ?= demo
MODELS ?=
NOTEBOOKS ?=
WEIGHTS ?=
STACK ?=
DEVICES ?=
SERVER ?=
ALSO ?=
FROM ?=
OUT ?=
A ?=
B ?=
GPU_HOUR_USD ?=
KWH_USD ?=
FORCE ?=
WAIT ?=
TIMEOUT ?=
PYTHON ?=
ARGS ?=
MODEL ?=
GPU ?=
GPU_GB ?=
DTYPE ?=
BANDWIDTH_GB_S ?=
CONTEXT ?=
USERS ?=
TTFT_MS ?=
ITL_MS ?=
CSV ?=
STUDY ?=
WITH ?=
JOBS ?=
FORMAT ?=
ENGINE ?=
IMAGE ?=
EFFECT ?=
ROUNDS ?=
CALLS ?=
NEW_TOKENS ?=
KILLS ?= 50
SEED ?= 0

# What a variable holds is text: neither make nor the shell evaluates it. $(value X) is the text as
# it was given, and what make does not export it does not expand.
override VARIABLES := PROFILE MODELS NOTEBOOKS WEIGHTS STACK FROM OUT A B GPU_HOUR_USD KWH_USD FORCE WAIT \
    TIMEOUT PYTHON ARGS MODEL GPU_GB DTYPE BANDWIDTH_GB_S CONTEXT USERS TTFT_MS ITL_MS CSV STUDY \
    WITH KILLS SEED SERVER ALSO DEVICES EFFECT ROUNDS CALLS NEW_TOKENS GPU JOBS FORMAT ENGINE IMAGE
unexport $(VARIABLES)
define newline


endef
open := (
close := )
hash := \#
raw = $(subst $(newline), ,$(value $(1)))
# $(call text,X): the value of X as one argument. $(call option,--x,X): the same after an option.
text = "$(subst `,\`,$(subst $$,\$$,$(subst ",\",$(subst \,\\,$(raw)))))"
option = $(if $(value $(2)),$(1) $(text_of))
text_of = $(call text,$(2))
# $(call items,X): the words of X, quotes kept, all else that a shell acts on taken as text.
escaped = $(subst $(1),\$(1),$(2))
items = $(call escaped,$(hash),$(call escaped,[,$(call escaped,?,$(call escaped,*,$(call \
    escaped,$(close),$(call escaped,$(open),$(call escaped,>,$(call escaped,<,$(call \
    escaped,|,$(call escaped,&,$(call escaped,;,$(call escaped,`,$(call escaped,$$,$(call \
    escaped,\,$(raw)))))))))))))))
# $(call flag,--x,X): the option where X is not one of the words for no.
NO := 0 n N no No NO f F false False FALSE off Off OFF
flag = $(if $(filter-out $(NO),$(value $(2))),$(1) $(text_of))
# What to run and how: of report and jobs.
run_options = $(call option,--profile,PROFILE) $(call option,--models,MODELS) \
    $(call option,--notebooks,NOTEBOOKS) $(call option,--weights,WEIGHTS) \
    $(call option,--stack,STACK) $(call option,--dtype,DTYPE) $(call option,--devices,DEVICES) \
    $(call option,--server,SERVER) $(call option,--also,ALSO) $(call option,--timeout,TIMEOUT) \
    $(call flag,--wait,WAIT) \
    $(call flag,--force,FORCE)
# Which of the variables came with the command: those that a verb does not take are refused.
override given := $(foreach name,$(.VARIABLES),$(if \
    $(filter command,$(firstword $(origin $(name)))),$(name)))
# Those of other names are text as well: make would evaluate them for a recipe's environment.
$(foreach name,$(filter-out $(VARIABLES),$(given)),$(eval \
    override $(name) := $$(value $(name)))$(eval export $(name)))

# lib is importable in every environment and every notebook kernel, installed or not.
export PYTHONPATH := $(CURDIR)$(if $(value PYTHONPATH),:$(value PYTHONPATH))

.DEFAULT_GOAL := help
.PHONY: help setup report jobs merge compare versus bundle export fit plan score audit clients serve-check vllm test kill-tests mutants sweep lab lint lock clean

# $(call find,PURPOSE): the shell variable py is the interpreter for report, lab or test.
# Any Python from 3.8 on can look for it; one of 3.11 or newer does the work.
define find
py=$$(for p in python3 python3.13 python3.12 python3.11 python3.14 python $(call text,PYTHON); do \
    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1; then \
        exec "$$p" tools/bootstrap.py $(1) --python $(call text,PYTHON); fi; done; \
    echo "set-up: Python 3.11 or newer is needed and none was found on PATH. Install one (Debian:" >&2; \
    echo "apt-get install python3 python3-venv) or name one with PYTHON=path." >&2; exit 1) || exit $$?; \
$(if $(filter report,$(1)),export WORKBOOK_GIVEN="$(strip $(given))";)
endef

help:  ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PROFILE=demo|gpu|paper   what to measure (demo needs no GPU and no network)"
	@echo "  MODELS= NOTEBOOKS=       a slice of it, comma-separated; slices add up"
	@echo "  WEIGHTS= STACK=          random, checkpoint or gguf; the decode stack"
	@echo "  ALSO=                    PROFILE=gpu: graph-compiled (two minutes more), vllm (three)"
	@echo "  DEVICES=                 GPUs that share a model (STACK=vllm); make plan: how many there are"
	@echo "  SERVER=url               NOTEBOOKS=serving: load a server that runs; without it one is started"
	@echo "  FROM=folder              make report: rebuild from these records, measure nothing; make bundle, versus"
	@echo "  OUT=folder               make report, merge, compare, versus, bundle (a .zip): write here"
	@echo "  GPU_HOUR_USD= KWH_USD=   make report: prices; shows what tokens, requests and energy cost"
	@echo "  FORCE=1                  make report: measure finished jobs again, and drop what is not"
	@echo "  WAIT=1 TIMEOUT=seconds   make report: wait for a GPU in use; limit of one notebook"
	@echo "  JOBS=2                   make report: on so many GPUs of this host at once (default: one after another)"
	@echo "  FORMAT=sbatch|k8s|skypilot ENGINE=slurm GPU=kind IMAGE=name   make jobs: docs/clusters.md"
	@echo "  PYTHON=path              use this interpreter (default: the active one if it will do, else .venv)"
	@echo "  MODEL= GPU_GB=           make fit: hub id, folder or entry of params/models.yaml; GB are 10^9"
	@echo "  DTYPE=                   make report: of the weights; make fit: only these (bfloat16, mxfp4, 4-bit ...)"
	@echo "  CONTEXT=                 make fit: only these contexts"
	@echo "  BANDWIDTH_GB_S=          make fit: the memory's bandwidth, for the decode limit in tok/s"
	@echo "  USERS= TTFT_MS= ITL_MS=  make plan: users at once, limits on the first token and between tokens"
	@echo "  A= B=                    make compare: result folders; make versus: an interpreter or a folder of packages"
	@echo "  ROUNDS= CALLS=           make versus: of four blocks A B B A (3); of each arm in a block (8)"
	@echo "  NEW_TOKENS= EFFECT=      make versus: of a whole call (64); the difference that matters, in per cent (5)"
	@echo "  GPU=                     make plan, fit: a card of params/gpus.yaml (H200, L4), also one not measured"
	@echo "  STUDY=file               make report, audit: a study of params/published/ (default: arxiv-2508.16700)"
	@echo "  CSV=folder               make audit: the study's released CSV files, to compare its facts with"
	@echo "  ARGS=                    passed on to pytest (make test), JupyterLab (make lab), make fit (--json), audit, bundle, mutants"

setup:  ## prepare the environment the other targets use, and say which it is
	@$(call find,lab) :

report:  ## run the notebooks of PROFILE and build outputs/PROFILE/report.html
	@$(call find,report) exec "$$py" -m lib report \
	    $(if $(value FROM),$(call option,--from,FROM),$(run_options) \
	    $(call option,--jobs,JOBS)) $(call option,--out,OUT) \
	    $(call option,--gpu-hour-usd,GPU_HOUR_USD) $(call option,--kwh-usd,KWH_USD) \
	    $(call option,--study,STUDY)

jobs:  ## print files that run PROFILE on a cluster, FORMAT=sbatch|k8s|skypilot; then make merge
	@$(call find,report) exec "$$py" -m lib jobs $(run_options) $(call option,--out,OUT) \
	    $(call option,--format,FORMAT) $(call option,--engine,ENGINE) $(call option,--gpu,GPU) \
	    $(call option,--image,IMAGE) $(if $(value ARGS),-- $(call items,ARGS))

merge:  ## add the slices of result folders up, or those of make jobs: FROM="outputs/a outputs/b" OUT=outputs/c
	@$(call find,report) exec "$$py" -m lib merge $(call items,FROM) $(call option,--out,OUT)

compare:  ## ratios with intervals between two result sets: A=outputs/x B=outputs/y
	@$(call find,report) exec "$$py" -m lib compare $(if $(value A),$(call text,A)) \
	    $(if $(value B),$(call text,B)) $(call option,--out,OUT)

versus:  ## the same calls under two environments, A B B A: is B slower, and why? A=python3 B=folder MODEL=
	@$(call find,report) exec "$$py" -m lib versus $(if $(value FROM),$(call option,--from,FROM),$(if \
	    $(value A),$(call text,A)) $(if $(value B),$(call text,B)) $(call option,--model,MODEL) \
	    $(call option,--weights,WEIGHTS) $(call option,--dtype,DTYPE) \
	    $(call option,--context,CONTEXT) $(call option,--new-tokens,NEW_TOKENS) \
	    $(call option,--calls,CALLS) $(call option,--rounds,ROUNDS) $(call option,--effect,EFFECT) \
	    $(call option,--timeout,TIMEOUT) $(call option,--out,OUT) $(call items,ARGS))

bundle:  ## a zip of the report and all it rests on, to send: FROM=outputs/x (default outputs/PROFILE)
	@$(call find,report) exec "$$py" -m lib bundle \
	    $(if $(value FROM),$(call text,FROM),outputs/$(call text,PROFILE)) \
	    $(call option,--out,OUT) $(call items,ARGS)

export:  ## every number as CSV and Parquet with a data dictionary: FROM=outputs/x OUT=folder
	@$(call find,report) exec "$$py" -m lib export $(if $(value FROM),$(call text,FROM)) \
	    $(call option,--out,OUT)

fit:  ## will MODEL fit a GPU, or GPU_GB? largest context, users, decode limit; needs no GPU
	@$(call find,report) exec "$$py" -m lib fit $(call option,--model,MODEL) \
	    $(call option,--gpu,GPU) $(call option,--gpu-gb,GPU_GB) $(call option,--dtype,DTYPE) \
	    $(call option,--bandwidth-gb-s,BANDWIDTH_GB_S) \
	    $(call option,--context,CONTEXT) $(call items,ARGS)

plan:  ## which model on which stack serves USERS of CONTEXT tokens within TTFT_MS and ITL_MS on GPU_GB?
	@$(call find,report) exec "$$py" -m lib plan $(if $(value FROM),$(call text,FROM)) \
	    $(call option,--gpu,GPU) $(call option,--gpu-gb,GPU_GB) $(call option,--context,CONTEXT) \
	    $(call option,--users,USERS) $(call option,--ttft-ms,TTFT_MS) \
	    $(call option,--itl-ms,ITL_MS) $(call option,--gpu-hour-usd,GPU_HOUR_USD) \
	    $(call option,--devices,DEVICES)

score:  ## registered predictions against what was measured since: FROM="outputs/x outputs/y" (default: released)
	@$(call find,report) exec "$$py" -m lib score $(call items,FROM) $(call option,--out,OUT)

audit:  ## check a published study against its own data; CSV=folder compares its released files
	@$(call find,report) exec "$$py" -m lib audit $(call option,--study,STUDY) \
	    $(call option,--csv,CSV) $(call items,ARGS)

clients:  ## score load generators against a server that knows the truth (their own environments)
	@$(call find,report) exec "$$py" -m lib.measure.serving.clients \
	    --out $(if $(value OUT),$(call text,OUT),outputs/clients/truth-table.json) $(call items,ARGS)

serve-check:  ## load a small trained model behind transformers serve
	@$(MAKE) --no-print-directory report NOTEBOOKS=serving MODELS=SmolLM2-135M-Instruct \
	    OUT=$(if $(value OUT),$(call text,OUT),outputs/serve-check)

vllm: .venv-vllm/.done  ## vLLM in an environment of its own (several GB; Linux, NVIDIA, Python 3.12)

.venv-vllm/.done: requirements-vllm.lock
	@$(if $(value PYTHON),$(call text,PYTHON),python3.12) -m venv .venv-vllm && .venv-vllm/bin/python -m pip install -q \
	    --require-hashes --no-deps -r $< && touch $@

test:  ## run the tests (browser tests need Chromium; CHROMIUM= names one)
	@$(call find,test) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec "$$py" -m pytest \
	    -n auto --maxprocesses 4 --dist loadfile $(call items,ARGS)

kill-tests:  ## 50 whole runs killed at random times, against the undisturbed one (KILLS= SEED=)
	@$(call find,test) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 KILLS=$(call text,KILLS) SEED=$(call text,SEED) \
	    exec "$$py" -m pytest \
	    tests/run/test_kills.py tests/run/test_settle.py $(call items,ARGS)

mutants:  ## how many small faults in the arithmetic its tests see (half an hour; ARGS=--help)
	@$(call find,test) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec nice -n 19 "$$py" tools/mutants.py \
	    $(call items,ARGS)

sweep:  ## every model type of the installed transformers, tiny: writes docs/models.md (ten minutes)
	@$(call find,test) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 exec nice -n 10 "$$py" tools/sweep.py \
	    $(if $(findstring --types,$(value ARGS)),,--out docs) $(call items,ARGS)

lab:  ## open JupyterLab on your own copies of the notebooks, in outputs/lab; start.ipynb comes first
	@mkdir -p outputs/lab && for path in notebooks/*.ipynb; do \
	    [ -e "outputs/lab/$${path##*/}" ] || cp "$$path" outputs/lab/; done
	@echo "lab: outputs/lab holds copies of the notebooks; delete one to have it anew"
	@$(call find,lab) PYTHONWARNINGS="$${PYTHONWARNINGS:-ignore:IProgress not found}" \
	    exec "$$py" -m jupyterlab --ServerApp.root_dir="$(CURDIR)" \
	    --LabApp.default_url=/lab/tree/outputs/lab/start.ipynb $(call items,ARGS)

lint:  ## check the style of code and notebooks with ruff
	@$(call find,test) "$$py" -m ruff check . && "$$py" -m ruff format --check .

lock:  ## resolve the locks anew, with their hashes (WITH='torch==2.13.0' holds versions)
	@$(if $(value PYTHON),$(call text,PYTHON),python3) tools/lock.py --with $(call items,WITH)

clean:  ## delete caches, partial files and what can be rebuilt in minutes; measurements stay
	@rm -rf outputs/demo outputs/rebuilt .pytest_cache .ruff_cache build dist *.egg-info
	@find . -path ./.git -prune -o -path './.venv*' -prune -o \
	    \( -name __pycache__ -o -name .ipynb_checkpoints -o -name '*.partial*' \) \
	    -prune -exec rm -rf {} +
