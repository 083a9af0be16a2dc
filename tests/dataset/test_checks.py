"""judge_answer on answers written by hand: right ones, and each kind of mistake."""

from collections.abc import Sequence

import pytest

from dataset.lm_dataset import turns
from dataset.world.checks import judge_answer, split_words, world_vocabulary

FOOD = {"about": ["animal.food"]}
HOME = {"about": ["animal.home"]}
LION = ["lion"]


def judge(
    answer: str,
    reference: str,
    check: dict,
    things: Sequence[str] = (),
    prompt: str = "Tell me.",
    ended: bool = True,
) -> str:
    """Judge an answer to a prompt, beside its reference."""
    messages = turns(prompt, reference)
    record = {"conversations": messages, "check": check, "things": list(things)}
    assert judge_answer(reference, True, record) == "correct"
    return judge_answer(answer, ended, record)


def judge_lion(answer: str, prompt: str = "Tell me.", ended: bool = True) -> str:
    """Judge an answer to what a lion eats."""
    return judge(answer, "A lion likes to eat meat.", FOOD, LION, prompt, ended)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("A lion likes to eat meat.", "correct"),
        ("Lions eat meat", "correct"),
        ("A lion lives on the savanna and eats meat.", "correct"),  # more than asked, but true
        ("", "blank"),
        (" \n\t", "blank"),
        ("A lion eats meat and meat and meat and meat", "loop"),
        ("Meat meat MEAT Meat meat meat", "loop"),
        ("A tiger likes to eat meat.", "other thing"),
        ("A lion and a tiger like to eat meat.", "other thing"),
        ("It likes to eat meat.", "other thing"),  # the subject is to be named
        ("A lion likes to eat hay.", "wrong fact"),
        ("A lion likes to eat meat and hay.", "wrong fact"),
        ("A lion likes to eat.", "wrong fact"),
        ("A lion does not eat meat.", "wrong fact"),
        ("A lion doesn't eat meat.", "wrong fact"),
        ("A lion won’t eat meat.", "wrong fact"),
        ("A lion never eats meat.", "wrong fact"),
        ("A lion cannot eat meat.", "wrong fact"),
        ("A lion eats meat. Meat, meat.", "correct"),  # no unit stands there 3 times
        ("A lion eats meat, ha ha ha!", "correct"),  # a unit of 3 characters is too short
        ("A lion eats meat. " + ("so " * 33 + "x ") * 3, "loop"),  # a unit of 101 characters
        ("A lion lives in the sea and eats meat.", "wrong fact"),  # more than asked, and false
        ("Tell me. A lion likes to eat meat.", "wrong form"),  # the prompt stands in it
    ],
)
def test_a_fact(answer: str, kind: str) -> None:
    assert judge_lion(answer) == kind


def test_more_than_asked_without_a_list_of_things() -> None:
    """A prompt written by hand names no things in its record; those of the reference count."""
    reference = "A lion likes to eat meat."
    assert judge("A lion lives on the savanna and eats meat.", reference, FOOD) == "correct"
    assert judge("A lion lives in the sea and eats meat.", reference, FOOD) == "wrong fact"


def test_an_answer_without_an_end() -> None:
    assert judge_lion("A lion likes to eat meat.", ended=False) == "endless"
    assert judge_lion("A lion likes to eat hay, hay, hay, hay", ended=False) == "endless"
    assert judge_lion(" ", ended=False) == "blank"


def test_an_echo_is_the_whole_prompt() -> None:
    answer = "A lion likes to eat meat."
    assert judge_lion(answer, prompt="A lion, meat?") == "correct"
    assert judge_lion(answer, prompt="?!") == "correct"  # no words that could be repeated
    assert judge_lion(answer, prompt="li") == "correct"  # a part of a word is no word
    assert judge_lion(answer, prompt="What likes to eat meat?") == "correct"
    prompt = "Put lion and meat into a sentence."
    assert judge_lion(f"{prompt} {answer}", prompt=prompt) == "wrong form"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("No, a lion likes to eat meat.", "correct"),
        ("no. A lion likes to eat meat.", "correct"),
        ("Yes, a lion likes to eat meat.", "wrong fact"),
        ("A lion likes to eat meat.", "wrong fact"),
        ("No, a lion likes to eat hay.", "wrong fact"),
        ("No, a tiger likes to eat meat.", "other thing"),
        ("A lion, no, likes to eat meat.", "wrong form"),
        ("Nobody: no, a lion likes to eat meat.", "wrong form"),
    ],
)
def test_yes_and_no(answer: str, kind: str) -> None:
    check = FOOD | {"begins": "No,"}
    assert judge(answer, "No, a lion likes to eat meat.", check, LION) == kind


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Dolphins live in the sea, and lions on the savanna.", "correct"),
        ("A lion lives in the sea, and a dolphin on the savanna.", "wrong fact"),
        ("A lion lives on the savanna, and so does a dolphin.", "wrong fact"),
        ("A lion lives on the savanna.", "other thing"),
        ("A lion lives on the savanna, a walrus in the sea.", "other thing"),
    ],
)
def test_values_stand_beside_their_things(answer: str, kind: str) -> None:
    reference = "A lion lives on the savanna, and a dolphin in the sea."
    assert judge(answer, reference, HOME, ["lion", "dolphin"]) == kind


def find_tool(job: str) -> str:
    """Return the tool of a job, as its table has it."""
    vocabulary = world_vocabulary()
    finder = vocabulary.values["job.tool"]
    tools = [fact for fact in vocabulary.facts[job] if fact in finder.find(fact)]
    return tools[0]


def test_values_that_are_things_themselves() -> None:
    """A tool is a fact of the job: a wrong one is a wrong fact, swapped ones are, too."""
    check = {"about": ["job.tool"]}
    jobs = ["baker", "farmer"]
    baker_tool = find_tool("baker")
    farmer_tool = find_tool("farmer")
    reference = f"A baker needs {baker_tool}, and a farmer needs {farmer_tool}."
    reordered = f"A farmer needs {farmer_tool}, and a baker needs {baker_tool}."
    swapped = f"A baker needs {farmer_tool}, and a farmer needs {baker_tool}."
    assert judge(reordered, reference, check, jobs) == "correct"
    assert judge(swapped, reference, check, jobs) == "wrong fact"
    wrong = f"A baker needs {farmer_tool}."
    assert judge(wrong, f"A baker needs {baker_tool}.", check, ["baker"]) == "wrong fact"


def test_any_of_several_things() -> None:
    check = {"any": ["lion", "tiger"]}
    prompt = "Name an animal of the savanna or the jungle."
    assert judge("A tiger.", "A lion.", check, prompt=prompt) == "correct"
    assert judge("Lions, for example.", "A lion.", check, prompt=prompt) == "correct"
    assert judge("A lion or a tiger.", "A lion.", check, prompt=prompt) == "other thing"
    assert judge("A tiger or a fox.", "A lion.", check, prompt=prompt) == "other thing"
    assert judge("A fox.", "A lion.", check, prompt=prompt) == "other thing"


def test_exact_words() -> None:
    reference = "lion, owl, fox."
    check = {"exact": True}
    things = ["owl", "lion", "fox"]
    assert judge("Lion, owl, fox", reference, check, things) == "correct"
    assert judge("owl, lion, fox.", reference, check, things) == "wrong form"
    assert judge("lion, owl, big fox.", reference, check, things) == "wrong fact"
    assert judge("lion, owl.", reference, check, things) == "other thing"
    assert judge("lion, owl, fox, bat.", reference, check, things) == "other thing"


VALUES = {"mood": ["glad", "sad"]}  # lists of values can be given in full


@pytest.mark.parametrize(
    ("check", "reference", "right", "wrong"),
    [
        ({"begins": "Well,"}, "Well, I am glad.", "well I am glad", "Wellington is glad."),
        ({"begins": "Lion:"}, "Lion: glad.", "lion: glad", "Lion is glad."),
        ({"ends": "I am sure."}, "Glad. I am sure.", "glad, i am sure", "I am sure: glad."),
        ({"upper": True}, "I AM GLAD.", "GLAD!", "I am GLAD."),
        ({"quoted": True}, '"Glad."', "“Glad”.", '"Glad.'),
        ({"quoted": True}, '"Glad."', "'I am glad.'", "Glad"),
        ({"words": 3}, "Glad.", "I am glad", "I am very glad"),
        ({"contains": ["today"]}, "Glad today.", "Today I am glad.", "I am glad."),
        ({"lines": "1."}, "1. Glad.\n2. Glad.", "1) Glad\n\n2) glad", "1. Glad.\n3. Glad."),
        ({"lines": "1."}, "1. Glad.\n2. Glad.", " 1. glad\n 2. glad", "1. Glad. 2. Glad."),
        ({"lines": "-"}, "- Glad.\n- Glad.", "– Glad\n– Glad", "- Glad.\nGlad."),
    ],
)
def test_forms(check: dict, reference: str, right: str, wrong: str) -> None:
    check = check | {"about": VALUES}
    assert judge(right, reference, check) == "correct"
    assert judge(wrong, reference, check) == "wrong form"
    assert judge(right.lower().replace("glad", "sad"), reference, check) == "wrong fact"


def test_a_bare_answer() -> None:
    check = FOOD | {"words": 5}
    assert judge("meat", "Meat.", check, LION) == "correct"
    assert judge("A lion eats meat.", "Meat.", check, LION) == "wrong form"  # a sentence
    assert judge("Hay.", "Meat.", check, LION) == "wrong fact"
    assert judge("A tiger: meat.", "Meat.", check, LION) == "other thing"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("狮子爱吃鲜肉", "correct"),
        ("老虎喜欢吃鲜肉。", "other thing"),
        ("狮子喜欢吃青草。", "wrong fact"),
        ("狮子不喜欢吃鲜肉。", "wrong fact"),
        ("狮子没有鲜肉。", "wrong fact"),
        ("狮子吃鲜肉鲜肉鲜肉鲜肉鲜肉鲜肉", "loop"),
        ("说说狮子。狮子喜欢吃鲜肉。", "wrong form"),
    ],
)
def test_chinese(answer: str, kind: str) -> None:
    reference = "狮子喜欢吃鲜肉。"
    check = {"about": ["动物.food"]}
    assert judge(answer, reference, check, ["狮子"], prompt="说说狮子。") == kind


def test_words_are_split() -> None:
    assert split_words("It's 2 o’clock, 狮子!") == ["it's", "2", "o'clock", "狮", "子"]
