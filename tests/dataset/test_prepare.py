"""dataset/prepare.py on small raw files in each corpus's own format, without network."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.lm_dataset import record_messages, turns
from dataset.prepare import hold_out, main
from tests.trainer.runs import exit_code, write_jsonl

# At a held-out share of one half, by the hash of the words alone.
HELD_OUT = ["Asthma", "Scurvy", "Water", "Iron", "What is tea?", "Say hello."]
TRAINED_ON = ["Acromegaly", "Gout", "April", "Moon", "Name a color.", "Why do cats purr?"]
HALF = ("--valid_fraction", "0.5")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps its files with the test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def prepare(out: Path, name: str, source: Path, *flags: str) -> tuple[list, list, dict]:
    """Run the command line; the train part, the held-out part and the record."""
    main([name, "--source", str(source), "--output_dir", str(out), *flags])
    paths = [out / f"{name}.jsonl.gz", out / f"{name}_valid.jsonl.gz"]
    texts = [gzip.decompress(path.read_bytes()).splitlines() for path in paths]
    parts = [[json.loads(line) for line in lines] for lines in texts]
    return *parts, json.loads((out / f"{name}.json").read_text())


def chat(*contents: str) -> dict:
    return {"conversations": turns(*contents)}


def article(title: str, text: str) -> dict:
    return {"id": "1", "url": "https://simple.wikipedia.org/wiki/X", "title": title, "text": text}


def write_disease(path: Path, focus: str, *pairs: tuple[str, str | None]) -> None:
    """Write a document as MedQuAD does, down to the space before the question mark."""
    qas = [(q, "" if a is None else f"<Answer>{a}</Answer>") for q, a in pairs]
    body = "".join(f"<QAPair>\n<Question>{q}</Question>\n{a}</QAPair>\n" for q, a in qas)
    head = f'<?xml version="1.0" encoding="UTF-8"?>\n<Document id="1">\n<Focus>{focus}</Focus>\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}<QAPairs>\n{body}</QAPairs>\n</Document>\n")


def test_hold_out_is_a_frozen_hash_of_the_words() -> None:
    assert [hold_out(key, 0.5) for key in HELD_OUT + TRAINED_ON] == [True] * 6 + [False] * 6
    assert 0.01 < int(hashlib.sha256(b"iron").hexdigest()[:16], 16) / 2**64 < 0.03
    assert hold_out("  IRON\n", 0.03) and not hold_out("Iron", 0.01)


def test_articles_in_parquet_shards(tmp_path: Path) -> None:
    """Shards are read in order; a repeated or short text is dropped."""
    text, shards = "a" * 500, tmp_path / "20231101.simple"
    rows = [article("Sun", "c" * 499), article("Moon again", text)]
    shards.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), shards / "train-00001.parquet")
    rows = [article("Moon", f"  {text}\n"), article("Water", "b" * 600)]
    pq.write_table(pa.Table.from_pylist(rows), shards / "train-00000.parquet")
    train, valid, record = prepare(tmp_path / "out", "simplewiki", tmp_path, *HALF)
    assert train == [{"text": f"Moon\n{text}"}]
    assert valid == [{"text": "Water\n" + "b" * 600}]
    counts = {"read": 4, "train": 1, "valid": 1, "duplicate_text": 1, "too_short": 1}
    assert record["counts"] == counts and record["source"]["files"] == 2


def test_dolly(tmp_path: Path) -> None:
    triples = [("Why do cats purr? ", "", "w " * 80), ("Too long?", "", "w " * 81)]
    triples += [("What is tea?", "", "A drink.\n\nIt  is hot. "), ("Null?", "", None)]
    triples += [("Who?", "He did it.", "He."), ("why do cats  PURR?", "", "Nobody.")]
    triples += [("Empty?", "", " "), (" ", "", "An answer.")]
    rows = [dict(zip(("instruction", "context", "response"), t, strict=True)) for t in triples]
    source = write_jsonl(tmp_path / "databricks-dolly-15k.jsonl", rows)
    train, valid, record = prepare(tmp_path / "out", "dolly", source, *HALF)
    assert train == [chat("Why do cats purr?", " ".join(["w"] * 80))]
    assert valid == [chat("What is tea?", "A drink.\n\nIt  is hot.")]
    dropped = {"answer_too_long": 1, "duplicate_question": 1, "empty_answer": 2}
    dropped |= {"empty_question": 1, "has_context": 1}
    assert record["counts"] == dropped | {"read": 8, "train": 1, "valid": 1}


def test_alpaca_is_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triples = [("Name a color.", "", "Red."), ("Say hello.", "", "Hello."), ("Sum up.", "A", "B.")]
    rows = [dict(zip(("instruction", "input", "output"), t, strict=True)) for t in triples]
    (tmp_path / "alpaca_data.json").write_text(json.dumps(rows, indent=4))
    train, valid, record = prepare(tmp_path / "out", "alpaca", tmp_path, *HALF)
    assert (train, valid) == ([chat("Name a color.", "Red.")], [chat("Say hello.", "Hello.")])
    assert record["counts"] == {"read": 3, "train": 1, "valid": 1, "has_input": 1}
    assert "research only" in capsys.readouterr().out


def test_medquad_splits_by_disease_and_drops_what_has_no_answer(tmp_path: Path) -> None:
    shared, folder = "This answer is printed under two diseases.", tmp_path / "repo"
    is_asthma, is_gout = "What is (are) Asthma ?", "What is (are) Gout ?"
    # Read first, so its unanswered question must not count as a repeat later on.
    write_disease(folder / "1_QA/1.xml", "Gout", (is_gout, ""), ("What causes Gout ?", None))
    pairs = [(is_asthma, "Asthma is\n      \na disease &amp; a burden.")]
    pairs += [("What causes Asthma ?", shared), ("How to treat Asthma ?", "Too short.")]
    write_disease(folder / "5_QA/1.xml", "Asthma", *pairs, ("How to live ?", "w " * 201))
    pairs = [(is_gout, "- joint pain  - <b>heat</b> and swelling")]
    pairs += [("What  is (are) gout?", "A second answer to it."), ("What causes Gout ?", shared)]
    write_disease(folder / "5_QA/2.xml", "Gout", *pairs)
    write_disease(folder / "6_QA/1.xml", "ASTHMA", ("Where ?", "In the lungs."))
    write_disease(folder / "6_QA/2.xml", " ", ("What ?", "It is this one."))
    train, valid, record = prepare(tmp_path / "out", "medquad", folder, *HALF)
    assert train == [chat("What is (are) Gout?", "- joint pain - heat and swelling")]
    answers = ["Asthma is\na disease & a burden.", shared, "In the lungs."]
    questions = ["What is (are) Asthma?", "What causes Asthma?", "Where?"]
    assert valid == [chat(*pair) for pair in zip(questions, answers, strict=True)]
    dropped = {"answer_too_long": 1, "answer_too_short": 1, "duplicate_answer": 1}
    dropped |= {"duplicate_question": 1, "empty_answer": 2, "no_disease": 1}
    assert record["counts"] == dropped | {"read": 11, "train": 1, "valid": 3}


def test_minimind_is_kept_to_the_letter_if_training_reads_it(tmp_path: Path) -> None:
    rows = [{"text": " <|im_start|>你好<|im_end|> "}, {"text": " "}, {"text": "再见", "score": 1}]
    source = write_jsonl(tmp_path / "pretrain_hq.jsonl", rows)
    train, _, record = prepare(tmp_path / "out", "minimind-pretrain", source)
    assert train == [{"text": " <|im_start|>你好<|im_end|> "}, {"text": "再见"}]
    assert record["counts"]["empty_text"] == 1
    sound = chat("Moon", "b", "c", "d")
    sound["conversations"].insert(0, {"role": "system", "content": ""})
    thought = chat("Sun", "b")
    thought["conversations"][1]["reasoning_content"] = "e"
    rows = [sound, thought, chat("Water", " b "), chat("a", " "), {"conversations": []}]
    rows += [{"conversations": chat("a", "b")["conversations"][:1]}]
    source = write_jsonl(tmp_path / "lora_medical.jsonl", rows)
    train, valid, record = prepare(tmp_path / "out", "minimind-medical", source, *HALF)
    assert train == [chat("Moon", "b", "c", "d")]  # without its empty system turn
    record_messages(train[0], "what prepare.py wrote")
    assert valid == [chat("Water", " b ")]
    assert record["counts"]["unreadable"] == 4


def test_same_source_same_bytes_and_the_record_vouches_for_them(tmp_path: Path) -> None:
    """The source is a gzip file; the limit counts what is kept."""
    texts = {"A": "", "Moon": "Día.", "Water": "Wet.", "Never": "read"}
    lines = write_jsonl(tmp_path / "x.jsonl", [article(*item) for item in texts.items()])
    source = tmp_path / "x.jsonl.gz"
    source.write_bytes(gzip.compress(lines.read_bytes()))
    flags = ("--min_chars", "1", "--limit", "2", *HALF)
    record = prepare(tmp_path / "one", "simplewiki", source, *flags)[2]
    prepare(tmp_path / "two" / "deep", "simplewiki", source, *flags)
    for name in ("simplewiki.jsonl.gz", "simplewiki_valid.jsonl.gz", "simplewiki.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two/deep" / name).read_bytes()
    data = (tmp_path / "one" / "simplewiki.jsonl.gz").read_bytes()
    assert data[3:8] == bytes(5)  # flags (no file name) and time in the gzip header
    content = hashlib.sha256('{"text": "Moon\\nDía."}\n'.encode()).hexdigest()
    assert record["outputs"]["simplewiki.jsonl.gz"] == {"content_sha256": content}
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["source"] == {"path": "x.jsonl.gz", "files": 1, "sha256": digest}
    assert (record["counts"]["read"], record["settings"]["limit"]) == (3, 2)


DOLLY = '{"instruction": "Q", "context": "", "response": "A", "category": "x"}\n'


@pytest.mark.parametrize(
    ("words", "file", "content", "reason"),
    [
        ("dolly", "d.jsonl", DOLLY + '{"instruction": \n', "dolly: "),
        ("dolly", "d.jsonl", '{"instruction": "Q"}\n', "not a record of dolly"),
        ("dolly", "d.jsonl", DOLLY.replace('""', '"c"'), "no record to train on"),
        ("dolly", "d.csv", "Q,A\n", "dolly: "),
        ("medquad", "m.xml", "<Document><Focus>", "not a record of medquad"),
        ("medquad", None, None, "git clone https://github.com/abachaa/MedQuAD"),
        ("medquad --source .ci", None, None, "no **/*.xml; see https://github.com/abachaa/MedQuAD"),
        ("dolly --min_chars 9", None, None, "--min_chars does nothing for dolly"),
    ],
)
def test_refusals_lose_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    file: str | None,
    content: str | None,
    reason: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "dolly.jsonl.gz").write_text("dear")
    argv = [*words.split(), "--output_dir", str(out)]
    if file:
        (tmp_path / file).write_text(content)
        argv += ["--source", str(tmp_path / file)]
    assert exit_code(main, argv) == 2
    errors = capsys.readouterr().err
    assert "error: " in errors and reason in errors
    assert [path.read_text() for path in out.iterdir()] == ["dear"]
