"""Translate prompts and outputs that hold Chinese or Japanese into English, and keep translations.

samples.jsonl has a slot for each: `prompt_translation` and `output_translation`. `eval_llm.py
--translator` fills them; an output's can also be written by hand in samples.jsonl.
translations.jsonl beside it keeps each translation by its text, with its author ("hand" or the
translator's name): none is lost when outputs are made again.

`--translator world` needs no model: a sentence that a pattern of `dataset/world/chinese/` produces
gets that pattern's English twin; another one gets a word-by-word gloss in brackets. Any other name
is a folder or a hub id of a transformers model that translates, such as Helsinki-NLP/opus-mt-zh-en.
"""

import re
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dataset.lm_dataset import read_jsonl, write_records
from dataset.world.facts import WORLD_DIR, capitalize, read_toml, with_article
from evaluation.probe.prompts import CJK
from model.cli import UserError

CHINESE_DIR = WORLD_DIR / "chinese"
STORE_FILE = "translations.jsonl"
MAX_TOKENS = 256  # of a line that a model translates
SLOT = re.compile(r"\\{(\w+)\\}")  # of a pattern that was escaped
WORD_SLOTS = ("a", "name", "value", "word", "person", "p", "q")  # the others hold sentences
PARTS = re.compile(r"((?:system|user|assistant): |\n)|([^。？！\n]+[。？！]*[”」]?)")


def read_twins() -> list[tuple[dict, dict]]:
    """Read tables of Chinese patterns and words, each with the table of their English twins."""
    tables = []
    for path in sorted((CHINESE_DIR / "facts").glob("*.toml")):
        tables += read_toml(path)["attributes"].values()
    tables += read_toml(CHINESE_DIR / "skills.toml")["skill"].values()
    stories = read_toml(CHINESE_DIR / "stories.toml")
    english = {}
    for key in stories:
        if key.endswith("_en"):
            english[key.removesuffix("_en")] = stories[key]
    return [*((table, table["english"]) for table in tables), (stories, english)]


def read_words() -> dict[str, str]:
    """Read the names of things and of people, Chinese and English."""
    words = {}
    for path in sorted((CHINESE_DIR / "facts").glob("*.toml")):
        words |= read_toml(path)["english"]
    for name, *_, english in read_toml(CHINESE_DIR / "stories.toml")["people"]:
        words[name] = english
    return words


class WorldTranslator:
    """Translate the sentences of the world's Chinese part exactly, and gloss all others."""

    name = "world"

    def __init__(self) -> None:
        self.words = {"____": "____"} | read_words()  # Chinese words and English ones
        pairs = []  # patterns, Chinese and English
        for chinese, english in read_twins():
            for key, value in english.items():  # a pattern, or a list of patterns or of words
                if isinstance(value, str):
                    pairs.append((chinese[key], value))
                    continue
                twins = list(zip(chinese[key], value, strict=True))
                pairs += twins
                if key == "words":
                    self.words |= dict(twins)
        longest_first = sorted(self.words, key=len, reverse=True)
        self.word = "|".join(map(re.escape, longest_first))
        self.patterns = []
        for chinese, english in pairs:
            if chinese != "{answer}":  # a slot alone would match any text
                pattern = SLOT.sub(self.make_group, re.escape(chinese))
                self.patterns.append((re.compile(pattern, re.DOTALL), english))

    def make_group(self, slot: re.Match) -> str:
        """Make the group of a regular expression that matches what a slot may hold."""
        return f"(?P<{slot[1]}>{self.word if slot[1].lower() in WORD_SLOTS else '.+'})"

    def translate(self, text: str) -> str:
        """Translate a whole text, or else sentence by sentence; gloss other Chinese in brackets."""
        translation = self.translate_exactly(text.strip())
        if translation:
            return translation
        parts = []
        for mark, sentence in PARTS.findall(text):
            if CJK.search(sentence):
                sentence = self.translate_exactly(sentence) or self.gloss(sentence)
                sentence += " "
            parts.append(mark or sentence)
        return "".join(parts).replace(" \n", "\n").strip()

    def gloss(self, sentence: str) -> str:
        """Translate a sentence word by word, as far as the world has its words."""
        words = []
        for piece in re.split(f"({self.word})", sentence):
            if word := piece.strip():
                words.append(self.words.get(word, word))
        return f"[{' '.join(words)}]"

    def translate_exactly(self, text: str) -> str | None:
        """Return the English twin of a text that a pattern produces; None for another text."""
        for pattern, english in self.patterns:
            match = pattern.fullmatch(text)
            slots = match and self.translate_slots(match.groupdict())
            if slots is not None:
                return capitalize(english.format(**slots))
        return None

    def translate_slots(self, texts: dict[str, str]) -> dict[str, str] | None:
        """Translate what stands in the slots; None if a sentence in one has no twin."""
        slots = {}
        for slot, text in texts.items():
            if slot == "S":
                text = self.translate_exactly(text + "。")
                text = text and text.removesuffix(".")
            else:
                text = self.words.get(text) or self.translate_exactly(text)
            if text is None:
                return None
            if slot in ("a", "name", "Name"):
                slots |= {"a": with_article(text), "name": text}
            elif slot == "answer":
                slots |= {"answer": text, "small_answer": text[0].lower() + text[1:]}
            else:
                slots[slot] = text
        return slots | {capitalize(slot): capitalize(text) for slot, text in slots.items()}


class ModelTranslator:
    """Translate with a sequence-to-sequence model; code that comes with a model is not run."""

    def __init__(self, path: str, device: str) -> None:
        self.name = Path(path).name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--translator {path}: {reason}; name 'world' or a model") from error
        self.model = model.to(device)

    @torch.inference_mode()
    def translate(self, text: str) -> str:
        """Translate a text line by line, so that lists stay lists; keep lines without Chinese."""
        lines = text.splitlines()
        for i, line in enumerate(lines):
            if CJK.search(line):
                options = {"truncation": True, "return_token_type_ids": False}
                inputs = self.tokenizer(line, return_tensors="pt", **options).to(self.model.device)
                (ids,) = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
                lines[i] = self.tokenizer.decode(ids, skip_special_tokens=True)
        return "\n".join(lines)


def translate_samples(
    samples: list[dict], folder: Path, translator: WorldTranslator | ModelTranslator | None
) -> None:
    """Fill the empty slots of samples from `folder`'s store, then by a translator; keep the store.

    A prompt's own translation, from its file, goes first.
    """
    store = read_store(folder)
    for sample, field in product(samples, ("prompt", "output")):
        text = sample[field]
        slot = f"{field}_translation"
        if not sample[slot]:
            if translator and text not in store and CJK.search(text):
                english = translator.translate(text)
                store[text] = {"text": text, "translation": english, "by": translator.name}
            sample[slot] = store.get(text, {}).get("translation")
    if store:
        write_records(folder / STORE_FILE, store.values())


def read_store(folder: Path) -> dict[str, dict[str, str]]:
    """Read `folder`'s translations by text; a slot changed in samples.jsonl is by hand."""
    path = folder / STORE_FILE
    lines = read_jsonl(path) if path.is_file() else ()
    kept = {line["text"]: line for _, line in lines}
    store = dict(kept)
    samples_path = folder / "samples.jsonl"
    samples = read_jsonl(samples_path) if samples_path.is_file() else ()
    for _, sample in samples:
        text = sample["output"]
        english = sample["output_translation"]
        if english and english != kept.get(text, {}).get("translation"):
            store[text] = {"text": text, "translation": english, "by": "hand"}
    return store
