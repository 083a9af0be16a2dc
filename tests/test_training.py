"""The three training scripts, run on tiny models: results, resume, processes, refusals."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from dataset.command_line import REPO_DIR
from dataset.lm_dataset import load_dataset
from model.checkpoint import (
    TOKENIZER_DIR,
    load_model,
    load_tokenizer,
    save_model,
    weights_fingerprint,
)
from model.model_lora import LoraSettings, apply_lora, load_lora, select_trainable
from model.model_minimind import MiniMindForCausalLM, count_parameters, minimind_config
from trainer import run_folder, train_full_sft, train_lora, train_pretrain, trainer_utils
from trainer.arguments import DEFAULT_SHAPE
from trainer.failures import run_script
from trainer.trainer_utils import (
    SettingsError,
    choose_dtype,
    compile_blocks,
    flops_per_token,
    learning_rate_at,
    load_start,
    parameter_groups,
    trained_parts,
)

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
STAGES = {"pretrain": train_pretrain, "full_sft": train_full_sft, "lora": train_lora}
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
SHAPE_FLAGS = " ".join(f"--{name} {value}" for name, value in SHAPE.items())
CPU = "--device cpu --dtype float32 --log_interval 1"
SEEDS = itertools.count(1000)  # of calls
WEIGHTS = {"pretrain": "model.safetensors", "full_sft": "model.safetensors"}
WEIGHTS["lora"] = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small corpora; `pretrain/` and `cache/` are added to it."""
    folder = tmp_path_factory.mktemp("training")

    def write(name: str, records: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def sums(numbers: range) -> list[dict]:
        return [
            {"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}, of course."}
            for i in numbers
        ]

    write("text.jsonl", [{"text": f"The cat saw {i} birds and {i % 7} mice."} for i in range(90)])
    write("sft.jsonl", sums(range(21)))  # batches of 8, 8 and 5
    write("sft17.jsonl", sums(range(17)))  # batches of 8, 8 and 1
    write("valid.jsonl", sums(range(50, 55)))
    return folder


def call(stage: str, flags: str, home: Path) -> int:
    """`main()` of a stage as a fresh process would run it; returns its exit code."""
    torch.manual_seed(next(SEEDS))  # nothing may depend on what ran before
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny model gains nothing from more, and waits for busy cores
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    load = functools.partial(load_dataset, cache_dir=home / "cache")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_utils, "load_dataset", load)
            return STAGES[stage].main(flags.split())
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def base(home: Path) -> Path:
    """A pretrained model."""
    flags = f"{SHAPE_FLAGS} {CPU} --data_path {home}/text.jsonl --eval_data_path {home}/text.jsonl"
    flags += f" --save_dir {home} --max_seq_len 32 --batch_size 8 --epochs 3 --learning_rate 1e-2"
    assert call("pretrain", flags, home) == 0
    return home / "pretrain"


def sft_flags(home: Path, out: Path, data: str = "sft.jsonl") -> str:
    """Three optimizer steps an epoch, two epochs."""
    return (
        f"{CPU} --from_weight {home}/pretrain --save_dir {out} --data_path {home}/{data} "
        f"--eval_data_path {home}/valid.jsonl --batch_size 8 --learning_rate 3e-3"
    )


def rows_of(run: Path) -> list[dict]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_second", None)
    return rows


def losses_of(run: Path) -> list[float]:
    """Training losses, then validation losses."""
    rows = rows_of(run)
    return [row[name] for name in ("loss", "eval_loss") for row in rows if name in row]


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def bytes_of(weights: Path) -> dict[str, bytes]:
    """Every tensor's bits; the order of a safetensors file's header may differ."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(weights).items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- whole runs


def test_code_is_dirty_when_it_was_changed_not_when_there_are_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    monkeypatch.setattr(run_folder, "REPO_DIR", tmp_path)
    code = tmp_path / "trainer" / "loop.py"
    code.parent.mkdir()
    code.write_text("a = 1\n")
    git("init")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    result = tmp_path / "evaluation" / "results" / "run.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    output = tmp_path / "evaluation" / "model_outputs" / "one" / "samples.md"
    output.parent.mkdir(parents=True)
    output.write_text("hello\n")
    assert run_folder.git_state()["dirty"] is False
    code.with_name("tokenizer.json").write_text("{}")
    assert run_folder.git_state()["dirty"] is True
    code.with_name("tokenizer.json").unlink()
    code.write_text("a = 2\n")
    assert run_folder.git_state()["dirty"] is True


@pytest.mark.parametrize("stage", STAGES)
def test_run_folder_is_complete(base: Path, home: Path, tmp_path: Path, stage: str) -> None:
    if stage != "pretrain":
        flags = sft_flags(home, tmp_path) + " --epochs 10 --eval_interval 10"
        assert call(stage, flags, home) == 0
    run = base if stage == "pretrain" else tmp_path / stage
    files = {"run.json", "metrics.jsonl", "resume"}
    if stage == "lora":
        files |= {"adapter_config.json", "adapter_model.safetensors"}
    else:
        files |= {"config.json", "generation_config.json", "model.safetensors"}
        files |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in run.iterdir()} == files

    record, rows = record_of(run), rows_of(run)
    assert (record["status"], record["stage"]) == ("completed", stage)
    data = home / ("text.jsonl" if stage == "pretrain" else "sft.jsonl")
    assert record["train_data"]["files"] == [{"name": data.name, "sha256": sha256(data)}]
    assert record["settings"]["learning_rate"] == (1e-2 if stage == "pretrain" else 3e-3)
    assert (record["settings"]["device"], record["settings"]["dtype"]) == ("cpu", "float32")
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty"} == record["git"].keys() or record["git"] == {}
    for name in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "flops"):
        assert record[name] > 0, name
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    base_size = 6400 * 32 + linears + 5 * 32
    # r = 8 for each linear of the two layers: 8 * (in + out).
    adapter = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert record["trainable_parameters"] == (adapter if stage == "lora" else base_size)
    assert record["parameters"] == base_size + (adapter if stage == "lora" else 0)
    start = None if stage == "pretrain" else weights_fingerprint(load_model(base))
    assert record.get("base_fingerprint") == start

    train_rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, record["steps"] + 1))
    assert set(train_rows[0]) == {"step", "tokens", "loss", "grad_norm", "learning_rate"}
    epochs = 3 if stage == "pretrain" else 10
    assert record["steps"] == epochs * record["steps_per_epoch"]
    samples = trained_samples(data, stage)
    assert record["steps_per_epoch"] == -(-len(samples) // 8)
    assert record["tokens"] == train_rows[-1]["tokens"] == epochs * sum(n for n, _ in samples)
    labeled = sum(labeled for _, labeled in samples)
    assert record["labeled_tokens"] == epochs * labeled
    assert record["train_data"]["labeled_tokens"] == labeled
    evaluated = [row["step"] for row in rows if "eval_loss" in row]
    assert evaluated == ([record["steps"]] if stage == "pretrain" else [10, 20, 30])
    assert record["eval_loss"] == rows[-1]["eval_loss"]
    assert record["train_loss"] == train_rows[-1]["loss"]
    assert 8.5 < losses_of(base)[0] < 9  # ln 6400 = 8.76: the first guess is no better than chance
    assert train_rows[-1]["loss"] < 0.8 * train_rows[0]["loss"]


def test_shape_that_was_not_given_is_recorded(home: Path, tmp_path: Path) -> None:
    assert minimind_config(**DEFAULT_SHAPE).to_dict() == minimind_config().to_dict()
    flags = SHAPE_FLAGS.replace("--num_key_value_heads 1", "")
    flags += f" {CPU} --data_path {home}/text.jsonl --save_dir {tmp_path} --max_steps 1"
    assert call("pretrain", flags, home) == 0
    settings = record_of(tmp_path / "pretrain")["settings"]
    shape = SHAPE | {"num_key_value_heads": 2, "qk_norm": False}
    assert {name: settings[name] for name in shape} == shape
    assert load_model(tmp_path / "pretrain").config.num_key_value_heads == 2


def test_model_with_more_tokens_than_its_tokenizer_trains(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many on the hub are: padded to a round number."""
    padded = MiniMindForCausalLM(minimind_config(**SHAPE | {"vocab_size": 6464}))
    save_model(padded, TOKENIZER_DIR, tmp_path / "padded")
    flags = f"{CPU} --from_weight {tmp_path}/padded --save_dir {tmp_path} --max_steps 1"
    assert call("full_sft", f"{flags} --data_path {home}/sft.jsonl --batch_size 8", home) == 0
    assert f"{tmp_path}/padded has 6464 tokens, {tmp_path}/padded 6400" in capsys.readouterr().out
    assert load_model(tmp_path / "full_sft").config.vocab_size == 6464


def test_special_ids_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER_DIR, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|im_end|>", "bos_token": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    args = Namespace(from_weight="none", tokenizer_path=tmp_path / "other", max_seq_len=8, **SHAPE)
    model, _ = load_start(Namespace(**(dict.fromkeys(DEFAULT_SHAPE) | vars(args))))
    ids = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert ids == (2, None, 0)
    assert model.generation_config.eos_token_id == 0


def test_what_trains_is_told() -> None:
    model = MiniMindForCausalLM(minimind_config(**SHAPE))
    settings = LoraSettings(rank=2, targets="square", train_tokens=(2,))
    apply_lora(model, settings)
    model.model.norm.requires_grad_(True)
    assert trained_parts(model) == [
        "adapted: 2 q_proj, 2 o_proj",
        "trained: 1 embed_tokens.rows, 1 norm.weight",
    ]


def trained_samples(data: Path, stage: str) -> list[tuple[int, int]]:
    """Tokens and targets of every block or conversation, by transformers' own functions."""
    tokenizer = load_tokenizer()
    records = [json.loads(line) for line in data.read_text().splitlines()]
    if stage == "pretrain":
        total = sum(len(tokenizer(record["text"])["input_ids"]) + 1 for record in records)
        lengths = [32] * (total // 32) + ([total % 32] if total % 32 > 1 else [])
        return [(length, length - 1) for length in lengths]
    return [(len(chat["input_ids"]), sum(chat["assistant_masks"])) for chat in encoded_chats(data)]


def encoded_chats(data: Path) -> list[dict]:
    """Ids of every conversation and which of them are the assistant's, by transformers alone."""
    chats = []
    for record in map(json.loads, data.read_text().splitlines()):
        messages = [{"role": "user", "content": record["instruction"]}]
        messages += [{"role": "assistant", "content": record["output"]}]
        chats.append(
            load_tokenizer().apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        )
    return chats


def conversations(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All conversations of a file as one padded batch, ids and labels."""
    rows, labels = [], []
    for chat in encoded_chats(data):
        ids, answer = torch.tensor(chat["input_ids"]), torch.tensor(chat["assistant_masks"])
        rows.append(ids)
        labels.append(ids.where(answer == 1, torch.tensor(-100)))
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def mean_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the labeled tokens that have one before them."""
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def test_run_equals_a_plain_loop_over_transformers_model(
    base: Path, home: Path, tmp_path: Path
) -> None:
    """Loss, rates, decay, clipping and update, over a batch that is the whole file."""
    flags = sft_flags(home, tmp_path) + " --batch_size 21 --max_steps 6 --learning_rate 8e-3"
    flags += " --lr_schedule linear --warmup_ratio 0.34 --min_lr_ratio 0.25"
    flags += " --weight_decay 0.1 --grad_clip 0.5"
    assert call("full_sft", flags, home) == 0
    rows = rows_of(tmp_path / "full_sft")
    model = LlamaForCausalLM.from_pretrained(base)
    decayed = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_proj.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups)
    ids, labels = conversations(home / "sft.jsonl")
    for row, rate in zip(rows[:-1], (4e-3, 8e-3, 8e-3, 6e-3, 4e-3, 2e-3), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = mean_loss(model, ids, labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert norm > 0.5  # else nothing is clipped
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert row["learning_rate"] == pytest.approx(rate)
    tensors = load_file(tmp_path / "full_sft/model.safetensors")
    for name, tensor in tensors.items():
        # Adam divides by the gradient's size, so rounding of tiny gradients shows in full.
        torch.testing.assert_close(model.get_parameter(name).data, tensor, rtol=0, atol=2e-4)
    with torch.no_grad():
        loss = mean_loss(model, *conversations(home / "valid.jsonl")).item()
    assert rows[-1]["eval_loss"] == pytest.approx(loss, rel=1e-3)


def test_validation_loss_of_text_is_the_mean_over_targets(base: Path, home: Path) -> None:
    tokenizer = load_tokenizer()
    ids = []
    for line in (home / "text.jsonl").read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], 0]  # 0 is <|endoftext|>
    total, count = 0.0, 0
    model = load_model(base)
    for start in range(0, len(ids), 32):
        block = torch.tensor([ids[start : start + 32]])
        if block.shape[1] > 1:
            total += mean_loss(model, block, block).item() * (block.shape[1] - 1)
            count += block.shape[1] - 1
    assert record_of(base)["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_adapter_flags_reach_the_adapter(base: Path, home: Path, tmp_path: Path) -> None:
    """MiniMind's placement, scale and initialization, and whatever else a flag sets."""
    flags = sft_flags(home, tmp_path) + " --max_steps 1 --lora_targets square --lora_rank 8"
    flags += " --lora_alpha 8 --lora_init gaussian --use_rslora --lora_dropout 0.2"
    flags += " --train_tokens <|im_start|> <|im_end|>"
    assert call("lora", flags, home) == 0
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    wanted = {
        "r": 8,
        "lora_alpha": 8,
        "init_lora_weights": "gaussian",
        "use_rslora": True,
        "lora_dropout": 0.2,
        "trainable_token_indices": {"embed_tokens": [1, 2]},
        "target_modules": [
            f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qo"
        ],
    }
    assert {name: config[name] for name in wanted} == wanted
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    # A has no gradient while B is 0, so after one step it still is as it was drawn: N(0, .02).
    drawn = torch.cat([t.flatten() for name, t in tensors.items() if ".lora_A." in name])
    assert drawn.std().item() == pytest.approx(0.02, rel=0.1)
    # Evaluated without dropout.
    model = load_model(base)
    load_lora(model, tmp_path / "lora")
    with torch.no_grad():
        loss = mean_loss(model.eval(), *conversations(home / "valid.jsonl")).item()
    assert rows_of(tmp_path / "lora")[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("trainable", ["norms", "embeddings", "square,mlp", "frozen-embeddings"])
def test_trainable_parts_alone_change(
    base: Path, home: Path, tmp_path: Path, trainable: str
) -> None:
    decay = " --weight_decay 0.1" if trainable not in ("norms", "embeddings") else ""
    flags = sft_flags(home, tmp_path) + f" --trainable {trainable} --max_steps 2{decay}"
    assert call("full_sft", flags, home) == 0
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "full_sft/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {
        "norms": ("norm.weight",),
        "embeddings": ("embed_tokens.weight",),
        "square,mlp": ("q_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight")
        + ("down_proj.weight",),
        "frozen-embeddings": ("norm.weight", "proj.weight"),
    }
    assert changed == {name for name in before if name.endswith(kinds[trainable])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_leaves_the_base_alone(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    before, trained = sha256(base / "model.safetensors"), []
    monkeypatch.setattr(train_lora, "save_lora", lambda model, *_: trained.append(model))
    flags = sft_flags(home, tmp_path) + f" --weight_decay 0.1 --max_steps 3 --dtype {dtype}"
    assert call("lora", flags, home) == 0
    weights = trained[0].state_dict()
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)), name
    assert any(weights[name].any() for name in weights if name.endswith("lora_B.weight"))
    assert sha256(base / "model.safetensors") == before


def test_residual_stream_has_one_type_in_full_and_lora_training(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, both add block outputs up in float32: a comparison of methods, not of types."""
    seen = []
    forward = trainer_utils.MiniMindForCausalLM.forward

    def watched(self: MiniMindForCausalLM, *args: object, **kwargs: object) -> object:
        if not self.model.norm._forward_pre_hooks:
            self.model.norm.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].dtype)
            )
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(trainer_utils.MiniMindForCausalLM, "forward", watched)
    for stage in ("full_sft", "lora"):
        flags = sft_flags(home, tmp_path) + " --max_steps 1 --dtype bfloat16"
        assert call(stage, flags, home) == 0
    assert set(seen) == {torch.float32}


# ---------------------------------------------------------------- resume


class Killed(BaseException):
    """Stands for a process that ends without a chance to save."""


def at_step(step: int, action: Callable[[], None]) -> contextlib.AbstractContextManager:
    """While open, the optimizer step `step` (counted from 1 within a call) runs `action`."""
    train_step, taken = trainer_utils.train_step, []

    def watched(*args: object) -> tuple[float, float, int, int]:
        taken.append(1)
        if len(taken) == step:
            action()
        return train_step(*args)

    @contextlib.contextmanager
    def patched() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_utils, "train_step", watched)
            yield

    return patched()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    raise Killed


RESUMED = [
    ("full_sft", "--accumulation_steps 2 --batch_size 2 --weight_decay 0.1", "float32"),
    ("full_sft", "--accumulation_steps 2 --batch_size 4", "bfloat16"),
    ("lora", "--lora_dropout 0.2 --loraplus_lr_ratio 4", "float32"),
    (
        "lora",
        "--lora_dropout 0.2 --loraplus_lr_ratio 4 --train_tokens <|im_end|> "
        "--modules_to_save norms --modules_to_save_lr_ratio 0.5",
        "bfloat16",
    ),
]


@pytest.mark.parametrize(("stage", "extra", "dtype"), RESUMED)
@pytest.mark.parametrize("way", ["SIGTERM", "kill"])
def test_resumed_run_equals_an_uninterrupted_one(
    base: Path, home: Path, tmp_path: Path, stage: str, extra: str, dtype: str, way: str
) -> None:
    flags = "--log_interval 2 --eval_interval 2 --save_interval 2 --warmup_ratio 0.2 --epochs 2.5"
    for name in ("whole", "parts"):
        out = tmp_path / name
        flags_of_run = f"{sft_flags(home, out)} {extra} --dtype {dtype} {flags}"
        if name == "whole":
            assert call(stage, flags_of_run, home) == 0
            continue
        if way == "SIGTERM":
            with at_step(5, terminate):
                assert call(stage, flags_of_run, home) == 130
            assert record_of(out / stage)["status"] == "interrupted"
            assert record_of(out / stage)["step"] == 5
        else:
            # Dies in step 5 with the state of step 4 between its two names, and, as if it had come
            # further, with rows that the state knows nothing of, the last one cut short.
            with at_step(5, kill), pytest.raises(Killed):
                call(stage, flags_of_run, home)
            (out / stage / "resume").rename(out / stage / "resume.old")
            with (out / stage / "metrics.jsonl").open("a") as file:
                file.write('{"step": 6, "loss": 1.0}\n{"step": 8, "lo')
        assert call(stage, flags_of_run + " --from_resume", home) == 0
    whole, parts = (tmp_path / name / stage for name in ("whole", "parts"))
    assert bytes_of(whole / WEIGHTS[stage]) == bytes_of(parts / WEIGHTS[stage])
    assert rows_of(whole) == rows_of(parts)
    assert not (parts / "resume.old").exists()
    for name in ("status", "steps", "tokens", "labeled_tokens", "train_loss", "eval_loss", "flops"):
        assert record_of(whole)[name] == record_of(parts)[name], name
    # Once more has nothing to do, and does nothing.
    before = {path: sha256(path) for path in parts.rglob("*") if path.is_file()}
    assert call(stage, flags_of_run + " --from_resume", home) == 0
    assert {path: sha256(path) for path in parts.rglob("*") if path.is_file()} == before


def test_run_that_died_before_its_last_save_is_finished(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = sft_flags(home, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_full_sft, "save_model", lambda *_: kill())
        call("full_sft", flags, home)
    assert call("full_sft", flags + " --from_resume", home) == 0
    again = tmp_path / "again"
    assert call("full_sft", sft_flags(home, again), home) == 0
    run, same = tmp_path / "full_sft", again / "full_sft"
    assert record_of(run)["status"] == "completed"
    assert sha256(run / "model.safetensors") == sha256(same / "model.safetensors")
    assert rows_of(run) == rows_of(same)


@pytest.mark.parametrize("changed", ["sft.jsonl", "base"])
def test_resume_refuses_other_data_or_another_base_under_the_same_name(
    base: Path, home: Path, tmp_path: Path, changed: str
) -> None:
    own = tmp_path / "home"
    shutil.copytree(home, own, ignore=shutil.ignore_patterns("cache", "resume"))
    flags = sft_flags(own, tmp_path)
    with at_step(2, terminate):
        assert call("full_sft", flags, home) == 130
    if changed == "base":
        model = load_model(base)
        with torch.no_grad():
            model.model.norm.weight[0] += 1
        save_model(model, TOKENIZER_DIR, own / "pretrain")
    else:
        lines = (own / changed).read_text().splitlines(keepends=True)
        (own / changed).write_text("".join(reversed(lines)))
    name = {"sft.jsonl": "train_data", "base": "base_fingerprint"}[changed]
    with pytest.raises(SettingsError, match=f"--from_resume: {name}.* was .* and is .* now"):
        call("full_sft", flags + " --from_resume", home)


def test_pretraining_that_goes_on_from_weights_names_them(
    base: Path, home: Path, tmp_path: Path
) -> None:
    flags = f"{CPU} --from_weight {base} --save_dir {tmp_path} --data_path {home}/text.jsonl"
    assert call("pretrain", f"{flags} --max_seq_len 32 --batch_size 8 --max_steps 1", home) == 0
    record = json.loads((tmp_path / "pretrain" / "run.json").read_text())
    assert record["base_fingerprint"] == weights_fingerprint(load_model(base))


def test_skipped_float16_step_is_no_divergence(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler's way of finding its scale: gradients overflow, and the step is left out."""
    train_step = trainer_utils.train_step

    def overflowing(*args: object) -> tuple[float, float, int, int]:
        loss, _, *counts = train_step(*args)
        return loss, math.inf, *counts

    monkeypatch.setattr(trainer_utils, "train_step", overflowing)
    flags = sft_flags(home, tmp_path) + " --overwrite --max_steps 1"
    assert call("full_sft", flags, home) == 3
    monkeypatch.setattr(trainer_utils.Accelerator, "optimizer_step_was_skipped", True)
    assert call("full_sft", flags, home) == 0


def test_divergence_is_told(base: Path, home: Path, tmp_path: Path) -> None:
    flags = sft_flags(home, tmp_path) + " --learning_rate 1e30 --grad_clip 0"
    assert call("full_sft", flags, home) == 3
    assert record_of(tmp_path / "full_sft")["status"] == "diverged"
    assert not (tmp_path / "full_sft/model.safetensors").exists()


# ---------------------------------------------------------------- batches and processes


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code alone, so that its cache is not the repository's."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("dataset", "model", "trainer"):
        ignored = shutil.ignore_patterns("data", "cache", "__pycache__")
        shutil.copytree(REPO_DIR / name, folder / name, ignore=ignored)
    return folder


@pytest.mark.parametrize("stage", ["full_sft", "lora"])
def test_accumulation_does_not_change_a_batch(
    base: Path, home: Path, tmp_path: Path, stage: str
) -> None:
    assert call(stage, sft_flags(home, tmp_path / "8"), home) == 0
    flags = sft_flags(home, tmp_path / "2x4") + " --batch_size 2 --accumulation_steps 4"
    assert call(stage, flags, home) == 0
    compare_runs(tmp_path / "8" / stage, tmp_path / "2x4" / stage, WEIGHTS[stage])


def compare_runs(one: Path, other: Path, weights: str) -> None:
    """The same losses, gradients, counts and, but for rounding, weights."""
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-5)
    norms = [[row["grad_norm"] for row in rows_of(run) if "loss" in row] for run in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    for name in ("step", "tokens", "learning_rate"):
        assert [row.get(name) for row in rows_of(one)] == [row.get(name) for row in rows_of(other)]
    for name in ("tokens", "labeled_tokens", "steps", "steps_per_epoch", "flops"):
        assert record_of(one)[name] == record_of(other)[name], name
    tensors, others = load_file(one / weights), load_file(other / weights)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        # Adam divides by the gradient's size, so rounding of tiny gradients shows in full.
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=2e-4, msg=name)


def launch_two(script: Path, flags: str) -> tuple[int, str]:
    """Runs a script on two processes of this machine; its exit code and standard error."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--standalone", str(script), *flags.split()]
    with subprocess.Popen(launch, env=ONE_THREAD, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=90)
        finally:
            process.terminate()  # after a timeout: torchrun then ends its processes too
    return process.returncode, errors


@pytest.mark.parametrize(
    ("stage", "data", "split", "extra"),
    [
        # 5 in the last batch: 3 and 2 at two a micro-batch; 1 in the last batch: 1 and none.
        ("full_sft", "sft.jsonl", "--batch_size 2 --accumulation_steps 2", "--weight_decay 0.1"),
        ("lora", "sft17.jsonl", "--batch_size 4", "--train_tokens <|im_end|> --lora_rank 4"),
    ],
)
def test_two_processes_equal_one(
    base: Path,
    home: Path,
    tmp_path: Path,
    checkout: Path,
    stage: str,
    data: str,
    split: str,
    extra: str,
) -> None:
    flags = f"{sft_flags(home, tmp_path / 'one', data)} {extra} --eval_data_path {home}/one.jsonl"
    # One validation sample: the second process has none.
    (home / "one.jsonl").write_text((home / "valid.jsonl").read_text().splitlines()[0] + "\n")
    assert call(stage, flags, home) == 0
    flags = f"{flags} {split} --save_dir {tmp_path}/two"
    code, errors = launch_two(checkout / f"trainer/train_{stage}.py", flags)
    assert code == 0, errors
    assert record_of(tmp_path / "two" / stage)["processes"] == 2
    compare_runs(tmp_path / "one" / stage, tmp_path / "two" / stage, WEIGHTS[stage])


# The second process alone gets the signal, in its second step.
SIGNAL_TO_ONE = """
import os, signal, sys
sys.path.insert(0, {checkout!r})
from trainer import train_full_sft, trainer_utils
from trainer.failures import run_script
train_step, taken = trainer_utils.train_step, []
def watched(*args):
    taken.append(1)
    if len(taken) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(*args)
trainer_utils.train_step = watched
run_script(train_full_sft.main)
"""


def test_two_processes_stop_together(
    base: Path, home: Path, tmp_path: Path, checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "script.py").write_text(SIGNAL_TO_ONE.format(checkout=str(checkout)))
    _, errors = launch_two(tmp_path / "script.py", sft_flags(home, tmp_path))
    assert "exitcode  : 130" in errors
    run = tmp_path / "full_sft"
    assert (record_of(run)["status"], record_of(run)["step"]) == ("interrupted", 2)
    assert json.loads((run / "resume/progress.json").read_text())["step"] == 2
    # One process would share the batches otherwise.
    capfd.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_script(lambda: call("full_sft", sft_flags(home, tmp_path) + " --from_resume", home))
    assert "--from_resume: processes was 2 and is 1 now" in capfd.readouterr().err


def test_script_runs_from_anywhere_and_survives_sigterm(
    base: Path, home: Path, tmp_path: Path, checkout: Path
) -> None:
    """Paths are relative to where the user stands; the resumed run equals an in-process one."""
    flags = sft_flags(home, tmp_path / "whole") + " --epochs 40"
    script = checkout / "trainer/train_full_sft.py"
    os.symlink(home, tmp_path / "home")
    given = flags.replace(str(home), "home").replace(str(tmp_path / "whole"), "parts")
    process = subprocess.Popen(
        [sys.executable, str(script), *given.split()],
        cwd=tmp_path,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "parts/full_sft/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    step = record_of(metrics.parent)["step"]
    assert 1 <= step < 120
    assert f"interrupted at step {step}" in out.splitlines()[-1]
    assert "Traceback" not in errors
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert call("full_sft", given + " --from_resume", home) == 0
    assert call("full_sft", flags, home) == 0
    whole = tmp_path / "whole/full_sft"
    assert rows_of(whole) == rows_of(metrics.parent)
    assert sha256(whole / "model.safetensors") == sha256(metrics.parent / "model.safetensors")


# ---------------------------------------------------------------- schedule, groups, cost


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        # 10 steps, 2 of warm-up, peak 8, floor 2: the way down takes steps 2 to 9.
        ("cosine", 0, 4.0),
        ("cosine", 1, 8.0),
        ("cosine", 2, 8.0),
        ("cosine", 9, 2.0),
        ("cosine", 4, 2 + 6 * (1 + 0.6234898018587336) / 2),  # cos(2 pi / 7)
        ("linear", 1, 8.0),
        ("linear", 2, 8.0),
        ("linear", 4, 2 + 6 * 5 / 7),
        ("linear", 9, 2.0),
        ("constant", 0, 4.0),
        ("constant", 2, 8.0),
        ("constant", 9, 8.0),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert learning_rate_at(step, 10, 8.0, schedule, 0.2, 0.25) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (5, 0.55), (10, 0.1)])
def test_cosine_without_warmup(step: int, expected: float) -> None:
    assert learning_rate_at(step, 11, 1.0, "cosine", 0.0, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_single_step_takes_the_peak(schedule: str, warmup: float) -> None:
    assert learning_rate_at(0, 1, 3.0, schedule, warmup, 0.1) == 3.0


def tiny_model() -> MiniMindForCausalLM:
    return MiniMindForCausalLM(minimind_config(**SHAPE))


def test_flops_by_hand() -> None:
    model = tiny_model()
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    size = 6400 * 32 + linears + 5 * 32
    attention = 6 * 2 * 32 * 100
    assert flops_per_token(model, 100.0) == 6 * size + attention
    apply_lora(model, LoraSettings(rank=2, targets="square"))
    adapter = 2 * 2 * 2 * (32 + 32)
    assert flops_per_token(model, 100.0) == 4 * (size + adapter) + 2 * adapter + attention


def names_by_group(model: nn.Module, groups: list[dict]) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


def test_weight_decay_falls_on_matrices_outside_the_embedding() -> None:
    model = tiny_model()
    groups = parameter_groups(model, Namespace(weight_decay=0.3))
    decayed, plain = names_by_group(model, groups)
    assert len(decayed) == 14 and all(name.endswith("_proj.weight") for name in decayed)
    assert len(plain) == 6 and "model.embed_tokens.weight" in plain
    assert [(group["weight_decay"], group["lr_ratio"]) for group in groups] == [(0.3, 1), (0.0, 1)]


def test_weight_decay_spares_adapters_of_the_head() -> None:
    model = tiny_model()
    apply_lora(model, LoraSettings(rank=2, targets="q_proj,lm_head"))
    groups = parameter_groups(model, Namespace(weight_decay=0.3))
    decayed, others = names_by_group(model, groups)
    assert len(decayed) == 4 and all("q_proj.lora_" in name for name in decayed)
    assert others == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}


def test_b_and_modules_to_save_have_rates_of_their_own() -> None:
    model = tiny_model()
    settings = LoraSettings(rank=2, train_tokens=(1, 2), modules_to_save=("norms",))
    apply_lora(model, settings)
    args = Namespace(weight_decay=0.3, loraplus_lr_ratio=16.0, modules_to_save_lr_ratio=0.5)
    groups = parameter_groups(model, args, functools.partial(train_lora.lr_ratio, args=args))
    a, b, norms, rows = names_by_group(model, groups)
    assert len(a) == len(b) == 14
    assert all(name.endswith("lora_A.weight") for name in a)
    assert all(name.endswith("lora_B.weight") for name in b)
    assert len(norms) == 5 and all(name.endswith("norm.weight") for name in norms)
    assert rows == {"model.embed_tokens.token_adapter.trainable_tokens_delta"}
    assert [group["lr_ratio"] for group in groups] == [1.0, 16.0, 0.5, 1.0]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.0, 0.0]
    assert len(parameter_groups(model, args)) == 2


@pytest.mark.parametrize(("b_ratio", "saved_ratio"), [(1, 1), (16, 0.5)])
def test_first_step_moves_each_by_its_own_rate(
    base: Path, home: Path, tmp_path: Path, b_ratio: int, saved_ratio: float
) -> None:
    """Adam's first step is the rate itself, whatever the gradient; A has none while B is 0."""
    flags = sft_flags(home, tmp_path) + " --max_steps 1 --modules_to_save embeddings"
    flags += f" --loraplus_lr_ratio {b_ratio} --modules_to_save_lr_ratio {saved_ratio}"
    assert call("lora", flags, home) == 0
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    largest = max(t.abs().max().item() for name, t in tensors.items() if ".lora_B." in name)
    assert largest == pytest.approx(b_ratio * 3e-3, rel=1e-3)
    name = "model.embed_tokens.weight"
    moved = tensors[f"base_model.model.{name}"] - load_file(base / "model.safetensors")[name]
    assert moved.abs().max().item() == pytest.approx(saved_ratio * 3e-3, rel=1e-3)


def test_auto_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert choose_dtype("auto", "cpu") == dtype
    assert choose_dtype("float16", "cuda") == "float16"


@pytest.mark.parametrize(
    ("mode", "flops", "has_compiler", "compiles"),
    [
        ("auto", 1.2e14, True, True),
        ("auto", 1.2e14, False, False),  # falls back
        ("auto", 5e13, True, False),  # would not earn it back
        ("on", 5e13, True, True),
        ("off", 2e14, True, False),
    ],
)
@pytest.mark.parametrize("trainable", ["all", "norms"])
def test_blocks_are_compiled_where_it_pays(
    mode: str,
    flops: float,
    has_compiler: bool,
    compiles: bool,
    trainable: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = "/usr/bin/g++" if has_compiler else None
    monkeypatch.setattr(shutil, "which", lambda name: found)
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    model = tiny_model()
    select_trainable(model, trainable)  # which must not decide it
    tokens = flops / 6 / count_parameters(model)[0]
    assert compile_blocks(model, mode, tokens, "cpu") is compiles
    calls = {layer._compiled_call_impl is not None for layer in model.model.layers}
    assert calls == {compiles}


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="session")
def shelf(base: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`out/` with a finished, a stateless and a stopped run."""
    shelf = tmp_path_factory.mktemp("shelf")
    for stage in ("full_sft", "lora"):
        flags = sft_flags(home, shelf / "out")
        with at_step(2, terminate):
            assert call(stage, flags, home) == 130
    shutil.copytree(base, shelf / "out/stateless", ignore=shutil.ignore_patterns("resume"))
    record = record_of(shelf / "out/stateless") | {"status": "running"}
    (shelf / "out/stateless/run.json").write_text(json.dumps(record))
    return shelf


TUNING = ("full_sft", "lora")
REFUSED = [  # what is refused without a run before it stands in test_bad_input.py
    (TUNING, "--save_dir {shelf}/out", " exists: continue it with --from_resume"),
    (TUNING, "--save_dir {shelf}/none --from_resume", " does not exist; leave out --from_resume"),
    (
        ("pretrain",),
        "--save_dir {shelf}/out --run_name stateless --from_resume",
        "no resume/ state",
    ),
    (
        TUNING,
        "--save_dir {shelf}/out --from_resume --learning_rate 1e-3",
        "--from_resume: --learning_rate was 0.003 and is 0.001 now",
    ),
    (("lora",), "--save_dir {shelf}/out --from_resume --lora_rank 4", "--lora_rank was 8 and is 4"),
]


@pytest.mark.parametrize(
    ("stage", "flags", "reason"),
    [(stage, flags, reason) for stages, flags, reason in REFUSED for stage in stages],
)
def test_what_cannot_work_is_one_error(
    base: Path,
    home: Path,
    shelf: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    stage: str,
    flags: str,
    reason: str,
) -> None:
    flags = flags.format(home=home, shelf=shelf)
    if stage == "pretrain":
        common = f"{SHAPE_FLAGS} {CPU} --data_path {home}/text.jsonl --save_dir {tmp_path}"
    else:
        common = sft_flags(home, tmp_path)
    before = {folder: sorted(folder.rglob("*")) for folder in (tmp_path, shelf)}
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: call(stage, f"{common} {flags}", home))
    assert caught.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert reason in lines[0]
    # No run folder, no file of one.
    assert {folder: sorted(folder.rglob("*")) for folder in (tmp_path, shelf)} == before
