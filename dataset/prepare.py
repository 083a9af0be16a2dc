"""Turn a public corpus into MiniMind JSONL: two parts, and a record of where they came from.

    python dataset/prepare.py --list
    python dataset/prepare.py simplewiki
    python dataset/prepare.py tinystories --source TinyStoriesV2-GPT4-train.txt --limit 100000
    git clone https://github.com/abachaa/MedQuAD dataset/data/MedQuAD
    python dataset/prepare.py medquad --source dataset/data/MedQuAD

Without `--source` the files come from the Hugging Face hub (and stay in its cache); with it, from a
file or folder in the corpus's own format. `NAME.jsonl.gz`, `NAME_valid.jsonl.gz` (held out) and
`NAME.json` (source, license, settings, counts, hashes) are written.

What is held out is decided by a hash of the title, the question or the disease alone, so a text
stays on its side when the order changes or when a newer dump has more of them.
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import datasets
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import UNREAD_FIELDS
from model.files import UserError, file_sha256, replace_file, run_script, write_json

DATA_DIR = Path(__file__).resolve().parent / "data"
STORY_END = "<|endoftext|>"
BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".gz": "json"}

# ---- converting: a record becomes (what is held out together, the line to write, what may not
# ---- occur twice), or the reason why it is dropped

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
    """Convert an instruction, one without an input, to a question and an answer."""
    for name in ("context", "input"):
        if (record.get(name) or "").strip():
            return f"has_{name}"
    answer = record["response"] if "response" in record else record["output"]
    return convert_question(record["instruction"], answer, rules)


def convert_question(question: str | None, answer: str | None, rules: dict) -> Example | str:
    """Convert a question and its answer, unless one is empty or the answer too short or long."""
    question, answer = (question or "").strip(), (answer or "").strip()
    words = len(answer.split())
    if not question or not answer:
        return "empty_answer" if question else "empty_question"
    if words < (rules["min_words"] or 0):
        return "answer_too_short"
    if words > rules["max_words"]:
        return "answer_too_long"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return question, {"conversations": turns}, {"question": normalize(question)}


def convert_medquad(record: dict, rules: dict) -> Example | str:
    """Convert a question on a disease; the layout of web pages is taken out of the answer."""
    disease, question = join_spaces(record["focus"]), join_spaces(record["question"])
    answer = "\n".join(filter(None, map(join_spaces, record["answer"].splitlines())))
    example = convert_question(re.sub(r" +\?", "?", question), answer, rules)
    if not disease or isinstance(example, str):
        return example if disease else "no_disease"
    return disease, example[1], example[2] | {"answer": normalize(answer)}


def convert_minimind(record: dict, rules: dict) -> Example | str:
    """Keep a record of MiniMind's own to the letter, if training can read it."""
    if "text" in record:
        text = record["text"] or ""
        return (text, {"text": text}, {}) if text.strip() else "empty_text"
    turns = record["conversations"] or []
    # The chat template has no tools; MiniMind's newer files mix such conversations in.
    if any(t["role"] == "tool" or t.get("tools") or t.get("tool_calls") for t in turns):
        return "tool_use"
    if any(turn.get(name) for turn in turns for name in UNREAD_FIELDS):
        return "unread_field"
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    spoken = turns[1:] if turns and turns[0]["role"] == "system" else turns
    if not spoken or [t["role"] for t in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        return "roles_out_of_order"
    if not all(turn["content"].strip() for turn in spoken):
        return "empty_turn"
    # An empty system turn says nothing, and training refuses empty turns.
    kept = [turn for turn in turns if turn["content"].strip()]
    return spoken[0]["content"], {"conversations": kept}, {}


# ---- the corpora


@dataclass(frozen=True)
class Corpus:
    """A public corpus. `files` are glob patterns, tried in order; the first is the hub's layout."""

    home: str
    files: tuple[str, ...]
    license: str
    credit: str
    convert: Callable[[dict, dict], Example | str]
    rules: dict
    revision: str = "main"


HUB = "https://huggingface.co/datasets/"
INSTRUCTIONS = {"valid_fraction": 0.03, "max_words": 80}
MINIMIND = {
    "home": f"{HUB}jingyaogong/minimind_dataset",
    "license": "Apache-2.0 AND CC-BY-NC-2.0",
    "credit": "MiniMind dataset, Jingyao Gong and the sources that its card names",
    "convert": convert_minimind,
    "rules": {"valid_fraction": 0.01},
}
# The main branch has since replaced pretrain_hq and sft_mini_512; this revision lists them.
MINIMIND_OLD = MINIMIND | {"revision": "9f9f5d75020d4e36f9af87d303a3690ceba6d5c6"}
CORPORA = {
    "simplewiki": Corpus(
        f"{HUB}wikimedia/wikipedia",
        ("20231101.simple/*.parquet", "*.parquet"),
        "CC-BY-SA-3.0",
        "Simple English Wikipedia contributors, dump of 2023-11-01 (also under GFDL)",
        convert_text,
        {"valid_fraction": 0.01, "min_chars": 500},
    ),
    "tinystories": Corpus(
        f"{HUB}roneneldan/TinyStories",
        ("data/train-*.parquet", "train-*.parquet", "TinyStoriesV2-GPT4-train.txt"),
        "CDLA-Sharing-1.0",
        "Eldan & Li, TinyStories, arXiv:2305.07759, 2023",
        convert_text,
        {"valid_fraction": 0.01, "min_chars": 1},
    ),
    "dolly": Corpus(
        f"{HUB}databricks/databricks-dolly-15k",
        ("databricks-dolly-15k.jsonl",),
        "CC-BY-SA-3.0",
        "databricks-dolly-15k, (c) 2023 Databricks, Inc.",
        convert_instruction,
        INSTRUCTIONS,
    ),
    "alpaca": Corpus(
        f"{HUB}tatsu-lab/alpaca",
        ("data/train-*.parquet", "train-*.parquet", "alpaca_data.json"),
        "CC-BY-NC-4.0",
        "Taori et al., Stanford Alpaca, 2023; written by OpenAI's text-davinci-003",
        convert_instruction,
        INSTRUCTIONS,
    ),
    "medquad": Corpus(
        "https://github.com/abachaa/MedQuAD",
        ("**/*.xml",),
        "CC-BY-4.0",
        "Ben Abacha & Demner-Fushman, BMC Bioinformatics 20:511, 2019",
        convert_medquad,
        {"valid_fraction": 0.03, "min_words": 3, "max_words": 200},
    ),
    "minimind-pretrain": Corpus(files=("pretrain_hq.jsonl",), **MINIMIND_OLD),
    "minimind-sft": Corpus(files=("sft_mini_512.jsonl",), **MINIMIND_OLD),
    "minimind-medical": Corpus(files=("lora_medical.jsonl",), **MINIMIND),
}


# ---- reading


def read_stories(path: Path) -> Iterator[dict]:
    """Yield TinyStories' raw text by story: several lines, closed by <|endoftext|>."""
    story = ""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            *finished, rest = line.split(STORY_END)
            for part in finished:
                yield {"text": story + part}
                story = ""
            story += rest
    if story.strip():
        yield {"text": story}


def read_medquad(path: Path) -> Iterator[dict]:
    """Yield the questions and answers of one document, i.e. of one disease."""
    xml = path.read_text(encoding="utf-8-sig")
    if "<!DOCTYPE" in xml:  # the standard library expands entities without bound
        raise UserError(f"{path}: has a DOCTYPE, which no MedQuAD file has; remove the file")
    document = ElementTree.fromstring(xml)
    for pair in document.iterfind("QAPairs/QAPair"):
        parts = [document.find("Focus"), pair.find("Question"), pair.find("Answer")]
        texts = ["" if part is None else "".join(part.itertext()) for part in parts]
        yield dict(zip(("focus", "question", "answer"), texts, strict=True))


def load_hub(corpus: Corpus, revision: str | None) -> tuple[Iterable[dict], dict]:
    """Return a corpus's records from the hub, and their origin."""
    if not corpus.home.startswith(HUB):
        raise UserError(f"not on the hub: git clone {corpus.home}, give it as --source")
    name = corpus.home.removeprefix(HUB)
    place = {"data_files": corpus.files[0], "revision": revision or corpus.revision}
    builder = datasets.load_dataset_builder(name, **place)
    files = builder.config.data_files["train"]  # hf://datasets/owner/name@commit/file
    origin = {"hub": name, "revision": files[0].partition("@")[2].partition("/")[0]}
    rows = datasets.load_dataset(name, split="train", **place)
    return rows, origin | {"files": len(files)}


def load_files(corpus: Corpus, source: Path) -> tuple[Iterable[dict], dict]:
    """Return a corpus's records from a file, or from what a folder holds, and their origin."""
    matches = [sorted(source.glob(p), key=lambda path: path.as_posix()) for p in corpus.files]
    files = [source] if source.is_file() else next(filter(None, matches), [])
    if not files:
        raise UserError(f"{source}: no {' or '.join(corpus.files)}; get it from {corpus.home}")
    lines = [f"{file_sha256(path)}  {path.relative_to(source).as_posix()}\n" for path in files]
    listing = hashlib.sha256("".join(lines).encode()).hexdigest()
    digest = file_sha256(source) if source.is_file() else listing  # of `sha256sum` for a folder
    origin = {"path": source.resolve().name, "files": len(files), "sha256": digest}
    readers, suffix = {".txt": read_stories, ".xml": read_medquad}, files[0].suffix
    if suffix in readers:
        return (record for path in files for record in readers[suffix](path)), origin
    if suffix not in BUILDERS:
        raise UserError(f"{source}: {suffix} files are not read; see {corpus.home}")
    paths = [str(path) for path in files]
    return datasets.load_dataset(BUILDERS[suffix], data_files=paths, split="train"), origin


# ---- writing


def hold_out(key: str, fraction: float) -> bool:
    """Whether all examples of this group belong to the held-out part.

    A larger fraction holds out a superset of what a smaller one does.
    """
    digest = hashlib.sha256(normalize(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def split_records(
    records: Iterable[dict], convert: Callable, rules: dict, counts: Counter
) -> Iterator[tuple[str, dict]]:
    """Yield the lines to write and their part, train or valid; count what is read and dropped."""
    seen = set()
    for record in tqdm(records, unit=" records", disable=None):
        if counts["train"] + counts["valid"] == rules["limit"]:
            return
        counts["read"] += 1
        example = convert(record, rules)
        # Digests, since two million stories would not fit in memory.
        once = {} if isinstance(example, str) else example[2]
        once = {name: hashlib.blake2b(f"{name}\n{t}".encode()).digest() for name, t in once.items()}
        repeated = [f"duplicate_{name}" for name, digest in once.items() if digest in seen]
        if isinstance(example, str) or repeated:
            counts[f"dropped.{example if isinstance(example, str) else repeated[0]}"] += 1
            continue
        seen.update(once.values())
        part = "valid" if hold_out(example[0], rules["valid_fraction"]) else "train"
        counts[part] += 1
        yield part, example[1]


def write_corpus(name: str, records: Iterable[dict], rules: dict, folder: Path) -> dict:
    """Write the two parts aside, then move them into place; return counts and hashes."""
    counts, corpus = Counter(), CORPORA[name]
    names = {"train": f"{name}.jsonl.gz", "valid": f"{name}_valid.jsonl.gz"}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=folder) as aside, ExitStack() as stack:
        # Without file name and time, so that the same text gives the same bytes.
        raw = {part: stack.enter_context((Path(aside) / names[part]).open("wb")) for part in names}
        files = {part: gzip.GzipFile("", "wb", 6, raw[part], mtime=0) for part in names}
        digests = {part: hashlib.sha256() for part in names}  # another zlib gives other bytes
        for part, data in split_records(records, corpus.convert, rules, counts):
            line = (json.dumps(data, ensure_ascii=False) + "\n").encode()
            files[part].write(line)
            digests[part].update(line)
        if not counts["train"]:
            raise UserError(f"{name}: nothing is left to train on ({dict(counts)})")
        for part, file in files.items():
            file.close()
            raw[part].close()
            replace_file(Path(aside) / names[part], folder / names[part])
    dropped = {key[8:]: n for key, n in sorted(counts.items()) if key.startswith("dropped.")}
    sums = {"read": counts["read"], "kept": counts["train"] + counts["valid"]}
    sums |= {"train": counts["train"], "valid": counts["valid"], "dropped": dropped}
    outputs = {
        names[part]: {
            "examples": counts[part],
            "sha256": file_sha256(folder / names[part]),
            "content_sha256": digests[part].hexdigest(),
        }
        for part in names
    }
    return {"settings": rules, "counts": sums, "outputs": outputs}


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, write the corpus and its record, and say what was kept."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s CORPUS [flags]; --help explains them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("corpus", nargs="?", choices=CORPORA, help="one of the names that --list prints")
    add("--list", action="store_true", help="print the corpora and stop")
    add("--source", type=Path, help="raw file or folder to read instead of the hub")
    add("--revision", help="branch, tag or commit of the hub's repository")
    add("--output_dir", type=Path, default=DATA_DIR, help="folder to write to (dataset/data/)")
    add("--valid_fraction", type=float, help="share of titles, questions or diseases held out")
    add("--min_chars", type=int, help="drop shorter texts (simplewiki 500, tinystories 1)")
    add("--max_words", type=int, help="drop longer answers (dolly, alpaca 80; medquad 200)")
    add("--limit", type=int, help="stop once so many examples are kept")
    args = parser.parse_args(argv)
    if args.list or args.corpus is None:
        for name, corpus in CORPORA.items():
            print(f"{name}\n  {corpus.home}\n  {corpus.license}; {corpus.credit}")
        return 0
    name, corpus = args.corpus, CORPORA[args.corpus]
    rules = dict.fromkeys(("valid_fraction", "min_chars", "min_words", "max_words", "limit"))
    rules |= corpus.rules
    for flag in ("min_chars", "max_words"):
        if getattr(args, flag) is not None and rules[flag] is None:
            parser.error(f"--{flag} does nothing for {name}; leave it out")
    for flag in ("valid_fraction", "min_chars", "max_words", "limit"):
        rules[flag] = rules[flag] if getattr(args, flag) is None else getattr(args, flag)
    if not 0 < rules["valid_fraction"] < 1:
        parser.error("--valid_fraction: must lie between 0 and 1")
    if args.source is not None and args.revision is not None:
        parser.error("--revision belongs to the hub; leave it out together with --source")
    datasets.disable_progress_bars()
    try:
        load = (load_files, args.source) if args.source else (load_hub, args.revision)
        records, origin = load[0](corpus, load[1])
        result = write_corpus(name, records, rules, args.output_dir)
    except UserError:
        raise
    except (KeyError, TypeError, ElementTree.ParseError) as error:
        raise UserError(f"{args.source}: not a record of {name} ({error!r})") from error
    except (datasets.exceptions.DatasetsError, ConnectionError, ValueError) as error:
        raise UserError(f"{name}: {error}; see {corpus.home}") from error
    about = {"corpus": name, "home": corpus.home, "source": origin, "license": corpus.license}
    record = about | {"attribution": corpus.credit} | result
    write_json(args.output_dir / f"{name}.json", record)
    print(json.dumps(record["counts"]))
    if "-NC-" in corpus.license:
        print(f"note: {corpus.license}: for research only, no commercial use")
    return 0


if __name__ == "__main__":
    run_script(main)
