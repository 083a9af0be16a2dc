"""Write samples.md: a model's answers to read, below what was trained and how it was asked.

Whatever a model or a prompt says is shown as text: it can't act as Markdown.
"""

import re
from functools import cache
from html import escape
from pathlib import Path

import pandas as pd

from dataset.lm_dataset import read_jsonl
from evaluation.probe.names import read_names
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from model.cli import escape_control
from model.files import read_json

FLAGS = ("blank", "endless", "loop", "off_topic")
EASY_PROMPTS = "dataset/data/world/probe_combinations_tune.jsonl"
EASIER = f"""\
Numbers of an easier test, 1,200 prompts in the forms of words that training uses, stand in \
`evaluation/study/TABLES.md`; `--prompts {EASY_PROMPTS}` asks prompts of that kind."""
OURS = """\
They go from easy to hard: the first have the forms of words that training uses, and the last ask \
for what no training text says. So read the counts section by section."""
EARLIER = """\
**They are those of an earlier prompt file**, which were all in free wording: that is \
harder than anything in training."""


def escape_markdown(text: str) -> str:
    """Write a text as one line of inert Markdown."""
    plain = escape(escape_control(" ".join(text.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def fence(text: str, language: str = "text") -> str:
    """Put a text into a code fence that nothing in it can close."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{escape_control(text)}\n{ticks}"


def render_samples(folder: Path) -> str:
    """Return the text of samples.md, made from samples.jsonl and results.json."""
    samples = [sample for _, sample in read_jsonl(folder / "samples.jsonl")]
    results = read_json(folder / "results.json")
    provenance = results.get("provenance", {})
    names = read_names(folder.parent)
    lines = [
        f"# {escape_markdown(make_title(results, names))}",
        "",
        escape_markdown(tell_training(results, names)),
        "",
        tell_asking(samples, provenance),
        "",
    ]
    if "command" in provenance:
        lines += ["This command asked them:", "", fence(provenance["command"], "bash"), ""]
    lines += [tabulate_counts(pd.DataFrame(results["summary"])), ""]
    return "\n".join([*lines, *list_answers(samples)]) + "\n"


def make_title(results: dict, names: pd.DataFrame) -> str:
    """Return a heading in words: what was trained, its size, and another way of asking."""
    training = results["training"]
    provenance = results.get("provenance", {})
    parts = [names["title"].get(provenance.get("model"), training["title"])]
    if count := training.get("model_parameters"):
        parts.append(f"{name_size(count)} parameters")
    title = ", ".join(parts + list_ways(provenance, names))
    return title[:1].upper() + title[1:]


def list_ways(provenance: dict, names: pd.DataFrame) -> list[str]:
    """List in what other ways than in training a model was asked."""
    ways = []
    if weights := provenance.get("on_weights"):
        name = names["name"].get(weights["name"], weights["name"])
        ways.append(f"put on the weights of {name}")
    if provenance.get("no_template"):
        ways.append("asked without the chat template")
    return ways


def name_size(parameters: int) -> str:
    """Name a size in millions: 25M, 1.3M."""
    millions = parameters / 1e6
    return f"{millions:.0f}M" if millions >= 10 else f"{millions:.1f}M"


def tell_training(results: dict, names: pd.DataFrame) -> str:
    """Tell what was trained on what, at which rate and for how many steps."""
    training = results["training"]
    run = results.get("provenance", {}).get("model")
    sentences = []
    if run in names.index:
        sentences.append(names["description"][run])
    if training.get("steps") is None:
        sentences.append("Its folder does not say how it was trained.")
        return " ".join(sentences)
    base = training["base"]
    start = f"the model {names['name'].get(base, base)}" if base else "random weights"
    words = [
        tell_weights(training),
        "were trained on",
        " and ".join(training["data"]) or "data that is not known",
        f"from {start},",
        f"at a peak learning rate of {training['learning_rate']:g},",
        f"for {training['steps']:,} steps.",
    ]
    sentences.append(" ".join(words))
    return " ".join(sentences)


def tell_weights(training: dict) -> str:
    """Tell how many weights were trained, and which."""
    count = "The" if training["parameters"] is None else f"{training['parameters']:,}"
    if training["parts"] == "all weights":
        return f"All {count.lower()} weights"
    which = training["title"]
    if training["lora_rank"]:
        which += f", alpha {training['lora_alpha']:g}"
    return f"{count} weights ({which})"


def tell_asking(samples: list[dict], provenance: dict) -> str:
    """Tell which prompts were asked, how hard they are, and whether in another way."""
    prompts = {sample["id"] for sample in samples}
    file = name_prompts(provenance)
    sentences = [f"The model was asked {len(prompts)} prompts of {escape_markdown(file)}."]
    if file == PROMPTS_FILE.name:
        sentences.append(EARLIER if is_earlier(samples, provenance) else OURS)
        sentences.append(EASIER)
    if provenance.get("on_weights"):
        sentences.append("The adapter was put on weights that it was not trained on.")
    if provenance.get("no_template"):
        sentences.append("Each prompt was the bare text, without the chat template of training.")
    return " ".join(sentences)


def name_prompts(provenance: dict) -> str:
    """Return the name of the file whose prompts were asked."""
    return provenance.get("prompts", {}).get("file", PROMPTS_FILE.name)


def is_earlier(samples: list[dict], provenance: dict) -> bool:
    """Say whether the prompts are those of a qualitative_prompts.md that has changed since."""
    asked = {(sample["id"], sample["prompt"]) for sample in samples}
    return name_prompts(provenance) == PROMPTS_FILE.name and not asked <= read_our_prompts()


@cache
def read_our_prompts() -> frozenset[tuple[str, str]]:
    """Read the ids and the words of qualitative_prompts.md."""
    return frozenset((prompt.id, prompt.text) for prompt in read_prompts(PROMPTS_FILE))


def tabulate_counts(summary: pd.DataFrame) -> str:
    """Return a table of counts: correct answers, also by section, and the mistakes that occur.

    `summary` has a row a decoding, section and measure; the table a row a measure or section, and
    a column a decoding.
    """
    rows = select_counts(summary)
    label = rows["measure"] + ": " + rows["section"]
    rows["answers"] = rows["measure"].where(rows["section"].eq("all"), label)
    rows["text"] = [
        f"{row.value:.0f} on average"
        if row.measure == "tokens"
        else f"{round(row.value * row.n)} of {row.n}"
        for row in rows.itertuples()
    ]
    table = rows.pivot(index="answers", columns="decoding", values="text")
    table = table.loc[rows["answers"].unique(), rows["decoding"].unique()]
    table = table.rename(index=escape_markdown, columns=name_decoding)
    return table.reset_index().to_markdown(index=False, disable_numparse=True)


def select_counts(summary: pd.DataFrame) -> pd.DataFrame:
    """Select what a reader is told of a summary: no mistake that never occurs."""
    correct = summary[summary["measure"].eq("correct")]
    others = summary[summary["measure"].ne("correct")]
    others = others[others["section"].eq("all")]
    most = others.groupby("measure")["value"].transform("max")
    return pd.concat([correct, others[most > 0]])


def name_decoding(decoding: str) -> str:
    """Name a decoding for readers: all but the greedy one draw."""
    return decoding if decoding == "greedy" else f"sampled ({decoding})"


def list_answers(samples: list[dict]) -> list[str]:
    """Write every prompt with its answers as lines of Markdown, section by section."""
    by_prompt: dict[str, list[dict]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["id"], []).append(sample)
    lines = []
    section = None
    for answers in by_prompt.values():
        if answers[0]["section"] != section:
            section = answers[0]["section"]
            lines += [f"## {escape_markdown(section)}", ""]
        lines += show_prompt(answers[0])
        for answer in answers:
            lines += ["", *show_answer(answer)]
        lines.append("")
    return lines


def show_prompt(sample: dict) -> list[str]:
    """Write a prompt as lines of Markdown: its id, the text, its translation and reference."""
    lines = [
        f"### {escape_markdown(sample['id'])}",
        "",
        fence(sample["prompt"]),
        "",
    ]
    if sample["prompt_translation"]:
        lines.append(f"translation: {escape_markdown(sample['prompt_translation'])}  ")
    if sample["reference"]:
        lines.append(f"reference: {escape_markdown(sample['reference'])}  ")
    return lines


def show_answer(sample: dict) -> list[str]:
    """Write an answer as lines of Markdown: its decoding and kind, the text, a translation."""
    kinds = [sample["outcome"]] if sample["outcome"] else []
    kinds += [flag.replace("_", "-") for flag in FLAGS if sample[flag]]
    facts = list(dict.fromkeys(kinds))  # a blank answer is blank once
    facts.append(f"{sample['tokens']} tokens")
    decoding = sample["decoding"]
    if sample["seed"] is not None:
        decoding += f", seed {sample['seed']}"
    lines = [
        f"**{decoding}**: {', '.join(facts)}",
        "",
        fence(sample["output"]),
    ]
    if sample["output_translation"]:
        lines += ["", f"translation: {escape_markdown(sample['output_translation'])}"]
    return lines
