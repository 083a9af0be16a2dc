"""Input that cannot be used, and files that want to do more than be read.

Every case of the table ends in one line that says what is wrong, where, and what to do; in exit
code 2; and with nothing written. `...` in an expected line stands for words of a library.
"""
# ruff: noqa: E501 (the table is read by its lines)

import codecs
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_llm
from dataset import demo, prepare
from dataset.command_line import REPO_DIR
from dataset.jsonl import DataError
from dataset.lm_dataset import IGNORE_INDEX, load_dataset, load_tokens
from dataset.untrusted import error_line, parse_json, shown
from evaluation import calibrate, report, run_study, update_analysis
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model, weights_fingerprint
from model.model_lora import LoraSettings, apply_lora, save_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config
from tests.test_training import CPU, SHAPE, SHAPE_FLAGS, call
from tests.tiny import exit_code
from trainer import train_tokenizer

# ---------------------------------------------------------------- good files, to be spoiled

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def chat(*roles: str) -> bytes:
    """A conversation of these roles."""
    return jsonl({"conversations": [{"role": role, "content": "x"} for role in roles]})


def turn(**fields: object) -> bytes:
    """A conversation whose answer has other fields."""
    return jsonl({"conversations": [TURNS[0], TURNS[1] | fields]})


TEXT, CHAT = jsonl({"text": "fine"}), chat("user", "assistant")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, a base with random weights, another one, and an adapter."""
    home = tmp_path_factory.mktemp("good")
    (home / "text.jsonl").write_bytes(TEXT * 3)
    (home / "chat.jsonl").write_bytes(CHAT * 3)
    (home / "prompts.md").write_text('## S\n\n### a\n\n> Hi\n\n- reference: "Yes"\n')
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        model = MiniMindForCausalLM(minimind_config(**SHAPE))
        save_model(model, TOKENIZER_DIR, home / name)
    settings, fingerprint = LoraSettings(rank=2, targets="square"), weights_fingerprint(model)
    apply_lora(model, settings)
    save_lora(model, settings, home / "adapter", str(home / "other"), fingerprint)
    return home


def edited(name: str, **changes: object) -> Callable[[Path, Path], None]:
    """A copy of the base (or adapter) in which a JSON file has other values; None removes one."""

    def make(home: Path, tmp: Path) -> None:
        folder = name.partition("/")[0]
        shutil.copytree(home / folder, tmp / folder)
        content = json.loads((tmp / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (tmp / name).write_text(json.dumps(content))

    return make


def replaced(name: str, content: bytes) -> Callable[[Path, Path], None]:
    """A copy of the base (or adapter) in which a file has this content."""

    def make(home: Path, tmp: Path) -> None:
        folder = name.partition("/")[0]
        shutil.copytree(home / folder, tmp / folder)
        (tmp / name).write_bytes(content)

    return make


def cut(name: str, share: float) -> Callable[[Path, Path], None]:
    """A copy of a folder, or of a file, of which only the first part is left."""

    def make(home: Path, tmp: Path) -> None:
        content = (home / name).read_bytes()
        content = content[: int(len(content) * share)]
        if "/" in name:
            replaced(name, content)(home, tmp)
        else:
            (tmp / name).write_bytes(content)

    return make


def weights(name: str, **changes: torch.Tensor | None) -> Callable[[Path, Path], None]:
    """A copy of a folder whose safetensors file has other tensors; None removes one.

    Double underscores stand for the dots of a tensor's name.
    """

    def make(home: Path, tmp: Path) -> None:
        folder = name.partition("/")[0]
        shutil.copytree(home / folder, tmp / folder)
        tensors = load_file(tmp / name)
        tensors |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
        save_file(
            {key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp / name
        )

    return make


def file(name: str, content: bytes) -> Callable[[Path, Path], None]:
    """A file of this content."""

    def make(home: Path, tmp: Path) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content)

    return make


def nothing(home: Path, tmp: Path) -> None:
    """The flags alone are wrong."""


def attack(template: str) -> Callable[[Path, Path], None]:
    """A base whose tokenizer brings this chat template."""
    return edited("base/tokenizer_config.json", chat_template=template)


# ---------------------------------------------------------------- the table

COMMANDS = {
    "pretrain": f"{SHAPE_FLAGS} {CPU} --data_path {{home}}/text.jsonl --save_dir {{tmp}}/out",
    "full_sft": f"{CPU} --from_weight {{home}}/base --data_path {{home}}/chat.jsonl "
    "--save_dir {tmp}/out",
    "lora": f"{CPU} --from_weight {{home}}/base --data_path {{home}}/chat.jsonl "
    "--save_dir {tmp}/out",
    "train_tokenizer": "--data_path {home}/text.jsonl --output_dir {tmp}/out",
    "prepare": "--output_dir {tmp}/out",
    "demo": "--output_dir {tmp}/out",
    "eval_llm": "--device cpu --prompts {home}/prompts.md --decoding greedy --max_new_tokens 2 "
    "--output_dir {tmp}/out",
    "update_analysis": "--base {home}/base",
    "calibrate": "--prompts {home}/prompts.md --output {tmp}/out/calibration.json",
    "report": "--root {tmp}",
    "run_study": "",
}
DATA, PACKED = "--data_path {tmp}/d.jsonl", "--data_path {tmp}/d.jsonl.gz"
BASE = "--from_weight {tmp}/base"
PROBE, PROMPTS = "--model {home}/base", "--model {home}/base --prompts {tmp}/p.md"
WHERE = "{tmp}/d.jsonl:4:"  # of what data() puts behind two good records and an empty line


def data(line: bytes, good: bytes) -> Callable[[Path, Path], None]:
    """A file whose fourth line is `line`."""
    return file("d.jsonl", good * 2 + b"\n" + line.rstrip(b"\n") + b"\n" + good)


# One case after the other, two lines each: what is done, and what is said.
# fmt: off
CASES = [
    # (name, script, flags, what is made) and the line after "error: "
    # ---- a data file as such
    ("no file", "pretrain", DATA, nothing,
     "{tmp}/d.jsonl: no such file; check the flag that names it"),
    ("no validation file", "full_sft", "--eval_data_path {tmp}/v.jsonl", nothing,
     "{tmp}/v.jsonl: no such file; check the flag that names it"),
    ("a folder", "full_sft", "--data_path {tmp}", nothing,
     "{tmp}: is a folder; name the JSONL files in it"),
    ("no regular file", "pretrain", "--data_path /dev/null", nothing,
     "/dev/null: no regular file; copy the data into one, since it is read twice"),
    ("unreadable", "pretrain", "--data_path /proc/self/mem", nothing,
     "/proc/self/mem: cannot be read (Input/output error); check the file"),
    ("empty", "pretrain", DATA, file("d.jsonl", b""),
     "{tmp}/d.jsonl: holds no record; expected one JSON object a line"),
    ("empty lines", "full_sft", DATA, file("d.jsonl", b"\n \r\n\t\n"),
     "{tmp}/d.jsonl: holds no record; expected one JSON object a line"),
    ("empty gzip", "pretrain", PACKED, file("d.jsonl.gz", gzip.compress(b"")),
     "{tmp}/d.jsonl.gz: holds no record; expected one JSON object a line"),
    ("gzip cut off", "pretrain", PACKED, file("d.jsonl.gz", gzip.compress(TEXT * 9)[:-9]),
     "{tmp}/d.jsonl.gz:10: the gzip stream is broken or cut off (...); download or compress it again"),
    ("gzip damaged", "full_sft", PACKED, file("d.jsonl.gz", gzip.compress(CHAT)[:-8] + bytes(8)),
     "{tmp}/d.jsonl.gz:2: not gzip or damaged (CRC check failed...); rename a plain file to .jsonl, get a damaged one again"),
    ("plain text called gzip", "pretrain", PACKED, file("d.jsonl.gz", TEXT),
     "{tmp}/d.jsonl.gz:1: not gzip or damaged (Not a gzipped file (b'{{\"')); rename a plain file to .jsonl, get a damaged one again"),
    ("gzip called plain text", "pretrain", DATA, file("d.jsonl", gzip.compress(TEXT)),
     "{tmp}/d.jsonl:1: is gzip; give it a name that ends in .gz"),
    ("zip", "pretrain", DATA, file("d.jsonl", b"PK\x03\x04\x14"),
     "{tmp}/d.jsonl:1: is a zip file; unpack it"),
    ("parquet", "full_sft", DATA, file("d.jsonl", b"PAR1\x15\x04"),
     "{tmp}/d.jsonl:1: is a parquet file; write it as JSONL first"),
    ("UTF-16 with mark", "pretrain", DATA, file("d.jsonl", TEXT.decode().encode("utf-16")),
     "{tmp}/d.jsonl:1: is UTF-16; convert it to UTF-8"),
    ("UTF-16 without mark", "full_sft", DATA, file("d.jsonl", CHAT.decode().encode("utf-16-be")),
     "{tmp}/d.jsonl:1: holds NUL bytes; convert UTF-16 to UTF-8, get a damaged file anew"),
    ("Latin-1", "pretrain", DATA, data('{"text": "café"}'.encode("latin-1"), TEXT),
     f"{WHERE} not UTF-8 (invalid continuation byte at byte 14); convert the file"),
    ("NUL bytes", "pretrain", DATA, data(bytes(512), TEXT),
     f"{WHERE} holds NUL bytes; convert UTF-16 to UTF-8, get a damaged file anew"),
    ("program", "full_sft", DATA, file("d.jsonl", b"\x7fELF\x02\x01\x01"),
     "{tmp}/d.jsonl:1: broken JSON (Expecting value at column 1); mend or remove the line"),
    ("one endless line", "pretrain", PACKED, file("d.jsonl.gz", gzip.compress(bytes(2**26 + 1), 1)),
     "{tmp}/d.jsonl.gz:1: longer than 64 MiB; is it one record a line?"),
    ("one JSON list", "full_sft", DATA, file("d.jsonl", b"[" + CHAT.strip() + b"]"),
     "{tmp}/d.jsonl:1: expected a JSON object, found list; write one a line"),
    # ---- a line
    ("JSON cut off", "pretrain", DATA, data(b'{"text": "fi', TEXT),
     f"{WHERE} broken JSON (Unterminated string starting at column 10); mend or remove the line"),
    ("JSON broken in validation", "full_sft", "--eval_data_path {tmp}/d.jsonl", data(b'{"conversations": [}', CHAT),
     f"{WHERE} broken JSON (Expecting value at column 20); mend or remove the line"),
    ("JSON of a tokenizer's data", "train_tokenizer", DATA, data(b"{'text': 1}", TEXT),
     f"{WHERE} broken JSON (Expecting property name enclosed in double quotes at column 2); mend or remove the line"),
    ("two records on a line", "pretrain", DATA, data(TEXT.strip() * 2, TEXT),
     f"{WHERE} broken JSON (Extra data at column 17); mend or remove the line"),
    ("old Mac line ends", "pretrain", DATA, file("d.jsonl", TEXT.replace(b"\n", b"\r") * 2),
     "{tmp}/d.jsonl:1: broken JSON (Extra data at column 18); mend or remove the line"),
    ("nested without end", "pretrain", DATA, data(b"[" * 100_000, TEXT),
     f"{WHERE} broken JSON (nested too deeply); mend or remove the line"),
    ("no object", "pretrain", DATA, data(b'"fine"', TEXT),
     f"{WHERE} expected a JSON object, found str; write one a line"),
    ("name given twice", "pretrain", DATA, data(b'{"text": "a", "text": "b"}', TEXT),
     f"{WHERE} broken JSON (the name 'text' is given twice); mend or remove the line"),
    ("NaN", "pretrain", DATA, data(b'{"text": "a", "score": NaN}', TEXT),
     f"{WHERE} broken JSON (NaN is no JSON number); mend or remove the line"),
    ("endless number", "full_sft", DATA, data(b'{"id": ' + b"1" * 5000 + b"}", CHAT),
     f"{WHERE} broken JSON (Exceeds the limit (4300 digits) for integer string conversion...); mend or remove the line"),
    ("half a surrogate pair", "pretrain", DATA, data(b'{"text": "a \\ud83d b"}', TEXT),
     f"{WHERE} holds half a surrogate pair; mend the line"),
    # ---- a pretraining record
    ("no text", "pretrain", DATA, data(jsonl({"body": "x"}), TEXT),
     f'{WHERE} no field "text"; pretraining reads {{{{"text": ...}}}}'),
    ("chat to pretraining", "pretrain", DATA, data(CHAT, TEXT),
     f'{WHERE} no field "text" (a conversation: is this a fine-tuning file?); pretraining reads {{{{"text": ...}}}}'),
    ("text of another type", "pretrain", DATA, data(jsonl({"text": 3}), TEXT),
     f'{WHERE} "text" must be a non-empty string; mend or remove the record'),
    ("null text", "train_tokenizer", DATA, data(jsonl({"text": None}), TEXT),
     f'{WHERE} "text" must be a non-empty string; mend or remove the record'),
    ("blank text", "pretrain", DATA, data(jsonl({"text": " \n\t"}), TEXT),
     f'{WHERE} "text" must be a non-empty string; mend or remove the record'),
    # ---- a conversation
    ("text to fine-tuning", "lora", DATA, data(TEXT, CHAT),
     f'{WHERE} no field "conversations" (a pretraining file?); fine-tuning reads "conversations", "messages" or "instruction"/"output"'),
    ("instruction alone", "full_sft", DATA, data(jsonl({"instruction": "x"}), CHAT),
     f'{WHERE} no field "conversations"; fine-tuning reads "conversations", "messages" or "instruction"/"output"'),
    ("instruction of another type", "full_sft", DATA, data(jsonl({"instruction": "x", "input": None, "output": "y"}), CHAT),
     f'{WHERE} "instruction", "input" and "output" must be strings; mend the record'),
    ("blank output", "full_sft", DATA, data(jsonl({"instruction": "x", "output": " "}), CHAT),
     f'{WHERE} message 2 (assistant) needs a non-empty string "content"'),
    ("two forms at once", "full_sft", DATA, data(jsonl({"conversations": TURNS, "messages": TURNS}), CHAT),
     f"{WHERE} holds conversations and messages; keep one of them"),
    ("no list", "full_sft", DATA, data(jsonl({"conversations": "hi"}), CHAT),
     f"{WHERE} the conversation must be a non-empty list of messages"),
    ("empty list", "full_sft", DATA, data(jsonl({"messages": []}), CHAT),
     f"{WHERE} the conversation must be a non-empty list of messages"),
    ("no message", "full_sft", DATA, data(jsonl({"messages": ["hi"]}), CHAT),
     f"{WHERE} message 1 must be an object with role and content"),
    ("content of another type", "full_sft", DATA, data(turn(content=["x"]), CHAT),
     f'{WHERE} message 2 (assistant) needs a non-empty string "content"'),
    ("blank content", "full_sft", DATA, data(turn(content="\n "), CHAT),
     f'{WHERE} message 2 (assistant) needs a non-empty string "content"'),
    ("unknown role", "full_sft", DATA, data(chat("user", "robot"), CHAT),
     f"{WHERE} message 2 has role 'robot'; known: system, user, assistant"),
    ("role of another type", "full_sft", DATA, data(turn(role={"a": 1}), CHAT),
     f"{WHERE} message 2 has role {{{{'a': 1}}}}; known: system, user, assistant"),
    ("ShareGPT's names", "lora", DATA, data(jsonl({"conversations": [{"from": "human", "value": "x"}]}), CHAT),
     f"{WHERE} message 1 has role None; known: system, user, assistant"),
    ("two users in a row", "full_sft", DATA, data(chat("user", "user", "assistant"), CHAT),
     f"{WHERE} message 2 is the user's, expected the assistant's"),
    ("assistant first", "full_sft", DATA, data(chat("assistant", "user"), CHAT),
     f"{WHERE} message 1 is the assistant's, expected the user's"),
    ("no answer", "full_sft", DATA, data(chat("system", "user"), CHAT),
     f"{WHERE} ends with the user's message; the assistant must be last"),
    ("system alone", "full_sft", DATA, data(chat("system"), CHAT),
     f"{WHERE} ends with the system's message; the assistant must be last"),
    ("system in the middle", "full_sft", DATA, data(chat("user", "assistant", "system", "user"), CHAT),
     f"{WHERE} message 3 is the system's, expected the user's"),
    ("tool calls", "full_sft", DATA, data(turn(tool_calls=[{"name": "f"}]), CHAT),
     f'{WHERE} message 2: "tool_calls" is not read; convert or remove it'),
    ("weighted answers", "full_sft", DATA, data(turn(weight=0), CHAT),
     f'{WHERE} message 2: "weight" is not read; convert or remove it'),
    ("system beside the turns", "full_sft", DATA, data(jsonl({"system": "Be kind.", "messages": TURNS}), CHAT),
     f'{WHERE} "system" is not read; convert or remove it'),
    ("history beside the turns", "full_sft", DATA, data(jsonl({"history": [["a", "b"]], "instruction": "x", "output": "y"}), CHAT),
     f'{WHERE} "history" is not read; convert or remove it'),
    ("every sample beyond the length", "full_sft", "--max_seq_len 3", nothing,
     "{home}/chat.jsonl: no sample keeps an assistant token within 3 tokens; raise --max_seq_len"),
    # ---- raw corpora
    ("raw JSON cut off", "prepare", "dolly --source {tmp}/d.jsonl", file("d.jsonl", b'{"instruction": "x", '),
     "{tmp}/d.jsonl, line 1: broken JSON (Expecting property name enclosed in double quotes at column 22); repair or remove the line"),
    ("raw gzip cut off", "prepare", "dolly --source {tmp}/d.jsonl.gz", file("d.jsonl.gz", gzip.compress(b"\n")[:-5]),
     "{tmp}/d.jsonl.gz: damaged gzip file (...); download it again"),
    ("raw number without end", "prepare", "dolly --source {tmp}/d.jsonl", file("d.jsonl", b"1" * 5000),
     "{tmp}/d.jsonl, line 1: broken JSON (Exceeds the limit...); repair or remove the line"),
    ("raw nested without end", "prepare", "alpaca --source {tmp}/d.json", file("d.json", b"[" * 100_000),
     "{tmp}/d.json: broken JSON (nested too deeply); expected one JSON list (name a file of JSON lines *.jsonl)"),
    ("raw field missing", "prepare", "dolly --source {tmp}/d.jsonl", file("d.jsonl", TEXT),
     "{tmp}/d.jsonl, line 1: no field 'instruction' (it has ['text']); is this the right corpus?"),
    ("raw entities without end", "prepare", "medquad --source {tmp}/d.xml", file("d.xml", b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>'),
     "{tmp}/d.xml: has a DOCTYPE, which no MedQuAD file has; remove the file"),
    ("rule that a corpus has not", "prepare", "dolly --source {tmp}/d.jsonl --min_chars 9", nothing,
     "--min_chars does nothing for dolly; leave it out"),
    ("held-out share NaN", "prepare", "dolly --source {tmp}/d.jsonl --valid_fraction nan", nothing,
     "--valid_fraction nan: must lie between 0 and 1"),
    # ---- numbers
    ("rate NaN", "pretrain", "--learning_rate nan", nothing,
     "--learning_rate nan: must be a positive number"),
    ("rate infinite", "lora", "--learning_rate inf", nothing,
     "--learning_rate inf: must be a positive number"),
    ("rate 0", "full_sft", "--learning_rate 0", nothing,
     "--learning_rate 0.0: must be a positive number"),
    ("no number", "pretrain", "--batch_size four", nothing,
     "argument --batch_size: invalid int value: 'four'; --help explains the flags"),
    ("batch below 1", "pretrain", "--batch_size -4", nothing,
     "--batch_size -4: must be a positive number"),
    ("accumulation 0", "full_sft", "--accumulation_steps 0", nothing,
     "--accumulation_steps 0: must be a positive number"),
    ("epochs infinite", "pretrain", "--epochs inf", nothing,
     "--epochs inf: must be a positive number"),
    ("no steps", "lora", "--max_steps 0", nothing,
     "--max_steps 0: must be 1 or more"),
    ("no samples", "full_sft", "--max_train_samples 0", nothing,
     "--max_train_samples 0: must be 1 or more"),
    ("more samples than there are", "lora", "--max_train_samples 9999", nothing,
     "--max_train_samples 9999: the data have ... conversations; lower it or drop it"),
    ("samples of a pretraining", "pretrain", "--max_train_samples 5", nothing,
     "unrecognized arguments: --max_train_samples 5; --help explains the flags"),
    ("negative decay", "pretrain", "--weight_decay -0.1", nothing,
     "--weight_decay -0.1: must be 0 or more"),
    ("clip NaN", "full_sft", "--grad_clip nan", nothing,
     "--grad_clip nan: must be 0 or more"),
    ("warm-up above 1", "pretrain", "--warmup_ratio 1.5", nothing,
     "--warmup_ratio 1.5: must lie between 0 and 1"),
    ("last rate NaN", "pretrain", "--min_lr_ratio nan", nothing,
     "--min_lr_ratio nan: must lie between 0 and 1"),
    ("log never", "full_sft", "--log_interval 0", nothing,
     "--log_interval 0: must be 1 or more"),
    ("length 1", "pretrain", "--max_seq_len 1", nothing,
     "--max_seq_len 1: must be 2 or more"),
    ("longer than the model", "full_sft", "--max_seq_len 32769", nothing,
     "--max_seq_len 32769: the model takes 32768 at most"),
    ("seed below 0", "pretrain", "--seed -1", nothing,
     "--seed -1: must lie between 0 and 4294967295"),
    ("rank below 0", "lora", "--lora_rank -1", nothing,
     "--lora_rank -1: must be 0 or more"),
    ("rank above a matrix's", "lora", "--lora_rank 17", nothing,
     "--lora_rank 17: model.layers.0.self_attn.k_proj is (16, 32), so its rank is 1 to 16"),
    ("alpha NaN", "lora", "--lora_alpha nan", nothing,
     "--lora_alpha nan: must be a positive number"),
    ("dropout 1", "lora", "--lora_dropout 1", nothing,
     "--lora_dropout 1.0: must lie in [0, 1)"),
    ("LoRA+ ratio 0", "lora", "--loraplus_lr_ratio 0", nothing,
     "--loraplus_lr_ratio 0.0: must be a positive number"),
    ("ratio NaN", "lora", "--modules_to_save norms --modules_to_save_lr_ratio nan", nothing,
     "--modules_to_save_lr_ratio nan: must be a positive number"),
    ("rate of no parts", "lora", "--modules_to_save_lr_ratio 2", nothing,
     "--modules_to_save_lr_ratio 2.0: no part has this rate; name some by --modules_to_save"),
    ("rate beside no other", "lora", "--lora_rank 0 --modules_to_save norms --modules_to_save_lr_ratio 2", nothing,
     "--modules_to_save_lr_ratio 2.0: nothing else trains; give their rate as --learning_rate"),
    ("vocabulary below the bytes", "train_tokenizer", "--vocab_size 258", nothing,
     "--vocab_size 258: must be 259 (256 bytes and 3 special tokens) to 1048576"),
    # ---- shapes
    ("size 0", "pretrain", "--hidden_size 0", nothing,
     "--hidden_size 0: must be a positive number"),
    ("heads that do not divide", "pretrain", "--hidden_size 33", nothing,
     "hidden_size 33: must be a multiple of twice num_attention_heads 2"),
    ("odd heads", "pretrain", "--hidden_size 6", nothing,
     "hidden_size 6: must be a multiple of twice num_attention_heads 2"),
    ("key heads that do not divide", "pretrain", "--num_key_value_heads 3", nothing,
     "num_attention_heads 2: must be a multiple of num_key_value_heads 3"),
    ("another width than the weights'", "full_sft", "--hidden_size 64", nothing,
     "--hidden_size 64: {home}/base has 32; drop the flag"),
    ("another kind than the weights", "lora", "--qk_norm", nothing,
     "--qk_norm True: {home}/base has False; drop the flag"),
    # ---- names
    ("unknown target", "lora", "--lora_targets q_proj,x_proj", nothing,
     "--lora_targets: no linear is called 'x_proj'; use square, attention, mlp, all-linear or names among down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, several joined by commas"),
    ("unknown part", "full_sft", "--trainable norms,nose", nothing,
     "--trainable 'nose': known are all, square, attention, mlp, embeddings, norms, frozen-embeddings"),
    ("unknown module", "lora", "--modules_to_save nose", nothing,
     "--modules_to_save: 'nose' names no embedding or norm (of several, give each as a word); linears are adapted or, in full fine-tuning, trained with --trainable"),
    ("unknown token", "lora", "--train_tokens <|nose|>", nothing,
     "--train_tokens <|nose|>: no single token of {home}/base"),
    ("unknown schedule", "pretrain", "--lr_schedule sine", nothing,
     "argument --lr_schedule: invalid choice: 'sine' (choose from ...); --help explains the flags"),
    ("unknown tracker", "pretrain", "--report_to pigeon", nothing,
     "--report_to pigeon: no tracker installed here; use none..., or install it with pip"),
    ("run name with a path", "full_sft", "--run_name ../../x", nothing,
     "--run_name or --lora_name '../../x': must be a plain folder name of at most 200 bytes"),
    ("run name of the parent", "lora", "--lora_name ..", nothing,
     "--run_name or --lora_name '..': must be a plain folder name of at most 200 bytes"),
    ("run name that steers a terminal", "full_sft", "--run_name a\x1b[2Jb", nothing,
     "--run_name or --lora_name 'a\\x1b[2Jb': must be a plain folder name of at most 200 bytes"),
    ("run name too long", "full_sft", "--run_name " + "x" * 201, nothing,
     "--run_name or --lora_name 'xxxxxxxxxxxx...xxxxxxxxxxxxx': must be a plain folder name of at most 200 bytes"),
    ("save_dir is a file", "pretrain", "--save_dir {home}/text.jsonl", nothing,
     "--save_dir: {home}/text.jsonl is no folder; choose another one"),
    ("output_dir is a file", "train_tokenizer", "--output_dir {home}/text.jsonl", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    ("run that exists", "full_sft", "", file("out/full_sft/run.json", b"{}"),
     "{tmp}/out/full_sft exists: replace it with --overwrite, or choose another name"),
    # ---- flags that contradict each other, or that would be ignored
    ("another stage's flag", "full_sft", "--lora_rank 8", nothing,
     "unrecognized arguments: --lora_rank 8; --help explains the flags"),
    ("abbreviation", "pretrain", "--batch 4", nothing,
     "unrecognized arguments: --batch 4; --help explains the flags"),
    ("continue and overwrite", "full_sft", "--from_resume --overwrite", nothing,
     "--from_resume and --overwrite contradict each other; give one"),
    ("epochs and steps", "lora", "--epochs 3 --max_steps 10", nothing,
     "--epochs 3.0: --max_steps says when to stop; drop one of both"),
    ("last rate of a constant one", "pretrain", "--lr_schedule constant --min_lr_ratio 0.2", nothing,
     "--min_lr_ratio 0.2: --lr_schedule constant has no last rate; drop one of both"),
    ("evaluation of nothing", "full_sft", "--eval_interval 5", nothing,
     "--eval_interval needs --eval_data_path beside --data_path"),
    ("decay that falls on nothing", "full_sft", "--trainable norms --weight_decay 0.1", nothing,
     "--weight_decay 0.1: acts on matrices outside the embedding, of which none trains; drop it"),
    ("adapter of random weights", "lora", "--from_weight none", nothing,
     "--from_weight none: random weights; name a pretrained folder"),
    ("nothing to train", "lora", "--lora_rank 0", nothing,
     "nothing to train: --lora_rank 0 needs --train_tokens or --modules_to_save"),
    *(
        (f"rank 0 and {flag.split()[0]}", "lora", f"--lora_rank 0 --modules_to_save norms --{flag}", nothing,
         f"--{flag.split()[0]} ...: --lora_rank 0 adapts no matrix; drop one of both")
        for flag in ("lora_alpha 8", "lora_dropout 0.1", "lora_targets mlp", "lora_init gaussian", "use_rslora", "loraplus_lr_ratio 16")
    ),
    ("token given twice", "lora", "--train_tokens a a", nothing,
     "--train_tokens: ids must differ and lie in 0..6399"),
    ("rows of a whole embedding", "lora", "--train_tokens a --modules_to_save embeddings", nothing,
     "--train_tokens: the whole embedding trains already; drop one of both"),
    ("head and rows", "lora", "--lora_targets q_proj,lm_head --train_tokens a", nothing,
     "--lora_targets: no lm_head with --train_tokens or --modules_to_save embeddings, which train it already; leave it out"),
    ("head and embedding", "lora", "--lora_targets lm_head --modules_to_save embeddings", nothing,
     "--lora_targets: no lm_head with --train_tokens or --modules_to_save embeddings, which train it already; leave it out"),
    ("parts of all", "full_sft", "--trainable all,norms", nothing,
     "--trainable all,norms: all holds every part; name it alone"),
    ("frozen and trained", "full_sft", "--trainable frozen-embeddings,embeddings", nothing,
     "--trainable frozen-embeddings,embeddings: freezes and trains the embeddings; drop one"),
    ("revision of a local file", "prepare", "dolly --source {tmp}/d.jsonl --revision main", nothing,
     "--revision belongs to the hub; leave it out together with --source"),
    # ---- devices
    ("float16 on a CPU", "pretrain", "--dtype float16", nothing,
     "--dtype float16: needs CUDA, not cpu; use bfloat16 or float32"),
    ("unknown type", "pretrain", "--dtype int8", nothing,
     "argument --dtype: invalid choice: 'int8' (choose from ...); --help explains the flags"),
    ("unknown device", "lora", "--device tpu", nothing,
     "argument --device: invalid choice: 'tpu' (choose from ...); --help explains the flags"),
    # ---- files with intentions
    ("template that leaves its sandbox", "full_sft", BASE, attack("{{ cycler.__init__.__globals__.os.system('touch ran') }}"),
     "{tmp}/base: the chat template fails (SecurityError: ...); use another tokenizer"),
    ("template that looks for classes", "lora", BASE, attack("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
     "{tmp}/base: the chat template fails (SecurityError: ...); use another tokenizer"),
    ("template that changes the messages", "full_sft", BASE, attack("{{ messages.append(messages[0]) }}"),
     "{tmp}/base: the chat template fails (SecurityError: ...); use another tokenizer"),
    ("template without end", "full_sft", BASE, attack("{% for i in range(10 ** 9) %}{% endfor %}"),
     "{tmp}/base: the chat template fails (OverflowError: ...); use another tokenizer"),
    # ---- prompts, and what is probed
    ("no prompts", "eval_llm", PROMPTS, nothing,
     "{tmp}/p.md: no such file; check --prompts"),
    ("empty prompts", "eval_llm", PROMPTS, file("p.md", b"# Ours\n"),
     "{tmp}/p.md: holds no prompt ('### id', then the prompt as a block quote)"),
    ("prompts of another encoding", "eval_llm", PROMPTS, file("p.md", "## Caf\xe9\n".encode("latin-1")),
     "{tmp}/p.md: not UTF-8 (invalid continuation byte); convert the file"),
    ("prompt outside a section", "eval_llm", PROMPTS, file("p.md", b"### a\n\n> Hi\n"),
     "{tmp}/p.md:1: a prompt before the first '## Section'"),
    ("prompt id twice", "eval_llm", PROMPTS, file("p.md", b"## S\n\n### a\n\n> Hi\n\n### a\n\n> Ho\n"),
     "{tmp}/p.md:7: id 'a' is taken by line 3"),
    ("prompt id in capitals", "eval_llm", PROMPTS, file("p.md", b"## S\n### A 1\n> Hi\n"),
     "{tmp}/p.md:2: id 'A 1': use a-z, 0-9 and single hyphens"),
    ("prompt without words", "eval_llm", PROMPTS, file("p.md", b"## S\n### a\n- reference: \"x\"\n"),
     "{tmp}/p.md:2: 'a' has no prompt; add a line '> ...'"),
    ("prompt with a stray line", "eval_llm", PROMPTS, file("p.md", b"## S\n### a\nHi\n"),
     "{tmp}/p.md:3: expected '> prompt' or '- field: value', found 'Hi'"),
    ("prompt with an unknown field", "eval_llm", PROMPTS, file("p.md", b"## S\n### a\n> Hi\n- mood: good\n"),
     "{tmp}/p.md:4: unknown field 'mood'; known: translation, check, reference"),
    ("prompt field twice", "eval_llm", PROMPTS, file("p.md", b"## S\n### a\n> Hi\n- reference: \"x\"\n- reference: \"y\"\n"),
     "{tmp}/p.md:5: 'reference' is given twice for 'a'"),
    ("prompt with a broken check", "eval_llm", PROMPTS, file("p.md", b"## S\n### a\n> Hi\n- check: {\n"),
     "{tmp}/p.md:4: 'check' is not JSON (...)"),
    ("Chinese prompt without a translation", "eval_llm", PROMPTS, file("p.md", "## S\n### a\n> 你好\n".encode()),
     "{tmp}/p.md:2: 'a' is Chinese: add '- translation: ...'"),
    ("prompts cut off", "eval_llm", "--model {home}/base --prompts {tmp}/d.jsonl", data(b'{"conversations": [', CHAT),
     f"{WHERE} broken JSON (Expecting value at column 20); mend or remove the line"),
    ("prompt id twice in JSONL", "calibrate", "--prompts {tmp}/d.jsonl", file("d.jsonl", jsonl({"id": "a", "messages": TURNS}) * 2),
     "{tmp}/d.jsonl: two prompts have the id 'a'; rename one"),
    ("no model", "eval_llm", "", nothing,
     "--model: name at least one checkpoint; --list shows what is there; --help explains the flags"),
    ("model missing", "eval_llm", "--model {tmp}/gone", nothing,
     "--model {tmp}/gone: no such file or folder; train it or mend the path"),
    ("model twice", "eval_llm", f"{PROBE} {PROBE}", nothing,
     "--model: two are called 'base' and would share an output folder; --help explains the flags"),
    ("model cut off", "eval_llm", "--model {tmp}/base", cut("base/model.safetensors", 0.5),
     "{tmp}/base/model.safetensors: corrupt (...); copy or train it again"),
    ("model's record broken", "eval_llm", "--model {tmp}/base", replaced("base/run.json", b"{"),
     "{tmp}/base/run.json: broken JSON (...); mend or copy it again"),
    ("judge missing", "eval_llm", f"{PROBE} --judge {{tmp}}/gone", nothing,
     "--judge {tmp}/gone: no such file or folder; train it or mend the path"),
    ("translations broken", "eval_llm", PROBE, file("out/base/translations.jsonl", b"{"),
     "{tmp}/out/base/translations.jsonl:1: broken JSON (...); mend or remove the line"),
    ("NLL data missing", "eval_llm", f"{PROBE} {DATA.replace('data_path', 'nll_data')}", nothing,
     "--nll_data {tmp}/d.jsonl: no such file; --help explains the flags"),
    ("NLL data broken", "eval_llm", f"{PROBE} {DATA.replace('data_path', 'nll_data')}", data(b'{"conversations": [', CHAT),
     f"{WHERE} broken JSON (Expecting value at column 20); mend or remove the line"),
    ("NLL text without text", "eval_llm", f"{PROBE} {DATA.replace('data_path', 'text_nll_data')}", data(jsonl({"text": ""}), TEXT),
     f'{WHERE} "text" must be a non-empty string; mend or remove the record'),
    ("unknown decoding", "eval_llm", f"{PROBE} --decoding t0.9", nothing,
     "argument --decoding: invalid choice: 't0.9' (choose from ...); --help explains the flags"),
    ("decoding twice", "eval_llm", f"{PROBE} --decoding greedy greedy", nothing,
     "--decoding: one is given twice; --help explains the flags"),
    ("no prompt at all", "eval_llm", f"{PROBE} --limit 0", nothing,
     "--limit 0: must be at least 1; --help explains the flags"),
    ("seed of a probe below 0", "eval_llm", f"{PROBE} --decoding t1.0 --seeds -1", nothing,
     "--seeds [-1]: must be different and not negative; --help explains the flags"),
    ("seeds of greedy decoding", "eval_llm", f"{PROBE} --seeds 1 2", nothing,
     "--seeds [1, 2]: greedy decoding draws nothing; drop one of both"),
    ("length of nothing", "eval_llm", f"{PROBE} --max_seq_len 64", nothing,
     "--max_seq_len 64: is of --nll_data and --text_nll_data; drop one of both"),
    ("chat and NLL alone", "eval_llm", f"{PROBE} --interactive --no_generation", nothing,
     "--interactive and --no_generation exclude each other; --help explains the flags"),
    ("chat about prompts", "eval_llm", f"{PROBE} --interactive --limit 3", nothing,
     "--limit 3: --interactive only chats; drop one of both"),
    ("NLL alone of nothing", "eval_llm", f"{PROBE} --no_generation", nothing,
     "--no_generation measures NLL: name --nll_data or --text_nll_data; --help explains the flags"),
    ("probe on no device", "eval_llm", f"{PROBE} --device pigeon", nothing,
     "argument --device: invalid choice: 'pigeon' (choose from ...); --help explains the flags"),
    ("outputs below a file", "eval_llm", f"{PROBE} --output_dir {{home}}/text.jsonl/out", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    ("list of prompts", "eval_llm", "--list {tmp}", nothing,
     "--prompts {home}/prompts.md: --list only lists; drop one of both"),
    # ---- updates, the report and the other scripts
    ("update of nothing", "update_analysis", "", nothing,
     "the following arguments are required: --tuned; --help explains the flags"),
    ("update of the base itself", "update_analysis", "--tuned {home}/base --output {tmp}/out.json", nothing,
     "{home}/base: has the weights of {home}/base; there is no update"),
    ("update of another base", "update_analysis", "--tuned {tmp}/other --output {tmp}/out.json", replaced("other/run.json", b'{"base_fingerprint": "f00"}'),
     "{tmp}/other/run.json: the run started from another base than {home}/base; give that as --base"),
    ("update cut off", "update_analysis", "--tuned {tmp}/other --output {tmp}/out.json", cut("other/model.safetensors", 0.5),
     "{tmp}/other/model.safetensors: corrupt (...); copy or train it again"),
    ("update kept in an unknown part", "update_analysis", "--tuned {home}/other --keep nose", nothing,
     "--keep 'nose': known are square, attention, mlp, embeddings, norms, frozen-embeddings"),
    ("comparison that writes checkpoints", "update_analysis", "--tuned {home}/other --compare {home}/other --truncate 1", nothing,
     "--compare writes no checkpoint; give it in a call of its own"),
    ("checkpoints in a result", "update_analysis", "--tuned {home}/other --truncate 1 --output {tmp}/out.json", nothing,
     "--output: would be ignored by this call; drop it"),
    ("checkpoints below a file", "update_analysis", "--tuned {home}/other --truncate 1 --output_dir {home}/text.jsonl/x", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    ("analysis in a folder", "update_analysis", "--tuned {home}/other --output {tmp}", nothing,
     "--output {tmp}: is a folder; name a file"),
    ("rank of a copy above every matrix's", "update_analysis", "--tuned {home}/other --truncate 33 --output_dir {tmp}", nothing,
     "--truncate 33: the largest rank of a linear is 32"),
    ("report of nothing", "report", "", nothing,
     "{tmp}/evaluation: holds no results; run eval_llm.py or mend --root"),
    ("report of a run without a record", "report", "--add {tmp}", nothing,
     "--add {tmp}: lacks run.json or metrics.jsonl; train it first"),
    ("report of a broken record", "report", "", file("evaluation/results/x/run.json", b"{"),
     "{tmp}/evaluation/results/x/run.json: broken JSON (...); mend or copy it again"),
    ("report of a record without a stage", "report", "", file("evaluation/results/x/run.json", b'{"status": "completed"}'),
     "{tmp}/evaluation/results/x/run.json: lacks stage, settings; make the file again"),
    ("report of a curve cut off", "report", "", file("evaluation/results/x/metrics.jsonl", b'{"step": 1}\n{"st'),
     "{tmp}/evaluation/results/x/metrics.jsonl:2: broken JSON (...); mend or remove the line"),
    ("unknown flag of the report", "report", "--out x", nothing,
     "unrecognized arguments: --out x; --help explains the flags"),
    ("calibration in a folder", "calibrate", "--output {tmp}", nothing,
     "--output {tmp}: is a folder; name a file"),
    ("study that is none", "run_study", "--study {tmp}/s.toml", file("s.toml", b"[sizes"),
     "{tmp}/s.toml: Expected ']' at the end of a table declaration (at end of document)"),
    ("size that the study has not", "run_study", "--size huge", nothing,
     "--size huge: choose among xs, s, ..."),
    ("seed of the demo in words", "demo", "--seed seven", nothing,
     "argument --seed: invalid int value: 'seven'; --help explains the flags"),
    ("demo below a file", "demo", "--output_dir {home}/text.jsonl/demo", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    ("corpus below a file", "prepare", "dolly --output_dir {home}/text.jsonl/data", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    ("unknown corpus", "prepare", "dolli --source {tmp}", nothing,
     "unknown corpus 'dolli'; choose one of simplewiki, ... (--list tells more)"),
    ("abbreviation of a corpus's flag", "prepare", "dolly --lim 3", nothing,
     "unrecognized arguments: --lim 3; --help explains the flags"),
    ("tokenizer below a file", "train_tokenizer", "--output_dir {home}/text.jsonl/x", nothing,
     "--output_dir: {home}/text.jsonl is no folder; choose another one"),
    # ---- words that would steer a terminal
    ("escape in a file's name", "pretrain", "--data_path {tmp}/a\x1b]0;x\x07.jsonl", nothing,
     "{tmp}/a\\u001b]0;x\\u0007.jsonl: no such file; check the flag that names it"),
    ("escape in a role", "full_sft", DATA, data(chat("user", "\x1b[2J\n"), CHAT),
     f"{WHERE} message 2 has role '\\x1b[2J\\n'; known: system, user, assistant"),
    ("escape in a name", "pretrain", DATA, data(b'{"\\u009b": 1, "\\u009b": 2}', TEXT),
     f"{WHERE} broken JSON (the name '\\x9b' is given twice); mend or remove the line"),
    ("escape in a flag", "full_sft", "--\x1b[31m", nothing,
     "unrecognized arguments: --\\u001b[31m; --help explains the flags"),
    ("escape in a tensor's name", "lora", BASE, weights("base/model.safetensors", **{"\x1b[31m\n": torch.ones(1)}),
     "{tmp}/base/model.safetensors: weights do not fit the config: ...\\u001b[31m..."),
]
# fmt: on
if not torch.cuda.is_available():
    CASES.append(
        (
            "no GPU",
            "pretrain",
            "--device cuda",
            nothing,
            "--device cuda: this machine has none; use --device cpu",
        )
    )
if not torch.backends.mps.is_available():
    CASES.append(
        (
            "no Mac",
            "full_sft",
            "--device mps",
            nothing,
            "--device mps: this machine has none; use --device cpu",
        )
    )
if not Path("/proc/self/mem").exists():
    CASES = [case for case in CASES if case[0] != "unreadable"]


SCRIPTS = {
    "prepare": prepare,
    "train_tokenizer": train_tokenizer,
    "demo": demo,
    "eval_llm": eval_llm,
    "calibrate": calibrate,
    "report": report,
    "update_analysis": update_analysis,
    "run_study": run_study,
}


def run(script: str, words: list[str], home: Path) -> int:
    """A script in this process; the exit code that it ends with."""
    if script in SCRIPTS:
        return exit_code(SCRIPTS[script].main, words)
    return exit_code(lambda _: call(script, " ".join(words), home), words)


def pattern(line: str) -> str:
    """An expected line as a regular expression; `...` stands for anything."""
    return "error: " + re.escape(line).replace(r"\.\.\.", ".*")


@pytest.mark.parametrize(
    ("script", "flags", "make", "line"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    script: str,
    flags: str,
    make: Callable[[Path, Path], None],
    line: str,
) -> None:
    make(home, tmp_path)
    words = f"{COMMANDS[script]} {flags}".format(home=home, tmp=tmp_path).split(" ")
    before = listing(home), listing(tmp_path)
    capfd.readouterr()
    assert run(script, [word for word in words if word], home) == 2
    out, errors = capfd.readouterr()
    assert re.fullmatch(pattern(line.format(home=home, tmp=tmp_path)) + "\n", errors), errors
    assert out == ""
    assert (listing(home), listing(tmp_path)) == before  # neither a run folder, nor half a cache


def listing(folder: Path) -> set[tuple[str, int]]:
    """Files with sizes; of the cache, which a good training set may fill, only what is unfinished."""
    return {
        (str(path), path.stat().st_size)
        for path in folder.rglob("*")
        if "cache" not in path.relative_to(folder).parts or ".tmp" in str(path)
    }


def test_every_script_ends_as_these_do() -> None:
    folders = ("trainer", "evaluation", "dataset")
    paths = [path for folder in folders for path in (REPO_DIR / folder).glob("*.py")]
    texts = {path.name: path.read_text() for path in [*paths, REPO_DIR / "eval_llm.py"]}
    scripts = {name: text for name, text in texts.items() if "def main(" in text}
    assert {f"{name}.py" for name in SCRIPTS} < scripts.keys() and "bench.py" in scripts
    for text in scripts.values():
        assert text.endswith('\n\nif __name__ == "__main__":\n    run_script(main)\n')


def test_scripts_end_so_as_processes_too(home: Path, tmp_path: Path) -> None:
    """What run_script and argparse do in this process, they do at the command line."""
    (tmp_path / "d.jsonl").write_bytes(TEXT + b"{")
    commands = {
        f"trainer/train_lora.py --from_weight {tmp_path}/x --device cpu": "x/config.json: missing",
        f"trainer/train_tokenizer.py --data_path {tmp_path}/d.jsonl": "d.jsonl:2: broken JSON",
        f"dataset/prepare.py dolly --source {tmp_path}/d.jsonl": "no field 'instruction'",
    }
    flags = {"lora": f"--data_path {home}/chat.jsonl --save_dir", "other": "--output_dir"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                *command.split(),
                *flags["lora" if "lora" in command else "other"].split(),
            ]
            + [str(tmp_path / "out")],
            cwd=REPO_DIR,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for process, reason in zip(processes, commands.values(), strict=True):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 2, errors
        assert (out, errors.count("\n")) == ("", 1) and errors.startswith("error: ")
        assert reason in errors
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl"}


# ---------------------------------------------------------------- what is taken as it is


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + TEXT * 2,
        (TEXT * 2).replace(b"\n", b"\r\n"),
        b"\r\n \n" + TEXT * 2 + b"\t",
        (TEXT * 2).rstrip(b"\n"),
        jsonl({"id": 7, "text": "fine", "source": {"url": None}}) * 2,
        b'{"text": "fi\\u006ee"}\n' + TEXT,
    ],
    ids=["byte order mark", "CRLF", "empty lines", "no last line end", "other fields", "escapes"],
)
def test_harmless_variants_are_read_alike(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plain.jsonl").write_bytes(TEXT * 2)
    (tmp_path / "variant.jsonl").write_bytes(content)
    plain, variant = (
        load_tokens("pretrain", [tmp_path / f"{name}.jsonl"], load_tokenizer(), 8, tmp_path / "c")
        for name in ("plain", "variant")
    )
    assert plain.tokens.tolist() == variant.tokens.tolist()
    assert plain.starts.tolist() == variant.starts.tolist()


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        ("pretrain", jsonl({"text": "<|im_end|>"})),
        ("full_sft", jsonl({"instruction": "<|im_start|>", "output": "<|endoftext|>"})),
    ],
)
def test_one_sample_of_special_tokens_alone_trains(
    home: Path, tmp_path: Path, stage: str, data: bytes
) -> None:
    (tmp_path / "d.jsonl").write_bytes(data)
    flags = COMMANDS[stage].format(home=home, tmp=tmp_path)
    assert call(stage, f"{flags} --data_path {tmp_path}/d.jsonl --max_steps 2", home) == 0
    record = json.loads((tmp_path / "out" / stage / "run.json").read_text())
    assert (record["status"], record["train_data"]["samples"]) == ("completed", 1)


def test_what_is_cut_dropped_and_repeated_is_counted_and_told(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Lengths of 17 tokens: an answer of one word fits, many words are cut, a long question drops."""

    def records(*pairs: tuple[str, str]) -> bytes:
        return jsonl(*({"instruction": question, "output": answer} for question, answer in pairs))

    good, cut_one, dropped = ("Hi", "Yes"), ("Hi", "word " * 40), ("word " * 40, "Yes")
    (tmp_path / "train\x1b[7m.jsonl").write_bytes(records(good, cut_one, dropped, good, good))
    (tmp_path / "valid.jsonl").write_bytes(records(dropped, good, ("Hi", "No"), cut_one, cut_one))
    flags = COMMANDS["full_sft"].format(home=home, tmp=tmp_path) + " --max_steps 1"
    flags += f" --data_path {tmp_path}/train\x1b[7m.jsonl --eval_data_path {tmp_path}/valid.jsonl"
    capfd.readouterr()
    assert call("full_sft", flags + " --max_seq_len 17", home) == 0
    record = json.loads((tmp_path / "out/full_sft/run.json").read_text())
    counts = {"records": 5, "truncated": 2, "dropped_without_labels": 1, "samples": 4}
    counts |= {"duplicates": 2}
    assert {name: record["train_data"][name] for name in counts} == counts
    counts |= {"truncated": 3, "duplicates": 1, "also_in_training": 3}
    assert {name: record["eval_data"][name] for name in counts} == counts
    out = capfd.readouterr().out
    assert "\x1b" not in out
    for line in (
        "train\\u001b[7m.jsonl: 2 of 5 records are cut at --max_seq_len tokens",
        "train\\u001b[7m.jsonl: 1 of 5 records are dropped: --max_seq_len leaves no token of the assistant",
        "train\\u001b[7m.jsonl: 2 of 5 records are the same as an earlier one, and stay in",
        "valid.jsonl: 3 of 5 records are also in the training data, so not held out",
    ):
        assert line in out.splitlines()


def test_tail_without_a_target_is_counted(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(TEXT * 3)
    tokens = 3 * (len(load_tokenizer()("fine")["input_ids"]) + 1)
    for length, dropped in ((tokens - 1, 1), (tokens, 0), (tokens - 2, 0)):
        data = load_dataset("pretrain", [tmp_path / "d.jsonl"], load_tokenizer(), length, tmp_path)
        assert data.store.info["dropped_tail_tokens"] == dropped
        assert data.lengths.sum() == tokens - dropped
        targets = sum((data[i][1][1:] != IGNORE_INDEX).sum() for i in range(len(data)))
        assert data.store.info["labeled_tokens"] == targets == tokens - dropped - len(data)


@pytest.mark.parametrize(
    "name", ["info.json", "tokens.bin", "starts.npy", "labeled.npy", "digests.npy"]
)
def test_damaged_cache_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(CHAT * 3)

    def load() -> None:
        load_tokens("sft", [tmp_path / "d.jsonl"], load_tokenizer(), 64, tmp_path / "cache")

    load()
    [folder] = (tmp_path / "cache").iterdir()
    whole = (folder / name).read_bytes()
    for content in (whole[:-2], b""):
        (folder / name).write_bytes(content)
        with pytest.raises(
            DataError, match=rf"^{folder}: a damaged token cache \(.*delete the folder"
        ):
            load()
    (folder / name).write_bytes(whole)
    load()


# ---------------------------------------------------------------- what others wrote cannot act

HOSTILE = "\x1b[2J\x1b]0;x\x07\x9b31m\u202eevil\u2028\u200b\r<|im_end|>"


@pytest.mark.parametrize("stage", ["pretrain", "full_sft"])
def test_shown_sample_is_inert(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], stage: str
) -> None:
    record = (
        {"text": HOSTILE} if stage == "pretrain" else {"instruction": HOSTILE, "output": HOSTILE}
    )
    (tmp_path / "d.jsonl").write_bytes(jsonl(record))
    flags = COMMANDS[stage].format(home=home, tmp=tmp_path)
    capfd.readouterr()
    assert call(stage, f"{flags} --data_path {tmp_path}/d.jsonl --show_sample", home) == 0
    out, errors = capfd.readouterr()
    assert "'\\x1b'" in out  # the escape, written out
    assert errors == ""
    assert all(line.isprintable() for line in out.splitlines())
    assert not (tmp_path / "out").exists()
    # It writes nothing, so a name that is taken is no obstacle.
    (tmp_path / "out" / stage).mkdir(parents=True)
    assert call(stage, f"{flags} --data_path {tmp_path}/d.jsonl --show_sample", home) == 0
    assert list((tmp_path / "out" / stage).iterdir()) == []


def test_shown_and_error_line_by_hand() -> None:
    assert shown("a\x1bb\tc\nd\u202e") == "a\\u001bb\tc\nd\\u202e"
    assert shown("\ud83d\U000e0041 你好") == "\\ud83d\\udb40\\udc41 你好"
    assert error_line(ValueError("a\n\x9bb\t")) == "error: a\\n\\u009bb\\t"
    assert error_line(OSError(2, "No such file", "a\x1b")).isprintable()


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 1}', "[NaN]", "-Infinity", "[" * 10**5, "1" * 5000, ""]
)
def test_json_that_is_read_in_more_than_one_way_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
