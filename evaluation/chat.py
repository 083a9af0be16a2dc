"""Chats with one checkpoint in the terminal: `python eval_llm.py --model DIR --interactive`."""

import time

import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

from dataset.lm_dataset import encode_conversations
from dataset.untrusted import shown
from model.generation import Decoder, Decoding, continue_prompts

HELP = """\
/reset          forget the conversation; a system message stays
/system <text>  set the system message and start anew; without a text, none
/retry          answer the last message again
/help           this list
An empty line or Ctrl-D ends the chat."""


class SafeStreamer(TextStreamer):
    """Prints an answer as it is generated, without what could steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(shown(text), end="\n" if stream_end else "", flush=True)


def chat(decoder: Decoder, tokenizer: PreTrainedTokenizerFast, decoding: Decoding) -> None:
    """Answers line by line, remembering the conversation; an empty line or Ctrl-D ends it."""
    print("(/help lists the commands)")
    messages: list[dict[str, str]] = []
    while line := input("> ").strip():
        command, _, rest = line.partition(" ")
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
            print("(the conversation begins anew)")
        elif command == "/system":
            messages = [{"role": "system", "content": rest.strip()}] if rest.strip() else []
            told = (
                f"with the system message: {rest.strip()}"
                if messages
                else "without a system message"
            )
            print(shown(f"(the conversation begins anew, {told})"))
        elif command == "/retry":
            if messages and messages[-1]["role"] == "assistant":
                messages = answer(decoder, tokenizer, decoding, messages[:-1])
            else:
                print("(nothing to answer again)")
        elif command.startswith("/"):
            print(f"(no command {shown(command)}; /help lists them)")
        else:
            question = {"role": "user", "content": line}
            messages = answer(decoder, tokenizer, decoding, [*messages, question])


def answer(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    decoding: Decoding,
    messages: list[dict[str, str]],
) -> list[dict[str, str]]:
    """Prints the answer to `messages`, which end with the user's, and its speed.

    Returns:
        The messages with the answer, or only the system's where they fill the context.
    """
    limit = decoder.config.max_position_embeddings - decoding.max_new_tokens
    (ids, _), *_ = encode_conversations(tokenizer, [messages], generation_prompt=True)
    if len(ids) > limit:
        print(f"(the conversation has {len(ids)} tokens, the limit is {limit}: starting anew)")
        return [message for message in messages if message["role"] == "system"]
    streamer = SafeStreamer(tokenizer, skip_special_tokens=True)
    start = time.perf_counter()
    new = []
    draws = torch.rand(1, decoding.max_new_tokens)
    for ((_, token),) in continue_prompts(decoder, [ids], decoding, draws):
        streamer.put(torch.tensor([token]))
        new.append(token)
    streamer.end()
    seconds = time.perf_counter() - start
    print(f"({len(new)} tokens, {len(new) / seconds:.1f} tokens/s)")
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return [*messages, {"role": "assistant", "content": text}]
