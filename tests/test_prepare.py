"""dataset/prepare.py on small raw files in each corpus's own format, without network."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset.command_line import REPO_DIR
from dataset.lm_dataset import record_messages
from dataset.prepare import (
    CORPORA,
    Settings,
    find_corpus,
    hold_out,
    main,
    read_medquad,
    read_simplewiki,
    read_tinystories,
    source_files,
    source_sha256,
    write_corpus,
)
from tests.tiny import exit_code

SCRIPT = REPO_DIR / "dataset" / "prepare.py"
# At a held-out share of one half, by the hash of the words alone.
HELD_OUT = ["Asthma", "Scurvy", "Water", "Iron", "What is tea?", "Say hello."]
TRAINED_ON = ["Acromegaly", "Gout", "April", "Moon", "Name a color.", "Why do cats purr?"]


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def read_lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prepare(out: Path, name: str, source: Path, *flags: str) -> tuple[list, list, dict]:
    """Run the command line; the train part, the held-out part and the record."""
    argv = [name, "--source", str(source), "--output_dir", str(out), *flags]
    assert main(argv) == 0
    record = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    train, valid = read_lines(out / f"{name}.jsonl.gz"), read_lines(out / f"{name}_valid.jsonl.gz")
    return train, valid, record


def refuse(capsys: pytest.CaptureFixture, out: Path, *argv: str) -> str:
    """Run the command line, which must fail with one line and leave nothing behind."""
    assert exit_code(main, [*argv, "--output_dir", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()
    return captured.err


def chat(question: str, answer: str) -> dict:
    return {
        "conversations": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def article(title: str, text: str) -> dict:
    return {"id": "1", "url": "https://simple.wikipedia.org/wiki/X", "title": title, "text": text}


def disease(focus: str, *pairs: tuple[str, str]) -> str:
    """A document as MedQuAD writes it, down to the space before the question mark."""
    body = "".join(
        f'\t<QAPair pid="{n}">\n\t\t\t<Question qid="0000001-{n}" qtype="information">{q}'
        f"</Question>\n\t\t\t<Answer>{a}</Answer>\n\t</QAPair>\n"
        for n, (q, a) in enumerate(pairs, start=1)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<Document id="0000001" source="NIDDK" url="http://www.niddk.nih.gov/x.aspx">\n'
        f"<Focus>{focus}</Focus>\n<FocusAnnotations>\n\t<UMLS>\n\t\t<CUIs>\n\t\t\t<CUI>C0001206"
        "</CUI>\n\t\t</CUIs>\n\t</UMLS>\n</FocusAnnotations>\n"
        f"<QAPairs>\n{body}</QAPairs>\n</Document>\n"
    )


def write_xml(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- the held-out rule ----


def test_hold_out_is_a_frozen_hash_of_the_words():
    assert [hold_out(key, 0.5) for key in HELD_OUT] == [True] * 6
    assert [hold_out(key, 0.5) for key in TRAINED_ON] == [False] * 6
    first_64_bits = int(hashlib.sha256(b"iron").hexdigest()[:16], 16) / 2**64
    assert 0.01 < first_64_bits < 0.03
    assert hold_out("Iron", 0.03) and not hold_out("Iron", 0.01)
    assert hold_out("  IRON\n", 0.03)


def test_hold_out_takes_its_share_and_a_larger_share_includes_it():
    keys = [f"title {n}" for n in range(20_000)]
    small = {key for key in keys if hold_out(key, 0.01)}
    large = {key for key in keys if hold_out(key, 0.03)}
    assert small < large
    # Three standard deviations of a binomial with n = 20,000.
    assert abs(len(small) - 200) < 43
    assert abs(len(large) - 600) < 73


# ---- the corpora, each in its own format ----


def test_simplewiki_parquet_folder(tmp_path):
    text = "a" * 500
    rows = [
        article("Moon", f"  {text}\n"),
        article("Water", "b" * 600),
        article("Sun", "c" * 499),
        article("Moon again", text),
    ]
    write_parquet(tmp_path / "20231101.simple" / "train-00000-of-00001.parquet", rows)
    train, valid, record = prepare(
        tmp_path / "out", "simplewiki", tmp_path, "--valid_fraction", "0.5"
    )
    assert train == [{"text": f"Moon\n{text}"}]
    assert valid == [{"text": "Water\n" + "b" * 600}]
    assert record["counts"] == {
        "read": 4,
        "kept": 2,
        "train": 1,
        "valid": 1,
        "dropped": {"duplicate_text": 1, "too_short": 1},
    }


def test_simplewiki_json_lines_and_min_chars(tmp_path):
    source = write_lines(tmp_path / "wiki.jsonl", [article("April", "Fourth."), article("X", "No")])
    train, valid, record = prepare(tmp_path / "out", "simplewiki", source, "--min_chars", "7")
    assert (train, valid) == ([{"text": "April\nFourth."}], [])
    assert record["settings"] == {
        "valid_fraction": 0.01,
        "min_chars": 7,
        "min_words": None,
        "max_words": None,
        "limit": None,
    }
    assert record["counts"]["dropped"] == {"too_short": 1}


def test_tinystories_raw_text(tmp_path):
    source = tmp_path / "TinyStoriesV2-GPT4-train.txt"
    source.write_text(
        "\nOnce a cat sat.\nIt purred.\n<|endoftext|>\n\n<|endoftext|>\nOnce a cat sat.\n"
        "It purred.\n<|endoftext|>\nA dog ran.<|endoftext|>The end has no mark.\n",
        encoding="utf-8",
    )
    train, valid, record = prepare(tmp_path / "out", "tinystories", source)
    assert [line["text"] for line in train + valid] == [
        "Once a cat sat.\nIt purred.",
        "A dog ran.",
        "The end has no mark.",
    ]
    assert record["counts"]["dropped"] == {"duplicate_text": 1, "too_short": 1}
    assert record["counts"]["read"] == 5
    starts = [row.where.rpartition(" ")[2] for row in read_tinystories(source)]
    assert starts == ["1", "4", "6", "9", "10"]


def test_tinystories_parquet_shards_in_order_without_the_validation_shard(tmp_path):
    for shard, text in (("train-00001", "Two."), ("train-00000", "One."), ("validation-0", "No.")):
        write_parquet(tmp_path / "data" / f"{shard}-of-00002.parquet", [{"text": text}])
    train, _, record = prepare(tmp_path / "out", "tinystories", tmp_path)
    assert [line["text"] for line in train] == ["One.", "Two."]
    assert record["source"]["files"] == 2


def test_dolly(tmp_path):
    def dolly(instruction: str, response: str, context: str = "") -> dict:
        return {
            "instruction": instruction,
            "context": context,
            "response": response,
            "category": "open_qa",
        }

    source = write_lines(
        tmp_path / "databricks-dolly-15k.jsonl",
        [
            dolly("Why do cats purr? ", "w " * 80),
            dolly("What is tea?", "A drink.\n\nIt  is hot. "),
            dolly("Too long?", "w " * 81),
            dolly("Who?", "He.", context="He did it."),
            dolly("why do cats  PURR?", "Nobody knows."),
            dolly("Empty?", " "),
            dolly(" ", "An answer."),
        ],
    )
    train, valid, record = prepare(tmp_path / "out", "dolly", source, "--valid_fraction", "0.5")
    assert train == [chat("Why do cats purr?", " ".join(["w"] * 80))]
    assert valid == [chat("What is tea?", "A drink.\n\nIt  is hot.")]
    assert record["counts"]["dropped"] == {
        "answer_too_long": 1,
        "duplicate_question": 1,
        "empty_answer": 1,
        "empty_question": 1,
        "has_context": 1,
    }
    assert record["license"] == "CC-BY-SA-3.0"


@pytest.mark.parametrize("form", ["alpaca_data.json", "data/train-00000-of-00001-a09b.parquet"])
def test_alpaca_list_and_parquet(tmp_path, capsys, form):
    rows = [
        {"instruction": "Name a color.", "input": "", "output": "Red."},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {"instruction": "Sum up.", "input": "A text.", "output": "Short."},
    ]
    source = tmp_path / "alpaca" / form
    if form.endswith(".json"):
        source.parent.mkdir(parents=True)
        source.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    else:
        write_parquet(source, rows)
    for place in (source, tmp_path / "alpaca"):
        train, valid, record = prepare(tmp_path / "out", "alpaca", place, "--valid_fraction", "0.5")
        assert train == [chat("Name a color.", "Red.")]
        assert valid == [chat("Say hello.", "Hello.")]
        assert record["counts"]["dropped"] == {"has_input": 1}
        assert "research only" in capsys.readouterr().out


def test_medquad_splits_by_disease_and_drops_what_has_no_answer(tmp_path):
    shared = "This answer is printed under two diseases."
    # Read first, so its unanswered question must not count as a repeat later on.
    write_xml(
        tmp_path / "repo/10_MPlus_ADAM_QA/0000001.xml",
        disease("Gout", ("What is (are) Gout ?", ""), ("What causes Gout ?", "")),
    )
    write_xml(
        tmp_path / "repo/5_NIDDK_QA/0000001.xml",
        disease(
            "Asthma",
            ("What is (are) Asthma ?", "Asthma is\n                \na disease &amp; a burden."),
            ("What causes Asthma ?", shared),
            ("How to treat Asthma ?", "Too short."),
            ("How to live with Asthma ?", "w " * 201),
        ),
    )
    write_xml(
        tmp_path / "repo/5_NIDDK_QA/0000002.xml",
        disease(
            "Gout",
            ("What is (are) Gout ?", "- joint pain  - <b>heat</b> and swelling"),
            ("What  is (are) gout?", "A second answer to it."),
            ("What causes Gout ?", shared),
        ),
    )
    write_xml(
        tmp_path / "repo/6_NINDS_QA/0000001.xml",
        disease("ASTHMA", ("Who gets Asthma ?", "w " * 200), ("Where ?", "In the lungs.")),
    )
    write_xml(tmp_path / "repo/6_NINDS_QA/0000002.xml", disease(" ", ("What ?", "It is this one.")))
    train, valid, record = prepare(
        tmp_path / "out", "medquad", tmp_path / "repo", "--valid_fraction", "0.5"
    )
    assert train == [chat("What is (are) Gout?", "- joint pain - heat and swelling")]
    assert valid == [
        chat("What is (are) Asthma?", "Asthma is\na disease & a burden."),
        chat("What causes Asthma?", shared),
        chat("Who gets Asthma?", " ".join(["w"] * 200)),
        chat("Where?", "In the lungs."),
    ]
    assert record["counts"] == {
        "read": 12,
        "kept": 5,
        "train": 1,
        "valid": 4,
        "dropped": {
            "answer_too_long": 1,
            "answer_too_short": 1,
            "duplicate_answer": 1,
            "duplicate_question": 1,
            "empty_answer": 2,
            "no_disease": 1,
        },
    }


def test_minimind_text_is_kept_to_the_letter(tmp_path):
    rows = [{"text": " <|im_start|>你好<|im_end|> "}, {"text": " "}, {"text": "再见", "score": 1}]
    source = write_lines(tmp_path / "pretrain_hq.jsonl", rows)
    train, valid, record = prepare(tmp_path / "out", "minimind-pretrain", source)
    assert train == [{"text": " <|im_start|>你好<|im_end|> "}, {"text": "再见"}]
    assert record["counts"]["dropped"] == {"empty_text": 1}
    with gzip.open(tmp_path / "out" / "minimind-pretrain.jsonl.gz", "rt", encoding="utf-8") as file:
        assert "你好" in file.readline()


def test_minimind_chat_keeps_sound_conversations(tmp_path):
    def turns(*pairs: tuple[str, str]) -> dict:
        return {"conversations": [{"role": r, "content": c} for r, c in pairs]}

    sound = turns(("system", ""), ("user", "Moon"), ("assistant", "b"), ("user", "c"))
    sound["conversations"].append({"role": "assistant", "content": "d", "reasoning_content": ""})
    thought = turns(("user", "Sun"), ("assistant", "b"))
    thought["conversations"][1]["reasoning_content"] = "e"
    rows = [
        sound,
        thought,
        turns(("user", "Water"), ("assistant", " b ")),
        turns(("user", "a"), ("assistant", "b"), ("user", "c")),
        turns(("assistant", "b")),
        turns(("user", "a"), ("assistant", " ")),
        turns(("user", "a"), ("tool", "{}"), ("assistant", "b")),
        turns(),
    ]
    source = write_lines(tmp_path / "lora_medical.jsonl", rows)
    train, valid, record = prepare(
        tmp_path / "out", "minimind-medical", source, "--valid_fraction", "0.5"
    )
    spoken = [("user", "Moon"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert train == [turns(*spoken)]  # its system turn was empty, which training refuses
    record_messages(train[0], "what prepare.py wrote")
    assert valid == [chat("Water", " b ")]
    assert record["counts"]["dropped"] == {
        "empty_turn": 1,
        "roles_out_of_order": 3,
        "tool_use": 1,
        "unread_field": 1,
    }


# ---- order, bytes, record ----


def test_order_and_later_additions_move_nothing_to_the_other_side(tmp_path):
    rows = [article(t, f"Text of {t}.") for t in HELD_OUT + TRAINED_ON]
    flags = ["--min_chars", "1", "--valid_fraction", "0.5"]
    newer = [article(f"New {n}", f"New text {n}.") for n in range(50)]
    sides = []
    for name, records in (("a", rows), ("b", rows[::-1]), ("c", newer + rows)):
        source = write_lines(tmp_path / f"{name}.jsonl", records)
        train, valid, _ = prepare(tmp_path / name, "simplewiki", source, *flags)
        old = [
            {r["text"] for r in part if not r["text"].startswith("New")} for part in (train, valid)
        ]
        sides.append(old)
    assert sides[0] == sides[1] == sides[2]
    assert {text.partition("\n")[0] for text in sides[0][1]} == set(HELD_OUT)


def test_same_source_same_bytes_and_the_record_vouches_for_them(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", [article("Moon", "Día."), article("Water", "Wet.")])
    flags = ["--min_chars", "1", "--valid_fraction", "0.5"]
    _, _, record = prepare(tmp_path / "one", "simplewiki", source, *flags)
    prepare(tmp_path / "two" / "deep", "simplewiki", source, *flags)
    names = {"simplewiki.jsonl.gz", "simplewiki_valid.jsonl.gz", "simplewiki.json"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    for name in names:
        one = (tmp_path / "one" / name).read_bytes()
        assert one == (tmp_path / "two" / "deep" / name).read_bytes()
    packed = (tmp_path / "one" / "simplewiki.jsonl.gz").read_bytes()
    # Flags (no file name) and time in the gzip header.
    assert packed[3:8] == bytes(5)
    assert record["outputs"]["simplewiki.jsonl.gz"] == {
        "examples": 1,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "content_sha256": hashlib.sha256('{"text": "Moon\\nDía."}\n'.encode()).hexdigest(),
    }
    assert record["source"] == {
        "path": "x.jsonl",
        "files": 1,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }


def test_folder_hash_is_that_of_a_sha256sum_listing(tmp_path):
    write_xml(tmp_path / "b/1.xml", "<b/>")
    write_xml(tmp_path / "a/2.xml", "<a/>")
    files = source_files(find_corpus("medquad"), tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["a/2.xml", "b/1.xml"]
    listing = (
        f"{hashlib.sha256(b'<a/>').hexdigest()}  a/2.xml\n"
        f"{hashlib.sha256(b'<b/>').hexdigest()}  b/1.xml\n"
    )
    assert source_sha256(tmp_path, files) == hashlib.sha256(listing.encode()).hexdigest()


def test_limit_counts_kept_examples_and_gzip_source_is_read(tmp_path):
    rows = [article(t, text) for t, text in (("A", ""), ("B", "b"), ("C", "c"), ("D", "d"))]
    source = tmp_path / "x.jsonl.gz"
    source.write_bytes(gzip.compress(write_lines(tmp_path / "x.jsonl", rows).read_bytes()))
    train, valid, record = prepare(
        tmp_path / "out", "simplewiki", source, "--min_chars", "1", "--limit", "2"
    )
    assert [r["text"] for r in train + valid] == ["B\nb", "C\nc"]
    assert (record["counts"]["read"], record["settings"]["limit"]) == (3, 2)


def test_write_corpus_from_python(tmp_path):
    source = write_lines(tmp_path / "x.jsonl", [article("Moon", "m"), article("Water", "w")])
    settings = Settings(valid_fraction=0.5, min_chars=1)
    origin = {"path": "x.jsonl"}
    record = write_corpus(find_corpus("simplewiki"), [source], origin, tmp_path / "o", settings)
    assert record["source"] == origin
    assert record["counts"]["kept"] == 2
    assert [row.fields for row in read_simplewiki(source)] == [
        {"title": "Moon", "text": "m"},
        {"title": "Water", "text": "w"},
    ]


def test_list_names_every_corpus_with_license_and_home(capsys):
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for corpus in CORPORA:
        for fact in (corpus.name, corpus.home, corpus.license, corpus.attribution, corpus.size):
            assert fact in printed


# ---- the hub ----


def test_hub_files_take_the_same_path_and_the_commit_is_recorded(tmp_path, monkeypatch, capsys):
    commit = "a" * 40
    snapshot = tmp_path / "snapshots" / commit
    row = {"instruction": "Name a color.", "context": "", "response": "Red.", "category": "open_qa"}
    write_lines(snapshot / "databricks-dolly-15k.jsonl", [row])
    asked = []

    def download(repo_id: str, **how: object) -> str:
        asked.append((repo_id, how))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["dolly", "--output_dir", str(tmp_path / "out"), "--revision", "v1"]) == 0
    assert asked == [
        (
            "databricks/databricks-dolly-15k",
            {
                "repo_type": "dataset",
                "revision": "v1",
                "allow_patterns": ["databricks-dolly-15k.jsonl"],
            },
        )
    ]
    record = json.loads((tmp_path / "out" / "dolly.json").read_text(encoding="utf-8"))
    assert (record["source"]["hub"], record["source"]["revision"]) == (asked[0][0], commit)
    assert "empty; raise --valid_fraction" in capsys.readouterr().out
    (snapshot / "databricks-dolly-15k.jsonl").unlink()
    message = refuse(capsys, tmp_path / "none", "dolly")
    assert "has no databricks-dolly-15k.jsonl" in message and "--source" in message


def test_without_network_the_script_says_how_to_use_source(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "alpaca", "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "prepare.py alpaca --source PATH" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- refusals ----


@pytest.mark.parametrize(
    "argv, words",
    [
        (["wikipedia"], "unknown corpus 'wikipedia'; choose one of simplewiki"),
        ([], "no corpus given"),
        (["medquad"], "git clone https://github.com/abachaa/MedQuAD and give --source"),
        (["dolly", "--source", "nowhere"], "nowhere: no such file or folder; get it from https"),
        (["dolly", "--source", "x", "--revision", "main"], "--revision belongs to the hub"),
        (["dolly", "--source", "x", "--min_chars", "9"], "--min_chars does nothing for dolly"),
        (["simplewiki", "--max_words", "9"], "--max_words does nothing for simplewiki"),
        (["minimind-sft", "--max_words", "9"], "--max_words does nothing for minimind-sft"),
        (["medquad", "--max_words", "2"], "keeps answers from 3 on"),
        (["dolly", "--limit", "0"], "--limit 0: must be at least 1"),
        (["dolly", "--valid_fraction", "1"], "must lie between 0 and 1"),
        (["dolly", "--valid_fraction", "nan"], "must lie between 0 and 1"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, capsys, argv, words):
    assert words in refuse(capsys, tmp_path / "out", *argv)


GOOD_DOLLY = '{"instruction": "Q", "context": "", "response": "A", "category": "x"}\n'


@pytest.mark.parametrize(
    "name, file, content, words",
    [
        ("dolly", "d.jsonl", GOOD_DOLLY + '{"instruction": \n', "d.jsonl, line 2: broken JSON"),
        ("dolly", "d.jsonl", GOOD_DOLLY + "[1]\n", "d.jsonl, line 2: expected a JSON object"),
        ("dolly", "d.jsonl", '{"instruction": "Q"}\n', "line 1: no field 'context'"),
        (
            "dolly",
            "d.jsonl",
            GOOD_DOLLY.replace('"A"', "null"),
            "line 1: field 'response' is NoneType",
        ),
        ("dolly", "d.jsonl", "\n", "d.jsonl: no records in the source"),
        ("dolly", "d.jsonl", GOOD_DOLLY.replace('""', '"c"'), "nothing is left to train on"),
        ("dolly", "d.jsonl", GOOD_DOLLY.replace('"Q"', '"\\ud800"'), "line 1: half of a surrogate"),
        ("dolly", "d.csv", "Q,A\n", "dolly is read from .jsonl, .jsonl.gz, .parquet files"),
        ("dolly", "d.jsonl.gz", "not gzip", "d.jsonl.gz: damaged gzip file"),
        ("dolly", "d.parquet", "not parquet", "d.parquet: not a whole parquet file"),
        ("alpaca", "a.json", "[\n{]", "enclosed in double quotes at line 2, column 2)"),
        ("alpaca", "a.json", "{}", "a.json: expected one JSON list"),
        ("alpaca", "a.json", '[{"instruction": "Q"}]', "a.json, record 1: no field 'input'"),
        ("tinystories", "t.txt", "Just a book.\n", "t.txt: no <|endoftext|> in it"),
        ("tinystories", "t.txt", "", "t.txt: no records in the source"),
        ("medquad", "m.xml", "<Document><Focus>", "m.xml, line 1: broken XML"),
        ("medquad", "m.xml", "<html/>", "m.xml: no <Document> with a <Focus>"),
        (
            "medquad",
            "m.xml",
            '<!DOCTYPE d [<!ENTITY a "b">]><Document><Focus>&a;</Focus></Document>',
            "m.xml: has a DOCTYPE",
        ),
        (
            "medquad",
            "m.xml",
            disease("Gout", ("Q ?", "A")).replace("Question", "Q"),
            "m.xml, QAPair pid=1: no <Question>",
        ),
        ("minimind-pretrain", "p.jsonl", '{"content": "x"}\n', "line 1: no field 'text'"),
        ("minimind-sft", "s.jsonl", '{"text": "x"}\n', "line 1: no field 'conversations'"),
        ("minimind-sft", "s.jsonl", '{"conversations": "x"}\n', "is str, expected list"),
        (
            "minimind-sft",
            "s.jsonl",
            '{"conversations": [{"from": "human", "value": "x"}]}\n',
            "s.jsonl, line 1, conversations: no field 'role' (it has ['from', 'value'])",
        ),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, capsys, name, file, content, words):
    source = tmp_path / file
    source.write_text(content, encoding="utf-8")
    message = refuse(capsys, tmp_path / "out", name, "--source", str(source))
    assert words in message
    assert str(source) in message


def test_utf16_xml_does_not_slip_past_the_entity_check(tmp_path, capsys):
    source = tmp_path / "m.xml"
    source.write_bytes('<!DOCTYPE d [<!ENTITY a "b">]><Document/>'.encode("utf-16"))
    message = refuse(capsys, tmp_path / "out", "medquad", "--source", str(source))
    assert "not UTF-8 text" in message


def test_other_wrong_sources(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    message = refuse(capsys, tmp_path / "out", "medquad", "--source", str(tmp_path / "empty"))
    assert "no **/*.xml in this folder; get medquad from https://github.com/" in message
    parquet = write_parquet(tmp_path / "x.parquet", [{"body": "x"}])
    message = refuse(capsys, tmp_path / "out", "tinystories", "--source", str(parquet))
    assert "no field 'text' (it has ['body'])" in message
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(GOOD_DOLLY.encode() * 99)[:-20])
    message = refuse(capsys, tmp_path / "out", "dolly", "--source", str(cut))
    assert "cut.jsonl.gz: damaged gzip file" in message


def test_a_failed_run_leaves_the_earlier_outputs_alone(tmp_path, capsys):
    good = write_lines(tmp_path / "good.jsonl", [json.loads(GOOD_DOLLY)])
    out = tmp_path / "out"
    prepare(out, "dolly", good)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text(GOOD_DOLLY.replace("Q", "Other") + "{", encoding="utf-8")
    assert exit_code(main, ["dolly", "--source", str(bad), "--output_dir", str(out)]) == 2
    assert "bad.jsonl, line 2" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_output_is_not_read_over_itself(tmp_path, capsys):
    rows = [{"text": "Moon"}, {"text": "Gout"}]
    out = tmp_path / "out"
    prepare(out, "minimind-pretrain", write_lines(tmp_path / "p.jsonl", rows))
    capsys.readouterr()
    own = out / "minimind-pretrain.jsonl.gz"
    before = own.read_bytes()
    assert (
        exit_code(main, ["minimind-pretrain", "--source", str(own), "--output_dir", str(out)]) == 2
    )
    assert "would be overwritten by its own output" in capsys.readouterr().err
    assert own.read_bytes() == before


def test_an_output_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    source = write_lines(tmp_path / "good.jsonl", [json.loads(GOOD_DOLLY)])
    assert exit_code(main, ["dolly", "--source", str(source), "--output_dir", str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_medquad_answers_may_be_absent(tmp_path):
    text = disease("Gout", ("What ?", "x")).replace("<Answer>x</Answer>", "")
    rows = list(read_medquad(write_xml(tmp_path / "m.xml", text)))
    assert [row.fields for row in rows] == [{"focus": "Gout", "question": "What ?", "answer": ""}]
