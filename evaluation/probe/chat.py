"""Chat with a checkpoint in the terminal: `python eval_llm.py --model DIR --interactive`."""

import secrets

from transformers import TextStreamer

from dataset.lm_dataset import encode_conversations
from model.checkpoint import Checkpoint
from model.cli import escape_control
from model.generation import Decoding, answer_batch, draw_numbers

HELP = """\
/reset          forget the conversation; a system message stays
/system <text>  begin anew with this system message; without a text, with none
An empty line or Ctrl-D ends the chat."""


class SafeStreamer(TextStreamer):
    """Print an answer as it is generated, without what could steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer."""
        print(escape_control(text), end="\n" if stream_end else "", flush=True)


def chat(checkpoint: Checkpoint, decoding: Decoding, max_new_tokens: int) -> None:
    """Answer line by line and remember the conversation."""
    model, tokenizer = checkpoint
    streamer = SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = (tokenizer.eos_token_id,)
    system = []
    turns = []
    print(HELP)
    while line := input("> ").strip():
        command, _, text = line.partition(" ")
        if command == "/reset":
            turns = []
        elif command == "/system":
            system = [{"role": "system", "content": text}] if text else []
            turns = []
        elif command.startswith("/"):
            print(HELP)
        else:
            turns.append({"role": "user", "content": line})
            encoded = encode_conversations(tokenizer, [[*system, *turns]], True)
            ids, _ = encoded[0]
            draws = draw_numbers(1, max_new_tokens, seed=secrets.randbits(32))
            (answer,) = answer_batch(model, [ids], decoding, draws, ends, streamer)
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            turns.append({"role": "assistant", "content": text})
