"""Name the folders of outputs in words: a stranger reads `25M-lora-original`, not a run's id.

`names.csv`, beside the folders, has a row for each run of the study whose answers are kept:

    name         the folder, such as 25M-full-fine-tuning
    run          the run that was asked, as it is named in runs.jsonl
    title        what was trained, in words for headings
    description  the same in a sentence

A model that the table does not know, such as one of yours, keeps its own folder's name. A model
that was asked in another way has a longer name: `-on-NAME` says on which weights an adapter was
put, `-without-template` that the chat template was left out.
"""

import os
from itertools import product
from pathlib import Path

import pandas as pd

from model.files import REPO_DIR

SHIPPED_DIR = REPO_DIR / "model" / "trained"
NAMES_FILE = "names.csv"
COLUMNS_OF_NAMES = ["name", "run", "title", "description"]
WITHOUT_TEMPLATE = "-without-template"


def read_names(outputs: Path) -> pd.DataFrame:
    """Read names.csv of a folder of outputs: two rows a run, found by its id and by its name.

    Weights that ship lie in folders that have these names already. A folder of outputs without the
    file has no names.
    """
    path = outputs / NAMES_FILE
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COLUMNS_OF_NAMES)
    by_name = table.drop(columns="run").set_index("name", drop=False)
    return pd.concat([table.set_index("run"), by_name])


def name_run(run: str, outputs: Path) -> str:
    """Return the name of a run's folder in `outputs`; a run without a name keeps its id."""
    return read_names(outputs)["name"].get(run, run)


def name_folder(path: Path) -> str:
    """Return a folder's own name, also of "." and of a link."""
    return Path(os.path.abspath(path)).name


def name_way(name: str, weights: str | None, has_template: bool = True) -> str:
    """Return the name of a model that was asked in a way of its own.

    `weights` is the name of the model that an adapter was put on. Its size is left out if that is
    the adapter's own: `1.3M-lora-original-on-full-fine-tuning`.
    """
    if weights:
        size, _, _ = name.partition("-")
        name += "-on-" + weights.removeprefix(f"{size}-")
    return name if has_template else name + WITHOUT_TEMPLATE


def list_named_folders(outputs: Path) -> list[tuple[Path, pd.Series]]:
    """List the folders of outputs that names.csv knows, each with its model's row, in its order.

    The other ways in which a model was asked come behind it.
    """
    table = read_names(outputs).drop_duplicates("name")  # found by their runs' ids
    folders = []
    for _, row in table.iterrows():
        for weights, has_template in product([None, *table["name"]], (True, False)):
            folder = outputs / name_way(row["name"], weights, has_template)
            if (folder / "samples.jsonl").is_file():
                folders.append((folder, row))
    return folders


def list_shipped() -> list[Path]:
    """List the trained models of this repository, in the order of names.csv."""
    names = read_names(REPO_DIR / "evaluation" / "model_outputs")["name"].unique()
    folders = [SHIPPED_DIR / name for name in names]
    return [folder for folder in folders if folder.is_dir()]
