"""Trained models of the repository: their cards, and how weights come there."""

import shutil

import pytest

from evaluation.probe.names import SHIPPED_DIR, list_shipped
from evaluation.study import ship
from model.checkpoint import load_checkpoint
from model.cli import UserError
from model.files import read_json


def test_cards_follow_from_the_committed_results():
    cards = {folder: (folder / "README.md").read_text("utf-8") for folder in list_shipped()}
    ship.main([])
    assert {folder: (folder / "README.md").read_text("utf-8") for folder in cards} == cards


def test_an_adapter_ships_without_tokenizer_and_names_its_base_from_the_root(tmp_path, monkeypatch):
    name, run = "1.3M-lora-original", "xs-world-wrapped42-study-e4-lr0.0001-s4"
    kept = tmp_path / "kept" / run
    shutil.copytree(SHIPPED_DIR / name, kept)
    (kept / "tokenizer.json").write_text("{}")
    (tmp_path / run).mkdir()
    shutil.copy(SHIPPED_DIR / name / "run.json", tmp_path / run)
    monkeypatch.setattr(ship, "SHIPPED_DIR", tmp_path / "shipped")
    ship.ship(name, tmp_path)
    folder = tmp_path / "shipped" / name
    assert not (folder / "tokenizer.json").exists()
    config = read_json(folder / "adapter_config.json")
    assert config["base_model_name_or_path"] == "model/base_xs"
    load_checkpoint(folder)  # finds its base


def test_an_adapter_without_a_name_stands_under_its_run(tmp_path, monkeypatch):
    run = "xs-world-wrapped42-all_r16-e4-lr0.003-s4"
    adapter, model = SHIPPED_DIR / "1.3M-lora-all-layers-r8", SHIPPED_DIR / "1.3M-full-fine-tuning"
    shutil.copytree(adapter, tmp_path / "kept" / run)
    shutil.copytree(adapter, tmp_path / run)
    monkeypatch.setattr(ship, "ADAPTER_DIR", tmp_path / "adapters")
    ship.ship(run, tmp_path)
    assert read_json(tmp_path / "adapters" / run / "run.json") == read_json(adapter / "run.json")
    load_checkpoint(tmp_path / "adapters" / run)
    shutil.copytree(model, tmp_path / "kept" / "xs-model")
    with pytest.raises(UserError, match="adapters alone"):
        ship.ship("xs-model", tmp_path)


@pytest.mark.parametrize(
    "name, message", [("1.3M-lora-other", "is no name"), ("1.3M-lora-original", "run.py --only")]
)
def test_weights_that_are_not_there_are_named(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ship.main([name, "--save_dir", str(tmp_path)])
