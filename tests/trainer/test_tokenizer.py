"""The committed tokenizer, and the script that trains one."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.lm_dataset import encode_conversations
from model.checkpoint import TOKENIZER_DIR
from tests.trainer.runs import write_jsonl
from trainer import train_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = {
    "ASCII": "".join(map(chr, range(32, 127))),
    "Chinese": "床前明月光，疑是地上霜。「舉頭」",
    "emoji": "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☕️",
    "control": "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff",
    "white space": "  two\t\ttabs \r\n\n\n  end  \u3000",
    "other planes": "𝔘𐍈\U0010ffff é e\u0301",
    "special strings": "<|im_end <|im_start|> |>",
}


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer of 300 tokens, trained by the script on documents and conversations."""
    folder = tmp_path_factory.mktemp("tokenizer")
    talk = {"instruction": "zebra?", "output": "zebra zebra"}
    records = [{"text": "the quick quick fox"}, talk] * 20
    write_jsonl(folder / "data.jsonl", records)
    flags = f"--data_path {folder}/data.jsonl --output_dir {folder}/out --vocab_size 300"
    train_tokenizer.main(flags.split())
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((folder / "out/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    return AutoTokenizer.from_pretrained(folder / "out")


@pytest.fixture(params=["committed", "trained"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "committed":
        return AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    return request.getfixturevalue("small_tokenizer")


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 6400 or 259 < len(tokenizer) <= 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == SPECIAL
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert named == (0, 1, 2)
    assert tokenizer("".join(SPECIAL))["input_ids"] == [0, 1, 2]
    assert tokenizer("plain")["input_ids"][0] > 2  # nothing is put around a text
    alphabet = set(tokenizer.backend_tokenizer.pre_tokenizer.alphabet())
    assert len(alphabet) == 256 and alphabet <= tokenizer.get_vocab().keys()


@pytest.mark.parametrize("kind", TEXTS)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    assert tokenizer.decode(tokenizer(TEXTS[kind])["input_ids"]) == TEXTS[kind]


def test_chat_template_as_written_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    roles = ("system", "user", "assistant", "user")
    contents = ("Be kind.", "  Hi \n", "Hello\n\nyou", "Bye")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello\n\nyou<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompted == text + "<|im_start|>assistant\n"
    [(ids, _)] = encode_conversations(tokenizer, [messages])
    assert tokenizer.decode(ids) == text


def test_documents_and_conversations_are_read(small_tokenizer: PreTrainedTokenizerFast) -> None:
    assert {"Ġquick", "the", "zebra", "Ġzebra"} <= small_tokenizer.get_vocab().keys()
    assert small_tokenizer.tokenize("the zebra") == ["the", "Ġzebra"]


def test_words_are_tokens_without_merges() -> None:
    """A word seen at least 40 times is one token; "th", on the way to "the", is none."""
    texts = ["the the the quick 语 语 fox"] * 20
    vocab = train_tokenizer.train_tokenizer(iter(texts), 262, 1000, 40).get_vocab()
    alphabet = set(train_tokenizer.pre_tokenizers.ByteLevel.alphabet())
    assert vocab.keys() - alphabet == {*SPECIAL, "Ġthe", "è¯Ń"}
