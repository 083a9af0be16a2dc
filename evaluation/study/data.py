"""Data that the study makes: pairs mixed with text, random facts, tokenizers with unused rows.

All of it is made anew at each call, from the world alone: the same world gives the same bytes.
"""

from pathlib import Path

from dataset.lm_dataset import read_jsonl
from dataset.world.generate import write_records
from evaluation.probe.world_facts import draw_facts
from model.checkpoint import load_tokenizer
from model.files import REPO_DIR, UserError, file_sha256
from trainer.arguments import BASE_DIR

TEXT_SHARE = 0.2  # of all characters of `sft_mixed`
TEXT_PROMPT = "Write a text."  # in front of a document; no instruction of the world says this


def find_data(name: str, world: dict[str, Path], folder: Path) -> Path:
    """Return the path of data: one of the world's files, or made in `folder`.

    The name is that of a world's file, or such as `sft_mixed`, `facts16000` or `tokenizer64`.
    """
    stem = name.rstrip("0123456789")
    count, path = int(name[len(stem) :] or 0), folder / f"{name}.jsonl"
    if name in world:
        return world[name]
    folder.mkdir(parents=True, exist_ok=True)
    if stem == "tokenizer":
        tokenizer = load_tokenizer(BASE_DIR)
        tokenizer.add_tokens([f"<|unused{i}|>" for i in range(count)], special_tokens=True)
        tokenizer.save_pretrained(folder / name)
        return folder / name
    if stem not in ("sft_mixed", "facts"):
        raise UserError(f"the study has no data {name!r}; mend study.toml")
    records = draw_facts(count) if stem == "facts" else mix_text(world)
    write_records(path, records)
    return path


def check_world(frozen: Path) -> None:
    """Refuse a world that is not the frozen one: hashes and paths, as `sha256sum -c` reads them."""
    for digest, name in map(str.split, frozen.read_text(encoding="utf-8").splitlines()):
        if file_sha256(REPO_DIR / name) != digest:
            raise UserError(f"{name}: not the file that {frozen} names; restore the study's world")


def mix_text(world: dict[str, Path]) -> list[dict]:
    """Return the pairs, and documents of the text until these are 20% of all characters.

    A document answers one fixed prompt, so loss falls on all of it.
    """
    records = [record for _, record in read_jsonl(world["sft"])]
    size = sum(len(turn["content"]) for one in records for turn in one["conversations"])
    budget = size * TEXT_SHARE / (1 - TEXT_SHARE)
    for _, document in read_jsonl(world["pretrain"]):
        budget -= len(document["text"])
        if budget < 0:
            break
        records.append({"instruction": TEXT_PROMPT, "output": document["text"]})
    return records
