"""Data that the study makes, and what is measured on the world."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dataset.lm_dataset import encode_batch, read_jsonl, turns
from dataset.world.generate import ensure_world
from evaluation.probe.likelihood import measure_nll
from evaluation.probe.world_facts import list_facts, rank_facts
from evaluation.study.data import TEXT_PROMPT, draw_facts, find_data
from evaluation.study.measure import (
    check_prompts,
    find_chance,
    measure_checkpoint,
    measure_random_facts,
)
from evaluation.study.results import read_runs
from evaluation.study.settings import RESULTS_DIR, read_study
from model.checkpoint import load_checkpoint, load_tokenizer
from model.cli import UserError
from tests.model.small import make_model
from trainer.arguments import BASE_DIR

PAIR = [{"role": "user", "content": "a" * 30}, {"role": "assistant", "content": "b" * 50}]


def test_text_is_a_fifth_of_the_mixture(tmp_path: Path) -> None:
    """80 characters of pairs take whole documents of 20 characters at most."""
    world = {name: tmp_path / f"{name}.jsonl" for name in ("sft", "pretrain")}
    world["sft"].write_text(json.dumps({"conversations": PAIR}))
    world["pretrain"].write_text("".join(json.dumps({"text": c * 9}) + "\n" for c in "xyz"))
    records = [one for _, one in read_jsonl(find_data("sft_mixed", world, tmp_path / "made"))]
    documents = [{"instruction": TEXT_PROMPT, "output": c * 9} for c in "xy"]
    assert records == [{"conversations": PAIR}, *documents]
    with pytest.raises(UserError, match="no data 'sft_mixt'"):
        find_data("sft_mixt", world, tmp_path)


def test_unused_rows_change_no_token(tmp_path: Path) -> None:
    """A tokenizer with more rows encodes all text as before, its own tokens' names included."""
    few, many = load_tokenizer(BASE_DIR), load_tokenizer(find_data("tokenizer64", {}, tmp_path))
    assert len(many) == len(few) + 64 and many.chat_template == few.chat_template
    texts = ["A lion lives in a savanna.", "<|unused5|> <|im_end|>"]
    assert encode_batch(many, texts, False) == encode_batch(few, texts, False)


def test_random_facts_have_8_bits(tmp_path: Path) -> None:
    """Questions differ, values are 256; a model of equal logits stores 8 bits less its NLL."""
    facts = [[turn["content"] for turn in one["conversations"]] for one in draw_facts(4000)]
    assert len({question for question, _ in facts}) == 4000
    assert len({value for _, value in facts}) == 256
    longest = max(map(len, encode_batch(load_tokenizer(BASE_DIR), [v for _, v in facts], False)))
    assert longest < 16  # an answer has room for its end token
    tokenizer, model = load_tokenizer(), make_model()
    model.lm_head.weight.data.zero_()  # equal logits
    path = find_data("facts20", {}, tmp_path)
    values = [record["conversations"][1]["content"] for record in draw_facts(20)]
    tokens = sum(map(len, encode_batch(tokenizer, values, False)))
    found = measure_random_facts((model, tokenizer), path, 10)
    assert found["bits_per_parameter"] == pytest.approx((160 - tokens * math.log2(6400)) / 10)
    assert found["stored"] == 0.0


def test_facts_are_ranked_among_the_values(tmp_path: Path) -> None:
    """A prompt's facts are those of its first thing; with equal logits the shortest ranks first."""
    path, tokenizer, model = tmp_path / "probe.jsonl", load_tokenizer(), make_model()
    record = {"things": ["lion", "shark"], "check": {"about": ["animal.home", "category"]}}
    path.write_text((json.dumps(record) + "\n") * 2)
    [(thing, attribute)] = list_facts([path])
    assert (thing.name, attribute.name) == ("lion", "home")
    model.lm_head.weight.data.zero_()
    found = rank_facts((model, tokenizer), [path])
    assert found == {"facts": 1, "share": 0.0, "chance": pytest.approx(1 / 25)}
    record = {"things": ["theater"], "check": {"about": ["building.worker"]}}  # an actor
    path.write_text(json.dumps(record) + "\n")
    assert rank_facts((model, tokenizer), [path])["share"] == 1.0


def test_outcomes_stand_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    """The base's greedy answers to the first 12 prompts of each half have the committed letters."""
    files, sets = ensure_world(), ["combinations"]
    data = {name: tmp_path / name for name in files}
    for name, path in data.items():
        path.write_text("\n".join(files[name].read_text(encoding="utf-8").splitlines()[:12]))
    base, checkpoint = "xs-world-wrapped42", load_checkpoint(BASE_DIR)
    found = measure_checkpoint(read_study(), checkpoint, data, base, sets, only_tune=False)
    runs = read_runs(RESULTS_DIR, 2).set_index("id")
    letters = runs.outcomes[base]["combinations"]["greedy"]
    asked = letters[:12] + letters[400:412]
    assert found["outcomes"]["combinations"]["greedy"] == asked
    assert found["scalars"]["tune_correct"] == asked[:12].count("c") / 12
    for half in ("tune", "test"):
        one = measure_nll(checkpoint, "sft", [data[f"combinations_{half}"]], 340, 32)["sequences"]
        sums = {key: np.sum(values) for key, values in one.items()}
        nll = (sums["nats"] - sums["end_nats"]) / (sums["tokens"] - sums["ends"])
        assert found["scalars"][f"{half}_nll"] == pytest.approx(nll, rel=1e-4)
    quick = measure_checkpoint(read_study(), checkpoint, data, base, sets, only_tune=True)
    assert quick["outcomes"] == {"combinations": {"greedy": letters[:12]}}
    assert "test_nll" not in quick["scalars"]


def test_chance_is_the_share_of_other_answers_that_fit() -> None:
    """A tiger's answer is right once it names the lion; an owl's is not."""
    lion, tiger, owl = (
        {"conversations": turns(f"What does a {name} eat?", f"A {name} eats {food}.")}
        | {"things": [name], "check": {"about": ["animal.food"]}}
        for name, food in (("lion", "meat"), ("tiger", "meat"), ("owl", "mice"))
    )
    assert find_chance(lion, [lion, tiger, owl]) == 0.5
    assert find_chance(lion, [lion]) == 0


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    """Prompts of another world may have the same names."""
    files = ensure_world()
    data = {name: tmp_path / name for name in files if name.rpartition("_")[2] in ("tune", "test")}
    for name, path in data.items():
        path.write_text("\n".join(files[name].read_text(encoding="utf-8").splitlines()[:12]))
    check_prompts([*data.values()], tmp_path / "prompts.csv")
    check_prompts([*data.values()], tmp_path / "prompts.csv")
    data["unseen_tune"].write_text(data["unseen_test"].read_text().replace("-test-", "-tune-"))
    with pytest.raises(UserError, match="the world has other prompts now"):
        check_prompts([*data.values()], tmp_path / "prompts.csv")
