"""Turn a public corpus into MiniMind JSONL: two parts, and a record of where they came from.

    python dataset/prepare.py --list
    python dataset/prepare.py simplewiki
    python dataset/prepare.py tinystories --source TinyStoriesV2-GPT4-train.txt --limit 100000
    python dataset/prepare.py dolly --output_dir /data/minimind
    git clone https://github.com/abachaa/MedQuAD dataset/data/MedQuAD
    python dataset/prepare.py medquad --source dataset/data/MedQuAD

Without `--source` the files come from the Hugging Face hub (and stay in its cache); with it, from a
file or folder in the corpus's own format, so a machine without internet takes the same path.
For a corpus NAME three files appear in the output folder, all of them or none:

    NAME.jsonl.gz         {"text": ...} or {"conversations": [{"role": ..., "content": ...}, ...]}
    NAME_valid.jsonl.gz   the held-out part
    NAME.json             source, license, settings, counts, hashes

What is held out is decided by a hash of the title, the question or the disease alone, so a text
stays on its side when the order changes or when a newer dump has more of them.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple
from xml.etree import ElementTree

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.command_line import Parser, UserError, check_writable, run_script
from dataset.jsonl import file_sha256
from dataset.untrusted import has_unread, parse_json, shown

DATA_DIR = Path(__file__).resolve().parent / "data"
STORY_END = "<|endoftext|>"


class PrepareError(UserError):
    """A corpus that cannot be prepared; the message says where and how to mend it."""


class Row(NamedTuple):
    """One record of a source, and the words that tell the user where it stands."""

    where: str
    fields: dict


@dataclass(frozen=True)
class Example:
    """One line to be written. `group` is held out together; `once` may not occur twice."""

    group: str
    data: dict
    once: dict[str, str]


@dataclass(frozen=True)
class Settings:
    """What shapes the output; None where the corpus has no such rule."""

    valid_fraction: float
    min_chars: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    limit: int | None = None


# ---- reading: one generator of rows per source format ----


@contextmanager
def readable(path: Path) -> Iterator[IO[str]]:
    """A plain or gzip text file; damage is reported with the file's name."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise PrepareError(
            f"{path}: not UTF-8 text ({error.reason}); is it the raw file?"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PrepareError(f"{path}: damaged gzip file ({error}); download it again") from error


def read_json_lines(path: Path) -> Iterator[Row]:
    with readable(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise PrepareError(
                    f"{where}: broken JSON ({error}); repair or remove the line"
                ) from error
            yield Row(where, record)


def read_json_list(path: Path) -> Iterator[Row]:
    with readable(path) as file:
        text = file.read()
    try:
        records = parse_json(text)
    except ValueError as error:
        raise PrepareError(
            f"{path}: broken JSON ({error}); expected one JSON list"
            " (name a file of JSON lines *.jsonl)"
        ) from error
    if not isinstance(records, list):
        raise PrepareError(f"{path}: expected one JSON list of records; is it the right file?")
    for number, record in enumerate(records, start=1):
        yield Row(f"{path}, record {number}", record)


def read_parquet(path: Path, names: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            for name in names:
                if name not in table.schema_arrow.names:
                    raise PrepareError(missing(f"{path}", name, table.schema_arrow.names))
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=list(names)):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", record)
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise PrepareError(f"{path}: not a whole parquet file ({reason})") from error


def missing(where: str, name: str, found: object) -> str:
    return f"{where}: no field {name!r} (it has {sorted(found)}); is this the right corpus?"


def check_record(row: Row, names: tuple[str, ...], kind: type) -> Row:
    """The row with the wanted fields only, each of the wanted type."""
    if not isinstance(row.fields, dict):
        raise PrepareError(f"{row.where}: expected a JSON object with {', '.join(names)}")
    for name in names:
        if name not in row.fields:
            raise PrepareError(missing(row.where, name, row.fields))
        if not isinstance(row.fields[name], kind):
            found = type(row.fields[name]).__name__
            raise PrepareError(
                f"{row.where}: field {name!r} is {found}, expected {kind.__name__};"
                " repair or remove the record"
            )
    return Row(row.where, {name: row.fields[name] for name in names})


def read_records(path: Path, names: tuple[str, ...], kind: type = str) -> Iterator[Row]:
    if path.suffix == ".parquet":
        rows = read_parquet(path, names)
    elif path.suffix == ".json":
        rows = read_json_list(path)
    else:
        rows = read_json_lines(path)
    return (check_record(row, names, kind) for row in rows)


def read_simplewiki(path: Path) -> Iterator[Row]:
    return read_records(path, ("title", "text"))


def read_tinystories(path: Path) -> Iterator[Row]:
    return read_story_text(path) if path.suffix == ".txt" else read_records(path, ("text",))


def read_story_text(path: Path) -> Iterator[Row]:
    """TinyStories' raw text: stories of several lines, divided by <|endoftext|>."""
    story, start, ends = "", 1, 0
    with readable(path) as file:
        for number, line in enumerate(file, start=1):
            *finished, rest = line.split(STORY_END)
            for part in finished:
                ends += 1
                yield Row(f"{path}, line {start}", {"text": story + part})
                story, start = "", number
            story += rest
    if story.strip():
        if ends == 0:
            raise PrepareError(f"{path}: no {STORY_END} in it; is it TinyStories' raw text?")
        yield Row(f"{path}, line {start}", {"text": story})


def read_dolly(path: Path) -> Iterator[Row]:
    return read_records(path, ("instruction", "context", "response"))


def read_alpaca(path: Path) -> Iterator[Row]:
    return read_records(path, ("instruction", "input", "output"))


def read_medquad(path: Path) -> Iterator[Row]:
    """The question-answer pairs of one document, i.e. of one disease."""
    with readable(path) as file:
        xml = file.read()
    # The standard library expands entities without bound; they are declared in a DOCTYPE.
    if "<!DOCTYPE" in xml:
        raise PrepareError(f"{path}: has a DOCTYPE, which no MedQuAD file has; remove the file")
    try:
        document = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise PrepareError(f"{path}, line {error.position[0]}: broken XML ({error})") from error
    focus = document.find("Focus")
    if document.tag != "Document" or focus is None:
        raise PrepareError(f"{path}: no <Document> with a <Focus>; is it a MedQuAD file?")
    for pair in document.iterfind("QAPairs/QAPair"):
        where = f"{path}, QAPair pid={pair.get('pid')}"
        question, answer = pair.find("Question"), pair.find("Answer")
        if question is None:
            raise PrepareError(f"{where}: no <Question>; repair or remove the pair")
        answer_text = "" if answer is None else "".join(answer.itertext())
        yield Row(
            where,
            {
                "focus": "".join(focus.itertext()),
                "question": "".join(question.itertext()),
                "answer": answer_text,
            },
        )


def read_minimind_text(path: Path) -> Iterator[Row]:
    return read_records(path, ("text",))


def read_minimind_chat(path: Path) -> Iterator[Row]:
    for row in read_records(path, ("conversations",), list):
        for turn in row.fields["conversations"]:
            check_record(Row(f"{row.where}, conversations", turn), ("role", "content"), str)
        yield row


# ---- converting: a row becomes an example, or the reason why it is dropped ----


def one_line(text: str) -> str:
    return " ".join(text.split())


def same(text: str) -> str:
    """What counts as the same title, question or answer: letter case and spacing do not matter."""
    return one_line(text).casefold()


def tidy_lines(text: str) -> str:
    """Single spaces, no blank lines: MedQuAD pads its paragraphs with the layout of web pages."""
    return "\n".join(filter(None, map(one_line, text.splitlines())))


def chat(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns}


def answer_fault(question: str, answer: str, settings: Settings) -> str | None:
    words = len(answer.split())
    if not question:
        return "empty_question"
    if words == 0:
        return "empty_answer"
    if settings.min_words is not None and words < settings.min_words:
        return "answer_too_short"
    if settings.max_words is not None and words > settings.max_words:
        return "answer_too_long"
    return None


def convert_simplewiki(fields: dict, settings: Settings) -> Example | str:
    title, text = one_line(fields["title"]), fields["text"].strip()
    if len(text) < settings.min_chars:
        return "too_short"
    return Example(title, {"text": f"{title}\n{text}"}, {"text": text})


def convert_tinystories(fields: dict, settings: Settings) -> Example | str:
    text = fields["text"].strip()
    if len(text) < settings.min_chars:
        return "too_short"
    return Example(text, {"text": text}, {"text": text})


def convert_instruction(question: str, answer: str, settings: Settings) -> Example | str:
    question, answer = question.strip(), answer.strip()
    fault = answer_fault(question, answer, settings)
    return fault or Example(question, chat(question, answer), {"question": same(question)})


def convert_dolly(fields: dict, settings: Settings) -> Example | str:
    if fields["context"].strip():
        return "has_context"
    return convert_instruction(fields["instruction"], fields["response"], settings)


def convert_alpaca(fields: dict, settings: Settings) -> Example | str:
    if fields["input"].strip():
        return "has_input"
    return convert_instruction(fields["instruction"], fields["output"], settings)


def convert_medquad(fields: dict, settings: Settings) -> Example | str:
    disease = one_line(fields["focus"])
    question = re.sub(r" +\?", "?", one_line(fields["question"]))
    answer = tidy_lines(fields["answer"])
    if not disease:
        return "no_disease"
    fault = answer_fault(question, answer, settings)
    once = {"question": same(question), "answer": same(answer)}
    return fault or Example(disease, chat(question, answer), once)


def convert_minimind_text(fields: dict, settings: Settings) -> Example | str:
    text = fields["text"]
    return Example(text, {"text": text}, {}) if text.strip() else "empty_text"


def convert_minimind_chat(fields: dict, settings: Settings) -> Example | str:
    turns = fields["conversations"]
    # Our chat template has no tools; MiniMind's newer files mix such conversations in.
    if any(t["role"] == "tool" or t.get("tools") or t.get("tool_calls") for t in turns):
        return "tool_use"
    if any(has_unread(turn) for turn in turns):
        return "unread_field"  # as reasoning_content is, which the answer would be read without
    roles = [turn["role"] for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    # Strict alternation that ends with an answer: anything else would train on a broken template.
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return "roles_out_of_order"
    if any(not turn["content"].strip() for turn in turns if turn["role"] != "system"):
        return "empty_turn"
    # An empty system turn says nothing, and training refuses empty turns.
    said = [turn for turn in turns if turn["content"].strip()]
    kept = [{"role": turn["role"], "content": turn["content"]} for turn in said]
    first_question = next(turn["content"] for turn in turns if turn["role"] == "user")
    return Example(first_question, {"conversations": kept}, {})


# ---- the corpora ----


@dataclass(frozen=True)
class Corpus:
    """A public corpus. `files` are glob patterns, tried in order; the first is the hub's layout."""

    name: str
    home: str
    hub: str | None
    revision: str | None
    files: tuple[str, ...]
    suffixes: tuple[str, ...]
    license: str
    attribution: str
    size: str
    read: Callable[[Path], Iterator[Row]]
    convert: Callable[[dict, Settings], Example | str]
    defaults: Settings


MINIMIND = "jingyaogong/minimind_dataset"
# The main branch has since replaced pretrain_hq and sft_mini_512; this revision lists them.
MINIMIND_OLD = "9f9f5d75020d4e36f9af87d303a3690ceba6d5c6"
MINIMIND_LICENSE = "Apache-2.0 AND CC-BY-NC-2.0"
MINIMIND_CREDIT = "MiniMind dataset, Jingyao Gong and the sources that its card names"

CORPORA = (
    Corpus(
        name="simplewiki",
        home="https://huggingface.co/datasets/wikimedia/wikipedia",
        hub="wikimedia/wikipedia",
        revision="main",
        files=("20231101.simple/*.parquet", "*.parquet"),
        suffixes=(".parquet", ".jsonl", ".jsonl.gz"),
        license="CC-BY-SA-3.0",
        attribution="Simple English Wikipedia contributors, dump of 2023-11-01 (also under GFDL)",
        size="about 240,000 articles, 0.2 GB to download",
        read=read_simplewiki,
        convert=convert_simplewiki,
        defaults=Settings(valid_fraction=0.01, min_chars=500),
    ),
    Corpus(
        name="tinystories",
        home="https://huggingface.co/datasets/roneneldan/TinyStories",
        hub="roneneldan/TinyStories",
        revision="main",
        files=("data/train-*.parquet", "train-*.parquet", "TinyStoriesV2-GPT4-train.txt"),
        suffixes=(".parquet", ".txt", ".jsonl", ".jsonl.gz"),
        license="CDLA-Sharing-1.0",
        attribution="Eldan & Li, TinyStories, arXiv:2305.07759, 2023",
        size="about 2.1 million stories, 1 GB to download; raw V2 text 2.2 GB",
        read=read_tinystories,
        convert=convert_tinystories,
        defaults=Settings(valid_fraction=0.01, min_chars=1),
    ),
    Corpus(
        name="dolly",
        home="https://huggingface.co/datasets/databricks/databricks-dolly-15k",
        hub="databricks/databricks-dolly-15k",
        revision="main",
        files=("databricks-dolly-15k.jsonl",),
        suffixes=(".jsonl", ".jsonl.gz", ".parquet"),
        license="CC-BY-SA-3.0",
        attribution="databricks-dolly-15k, (c) 2023 Databricks, Inc.",
        size="15,011 records, 13 MB",
        read=read_dolly,
        convert=convert_dolly,
        defaults=Settings(valid_fraction=0.03, max_words=80),
    ),
    Corpus(
        name="alpaca",
        home="https://huggingface.co/datasets/tatsu-lab/alpaca",
        hub="tatsu-lab/alpaca",
        revision="main",
        files=("data/train-*.parquet", "train-*.parquet", "alpaca_data.json"),
        suffixes=(".parquet", ".json", ".jsonl", ".jsonl.gz"),
        license="CC-BY-NC-4.0",
        attribution="Taori et al., Stanford Alpaca, 2023; written by OpenAI's text-davinci-003",
        size="52,002 records, 24 MB",
        read=read_alpaca,
        convert=convert_alpaca,
        defaults=Settings(valid_fraction=0.03, max_words=80),
    ),
    Corpus(
        name="medquad",
        home="https://github.com/abachaa/MedQuAD",
        hub=None,
        revision=None,
        files=("**/*.xml",),
        suffixes=(".xml",),
        license="CC-BY-4.0",
        attribution="Ben Abacha & Demner-Fushman, BMC Bioinformatics 20:511, 2019",
        size="about 11,000 XML files with 47,457 pairs, 16,000 of them answered",
        read=read_medquad,
        convert=convert_medquad,
        defaults=Settings(valid_fraction=0.03, min_words=3, max_words=200),
    ),
    Corpus(
        name="minimind-pretrain",
        home=f"https://huggingface.co/datasets/{MINIMIND}",
        hub=MINIMIND,
        revision=MINIMIND_OLD,
        files=("pretrain_hq.jsonl",),
        suffixes=(".jsonl", ".jsonl.gz"),
        license=MINIMIND_LICENSE,
        attribution=MINIMIND_CREDIT,
        size="Chinese, 1.6 GB; the newer pretrain_t2t_mini.jsonl is read with --source",
        read=read_minimind_text,
        convert=convert_minimind_text,
        defaults=Settings(valid_fraction=0.01),
    ),
    Corpus(
        name="minimind-sft",
        home=f"https://huggingface.co/datasets/{MINIMIND}",
        hub=MINIMIND,
        revision=MINIMIND_OLD,
        files=("sft_mini_512.jsonl",),
        suffixes=(".jsonl", ".jsonl.gz"),
        license=MINIMIND_LICENSE,
        attribution=MINIMIND_CREDIT,
        size="Chinese, 1.2 GB; the newer sft_t2t_mini.jsonl is read with --source",
        read=read_minimind_chat,
        convert=convert_minimind_chat,
        defaults=Settings(valid_fraction=0.01),
    ),
    Corpus(
        name="minimind-medical",
        home=f"https://huggingface.co/datasets/{MINIMIND}",
        hub=MINIMIND,
        revision="main",
        files=("lora_medical.jsonl",),
        suffixes=(".jsonl", ".jsonl.gz"),
        license=MINIMIND_LICENSE,
        attribution=MINIMIND_CREDIT,
        size="Chinese, 34 MB",
        read=read_minimind_chat,
        convert=convert_minimind_chat,
        defaults=Settings(valid_fraction=0.01),
    ),
)


def find_corpus(name: str | None) -> Corpus:
    for corpus in CORPORA:
        if corpus.name == name:
            return corpus
    names = ", ".join(corpus.name for corpus in CORPORA)
    fault = "no corpus given" if name is None else f"unknown corpus {name!r}"
    raise PrepareError(f"{fault}; choose one of {names} (--list tells more)")


def listing() -> str:
    return "\n".join(
        f"{c.name}\n  home     {c.home}\n  license  {c.license}; {c.attribution}\n"
        f"  size     {c.size}"
        for c in CORPORA
    )


# ---- finding the source ----


def files_in(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of the first pattern that matches, in an order that no file system changes."""
    for pattern in patterns:
        found = [path for path in folder.glob(pattern) if path.is_file()]
        if found:
            return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
    return []


def source_files(corpus: Corpus, source: Path) -> list[Path]:
    if source.is_dir():
        files = files_in(source, corpus.files)
        if not files:
            raise PrepareError(
                f"{source}: no {' or '.join(corpus.files)} in this folder;"
                f" get {corpus.name} from {corpus.home}"
            )
        return files
    if not source.exists():
        raise PrepareError(f"{source}: no such file or folder; get it from {corpus.home}")
    if not source.name.endswith(corpus.suffixes):
        raise PrepareError(
            f"{source}: {corpus.name} is read from {', '.join(corpus.suffixes)} files;"
            f" see {corpus.home}"
        )
    return [source]


def hub_folder(corpus: Corpus, revision: str | None) -> Path:
    """Download the corpus (or find it in the hub's cache): a folder named after its commit."""
    if corpus.hub is None:
        raise PrepareError(
            f"{corpus.name} is not on the hub: git clone {corpus.home} and give --source FOLDER"
        )
    # Imported here: most uses of this file, the tests among them, need no hub.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        folder = snapshot_download(
            corpus.hub,
            repo_type="dataset",
            revision=revision or corpus.revision,
            allow_patterns=[corpus.files[0]],
        )
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PrepareError(
            f"the hub gave no {corpus.hub} ({reason}); fetch {corpus.files[0]} from {corpus.home}"
            f" and run: python dataset/prepare.py {corpus.name} --source PATH"
        ) from error
    if not files_in(Path(folder), corpus.files[:1]):
        raise PrepareError(
            f"revision {Path(folder).name} of {corpus.hub} has no {corpus.files[0]};"
            " give another --revision, or a file with --source"
        )
    return Path(folder)


def content_sha256(path: Path) -> str:
    """Of the unpacked text: another zlib may pack the same text into other bytes."""
    with gzip.open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_sha256(source: Path, files: list[Path]) -> str:
    """A file's hash; for a folder the hash of what `sha256sum` would list for its files."""
    if files == [source]:
        return file_sha256(source)
    lines = (f"{file_sha256(path)}  {path.relative_to(source).as_posix()}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- writing ----


def hold_out(key: str, fraction: float) -> bool:
    """Whether all examples of this group belong to the held-out part.

    A larger fraction holds out a superset of what a smaller one does.
    """
    digest = hashlib.sha256(same(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def first_repeat(example: Example, seen: set[bytes]) -> str | None:
    """Which part of the example has occurred before; remembers the parts if none has."""
    # Digests, since two million stories would not fit in memory.
    digests = {
        name: hashlib.blake2b(f"{name}\n{text}".encode(), digest_size=16).digest()
        for name, text in example.once.items()
    }
    for name, digest in digests.items():
        if digest in seen:
            return f"duplicate_{name}"
    seen.update(digests.values())
    return None


@contextmanager
def moved_into_place(output_dir: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write `names` in; they replace the old files at the end, or nothing changes."""
    created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output_dir) as aside:
            yield Path(aside)
            for name in names:
                os.replace(Path(aside) / name, output_dir / name)
    except BaseException:
        for path in created:
            # Another run may have written there in the meantime.
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def gzip_writer(path: Path) -> Iterator[IO[bytes]]:
    """gzip without file name and time, so that the same text gives the same bytes."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
    ):
        yield packed


def write_examples(
    corpus: Corpus, files: list[Path], settings: Settings, outputs: dict[str, Path]
) -> Counter:
    """Write the kept rows to `outputs` (train, valid). Counts read, train, valid, dropped.*."""
    counts, seen = Counter(), set()
    with ExitStack() as stack:
        writers = {part: stack.enter_context(gzip_writer(p)) for part, p in outputs.items()}
        bar = stack.enter_context(tqdm(desc=corpus.name, unit=" records", disable=None))
        for row in (row for path in files for row in corpus.read(path)):
            if settings.limit is not None and counts["train"] + counts["valid"] == settings.limit:
                break
            bar.update()
            counts["read"] += 1
            try:
                part = write_row(corpus, row, settings, seen, writers)
            except UnicodeEncodeError as error:
                raise PrepareError(
                    f"{row.where}: half of a surrogate pair ({error.reason}); repair the record"
                ) from error
            counts[part] += 1
    return counts


def write_row(
    corpus: Corpus, row: Row, settings: Settings, seen: set[bytes], writers: dict[str, IO[bytes]]
) -> str:
    """Write one row; says where it went: train, valid, or dropped.REASON."""
    example = corpus.convert(row.fields, settings)
    reason = example if isinstance(example, str) else first_repeat(example, seen)
    if reason is not None:
        return f"dropped.{reason}"
    part = "valid" if hold_out(example.group, settings.valid_fraction) else "train"
    line = json.dumps(example.data, ensure_ascii=False) + "\n"
    writers[part].write(line.encode())
    return part


def summarize(counts: Counter) -> dict:
    dropped = {
        name.removeprefix("dropped."): count
        for name, count in sorted(counts.items())
        if name.startswith("dropped.")
    }
    kept = counts["train"] + counts["valid"]
    return {
        "read": counts["read"],
        "kept": kept,
        "train": counts["train"],
        "valid": counts["valid"],
        "dropped": dropped,
    }


def write_corpus(
    corpus: Corpus, files: list[Path], origin: dict, output_dir: Path, settings: Settings
) -> dict:
    """Write the two parts and the record that vouches for them; returns the record."""
    names = {"train": f"{corpus.name}.jsonl.gz", "valid": f"{corpus.name}_valid.jsonl.gz"}
    targets = {(output_dir / name).resolve() for name in names.values()}
    for path in files:
        if path.resolve() in targets:
            raise PrepareError(f"{path}: would be overwritten by its own output; use --output_dir")
    record_name = f"{corpus.name}.json"
    # The record comes last: if the machine stops between the moves, the hashes tell.
    with moved_into_place(output_dir, (*names.values(), record_name)) as aside:
        outputs = {part: aside / name for part, name in names.items()}
        counts = write_examples(corpus, files, settings, outputs)
        if counts["read"] == 0:
            raise PrepareError(f"{files[0]}: no records in the source; download it again")
        if counts["train"] == 0:
            raise PrepareError(
                f"{files[0]}: nothing is left to train on ({summarize(counts)});"
                " relax --min_chars, --max_words or --valid_fraction"
            )
        record = {
            "corpus": corpus.name,
            "home": corpus.home,
            "source": origin,
            "license": corpus.license,
            "attribution": corpus.attribution,
            "settings": asdict(settings),
            "counts": summarize(counts),
            "outputs": {
                path.name: {
                    "examples": counts[part],
                    "sha256": file_sha256(path),
                    "content_sha256": content_sha256(path),
                }
                for part, path in outputs.items()
            },
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (aside / record_name).write_text(text, encoding="utf-8")
    return record


# ---- command line ----


def choose_settings(corpus: Corpus, args: argparse.Namespace) -> Settings:
    """The corpus's rules with the user's changes; a flag that would be ignored is refused."""
    changes = {}
    for name in ("min_chars", "max_words", "limit"):
        value = vars(args)[name]
        if value is None:
            continue
        if value < 1:
            raise PrepareError(f"--{name} {value}: must be at least 1")
        if name != "limit" and vars(corpus.defaults)[name] is None:
            raise PrepareError(f"--{name} does nothing for {corpus.name}; leave it out")
        changes[name] = value
    if args.valid_fraction is not None:
        if not 0 < args.valid_fraction < 1:
            raise PrepareError(f"--valid_fraction {args.valid_fraction}: must lie between 0 and 1")
        changes["valid_fraction"] = args.valid_fraction
    settings = replace(corpus.defaults, **changes)
    if settings.min_words is not None and settings.max_words < settings.min_words:
        raise PrepareError(f"--max_words: {corpus.name} keeps answers from {settings.min_words} on")
    return settings


def locate(corpus: Corpus, source: str | None, revision: str | None) -> tuple[list[Path], dict]:
    """The files to read, and what the record says of their origin."""
    if source is None:
        folder = hub_folder(corpus, revision)
        origin = {"hub": corpus.hub, "revision": folder.name}
    elif revision is not None:
        raise PrepareError("--revision belongs to the hub; leave it out together with --source")
    else:
        folder = Path(source)
        origin = {"path": folder.resolve().name}
    files = source_files(corpus, folder)
    return files, {**origin, "files": len(files), "sha256": source_sha256(folder, files)}


def report(record: dict, output_dir: Path) -> str:
    counts = record["counts"]
    dropped = "".join(f", {name} {count:,}" for name, count in counts["dropped"].items())
    lines = [
        f"{record['corpus']}: read {counts['read']:,}, kept {counts['kept']:,}"
        f" (train {counts['train']:,}, valid {counts['valid']:,}); dropped:{dropped[1:] or ' none'}"
    ]
    if counts["valid"] == 0:
        lines.append("note: the held-out part is empty; raise --valid_fraction")
    if "-NC-" in record["license"]:
        lines.append(f"note: {record['license']}: for research only, no commercial use")
    lines += [
        f"wrote {output_dir / name}" for name in (*record["outputs"], record["corpus"] + ".json")
    ]
    return "\n".join(lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("corpus", nargs="?", help="one of the names that --list prints")
    parser.add_argument("--list", action="store_true", help="print the corpora and stop")
    parser.add_argument("--source", help="raw file or folder to read instead of the hub")
    parser.add_argument("--revision", help="branch, tag or commit of the hub's repository")
    parser.add_argument(
        "--output_dir", type=Path, default=DATA_DIR, help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--valid_fraction",
        type=float,
        help="share of titles, questions or diseases held out (0.01; dolly, alpaca, medquad 0.03)",
    )
    parser.add_argument(
        "--min_chars", type=int, help="drop shorter texts (simplewiki 500, tinystories 1)"
    )
    parser.add_argument(
        "--max_words",
        type=int,
        help="drop longer answers (dolly, alpaca 80; medquad 200, from 3 words on)",
    )
    parser.add_argument("--limit", type=int, help="stop once so many examples are kept")
    args = parser.parse_args(argv)
    if not args.list:
        check_writable(args.output_dir, "--output_dir")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print(listing())
        return 0
    corpus = find_corpus(args.corpus)
    settings = choose_settings(corpus, args)
    files, origin = locate(corpus, args.source, args.revision)
    record = write_corpus(corpus, files, origin, args.output_dir, settings)
    print(shown(report(record, args.output_dir)))
    return 0


if __name__ == "__main__":
    run_script(main)
