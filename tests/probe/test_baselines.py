"""The baselines and the tables of judged answers, on cases worked out by hand."""

import pytest

from dataset.world.facts import Thing, read_world
from evaluation.probe.baselines import (
    Filler,
    find_group,
    find_nearest_prompts,
    match_templates,
    put_placeholders,
    tabulate_baselines,
)
from evaluation.probe.judgements import judge_crafted, read_judged
from model.files import write_json

COW = Thing("cow", "cows", "animal", {"food": "hay", "home": "a barn"})
OWL = Thing("owl", "owls", "animal", {"food": "mice", "home": "the woods"})
FRANCE = Thing("France", None, "country", {"capital": "Paris"})
COW_EATS = ("What does a cow eat?", "A cow eats hay.")
WHO_HAS = ("The cow belongs to Ann. Who has the cow?", "Ann has the cow.")


@pytest.fixture
def filler() -> Filler:
    return Filler([COW, OWL, FRANCE], ["Ann", "Bob"])


def test_nearest_prompt_shares_the_rarest_words() -> None:
    training = ["where is the lion", "where is the shark", "where is the big shark", "count to 3"]
    prompts = ["is it a shark", "where is the lion now", "3", "of no known word"]
    assert find_nearest_prompts(prompts, training) == [1, 0, 3, 0]


def test_a_word_counts_as_often_as_it_stands_there() -> None:
    """Of "red red blue" red is 2 parts of 3; a rarer word would count more than a frequent one."""
    training = ["red blue blue", "red red blue", "green"]
    assert find_nearest_prompts(["red red", "blue"], training) == [1, 0]


def test_templates_number_things_and_persons(filler: Filler) -> None:
    """A longer form wins over a shorter one that it holds, and only whole words count."""
    template = filler.make_template("A cow and owls meet Bob, Ann and Bob. Cows scowl in France.")
    assert template == (
        "<A 1> and <plural 2> meet <person 1>, <person 2> and <person 1>. "
        "<Plural 1> scowl in <a 3>."
    )
    assert put_placeholders("No thing here.", {}) == "No thing here."


def test_a_template_is_filled_with_the_new_things(filler: Filler) -> None:
    exchanges = [COW_EATS, WHO_HAS]
    prompts = ["The owl belongs to Bob. Who has the owl?", "What does an owl eat?", "Who are you?"]
    matches = match_templates(prompts, exchanges, filler)
    assert matches == [WHO_HAS, COW_EATS, None]
    assert filler.fill_all(prompts, matches) == ["Bob has the owl.", "An owl eats hay.", ""]
    assert filler.fill_all(prompts, matches, has_facts=True)[1] == "An owl eats mice."


def test_the_first_of_equal_templates_answers(filler: Filler) -> None:
    later = ("What does an owl eat?", "Mice.")
    assert match_templates(["What does a cow eat?"], [COW_EATS, later], filler) == [COW_EATS]


def test_what_the_new_prompt_lacks_stays(filler: Filler) -> None:
    """A prompt without a second thing, a person or the attribute leaves the old words."""
    exchange = ("Ann, a cow or an owl?", "Ann, a cow lives in a barn, an owl does not.")
    answer = filler.fill("Bob, what of France?", exchange, has_facts=True)
    assert answer == "Bob, France lives in a barn, an owl does not."


def test_plain_questions_ask_for_an_attribute() -> None:
    world = read_world()
    assert find_group("where", world) == "plain questions"
    assert find_group("quotes", world) == "composition"


def test_table_of_baselines(tmp_path) -> None:
    path = tmp_path / "baselines.json"
    results = {
        "prompts": {"composition": 3, "plain questions": 1},
        "answered": {"nearest": 4, "template": 2},
        "correct": {
            "nearest": {"composition": 0, "plain questions": 1},
            "template": {"composition": 2, "plain questions": 0},
        },
    }
    write_json(path, results)
    table = tabulate_baselines(path)
    heads = ["all prompts (4)", "composition (3)", "plain questions (1)"]
    assert list(table.columns) == ["baseline", "answered", *heads]
    assert table[heads].values.tolist() == [["25.0%", "0.0%", "100.0%"], ["50.0%", "66.7%", "0.0%"]]
    assert table.answered.tolist() == [4, 2]


def test_crafted_answers_are_judged_by_the_record_of_their_id() -> None:
    """Where every word counts, another word is wrong; a fact may stand in other words."""
    copied = {"conversations": [{"content": "Copy: a b"}, {"content": "a b"}]}
    record = copied | {"id": "1", "things": [], "check": {"exact": True}}
    asked = {"conversations": [{"content": "Mood?"}, {"content": "I am glad."}]}
    mood = {"about": {"mood": ["glad", "sad"]}}
    records = [record, asked | {"id": "2", "things": [], "check": mood}]
    crafted = [
        {"id": "1", "answer": "A, b.", "is_right": True},
        {"id": "1", "answer": "a c", "is_right": False},
        {"id": "2", "answer": "Glad, thanks.", "is_right": True},
        {"id": "2", "answer": "Sad.", "is_right": True},
    ]
    table = judge_crafted(crafted, records)
    assert table["is_correct"].tolist() == [True, False, True, False]
    assert table["by reading"].tolist() == ["right", "wrong", "right", "right"]
    assert table["answers"].str.contains("every word").tolist() == [True, True, False, False]


def test_saved_answers_keep_the_outcome_of_the_checks(tmp_path) -> None:
    path = tmp_path / "judged.csv"
    path.write_text("run,id,outcome,by_hand,note\nr,1,correct,wrong,\nr,2,wrong fact,right,why\n")
    table = read_judged(path)
    assert table["is_correct"].tolist() == [True, False]
    assert table["by reading"].tolist() == ["wrong", "right"]
