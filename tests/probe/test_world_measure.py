"""The world's controls on cases worked out by hand."""

from evaluation.probe.world_measure import average_by_skill, find_nearest, replace_thing


def test_nearest_shares_the_rarest_words():
    training = ["where is the lion", "where is the shark", "where is the big shark", "count to 3"]
    assert find_nearest(["is it a shark", "where is the lion now", "3"], training) == [1, 0, 3]


def test_the_thing_of_an_answer_is_replaced_in_all_its_forms():
    answer = replace_thing("A lion roars. Lions sleep.", "Tell me about a lion.", "What of owls?")
    assert answer == "An owl roars. Owls sleep."
    assert replace_thing("It roars.", "Tell me more.", "What of owls?") == "It roars."


def test_averages():
    assert average_by_skill([1, 0, 0.5], ["b", "b", "a"]) == {"average": 50.0, "a": 50.0, "b": 50.0}
