"""Turn a public corpus into MiniMind JSONL: two parts, and a record of where they came from.

    python dataset/prepare.py simplewiki
    git clone https://github.com/abachaa/MedQuAD dataset/data/MedQuAD
    python dataset/prepare.py medquad --source dataset/data/MedQuAD

Reads the Hugging Face hub, or the corpus's own files with --source. Writes `NAME.jsonl.gz`,
`NAME_valid.jsonl.gz` (held out) and `NAME.json` (source, license, settings, counts, hashes). A hash
of the title, the question or the disease alone decides what is held out, so a text stays on its
side when the order changes or when a newer dump adds texts.
"""

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

from dataset.lm_dataset import record_messages
from model.cli import UserError, make_parser, run_script
from model.files import file_sha256, write_aside, write_json

CORPORA = tomllib.loads(Path(__file__).with_name("corpora.toml").read_text(encoding="utf-8"))
HUB = "https://huggingface.co/datasets/"
BUILDERS = {".parquet": "parquet", ".xml": "text"}  # of the datasets library; else JSON
RULES = {"valid_fraction": float, "min_chars": int, "min_words": int, "max_words": int}
RULES |= {"limit": int}


def join_spaces(text: str | None) -> str:
    """Put a text on one line, with single spaces."""
    return " ".join((text or "").split())


def normalize(text: str) -> str:
    """Return what counts as the same title, question or answer: no case, no spacing."""
    return join_spaces(text).casefold()


def convert_text(record: dict, rules: dict) -> dict:
    """Convert a story, or an article with its title on a line of its own."""
    text, title = (record["text"] or "").strip(), join_spaces(record.get("title"))
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
    question, answer = (question or "").strip(), (answer or "").strip()
    if not question or not answer:
        return {"drop": "empty_answer" if question else "empty_question"}
    if not rules.get("min_words", 0) <= (words := len(answer.split())) <= rules["max_words"]:
        return {"drop": f"answer_too_{'long' if words > rules['max_words'] else 'short'}"}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    once = {"question": normalize(question)}
    return {"group": question, "data": {"conversations": turns}, "once": once}


def convert_medquad(record: dict, rules: dict) -> dict:
    """Convert a question on a disease; the layout of web pages is taken out of the answer."""
    disease, question = join_spaces(record["focus"]), join_spaces(record["question"])
    answer = "\n".join(filter(None, map(join_spaces, record["answer"].splitlines())))
    example = convert_question(question.replace(" ?", "?"), answer, rules)
    if not disease or "drop" in example:
        return example if disease else {"drop": "no_disease"}
    return example | {"group": disease, "once": example["once"] | {"answer": normalize(answer)}}


def convert_minimind(record: dict, rules: dict) -> dict:
    """Keep a record of MiniMind's own to the letter, if training can read it."""
    if "text" in record:
        text = record["text"] or ""
        return {"group": text, "data": {"text": text}} if text.strip() else {"drop": "empty_text"}
    # An empty system turn says nothing, and training refuses empty turns.
    turns = [turn | {"content": turn["content"] or ""} for turn in record["conversations"] or []]
    turns = [t for t in turns if t["role"] != "system" or t["content"].strip() or t.get("tools")]
    try:
        record_messages({"conversations": turns}, "")
    except UserError:
        return {"drop": "unreadable"}  # tools, thoughts, empty turns, roles out of order
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return {"group": turns[len(turns) % 2]["content"], "data": {"conversations": turns}}


# Each returns a `group` to hold out whole, `data` to write, texts to keep `once`; or why to `drop`.
CONVERTERS = {"text": convert_text, "instruction": convert_instruction}
CONVERTERS |= {"medquad": convert_medquad, "minimind": convert_minimind}


def expand_medquad(documents: Iterable[dict]) -> Iterator[dict]:
    """Yield the questions and answers of documents, one a disease."""
    for document in (ElementTree.fromstring(one["text"]) for one in documents):
        for pair in document.iterfind("QAPairs/QAPair"):
            parts = [document.find("Focus"), pair.find("Question"), pair.find("Answer")]
            texts = ["" if part is None else "".join(part.itertext()) for part in parts]
            yield dict(zip(("focus", "question", "answer"), texts, strict=True))


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
    matches = [sorted(source.glob(p), key=lambda path: path.as_posix()) for p in corpus["files"]]
    files = [source] if source.is_file() else next(filter(None, matches), [])
    if not files:
        raise UserError(f"{source}: no {' or '.join(corpus['files'])}; see {corpus['home']}")
    builder = BUILDERS.get(files[0].suffix, "json")
    lines = [f"{file_sha256(path)}  {path.relative_to(source).as_posix()}\n" for path in files]
    listing = hashlib.sha256("".join(lines).encode()).hexdigest()  # as of `sha256sum`
    sha256 = file_sha256(source) if source.is_file() else listing
    how = {"sample_by": "document"} if builder == "text" else {}
    rows = datasets.load_dataset(builder, data_files=[*map(str, files)], split="train", **how)
    return rows, {"path": source.resolve().name, "files": len(files), "sha256": sha256}


def hold_out(key: str, fraction: float) -> bool:
    """Decide whether a group is held out; a larger fraction holds out the same and more."""
    digest = hashlib.sha256(normalize(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def keep_example(example: dict, seen: set[bytes], counts: Counter) -> bool:
    """Drop an example for its reason, or for a text seen before; count what is read."""
    reasons, digests = [example["drop"]] if "drop" in example else [], []
    for name, text in example.get("once", {}).items():
        digests.append(hashlib.blake2b(f"{name}\n{text}".encode(), digest_size=16).digest())
        reasons += [f"duplicate_{name}"] if digests[-1] in seen else []
    counts.update(["read", *reasons[:1]])
    seen.update([] if reasons else digests)
    return not reasons


def write_corpus(name: str, rows: datasets.Dataset, rules: dict, folder: Path) -> dict:
    """Write the two parts, whole or not at all; return settings, counts and hashes."""
    counts, convert = Counter(train=0, valid=0), CONVERTERS[CORPORA[name]["kind"]]
    paths = {"train": folder / f"{name}.jsonl.gz", "valid": folder / f"{name}_valid.jsonl.gz"}
    digests = {part: hashlib.sha256() for part in paths}  # of the text: zlibs differ in their bytes

    def write(examples: Iterable[dict], train: Path, valid: Path) -> None:
        pack = partial(gzip.GzipFile, "", "wb", 6, mtime=0)  # no name, no time: same bytes
        with train.open("wb") as a, pack(a) as text_a, valid.open("wb") as b, pack(b) as text_b:
            files = {"train": text_a, "valid": text_b}
            examples = islice(examples, rules.get("limit"))
            for example in tqdm(examples, unit=" examples kept", disable=None):
                part = "valid" if hold_out(example["group"], rules["valid_fraction"]) else "train"
                line = (json.dumps(example["data"], ensure_ascii=False) + "\n").encode()
                counts[part] += 1
                digests[part].update(line)
                files[part].write(line)
        if not counts["train"]:
            raise UserError(f"{name}: no record to train on ({dict(counts)})")

    folder.mkdir(parents=True, exist_ok=True)
    records = expand_medquad(rows) if rows.builder_name == "text" else rows
    examples = (convert(record, rules) for record in records)
    kept = filter(partial(keep_example, seen=set(), counts=counts), examples)
    write_aside(paths["train"], lambda a: write_aside(paths["valid"], partial(write, kept, a)))
    outputs = {paths[part].name: {"content_sha256": digests[part].hexdigest()} for part in paths}
    return {"settings": rules, "counts": dict(counts), "outputs": outputs}


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
        for name, corpus in CORPORA.items():
            print(f"{name}\n  {corpus['home']}\n  {corpus['license']}; {corpus['credit']}")
        return
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be above 0")
    name, corpus = args.corpus, CORPORA[args.corpus]
    given = {rule: vars(args)[rule] for rule in RULES if vars(args)[rule] is not None}
    if idle := given.keys() - corpus["rules"].keys() - {"limit"}:
        parser.error(f"--{min(idle)} does nothing for {name}; leave it out")
    rules = corpus["rules"] | given
    datasets.disable_progress_bars()
    try:
        raw = load_files(corpus, args.source) if args.source else load_hub(corpus)
        result = write_corpus(name, raw[0], rules, args.output_dir)
    except (KeyError, TypeError, ElementTree.ParseError) as error:
        origin = args.source or corpus["home"]
        raise UserError(f"{origin}: not a record of {name} ({error!r})") from error
    except (datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise UserError(f"{name}: {error.__cause__ or error}; see {corpus['home']}") from error
    about = {"corpus": name, "home": corpus["home"], "source": raw[1]}
    about |= {"license": corpus["license"], "attribution": corpus["credit"]}
    write_json(args.output_dir / f"{name}.json", about | result)
    print(json.dumps(result["counts"]))
    if "-NC-" in corpus["license"]:
        print(f"note: {corpus['license']}: for research only, no commercial use")


if __name__ == "__main__":
    run_script(main)
