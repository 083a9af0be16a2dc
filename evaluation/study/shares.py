"""Split saved answers to the study's test prompts into its outcomes, to repeat a number of a table.

    python eval_llm.py --model out/lora --prompts dataset/data/world/probe_combinations_test.jsonl
    python evaluation/study/shares.py evaluation/model_outputs/lora-probe_combinations_test

Folders are those that eval_llm.py leaves. *Composition* asks to use a fact, *plain* questions ask
for a fact that no training example states, and *unseen* things stand in no training example.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd

from evaluation.probe.outputs import print_table
from evaluation.study.analysis import PLAIN_SKILLS, read_prompt_table
from evaluation.study.blocks import read_samples
from evaluation.study.settings import RESULTS_DIR
from model.cli import UserError, make_parser, run_script


def read_outcomes(folder: Path = RESULTS_DIR) -> pd.Series:
    """Return the outcome that each test prompt belongs to, by the prompt's id."""
    tables = [read_prompt_table(folder / name) for name in ("prompts.csv", "prompts_3.csv")]
    every = pd.concat(tables).set_index("id")
    kinds = every["set"].str.removeprefix("fresh_")
    prompts = every[kinds.isin(["combinations", "unseen"]) & (every.half == "test")]
    is_unseen = prompts["set"].str.endswith("unseen")
    is_plain = prompts.skill.isin(PLAIN_SKILLS)
    outcomes = pd.Series("composition", prompts.index)
    return outcomes.mask(is_plain, "plain").mask(is_unseen, "unseen")


def count_outcomes(folder: Path) -> pd.DataFrame:
    """Return a row an outcome and decoding: how many answers of a folder are correct, of how many.

    Raise a UserError if the folder has no answers, or answers to other prompts.
    """
    samples = read_samples(folder)
    if samples is None:
        raise UserError(f"{folder}: has no samples.jsonl; eval_llm.py leaves such a folder")
    outcomes = samples.id.map(read_outcomes())
    if outcomes.isna().any():
        first = samples.id[outcomes.isna()].iloc[0]
        raise UserError(f"{folder}: {first} is no test prompt on new combinations or unseen things")
    is_correct = samples.outcome == "correct"
    groups = is_correct.groupby([samples.decoding, outcomes.rename("outcome")])
    counts = groups.agg(correct="sum", answers="size").reset_index()
    shares = (counts.correct / counts.answers).map("{:.1%}".format)
    return counts.assign(share=shares)


def main() -> None:
    """Print the outcomes of every folder."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    tables = []
    for folder in args.folders:
        table = count_outcomes(folder)
        table.insert(0, "answers of", folder.name)
        tables.append(table)
    print_table(pd.concat(tables))


if __name__ == "__main__":
    run_script(main)
