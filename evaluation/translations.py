"""English translations of saved prompts and outputs that hold Chinese or Japanese.

samples.jsonl has a slot for each: `prompt_translation` and `output_translation`. They are filled by
hand in that file, or by `eval_llm.py --translator`, which fills empty slots only. Beside it,
translations.jsonl keeps every translation that was ever there, with who made it, so that none is
lost when outputs are made again and differ, or are made with other prompts: a line is

    {"prompt": ..., "output": ... or null for the prompt itself, "translation": ..., "by": ...}

A translation of a prompt in qualitative_prompts.md stands there, is edited there, and goes first.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dataset.jsonl import DataError, parse_record
from dataset.lm_dataset import chunks
from evaluation.metrics import has_cjk
from evaluation.outputs import as_jsonl
from evaluation.prompts import Prompt
from model.files import CheckpointError, write_text

STORE_FILE = "translations.jsonl"
BY_HAND = "hand"
SLOTS = (("prompt_translation", lambda s: None), ("output_translation", lambda s: s["output"]))
MAX_NEW_TOKENS = 256  # of a translated line
LINES_AT_ONCE = 16

Key = tuple[str, str | None]  # a prompt, and an output or None for the prompt itself


@dataclass(frozen=True)
class Translation:
    """An English text and who made it: "hand", or the translator's name."""

    text: str
    by: str


Store = dict[Key, Translation]


def read_store(folder: Path, prompts: list[Prompt]) -> Store:
    """What translations.jsonl and samples.jsonl in `folder` hold; one changes the latter by hand.

    Args:
        prompts: those with a translation in their own file keep it there; what samples.jsonl says
            of them is an older text of that file.

    Raises:
        DataError: a line that is no translation or no sample, or two translations of one text.
    """
    store = {
        (line["prompt"], line["output"]): Translation(line["translation"], line["by"])
        for line in read_lines(folder / STORE_FILE, ("prompt", "output", "translation", "by"))
    }
    in_file = {(prompt.text, None) for prompt in prompts if prompt.translation}
    known = {key: made.text for key, made in store.items()}
    path = folder / "samples.jsonl"
    edits: Store = {}
    for sample in read_lines(path, ("id", "prompt", "output", *dict(SLOTS))):
        for slot, output_of in SLOTS:
            key, text = (sample["prompt"], output_of(sample)), sample[slot]
            if not text or known.get(key) == text or key in in_file:
                continue
            if key in edits and edits[key].text != text:
                raise DataError(
                    f"{path}: {slot} of {sample['id']!r} differs between samples of the same text: "
                    f"{edits[key].text!r} and {text!r}; keep one"
                )
            edits[key] = Translation(text, BY_HAND)
    return store | edits


def read_lines(path: Path, needed: tuple[str, ...]) -> list[dict]:
    """The JSON objects of an earlier file, none if there is no file; each must have `needed`."""
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        record = parse_record(line, f"{path}:{number}")
        missing = [name for name in needed if name not in record]
        if missing:
            raise DataError(
                f"{path}:{number}: has no {missing[0]!r}; mend the line, or remove the file and "
                "with it its translations"
            )
        records.append(record)
    return records


def fill_slots(samples: list[dict], store: Store) -> None:
    """Puts what is known into the slots of `samples` that are empty."""
    for sample in samples:
        for slot, output_of in SLOTS:
            known = store.get((sample["prompt"], output_of(sample)))
            if sample[slot] is None and known:
                sample[slot] = known.text


def empty_slots(samples: list[dict]) -> dict[Key, str]:
    """The texts that hold Chinese or Japanese and have no translation yet, by their key."""
    return {
        (sample["prompt"], output_of(sample)): output_of(sample) or sample["prompt"]
        for sample in samples
        for slot, output_of in SLOTS
        if sample[slot] is None and has_cjk(output_of(sample) or sample["prompt"])
    }


def write_store(folder: Path, store: Store) -> None:
    """Writes translations.jsonl; nothing where there is no translation."""
    lines = [
        {"prompt": prompt, "output": output, "translation": made.text, "by": made.by}
        for (prompt, output), made in store.items()
    ]
    if lines:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / STORE_FILE, as_jsonl(lines))


# ------------------------------------------------------------------------------------ translators


@dataclass(frozen=True)
class Translator:
    """A model that translates into English, such as Helsinki-NLP/opus-mt-zh-en."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_translator(path: str, device: str) -> Translator:
    """A sequence-to-sequence model of one direction, from a folder or a hub id.

    transformers 5 has no translation pipeline any more: this is its model and tokenizer. Weights
    are read from safetensors only, and no code that comes with them is run.

    Raises:
        CheckpointError: it is not there, has no safetensors, or needs a package that is missing.
    """
    # For a folder, nothing is asked of the hub.
    safe = {"trust_remote_code": False, "local_files_only": Path(path).is_dir()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **safe)
        model = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True, **safe)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise CheckpointError(
            f"--translator {path}: {reason} (needs a tokenizer, of Marian's kind with pip install "
            "sentencepiece, and model.safetensors)"
        ) from error
    return Translator(Path(path).name, model.to(device).eval(), tokenizer)


def translate_missing(samples: list[dict], store: Store, translator: Translator) -> int:
    """Adds the translations that are missing to `store`; what is in it stays.

    Returns:
        How many lines were cut, as `translate` counts them.
    """
    missing = empty_slots(samples)
    texts = list(dict.fromkeys(missing.values()))
    english, cut = translate(translator, texts)
    translated = dict(zip(texts, english, strict=True))
    for key, text in missing.items():
        if translated[text].strip():
            store[key] = Translation(translated[text], translator.name)
    return cut


@torch.inference_mode()
def translate(translator: Translator, texts: list[str]) -> tuple[list[str], int]:
    """English of each text, line by line, so that lists stay lists; other lines stay as they are.

    Translation models are trained on sentences.

    Returns:
        The texts, and how many different lines were cut: longer than the model reads, or with a
        translation that fills `MAX_NEW_TOKENS`.
    """
    tokenizer, model = translator.tokenizer, translator.model
    lines = {line for text in texts for line in text.splitlines() if has_cjk(line)}
    english: dict[str, str] = {}
    cut = 0
    for batch in chunks(sorted(lines, key=lambda line: (len(line), line)), LINES_AT_ONCE):
        read = [len(ids) for ids in tokenizer(batch)["input_ids"]]
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        # The first token starts the decoder.
        written = (output[:, 1:] != tokenizer.pad_token_id).sum(dim=1).tolist()
        cut += sum(
            n > tokenizer.model_max_length or m >= MAX_NEW_TOKENS
            for n, m in zip(read, written, strict=True)
        )
        decoded = tokenizer.batch_decode(output, skip_special_tokens=True)
        english |= dict(zip(batch, decoded, strict=True))
    lines_of = (text.splitlines() for text in texts)
    return ["\n".join(english.get(line, line) for line in lines) for lines in lines_of], cut
