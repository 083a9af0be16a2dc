"""Turn a public corpus into MiniMind JSONL: two parts, and a record of where they came from.

    python dataset/prepare.py simplewiki
    git clone https://github.com/abachaa/MedQuAD dataset/data/MedQuAD
    python dataset/prepare.py medquad --source dataset/data/MedQuAD

Reads the Hugging Face hub, or the corpus's own files with --source. Writes `NAME.jsonl.gz`,
`NAME_valid.jsonl.gz` (held out) and `NAME.json` (source, license, settings, counts, hashes). A hash
of the title, the question or the disease alone decides what is held out, so a text stays on its
side when the order changes or when a newer dump adds texts.
"""

import argparse
import gzip
import hashlib
import io
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import datasets
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import record_messages
from model.files import REPO_DIR, UserError, file_sha256, run_script, write_bytes, write_json

CORPORA = tomllib.loads(Path(__file__).with_name("corpora.toml").read_text(encoding="utf-8"))
HUB = "https://huggingface.co/datasets/"
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json", ".xml": "text"}
RULES = {"valid_fraction": float, "min_chars": int, "max_words": int, "limit": int}

# A record's group, which is held out as a whole, its line to write, and texts that stand once only.
Example = tuple[str, dict, dict[str, str]]


def join_spaces(text: str | None) -> str:
    """Put a text on one line, with single spaces."""
    return " ".join((text or "").split())


def normalize(text: str) -> str:
    """Return what counts as the same title, question or answer: no case, no spacing."""
    return join_spaces(text).casefold()


def convert_text(record: dict, rules: dict) -> Example | str:
    """Convert a story, or an article with its title on a line of its own."""
    text, title = (record["text"] or "").strip(), join_spaces(record.get("title"))
    if len(text) < rules["min_chars"]:
        return "too_short"
    return title or text, {"text": f"{title}\n{text}" if title else text}, {"text": text}


def convert_instruction(record: dict, rules: dict) -> Example | str:
    """Convert an instruction without an input to a question and an answer."""
    for name in ("context", "input"):
        if (record.get(name) or "").strip():
            return f"has_{name}"
    answer = record["response"] if "response" in record else record["output"]
    return convert_question(record["instruction"], answer, rules)


def convert_question(question: str | None, answer: str | None, rules: dict) -> Example | str:
    """Convert a question and its answer, unless one is empty or the answer too short or long."""
    question, answer = (question or "").strip(), (answer or "").strip()
    if not question or not answer:
        return "empty_answer" if question else "empty_question"
    if not rules.get("min_words", 0) <= (words := len(answer.split())) <= rules["max_words"]:
        return "answer_too_long" if words > rules["max_words"] else "answer_too_short"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return question, {"conversations": turns}, {"question": normalize(question)}


def convert_medquad(record: dict, rules: dict) -> Example | str:
    """Convert a question on a disease; the layout of web pages is taken out of the answer."""
    disease, question = join_spaces(record["focus"]), join_spaces(record["question"])
    answer = "\n".join(filter(None, map(join_spaces, record["answer"].splitlines())))
    example = convert_question(question.replace(" ?", "?"), answer, rules)
    if not disease or isinstance(example, str):
        return example if disease else "no_disease"
    return disease, example[1], example[2] | {"answer": normalize(answer)}


def convert_minimind(record: dict, rules: dict) -> Example | str:
    """Keep a record of MiniMind's own to the letter, if training can read it."""
    if "text" in record:
        text = record["text"] or ""
        return (text, {"text": text}, {}) if text.strip() else "empty_text"
    # An empty system turn says nothing, and training refuses empty turns.
    turns = record["conversations"] or []
    turns = [t for t in turns if t["role"] != "system" or t["content"].strip() or t.get("tools")]
    try:
        record_messages({"conversations": turns}, "")
    except UserError:
        return "unreadable"  # tools, thoughts, empty turns, roles out of order
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return turns[len(turns) % 2]["content"], {"conversations": turns}, {}


CONVERTERS = {"text": convert_text, "instruction": convert_instruction}
CONVERTERS |= {"medquad": convert_medquad, "minimind": convert_minimind}


def read_medquad(xml: str) -> Iterator[dict]:
    """Yield the questions and answers of one document, i.e. of one disease."""
    document = ElementTree.fromstring(xml)
    for pair in document.iterfind("QAPairs/QAPair"):
        parts = [document.find("Focus"), pair.find("Question"), pair.find("Answer")]
        texts = ["" if part is None else "".join(part.itertext()) for part in parts]
        yield dict(zip(("focus", "question", "answer"), texts, strict=True))


def load_hub(corpus: dict, revision: str | None) -> tuple[Iterable[dict], dict]:
    """Return a corpus's records from the hub, and their origin."""
    if not corpus["home"].startswith(HUB):
        raise UserError(f"not on the hub: git clone {corpus['home']}, give it as --source")
    name, revision = corpus["home"].removeprefix(HUB), revision or corpus.get("revision", "main")
    place = {"data_files": corpus["files"][0], "revision": revision}
    files = datasets.load_dataset_builder(name, **place).config.data_files["train"]
    commit = files[0].partition("@")[2].partition("/")[0]  # hf://datasets/owner/name@commit/file
    rows = datasets.load_dataset(name, split="train", **place)
    return rows, {"hub": name, "revision": commit, "files": len(files)}


def load_files(corpus: dict, source: Path) -> tuple[Iterable[dict], dict]:
    """Return a corpus's records from a file, or from what a folder holds, and their origin."""
    matches = [sorted(source.glob(p), key=lambda path: path.as_posix()) for p in corpus["files"]]
    files = [source] if source.is_file() else next(filter(None, matches), [])
    if not files:
        raise UserError(f"{source}: no {' or '.join(corpus['files'])}; see {corpus['home']}")
    if (builder := BUILDERS.get(files[0].suffix)) is None:
        raise UserError(f"{source}: {files[0].suffix} files are not read; see {corpus['home']}")
    lines = [f"{file_sha256(path)}  {path.relative_to(source).as_posix()}\n" for path in files]
    listing = hashlib.sha256("".join(lines).encode()).hexdigest()  # as of `sha256sum`
    sha256 = file_sha256(source) if source.is_file() else listing
    how = {"sample_by": "document"} if builder == "text" else {}
    rows = datasets.load_dataset(builder, data_files=[*map(str, files)], split="train", **how)
    if builder == "text":
        rows = (record for row in rows for record in read_medquad(row["text"]))
    return rows, {"path": source.resolve().name, "files": len(files), "sha256": sha256}


def hold_out(key: str, fraction: float) -> bool:
    """Decide whether a group is held out; a larger fraction holds out the same and more."""
    digest = hashlib.sha256(normalize(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def split_records(kind: str, records: Iterable, rules: dict, counts: Counter) -> Iterator[tuple]:
    """Yield the lines to write and their part, train or valid; count what is read and dropped."""
    seen = set()  # digests, since two million stories would not fit in memory
    for record in tqdm(records, unit=" records", disable=None):
        if counts["train"] + counts["valid"] == rules.get("limit"):
            return
        counts["read"] += 1
        example = CONVERTERS[kind](record, rules)
        once = {} if isinstance(example, str) else example[2]
        digests = {n: hashlib.blake2b(f"{n}\n{t}".encode()).digest() for n, t in once.items()}
        repeated = [f"duplicate_{name}" for name, digest in digests.items() if digest in seen]
        if isinstance(example, str) or repeated:
            counts[repeated[0] if repeated else example] += 1
            continue
        seen.update(digests.values())
        part = "valid" if hold_out(example[0], rules["valid_fraction"]) else "train"
        counts[part] += 1
        yield part, example[1]


def write_corpus(name: str, records: Iterable[dict], rules: dict, folder: Path) -> dict:
    """Write the two parts once all is read; return settings, counts and hashes."""
    kind, counts = CORPORA[name]["kind"], Counter(train=0, valid=0)
    names = {"train": f"{name}.jsonl.gz", "valid": f"{name}_valid.jsonl.gz"}
    # Packed in memory, without file name and time: the same text gives the same bytes.
    packed = {part: io.BytesIO() for part in names}
    files = {part: gzip.GzipFile("", "wb", 6, packed[part], mtime=0) for part in names}
    digests = {part: hashlib.sha256() for part in names}  # of the text: zlibs differ in their bytes
    for part, data in split_records(kind, records, rules, counts):
        line = (json.dumps(data, ensure_ascii=False) + "\n").encode()
        files[part].write(line)
        digests[part].update(line)
    if not counts["train"]:
        raise UserError(f"{name}: nothing is left to train on ({dict(counts)})")
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in names.items():
        files[part].close()
        write_bytes(folder / file, packed[part].getbuffer())
    outputs = {file: {"content_sha256": digests[p].hexdigest()} for p, file in names.items()}
    return {"settings": rules, "counts": dict(counts), "outputs": outputs}


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, write the corpus and its record, and say what was kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("corpus", nargs="?", choices=CORPORA, help="one of the names that --list prints")
    add("--list", action="store_true", help="print the corpora and stop")
    add("--output_dir", type=Path, default=REPO_DIR / "dataset/data", help="(dataset/data/)")
    for rule, kind in RULES.items():
        add(f"--{rule}", type=kind, help="instead of the corpus's rule in corpora.toml")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--source", type=Path, help="raw file or folder to read instead of the hub")
    add("--revision", help="branch, tag or commit of the hub's repository")
    args = parser.parse_args(argv)
    if args.list or args.corpus is None:
        for name, corpus in CORPORA.items():
            print(f"{name}\n  {corpus['home']}\n  {corpus['license']}; {corpus['credit']}")
        return 0
    name, corpus = args.corpus, CORPORA[args.corpus]
    given = {rule: vars(args)[rule] for rule in RULES if vars(args)[rule] is not None}
    if idle := given.keys() - corpus["rules"].keys() - {"limit"}:
        parser.error(f"--{min(idle)} does nothing for {name}; leave it out")
    rules = corpus["rules"] | given
    datasets.disable_progress_bars()
    try:
        raw = load_files(corpus, args.source) if args.source else load_hub(corpus, args.revision)
        result = write_corpus(name, raw[0], rules, args.output_dir)
    except (KeyError, TypeError, ElementTree.ParseError) as error:
        raise UserError(f"{args.source}: not a record of {name} ({error!r})") from error
    except (datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise UserError(f"{name}: {error.__cause__ or error}; see {corpus['home']}") from error
    about = {"corpus": name, "home": corpus["home"], "source": raw[1]}
    about |= {"license": corpus["license"], "attribution": corpus["credit"]}
    write_json(args.output_dir / f"{name}.json", about | result)
    print(json.dumps(result["counts"]))
    if "-NC-" in corpus["license"]:
        print(f"note: {corpus['license']}: for research only, no commercial use")
    return 0


if __name__ == "__main__":
    run_script(main)
