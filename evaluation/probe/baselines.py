"""Measure what answers without any model score.

    python evaluation/probe/baselines.py      # about a minute on one core; writes baselines.json

The baselines answer the test prompts of the combinations from the training pairs alone:

    nearest          the answer to the nearest training prompt (TF-IDF cosine of words)
    nearest, filled  the same answer, about the things and persons of the new prompt
    template         the answer to the first training prompt that differs in its things and persons
                     alone, filled in the same way; blank if there is no such prompt
    ..., facts       the values of the old things also give way to those of the new things, which
                     the table of facts knows
    ..., nouns       other nouns of lists and scenes, such as "thick mane", count as things

Plain questions ask for one fact, which no training pair states. All other prompts are compositions:
they ask for something to be done with a fact, a list or a scene.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from scipy import sparse

from dataset.world.checks import Finder, split_words
from dataset.world.facts import Thing, World, read_world
from dataset.world.generate import ensure_world
from dataset.world.skills import collect_fillers
from evaluation.probe.world_measure import is_right, read_records, split_answer
from model.cli import make_parser, run_script
from model.files import read_json, write_json

RESULTS_FILE = Path(__file__).with_suffix(".json")
BLOCK_SIZE = 100  # prompts that are compared with all training prompts at a time
GROUPS_OF_PROMPTS = ("all prompts", "composition", "plain questions")

Exchange = tuple[str, str]  # a training prompt and its answer


def count_words(texts: list[str], columns: dict[str, int]) -> sparse.csr_array:
    """Return a row a text and a column a word; words without a column are left out."""
    rows = []
    places = []
    for row, text in enumerate(texts):
        for word in split_words(text):
            if word in columns:
                rows.append(row)
                places.append(columns[word])
    shape = len(texts), len(columns)
    ones = np.ones(len(rows))
    return sparse.csr_array((ones, (rows, places)), shape)  # adds up equal places


def find_nearest_prompts(prompts: list[str], training: list[str]) -> list[int]:
    """Return the place of each prompt's nearest training prompt; of equals, the first."""
    words = set()
    for text in training:
        words.update(split_words(text))
    columns = {word: column for column, word in enumerate(sorted(words))}

    counts = count_words(training, columns)
    texts_with_word = (counts > 0).sum(axis=0)
    rarity = np.log(len(training) / texts_with_word)
    weights = counts * rarity
    lengths = np.sqrt(weights.power(2).sum(axis=1))
    lengths = np.maximum(lengths, 1e-9)  # a text of words that all texts have is near to none
    asked = count_words(prompts, columns) * rarity

    nearest = []
    for start in range(0, len(prompts), BLOCK_SIZE):
        block = asked[start : start + BLOCK_SIZE]
        products = (block @ weights.T).toarray()
        cosines = products / lengths  # a prompt's own length does not change the order
        best = cosines.round(9).argmax(axis=1)
        nearest.extend(best.tolist())
    return nearest


class Filler:
    """Put the things and persons of one prompt in place of those of another.

    Both are numbered in the order of the prompt: "The cow belongs to Robert." has the template
    "The <name 1> belongs to <person 1>."
    """

    def __init__(self, things: list[Thing], persons: list[str]) -> None:
        self.things = {thing.name: thing for thing in things}
        names = {}
        for thing in things:
            names[thing.name.lower()] = thing.name
            if thing.plural:
                names[thing.plural.lower()] = thing.name
        self.finder = Finder(names)
        self.person = re.compile(rf"\b({'|'.join(persons)})\b")

    def list_words(self, prompt: str, has_facts: bool = False) -> dict[str, str]:
        """Return the words of each placeholder of a prompt; with facts, also each value's."""
        words = {}
        for number, name in enumerate(self.finder.find(prompt), start=1):
            thing = self.things[name]
            if has_facts:
                for attribute, value in thing.values.items():
                    words[f"<{attribute} {number}>"] = value
            for slot, form in thing.slots().items():
                words[f"<{slot} {number}>"] = form
        persons = dict.fromkeys(self.person.findall(prompt))
        for number, person in enumerate(persons, start=1):
            words[f"<person {number}>"] = person
        return words

    def make_template(self, prompt: str) -> str:
        """Return a prompt with placeholders."""
        return put_placeholders(prompt, self.list_words(prompt))

    def fill(self, prompt: str, exchange: Exchange, has_facts: bool = False) -> str:
        """Return the answer of an exchange about a prompt's things, as far as it has them."""
        old_prompt, answer = exchange
        old_words = self.list_words(old_prompt, has_facts)
        new_words = self.list_words(prompt, has_facts)
        text = put_placeholders(answer, old_words)
        for placeholder, words in (old_words | new_words).items():
            text = text.replace(placeholder, words)
        return text

    def fill_all(
        self, prompts: list[str], exchanges: list[Exchange | None], has_facts: bool = False
    ) -> list[str]:
        """Answer each prompt by its exchange; where there is none, the answer is blank."""
        answers = []
        for prompt, exchange in zip(prompts, exchanges, strict=True):
            answer = self.fill(prompt, exchange, has_facts) if exchange else ""
            answers.append(answer)
        return answers


def put_placeholders(text: str, words: dict[str, str]) -> str:
    """Replace words by their placeholders; the longest words and the first placeholders win."""
    placeholders = {}
    for placeholder, form in words.items():
        placeholders.setdefault(form, placeholder)
    if not placeholders:
        return text
    longest_first = sorted(placeholders, key=len, reverse=True)
    escaped = [re.escape(form) for form in longest_first]
    pattern = re.compile(rf"\b({'|'.join(escaped)})\b")
    return pattern.sub(lambda match: placeholders[match[0]], text)


def match_templates(
    prompts: list[str], exchanges: list[Exchange], filler: Filler
) -> list[Exchange | None]:
    """Return the first exchange that has the template of each prompt; None if there is none."""
    exchange_of_template = {}
    for exchange in exchanges:
        template = filler.make_template(exchange[0])
        exchange_of_template.setdefault(template, exchange)
    matches = []
    for prompt in prompts:
        template = filler.make_template(prompt)
        matches.append(exchange_of_template.get(template))
    return matches


def answer_prompts(
    prompts: list[str], exchanges: list[Exchange], world: World
) -> dict[str, list[str]]:
    """Return the answers of each baseline to all prompts."""
    persons = [name for name, *_ in world.stories["people"]]
    filler = Filler(world.things, persons)
    noun_filler = Filler(world.things + collect_fillers(world), persons)

    training = [prompt for prompt, _ in exchanges]
    places = find_nearest_prompts(prompts, training)
    nearest = [exchanges[place] for place in places]
    template = match_templates(prompts, exchanges, filler)
    noun_template = match_templates(prompts, exchanges, noun_filler)
    return {
        "nearest": [answer for _, answer in nearest],
        "nearest, filled": filler.fill_all(prompts, nearest),
        "template": filler.fill_all(prompts, template),
        "template, facts": filler.fill_all(prompts, template, has_facts=True),
        "template, nouns": noun_filler.fill_all(prompts, noun_template),
        "template, facts, nouns": noun_filler.fill_all(prompts, noun_template, has_facts=True),
    }


def find_group(skill: str, world: World) -> str:
    """Return the group of a skill: plain questions ask for an attribute and nothing else."""
    for category in world.categories.values():
        for attribute in category.attributes.values():
            if attribute.skill == skill:
                return "plain questions"
    return "composition"


def tabulate_baselines(path: Path = RESULTS_FILE) -> pd.DataFrame:
    """Return the baselines of a JSON file: a row each, percent correct in each group."""
    results = read_json(path)
    sizes = pd.Series(results["prompts"])
    correct = pd.DataFrame(results["correct"]).T
    sizes["all prompts"] = sizes.sum()
    correct["all prompts"] = correct.sum(axis=1)
    table = pd.DataFrame({"answered": results["answered"]})
    for group in GROUPS_OF_PROMPTS:
        size = sizes[group]
        share = correct[group] / size
        table[f"{group} ({size:,})"] = share.map("{:.1%}".format)
    return table.rename_axis("baseline").reset_index()


def main(argv: list[str] | None = None) -> None:
    """Score the baselines, write the JSON file and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS_FILE, help="a JSON file")
    args = parser.parse_args(argv)
    files = ensure_world()
    world = read_world()
    records = read_records(files["combinations_test"])
    prompts = [split_answer(record)[0] for record in records]
    exchanges = [split_answer(record) for record in read_records(files["sft"])]
    groups = pd.Series([find_group(record["skill"], world) for record in records])

    answered = {}
    correct = {}
    for name, answers in answer_prompts(prompts, exchanges, world).items():
        marks = pd.Series(map(is_right, answers, records))
        correct[name] = marks.groupby(groups).sum().to_dict()
        answered[name] = len(answers) - answers.count("")
    counts = groups.value_counts().to_dict()
    write_json(args.output, {"prompts": counts, "answered": answered, "correct": correct})
    print(tabulate_baselines(args.output).to_string(index=False))


if __name__ == "__main__":
    run_script(main)
