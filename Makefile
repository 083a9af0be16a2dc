# make demo        a short pretraining; from the base that ships: fine-tuning in 3 ways; answers
# make clean-demo  delete the demo's runs and answers
# make install     the virtual environment; targets that need it make it first
# make test        lint and tests
# make gpu         the tests that compute on a GPU; DEVICE=cpu make gpu: the same without one
# make elsewhere   other tools on our folders, in a virtual environment of their own
# make stress      kill training runs at random moments, continue and compare them
# make study       all runs of evaluation/study/study.toml without a result, then the report
# make report      tables and figures of README, REPORT and TABLES, from committed results
# make page        all saved answers side by side: evaluation/model_outputs/index.html
# make bench       speed and memory beside transformers and PEFT
# BENCH="--sizes xs --quick --output quick.json" make bench   flags of evaluation/bench/bench.py
# STUDY="--jobs 2 --only 'xs-*'" make study  flags of evaluation/study/run.py
# PYTHON=python3.12 make ...   another interpreter than python3 for the virtual environment

PYTHON ?= python3
DEVICE ?= cuda
VENV := .venv
RUN := $(VENV)/bin/python
ELSEWHERE := .venv-elsewhere

.PHONY: demo test gpu elsewhere report study stress bench page install clean-demo

# Touched after an installation that succeeded; a change of the requirements installs again.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

install: $(VENV)/installed

test: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	DEVICE=cpu $(MAKE) gpu
	$(RUN) -m pytest -m "not gpu and not elsewhere"

# On CUDA only deterministic kernels make runs bitwise equal; cuBLAS needs CUBLAS_WORKSPACE_CONFIG.
gpu: install
	CUBLAS_WORKSPACE_CONFIG=:4096:8 DEVICE=$(DEVICE) $(RUN) -m pytest -m gpu

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
# A short pretraining shows that stage. Then the base that ships is fine-tuned in 3 ways, and all 4
# models answer held-out prompts of the tuning half.
SHAPE := --hidden_size 128 --num_hidden_layers 4 --num_attention_heads 4 --intermediate_size 352
DEMO_RUNS := demo_pretrain demo_full_sft demo_lora_study demo_lora_tuned
DEMO_MODELS := model/base_xs $(addprefix out/,$(wordlist 2,4,$(DEMO_RUNS)))
WORLD := dataset/data/world
STEPS := --batch_size 16 --max_steps 2000 --show_answers 0

demo: install
	$(RUN) trainer/train_pretrain.py --run_name demo_pretrain --overwrite $(SHAPE) \
		--wrap_documents --batch_size 16 --max_seq_len 256 --max_steps 200
	$(RUN) trainer/train_full_sft.py --run_name demo_full_sft --overwrite $(STEPS) \
		--learning_rate 1e-3
	$(RUN) trainer/train_lora.py --lora_name demo_lora_study --overwrite $(STEPS) \
		--lora_targets square --lora_alpha 8 --lora_init gaussian --learning_rate 1e-4
	$(RUN) trainer/train_lora.py --lora_name demo_lora_tuned --overwrite $(STEPS) \
		--learning_rate 3e-3
	head -qn 100 $(WORLD)/probe_combinations_tune.jsonl $(WORLD)/probe_unseen_tune.jsonl \
		> out/demo_prompts.jsonl
	$(RUN) eval_llm.py $(DEMO_MODELS:%=--model %) --prompts out/demo_prompts.jsonl --output_dir out/demo

clean-demo:
	rm -rf $(DEMO_RUNS:%=out/%) out/demo
	rm -f $(DEMO_RUNS:%=out/.%.lock) out/demo_prompts.jsonl
