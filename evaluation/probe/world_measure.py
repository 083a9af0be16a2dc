"""Judge answers of the world, also with another thing in place of their own: the chance level."""

import re

from dataset.checks import judge_answer, world_vocabulary
from dataset.world.facts import WORLD_DIR, read_world

WORLDS = (read_world(), read_world(WORLD_DIR / "chinese"))
THINGS = {thing.name: thing for world in WORLDS for thing in world.things}


def split_answer(record: dict) -> tuple[str, str]:
    """Part a conversation into all text before the answer, and the answer."""
    *before, answer = (turn["content"] for turn in record["conversations"])
    return "\n".join(before), answer


def is_right(answer: str, record: dict) -> bool:
    """Say whether an answer that ends is correct."""
    return judge_answer(answer, True, record) == "correct"


def replace_thing(answer: str, old_prompt: str, new_prompt: str) -> str:
    """Put the first thing of one prompt, if both name any, in place of that of another."""
    names = world_vocabulary().names
    old, new = ([*map(THINGS.get, names.find(text)), None][0] for text in (old_prompt, new_prompt))
    if old is None or new is None:
        return answer
    slots = new.slots()
    forms = {form: slots.get(slot, slots["a"]) for slot, form in old.slots().items()}
    longest_first = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    return re.sub(rf"\b(?:{longest_first})\b", lambda match: forms[match.group()], answer)
