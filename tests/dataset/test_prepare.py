"""dataset/prepare.py on small raw files in each corpus's own format, without network."""

import gzip
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.lm_dataset import record_messages
from dataset.prepare import CORPORA, hold_out, main
from model.files import run_script

# At a held-out share of one half, by the hash of the words alone.
HELD_OUT = ["Asthma", "Scurvy", "Water", "Iron", "What is tea?", "Say hello."]
TRAINED_ON = ["Acromegaly", "Gout", "April", "Moon", "Name a color.", "Why do cats purr?"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library keeps its files with the test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def prepare(out: Path, name: str, source: Path, *flags: str) -> tuple[list, list, dict]:
    """Run the command line; the train part, the held-out part and the record."""
    assert main([name, "--source", str(source), "--output_dir", str(out), *flags]) == 0
    record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    parts = []
    for path in (out / f"{name}.jsonl.gz", out / f"{name}_valid.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            parts.append([json.loads(line) for line in file])
    return *parts, record


def chat(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns}


def article(title: str, text: str) -> dict:
    return {"id": "1", "url": "https://simple.wikipedia.org/wiki/X", "title": title, "text": text}


def write_disease(path: Path, focus: str, *pairs: tuple[str, str | None]) -> None:
    """Write a document as MedQuAD does, down to the space before the question mark."""
    answers = ["" if a is None else f"\t\t\t<Answer>{a}</Answer>\n" for _, a in pairs]
    body = "".join(
        f'\t<QAPair pid="1">\n\t\t\t<Question qid="1">{q}</Question>\n{a}\t</QAPair>\n'
        for (q, _), a in zip(pairs, answers, strict=True)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Document id="1">\n<Focus>{focus}</Focus>\n'
        f"<QAPairs>\n{body}</QAPairs>\n</Document>\n",
        encoding="utf-8",
    )


def test_hold_out_is_a_frozen_hash_of_the_words() -> None:
    assert [hold_out(key, 0.5) for key in HELD_OUT] == [True] * 6
    assert [hold_out(key, 0.5) for key in TRAINED_ON] == [False] * 6
    first_64_bits = int(hashlib.sha256(b"iron").hexdigest()[:16], 16) / 2**64
    assert 0.01 < first_64_bits < 0.03
    assert hold_out("  IRON\n", 0.03) and not hold_out("Iron", 0.01)
    keys = [f"title {n}" for n in range(20_000)]
    small, large = ({key for key in keys if hold_out(key, share)} for share in (0.01, 0.03))
    assert small < large
    # Three standard deviations of a binomial with n = 20,000.
    assert abs(len(small) - 200) < 43 and abs(len(large) - 600) < 73


def test_simplewiki_parquet_folder(tmp_path: Path) -> None:
    text = "a" * 500
    rows = [article("Moon", f"  {text}\n"), article("Water", "b" * 600)]
    rows += [article("Sun", "c" * 499), article("Moon again", text)]
    write_parquet(tmp_path / "20231101.simple" / "train-00000-of-00001.parquet", rows)
    train, valid, record = prepare(
        tmp_path / "out", "simplewiki", tmp_path, "--valid_fraction", "0.5"
    )
    assert train == [{"text": f"Moon\n{text}"}]
    assert valid == [{"text": "Water\n" + "b" * 600}]
    dropped = {"duplicate_text": 1, "too_short": 1}
    counts = {"read": 4, "kept": 2, "train": 1, "valid": 1, "dropped": dropped}
    assert record["counts"] == counts


def test_tinystories_raw_text_and_parquet_shards_in_order(tmp_path: Path) -> None:
    source = tmp_path / "TinyStoriesV2-GPT4-train.txt"
    source.write_text(
        "\nOnce a cat sat.\nIt purred.\n<|endoftext|>\n\n<|endoftext|>\nOnce a cat sat.\n"
        "It purred.\n<|endoftext|>\nA dog ran.<|endoftext|>The end has no mark.\n",
        encoding="utf-8",
    )
    train, valid, record = prepare(tmp_path / "out", "tinystories", source)
    texts = ["Once a cat sat.\nIt purred.", "A dog ran.", "The end has no mark."]
    assert [line["text"] for line in train + valid] == texts
    assert record["counts"]["dropped"] == {"duplicate_text": 1, "too_short": 1}
    for shard, text in (("train-00001", "Two."), ("train-00000", "One."), ("validation-0", "No.")):
        write_parquet(tmp_path / "ts/data" / f"{shard}-of-00002.parquet", [{"text": text}])
    train, _, record = prepare(tmp_path / "out", "tinystories", tmp_path / "ts")
    assert [line["text"] for line in train] == ["One.", "Two."]
    assert record["source"]["files"] == 2


def test_dolly(tmp_path: Path) -> None:
    def dolly(instruction: str, response: str | None, context: str = "") -> dict:
        fields = {"instruction": instruction, "context": context, "response": response}
        return fields | {"category": "open_qa"}

    rows = [dolly("Why do cats purr? ", "w " * 80)]
    rows += [dolly("What is tea?", "A drink.\n\nIt  is hot. "), dolly("Too long?", "w " * 81)]
    rows += [dolly("Who?", "He.", context="He did it."), dolly("why do cats  PURR?", "Nobody.")]
    rows += [dolly("Empty?", " "), dolly("Null?", None), dolly(" ", "An answer.")]
    source = write_lines(tmp_path / "databricks-dolly-15k.jsonl", rows)
    train, valid, record = prepare(tmp_path / "out", "dolly", source, "--valid_fraction", "0.5")
    assert train == [chat("Why do cats purr?", " ".join(["w"] * 80))]
    assert valid == [chat("What is tea?", "A drink.\n\nIt  is hot.")]
    dropped = {"answer_too_long": 1, "duplicate_question": 1, "empty_answer": 2}
    assert record["counts"]["dropped"] == dropped | {"empty_question": 1, "has_context": 1}
    assert record["license"] == "CC-BY-SA-3.0"


@pytest.mark.parametrize("form", ["alpaca_data.json", "data/train-00000-of-00001-a09b.parquet"])
def test_alpaca_list_and_parquet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    rows = [{"instruction": "Name a color.", "input": "", "output": "Red."}]
    rows += [{"instruction": "Say hello.", "input": "", "output": "Hello."}]
    rows += [{"instruction": "Sum up.", "input": "A text.", "output": "Short."}]
    source = tmp_path / "alpaca" / form
    write_parquet(source, rows)
    if form.endswith(".json"):
        source.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    for place in (source, tmp_path / "alpaca"):
        train, valid, record = prepare(tmp_path / "out", "alpaca", place, "--valid_fraction", "0.5")
        assert train == [chat("Name a color.", "Red.")]
        assert valid == [chat("Say hello.", "Hello.")]
        assert record["counts"]["dropped"] == {"has_input": 1}
        assert "research only" in capsys.readouterr().out


def test_medquad_splits_by_disease_and_drops_what_has_no_answer(tmp_path: Path) -> None:
    shared, folder = "This answer is printed under two diseases.", tmp_path / "repo"
    # Read first, so its unanswered question must not count as a repeat later on.
    pairs = [("What is (are) Gout ?", ""), ("What causes Gout ?", None)]
    write_disease(folder / "10_MPlus_ADAM_QA/0000001.xml", "Gout", *pairs)
    pairs = [
        ("What is (are) Asthma ?", "Asthma is\n                \na disease &amp; a burden."),
        ("What causes Asthma ?", shared),
        ("How to treat Asthma ?", "Too short."),
        ("How to live with Asthma ?", "w " * 201),
    ]
    write_disease(folder / "5_NIDDK_QA/0000001.xml", "Asthma", *pairs)
    pairs = [
        ("What is (are) Gout ?", "- joint pain  - <b>heat</b> and swelling"),
        ("What  is (are) gout?", "A second answer to it."),
        ("What causes Gout ?", shared),
    ]
    write_disease(folder / "5_NIDDK_QA/0000002.xml", "Gout", *pairs)
    write_disease(folder / "6_NINDS_QA/0000001.xml", "ASTHMA", ("Where ?", "In the lungs."))
    write_disease(folder / "6_NINDS_QA/0000002.xml", " ", ("What ?", "It is this one."))
    train, valid, record = prepare(tmp_path / "out", "medquad", folder, "--valid_fraction", "0.5")
    assert train == [chat("What is (are) Gout?", "- joint pain - heat and swelling")]
    assert valid == [
        chat("What is (are) Asthma?", "Asthma is\na disease & a burden."),
        chat("What causes Asthma?", shared),
        chat("Where?", "In the lungs."),
    ]
    dropped = {"answer_too_long": 1, "answer_too_short": 1, "duplicate_answer": 1}
    dropped |= {"duplicate_question": 1, "empty_answer": 2, "no_disease": 1}
    assert record["counts"]["dropped"] == dropped


def test_minimind_is_kept_to_the_letter_if_it_is_sound(tmp_path: Path) -> None:
    rows = [{"text": " <|im_start|>你好<|im_end|> "}, {"text": " "}, {"text": "再见", "score": 1}]
    source = write_lines(tmp_path / "pretrain_hq.jsonl", rows)
    train, _, record = prepare(tmp_path / "out", "minimind-pretrain", source)
    assert train == [{"text": " <|im_start|>你好<|im_end|> "}, {"text": "再见"}]
    assert record["counts"]["dropped"] == {"empty_text": 1}

    def turns(*pairs: tuple[str, str]) -> dict:
        return {"conversations": [{"role": r, "content": c} for r, c in pairs]}

    sound = turns(("system", ""), ("user", "Moon"), ("assistant", "b"), ("user", "c"))
    sound["conversations"].append({"role": "assistant", "content": "d", "reasoning_content": ""})
    thought = turns(("user", "Sun"), ("assistant", "b"))
    thought["conversations"][1]["reasoning_content"] = "e"
    rows = [sound, thought, turns(("user", "Water"), ("assistant", " b "))]
    rows += [turns(("user", "a"), ("assistant", "b"), ("user", "c")), turns(("assistant", "b"))]
    rows += [turns(("user", "a"), ("assistant", " ")), turns()]
    rows += [turns(("user", "a"), ("tool", "{}"), ("assistant", "b"))]
    source = write_lines(tmp_path / "lora_medical.jsonl", rows)
    train, valid, record = prepare(
        tmp_path / "out", "minimind-medical", source, "--valid_fraction", "0.5"
    )
    spoken = [("user", "Moon"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert train == [turns(*spoken)]  # its system turn was empty, which training refuses
    record_messages(train[0], "what prepare.py wrote")
    assert valid == [chat("Water", " b ")]
    dropped = {"empty_turn": 1, "roles_out_of_order": 3, "tool_use": 1, "unread_field": 1}
    assert record["counts"]["dropped"] == dropped


def test_order_and_additions_move_nothing_and_the_limit_counts_what_is_kept(tmp_path: Path) -> None:
    rows = [article(t, f"Text of {t}.") for t in HELD_OUT + TRAINED_ON]
    flags = ["--min_chars", "1", "--valid_fraction", "0.5"]
    newer = [article(f"New {n}", f"New text {n}.") for n in range(50)]
    sides = []
    for name, records in (("a", rows), ("b", rows[::-1]), ("c", newer + rows)):
        source = write_lines(tmp_path / f"{name}.jsonl", records)
        _, valid, _ = prepare(tmp_path / name, "simplewiki", source, *flags)
        sides.append({r["text"] for r in valid if not r["text"].startswith("New")})
    assert sides[0] == sides[1] == sides[2]
    assert {text.partition("\n")[0] for text in sides[0]} == set(HELD_OUT)
    packed = tmp_path / "x.jsonl.gz"
    rows = [article(t, text) for t, text in (("A", ""), ("B", "b"), ("C", "c"), ("D", "d"))]
    packed.write_bytes(gzip.compress(write_lines(tmp_path / "x.jsonl", rows).read_bytes()))
    flags = ["--min_chars", "1", "--limit", "2"]
    train, valid, record = prepare(tmp_path / "d", "simplewiki", packed, *flags)
    assert [r["text"] for r in train + valid] == ["B\nb", "C\nc"]
    assert (record["counts"]["read"], record["settings"]["limit"]) == (3, 2)


def test_same_source_same_bytes_and_the_record_vouches_for_them(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", [article("Moon", "Día."), article("Water", "Wet.")])
    flags = ["--min_chars", "1", "--valid_fraction", "0.5"]
    _, _, record = prepare(tmp_path / "one", "simplewiki", source, *flags)
    prepare(tmp_path / "two" / "deep", "simplewiki", source, *flags)
    names = {"simplewiki.jsonl.gz", "simplewiki_valid.jsonl.gz", "simplewiki.json"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    for name in names:
        one, two = tmp_path / "one" / name, tmp_path / "two" / "deep" / name
        assert one.read_bytes() == two.read_bytes()
    packed = (tmp_path / "one" / "simplewiki.jsonl.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # flags (no file name) and time in the gzip header
    assert record["outputs"]["simplewiki.jsonl.gz"] == {
        "examples": 1,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "content_sha256": hashlib.sha256('{"text": "Moon\\nDía."}\n'.encode()).hexdigest(),
    }
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert record["source"] == {"path": "x.jsonl", "files": 1, "sha256": digest}


def test_list_names_every_corpus_with_license_and_home(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name, corpus in CORPORA.items():
        assert f"{name}\n  {corpus.home}\n  {corpus.license}; {corpus.credit}\n" in printed


DOLLY = '{"instruction": "Q", "context": "", "response": "A", "category": "x"}\n'


@pytest.mark.parametrize(
    ("name", "file", "content", "reason"),
    [
        ("dolly", "d.jsonl", DOLLY + '{"instruction": \n', "dolly: "),
        ("dolly", "d.jsonl", '{"instruction": "Q"}\n', "not a record of dolly"),
        ("dolly", "d.jsonl", DOLLY.replace('""', '"c"'), "nothing is left to train on"),
        ("dolly", "d.csv", "Q,A\n", "d.csv: .csv files are not read"),
        ("dolly", "d.parquet", "not parquet", "dolly: "),
        ("medquad", "m.xml", "<Document><Focus>", "not a record of medquad"),
        ("medquad", "m.xml", '<!DOCTYPE d [<!ENTITY a "b">]><d>&a;</d>', "has a DOCTYPE"),
        ("minimind-sft", "s.jsonl", '{"conversations": "x"}\n', "not a record of minimind-sft"),
        ("medquad", "", "", "no **/*.xml; get it from https://github.com/abachaa/MedQuAD"),
    ],
)
def test_sources_that_cannot_be_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    file: str,
    content: str,
    reason: str,
) -> None:
    """Nothing of an earlier output is lost."""
    out, source = tmp_path / "out", tmp_path / "source" / file
    out.mkdir()
    (out / f"{name}.jsonl.gz").write_text("dear")
    source.parent.mkdir(exist_ok=True)
    if file:
        source.write_text(content, encoding="utf-8")
    argv = [name, "--source", str(source), "--output_dir", str(out)]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(argv))
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and errors.startswith("error: ") and reason in errors
    assert [path.name for path in out.iterdir()] == [f"{name}.jsonl.gz"]
    assert (out / f"{name}.jsonl.gz").read_text() == "dear"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["wikipedia"], "invalid choice: 'wikipedia'"),
        (["medquad"], "git clone https://github.com/abachaa/MedQuAD"),
        (["dolly", "--source", "x", "--revision", "main"], "--revision belongs to the hub"),
        (["dolly", "--source", "x", "--min_chars", "9"], "--min_chars does nothing for dolly"),
        (["dolly", "--valid_fraction", "1"], "--valid_fraction: must lie between 0 and 1"),
    ],
)
def test_arguments_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main([*argv, "--output_dir", str(tmp_path / "out")]))
    assert caught.value.code == 2 and reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hub_files_take_the_same_path_and_the_commit_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"instruction": "Name a color.", "context": "", "response": "Red.", "category": "open_qa"}
    commit, calls = "a" * 40, []

    def load_builder(name: str, **place: object) -> SimpleNamespace:
        file = f"hf://datasets/{name}@{commit}/{place['data_files']}"
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": [file]}))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or [row])
    assert main(["dolly", "--output_dir", str(tmp_path / "out"), "--revision", "v1"]) == 0
    place = {"data_files": "databricks-dolly-15k.jsonl", "revision": "v1", "split": "train"}
    assert calls == [(("databricks/databricks-dolly-15k",), place)]
    record = json.loads((tmp_path / "out" / "dolly.json").read_text(encoding="utf-8"))
    origin = {"hub": "databricks/databricks-dolly-15k", "revision": commit, "files": 1}
    assert record["source"] == origin
