"""Under which rules a tokenizer's texts stay the same tokens, and what is refused."""

from pathlib import Path

import pytest

from dataset.lm_dataset import encode_batch
from model.checkpoint import TOKENIZER_DIR, load_tokenizer
from model.cli import UserError
from model.files import REPO_DIR
from tests.trainer.runs import write_jsonl
from trainer import export_gguf
from trainer.pre_tokenizers import choose_pre_tokenizer, find_differences, follow_rules

WORLD_BASE = REPO_DIR / "model" / "base_xs"


def test_words_are_cut_by_the_rules_of_the_name() -> None:
    text = 'It\'LL cost 12345,\n\n  "then" more'
    for name, words in {
        "gpt-2": ["It", "'", "LL", " cost", " 12345", ",", "\n\n ", ' "', "then", '"', " more"],
        "llama-bpe": [
            "It",
            "'LL",
            " cost",
            " ",
            "123",
            "45",
            ",\n\n",
            " ",
            ' "',
            "then",
            '"',
            " more",
        ],
    }.items():
        tokenizer = follow_rules(load_tokenizer(), name)
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[start:end] for _, (start, end) in cut] == words, name


def test_the_name_that_fits_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    english = "A garden hose has its usual place in the backyard."
    chinese = "橄榄的颜色是黑色。"
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": english}, {"text": chinese}])
    plain, world = load_tokenizer(TOKENIZER_DIR), load_tokenizer(WORLD_BASE)
    before = encode_batch(world, [english, chinese], special=False)
    assert choose_pre_tokenizer(plain, path, 0) == "gpt-2"
    assert "0.0% of 2 texts become other tokens under gpt-2" in capsys.readouterr().out
    # Its words are tokens without merges, and each Chinese character is a word of its own.
    assert find_differences(world, "llama-bpe", [english, chinese]) == [chinese]
    assert find_differences(world, "gpt-2", [english]) == [english]
    with pytest.raises(UserError, match=f"texts.jsonl: 50.0% .* under llama-bpe.*{chinese}"):
        choose_pre_tokenizer(world, path, 0.49)
    assert choose_pre_tokenizer(world, path, 0.5) == "llama-bpe"
    assert encode_batch(world, [english, chinese], special=False) == before  # left as it was


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_gguf, "gguf", None)
    flags = ["--model", WORLD_BASE, "--output", tmp_path / "x.gguf", "--check_text", "x.jsonl"]
    with pytest.raises(UserError, match="pip install gguf"):
        export_gguf.main([str(flag) for flag in flags])
