"""Ask a checkpoint prompts: each answer with its measures is a sample, a line of samples.jsonl."""

from collections.abc import Sequence

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.checks import judge_answer
from evaluation.probe.measures import content_recall, find_loop, hash_text, seq_rep_n
from evaluation.probe.prompts import Prompt, encode_prompts
from model.files import UserError
from model.generation import Decoding, generate
from model.model_minimind import MiniMindForCausalLM

DECODINGS = ("greedy", "t0.85p0.85")  # by default; the second is the original study's
MAX_NEW_TOKENS = 96
Checkpoint = tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]  # as `load_checkpoint` gives it


def probe(
    checkpoint: Checkpoint,
    prompts: list[Prompt],
    decodings: Sequence[str] = DECODINGS,
    seeds: Sequence[int] = (0,),
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
) -> list[dict]:
    """Ask every prompt once per decoding and seed; greedy decoding runs once.

    Returns:
        Samples (see `make_sample`), in the order decoding, seed, prompt.

    Raises:
        UserError: a prompt leaves no room for its answer.
    """
    model, tokenizer = checkpoint
    encoded = encode_prompts(tokenizer, prompts)
    limit = model.config.max_position_embeddings - max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > limit:
            raise UserError(
                f"{prompt.id}: the prompt has {len(ids)} tokens, and {limit} leave room for the "
                "answer; shorten it or lower --max_new_tokens"
            )
    rounds = [
        (name, seed) for name in decodings for seed in (seeds if name != "greedy" else [None])
    ]
    samples = []
    for name, seed in tqdm(rounds, desc="probing", unit="round", disable=None, leave=False):
        decoding, ends = Decoding.parse(name), (tokenizer.eos_token_id,)
        answers = generate(model, encoded, decoding, seed or 0, max_new_tokens, batch_size, ends)
        samples += [
            make_sample(tokenizer, prompt, ids, answer, name, seed)
            for prompt, ids, answer in zip(prompts, encoded, answers, strict=True)
        ]
    return samples


def make_sample(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    prompt_ids: list[int],
    answer_ids: list[int],
    decoding: str,
    seed: int | None,
) -> dict:
    """Make a line of samples.jsonl: what was asked, what was answered, and its measures.

    `output` shows every token but the end token. The measures leave special tokens out: an answer
    of <|endoftext|> alone is blank. `outcome` is `judge_answer`'s, for prompts with a check.
    """
    ended = answer_ids[-1:] == [tokenizer.eos_token_id]
    ids = answer_ids[:-1] if ended else answer_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    repeated = seq_rep_n(ids)
    recall = content_recall(text, prompt.reference) if prompt.reference else None
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
        "outcome": None if prompt.check is None else judge_answer(text, ended, prompt.record),
        "blank": not text.strip(),
        "endless": not ended,
        "loop": find_loop(text) is not None,
        "off_topic": None,  # a judge model fills it
        "tokens": len(ids),
        "seq_rep_4": None if repeated is None else round(repeated, 6),
        "recall": None if recall is None else round(recall, 6),
        "prompt_sha256": hash_text(tokenizer.decode(prompt_ids)),
    }
