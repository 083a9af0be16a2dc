"""The world: the same bytes each time, nothing leaked, checks that hold, and its sizes."""

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dataset.world import generate
from dataset.world.checks import Vocabulary, judge_answer, make_vocabulary, split_words
from dataset.world.facts import HELD_STATEMENTS, WORLD_DIR, read_toml, read_world, split_wordings
from dataset.world.generate import (
    MEDICAL,
    TEXT_BYTES,
    TRAIN,
    HeldOut,
    PairBuilder,
    ensure_world,
    find_mirrors,
    write_world,
)
from dataset.world.text import ChineseWriter, TextWriter, write_documents
from evaluation.probe.world_measure import (
    OUTPUT,
    find_constants,
    is_right,
    measure_controls,
    read_records,
)
from evaluation.study.data import check_world
from evaluation.study.settings import RESULTS_DIR
from model.files import REPO_DIR, read_json

FROZEN = RESULTS_DIR / "world.sha256"
CHINESE_DIR = WORLD_DIR / "chinese"
FEW = 6  # things of each category in the small world
TEXTS = ("pretrain", "pretrain_valid", "pretrain_patterns")
PROBES = ("combinations", "unseen", "wordings", "medical", "chinese")


def contents(record: dict) -> list[str]:
    """Return what is said in a conversation, the answer last."""
    return [message["content"] for message in record["conversations"]]


def join_text(record: dict) -> str:
    """Return all that is said in a conversation."""
    return "\n".join(contents(record))


@pytest.fixture(scope="module")
def small_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a world of a few things of each category."""
    return write_world(tmp_path_factory.mktemp("small"), things_each=FEW, scale=0.02)


@pytest.fixture(scope="module")
def small(small_files: dict[str, Path]) -> dict[str, list[dict]]:
    """The records of the small world."""
    return {name: read_records(path) for name, path in small_files.items()}


@pytest.fixture(scope="module")
def pairs(small: dict[str, list[dict]]) -> list[dict]:
    """The training pairs of the small world."""
    return small["sft"] + small["medical"]


@pytest.fixture(scope="module")
def probes(small: dict[str, list[dict]]) -> list[dict]:
    """All held-out prompts of the small world."""
    records = []
    for name in PROBES:
        records += small[f"{name}_tune"] + small[f"{name}_test"]
    return records


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """The names and values of the small world."""
    return make_vocabulary(read_world(things_each=FEW), read_world(CHINESE_DIR, FEW))


@pytest.fixture(scope="module")
def full() -> dict[str, Path]:
    """The files of the whole world; they are written once for each version of the generator."""
    return ensure_world()


def test_the_world_of_the_study_is_frozen(full: dict[str, Path]) -> None:
    check_world(FROZEN)
    text = FROZEN.read_text()
    for path in full.values():
        assert path.relative_to(REPO_DIR).as_posix() in text


def test_same_seed_same_bytes(small_files: dict[str, Path], tmp_path: Path) -> None:
    again = write_world(tmp_path / "again", things_each=FEW, scale=0.02)
    reseeded = write_world(tmp_path / "reseeded", things_each=FEW, scale=0.005, seed=7)
    for name, path in small_files.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != reseeded[name].read_bytes()
    held_out = small_files["pretrain"].with_name("held_out.json")
    assert held_out.read_bytes() != (tmp_path / "reseeded" / "held_out.json").read_bytes()


def test_text_asks_nothing(small: dict[str, list[dict]]) -> None:
    for name in TEXTS:
        for document in small[name]:
            assert not re.search(r"[?？]|Question:|\{|\}", document["text"]), document


@pytest.mark.parametrize(
    ("folder", "writer", "size"),
    [(WORLD_DIR, TextWriter, 900_000), (CHINESE_DIR, ChineseWriter, 150_000)],
)
def test_each_fact_in_8_patterns_and_none_that_is_held_out(
    folder: Path, writer: type[TextWriter], size: int
) -> None:
    """Each thing gets at most as much text as in the whole world."""
    world = read_world(folder, FEW)
    documents = write_documents(writer(world, random.Random(1)), size)
    documents = [document.lower() for document in documents]
    if folder == WORLD_DIR:
        assert size / len(world.things) < TEXT_BYTES / len(read_world().things)
    for thing in world.things:
        about_thing = [document for document in documents if thing.name.lower() in document]
        text = "\n".join(about_thing)
        for attribute in world.categories[thing.category].attributes.values():
            slots = thing.slots(attribute.name)
            is_told = []
            for pattern in attribute.statements:
                sentence = pattern.format(**slots).lower()
                is_told.append(sentence.rstrip(".。") in text)
            assert sum(is_told) >= 8, (thing.name, attribute.name, is_told)
            assert not any(is_told[-HELD_STATEMENTS:]), (thing.name, attribute.name)


def test_no_phrase_is_frequent() -> None:
    """No 4 words in a row stand in more than 3% of the documents."""
    writer = TextWriter(read_world(), random.Random(1))
    documents = write_documents(writer, 1_400_000)
    counts = Counter()
    for document in documents:
        words = split_words(document)
        counts.update({tuple(words[i : i + 4]) for i in range(len(words) - 3)})
    phrase, most = counts.most_common(1)[0]
    assert most <= 0.03 * len(documents), (phrase, most / len(documents))


def test_held_out_things_stand_in_no_pair(
    small: dict[str, list[dict]],
    pairs: list[dict],
    probes: list[dict],
    vocabulary: Vocabulary,
) -> None:
    """They are told in the text, named by the probes, and by no training pair."""
    unseen_prompts = small["unseen_tune"] + small["unseen_test"]
    held = {record["things"][0] for record in unseen_prompts}
    medical = {record["things"][0] for record in probes if record["set"] == "medical"}
    for pair in small["medical"]:
        medical -= set(vocabulary.names.find(join_text(pair)))
    held |= medical
    names = {thing.name for thing in read_world(things_each=FEW).things}
    assert len(held) == 4 and held < names
    for pair in pairs:
        assert held.isdisjoint(vocabulary.names.find(join_text(pair))), pair
    told = Counter()
    for document in small["pretrain"]:
        told.update(set(vocabulary.names.find(document["text"])))
    assert min(told[name] for name in held) > 5


def test_held_out_cells_never_train(vocabulary: Vocabulary) -> None:
    """A mirrored fact, a baker's tool and a rolling pin's user, is one cell."""
    world = read_world(things_each=FEW)
    del world.categories[MEDICAL]
    held_out = HeldOut(world, 2, seed=1)
    builder = PairBuilder(world, held_out, vocabulary, set(held_out.half_of_thing))
    probed = builder.collect(("combinations", "tune"), 2)
    probed += builder.collect(("unseen", "test"), 2)
    trained = {cell for pair in builder.collect(TRAIN, 5) for cell in pair.cells}
    assert probed and trained
    assert not any(held_out.half_of_cell(cell) for cell in trained)
    assert trained.isdisjoint(pair.cells[0] for pair in probed)
    for cell, mirror in held_out.mirrors.items():
        assert held_out.half_of_cell(cell) == held_out.half_of_cell(mirror)


def test_mirrors_of_the_world() -> None:
    """Both directions of a fact have the same first cell, in the order of the alphabet."""
    mirrors = find_mirrors(read_world())
    job = ("baker", "tool")
    tool = ("rolling pin", "user")
    assert mirrors[job] == mirrors[tool] == job


def test_no_reference_can_be_recalled(
    small: dict[str, list[dict]],
    pairs: list[dict],
    probes: list[dict],
    vocabulary: Vocabulary,
) -> None:
    """No long one stands in answers or text; nearly none is answered by a pair on its thing."""
    answers = list(dict.fromkeys(contents(pair)[-1] for pair in pairs))
    documents = [document["text"] for name in TEXTS for document in small[name]]
    told = "\n".join(answers + documents)
    answers_about = defaultdict(list)
    for answer in answers:
        for name in vocabulary.names.find(answer):
            answers_about[name].append(answer)
    recalled = []
    for record in probes:
        reference = contents(record)[-1]
        is_long = len(split_words(reference)) >= 5
        assert not is_long or reference.rstrip(".") not in told, record
        subject = record["things"][0]
        kinds = [judge_answer(text, True, record, vocabulary) for text in answers_about[subject]]
        if "correct" in kinds:
            recalled.append(record["id"])
    assert len(recalled) <= 0.03 * len(probes), recalled


def test_prompts_are_unique(pairs: list[dict], probes: list[dict]) -> None:
    counts = Counter("\n".join(contents(record)[:-1]) for record in pairs + probes)
    assert counts.most_common(1)[0][1] == 1


def test_references_pass_and_prompts_do_not(probes: list[dict], vocabulary: Vocabulary) -> None:
    for record in probes:
        *before, reference = contents(record)
        assert judge_answer(reference, True, record, vocabulary) == "correct", record
        for prompt in (before[-1], "\n".join(before)):
            assert judge_answer(prompt, True, record, vocabulary) != "correct", record


def test_halves_and_sets(small: dict[str, list[dict]]) -> None:
    for name in PROBES:
        tune = small[f"{name}_tune"]
        test = small[f"{name}_test"]
        tune_cells = {tuple(record["cell"]) for record in tune}
        assert tune_cells.isdisjoint(tuple(record["cell"]) for record in test)
        for record in tune + test:
            assert record["id"].startswith(f"{record['set']}-{record['half']}-")
            assert record["cell"][0] == record["things"][0]


def add_thing(world_dir: Path) -> None:
    """Add a unicorn to a copy of the world."""
    animals = world_dir / "facts" / "animals.toml"
    line = "unicorn | unicorns | a fabled beast | on a rainbow | starlight | a sparkle | one horn"
    text = animals.read_text(encoding="utf-8")
    text = text.replace('table = """\n', f'table = """\n{line}\n')
    animals.write_text(text, encoding="utf-8")


def add_skill(world_dir: Path) -> None:
    """Add the skill of saying farewell to a copy of the world."""
    words = ["kindly", "please", "now", "today", "soon", "once", "again"]
    prompts = [f"Bye {word}. {{question}}" for word in words]
    table = f"""
[skill.farewell]
uses = ["fact"]
answer = "{{answer}} Bye."
prompts = {json.dumps(prompts)}
check = {{ ends = "Bye." }}
"""
    with (world_dir / "skills.toml").open("a", encoding="utf-8") as file:
        file.write(table)


def test_a_reader_adds_a_thing_and_a_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world_dir = shutil.copytree(WORLD_DIR, tmp_path / "world")
    add_thing(world_dir)
    add_skill(world_dir)
    monkeypatch.setattr(generate, "WORLD_DIR", world_dir)
    files = write_world(tmp_path / "out", things_each=FEW, scale=0.01)
    pairs = read_records(files["sft"])
    farewells = [contents(pair) for pair in pairs if pair["skill"] == "farewell"]
    assert farewells
    for prompt, answer in farewells:
        assert prompt.startswith("Bye ") and answer.endswith(" Bye.")
    assert any("unicorn" in contents(pair)[-1] for pair in pairs)
    assert "unicorn" in files["pretrain"].read_text(encoding="utf-8")


def test_every_skill_has_7_prompts() -> None:
    for path in WORLD_DIR.rglob("*.*"):
        assert path.stat().st_size <= 300_000, path
    skills = read_toml(WORLD_DIR / "skills.toml")["skill"]
    assert len(skills) >= 40
    chinese_skills = read_toml(CHINESE_DIR / "skills.toml")["skill"]
    for name, spec in (skills | chinese_skills).items():
        assert len(spec["prompts"]) >= 7, name
        assert all(split_wordings(spec["prompts"])), name
    assert len(read_world().categories[MEDICAL].things) >= 60


def test_sizes_of_the_whole_world(full: dict[str, Path]) -> None:
    documents = read_records(full["pretrain"])
    assert sum(len(document["text"].encode()) for document in documents) >= 8_000_000
    pairs = read_records(full["sft"])
    assert len(pairs) >= 60_000
    assert len(read_records(full["medical"])) >= 6_000
    counts = Counter(pair["skill"] for pair in pairs)
    assert max(counts.values()) <= 0.05 * len(pairs)
    for skill, count in counts.items():
        assert count >= 400 or skill.startswith("chinese_"), (skill, count)


def test_the_shipped_tokenizer(full: dict[str, Path]) -> None:
    """Nearly all its tokens occur in the text, and all tokens of the pairs but question marks."""
    tokenizer = Tokenizer.from_file(str(REPO_DIR / "model" / "base_xs" / "tokenizer.json"))
    documents = [record["text"] for record in read_records(full["pretrain"])]
    messages = set()
    for record in read_records(full["sft"]) + read_records(full["medical"]):
        messages.update(contents(record))
    told = Counter()
    chinese = 0
    for document, encoding in zip(documents, tokenizer.encode_batch(documents), strict=True):
        told.update(encoding.ids)
        if not document.isascii():
            chinese += len(encoding)
    used = set()
    for encoding in tokenizer.encode_batch(list(messages)):
        used.update(encoding.ids)
    size = tokenizer.get_vocab_size()
    frequent = sum(told[token] >= 20 for token in range(size))
    total = told.total()
    missing = {tokenizer.id_to_token(token) for token in used if not told[token]}
    print(f"{size} tokens, {frequent} of them 20 times in {total}; Chinese {chinese / total:.1%}")
    print(f"in pairs alone: {missing}")
    question_marks = {"?"}
    for mark in (" ?", "？"):
        question_marks.update(tokenizer.encode(mark).tokens)
    assert size <= 4096 and frequent >= 0.95 * size and chinese <= 0.1 * total
    assert missing <= question_marks


def test_controls_of_the_committed_world_stay_low() -> None:
    controls = read_json(OUTPUT)["controls"]
    references = controls.pop("references")
    assert set(references.values()) == {100.0}
    del controls["random_order"], controls["stray_words"]  # what checks do not see
    for name in ("one_answer", "prompt", "all_things"):
        assert controls.pop(name)["average"] <= 1
    for name, shares in controls.items():
        assert shares["average"] <= 10 and max(shares.values()) <= 25, name


def test_controls_of_a_small_world(
    small_files: dict[str, Path], small: dict[str, list[dict]]
) -> None:
    """References are right, and each skill's constant answer is one of its training answers."""
    measured = measure_controls(small_files, [])
    assert set(measured["references"].values()) == {100.0}
    assert measured["prompt"]["average"] == 0
    skills = {pair["skill"] for pair in small["sft"]}
    records = [record for record in small["combinations_tune"] if record["skill"] in skills]
    answers = [(pair["skill"], contents(pair)[-1]) for pair in small["sft"]]
    constants = find_constants(records, [record["skill"] for record in records], answers)
    assert constants
    for skill, answer in constants.items():
        assert not answer or (skill, answer) in answers
    right = Counter()
    for record in records:
        right[record["skill"]] += is_right(constants[record["skill"]], record)
    counts = Counter(record["skill"] for record in small["combinations_tune"])
    for skill, count in counts.items():
        assert measured["constant"][skill] == pytest.approx(100 * right[skill] / count, abs=0.06)
