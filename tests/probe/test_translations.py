"""Translations: the world's exact twins and glosses, a tiny random model, and what is kept."""

import json
from pathlib import Path

import pytest
from transformers import MarianConfig, MarianMTModel

from dataset.world.facts import WORLD_DIR, read_toml
from evaluation.probe import translations
from evaluation.probe.prompts import CJK
from evaluation.probe.translations import STORE_FILE, WorldTranslator, translate_samples
from model.checkpoint import load_tokenizer
from model.cli import UserError

WORLD = WorldTranslator()


@pytest.mark.parametrize(
    "chinese, english",
    [
        ("狮子的家在草原。", "The home of a lion is on the savanna."),
        ("狮子的家在大海。", "The home of a lion is in the sea."),  # wrong, and yet the world's
        ("猫头鹰喜欢吃老鼠。", "An owl enjoys eating mice."),
        ("“狮子的家在草原。”", '"The home of a lion is on the savanna."'),
        ("小明，狮子的家在草原。", "Mike, the home of a lion is on the savanna."),
        ("狮子住在哪里？只写答案。", "Where does a lion live? Write only the answer."),
        ("填空：狮子的家在____。", "Fill the gap: The home of a lion is ____."),
        ("狮子：草原。", "Lion: on the savanna."),
        ("小明说：“狮子喜欢住在草原。”", 'Mike says: "A lion likes living on the savanna."'),
        ("system: 你好\nuser: 它住在哪里？", "system: Hello\nuser: Where does it live?"),
        ("狮子的家在草原。它吃石头。", "The home of a lion is on the savanna. [它吃石头。]"),
        ("狮子吃石头和青草", "[lion 吃石头和 grass]"),
        ("Plain English.", "Plain English."),
    ],
)
def test_the_world_has_an_english_twin_or_a_gloss(chinese, english):
    assert WORLD.translate(chinese) == english


@pytest.mark.parametrize("path", sorted((WORLD_DIR / "chinese" / "facts").glob("*.toml")), ids=str)
def test_every_pattern_of_the_world_has_a_twin(path):
    data = read_toml(path)
    name, *values = (cell.strip() for cell in data["table"].strip().splitlines()[0].split("|"))
    for attribute, value in zip(data["attributes"].values(), values, strict=True):
        for key in attribute["english"]:
            patterns = attribute[key] if isinstance(attribute[key], list) else [attribute[key]]
            for pattern in patterns:
                text = pattern.format(a=name, value=value)
                found = WORLD.translate_exactly(text)
                assert found and not CJK.search(found) and "{" not in found, text


def make_sample(prompt: str, output: str, translation: str | None = None) -> dict:
    """Make a sample of the fields that translations read."""
    slots = {"prompt_translation": translation, "output_translation": None}
    return {"prompt": prompt, "output": output} | slots


def read_translations(folder: Path) -> dict[str, tuple[str, str]]:
    """Read translations.jsonl by text."""
    lines = map(json.loads, (folder / STORE_FILE).read_text().splitlines())
    return {line["text"]: (line["translation"], line["by"]) for line in lines}


def test_empty_slots_are_filled_and_the_prompts_own_translation_stays(tmp_path):
    samples = [make_sample("狮子住在哪里？", "草原。", "By hand"), make_sample("Hi", "Hello")]
    translate_samples(samples, tmp_path, None)
    assert samples[0]["output_translation"] is None and not (tmp_path / STORE_FILE).exists()
    translate_samples(samples, tmp_path, WORLD)
    assert samples[0]["prompt_translation"] == "By hand"
    assert samples[0]["output_translation"] == "On the savanna."
    assert samples[1] == make_sample("Hi", "Hello")
    assert read_translations(tmp_path) == {"草原。": ("On the savanna.", "world")}


def test_nothing_is_lost_when_outputs_are_made_again(tmp_path):
    def probe(output: str, translator: WorldTranslator | None, by_hand: str | None = None) -> dict:
        sample = make_sample("你好", output, "Hello")
        translate_samples([sample], tmp_path, translator)
        saved = sample | ({"output_translation": by_hand} if by_hand else {})
        lines = [json.dumps(one) + "\n" for one in (saved, sample)]  # one of 2 slots was changed
        (tmp_path / "samples.jsonl").write_text("".join(lines))
        return sample

    probe("草原。", WORLD, by_hand="In the grass, by hand.")
    probe("大海。", None)  # made again, and the output differs
    back = probe("草原。", WORLD)  # and differs back
    assert back["output_translation"] == "In the grass, by hand."
    assert read_translations(tmp_path) == {"草原。": ("In the grass, by hand.", "hand")}


def test_a_model_translates_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(translations, "MAX_TOKENS", 8)
    folder, tokenizer = tmp_path / "tiny-zh-en", load_tokenizer()
    sizes = ("layers", "attention_heads", "ffn_dim")
    small = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in sizes}
    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
    MarianMTModel(MarianConfig(vocab_size=6400, d_model=8, **small, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    translator = translations.ModelTranslator(str(folder), "cpu")
    assert translator.name == "tiny-zh-en"
    alone = translator.translate("你好")
    assert alone and translator.translate("1. OK\n你好\n\nBye") == f"1. OK\n{alone}\n\nBye"
    with pytest.raises(UserError, match="--translator .*nothing: .*'world' or a model"):
        translations.ModelTranslator(str(tmp_path / "nothing"), "cpu")
