"""The benchmark: its data, its arithmetic, its tables by hand, and a run at a tiny shape."""

import json

import numpy as np
import pytest
import torch

from dataset.jsonl import DataError
from dataset.lm_dataset import CACHE_DIR, load_dataset
from evaluation import bench
from evaluation.bench import (
    PEFT_TARGETS,
    arm_result,
    card_peak,
    in_turns,
    matrix_shapes,
    measured_turns,
    parse_args,
    step_ratio,
    training_result,
    work,
    write_random_data,
)
from evaluation.bench_tables import bench_lines, spread, time_ratio
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from model.model_lora import find_targets
from model.model_minimind import MiniMindForCausalLM, minimind_config

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"intermediate_size": 48}
GENERATORS = ("answers", "transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny weights and short data."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(minimind_config(**TINY))
    save_model(model, TOKENIZER_DIR, folder / "tiny")
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that it says more than the last token again
    save_model(model, TOKENIZER_DIR, folder / "scaled")
    write_random_data(folder / "data.jsonl", 40)
    return folder


def test_random_conversations_have_the_lengths_that_the_script_tells_of(tmp_path):
    data = write_random_data(tmp_path / "data.jsonl", 400)
    lengths = load_dataset("sft", [data], load_tokenizer(), 340, tmp_path / "cache").lengths
    assert lengths.mean() == pytest.approx(276, abs=3)
    assert np.percentile(lengths, [10, 50]) == pytest.approx([165, 305], abs=6)
    assert lengths.max() == 340


def test_matrix_shapes_hold_every_matrix_weight():
    # All parameters of the default but its norms: 17 of 512.
    count = sum(
        inputs * outputs * many for inputs, outputs, many in matrix_shapes(minimind_config())
    )
    assert count == 25_829_888 - 17 * 512


def test_peft_adapts_the_modules_that_ours_adapts():
    model = MiniMindForCausalLM(minimind_config(**TINY))
    for method, targets in PEFT_TARGETS.items():
        names = find_targets(model, bench.LORA_TARGETS[method])
        assert {name.rpartition(".")[2] for name in names} == set(targets)
    assert find_targets(model, bench.LORA_TARGETS["lora_floor"]) == [
        "model.layers.0.self_attn.q_proj"
    ]


def test_ours_and_trainer_take_the_same_steps_in_turns(folder):
    """Same weights, batches and loss: the first losses agree, and so do the numbers of tokens."""
    args = parse_args(["--batch_size", "4", "--device", "cpu"])
    arms = ["peak/tiny", "ours/lora_square", "trainer/lora_square"]
    works = [work(args, folder, "tiny", arm, [folder / "data.jsonl"]) for arm in arms]
    kept = {path.name for path in CACHE_DIR.glob("*")}
    said = in_turns(works, 2, folder)
    stores = {path.name for path in (folder / "cache").iterdir()}
    assert stores and not stores & ({path.name for path in CACHE_DIR.glob("*")} - kept)
    peak, ours, theirs = (said[arm] for arm in arms)
    assert len(ours) == len(theirs) == len(peak) == 2
    assert [step["tokens"] for step in ours] == [step["tokens"] for step in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=2e-3)
    assert all(step["flops_per_second"] > 0 for step in peak)


def test_both_generate_the_same_answers(folder):
    args = parse_args(["--device", "cpu"])
    works = [work(args, folder, "scaled", f"{engine}/float32/alone", []) for engine in GENERATORS]
    ours, theirs = in_turns(works, 2, folder).values()
    assert len(ours) == len(theirs) == 2
    for step, other in zip(ours, theirs, strict=True):
        assert step["tokens"] == other["tokens"] == 64
        assert step["first_answer"] == other["first_answer"] == ours[0]["first_answer"]
        assert len(set(step["first_answer"])) > 1


def step(seconds: float, tokens: int = 100) -> dict:
    return {"seconds": seconds, "tokens": tokens, "loss": 2.0, "peak_memory_bytes": 2**20}


def test_steps_come_to_medians_by_hand():
    steps = [step(9.0), *[step(2.0)] * 4, step(2.0), step(11.0), step(1.0), step(4.0)]
    # The turn of 11 seconds, in which some arm compiled, is not among the measured ones.
    peaks = [*[7.0] * 5, 600_000.0, 7.0, 1_200_000.0, 150_000.0]
    found = arm_result(steps, [5, 7, 8], flops_per_token=6_000, peaks=peaks)
    assert found["tokens_per_second"] == {"median": 50, "min": 25, "max": 100}
    assert found["share_of_peak"] == pytest.approx({"median": 0.5, "min": 0.5, "max": 1.0})
    assert found["seconds"] == [2.0, 1.0, 4.0]
    assert found["compile_seconds"] == pytest.approx(28 - 6 * 100 / 50)


def test_turns_in_which_an_arm_compiled_are_not_measured():
    ours = [step(1.0) | {"graphs": count} for count in (1, 2, 2, 2, 2, 2, 3, 3, 3)]
    other = [step(2.0) | {"graphs": count} for count in (1, 1, 1, 1, 1, 1, 1, 1, 2)]
    theirs = [step(3.0)] * 9
    assert measured_turns({"ours": ours, "other": other, "theirs": theirs}) == [5, 7]
    assert step_ratio(ours, other) == {"median": 2, "min": 2, "max": 2}
    with pytest.raises(DataError, match="use more --steps"):
        measured_turns({"ours": ours[:7], "other": [*other[:5], other[-1]] + other[:1]})


def test_arms_of_different_batches_are_not_compared(folder):
    peak = [{"flops_per_second": 1.0}] * 6
    said = {"peak/tiny": peak, "ours/fft": [step(1.0)] * 6, "trainer/fft": [step(1.0, 99)] * 6}
    with pytest.raises(DataError, match="tiny: the arms took different batches"):
        training_result(folder / "tiny", said)


def test_tables_by_hand():
    def arm(speed: float, memory: int) -> dict:
        values = spread([speed - 10, speed, speed + 10])
        found = {"tokens_per_second": values, "compile_seconds": 12.4}
        found["share_of_peak"] = {"median": 0.745, "min": 0.7, "max": 0.8}
        seconds = [1e4 / speed, 2e4 / speed, 9e4 / speed]
        return found | {"peak_memory_bytes": memory * 2**20, "seconds": seconds}

    methods = {"fft": (1000, 500), "lora_square": (2000, 800), "lora_all": (1250, 500)}
    arms = {}
    for method, (ours, theirs) in methods.items():
        arms |= {f"ours/{method}": arm(ours, 900), f"trainer/{method}": arm(theirs, 1100)}
    flops = {"median": 3.7e11, "min": 3.6e11, "max": 3.8e11}
    speeds = {"ours": arm(250, 0), "transformers": arm(100, 0)}
    one = {"tokens_per_second": {"median": 37_000, "min": 1, "max": 2}, "gpu_utilization": 0.31}
    result = {
        "git": {"commit": "0123456789"},
        "machine": {"device": "cpu", "processor": "A chip", "threads": 2},
        "dtype": "bfloat16",
        "card_peak": None,
        "batch_size": 32,
        "data": {"conversations": 2000, "mean_tokens": 276.4, "max_tokens": 340},
        "training": {
            "base": {"parameters": 1_000_000, "peak_flops_per_second": flops, "arms": arms}
            | {"floor": {"median": 0.666, "min": 0.65, "max": 0.7}}
        },
        "generation": {"size": "base", "prompts": 100, "new_tokens": 64, "mean_prompt_tokens": 26.3}
        | {"alone": {"float32": speeds}, "batch": {"bfloat16": speeds}},
        "startup": {"cold": spread([5.0]), "warm": spread([4.0, 3.0, 8.0])}
        | {"cold_first_step": spread([30.0]), "warm_first_step": spread([9.0, 9.5])},
        "tokenizing": {"files": ["text.jsonl"], "megabytes": 2.5}
        | {"ours": spread([7.25, 7.75]), "encode_batch": spread([5.0])},
        "loader": {"0": 1.5, "2": 0.75},
        "sweep": {"size": "base", "batches": {"1": {"fft": one | {"peak_memory_bytes": 2**30}}}},
    }
    lines = bench_lines(result)
    assert lines[0].startswith("`make bench`, at commit 0123456 on A chip, 2 threads, in bfloat16")
    for line in (
        "| base, 1.0M | FFT | 1,000 (990-1,010) | 74% (70%-80%) | 500 (490-510) | 2.00 | 1 | 12 "
        "| 900 | 1,100 |",
        "By batch size at base, with `--sweep 1`:",
        "| base, 1.0M | LoRA, square r8 | 2,000 (1,990-2,010) | 74% (70%-80%) | 800 (790-810) "
        "| 2.50 | 0.50 | 12 | 900 | 1,100 |",
        "The floor of an adapter's step beside FFT's, with one adapter on the first block's q: "
        "0.67 (0.65-0.70) at base. Ratios are medians of the turns' own.",
        "The matrix peak, in GFLOP/s at a step's own shapes: 370 at base.",
        "| 1 | float32 | 250 (240-260) | 100 (90-110) | 2.50 |",
        "| 100 | bfloat16 | 250 (240-260) | 100 (90-110) | 2.50 |",
        "A process begins its first step 5.0 s after its start, 4.0 (3.0-8.0) s with tokens "
        "cached; that step, which compiles, takes another 30.0 s, 9.2 (9.0-9.5) s with code "
        "cached.",
        "Tokenizing text.jsonl (2.5 MB): 7.5 (7.2-7.8) MB/s from JSONL to the cache, 5.0 MB/s by "
        "the tokenizer's own `encode_batch` alone.",
        "Loading a step's batch, by data processes: 1.5 ms with 0, 0.8 ms with 2.",
        # 37,000 tokens of 6 million FLOPs are 60% of 370 GFLOP/s.
        "| 1 | FFT | 37,000 (1-2) | 60% | - | 31% | 1,024 |",
    ):
        assert line in lines, line
    assert json.dumps(result)
    # 1,000 tokens of 6 million FLOPs are 3% of 200 GFLOP/s, and 37,000 are 111%.
    lines = bench_lines(result | {"card_peak": 2e11})
    assert "| 1 | FFT | 37,000 (1-2) | 60% | 111% | 31% | 1,024 |" in lines
    assert (
        "The matrix peak, in GFLOP/s at a step's own shapes: 370 at base. FFT's MFU, of 0 TFLOP/s: "
        "3% at base." in lines
    )


def test_a_ratio_is_the_median_of_the_turns():
    # Turns of 5, 2 and 1.5 times as long, the second slow for both; medians would make it 6 / 4.
    found = time_ratio({"seconds": [5, 20, 6]}, {"seconds": [1, 10, 4]})
    assert found == {"median": 2, "min": 1.5, "max": 5}


def test_the_makers_peak_is_found_by_the_card(monkeypatch):
    assert card_peak("cpu") is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert card_peak("cuda") == peak
