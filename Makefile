# make demo        the models that ship answer, then a LoRA trains and answers beside them
# make clean-demo  delete the demo's run and answers
# make install     the virtual environment; targets that need it make it first
# make test        lint and tests
# make gpu         the tests that compute on a GPU; DEVICE=cpu make gpu: the same without one
# make gpu-tree    out/gpu-tree: the last commit for a machine with a GPU, less than 64 MiB
# make elsewhere   other tools on our folders, in a virtual environment of their own
# make stress      kill training runs at random moments, continue and compare them; README's commands
# make study       all runs of evaluation/study/study.toml without a result, then the report
# make report      tables and figures of README, REPORT and TABLES, from committed results
# make page        all saved answers side by side: evaluation/model_outputs/index.html
# make bench       speed and memory beside MiniMind's step, transformers and PEFT
# BENCH="--sizes xs --turns 1 --output quick.json" make bench   flags of evaluation/bench/bench.py
# STUDY="--jobs 2 --only 'xs-*'" make study  flags of evaluation/study/run.py
# PYTHON=python3.12 make ...   another interpreter than python3 for the virtual environment

PYTHON ?= python3
DEVICE ?= cuda
VENV := .venv
RUN := $(VENV)/bin/python
ELSEWHERE := .venv-elsewhere

.PHONY: demo test gpu gpu-tree elsewhere report study stress bench page install clean-demo

# Touched after an installation that succeeded; a change of the requirements installs again.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

install: $(VENV)/installed

# One process a core, each with one thread; a file's tests stay together, they share fixtures.
test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 DEVICE=cpu $(RUN) -m pytest -m "not elsewhere" \
		--numprocesses logical --maxprocesses 8 --dist loadfile

# On CUDA only deterministic kernels make runs bitwise equal; cuBLAS needs CUBLAS_WORKSPACE_CONFIG.
gpu: install
	CUBLAS_WORKSPACE_CONFIG=:4096:8 DEVICE=$(DEVICE) $(RUN) -m pytest -m gpu

# Without what neither the GPU's tests nor the benchmark read: the bases of 1.3M and 5.5M of the
# study, its likelihoods and tests, the saved answers and the shipped models.
gpu-tree:
	rm -rf out/gpu-tree
	mkdir -p out/gpu-tree
	git archive HEAD -- . ':!evaluation/study/bases/s-*' ':!evaluation/study/bases/xs-*' \
		':!evaluation/study/nll.parquet' ':!tests/study' \
		':!evaluation/model_outputs' ':!model/trained' \
		| tar -x -C out/gpu-tree
	du -sh --apparent-size out/gpu-tree

# Apart from $(VENV), so that no version there changes.
$(ELSEWHERE)/installed: requirements.txt requirements-dev.txt requirements-elsewhere.txt
	$(PYTHON) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/pip install --quiet --upgrade pip
	$(ELSEWHERE)/bin/pip install --quiet -r requirements-elsewhere.txt
	touch $@

elsewhere: $(ELSEWHERE)/installed
	OMP_NUM_THREADS=1 $(ELSEWHERE)/bin/python -m pytest -m elsewhere tests/elsewhere

# One thread a process: the models are too small for more.
stress: install
	OMP_NUM_THREADS=1 $(RUN) tests/trainer/stress_resume.py
	$(RUN) tests/run_readme.py

study: install
	$(RUN) evaluation/study/run.py $(STUDY)
	$(RUN) evaluation/study/report.py

bench: install
	$(RUN) evaluation/bench/bench.py $(BENCH)

report: install
	$(RUN) evaluation/study/report.py

page: install
	$(RUN) evaluation/page/build.py

# ---------------------------------------------------------------- the demo
# The models that ship answer; a LoRA trains for 800 steps; all answer prompts of the tuning half.
WORLD := dataset/data/world
DEMO_MODELS := $(addprefix model/trained/1.3M-,lora-original lora-all-layers-r64 full-fine-tuning)

demo: install
	$(RUN) eval_llm.py
	$(RUN) trainer/train_lora.py --lora_name demo_lora --overwrite --max_steps 800 --lora_rank 64 \
		--learning_rate 3e-3 --show_answers 0
	head -qn 100 $(WORLD)/probe_combinations_tune.jsonl > out/demo_prompts.jsonl
	$(RUN) eval_llm.py $(DEMO_MODELS:%=--model %) --model out/demo_lora --decoding greedy \
		--prompts out/demo_prompts.jsonl --output_dir out/demo
	@echo "Next: .venv/bin/python eval_llm.py --no_template   (the same models, asked another way)"
	@echo "      .venv/bin/python trainer/train_lora.py --help, and WORKFLOW.md for every stage"

clean-demo:
	rm -rf out/demo_lora out/.demo_lora.lock out/demo out/demo_prompts.jsonl
