"""A GGUF file, read back by the package gguf, by transformers and by llama.cpp."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from jinja2 import Template
from transformers import AutoModelForCausalLM

from dataset.lm_dataset import encode_batch
from dataset.world.generate import ensure_world
from model.checkpoint import TOKENIZER_DIR, load_checkpoint, load_tokenizer, save_model
from model.cli import UserError
from model.files import read_json, write_json
from model.model_lora import LoraSettings, merge_lora
from tests.elsewhere.tools import ADAPTER, QUESTIONS, TUNED, answer
from tests.model.small import ROUNDING, compute_logits, make_model, save_adapter
from trainer import export_gguf
from trainer.pre_tokenizers import follow_rules
from trainer.train_tokenizer import read_texts

pytestmark = pytest.mark.elsewhere
gguf = pytest.importorskip("gguf")


def export(folder: Path, output: Path, check_text: str = "combinations_tune") -> Path:
    """Export a folder, checked on a file of the world; return the GGUF file."""
    texts = ensure_world()[check_text]
    words = ["--model", folder, "--output", output, "--check_text", texts]
    export_gguf.main([*(str(word) for word in words), "--allow_differences", "0.02"])
    return output


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A shipped model or adapter, or a small one with our 6,400 tokens."""
    if request.param in (TUNED, ADAPTER):
        return request.param
    base = tmp_path / "base"
    model = make_model(qk_norm=request.param == "qwen3", vocab_size=6500, noise=0.1)
    save_model(model, TOKENIZER_DIR, base)
    if request.param == "qwen3":  # Qwen's tokenizers have no first token
        path = base / "tokenizer_config.json"
        write_json(path, read_json(path) | {"bos_token": None})
    if request.param != "adapter":
        return base
    settings = LoraSettings(rank=2, targets="all-linear,embedding")
    save_adapter(base, settings, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("folder", [TUNED, ADAPTER, "llama", "qwen3", "adapter"], indirect=True)
def test_transformers_reads_equal_logits(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "model.gguf")
    model, _ = load_checkpoint(folder)
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    if model.config.model_type == "qwen3":  # transformers does not read the size of these heads
        options["config"] = model.config
    read = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    expected = compute_logits(merge_lora(model))
    assert expected.std() > 0.1
    assert torch.allclose(compute_logits(read), expected, rtol=0, atol=ROUNDING)


def test_the_file_has_the_tokenizer_and_the_template(tmp_path: Path) -> None:
    path = export(TUNED, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(path).fields
    values = {name: field.contents() for name, field in fields.items()}
    tokenizer = load_tokenizer(TUNED)
    vocab = tokenizer.get_vocab()
    tokens = values["tokenizer.ggml.tokens"]
    assert {token: number for number, token in enumerate(tokens)} == vocab
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    assert values["tokenizer.ggml.token_type"] == [control] * 3 + [normal] * (len(vocab) - 3)
    assert values["tokenizer.ggml.merges"][:2] == ["i n", "e r"]
    names = ("bos", "eos", "padding")
    assert [values[f"tokenizer.ggml.{name}_token_id"] for name in names] == [1, 2, 0]
    assert values["tokenizer.ggml.pre"] == "llama-bpe"
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    template = Template(values["tokenizer.chat_template"])  # Jinja's own, without transformers' tag
    assert template.render(messages=messages) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_texts_that_would_change_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    message = "99.* of 300 texts become other tokens under llama-bpe, .* such as '.*--check_text"
    with pytest.raises(UserError, match=message):
        export(TUNED, path, "chinese_test")
    assert not path.exists()
    texts = ensure_world()["combinations_tune"]
    words = ["--model", TUNED, "--output", path, "--check_text", texts]
    with pytest.raises(UserError, match="1.0% of 880 texts"):  # none may change, by default
        export_gguf.main([str(word) for word in words])
    assert not path.exists()
    export(TUNED, path)
    with pytest.raises(UserError, match="exists; name another file"):
        export(TUNED, path)


@pytest.mark.parametrize("folder", [TUNED, "llama"], indirect=True)
def test_llama_cpp_cuts_and_answers_as_we_do(folder: Path, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(export(folder, tmp_path / "model.gguf"))
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)

    def post(place: str, content: dict) -> dict:
        data = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + place, data, headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    # The rules are llama.cpp's, also for texts that it cuts in another way than we do.
    name = "llama-bpe" if folder == TUNED else "gpt-2"
    copy = follow_rules(load_tokenizer(folder), name)
    texts = []
    for file in ("pretrain_valid", "combinations_test", "chinese_test"):
        texts += list(read_texts([ensure_world()[file]]))[:40]
    texts += ["It's 1234 o'clock,\n\n  don't  WAIT'LL\t<|im_end|> 3.5 x", "naïve ½ ①Ⅷ 😀é\u0301"]
    for text, ids in zip(texts, encode_batch(copy, texts, special=False), strict=True):
        tokenized = post("/tokenize", {"content": text, "parse_special": False})
        assert tokenized["tokens"] == ids, text
    if folder == TUNED:
        for question, expected in zip(QUESTIONS, answer(folder), strict=True):
            messages = [{"role": "user", "content": question}]
            answered = post(
                "/v1/chat/completions",
                {"messages": messages, "temperature": 0, "max_tokens": 64},
            )
            assert answered["choices"][0]["message"]["content"] == expected
