"""The demo corpus: enough of it, the same bytes each time, checks that hold, nothing leaked."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from dataset import demo
from dataset.command_line import REPO_DIR
from evaluation.metrics import check_answer
from evaluation.prompts import read_prompts

RAW = tomllib.loads((REPO_DIR / "dataset" / "demo_world.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = ("sft", "sft_valid", "medical", "medical_valid")


def table(group: str) -> list[dict[str, str]]:
    """The rows of a group's table, read without demo.py."""
    lines = [line.split("|") for line in RAW["group"][group]["table"].strip().splitlines()]
    header = [column.strip() for column in lines[0]]
    return [dict(zip(header, map(str.strip, line), strict=True)) for line in lines[1:]]


def bare(name: str) -> str:
    return name.split("/")[0].removeprefix("the ")


CELLS = {bare(row["name"]): row["name"] for group in RAW["group"] for row in table(group)}


def names_of(subject: str) -> list[str]:
    """The subject with its plural, as the tables give it or with a plain -s."""
    plural = CELLS[subject].partition("/")[2]
    return [subject, plural if plural not in ("", "-") else subject + "s"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    return demo.write_demo_corpus(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def corpus(paths) -> dict[str, list[dict]]:
    return {key: [json.loads(line) for line in path.open()] for key, path in paths.items()}


def prompt(record: dict) -> tuple[str, ...]:
    return tuple(m["content"] for m in record["conversations"] if m["role"] == "user")


def all_text(record: dict) -> str:
    return "\n".join(message["content"] for message in record["conversations"])


def mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) is not None


# ---------------------------------------------------------------- how much there is


def test_the_world_has_enough_things_and_no_name_twice():
    names = [bare(row["name"]) for group in RAW["group"] for row in table(group)]
    assert len(names) >= 300
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(table("illness")) >= 30


def test_the_files_are_as_large_as_promised(paths, corpus):
    assert set(paths) == set(demo.DEMO_FILES)
    assert 2_000_000 < paths["pretrain"].stat().st_size < 3_000_000
    assert len(corpus["pretrain_valid"]) >= 100
    assert 0.01 < len(corpus["pretrain_valid"]) / len(corpus["pretrain"]) < 0.02
    kinds = Counter(record["kind"] for record in corpus["sft"])
    assert len(corpus["sft"]) >= 4000 and len(kinds) >= 12 and min(kinds.values()) >= 50
    assert len(corpus["sft_valid"]) >= 300
    assert len(corpus["medical"]) + len(corpus["medical_valid"]) >= 600
    assert len(corpus["medical_valid"]) >= 60


def test_every_kind_has_several_wordings(corpus):
    """The first two words of a prompt stand for its wording; kinds that open with facts aside."""
    for kind in {record["kind"] for record in corpus["sft"]}:
        openings = {
            tuple(prompt(record)[-1].split()[:2])
            for record in corpus["sft"]
            if record["kind"] == kind
        }
        assert len(openings) >= 2, kind


# ---------------------------------------------------------------- the form of the lines


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_conversations_are_well_formed(corpus, key):
    for record in corpus[key]:
        roles = [message["role"] for message in record["conversations"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user", "assistant"], ["user", "assistant"] * 2)
        assert 1 <= len(record["conversations"][-1]["content"].split()) <= 60
        assert record["kind"] and record["subject"]


def test_some_have_a_system_message_and_some_two_turns(corpus):
    sft = corpus["sft"]
    systems = sum(record["conversations"][0]["role"] == "system" for record in sft)
    two_turns = sum(len(prompt(record)) == 2 for record in sft)
    assert 0.02 < systems / len(sft) < 0.1
    assert 0.01 < two_turns / len(sft) < 0.1


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize("key", INSTRUCTIONS)
def test_references_pass_their_checks(corpus, key):
    for record in corpus[key]:
        assert check_answer(record["conversations"][-1]["content"], record["check"]), record


@pytest.mark.parametrize("key", ["sft_valid", "medical_valid"])
def test_an_echo_or_an_evasion_does_not_pass(corpus, key):
    for record in corpus[key]:
        for text in (prompt(record)[-1], "I do not know.", "Sure! Here it is:", "the the the"):
            assert not check_answer(text, record["check"]), (text, record)


def test_sorted_lists_are_in_order(corpus):
    records = [record for record in corpus["sft"] if record["kind"] == "sort"]
    for record in records:
        entries = record["conversations"][-1]["content"].split(", ")
        given = re.findall(r"[\w' -]+", prompt(record)[0].split(":")[1].rstrip("."))
        assert entries == sorted((name.strip() for name in given), key=str.lower)
    assert records


def test_what_is_called_bigger_is_bigger(corpus):
    steps = ["tiny", "small", "medium-sized", "large", "huge"]
    rows = [*table("animal"), *table("vehicle")]
    sizes = {bare(row["name"]): steps.index(row["size"]) for row in rows}
    for record in corpus["sft"]:
        if record["kind"] == "compare":
            answer = record["conversations"][-1]["content"]
            left, word, right = re.fullmatch(
                r"An? (.+) is (bigger|smaller) than an? (.+)\.", answer
            ).groups()
            assert (sizes[left] > sizes[right]) == (word == "bigger"), answer
            assert word in prompt(record)[0]


def test_legs_are_counted_as_in_the_table(corpus):
    number = {"0": "no", "2": "two", "4": "four", "6": "six", "8": "eight", "10": "ten"}
    legs = {bare(row["name"]): row["legs"] for row in table("animal")}
    found = 0
    for record in corpus["sft"]:
        if record["kind"] == "count" and "legs" in prompt(record)[0]:
            words = number[legs[record["subject"]]]
            assert mentions(record["conversations"][-1]["content"], words), record
            found += 1
    assert found > 10


# ---------------------------------------------------------------- what is held out


@pytest.mark.parametrize("train, valid", [("sft", "sft_valid"), ("medical", "medical_valid")])
def test_no_prompt_occurs_twice(corpus, train, valid):
    prompts = [prompt(record) for key in (train, valid) for record in corpus[key]]
    assert [text for text, count in Counter(prompts).items() if count > 1] == []


def test_no_document_occurs_twice(corpus):
    texts = [record["text"] for key in ("pretrain", "pretrain_valid") for record in corpus[key]]
    assert len(set(texts)) == len(texts)


def held_out_subjects(records: list[dict], what: str) -> list[str]:
    return sorted({record["subject"] for record in records if record["held_out"] == what})


@pytest.mark.parametrize(
    "train, valid, what, least",
    [("sft", "sft_valid", "thing", 20), ("medical", "medical_valid", "condition", 5)],
)
def test_held_out_things_are_pretrained_on_and_never_asked_about(corpus, train, valid, what, least):
    subjects = held_out_subjects(corpus[valid], what)
    assert len(subjects) >= least
    training = "\n".join(map(all_text, corpus[train])).lower()
    documents = "\n".join(record["text"] for record in corpus["pretrain"]).lower()
    for subject in subjects:
        names = [name.lower() for name in names_of(subject)]
        # "in" first: it is quick, and finds nothing for most names.
        assert not any(name in training and mentions(training, name) for name in names), subject
        assert sum(documents.count(name) for name in names) >= 30, subject


def test_held_out_combinations_are_new_though_both_halves_are_known(corpus):
    known = {(record["kind"], t) for record in corpus["sft"] for t in record["things"]}
    known |= {(record["kind"], record["subject"]) for record in corpus["sft"]}
    kinds = {kind for kind, _ in known}
    subjects = {subject for _, subject in known}
    records = [record for record in corpus["sft_valid"] if record["held_out"] == "combination"]
    assert len(records) >= 100
    for record in records:
        assert (record["kind"], record["subject"]) not in known
        assert record["kind"] in kinds
        assert record["subject"] in subjects or record["kind"] == "opposite"


def test_illnesses_stay_out_of_the_general_instructions(corpus):
    text = "\n".join(map(all_text, corpus["sft"] + corpus["sft_valid"])).lower()
    names = [bare(row["name"]).lower() for row in table("illness")]
    assert [name for name in names if re.search(rf"\b{name}\b", text)] == []


def test_no_prompt_of_the_evaluation_is_trained_on(corpus):
    asked = {p.text for p in read_prompts(REPO_DIR / "evaluation" / "qualitative_prompts.md")}
    trained = {text for key in ("sft", "medical") for r in corpus[key] for text in prompt(r)}
    assert asked & trained == set()


# ---------------------------------------------------------------- language


def test_the_english_is_clean(corpus):
    texts = [record["text"] for key in ("pretrain", "pretrain_valid") for record in corpus[key]]
    texts += [all_text(record) for key in INSTRUCTIONS for record in corpus[key]]
    wrong = {
        "two spaces": r"  ",
        "a slot that was not filled": r"\{[a-z]\b|\ba\(n\)|\{\}",
        "a star or a bar": r"[*|]",
        "a space before a mark": r" [,;:!?]| \.(?!\.)",
        "two full stops": r"(?<![. ])\.\.(?!\.)",
        "a before a vowel": r"\b[Aa] (?:[aeio]|un(?!i)|um)[a-z]",
        "an before a consonant": r"\b[Aa]n (?:[bcdfghjklmnpqrstvwyz]|X(?!-))",
        "a word twice": r"\b([A-Za-z]+) \1\b",
        "a plural cell": r"[a-z]/[a-z]",
    }
    for name, pattern in wrong.items():
        found = [text for text in texts if re.search(pattern, text)]
        assert found == [], (name, len(found), found[:3])


def test_documents_are_sentences(corpus):
    for record in corpus["pretrain"]:
        assert re.match(r'["A-Z]', record["text"]), record
        assert record["text"][-1] in '.?!"', record
        assert 40 <= len(record["text"]) <= 1500, record


@pytest.mark.parametrize(
    "noun, article",
    [("apple", "an"), ("lion", "a"), ("umbrella", "an"), ("useful plant", "a"), ("urinary", "a")],
)
def test_articles(noun, article):
    assert demo.indefinite(noun) == article
    assert demo.fix_articles(f"A(n) {noun} and a(n) {noun}").startswith(article.capitalize() + " ")


@pytest.mark.parametrize(
    "cell, expected",
    [
        ("lion", ("lion", "a", "lions")),
        ("mouse/mice", ("mouse", "a", "mice")),
        ("rice/-", ("rice", "", None)),
        ("the moon", ("moon", "the", None)),
        ("piece of furniture", ("piece of furniture", "a", "pieces of furniture")),
        ("butterfly", ("butterfly", "a", "butterflies")),
        ("donkey", ("donkey", "a", "donkeys")),
        ("box", ("box", "a", "boxes")),
    ],
)
def test_names_are_read(cell, expected):
    assert demo.read_name(cell) == expected


def test_key_words_are_the_starred_ones_and_not_the_name():
    thing = demo.Thing("watering can", "a", "watering cans", "tool", {"use": "*watering* *plants*"})
    assert demo.keys(thing, "use") == ["plants", "plant"]
    other = demo.Thing("cat", "a", "cats", "animal", {"note": "hunts mice", "legs": "4"})
    assert demo.keys(other, "note") == ["hunts", "mice"]
    assert demo.keys(other, "legs") == ["four", "4"]


def test_a_pair_whose_reference_misses_its_check_is_not_sound():
    def pair(answer: str, check: dict) -> demo.Pair:
        return demo.Pair("color", "lemon", "What color is a lemon?", answer, check, ("lemon",))

    assert demo.is_sound(pair("A lemon is yellow.", {"contains": ["yellow"]}))
    assert not demo.is_sound(pair("A lemon is yellow.", {"contains": ["red"]}))
    assert not demo.is_sound(pair("A lemon is yellow.", {"contains_any": []}))
    assert not demo.is_sound(pair("A lemon is yellow.", {"excludes": ["Yellow"]}))
    assert not demo.is_sound(pair("A lemon is yellow.", {"max_words": 3}))


# ---------------------------------------------------------------- files


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed(paths, tmp_path):
    """Through the command line, from another directory."""
    command = [sys.executable, REPO_DIR / "dataset" / "demo.py", "--output_dir", tmp_path / "again"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    for path in paths.values():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
        assert path.name in done.stdout
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {*demo.DEMO_FILES.values(), demo.SOURCE_FILE}  # nothing temporary is left


def test_another_seed_gives_other_bytes(corpus):
    other = demo.build_corpus(7)
    for key, records in corpus.items():
        assert other[key] != records, key


def test_singular_of_a_key_word_passes_too():
    known = {"forests": "forest", "berries": "berry", "boxes": "box", "leaves": "leaf"}
    known |= {"viruses": "virus", "cactuses": "cactus", "noses": "nose", "pies": "pie"}
    for plural, singular in known.items():
        assert demo.with_singular(plural) == [plural, singular]
    for word in ("water", "glass", "diabetes", "cactus", "swollen"):
        assert demo.with_singular(word) == [word]


def test_ensure_makes_what_is_missing_or_of_other_code_and_leaves_what_is_there(
    tmp_path, monkeypatch, capsys
):
    made = []
    monkeypatch.setattr(demo, "write_demo_corpus", lambda folder: made.append(folder) or {})
    for name in demo.DEMO_FILES.values():
        (tmp_path / name).write_text("{}\n")
    (tmp_path / demo.SOURCE_FILE).write_text(demo.source_sha256() + "\n")
    paths = demo.ensure_demo_corpus(tmp_path)
    assert made == [] and capsys.readouterr().out == ""
    assert paths["medical"] == tmp_path / "lora_medical_demo.jsonl"
    paths["sft"].unlink()
    demo.ensure_demo_corpus(tmp_path)
    assert made == [tmp_path] and len(capsys.readouterr().out.splitlines()) == 1
    paths["sft"].write_text("{}\n")
    (tmp_path / demo.SOURCE_FILE).write_text("0" * 64 + "\n")
    demo.ensure_demo_corpus(tmp_path)
    assert made == [tmp_path, tmp_path]
