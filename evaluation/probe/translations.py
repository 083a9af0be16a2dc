"""Translate prompts and outputs that hold Chinese or Japanese into English, and keep translations.

samples.jsonl has a slot for each: `prompt_translation` and `output_translation`. `eval_llm.py
--translator` fills them; an output's can also be written by hand in samples.jsonl.
translations.jsonl beside it keeps each translation by its text: none is lost when outputs are made
again. A line is

    {"text": ..., "translation": ..., "by": "hand" or the translator's name}

`--translator world` needs no model: a sentence that a pattern of `dataset/world/chinese/` produces
gets that pattern's English twin; another one gets a word-by-word gloss in brackets. Any other name
is a folder or a hub id of a transformers model that translates, such as Helsinki-NLP/opus-mt-zh-en.
"""

import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dataset.lm_dataset import read_jsonl
from dataset.world.facts import WORLD_DIR, capitalize, read_toml, with_article
from evaluation.probe.measures import has_cjk
from model.files import UserError, escape_control, write_text

STORE_FILE = "translations.jsonl"
SLOTS = {"prompt_translation": "prompt", "output_translation": "output"}
MAX_NEW_TOKENS = 256  # of a line that a model translates
SLOT = re.compile(r"\\{(\w+)\\}")  # of a pattern that was escaped
WORD_SLOTS = ("a", "name", "value", "word", "person", "p", "q")  # the others hold sentences
PARTS = re.compile(r"((?:system|user|assistant): |\n)|([^。？！\n]+[。？！]*[”」]?)")


class WorldTranslator:
    """Translate the sentences of the world's Chinese part exactly, and gloss all others."""

    name = "world"

    def __init__(self, folder: Path = WORLD_DIR / "chinese"):
        self.words, pairs = {"____": "____"}, []
        for path in sorted((folder / "facts").glob("*.toml")):
            category = read_toml(path)
            self.words |= category["english"]
            for attribute in category["attributes"].values():
                pairs += pair_lists(attribute, attribute["english"])
        for skill in read_toml(folder / "skills.toml")["skill"].values():
            pairs += pair_lists(skill, skill["english"])
            words = zip(skill.get("words", []), skill["english"].get("words", []), strict=True)
            self.words |= dict(words)
        stories = read_toml(folder / "stories.toml")
        self.words |= {name: english for name, *_, english in stories["people"]}
        english = {key[:-3]: twins for key, twins in stories.items() if key.endswith("_en")}
        pairs += pair_lists(stories, english)
        longest_first = sorted(self.words, key=len, reverse=True)
        self.word = "|".join(map(re.escape, longest_first))
        self.patterns = [
            (re.compile(SLOT.sub(self.make_group, re.escape(chinese)), re.DOTALL), english)
            for chinese, english in pairs
            if chinese != "{answer}"  # it says nothing, and would translate itself
        ]

    def make_group(self, slot: re.Match) -> str:
        """Make the group of a regular expression that matches what a slot may hold."""
        return f"(?P<{slot[1]}>{self.word if slot[1].lower() in WORD_SLOTS else '.+'})"

    def translate_exactly(self, text: str) -> str | None:
        """Return the English twin of a text that a pattern produces; None for another text."""
        for pattern, english in self.patterns:
            match = pattern.fullmatch(text)
            slots = match and self.translate_slots(match.groupdict())
            if slots is not None:
                return capitalize(english.format(**slots))
        return None

    def translate_slots(self, found: dict[str, str]) -> dict[str, str] | None:
        """Translate what stands in the slots; None if a sentence in one has no twin."""
        slots = {}
        for slot, text in found.items():
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

    def gloss(self, text: str) -> str:
        """Translate the words that are known, and leave the rest, in brackets."""
        parts = [part.strip() for part in re.split(f"({self.word})", text) if part.strip()]
        return f"[{' '.join(self.words.get(part, part) for part in parts)}]"

    def translate_text(self, text: str) -> str:
        """Translate a whole text, or else sentence by sentence; keep what is not Chinese."""
        whole = self.translate_exactly(text.strip())
        if whole:
            return whole
        parts = []
        for mark, sentence in PARTS.findall(text):
            if has_cjk(sentence):
                sentence = (self.translate_exactly(sentence) or self.gloss(sentence)) + " "
            parts.append(mark or sentence)
        return "".join(parts).replace(" \n", "\n").strip()

    def translate(self, texts: list[str]) -> list[str]:
        """Translate texts one by one."""
        return [self.translate_text(text) for text in texts]


def pair_lists(chinese: dict, english: dict) -> list[tuple[str, str]]:
    """Pair each pattern with its English twin; a value is a pattern or a list of them."""
    pairs = []
    for key, twins in english.items():
        both = ([v] if isinstance(v, str) else v for v in (chinese[key], twins))
        pairs += zip(*both, strict=True)
    return pairs


class ModelTranslator:
    """Translate with a sequence-to-sequence model of one direction; no code of its is run."""

    def __init__(self, path: str, device: str):
        self.name = Path(path).name
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--translator {path}: {reason}; name 'world' or a model") from error
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def translate(self, texts: list[str]) -> list[str]:
        """Translate texts line by line, so that lists stay lists; keep lines without Chinese."""
        lines = sorted({line for text in texts for line in text.splitlines() if has_cjk(line)})
        english: dict[str, str] = {}
        for start in range(0, len(lines), 16):
            batch = lines[start : start + 16]
            inputs = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            output = self.model.generate(
                input_ids=inputs["input_ids"].to(self.model.device),
                attention_mask=inputs["attention_mask"].to(self.model.device),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            decoded = self.tokenizer.batch_decode(output, skip_special_tokens=True)
            english |= dict(zip(batch, decoded, strict=True))
        return ["\n".join(english.get(line, line) for line in text.splitlines()) for text in texts]


Translator = WorldTranslator | ModelTranslator


def load_translator(name: str, device: str) -> Translator:
    """Load the world's translator, or a transformers model."""
    return WorldTranslator() if name == "world" else ModelTranslator(name, device)


# ---------------------------------------------------------------------------------- the store


def translate_samples(samples: list[dict], folder: Path, translator: Translator | None) -> None:
    """Fill the empty slots of samples from `folder`'s store, then by a translator; keep the store.

    A prompt's own translation, from its file, goes first.
    """
    store = read_store(folder)
    texts = {s[field]: None for s in samples for slot, field in SLOTS.items() if not s[slot]}
    if translator:
        missing = [text for text in texts if has_cjk(text) and text not in store]
        for text, english in zip(missing, translator.translate(missing), strict=True):
            store[text] = {"translation": english, "by": translator.name}
    for sample in samples:
        for slot, field in SLOTS.items():
            if not sample[slot] and sample[field] in store:
                sample[slot] = store[sample[field]]["translation"]
    lines = (json.dumps({"text": t} | made, ensure_ascii=False) for t, made in store.items())
    if store:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / STORE_FILE, "".join(escape_control(line) + "\n" for line in lines))


def read_store(folder: Path) -> dict[str, dict[str, str]]:
    """Read the translations that `folder` has; a slot changed in samples.jsonl is by hand."""
    store, path = {}, folder / STORE_FILE
    for _, line in read_jsonl(path) if path.is_file() else ():
        store[line["text"]] = {"translation": line["translation"], "by": line["by"]}
    path = folder / "samples.jsonl"
    for where, sample in read_jsonl(path) if path.is_file() else ():
        if not {"output", "output_translation"} <= sample.keys():
            raise UserError(f"{where}: is no sample; mend the line or move the file away")
        text, english = sample["output"], sample["output_translation"]
        if english and english != store.get(text, {}).get("translation"):
            store[text] = {"translation": english, "by": "hand"}
    return store
