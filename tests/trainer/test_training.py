"""The three training scripts on tiny models: what they compute, write and refuse."""

import json
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from pytest import CaptureFixture, MonkeyPatch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from dataset.lm_dataset import StepPlan
from model.checkpoint import TOKENIZER_FILES, load_model, load_tokenizer, save_model
from model.cli import UserError
from model.files import REPO_DIR, file_sha256
from model.generation import Decoding, generate
from model.model_lora import LoraSettings, apply_lora, load_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config, weights_fingerprint
from tests import DEVICE
from tests.trainer.runs import (
    ON_DEVICE,
    SHAPE,
    SHAPE_FLAGS,
    STAGES,
    WEIGHTS,
    at_step,
    bytes_of,
    call,
    exit_code,
    record_of,
    rows_of,
    run_two,
    terminate,
    write_jsonl,
)
from trainer import arguments, train_full_sft, train_lora, trainer_utils
from trainer.trainer_utils import (
    Data,
    Method,
    Session,
    flops_per_token,
    learning_rate_at,
    should_compile,
    train,
)


def sft_flags(home: Path, out: Path) -> str:
    """Six optimizer steps, the last of five samples."""
    return (
        f"{ON_DEVICE} --from_weight {home}/pretrain --save_dir {out} --data_path {home}/sft.jsonl "
        f"--eval_data_path {home}/valid.jsonl --batch_size 8 --learning_rate 3e-3"
    )


def encode_chats(data: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of every conversation, by transformers alone."""
    chats = []
    for record in map(json.loads, data.read_text().splitlines()):
        turns = [{"role": "user", "content": record["instruction"]}]
        turns += [{"role": "assistant", "content": record["output"]}]
        chat = load_tokenizer().apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, answer = torch.tensor(chat["input_ids"]), torch.tensor(chat["assistant_masks"])
        chats.append((ids, ids.where(answer == 1, torch.tensor(-100))))
    return chats


def stack_chats(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All conversations of a file as one padded batch, ids and labels."""
    ids, labels = zip(*encode_chats(data), strict=True)
    pad = nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def mean_loss(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean NLL of the labeled tokens that have one before them."""
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture(scope="module", params=list(STAGES))
def completed(
    home: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path]:
    """A stage and the folder of its run; pretraining's is the base of the others."""
    stage = request.param
    if stage == "pretrain":
        return stage, home / "pretrain"
    out = tmp_path_factory.mktemp("completed")
    flags = f"{sft_flags(home, out)} --epochs 4 --eval_interval 10 --keep_checkpoints 2"
    assert call(stage, flags, home, keeps_state=False) == 0
    return stage, out / stage


@pytest.mark.gpu
def test_run_folder_is_complete(completed: tuple[str, Path]) -> None:
    """Weights with their tokenizer, at the end and half way; no resume file is left."""
    stage, run = completed
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    weights |= {"tokenizer.json", "tokenizer_config.json"}
    if stage == "lora":
        weights = {"adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES[:2]}
    names = weights | {"run.json", "metrics.jsonl"}
    if stage != "pretrain":
        names.add("checkpoints")
        half, end = run / "checkpoints/step_12", run / "checkpoints/step_24"
        assert {path.name for path in end.iterdir()} == weights
        # Not their files: safetensors writes metadata in any order.
        last, final = bytes_of(end / WEIGHTS[stage]), bytes_of(run / WEIGHTS[stage])
        assert last == final != bytes_of(half / WEIGHTS[stage])
    assert {path.name for path in run.iterdir()} == names


@pytest.mark.gpu
def test_record_says_what_was_trained(home: Path, completed: tuple[str, Path]) -> None:
    stage, run = completed
    record = record_of(run)
    assert (record["status"], record["stage"]) == ("completed", stage)
    data = home / ("text.jsonl" if stage == "pretrain" else "sft.jsonl")
    assert record["train_data"]["files"] == [{"name": data.name, "sha256": file_sha256(data)}]
    assert record["settings"]["learning_rate"] == (1e-2 if stage == "pretrain" else 3e-3)
    assert record["adamw"] == {"betas": [0.9, 0.999], "eps": 1e-8}
    assert record["machine"]["versions"]["torch"] == torch.__version__
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    base_size = 6400 * 32 + linears + 5 * 32
    # r = 8 for each linear of the two layers: 8 * (in + out).
    adapter = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert record["trainable_parameters"] == (adapter if stage == "lora" else base_size)
    assert record["parameters"] == base_size + (adapter if stage == "lora" else 0)
    start = None if stage == "pretrain" else weights_fingerprint(load_model(home / "pretrain"))
    assert record["base_fingerprint"] == start


@pytest.mark.gpu
def test_steps_tokens_and_losses_are_counted(home: Path, completed: tuple[str, Path]) -> None:
    stage, run = completed
    record, rows = record_of(run), rows_of(run)
    if stage == "pretrain":
        lines = (home / "text.jsonl").read_text().splitlines()
        total = sum(len(load_tokenizer()(json.loads(t)["text"])["input_ids"]) + 1 for t in lines)
        samples = [32] * (total // 32) + [total % 32] * (total % 32 > 1)
        tokens, labeled = sum(samples), sum(samples) - len(samples)
    else:
        samples = encode_chats(home / "sft.jsonl")
        tokens = sum(len(ids) for ids, _ in samples)
        labeled = sum(int((labels != -100).sum()) for _, labels in samples)
    epochs = 3 if stage == "pretrain" else 4
    assert record["steps"] == epochs * record["steps_per_epoch"] == epochs * -(-len(samples) // 8)
    train_rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, record["steps"] + 1))
    assert set(train_rows[0]) == {"step", "tokens", "loss", "grad_norm", "learning_rate"}
    assert record["tokens"] == train_rows[-1]["tokens"] == epochs * tokens
    assert record["labeled_tokens"] == epochs * record["train_data"]["labeled_tokens"]
    assert record["labeled_tokens"] == epochs * labeled
    evaluated = [row["step"] for row in rows if "eval_loss" in row]
    assert evaluated == ([record["steps"]] if stage == "pretrain" else [10, 20, 24])
    assert record["eval_loss"] == rows[-1]["eval_loss"]
    assert record["train_loss"] == train_rows[-1]["loss"]


def test_flags_are_parsed_without_writing(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """The small world's files are named there, and made when they are loaded."""
    monkeypatch.setattr(arguments, "FILES_DIR", tmp_path / "world")
    parser = arguments.make_stage_parser("", arguments.FULL_SFT)
    args = arguments.parse_args(parser, [], arguments.FULL_SFT)
    assert args.data_path == [tmp_path / "world/sft_world.jsonl"]
    assert args.eval_data_path == [tmp_path / "world/probe_combinations_tune.jsonl"]
    assert not list(tmp_path.iterdir())


def test_run_equals_a_plain_loop_over_transformers_model(home: Path, tmp_path: Path) -> None:
    """Loss, rates, decay, clipping and update, over a batch that is the whole file."""
    flags = sft_flags(home, tmp_path) + " --batch_size 45 --max_steps 6 --learning_rate 8e-3"
    flags += " --lr_schedule linear --warmup_ratio 0.34 --min_lr_ratio 0.25"
    flags += " --weight_decay 0.1 --grad_clip 0.5"
    assert call("full_sft", flags, home) == 0
    rows = rows_of(tmp_path / "full_sft")
    model = LlamaForCausalLM.from_pretrained(home / "pretrain")
    decayed = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_proj.weight")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups)
    ids, labels = stack_chats(home / "sft.jsonl")
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
        loss = mean_loss(model, *stack_chats(home / "valid.jsonl")).item()
    assert rows[-1]["eval_loss"] == pytest.approx(loss, rel=1e-3)


def test_a_method_may_have_its_own_loss(home: Path, tmp_path: Path) -> None:
    """Distillation towards a fixed teacher, by the loop as it is and by hand."""
    torch.manual_seed(1)
    teacher = load_model(home / "pretrain")
    with torch.no_grad():
        teacher.lm_head.weight.add_(0.3 * torch.randn_like(teacher.lm_head.weight))

    def distill(model: nn.Module, batch: dict[str, torch.Tensor], items: int) -> torch.Tensor:
        """Sum KL(teacher || student) over the positions that predict a label, over `items`."""
        places = batch["label_positions"]
        student = model(batch["input_ids"]).logits.flatten(0, 1)[places]
        with torch.no_grad():
            target = teacher(batch["input_ids"]).logits.flatten(0, 1)[places]
        log_ratio = target.log_softmax(-1) - student.log_softmax(-1)
        has_label = (places + 1) % batch["labels"].shape[1] != 0  # a row's end fills up
        return ((target.softmax(-1) * log_ratio).sum(-1) * has_label).sum() / items

    def run(args: Namespace, session: Session, data: Data, method: Method) -> int:
        method.stage = "distillation"
        method.compute_loss = distill
        return train(args, session, data, method)

    flags = f"{sft_flags(home, tmp_path)} --batch_size 15 --accumulation_steps 3 --max_steps 2"
    flags += " --lr_schedule constant --grad_clip 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_full_sft, "train", run)
        assert call("full_sft", flags, home) == 0
    assert record_of(tmp_path / "full_sft")["stage"] == "distillation"

    model = load_model(home / "pretrain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    ids, labels = stack_chats(home / "sft.jsonl")
    is_answer = labels[:, 1:] != -100
    for row in rows_of(tmp_path / "full_sft")[:2]:
        with torch.no_grad():
            target = teacher(ids).logits[:, :-1][is_answer].log_softmax(-1)
        student = model(ids).logits[:, :-1][is_answer].log_softmax(-1)
        loss = nn.functional.kl_div(student, target, log_target=True, reduction="batchmean")
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_adapter_flags_reach_the_adapter(home: Path, tmp_path: Path) -> None:
    """MiniMind's placement, scale and initialization, and whatever else a flag sets."""
    flags = sft_flags(home, tmp_path) + " --max_steps 1 --lora_targets square --lora_rank 8"
    flags += " --lora_alpha 8 --lora_init gaussian --use_rslora --lora_dropout 0.2"
    flags += " --train_tokens <|im_start|> <|im_end|>"
    assert call("lora", flags, home) == 0
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    wanted = {"r": 8, "lora_alpha": 8, "init_lora_weights": "gaussian", "use_rslora": True}
    wanted |= {"lora_dropout": 0.2, "trainable_token_indices": {"embed_tokens": [1, 2]}}
    names = [f"self_attn.{part}_proj" for part in "qo"]
    wanted["target_modules"] = [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]
    assert {name: config[name] for name in wanted} == wanted
    model = load_model(home / "pretrain")
    load_lora(model, tmp_path / "lora")
    with torch.no_grad():  # evaluated without dropout
        loss = mean_loss(model.eval(), *stack_chats(home / "valid.jsonl")).item()
    assert rows_of(tmp_path / "lora")[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_lora_in_bfloat16_leaves_the_base_and_the_residual_stream_alone(
    home: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Full and LoRA training add block outputs up in float32: methods are compared, not types."""
    seen, trained, forward = set(), [], nn.RMSNorm.forward
    before = file_sha256(home / "pretrain/model.safetensors")

    def watch(self: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return forward(self, x)

    monkeypatch.setattr(nn.RMSNorm, "forward", watch)
    monkeypatch.setattr(train_lora, "save_lora", lambda model, *_, **__: trained.append(model))
    flags = f"{sft_flags(home, tmp_path)} --weight_decay 0.1 --max_steps 3 --dtype bfloat16"
    for stage in ("full_sft", "lora"):
        assert call(stage, flags, home) == 0
    assert seen == {torch.float32}
    weights = trained[0].state_dict()
    for name, tensor in load_file(home / "pretrain/model.safetensors").items():
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)), name
    assert any(weights[name].any() for name in weights if ".lora_B" in name)
    assert file_sha256(home / "pretrain/model.safetensors") == before


def test_answers_stand_beside_their_references(
    home: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    path, tokenizer = tmp_path / "d.jsonl", load_tokenizer()
    turns = [("user", "Hi"), ("assistant", "0 1"), ("user", "And?"), ("assistant", "2")]
    messages = [{"role": role, "content": content} for role, content in turns]
    write_jsonl(path, [{"messages": messages}, {"messages": messages[2:]}] * 2)
    start = load_model(home / "pretrain")
    start.config.eos_token_id = 5  # not the tokenizer's
    save_model(start, home / "pretrain", tmp_path / "start")
    flags = f"{sft_flags(home, tmp_path)} --eval_data_path {path} --max_steps 1 --show_answers 2"
    flags += f" --from_weight {tmp_path}/start"
    assert call("full_sft", flags, home) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    answers = [line[1] for line in lines if line[0] == "answer"]
    shown = [line for line in lines if line[0] in ("prompt", "reference")]
    assert [text for _, text in shown] == ["Hi", "0 1", "And?", "2"]
    assert [row["reference"] for row in record_of(tmp_path / "full_sft")["answers"]] == ["0 1", "2"]
    opening = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    model = load_model(tmp_path / "full_sft")
    assert model.config.eos_token_id == 2
    answer = generate(model, [opening], Decoding("greedy"), 0, 96, 1, (2,))[0]
    assert answers[0] == " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())


@pytest.mark.parametrize(
    ("twins", "extra"), [(False, ""), (True, ""), (True, "--train_tokens <|im_end|>")]
)
def test_rare_ends_are_announced(
    home: Path, tmp_path: Path, capsys: CaptureFixture, twins: bool, extra: str
) -> None:
    """Of two tokens with equal rows neither gets above 0.5; alone, a large row gets above 0.99."""
    model, start = load_model(home / "pretrain"), tmp_path / "base"
    with torch.no_grad():
        model.lm_head.weight[2] *= 200
        model.lm_head.weight[7] = model.lm_head.weight[2 if twins else 7]
    save_model(model, home / "pretrain", start)
    flags = f"{sft_flags(home, tmp_path)} --max_steps 1 --from_weight {start} {extra}"
    assert call("lora", flags, home) == 0
    out = capsys.readouterr().out
    assert ("probability of <|im_end|> stays below 0.50" in out) is (twins and not extra)
    assert ("add --train_tokens '<|im_end|>'" in out) is (twins and not extra)


def assert_runs_agree(one: Path, other: Path, weights: str) -> None:
    """The same losses, gradients, counts and, but for rounding, weights."""
    for row, expected in zip(rows_of(one), rows_of(other), strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            tolerance = 1e-3 if name == "grad_norm" else 1e-5
            assert value == pytest.approx(expected[name], rel=tolerance), (name, row["step"])
    for name in ("tokens", "labeled_tokens", "steps", "steps_per_epoch", "flops"):
        assert record_of(one)[name] == record_of(other)[name], name
    tensors, others = load_file(one / weights), load_file(other / weights)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=2e-4, msg=name)


def is_inside(event: object, name: str) -> bool:
    """Whether an operator of this name called that of the event."""
    return event is not None and (event.name == name or is_inside(event.cpu_parent, name))


@pytest.mark.gpu
def test_compiled_run_equals_a_plain_one(home: Path, tmp_path: Path) -> None:
    """On a CPU the graphs are for all batches; a run that was stopped goes on to the same bits."""
    forbid = partial(torch.compiler.set_stance, "fail_on_recompile")
    model = f"--from_weight none {SHAPE_FLAGS} --num_hidden_layers 2"
    for mode in ("on", "off"):
        flags = f"{sft_flags(home, tmp_path / mode)} {model} --use_compile {mode}"
        try:
            assert call("full_sft", flags, home, at_step(1 if DEVICE == "cpu" else 99, forbid)) == 0
        finally:
            torch.compiler.set_stance("default")
    assert_runs_agree(tmp_path / "on/full_sft", tmp_path / "off/full_sft", WEIGHTS["full_sft"])
    flags = f"{sft_flags(home, tmp_path / 'part')} {model} --use_compile on"
    assert call("full_sft", flags, home, at_step(5, terminate)) == 130
    assert call("full_sft", f"{flags} --from_resume", home) == 0
    whole, part = (tmp_path / name / "full_sft" / WEIGHTS["full_sft"] for name in ("on", "part"))
    assert whole.read_bytes() == part.read_bytes()


def test_compiled_code_does_not_depend_on_the_first_batch(home: Path, tmp_path: Path) -> None:
    """It has as many rows as tokens: Dynamo would take the two sizes for one."""
    turns = [{"instruction": "Hi", "output": answer} for answer in ("Yes.", "Yes and no.")]
    size, longer = (len(ids) for ids, _ in encode_chats(write_jsonl(tmp_path / "two", turns)))
    data = write_jsonl(tmp_path / "d.jsonl", [turns[0]] * size + [turns[1]] * size)
    lengths = np.array([size] * size + [longer] * size)
    starts = (StepPlan(lengths, size, seed=seed)[0] for seed in range(99))
    seed = next(i for i, start in enumerate(starts) if lengths[start].max() == size)
    flags = f"{ON_DEVICE} --from_weight none {SHAPE_FLAGS} --num_hidden_layers 1 --use_compile on"
    flags += f" --data_path {data} --save_dir {tmp_path} --batch_size {size} --seed {seed}"
    forbid = partial(torch.compiler.set_stance, "fail_on_recompile")
    try:
        assert call("full_sft", flags, home, at_step(1, forbid)) == 0
    finally:
        torch.compiler.set_stance("default")
    assert record_of(tmp_path / "full_sft")["step"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("full_sft", "--accumulation_steps 2 --weight_decay 0.1"),
        ("lora", "--lora_dropout 0.2 --train_tokens <|im_end|>"),
    ],
)
def test_no_wait_for_the_device_between_log_lines(
    home: Path, tmp_path: Path, stage: str, extra: str, monkeypatch: MonkeyPatch
) -> None:
    """Operators whose result has to reach the host; the log line of step 5 has some.

    A CPU's fused AdamW reads its own counts of steps; CUDA's kernel has them on the device.
    """
    waits, profiles = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero"), []

    def watch(step: int, *schedule: object) -> float:  # is called where a step starts, from 0
        if step in (4, 5):
            profiles[-1].stop()
        if step in (1, 4):
            profiles.append(torch.profiler.profile())
            profiles[-1].start()
        return learning_rate_at(step, *schedule)

    monkeypatch.setattr(trainer_utils, "learning_rate_at", watch)

    flags = f"{sft_flags(home, tmp_path)} --batch_size 4 --max_steps 7 --log_interval 5 {extra}"
    assert call(stage, flags, home) == 0
    reads = []
    for profile in profiles:
        found = [event for event in profile.events() if event.name in waits]
        reads.append(sum(not is_inside(event, "aten::_fused_adamw_") for event in found))
        assert any(event.name == "aten::mm" for event in profile.events())
    assert reads[0] == 0 < reads[1]


def test_two_processes_stop_together_and_go_on(home: Path, tmp_path: Path) -> None:
    """Dropout draws from random states of their own, which both get back."""
    flags = f"{sft_flags(home, tmp_path / 'out')} --batch_size 4 --lora_dropout 0.2"
    flags += " --log_interval 2"
    # The second process alone gets SIGTERM.
    assert run_two("lora", flags, home, at_step(3, terminate)) == [130, 130]
    run, whole = tmp_path / "out/lora", tmp_path / "whole/lora"
    assert (record_of(run)["status"], record_of(run)["step"]) == ("interrupted", 4)
    # One process would split the batches in another way.
    with pytest.raises(UserError, match="--from_resume: processes was 2 and is 1 now"):
        call("lora", flags + " --from_resume", home)
    for given in (flags + " --from_resume", flags.replace("/out ", "/whole ")):
        assert run_two("lora", given, home) == [0, 0]
    assert rows_of(run) == rows_of(whole)
    assert bytes_of(run / WEIGHTS["lora"]) == bytes_of(whole / WEIGHTS["lora"])


# The script as torchrun starts it, but for the cache, which is not the repository's.
SCRIPT = """
import pathlib, runpy, sys
sys.path.insert(0, {repo!r})
from dataset import lm_dataset
lm_dataset.CACHE_DIR = pathlib.Path("cache")
runpy.run_path({repo!r} + "/trainer/train_full_sft.py", run_name="__main__")
"""


def test_torchrun_from_any_folder_equals_one_process(home: Path, tmp_path: Path) -> None:
    """Of 1 sample in the last batch, and for the validation, the second process has none."""
    (tmp_path / "valid.jsonl").write_text((home / "valid.jsonl").read_text().splitlines()[3] + "\n")
    flags = f"{sft_flags(home, tmp_path / 'one')} --weight_decay 0.1 --max_train_samples 17"
    flags += f" --eval_data_path {tmp_path}/valid.jsonl"
    assert call("full_sft", flags, home) == 0
    (tmp_path / "home").symlink_to(home)
    (tmp_path / "script.py").write_text(SCRIPT.format(repo=str(REPO_DIR)))
    flags = flags.replace(f"{home}/", "home/").replace(str(tmp_path / "one"), "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "script.py", *flags.split()]
    command += ["--batch_size", "2", "--accumulation_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert record_of(tmp_path / "two/full_sft")["processes"] == 2
    assert_runs_agree(tmp_path / "one/full_sft", tmp_path / "two/full_sft", WEIGHTS["full_sft"])


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        # 10 steps, 2 of warm-up, peak 8, floor 2: the way down takes steps 2 to 9.
        ("cosine", 0, 4.0),
        ("cosine", 2, 8.0),
        ("cosine", 9, 2.0),
        ("cosine", 4, 2 + 6 * (1 + 0.6234898018587336) / 2),  # cos(2 pi / 7)
        ("constant", 9, 8.0),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert learning_rate_at(step, 10, 8.0, schedule, 0.2, 0.25) == pytest.approx(expected)
    for warmup in (0.0, 1.0):  # a single step takes the peak
        assert learning_rate_at(0, 1, 3.0, schedule, warmup, 0.1) == 3.0


def make_model() -> MiniMindForCausalLM:
    return MiniMindForCausalLM(minimind_config(**SHAPE))


def test_flops_by_hand() -> None:
    model, lengths = make_model(), torch.tensor([100, 300]).numpy()
    size = 6400 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 5 * 32
    attention = 6 * 2 * 32 * 250  # the mean token's text has (100² + 300²) / 400
    assert flops_per_token(model, lengths) == 6 * size + attention
    apply_lora(model, LoraSettings(rank=2, targets="square"))
    adapter = 2 * 2 * 2 * (32 + 32)
    assert flops_per_token(model, lengths) == 4 * (size + adapter) + 2 * adapter + attention


def test_first_step_moves_each_by_its_own_rate(home: Path, tmp_path: Path) -> None:
    """Adam's first step is the rate itself, whatever the gradient; A has none while B is 0."""
    flags = sft_flags(home, tmp_path) + " --max_steps 1 --modules_to_save embeddings norms"
    flags += " --loraplus_lr_ratio 16 --modules_to_save_lr_ratio 0.5"
    assert call("lora", flags, home) == 0
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    largest = max(t.abs().max().item() for name, t in tensors.items() if ".lora_B." in name)
    assert largest == pytest.approx(16 * 3e-3, rel=1e-3)
    before = load_file(home / "pretrain/model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        moved = tensors[f"base_model.model.{name}"] - before[name]
        assert moved.abs().max().item() == pytest.approx(0.5 * 3e-3, rel=1e-2)


def test_runs_of_two_precisions_in_one_process(home: Path, tmp_path: Path) -> None:
    """accelerate keeps the first one's precision for the process, if nobody resets it."""
    for dtype in ("bfloat16", "float32"):
        flags = f"{sft_flags(home, tmp_path / dtype)} --max_steps 1 --dtype {dtype}"
        assert call("full_sft", flags, home) == 0
        assert AcceleratorState().mixed_precision == {"bfloat16": "bf16", "float32": "no"}[dtype]


@pytest.mark.parametrize(
    ("mode", "flops", "compiler", "compiles"),
    [
        ("auto", 2.4e13, "g++", True),
        ("auto", 2.4e13, None, False),  # falls back
        ("auto", 1e13, "g++", False),  # would not earn it back
        ("on", 1e13, "g++", True),
        ("off", 4e13, "g++", False),
    ],
)
def test_loss_is_compiled_where_it_pays(
    mode: str, flops: float, compiler: str | None, compiles: bool, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_utils.shutil, "which", lambda _: compiler)
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "Python.h")
    assert should_compile(mode, "cpu", flops) is compiles


def test_compiling_without_a_compiler_is_refused(
    home: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_utils.shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=r"--use_compile on: needs \S+ and Python.h; install"):
        call("full_sft", f"{sft_flags(home, tmp_path)} --use_compile on", home)
    assert not (tmp_path / "full_sft").exists()


REFUSED = {  # flags beside those of a good run -> the error's words
    "pretrain": {
        "--batch_size 0": "argument --batch_size: 0: must lie between 1 and",
        "--max_steps 3 --epochs 2": "--epochs and --max_steps: contradict each other; give one",
        "--eval_interval 5": "--eval_interval: needs --eval_data_path",
        "--report_to wandb": "--report_to wandb: is not installed; pip install wandb",
        "--from_resume --overwrite": "contradict each other; give one",
        "--lr_schedule constant --min_lr_ratio 0.5": "--min_lr_ratio: --lr_schedule constant has",
        "--run_name ../x": "--run_name or --lora_name '../x': must be a plain folder name",
        "--dtype float16": "--dtype float16: needs CUDA, not cpu; use bfloat16 or float32",
        "--from_weight x.pth": "convert it to a folder by trainer/convert_minimind.py",
        "--from_resume": "resume.pt; drop it or use --overwrite",
        "--data_path {home}/none.jsonl": "{home}/none.jsonl: no such file",
        "--save_dir {home}/text.jsonl/out": "Not a directory: ",
        "--run_name {home.name} --save_dir {home}/.. --overwrite": "reads {home}/text.jsonl; give",
    },
    "full_sft": {
        "--hidden_size 64": "--hidden_size 64: the weights have 32; drop the flag",
        "--max_train_samples 99": "--max_train_samples 99: the data have 45",
        "--trainable norms --weight_decay 0.1": "--weight_decay 0.1: acts on no weight that trains",
        "--run_name pretrain --save_dir {home}": "pretrain exists: give another name, --from",
        "--run_name pretrain --save_dir {home} --overwrite": "reads {home}/pretrain; give",
        "--run_name cache --save_dir {home} --overwrite": "cache is no run's folder; give another",
    },
    "lora": {
        "--from_weight none": "--from_weight none: random weights; name a pretrained folder",
        "--lora_rank 0 --lora_alpha 8 --modules_to_save norms": "--lora_rank 0 adapts no matrix",
        "--modules_to_save_lr_ratio 2": "--modules_to_save_lr_ratio: is of --modules_to_save; drop",
        "--train_tokens <|nose|>": "--train_tokens <|nose|>: no single token of the vocabulary",
    },
}


@pytest.mark.parametrize(
    ("stage", "flags"), [(stage, flags) for stage in REFUSED for flags in REFUSED[stage]]
)
def test_what_cannot_work_is_one_error(
    home: Path, tmp_path: Path, capfd: CaptureFixture, stage: str, flags: str
) -> None:
    common = sft_flags(home, tmp_path).replace("--batch_size 8", "")
    if stage == "pretrain":
        common = f"{SHAPE_FLAGS} {ON_DEVICE} --data_path {home}/text.jsonl --save_dir {tmp_path}"
    reason, given = REFUSED[stage][flags].format(home=home), flags.format(home=home)
    capfd.readouterr()
    code = exit_code(lambda words: call(stage, " ".join(words), home), [common, given])
    errors = capfd.readouterr().err
    assert code == 2 and "Traceback" not in errors
    assert "error: " in errors.splitlines()[-1] and reason in errors.splitlines()[-1]
    assert not [path for path in tmp_path.rglob("*") if path.suffix != ".lock"]  # no run folder


def test_sample_is_shown_and_nothing_is_written(
    home: Path, tmp_path: Path, capfd: CaptureFixture
) -> None:
    """Each label stands in the row of the token before it."""
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"instruction": "a\x1b[2J\u202e", "output": "No"}) + "\n")
    flags = sft_flags(home, tmp_path / "out") + f" --data_path {data} --show_sample"
    with pytest.raises(SystemExit, match="0"):
        call("full_sft", flags, home)
    out = capfd.readouterr().out
    base, _, *rows = out.splitlines()
    assert "'\\x1b'" in out and all(map(str.isprintable, rows)) and f"base: {home}/" in base
    predicted = [line.split()[-1] for line in rows]
    assert predicted[-4:] == ["'No'", "'<|im_end|>'", "-", "-"] and set(predicted[:-4]) == {"-"}
    assert not (tmp_path / "out").exists()
