"""The world: the same bytes each time, nothing leaked, checks that hold, and its sizes."""

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dataset.checks import judge_answer, make_vocabulary, split_words
from dataset.world import generate
from dataset.world.facts import HELD_STATEMENTS, WORLD_DIR, read_toml, read_world, split_wordings
from dataset.world.generate import (
    MEDICAL,
    TEXT_BYTES,
    TRAIN,
    HeldOut,
    PairBuilder,
    ensure_world,
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


@pytest.fixture(scope="module")
def small_files(tmp_path_factory) -> dict[str, Path]:
    """The files of a world of a few things of each category."""
    return write_world(tmp_path_factory.mktemp("small"), things_each=FEW, scale=0.02)


@pytest.fixture(scope="module")
def small(small_files) -> dict[str, list[dict]]:
    """The records of the small world."""
    return {name: read_records(path) for name, path in small_files.items()}


@pytest.fixture(scope="module")
def pairs(small) -> list[dict]:
    """The training pairs of the small world."""
    return small["sft"] + small["medical"]


@pytest.fixture(scope="module")
def probes(small) -> list[dict]:
    """All held-out prompts of the small world."""
    return [r for name in PROBES for half in ("tune", "test") for r in small[f"{name}_{half}"]]


@pytest.fixture(scope="module")
def vocabulary():
    """The names and values of the small world."""
    return make_vocabulary(read_world(things_each=FEW), read_world(CHINESE_DIR, FEW))


@pytest.fixture(scope="module")
def full() -> dict[str, Path]:
    """The files of the whole world; they are written once for each version of the generator."""
    return ensure_world()


def test_the_world_of_the_study_is_frozen(full):
    check_world(FROZEN)
    text = FROZEN.read_text()
    assert all(path.relative_to(REPO_DIR).as_posix() in text for path in full.values())


def test_same_seed_same_bytes(small_files, tmp_path):
    again = write_world(tmp_path / "again", things_each=FEW, scale=0.02)
    other = write_world(tmp_path / "other", things_each=FEW, scale=0.005, seed=7)
    for name, path in small_files.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()
    held_out = [files["pretrain"].with_name("held_out.json") for files in (small_files, other)]
    assert held_out[0].read_bytes() != held_out[1].read_bytes()


def test_text_asks_nothing(small):
    for name in TEXTS:
        for document in small[name]:
            assert not re.search(r"[?？]|Question:|\{|\}", document["text"]), document


@pytest.mark.parametrize(
    ("folder", "writer", "size"),
    [(WORLD_DIR, TextWriter, 900_000), (CHINESE_DIR, ChineseWriter, 150_000)],
)
def test_each_fact_in_8_patterns_and_none_that_is_held_out(folder, writer, size):
    """Each thing gets at most as much text as in the whole world."""
    world = read_world(folder, FEW)
    documents = [text.lower() for text in write_documents(writer(world, random.Random(1)), size)]
    if folder == WORLD_DIR:
        assert size / len(world.things) < TEXT_BYTES / len(read_world().things)
    for thing in world.things:
        text = "\n".join(document for document in documents if thing.name.lower() in document)
        for attribute in world.categories[thing.category].attributes.values():
            slots = thing.slots(attribute.name)
            sentences = [s.format(**slots).lower().rstrip(".。") for s in attribute.statements]
            found = [sentence in text for sentence in sentences]
            assert sum(found) >= 8, (thing.name, attribute.name, found)
            assert not any(found[-HELD_STATEMENTS:]), (thing.name, attribute.name)


def test_no_phrase_is_frequent():
    """No 4 words in a row stand in more than 3% of the documents."""
    documents = write_documents(TextWriter(read_world(), random.Random(1)), 1_400_000)
    counts = Counter()
    for document in documents:
        words = split_words(document)
        counts.update({tuple(words[i : i + 4]) for i in range(len(words) - 3)})
    phrase, most = counts.most_common(1)[0]
    assert most <= 0.03 * len(documents), (phrase, most / len(documents))


def test_held_out_things_stand_in_no_pair(small, pairs, probes, vocabulary, tmp_path):
    """They are told in the text, named by the probes, and by no training pair."""
    things = read_world(things_each=FEW).things
    held = {r["things"][0] for half in ("tune", "test") for r in small[f"unseen_{half}"]}
    held |= {r["things"][0] for r in probes if r["set"] == "medical"} - {
        name
        for pair in small["medical"]
        for name in vocabulary.names.find("\n".join(contents(pair)))
    }
    assert len(held) == 4 and held < {thing.name for thing in things}
    for pair in pairs:
        assert not held & set(vocabulary.names.find("\n".join(contents(pair)))), pair
    told = Counter(n for d in small["pretrain"] for n in set(vocabulary.names.find(d["text"])))
    assert min(told[name] for name in held) > 5


def test_held_out_cells_never_train(vocabulary):
    """A mirrored fact, a baker's tool and a rolling pin's user, is one cell."""
    world = read_world(things_each=FEW)
    del world.categories[MEDICAL]
    held_out = HeldOut(world, 2, seed=1)
    builder = PairBuilder(world, held_out, vocabulary, set(held_out.half_of_thing))
    probed = builder.collect(("combinations", "tune"), 2) + builder.collect(("unseen", "test"), 2)
    trained = {cell for pair in builder.collect(TRAIN, 5) for cell in pair.cells}
    assert probed and trained and not any(map(held_out.half_of_cell, trained))
    assert not trained & {pair.cells[0] for pair in probed}
    for cell, mirror in held_out.mirrors.items():
        assert held_out.half_of_cell(cell) == held_out.half_of_cell(mirror)


def test_no_reference_can_be_recalled(small, pairs, probes, vocabulary):
    """No long one stands in answers or text; nearly none is answered by a pair on its thing."""
    answers = list(dict.fromkeys(contents(pair)[-1] for pair in pairs))
    told = "\n".join(answers + [d["text"] for name in TEXTS for d in small[name]])
    about = defaultdict(list)
    for answer in answers:
        for name in vocabulary.names.find(answer):
            about[name].append(answer)
    recalled = []
    for record in probes:
        reference = contents(record)[-1]
        assert len(split_words(reference)) < 5 or reference.rstrip(".") not in told, record
        candidates = about[record["things"][0]]
        found = (judge_answer(a, True, record, vocabulary) == "correct" for a in candidates)
        recalled += [record["id"]] if any(found) else []
    assert len(recalled) <= 0.03 * len(probes), recalled


def test_prompts_are_unique(pairs, probes):
    counts = Counter("\n".join(contents(record)[:-1]) for record in pairs + probes)
    assert counts.most_common(1)[0][1] == 1


def test_references_pass_and_prompts_do_not(probes, vocabulary):
    for record in probes:
        *before, reference = contents(record)
        assert judge_answer(reference, True, record, vocabulary) == "correct", record
        for prompt in (before[-1], "\n".join(before)):
            assert judge_answer(prompt, True, record, vocabulary) != "correct", record


def test_halves_and_sets(small):
    for name in PROBES:
        tune, test = small[f"{name}_tune"], small[f"{name}_test"]
        assert not {tuple(r["cell"]) for r in tune} & {tuple(r["cell"]) for r in test}
        for record in tune + test:
            assert record["id"].startswith(f"{record['set']}-{record['half']}-")
            assert record["cell"][0] == record["things"][0]


def test_a_reader_adds_a_thing_and_a_skill(tmp_path, monkeypatch):
    world_dir = shutil.copytree(WORLD_DIR, tmp_path / "world")
    animals, skills = world_dir / "facts" / "animals.toml", world_dir / "skills.toml"
    line = "unicorn | unicorns | a fabled beast | on a rainbow | starlight | a sparkle | one horn"
    text = animals.read_text(encoding="utf-8")
    animals.write_text(text.replace('table = """\n', f'table = """\n{line}\n'), encoding="utf-8")
    words = ["kindly", "please", "now", "today", "soon", "once", "again"]
    table = {
        "uses": ["fact"],
        "answer": "{answer} Bye.",
        "prompts": [f"Bye {w}. {{question}}" for w in words],
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    with skills.open("a", encoding="utf-8") as file:
        file.write("\n".join(["\n[skill.farewell]", *lines, 'check = { ends = "Bye." }', ""]))
    monkeypatch.setattr(generate, "WORLD_DIR", world_dir)
    files = write_world(tmp_path / "out", things_each=FEW, scale=0.01)
    pairs = read_records(files["sft"])
    new = [contents(pair) for pair in pairs if pair["skill"] == "farewell"]
    assert new and all(p.startswith("Bye ") and a.endswith(" Bye.") for p, a in new)
    assert any("unicorn" in contents(pair)[-1] for pair in pairs)
    assert "unicorn" in files["pretrain"].read_text(encoding="utf-8")


def test_every_skill_has_7_prompts():
    for path in WORLD_DIR.rglob("*.*"):
        assert path.stat().st_size <= 300_000, path
    skills = read_toml(WORLD_DIR / "skills.toml")["skill"]
    assert len(skills) >= 40
    for name, spec in (skills | read_toml(CHINESE_DIR / "skills.toml")["skill"]).items():
        assert len(spec["prompts"]) >= 7, name
        assert all(split_wordings(spec["prompts"])), name
    assert len(read_world().categories[MEDICAL].things) >= 60


def test_sizes_of_the_whole_world(full):
    text = [record["text"] for record in read_records(full["pretrain"])]
    assert sum(len(document.encode()) for document in text) >= 8_000_000
    pairs = read_records(full["sft"])
    assert len(pairs) >= 60_000 and len(read_records(full["medical"])) >= 6_000
    counts = Counter(pair["skill"] for pair in pairs)
    assert max(counts.values()) <= 0.05 * len(pairs)
    few = {skill: n for skill, n in counts.items() if n < 400 and not skill.startswith("chinese_")}
    assert not few


def test_the_shipped_tokenizer(full):
    """Nearly all its tokens occur in the text, and all tokens of the pairs but question marks."""
    tokenizer = Tokenizer.from_file(str(REPO_DIR / "model" / "base_xs" / "tokenizer.json"))
    documents = [record["text"] for record in read_records(full["pretrain"])]
    asked = {
        text
        for name in ("sft", "medical")
        for r in read_records(full[name])
        for text in contents(r)
    }
    told, chinese, used = Counter(), 0, Counter()
    for document, encoding in zip(documents, tokenizer.encode_batch(documents), strict=True):
        told.update(encoding.ids)
        chinese += 0 if document.isascii() else len(encoding)
    for encoding in tokenizer.encode_batch(list(asked)):
        used.update(encoding.ids)
    size, total = tokenizer.get_vocab_size(), told.total()
    frequent = sum(told[token] >= 20 for token in range(size))
    questions = {token for mark in (" ?", "？") for token in tokenizer.encode(mark).ids}
    missing = {tokenizer.id_to_token(token) for token in used if not told[token]}
    print(f"{size} tokens, {frequent} of them 20 times in {total}; Chinese {chinese / total:.1%}")
    print(f"in pairs alone: {missing}")
    assert size <= 4096 and frequent >= 0.95 * size and chinese <= 0.1 * total
    assert missing <= {tokenizer.id_to_token(token) for token in questions} | {"?"}


def test_controls_of_the_committed_world_stay_low():
    controls = read_json(OUTPUT)["controls"]
    assert set(controls.pop("references").values()) == {100.0}
    del controls["random_order"], controls["stray_words"]  # what checks do not see
    for name in ("one_answer", "prompt", "all_things"):
        assert controls.pop(name)["average"] <= 1
    for name, shares in controls.items():
        assert shares["average"] <= 10 and max(shares.values()) <= 25, name


def test_controls_of_a_small_world(small_files, small):
    """References are right, and each skill's constant answer is one of its training answers."""
    found = measure_controls(small_files, [])
    assert set(found["references"].values()) == {100.0} and found["prompt"]["average"] == 0
    skills, tune = {r["skill"] for r in small["sft"]}, small["combinations_tune"]
    records = [r for r in tune if r["skill"] in skills]
    answers = [(pair["skill"], contents(pair)[-1]) for pair in small["sft"]]
    constants = find_constants(records, [r["skill"] for r in records], answers)
    assert constants and all(not a or (s, a) in answers for s, a in constants.items())
    right = Counter(r["skill"] for r in records if is_right(constants[r["skill"]], r))
    for skill, count in Counter(r["skill"] for r in tune).items():
        assert found["constant"][skill] == pytest.approx(100 * right[skill] / count, abs=0.06)
