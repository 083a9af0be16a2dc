"""Chatting with a tiny random model, with typed lines from a list."""

import pytest

from dataset.lm_dataset import encode_conversations
from evaluation.probe import chat as chat_module
from model.checkpoint import load_tokenizer
from model.generation import Decoding
from tests.model.small import make_model


@pytest.fixture
def talk(monkeypatch):
    """Chat by the lines given; return the messages that the model saw, turn by turn."""

    def run(*lines: str, decoding: str = "greedy") -> list[list[tuple]]:
        typed, seen, checkpoint = iter([*lines, ""]), [], (make_model(), load_tokenizer())

        def record(tokenizer, conversations, *options):
            seen.append([(turn["role"], turn["content"]) for turn in conversations[0]])
            return encode_conversations(tokenizer, conversations, *options)

        monkeypatch.setattr("builtins.input", lambda _: next(typed))
        monkeypatch.setattr(chat_module, "encode_conversations", record)
        chat_module.chat(checkpoint, Decoding.parse(decoding), max_new_tokens=5)
        return seen

    return run


def test_chat_remembers(talk, capsys):
    first, second = talk("Hi", " again ")
    assert first == [("user", "Hi")]
    assert [role for role, _ in second] == ["user", "assistant", "user"]
    assert second[2] == ("user", "again") and second[1][1] in capsys.readouterr().out


def test_commands(talk):
    assert talk("Hi", "/system Be brief.", "One", "/reset", "Two", "/system", "Three") == [
        [("user", "Hi")],
        [("system", "Be brief."), ("user", "One")],
        [("system", "Be brief."), ("user", "Two")],
        [("user", "Three")],
    ]
    assert talk("/help", "Hi", decoding="t1.0") == [[("user", "Hi")]]


def test_what_is_printed_cannot_steer_the_terminal(capsys):
    chat_module.SafeStreamer(load_tokenizer()).on_finalized_text("a\x1b[2J", stream_end=True)
    assert capsys.readouterr().out == "a\\u001b[2J\n"
