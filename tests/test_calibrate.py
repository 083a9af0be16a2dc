"""Calibration: controls by their rules, separation by hand, and the committed file."""

import json
from pathlib import Path

import pytest

from dataset.jsonl import DataError
from evaluation.calibrate import (
    CALIBRATION_FILE,
    LENGTH_LIMIT,
    MIN_AUC,
    PROMPTS_FILE,
    calibrate_judge,
    calibrate_set,
    decide,
    first_half,
    main,
    make_arms,
    read_hidden,
    repeated_ids,
    separation,
    shuffled_references,
)
from evaluation.checkpoints import Checkpoint
from evaluation.likelihood import Judge
from evaluation.prompts import Prompt, read_prompts
from model.checkpoint import load_tokenizer
from model.files import CheckpointError
from tests.tiny import exit_code, tiny_model


def prompt(name: str, text: str, reference: str, check: dict | None = None) -> Prompt:
    talk = [{"role": "user", "content": text}]
    return Prompt(name, "A", talk, check=check, reference=reference)


def numbered(count: int) -> list[Prompt]:
    return [
        prompt(f"n{i}", f"Say n{i}!", f"The word is n{i}.", {"contains": [f"n{i}"]})
        for i in range(count)
    ]


def test_shuffling_moves_every_reference_within_its_script():
    chinese = [prompt(f"c{i}", f"问题{i}", f"回答{i}") for i in range(5)]
    prompts = numbered(7) + chinese
    shuffled = shuffled_references(prompts)
    assert shuffled == shuffled_references(prompts)
    assert all(new != old.reference for new, old in zip(shuffled, prompts, strict=True))
    assert sorted(shuffled[:7]) == sorted(one.reference for one in prompts[:7])
    assert sorted(shuffled[7:]) == sorted(one.reference for one in chinese)
    with pytest.raises(DataError, match="'c0': no other prompt in its script"):
        shuffled_references(numbered(3) + chinese[:1])


def test_degraded_references():
    assert first_half("It is a very old dog, yes.") == "It is a very"
    tokenizer = load_tokenizer()
    ids = repeated_ids(tokenizer, "I saw a small red dog run home.")
    assert len(ids) == LENGTH_LIMIT
    text = tokenizer.decode(ids)
    assert text.startswith("I saw a small red dog run home. red dog run home. red dog run home. ")
    assert tokenizer.decode(repeated_ids(tokenizer, "北京很大。")).startswith(
        "北京很大。北京很大北京很大"
    )


def test_arms_by_hand():
    tokenizer = load_tokenizer()
    long = prompt("long", "Say much!", "word " * 200 + "end", {"contains": ["end"]})
    arms = make_arms(tokenizer, [*numbered(2), long])
    flags = {
        name: [[s["blank"], s["runaway"], s["loop"], s["check_strict"]] for s in arm[:2]]
        for name, arm in arms.items()
    }
    assert flags["references"] == [[False, False, False, True]] * 2
    assert flags["emptied"] == [[True, False, False, False]] * 2
    assert flags["endless"] == [[False, True, False, True]] * 2
    assert flags["repeated"] == [[False, True, True, True]] * 2
    assert flags["shuffled"] == [[False, False, False, False]] * 2
    too_long = arms["references"][2]  # the limit would cut this reference: a false alarm
    assert too_long["runaway"] and too_long["tokens"] == LENGTH_LIMIT


def test_separation_by_hand():
    found = separation([1, 1, 0, 1], [0, 0, 0, 0], more_is_better=True)
    assert found["auc"] == 0.875  # 12 wins and 4 ties of 16
    assert separation([1, 1, 0, 1], [0, 0, 0, 0], more_is_better=False)["auc"] == 0.125
    assert separation([1] * 20, [0] * 20, True)["separates"]
    chance = separation([0, 1] * 20, [0, 1] * 20, True)
    assert chance["auc"] == 0.5 and chance["low"] < MIN_AUC and not chance["separates"]


def test_a_measure_is_shown_only_if_it_separates_in_every_set():
    yes, no = {"separates": True}, {"separates": False}
    measures = ["check_strict", "check_loose", "content_recall", "blank", "runaway", "loop"]
    measures += ["seq_rep_4", "diversity", "distinct_1", "distinct_2", "distinct_3"]
    all_yes = dict.fromkeys([*measures, "compression_ratio", "off_topic"], yes)
    shown = decide(
        {
            "a": {"measures": all_yes | {"loop": None, "off_topic": None}},
            "b": {"measures": all_yes | {"blank": no, "off_topic": None}},
        }
    )
    assert shown["check_strict"] and shown["loop"]
    assert shown["blank"] is False and shown["off_topic"] is None


def test_checks_that_pass_any_answer_do_not_separate():
    idle = [prompt(p.id, p.text, p.reference, {"contains": ["word"]}) for p in numbered(12)]
    measures = calibrate_set(load_tokenizer(), idle, judge=None)["measures"]
    assert measures["check_strict"]["auc"] == 0.5 and not measures["check_strict"]["separates"]
    assert measures["blank"]["separates"] and measures["off_topic"] is None
    good = calibrate_set(load_tokenizer(), numbered(12), judge=None)["measures"]
    assert good["check_strict"]["separates"] and good["check_strict"]["auc"] == 1


def test_a_random_judge_is_not_believed():
    judge = Judge(Checkpoint("judge", Path("judge"), None), tiny_model(), load_tokenizer())
    found = calibrate_judge(judge, numbered(12), batch_size=40)
    assert found["n"] == 12 and not found["separates"]
    with pytest.raises(DataError, match="9 prompts have a reference"):
        calibrate_judge(judge, numbered(9), batch_size=40)


def test_the_committed_calibration_is_of_the_prompts_and_measures_as_they_are():
    committed = json.loads(CALIBRATION_FILE.read_text())
    made = calibrate_set(load_tokenizer(), read_prompts(PROMPTS_FILE), judge=None)
    saved = committed["sets"][PROMPTS_FILE.name]
    assert saved["references"] == made["references"]
    for name, found in made["measures"].items():
        if found:  # gzip's size differs a little between versions of zlib
            assert saved["measures"][name]["auc"] == pytest.approx(found["auc"], abs=0.02), name
            assert saved["measures"][name]["separates"] == found["separates"], name
    assert committed["shown"] == decide(committed["sets"])


def test_hidden_measures_are_read_from_the_file(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text('{"shown": {"loop": false, "blank": true, "off_topic": null}}')
    assert read_hidden(path) == ["loop"]
    with pytest.raises(CheckpointError, match="calibrate.py"):
        read_hidden(tmp_path / "none.json")


def test_the_script_writes_what_it_found(tmp_path, capsys):
    records = [
        {"conversations": [*p.messages, {"role": "assistant", "content": p.reference}]}
        for p in numbered(10)
    ]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["--prompts", str(prompts), "--output", str(tmp_path / "c.json")])
    calibration = json.loads((tmp_path / "c.json").read_text())
    assert calibration["sets"]["p.jsonl"]["references"] == 10
    assert calibration["shown"]["check_strict"] is None  # no prompt has a check
    assert calibration["shown"]["blank"] is True and calibration["judge"] is None
    assert "check_strict       not calibrated here" in capsys.readouterr().out
    words = ["--prompts", str(tmp_path / "none.md"), "--output", str(tmp_path / "d.json")]
    assert exit_code(main, words) == 2 and not (tmp_path / "d.json").exists()
