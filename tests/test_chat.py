"""Chatting with a tiny random model, with typed lines from a list."""

import pytest

from dataset.lm_dataset import encode_conversations
from dataset.untrusted import shown
from eval_llm import main
from evaluation import chat as chat_module
from evaluation.chat import answer
from evaluation.probe import decoding_of
from model.checkpoint import TOKENIZER_DIR, load_tokenizer, save_model
from model.generation import Decoder
from tests.tiny import tiny_model


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Chats by the lines given; returns the messages that the model saw, turn by turn."""
    save_model(tiny_model(), TOKENIZER_DIR, tmp_path / "one")

    def run(*lines, **flags) -> list[list[tuple[str, str]]]:
        typed, seen = iter(lines), []

        def fake_input(_: str) -> str:
            line = next(typed)
            if isinstance(line, str):
                return line
            raise line

        def spy(tokenizer, conversations, **options):
            seen.append([(m["role"], m["content"]) for m in conversations[0]])
            return encode_conversations(tokenizer, conversations, **options)

        monkeypatch.setattr("builtins.input", fake_input)
        monkeypatch.setattr(chat_module, "encode_conversations", spy)
        options = {"device": "cpu", "max_new_tokens": "5", "decoding": "greedy"} | flags
        given = [part for name, value in options.items() for part in (f"--{name}", value)]
        main(["--model", str(tmp_path / "one"), "--interactive", *given])
        return seen

    return run


@pytest.mark.parametrize("ending", ["", EOFError, KeyboardInterrupt])
def test_chat_remembers_and_ends_cleanly(talk, capsys, ending):
    first, second = talk("Hi", " again ", ending)
    assert first == [("user", "Hi")]
    assert [role for role, _ in second] == ["user", "assistant", "user"]
    assert second[2] == ("user", "again")
    out = capsys.readouterr().out
    assert second[1][1] and shown(second[1][1]) in out
    assert out.count(" tokens/s)") == 2 and "(5 tokens, " in out


def test_reset_keeps_the_system_message_and_system_starts_anew(talk):
    seen = talk("Hi", "/system Be brief.", "One", "/reset", "Two", "/system", "Three", "")
    assert seen == [
        [("user", "Hi")],
        [("system", "Be brief."), ("user", "One")],
        [("system", "Be brief."), ("user", "Two")],
        [("user", "Three")],
    ]


def test_retry_answers_the_last_message_again(talk, capsys):
    first, again, third = talk("/retry", "Hi", "/retry", "More", "", decoding="t1.0")
    assert first == again == [("user", "Hi")]
    assert [role for role, _ in third] == ["user", "assistant", "user"]
    answers = [line for line in capsys.readouterr().out.splitlines() if line[:1] not in "("]
    assert "(nothing to answer again)" not in answers and answers[0] != answers[1]
    assert third[1][1] in answers[1]  # the second answer is the one remembered


def test_help_and_an_unknown_command(talk, capsys):
    assert talk("/help", "/quit\x1b[31m", "") == []
    out = capsys.readouterr().out
    assert "/system <text>" in out and "no command /quit\\u001b[31m" in out


def test_a_conversation_beyond_the_context_starts_anew(capsys):
    model, tokenizer = tiny_model(), load_tokenizer()
    model.config.max_position_embeddings = 30
    system = {"role": "system", "content": "S"}
    long = [system, {"role": "user", "content": "word " * 40}]
    config = decoding_of(tokenizer, "greedy", 5)
    assert answer(Decoder(model), tokenizer, config, long) == [system]
    assert "the limit is 25: starting anew" in capsys.readouterr().out
