"""The committed tokenizer, and the script that trains one."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.lm_dataset import encode_conversations
from model.checkpoint import TOKENIZER_DIR
from trainer import train_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = {
    "ASCII": "".join(map(chr, range(32, 127))),
    "Chinese": "床前明月光，疑是地上霜。「舉頭」",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☕️",
    "control": "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff",
    "white space": "  two\t\ttabs \r\n\n\n  end  \u3000",
    "code": "def f(x):\n    return x[0] ** 2  # 'quoted' \"too\"\n",
    "other planes": "𝔘𐍈\U0010ffff é e\u0301",
    "special strings": "<|im_end <|im_start|> |>",
}


@pytest.fixture(scope="module")
def committed() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens, trained by the script on documents and conversations."""
    folder = tmp_path_factory.mktemp("tokenizer")
    messages = [
        {"role": "user", "content": "zebra?"},
        {"role": "assistant", "content": "zebra zebra"},
    ]
    records = [{"text": "the quick quick fox"}, {"conversations": messages}] * 20
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--data_path", str(data), "--output_dir", str(folder / "out"), "--vocab_size", "300"]
    train_tokenizer.main(flags)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return AutoTokenizer.from_pretrained(folder / "out")


@pytest.fixture(params=["committed", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def test_committed_vocabulary(committed: PreTrainedTokenizerFast) -> None:
    assert len(committed) == committed.vocab_size == 6400
    assert sorted(committed.get_vocab().values()) == list(range(6400))
    assert isinstance(committed, PreTrainedTokenizerFast)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == SPECIAL
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == (0, 1, 2)
    assert tokenizer("".join(SPECIAL))["input_ids"] == [0, 1, 2]
    assert tokenizer("plain")["input_ids"][0] > 2  # nothing is put around a text
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == ""


@pytest.mark.parametrize("kind", TEXTS)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    text = TEXTS[kind]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_byte_has_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    alphabet = set(tokenizer.backend_tokenizer.pre_tokenizer.alphabet())
    assert len(alphabet) == 256
    assert alphabet <= tokenizer.get_vocab().keys()


def test_chat_template_as_written_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "  Hi \n"},
        {"role": "assistant", "content": "Hello\n\nyou"},
        {"role": "user", "content": "Bye"},
    ]
    shown = (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello\n\nyou<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == shown
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == shown + "<|im_start|>assistant\n"
    [(ids, _)] = encode_conversations(tokenizer, [messages])
    assert tokenizer.decode(ids) == shown


def test_committed_template_is_the_scripts_own(committed: PreTrainedTokenizerFast) -> None:
    assert committed.chat_template == train_tokenizer.CHAT_TEMPLATE


def test_training_learns_words_of_documents_and_conversations(
    trained: PreTrainedTokenizerFast,
) -> None:
    # 256 bytes and 3 special tokens leave 41 merges; the corpus offers fewer.
    assert 259 < len(trained) <= 300
    assert {"Ġquick", "the", "zebra", "Ġzebra"} <= trained.get_vocab().keys()
    assert trained.convert_ids_to_tokens(trained("the zebra")["input_ids"]) == ["the", "Ġzebra"]
