"""Translations: found again, filled by a tiny random translator, and never lost."""

import json
from pathlib import Path

import pytest
from transformers import MarianConfig, MarianMTModel

from dataset.jsonl import DataError
from evaluation.prompts import Prompt
from evaluation.translations import (
    STORE_FILE,
    Translation,
    empty_slots,
    fill_slots,
    load_translator,
    read_store,
    translate,
    translate_missing,
    write_store,
)
from model.checkpoint import TOKENIZER_DIR, TOKENIZER_FILES, load_tokenizer
from model.files import CheckpointError


def prompt(text: str, translation: str | None = None) -> Prompt:
    return Prompt("a", "A", [{"role": "user", "content": text}], translation=translation)


def sample(text: str, output: str, prompt_translation=None, output_translation=None) -> dict:
    return {
        "id": "a",
        "prompt": text,
        "prompt_translation": prompt_translation,
        "output": output,
        "output_translation": output_translation,
    }


def save_samples(folder: Path, samples: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in samples)
    (folder / "samples.jsonl").write_text(text)


@pytest.fixture(scope="module")
def translator_folder(tmp_path_factory) -> Path:
    """A random Marian model with this repository's tokenizer."""
    folder = tmp_path_factory.mktemp("translators") / "tiny-zh-en"
    tokenizer = load_tokenizer()
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    MarianMTModel(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        text = (TOKENIZER_DIR / name).read_text().replace("32768", "512")  # what Marian reads
        (folder / name).write_text(text)
    return folder


def test_a_translation_outlives_its_output(tmp_path):
    prompts = [prompt("你好", "Hello")]
    save_samples(tmp_path, [sample("你好", "好的", "Hello", "Fine")])
    store = read_store(tmp_path, prompts)
    assert store == {("你好", "好的"): Translation("Fine", "hand")}  # the prompt's is in its file
    changed = [sample("你好", "不好", "Hello")]
    fill_slots(changed, store)
    assert changed[0]["output_translation"] is None
    write_store(tmp_path, store)
    save_samples(tmp_path, changed)  # made again, and the output differs

    back = [sample("你好", "好的", "Hello")]  # and differs back
    fill_slots(back, read_store(tmp_path, prompts))
    assert back[0]["output_translation"] == "Fine"


def test_a_prompt_that_is_no_longer_asked_keeps_its_translation(tmp_path):
    save_samples(tmp_path, [sample("再见", "x", "Bye")])  # of a JSONL file without translations
    write_store(tmp_path, read_store(tmp_path, [prompt("再见")]))
    save_samples(tmp_path, [])
    asked = [sample("再见", "y")]
    fill_slots(asked, read_store(tmp_path, [prompt("再见")]))
    assert asked[0]["prompt_translation"] == "Bye"


def test_a_change_by_hand_goes_before_what_was_stored(tmp_path):
    write_store(tmp_path, {("你好", "好的"): Translation("All right", "opus")})
    twice = [sample("你好", "好的", None, "Fine"), sample("你好", "好的", None, "All right")]
    save_samples(tmp_path, twice)
    assert read_store(tmp_path, [])["你好", "好的"] == Translation("Fine", "hand")
    save_samples(tmp_path, [twice[0], sample("你好", "好的", None, "Good")])
    with pytest.raises(DataError, match="'Fine' and 'Good'; keep one"):
        read_store(tmp_path, [])


def test_without_translations_no_file_is_written(tmp_path):
    save_samples(tmp_path, [sample("你好", "好的", "Hello")])
    store = read_store(tmp_path, [prompt("你好", "Hello")])
    write_store(tmp_path, store)
    assert store == {} and not (tmp_path / STORE_FILE).exists()


def test_slots_to_fill_are_chinese_and_empty():
    samples = [
        sample("Hello", "Hi"),
        sample("Hello", "你好"),
        sample("你好", "Hi", "Hello"),
        sample("几点？", "三点", None, "Three"),
    ]
    assert empty_slots(samples) == {("Hello", "你好"): "你好", ("几点？", None): "几点？"}


def test_a_translator_fills_what_is_empty_and_nothing_else(translator_folder):
    translator = load_translator(str(translator_folder), "cpu")
    assert translator.name == "tiny-zh-en"
    samples = [sample("你好", "好的", None, "Fine"), sample("Hello", "我很好", None, None)]
    store = {("你好", "好的"): Translation("Fine", "hand")}
    translate_missing(samples, store, translator)
    fill_slots(samples, store)
    assert store["你好", "好的"] == Translation("Fine", "hand")
    assert samples[0]["output_translation"] == "Fine"
    made = store["Hello", "我很好"]
    assert made == Translation(samples[1]["output_translation"], "tiny-zh-en") and made.text
    assert samples[1]["prompt_translation"] is None
    before = dict(store)
    translate_missing(samples, store, translator)
    assert store == before


def test_translation_is_by_line_and_does_not_depend_on_its_neighbors(translator_folder):
    translator = load_translator(str(translator_folder), "cpu")
    (alone,), _ = translate(translator, ["你好"])
    (mixed, other), _ = translate(translator, ["1. OK\n你好\n\nBye", "一个很长很长的句子。"])
    assert mixed == f"1. OK\n{alone}\n\nBye"
    assert other != alone


def test_lines_that_the_translator_cuts_are_counted(translator_folder, monkeypatch):
    translator = load_translator(str(translator_folder), "cpu")
    monkeypatch.setattr(translator.model.generation_config, "forced_eos_token_id", None)
    monkeypatch.setattr("evaluation.translations.MAX_NEW_TOKENS", 2)
    _, cut = translate(translator, ["你好\nHello", "好的"])
    assert cut == 2  # random weights never stop by themselves
    monkeypatch.setattr("evaluation.translations.MAX_NEW_TOKENS", 256)
    too_long = "好" * (translator.tokenizer.model_max_length + 1)
    assert translate(translator, [too_long])[1] == 1


def test_an_older_text_of_the_prompts_file_is_no_translation_by_hand(tmp_path):
    save_samples(tmp_path, [sample("你好", "x", "Hallo")])  # as the file said then
    assert read_store(tmp_path, [prompt("你好", "Hello")]) == {}
    assert read_store(tmp_path, [prompt("你好")]) == {("你好", None): Translation("Hallo", "hand")}


@pytest.mark.parametrize("missing", ["tokenizer", "weights", "folder"])
def test_a_translator_that_cannot_be_loaded_is_named(translator_folder, tmp_path, missing):
    folder = tmp_path / "bad"
    if missing != "folder":
        folder.mkdir()
        for path in translator_folder.iterdir():
            if missing not in path.name and not (missing == "weights" and "model." in path.name):
                (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=f"--translator {folder}: "):
        load_translator(str(folder), "cpu")
