"""Names of output folders in words."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

from evaluation.probe.names import list_named_folders, name_folder, name_run, name_way, read_names
from evaluation.probe.outputs import OUTPUT_DIR
from model.files import REPO_DIR

TABLE = """\
name,run,title,description
1.3M-lora,xs-lora-s1,LoRA,"It trains, a little."
1.3M-full,xs-fft-s1,full fine-tuning,All of it trains.
"""


@pytest.mark.parametrize(
    "name, weights, has_template, expected",
    [
        ("1.3M-lora", None, True, "1.3M-lora"),
        ("1.3M-lora", None, False, "1.3M-lora-without-template"),
        ("1.3M-lora", "1.3M-full", True, "1.3M-lora-on-full"),
        ("1.3M-lora", "25M-full", True, "1.3M-lora-on-25M-full"),
        ("toy", "full_sft", False, "toy-on-full_sft-without-template"),
    ],
)
def test_another_way_of_asking_has_a_longer_name(name, weights, has_template, expected):
    assert name_way(name, weights, has_template) == expected


def test_a_table_names_runs_and_lists_their_folders(tmp_path, monkeypatch):
    assert name_run("xs-fft-s1", tmp_path) == "xs-fft-s1"  # there is no table yet
    assert list_named_folders(tmp_path) == []
    (tmp_path / "names.csv").write_text(TABLE)
    assert name_run("xs-fft-s1", tmp_path) == "1.3M-full"
    assert name_run("1.3M-full", tmp_path) == "1.3M-full" and name_run("mine", tmp_path) == "mine"
    assert list(read_names(tmp_path).loc["1.3M-full"]) == list(
        read_names(tmp_path).loc["xs-fft-s1"]
    )
    names = ["1.3M-full", "1.3M-lora-on-full", "1.3M-lora-without-template", "1.3M-lora"]
    for name in [*names, "mine", "1.3M-full-mine"]:  # the last two are a user's own
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").touch()
    found = [(folder.name, row.name) for folder, row in list_named_folders(tmp_path)]
    assert found[:3] == [(name, "xs-lora-s1") for name in (names[3], names[2], names[1])]
    assert found[3:] == [("1.3M-full", "xs-fft-s1")]

    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert name_folder(tmp_path / "link") == "link"
    monkeypatch.chdir(tmp_path / "mine")
    assert name_folder(Path(".")) == "mine"


def test_the_studys_folders_have_names_and_are_let_in():
    table = read_names(OUTPUT_DIR)
    assert table.index.is_unique  # no run and no name twice
    assert not table.isna().any(axis=None)
    named = {folder.name for folder, _ in list_named_folders(OUTPUT_DIR)}
    assert set(table["name"]) <= named
    lines = (REPO_DIR / ".gitignore").read_text().splitlines()
    let_in = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for name in [*named, "names.csv", "README.md"]:
        path = f"evaluation/model_outputs/{name}"
        assert any(fnmatch(path, pattern) for pattern in let_in), name
    assert not any(fnmatch("evaluation/model_outputs/mine", pattern) for pattern in let_in)
