"""Chats with one checkpoint in the terminal: `python eval_llm.py --model DIR --interactive`."""

import time

from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from dataset.lm_dataset import encode_conversations
from dataset.untrusted import shown
from model.model_minimind import MiniMindForCausalLM

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


def chat(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast, config: GenerationConfig
) -> None:
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
            print("(the conversation begins anew)")
        elif command == "/retry":
            if messages and messages[-1]["role"] == "assistant":
                messages = answer(model, tokenizer, config, messages[:-1])
            else:
                print("(nothing to answer again)")
        elif command.startswith("/"):
            print(f"(no command {shown(command)}; /help lists them)")
        else:
            question = {"role": "user", "content": line}
            messages = answer(model, tokenizer, config, [*messages, question])


def answer(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: GenerationConfig,
    messages: list[dict[str, str]],
) -> list[dict[str, str]]:
    """
    Prints the answer to `messages`, which end with the user's, and its speed.

    Returns:
        The messages with the answer, or only the system's where they fill the context.
    """
    limit = model.config.max_position_embeddings - config.max_new_tokens
    (ids, _), *_ = encode_conversations(tokenizer, [messages], generation_prompt=True)
    if len(ids) > limit:
        print(f"(the conversation has {len(ids)} tokens, the limit is {limit}: starting anew)")
        return [message for message in messages if message["role"] == "system"]
    inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(model.device)
    streamer = SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    output = model.generate(**inputs, generation_config=config, streamer=streamer)
    seconds = time.perf_counter() - start
    new = output[0, len(ids) :]
    print(f"({len(new)} tokens, {len(new) / seconds:.1f} tokens/s)")
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return [*messages, {"role": "assistant", "content": text}]
