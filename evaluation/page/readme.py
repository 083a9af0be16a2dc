"""Write model_outputs/README.md: what each folder of answers is, and answers side by side.

It tells of the folders that names.csv knows, and of no other: what you ask your own models lies
beside them and changes nothing. `python evaluation/page/build.py` writes it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from dataset.lm_dataset import read_jsonl
from evaluation.probe.markdown import escape_markdown, is_earlier, list_ways
from evaluation.probe.names import list_named_folders, name_way, read_names
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from model.files import read_json

SHOWN_PROMPTS = 5  # of a section
SHOWN_OTHERWISE = 3  # prompts, where a model was asked in several ways
LONGEST = 160  # characters of an answer
# Models side by side, of each size: a table can't hold more columns.
SHOWN_MODELS = [
    "base",
    "lora-original",
    "lora-original-long",
    "lora-all-layers-r8",
    "full-fine-tuning",
]
# Those whose other ways of being asked are shown, and the weights that adapters were put on.
ASKED_OTHERWISE = ["lora-original", "lora-all-layers-r8", "full-fine-tuning"]
OTHER_WEIGHTS = "full-fine-tuning"
INTRODUCTION = """\
# What the models say

This folder holds what small language models answered to the same prompts, word for word, before \
and after they were fine-tuned in several ways. Each folder is one model, asked in one way, and \
its name gives size, training and way: open its `samples.md` to read, or `samples.jsonl` to \
count. The models know a [small world](../../dataset/world) of true facts, so a program decides \
whether an answer is correct, and nobody chose which answers are shown.

In short, LoRA on all layers and full fine-tuning answer most prompts in trained forms. The \
original LoRA, as MiniMind's scripts have it, answers none of them after two or four epochs, but \
most of them at 25M after 13 epochs at ten times its rate. Asked without the chat template of \
their training all of them fail. Each folder is one run, so small differences mean nothing; the \
[report](../REPORT.md) says how sure the rest is.

To ask one yourself, type `make install` and then `.venv/bin/python eval_llm.py --interactive` in \
the root of the repository. Of these models `model/trained/` has all that are small, and \
`--model model/trained/NAME` chooses one.

Most of the [prompts](../qualitative_prompts.md) are harder than the 1,200 that the study counts, \
whose numbers stand in [its tables](../study/TABLES.md). `make page` puts all answers on one page \
that can be searched, `index.html` in this folder. `names.csv` tells which run of the study a \
folder shows.

The command at the head of a `samples.md` makes its answers again. If it names a model in \
`out/study/`, that model's weights are not in this repository and must be trained first, and its \
sampled answers were drawn in an older way, so only its greedy ones can be compared.

## Folders

The last two columns count correct greedy answers. *Trained forms* is the first section of the \
prompts, which uses the wording of training, and *all prompts* are those that have a check. A base \
that goes on and on can pass a check by chance, and the rows of the bases show how often. An \
answer that is not correct is *blank*, repeats itself (*loop*), never ends (*endless*), names \
*another thing*, or has a *wrong fact* or a *wrong form*.
"""
STARRED = """\
Folders with a star were asked with an earlier prompt file, whose prompts were all in free \
wording. They can be asked the new prompts only when their models have been trained again."""
EASY_ANSWERS = """\
The study keeps these answers [apart](../study/answers), and only for some of the models."""
SIDE_BY_SIDE = f"""\
Greedy answers to the first {SHOWN_PROMPTS} prompts of each section, easy sections first. A ✓ \
marks what the check finds correct."""
OTHERWISE = """\
### The same models, asked in other ways

Training always uses the chat template. MiniMind's scripts leave it out when they ask a LoRA of \
the pretrained model, and by default they put a LoRA on the fine-tuned weights."""

PromptKey = tuple[str, str]  # its id and its words


@dataclass
class Saved:
    """A folder of answers."""

    name: str
    description: str
    is_earlier: bool  # asked with an earlier prompt file
    answers: dict[PromptKey, dict]  # the greedy sample of each prompt
    easy_answers: dict[PromptKey, dict]  # to our prompts that the study asked apart

    @property
    def link(self) -> str:
        """Link the folder's samples.md."""
        return f"[{self.name}]({self.name}/samples.md)"

    def count_correct(self) -> str:
        """Count the correct answers among those that a check decides."""
        return count_correct(self.answers.values())

    def count_easy(self) -> str:
        """Count the correct answers to prompts in trained forms, the first section."""
        first = read_prompts(PROMPTS_FILE, limit=1)[0].section
        samples = [sample for sample in self.answers.values() if sample["section"] == first]
        return count_correct(samples or self.easy_answers.values())


def count_correct(samples: Iterable[dict]) -> str:
    """Count the correct answers among those that a check decides; a dash if there are none."""
    outcomes = [sample["outcome"] for sample in samples]
    checked = [outcome for outcome in outcomes if outcome]
    return f"{checked.count('correct')} of {len(checked)}" if checked else "-"


def read_saved(root: Path, folder: Path, row: pd.Series, names: pd.DataFrame) -> Saved:
    """Read a folder of answers; `row` is its model's row of names.csv."""
    samples = [sample for _, sample in read_jsonl(folder / "samples.jsonl")]
    provenance = read_json(folder / "results.json")["provenance"]
    ways = list_ways(provenance, names)
    return Saved(
        name=folder.name,
        description=f"The same model, {', '.join(ways)}." if ways else row["description"],
        is_earlier=is_earlier(samples, provenance),
        answers=select_greedy(samples),
        easy_answers={} if ways else read_easy_answers(root, run=row.name),
    )


def read_easy_answers(root: Path, run: str) -> dict[PromptKey, dict]:
    """Read a run's answers to those of our prompts that the study asked apart."""
    folder = root / "evaluation" / "study" / "answers" / f"{run}-probe_combinations_tune"
    if not folder.is_dir():
        return {}
    ours = {prompt.text: prompt for prompt in read_prompts(PROMPTS_FILE)}
    samples = []
    for _, sample in read_jsonl(folder / "samples.jsonl"):
        if prompt := ours.get(sample["prompt"]):
            samples.append(sample | {"id": prompt.id, "section": prompt.section})
    return select_greedy(samples)


def select_greedy(samples: list[dict]) -> dict[PromptKey, dict]:
    """Select the greedy answers, by their prompts."""
    answers = {}
    for sample in samples:
        if sample["decoding"] == "greedy":
            answers[read_key(sample)] = sample
    return answers


def read_key(sample: dict) -> PromptKey:
    """Return what tells a sample's prompt from others."""
    return sample["id"], sample["prompt"]


def make_outputs_readme(root: Path) -> str:
    """Return the text of evaluation/model_outputs/README.md for the repository in `root`."""
    outputs = root / "evaluation" / "model_outputs"
    names = read_names(outputs)
    named = list_named_folders(outputs)
    saved = [read_saved(root, folder, row, names) for folder, row in named]
    models = {model.name: model for model in saved}
    lines = [INTRODUCTION, list_folders(saved), ""]
    if any(model.is_earlier for model in saved):
        lines += [STARRED, ""]
    sizes = dict.fromkeys(model.name.partition("-")[0] for model in saved)
    for size in sizes:
        lines += [f"## {size} parameters", "", SIDE_BY_SIDE, ""]
        lines += compare_models(size, models)
        lines += compare_ways(size, models)
    return "\n".join(lines).rstrip() + "\n"


def list_folders(saved: list[Saved]) -> str:
    """Return the table of all folders."""
    rows = []
    for model in saved:
        star = "\\*" if model.is_earlier else ""
        description = escape_markdown(model.description)
        counts = [model.count_easy(), model.count_correct()]
        rows.append([model.link + star, description, *counts])
    return join_table(["folder", "what it is", "trained forms", "all prompts"], rows)


def compare_models(size: str, models: dict[str, Saved]) -> list[str]:
    """Return lines of Markdown: a table a section, with a row a prompt and a column a model."""
    names = [f"{size}-{name}" for name in SHOWN_MODELS]
    shown = [models[name] for name in names if name in models]
    lines = []
    if any(model.is_earlier and model.easy_answers for model in shown):
        easy = [replace(m, answers=m.easy_answers) for m in shown if m.easy_answers]
        for section, prompts in group_prompts(easy).items():
            table = compare_answers(easy, prompts[:SHOWN_PROMPTS])
            lines += [f"### {escape_markdown(section)}", "", EASY_ANSWERS, "", table, ""]
    for section, prompts in group_prompts(shown).items():
        table = compare_answers(shown, prompts[:SHOWN_PROMPTS])
        lines += [f"### {escape_markdown(section)}", "", table, ""]
    return lines


def compare_answers(models: list[Saved], prompts: list[dict]) -> str:
    """Return a table with a row a prompt, given by a sample, and a column a model."""
    head = ["prompt"]
    for model in models:
        _, _, trained = model.name.partition("-")
        head.append(f"[{trained}]({model.name}/samples.md)")
    rows = []
    for sample in prompts:
        rows.append(
            [make_prompt_cell(sample), *(make_answer_cell(model, sample) for model in models)]
        )
    return join_table(head, rows)


def compare_ways(size: str, models: dict[str, Saved]) -> list[str]:
    """Return lines of Markdown: a row a way of asking a model; none if each was asked in one."""
    names = []
    for name in (f"{size}-{word}" for word in ASKED_OTHERWISE):
        for weights in (None, f"{size}-{OTHER_WEIGHTS}"):
            names += [name_way(name, weights), name_way(name, weights, has_template=False)]
    shown = [models[name] for name in names if name in models]
    if all(model.name in names[::4] for model in shown):
        return []
    prompts = next(iter(group_prompts(shown).values()))[:SHOWN_OTHERWISE]
    head = ["model", *map(make_prompt_cell, prompts), "correct"]
    rows = []
    for model in shown:
        if all(read_key(sample) in model.answers for sample in prompts):
            texts = [make_answer_cell(model, sample) for sample in prompts]
            rows.append([model.link, *texts, model.count_correct()])
    return [OTHERWISE, "", join_table(head, rows), ""]


def group_prompts(models: list[Saved]) -> dict[str, list[dict]]:
    """Group by section the prompts that most of the models were asked, each with a sample."""
    asked = [tuple(model.answers) for model in models]
    most_common = max(asked, key=asked.count, default=())
    sections: dict[str, list[dict]] = {}
    for model in models:
        if tuple(model.answers) == most_common:
            for sample in model.answers.values():
                sections.setdefault(sample["section"], []).append(sample)
            break
    return sections


def make_prompt_cell(sample: dict) -> str:
    """Return a prompt, with its translation, as a cell of a table."""
    translation = sample["prompt_translation"]
    text = escape_markdown(sample["prompt"])
    return f"{text}<br>*{escape_markdown(translation)}*" if translation else text


def make_answer_cell(model: Saved, asked: dict) -> str:
    """Return a model's answer to a sample's prompt, with its translation, as a cell of a table."""
    sample = model.answers.get(read_key(asked))
    if sample is None:
        return "*not asked*"
    text = escape_markdown(cut(sample["output"])) or "*blank*"
    if sample["outcome"] == "correct":
        text = f"✓ {text}"
    translation = sample["output_translation"] or ""
    if translation.strip("[]") in ("", sample["output"].strip()):  # a gloss that glosses nothing
        return text
    return f"{text}<br>*{escape_markdown(cut(translation))}*"


def cut(text: str) -> str:
    """Cut a long text; most of them repeat themselves without an end."""
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def join_table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table without padding, so that a changed cell changes one line."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
