r"""Find under which name llama.cpp would cut a tokenizer's texts into words as we do.

A GGUF file has a tokenizer's tokens and merges, but not the rules that cut text into words before
they apply. It names rules that the reader has built in, and under wrong ones a model reads tokens
that it never saw in training.
"""

from copy import deepcopy
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataset.lm_dataset import encode_batch
from model.cli import UserError, escape_control
from trainer.train_tokenizer import read_texts

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")  # each digit is a word
# By name: the words, and whether a word of the vocabulary is one token without merges. These are
# the rules of src/llama-vocab.cpp in llama-cpp-python 0.3.36.
RULES = {"gpt-2": (GPT2, False), "llama-bpe": (LLAMA3, True), "qwen2": (QWEN2, False)}


def follow_rules(tokenizer: PreTrainedTokenizerFast, name: str) -> PreTrainedTokenizerFast:
    """Make a copy that cuts text by the rules of a name."""
    words, ignore_merges = RULES[name]
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    copy = deepcopy(tokenizer)
    copy.backend_tokenizer.normalizer = None
    copy.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    copy.backend_tokenizer.model.ignore_merges = ignore_merges
    return copy


def find_differences(tokenizer: PreTrainedTokenizerFast, name: str, texts: list[str]) -> list[str]:
    """Find the texts that become other tokens by the rules of a name."""
    expected = encode_batch(tokenizer, texts, special=False)
    encoded = encode_batch(follow_rules(tokenizer, name), texts, special=False)
    pairs = zip(texts, expected, encoded, strict=True)
    return [text for text, ids, other_ids in pairs if ids != other_ids]


def choose_pre_tokenizer(
    tokenizer: PreTrainedTokenizerFast, check_text: Path, allowed: float
) -> str:
    """Choose the name that fits a file's texts best; refuse it if too large a share differs."""
    texts = list(read_texts([check_text]))
    differences = {}
    for name in RULES:
        differences[name] = find_differences(tokenizer, name, texts)
    best = min(differences, key=lambda name: len(differences[name]))
    share = len(differences[best]) / len(texts)
    fit = f"{share:.1%} of {len(texts):,} texts become other tokens under {best}"
    if share > allowed:
        example = f"{fit}, the pre-tokenizer that fits best, such as {differences[best][0][:40]!r}"
        remedy = "give texts like your prompts by --check_text, or raise --allow_differences"
        raise UserError(f"{check_text}: {example}; {remedy}")
    print(escape_control(f"{check_text}: {fit}"))
    return best
