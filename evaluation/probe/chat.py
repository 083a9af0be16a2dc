"""Chat with a checkpoint in the terminal: `python eval_llm.py --model DIR --interactive`."""

import torch
from transformers import TextStreamer

from dataset.lm_dataset import encode_conversations
from evaluation.probe.answers import Checkpoint
from model.files import escape_control
from model.generation import Decoding, continue_prompts

HELP = """\
/reset          forget the conversation; a system message stays
/system <text>  begin anew with this system message; without a text, with none
/retry          answer the last message again
An empty line or Ctrl-D ends the chat."""


class SafeStreamer(TextStreamer):
    """Print an answer as it is generated, without what could steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of the answer."""
        print(escape_control(text), end="\n" if stream_end else "", flush=True)


def chat(checkpoint: Checkpoint, decoding: Decoding, max_new_tokens: int) -> None:
    """Answer line by line and remember the conversation."""
    print(HELP)
    messages: list[dict[str, str]] = []
    while line := input("> ").strip():
        command, _, rest = line.partition(" ")
        system = [turn for turn in messages if turn["role"] == "system"]
        if command == "/reset":
            messages = system
        elif command == "/system":
            messages = [{"role": "system", "content": rest}] if rest else []
        elif command == "/retry" and messages[-1:] != system:
            messages = answer_messages(checkpoint, messages[:-1], decoding, max_new_tokens)
        elif command.startswith("/"):
            print(HELP)
        else:
            messages = [*messages, {"role": "user", "content": line}]
            messages = answer_messages(checkpoint, messages, decoding, max_new_tokens)


def answer_messages(
    checkpoint: Checkpoint, messages: list[dict[str, str]], decoding: Decoding, max_new_tokens: int
) -> list[dict[str, str]]:
    """Print the answer to messages; return them with it, or [] where they fill the context."""
    model, tokenizer = checkpoint
    ((ids, _),) = encode_conversations(tokenizer, [messages], generation_prompt=True)
    if len(ids) > model.config.max_position_embeddings - max_new_tokens:
        print("(the conversation fills the model's context: it begins anew)")
        return []
    streamer = SafeStreamer(tokenizer, skip_special_tokens=True)
    draws, answer = torch.rand(1, max_new_tokens), []
    for ((_, token),) in continue_prompts(model, [ids], decoding, draws, (tokenizer.eos_token_id,)):
        streamer.put(torch.tensor([token]))
        answer.append(token)
    streamer.end()
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return [*messages, {"role": "assistant", "content": text}]
