"""The commands of "Use it elsewhere": each tool runs, and agrees with our own code."""

import json
import math
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from dataset.lm_dataset import encode_batch, encode_conversations, read_jsonl
from dataset.world.generate import ensure_world
from model.checkpoint import load_checkpoint
from model.files import REPO_DIR
from tests.elsewhere.tools import (
    ADAPTER,
    BASE,
    QUESTIONS,
    TUNED,
    answer,
    call,
    list_words,
    make_environment,
)

pytestmark = pytest.mark.elsewhere
WAIT = 300  # seconds that a server may take to start


def read_world(name: str, count: int) -> list[dict]:
    """Read the first records of one of the world's files."""
    records = [record for _, record in read_jsonl(ensure_world()[name])]
    return records[:count]


# ---------------------------------------------------------------- transformers serve


def post(address: str, content: dict) -> dict:
    """Send JSON to an address; return the JSON that it answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Start `transformers serve` in the root of the repository; yield its address."""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    # By default it computes in the folder's bfloat16, and long answers differ by its rounding.
    words = list_words("transformers", "serve", "--port", port, "--dtype", "float32")
    log = tmp_path / "log"
    with log.open("w") as output:
        options = {"stdout": output, "stderr": output, "env": make_environment(tmp_path)}
        process = subprocess.Popen(words, cwd=REPO_DIR, **options)
    try:
        until = time.monotonic() + WAIT
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


def test_transformers_serves_a_folder(server: str) -> None:
    for folder in (BASE, TUNED):
        for question, expected in zip(QUESTIONS, answer(folder), strict=True):
            messages = [{"role": "user", "content": question}]
            content = {"model": str(folder.relative_to(REPO_DIR)), "messages": messages}
            content |= {"temperature": 0, "max_tokens": 64}
            answered = post(f"{server}/v1/chat/completions", content)
            assert answered["choices"][0]["message"]["content"] == expected


# ---------------------------------------------------------------- lm_eval


def test_lm_eval_asks_and_measures_as_we_do(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    count = 3
    output = tmp_path / "results"
    arguments = f"pretrained={BASE},peft={ADAPTER},dtype=float32"
    words = ["--model", "hf", "--model_args", arguments, "--tasks", "world", "--device", "cpu"]
    words += ["--include_path", "evaluation/lm_eval", "--apply_chat_template", "--limit", count]
    call(tmp_path, "lm_eval", *words, "--log_samples", "--output_path", output)

    (path,) = output.rglob("samples_world_answers_*.jsonl")
    samples = [record for _, record in read_jsonl(path)]
    records = read_world("combinations_test", count)
    questions = [record["conversations"][0]["content"] for record in records]
    references = [record["conversations"][1]["content"] for record in records]
    answers = answer(ADAPTER, tuple(questions))
    assert [sample["filtered_resps"][0] for sample in samples] == answers
    pairs = zip(answers, references, strict=True)
    share = sum(reply == reference for reply, reference in pairs) / count

    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["world_answers"]["exact_match,none"] == pytest.approx(share)
    model, tokenizer = load_checkpoint(ADAPTER)
    texts = [record["text"] for record in read_world("pretrain_valid", count)]
    nats = 0.0
    for ids in encode_batch(tokenizer, texts, special=False):
        inputs = torch.tensor([[tokenizer.bos_token_id, *ids]])
        with torch.no_grad():
            log_probs = model(inputs).logits[0, :-1].log_softmax(-1)
        nats -= log_probs.gather(1, inputs[0, 1:, None]).sum().item()
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert results["world_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


# ---------------------------------------------------------------- training


def test_trl_trains_a_folder_on_our_labels(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    records = read_world("sft", 64)
    data = Dataset.from_list([{"messages": record["conversations"]} for record in records])
    config = trl.SFTConfig(
        str(tmp_path / "trl"),
        assistant_only_loss=True,
        learning_rate=1e-3,
        max_steps=10,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = trl.SFTTrainer(str(BASE), args=config, train_dataset=data)
    # The rows are shuffled and padded: each is found by its tokens.
    _, tokenizer = load_checkpoint(BASE)
    expected = {}
    for ids, labeled in encode_conversations(tokenizer, data["messages"]):
        expected[tuple(ids)] = labeled
    rows = 0
    for batch in trainer.get_train_dataloader():
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            ids, labels = ids[mask.bool()].tolist(), labels[mask.bool()]
            assert (labels != -100).tolist() == [bool(mark) for mark in expected[tuple(ids)]]
            rows += 1
    assert rows == len(records)
    trainer.train()
    trainer.save_model()
    trained, _ = load_checkpoint(tmp_path / "trl")
    before, _ = load_checkpoint(BASE)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    words = ["--model", tmp_path / "trl", "--limit", 2, "--decoding", "greedy"]
    printed = call(tmp_path, "python", "eval_llm.py", *words, "--output_dir", tmp_path / "answers")
    assert "never ends" in printed


def test_trackio_keeps_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    words = ["--save_dir", tmp_path, "--max_steps", 3, "--log_interval", 1, "--show_answers", 0]
    words += ["--dtype", "float32", "--device", "cpu", "--report_to", "trackio"]
    call(tmp_path, "python", "trainer/train_lora.py", *words)
    rows = [record for _, record in read_jsonl(tmp_path / "lora" / "metrics.jsonl")]
    expected = [row["loss"] for row in rows if "loss" in row]
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        logged = [json.loads(text) for (text,) in database.execute("SELECT metrics FROM metrics")]
    assert [row["loss"] for row in logged if "loss" in row] == expected
    assert "minimind-lora-study" in call(tmp_path, "trackio", "list", "projects")


# ---------------------------------------------------------------- the hub


def test_hf_uploads_a_folder(tmp_path: Path) -> None:
    """Only its help: an upload needs an account."""
    printed = call(tmp_path, "hf", "upload", "--help")
    assert "REPO_ID [LOCAL_PATH]" in printed
