"""A small tree of results, written as the scripts write it, for the tests of report and page."""

import json
from pathlib import Path

from evaluation.records import Record, read_records

README = """# Title
<!-- report:bench -->
old
<!-- /report:bench -->
<!-- report:reliability -->
<!-- /report:reliability -->

<!-- report:summary -->
<!-- /report:summary -->
<!-- report:study -->
<!-- /report:study -->
end
"""
RUNS = """# Results
<!-- report:runs -->
old
<!-- /report:runs -->
between
<!-- report:sweeps -->
<!-- /report:sweeps -->
"""
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!-- <script> \u2028 \u202eevil\x1b[2J [x](javascript:window.hacked=3)"
)
LOOP = "Once upon a time the cat sat. the cat sat. the cat sat."
PROMPTS = {
    "facts-01": ("Facts", "What is the capital of France?", {"contains": ["Paris"]}),
    "facts-02": ("Facts", HOSTILE, None),
    "story-01": ("Stories", "Tell a story about a cat.", None),
}
SFT = [{"name": "sft.jsonl.gz", "sha256": "5f7"}]


def run_record(name: str, stage: str, **changes: object) -> dict:
    """run.json of a completed run; `changes` are of the record, or of its settings."""
    settings = {
        "run_name": name,
        "learning_rate": 1e-3,
        "batch_size": 32,
        "from_weight": "out/base",
    }
    settings |= {
        "pretrain": {"from_weight": "none", "hidden_size": 128, "num_hidden_layers": 4},
        "full_sft": {"trainable": "all"},
        "lora": {
            "lora_targets": "square",
            "lora_rank": 8,
            "lora_alpha": 8.0,
            "lora_init": "kaiming",
            "use_rslora": False,
            "loraplus_lr_ratio": 1.0,
            "train_tokens": [],
            "modules_to_save": [],
            "modules_to_save_lr_ratio": 1.0,
        },
    }[stage]
    record = {
        "status": "completed",
        "stage": stage,
        "parameters": 1000,
        "trainable_parameters": 100 if stage == "lora" else 1000,
        "steps": 40,
        "step": 40,
        "tokens": 24000,
        "eval_loss": 3.5,
        "train_data": {
            "files": [{"name": "wiki.gz", "sha256": "a1"}] if stage == "pretrain" else SFT
        },
    }
    for key, value in changes.items():
        (settings if key in settings else record)[key] = value
    return record | {"settings": settings}


def rate(k: int, n: int, low: float, high: float) -> dict:
    return {"rate": k / n if n else None, "k": k, "n": n, "low": low, "high": high}


def results_of(nll: float, run: dict | None = None) -> dict:
    """results.json; the rates are of 3 answers, 1 with a check."""
    rates = {
        "check_strict": rate(0, 1, 0.0, 0.793),
        "runaway": rate(1, 3, 0.061, 0.792),
        "loop": rate(2, 3, 0.208, 0.939),
        "blank": rate(0, 3, 0.0, 0.562),
    }
    return {
        "provenance": {
            "run": run,
            "prompts": {"file": "prompts_x.md", "sha256": "0123456789", "count": 3},
            "generation": {"max_new_tokens": 16},
        },
        "nll": {
            "data": [{"name": "valid.jsonl", "sha256": "b2"}],
            "max_seq_len": 340,
            "conversations": 12,
            "response_tokens": 3456,
            "nats_per_token": nll,
        },
        "decodings": {"references": rates, "greedy": rates, "t0.85p0.85": rates},
    }


def sample(prompt_id: str, output: str, decoding: str = "greedy", seed: int | None = None) -> dict:
    """A line of samples.jsonl."""
    section, prompt, check = PROMPTS[prompt_id]
    return {
        "id": prompt_id,
        "section": section,
        "decoding": decoding,
        "seed": seed,
        "prompt": prompt,
        "prompt_translation": None,
        "output": output,
        "output_translation": None,
        "tokens": 16,
        "stopped": False,
        "blank": not output.strip(),
        "runaway": output == HOSTILE,
        "loop": output == LOOP,
        "check": check,
        "check_strict": check and "Paris" in output,
        "check_loose": check and ("Paris" in output or output.startswith("Lyon")),
    }


def samples_of(answer: str) -> list[dict]:
    """Greedy answers to every prompt, and two seeds of sampled ones to the first."""
    return [
        sample("facts-01", answer),
        sample("facts-02", HOSTILE),
        sample("story-01", LOOP),
        sample("facts-01", f"{answer} (seed 0)", "t0.85p0.85", 0),
        sample("facts-01", f"{answer} (seed 1)", "t0.85p0.85", 1),
    ]


def write_run(root: Path, name: str, record: dict, losses: tuple[float, ...] = (4.0, 3.5)) -> None:
    """A folder of evaluation/results."""
    folder = root / "evaluation" / "results" / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"step": 20 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
    if record["status"] == "completed":
        rows.append({"step": 20 * len(losses), "eval_loss": losses[-1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_probe(root: Path, name: str, results: dict, samples: list[dict]) -> None:
    """A folder of evaluation/model_outputs."""
    folder = root / "evaluation" / "model_outputs" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in samples]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def write_spectrum(root: Path, name: str, values: list[float]) -> None:
    """An analysis of one matrix's update."""
    matrix = {
        "name": "model.layers.0.self_attn.q_proj",
        "kind": "q_proj",
        "singular_values": values,
        "r90": 2,
        "effective_rank": 2.5,
        "stable_rank": 1.5,
        "relative": 0.125,
    }
    path = root / "evaluation" / "results" / name / "update_analysis.json"
    path.write_text(json.dumps({"matrices": [matrix]}))


def make_tree(root: Path) -> Path:
    """A base, LoRA, FFT, a LoRA run that diverged and was not probed; README and all."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.md").write_text(README)
    (root / "evaluation" / "results").mkdir(parents=True)
    (root / "evaluation" / "results" / "README.md").write_text(RUNS)
    write_run(root, "base", run_record("base", "pretrain"))
    write_run(root, "lora", run_record("lora", "lora"))
    write_run(root, "fft", run_record("fft", "full_sft"))
    diverged = {"status": "diverged", "step": 20, "learning_rate": 0.1, "eval_loss": None}
    write_run(root, "lora_hot", run_record("lora_hot", "lora", **diverged), (4.0,))
    for name, nll, answer in (("base", 4.0, " "), ("lora", 3.5, "Lyon."), ("fft", 3.0, "Paris.")):
        write_probe(root, name, results_of(nll), samples_of(answer))
    write_spectrum(root, "fft", [2.0, 1.0, 0.5])
    return root


def records_in(root: Path) -> list[Record]:
    return read_records(root / "evaluation" / "results", root / "evaluation" / "model_outputs")
