"""Ask a checkpoint prompts: each answer with its measures is a sample, a line of samples.jsonl."""

import hashlib
from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import encode_batch, encode_conversations
from dataset.world.checks import LOOP
from evaluation.probe.prompts import Prompt
from model.checkpoint import Checkpoint
from model.cli import UserError
from model.generation import MAX_NEW_TOKENS, Decoding, generate

DECODINGS = ("greedy", "t0.85p0.85")  # by default; the second is the original study's


def probe(
    checkpoint: Checkpoint,
    prompts: list[Prompt],
    decodings: Sequence[str] = DECODINGS,
    seeds: Sequence[int] = (0,),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    has_template: bool = True,
) -> list[dict]:
    """Ask every prompt once per decoding and seed; greedy decoding draws nothing and runs once.

    Samples come in the order decoding, seed, prompt. A prompt that leaves no room is refused.
    Without the chat template a prompt is its text after the first token of a text.
    """
    model, tokenizer = checkpoint
    encoded = encode_prompts(tokenizer, prompts, has_template)
    limit = model.config.max_position_embeddings - max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > limit:
            what = f"{prompt.id}: the prompt has {len(ids)} tokens, more than the {limit} that fit"
            raise UserError(f"{what}; shorten it or lower --max_new_tokens")
    rounds = []
    for name in decodings:
        seeds_of_decoding = [None] if name == "greedy" else seeds
        rounds += [(name, seed) for seed in seeds_of_decoding]
    rounds = dict.fromkeys(rounds)  # each once, even if its flag names it twice
    ends = (tokenizer.eos_token_id,)
    samples = []
    for name, seed in tqdm(rounds, desc="probing", unit="round", disable=None, leave=False):
        decoding = Decoding.parse(name)
        answers = generate(model, encoded, decoding, seed or 0, max_new_tokens, batch_size, ends)
        for prompt, prompt_ids, ids in zip(prompts, encoded, answers, strict=True):
            samples.append(make_sample(tokenizer, prompt, prompt_ids, ids, name, seed))
    return samples


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], has_template: bool = True
) -> list[list[int]]:
    """Return the tokens of each prompt, as training opened it or as its text after the first."""
    if has_template:
        opened = encode_conversations(tokenizer, [prompt.messages for prompt in prompts], True)
        return [ids for ids, _ in opened]
    texts = encode_batch(tokenizer, [prompt.text for prompt in prompts], special=False)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [first + ids for ids in texts]


def make_sample(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    prompt_ids: list[int],
    answer_ids: list[int],
    decoding: str,
    seed: int | None,
) -> dict:
    """Make a line of samples.jsonl: the prompt, the answer and its measures (measures.py).

    `output` shows every token but the end token. The measures leave special tokens out: an answer
    of <|endoftext|> alone is blank.
    """
    ended = answer_ids[-1:] == [tokenizer.eos_token_id]
    ids = answer_ids[:-1] if ended else answer_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {
        "id": prompt.id,
        "section": prompt.section,
        "decoding": decoding,
        "seed": seed,
        "prompt": prompt.text,
        "prompt_translation": prompt.translation,
        "output": tokenizer.decode(ids),
        "output_translation": None,
        "reference": prompt.reference,
        "check": prompt.check,
        "outcome": None if prompt.check is None else prompt.judge(text, ended),
        "blank": not text.strip(),
        "endless": not ended,
        "loop": LOOP.search(text) is not None,
        "off_topic": None,  # a judge model fills it
        "tokens": len(ids),
        "prompt_sha256": hashlib.sha256(tokenizer.decode(prompt_ids).encode()).hexdigest(),
    }
