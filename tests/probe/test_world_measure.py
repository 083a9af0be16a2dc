"""The thing of an answer is replaced, for the chance level."""

from evaluation.probe.world_measure import replace_thing


def test_the_thing_of_an_answer_is_replaced_in_all_its_forms():
    answer = replace_thing("A lion roars. Lions sleep.", "Tell me about a lion.", "What of owls?")
    assert answer == "An owl roars. Owls sleep."
    assert replace_thing("It roars.", "Tell me more.", "What of owls?") == "It roars."
