# make demo   the whole pipeline on the demo corpus, about five minutes on two CPU cores
# make test   lint and tests
# make stress kills training runs at random moments, continues and compares them, minutes
# make study  every run of evaluation/study/study.toml that has no result yet, then the report
# make bench  speed and memory beside transformers and PEFT
# make report the tables and figures of README.md and evaluation/REPORT.md, from committed results
# BENCH="--sizes xs --quick" make bench   flags of evaluation/bench/bench.py
# STUDY="--jobs 2 --only 'xs-*'" make study  flags of evaluation/study/run.py
# PYTHON=python3.12 make ...   another interpreter than python3 for the virtual environment

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test report study stress bench page install clean-demo

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
	$(RUN) -m pytest

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
# A 1.6M-parameter model, small enough to see the whole story in minutes on a laptop.
SHAPE := --hidden_size 128 --num_hidden_layers 4 --num_attention_heads 4 --intermediate_size 352
DEMO_RUNS := demo_pretrain demo_full_sft demo_lora_minimind demo_lora_all
PROMPTS := dataset/data/demo/sft_demo_valid.jsonl

# Each run continues where an interrupted one stopped, and a finished one is left alone.
resume = $(if $(wildcard out/$(1)/resume.pt),--from_resume,$(if $(wildcard out/$(1)),--overwrite))

demo: install
	$(RUN) trainer/train_pretrain.py --run_name demo_pretrain $(call resume,demo_pretrain) \
		$(SHAPE) --batch_size 16 --max_seq_len 256 --epochs 2
	$(RUN) trainer/train_full_sft.py --run_name demo_full_sft $(call resume,demo_full_sft) \
		--from_weight out/demo_pretrain --learning_rate 1e-3 --batch_size 16
	$(RUN) trainer/train_lora.py --lora_name demo_lora_minimind $(call resume,demo_lora_minimind) \
		--from_weight out/demo_pretrain --batch_size 16 --lora_targets square --lora_rank 8 \
		--lora_alpha 8 --lora_init gaussian --learning_rate 1e-4
	$(RUN) trainer/train_lora.py --lora_name demo_lora_all $(call resume,demo_lora_all) \
		--from_weight out/demo_pretrain --batch_size 16 --learning_rate 3e-3
	$(RUN) eval_llm.py $(addprefix --model out/,$(DEMO_RUNS)) --prompts $(PROMPTS) --limit 100 \
		--nll_data $(PROMPTS) --decoding greedy t0.85p0.85 --max_new_tokens 64

clean-demo:
	rm -rf $(addprefix out/,$(DEMO_RUNS)) $(addprefix evaluation/model_outputs/,$(DEMO_RUNS))
	rm -f $(DEMO_RUNS:%=out/.%.lock)
