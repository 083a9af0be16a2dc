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
import contextlib
import gzip
import hashlib
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import datasets
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import record_messages, turns
from model.cli import UserError, make_parser, run_script
from model.files import file_sha256, write_aside, write_json

CORPORA = tomllib.loads(Path(__file__).with_name("corpora.toml").read_text(encoding="utf-8"))
HUB = "https://huggingface.co/datasets/"
BUILDERS = {".parquet": "parquet", ".xml": "text"}  # of the datasets library; else JSON
RULES = {  # flags that take the place of a corpus's rule
    "valid_fraction": float,
    "min_chars": int,
    "min_words": int,
    "max_words": int,
    "limit": int,
}


def join_spaces(text: str | None) -> str:
    """Put a text on one line, with single spaces."""
    return " ".join((text or "").split())


def normalize(text: str) -> str:
    """Return what counts as the same title, question or answer: no case, no spacing."""
    return join_spaces(text).casefold()


# Each converter returns a `group` to hold out whole, `data` to write, and texts to keep `once`; or
# why the record is to `drop`.


def convert_text(record: dict, rules: dict) -> dict:
    """Convert a story, or an article with its title on a line of its own."""
    text = (record["text"] or "").strip()
    title = join_spaces(record.get("title"))
    if len(text) < rules["min_chars"]:
        return {"drop": "too_short"}
    data = {"text": f"{title}\n{text}" if title else text}
    return {"group": title or text, "data": data, "once": {"text": text}}


def convert_instruction(record: dict, rules: dict) -> dict:
    """Convert an instruction without an input to a question and an answer."""
    for name in ("context", "input"):
        if (record.get(name) or "").strip():
            return {"drop": f"has_{name}"}
    answer = record["response"] if "response" in record else record["output"]
    return convert_question(record["instruction"], answer, rules)


def convert_question(question: str | None, answer: str | None, rules: dict) -> dict:
    """Convert a question and its answer, unless one is empty or the answer too short or long."""
    question = (question or "").strip()
    answer = (answer or "").strip()
    if not question:
        return {"drop": "empty_question"}
    if not answer:
        return {"drop": "empty_answer"}
    words = len(answer.split())
    if words > rules["max_words"]:
        return {"drop": "answer_too_long"}
    if words < rules.get("min_words", 0):
        return {"drop": "answer_too_short"}
    data = {"conversations": turns(question, answer)}
    return {"group": question, "data": data, "once": {"question": normalize(question)}}


def convert_medquad(record: dict, rules: dict) -> dict:
    """Convert a question on a disease; the layout of web pages is taken out of the answer."""
    disease = join_spaces(record["focus"])
    if not disease:
        return {"drop": "no_disease"}
    question = join_spaces(record["question"]).replace(" ?", "?")
    lines = [join_spaces(line) for line in record["answer"].splitlines()]
    answer = "\n".join(line for line in lines if line)
    example = convert_question(question, answer, rules)
    if "drop" not in example:
        example["group"] = disease
        example["once"]["answer"] = normalize(answer)
    return example


def convert_minimind(record: dict, rules: dict) -> dict:
    """Keep a record of MiniMind's own to the letter, if training can read it."""
    if "text" in record:
        text = record["text"] or ""
        if not text.strip():
            return {"drop": "empty_text"}
        return {"group": text, "data": {"text": text}}
    kept = []
    for turn in record["conversations"] or []:
        content = turn["content"] or ""
        # An empty system turn says nothing, and training refuses empty turns.
        if turn["role"] != "system" or content.strip() or turn.get("tools"):
            kept.append(turn | {"content": content})
    try:
        record_messages({"conversations": kept}, "")
    except UserError:
        return {"drop": "unreadable"}  # tools, thoughts, empty turns, roles out of order
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in kept]
    first_question = messages[len(messages) % 2]["content"]  # behind a system turn
    return {"group": first_question, "data": {"conversations": messages}}


CONVERTERS = {
    "text": convert_text,
    "instruction": convert_instruction,
    "medquad": convert_medquad,
    "minimind": convert_minimind,
}


def read_element(element: ElementTree.Element | None) -> str:
    """Return all text of an XML element, of a missing one none."""
    return "" if element is None else "".join(element.itertext())


def expand_medquad(documents: Iterable[dict]) -> Iterator[dict]:
    """Yield the questions and answers of documents, one a disease."""
    for record in documents:
        document = ElementTree.fromstring(record["text"])
        for pair in document.iterfind("QAPairs/QAPair"):
            yield {
                "focus": read_element(document.find("Focus")),
                "question": read_element(pair.find("Question")),
                "answer": read_element(pair.find("Answer")),
            }


def load_hub(corpus: dict) -> tuple[datasets.Dataset, dict]:
    """Return a corpus's records from the hub, and their origin."""
    if not corpus["home"].startswith(HUB):
        raise UserError(f"not on the hub: git clone {corpus['home']}, give it as --source")
    name = corpus["home"].removeprefix(HUB)
    place = {"data_files": corpus["files"][0], "revision": corpus.get("revision", "main")}
    files = datasets.load_dataset_builder(name, **place).config.data_files["train"]
    commit = files[0].partition("@")[2].partition("/")[0]  # hf://datasets/owner/name@commit/file
    rows = datasets.load_dataset(name, split="train", **place)
    return rows, {"hub": name, "revision": commit, "files": len(files)}


def load_files(corpus: dict, source: Path) -> tuple[datasets.Dataset, dict]:
    """Return a corpus's records from a file, or from what a folder holds, and their origin."""
    files = find_files(corpus, source)
    lines = [f"{file_sha256(path)}  {path.relative_to(source).as_posix()}\n" for path in files]
    sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()  # as of `sha256sum`
    if source.is_file():
        sha256 = file_sha256(source)
    builder = BUILDERS.get(files[0].suffix, "json")
    options = {"sample_by": "document"} if builder == "text" else {}
    names = [str(path) for path in files]
    rows = datasets.load_dataset(builder, data_files=names, split="train", **options)
    return rows, {"path": source.resolve().name, "files": len(files), "sha256": sha256}


def find_files(corpus: dict, source: Path) -> list[Path]:
    """Find a corpus's files in a folder by the first pattern that any has, in order of name."""
    if source.is_file():
        return [source]
    for pattern in corpus["files"]:
        files = sorted(source.glob(pattern), key=lambda path: path.as_posix())
        if files:
            return files
    raise UserError(f"{source}: no {' or '.join(corpus['files'])}; see {corpus['home']}")


def hold_out(key: str, fraction: float) -> bool:
    """Decide whether a group is held out; a larger fraction holds out the same and more."""
    digest = hashlib.sha256(normalize(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def keep_example(example: dict, seen: set[bytes], counts: Counter) -> bool:
    """Drop an example for its reason, or for a text seen before; count what is read."""
    counts["read"] += 1
    if "drop" in example:
        counts[example["drop"]] += 1
        return False
    digests = []
    for name, text in example.get("once", {}).items():
        digest = hashlib.blake2b(f"{name}\n{text}".encode(), digest_size=16).digest()
        if digest in seen:
            counts[f"duplicate_{name}"] += 1
            return False
        digests.append(digest)
    seen.update(digests)
    return True


def write_corpus(name: str, rows: datasets.Dataset, rules: dict, folder: Path) -> dict:
    """Write the two parts, each whole or not at all; return settings, counts and hashes."""
    counts = Counter(train=0, valid=0)
    digests = {"train": hashlib.sha256(), "valid": hashlib.sha256()}  # of the text: zlibs differ
    paths = {"train": folder / f"{name}.jsonl.gz", "valid": folder / f"{name}_valid.jsonl.gz"}
    convert = CONVERTERS[CORPORA[name]["kind"]]

    def list_examples() -> Iterator[dict]:
        records = expand_medquad(rows) if rows.builder_name == "text" else rows
        seen: set[bytes] = set()
        for record in records:
            example = convert(record, rules)
            if keep_example(example, seen, counts):
                yield example

    def write(train: Path, valid: Path) -> None:
        with pack(train) as train_file, pack(valid) as valid_file:
            files = {"train": train_file, "valid": valid_file}
            examples = islice(list_examples(), rules.get("limit"))
            for example in tqdm(examples, unit=" examples kept", disable=None):
                part = "valid" if hold_out(example["group"], rules["valid_fraction"]) else "train"
                line = (json.dumps(example["data"], ensure_ascii=False) + "\n").encode()
                counts[part] += 1
                digests[part].update(line)
                files[part].write(line)
        if not counts["train"]:
            raise UserError(f"{name}: no record to train on ({dict(counts)})")

    folder.mkdir(parents=True, exist_ok=True)
    write_aside(paths["train"], lambda train: write_aside(paths["valid"], partial(write, train)))
    outputs = {paths[part].name: {"content_sha256": digests[part].hexdigest()} for part in paths}
    return {"settings": rules, "counts": dict(counts), "outputs": outputs}


@contextlib.contextmanager
def pack(path: Path) -> Iterator[gzip.GzipFile]:
    """Open a gzip file to write, without name and time: the same text gives the same bytes."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        yield packed


def list_corpora() -> None:
    """Print the corpora with their sources and licenses."""
    for name, corpus in CORPORA.items():
        print(f"{name}\n  {corpus['home']}\n  {corpus['license']}; {corpus['credit']}")


def choose_rules(args: argparse.Namespace) -> dict:
    """Return a corpus's rules with those that flags give; refuse a flag that does nothing."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: must be above 0")
    rules = dict(CORPORA[args.corpus]["rules"])
    for rule in RULES:
        value = getattr(args, rule)
        if value is None:
            continue
        if rule not in rules and rule != "limit":
            raise UserError(f"--{rule} does nothing for {args.corpus}; leave it out")
        rules[rule] = value
    return rules


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, write the corpus and its record, and say what was kept."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("corpus", nargs="?", choices=CORPORA, help="one of the names that --list prints")
    add("--list", action="store_true", help="print the corpora and stop")
    add("--output_dir", type=Path, default=Path(__file__).with_name("data"), help="(dataset/data/)")
    for rule, kind in RULES.items():
        add(f"--{rule}", type=kind, help="instead of the corpus's rule in corpora.toml")
    add("--source", type=Path, help="raw file or folder to read instead of the hub")
    args = parser.parse_args(argv)
    if args.list or args.corpus is None:
        list_corpora()
        return
    name = args.corpus
    corpus = CORPORA[name]
    rules = choose_rules(args)
    datasets.disable_progress_bars()
    try:
        rows, source = load_files(corpus, args.source) if args.source else load_hub(corpus)
        result = write_corpus(name, rows, rules, args.output_dir)
    except (KeyError, TypeError, ElementTree.ParseError) as error:
        origin = args.source or corpus["home"]
        raise UserError(f"{origin}: not a record of {name} ({error!r})") from error
    except (datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise UserError(f"{name}: {error.__cause__ or error}; see {corpus['home']}") from error
    record = {
        "corpus": name,
        "home": corpus["home"],
        "source": source,
        "license": corpus["license"],
        "attribution": corpus["credit"],
        **result,
    }
    write_json(args.output_dir / f"{name}.json", record)
    print(json.dumps(result["counts"]))
    if "-NC-" in corpus["license"]:
        print(f"note: {corpus['license']}: for research only, no commercial use")


if __name__ == "__main__":
    run_script(main)
