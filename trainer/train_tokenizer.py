"""Train the tokenizer: a byte-level BPE with MiniMind's special tokens and chat template.

    python trainer/train_tokenizer.py --data_path pretrain.jsonl.gz sft.jsonl.gz --output_dir model
    python trainer/train_tokenizer.py --data_path dataset/data/world/pretrain_world.jsonl \
        --output_dir model/base_xs --vocab_size 4096 --min_frequency 20 --word_frequency 20

Reads `{"text"}` and conversation records alike, so that words that occur only in fine-tuning
data (medical terms, say) get tokens of their own. `AutoTokenizer.from_pretrained(output_dir)`
loads what is written.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import read_jsonl, record_messages, record_text
from model.files import read_json, run_script, write_json
from trainer.arguments import bounded

WORDS = 0.8  # share of the vocabulary for whole words, where --word_frequency asks for them
CHINESE = "[\\u3000-\\u9fff\\uff00-\\uffef]"
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1 and 2
# ChatML. Contents are trimmed so that white space never merges with the template's own; the
# generation tags let transformers compute the assistant mask, and print nothing.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus_texts(paths: list[Path]) -> Iterator[str]:
    """Yield the text of every record: a document, or each message's content."""
    for where, record in (item for path in paths for item in read_jsonl(path)):
        if "text" in record:
            yield record_text(record, where)
        else:
            yield from (message["content"] for message in record_messages(record, where))


def make_trainer(vocab_size: int, min_frequency: int) -> trainers.BpeTrainer:
    """Set up a byte-level BPE trainer, special tokens first."""
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[PAD, BOS, EOS],
        show_progress=sys.stdout.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def train_on_words(
    texts: Iterator[str], vocab_size: int, min_frequency: int, word_frequency: int
) -> Tokenizer:
    """Train a BPE whose tokens are frequent words, and pieces of the other words.

    Plain BPE fills part of a small vocabulary with steps on the way to a word, which never occur
    themselves. Here a frequent word, or a Chinese character, is one token without merges
    (`ignore_merges`, as in Llama 3), so nearly every token but unused bytes occurs.
    """
    chinese = pre_tokenizers.Split(Regex(CHINESE), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence([chinese, byte_level])
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in ranked if counts[word] >= word_frequency and len(word) > 1]
    words = words[: round(WORDS * (vocab_size - 259))]
    for word in words:
        del counts[word]
    pieces = Tokenizer(models.BPE())
    trainer = make_trainer(vocab_size - len(words), min_frequency)
    pieces.train_from_iterator(sorted(counts.elements()), trainer)
    model = json.loads(pieces.to_str())["model"]
    vocab = model["vocab"]
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    return tokenizer


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, min_frequency: int = 2, word_frequency: int = 0
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens, special tokens first.

    Args:
        min_frequency: a pair of tokens must occur this often to be merged.
        word_frequency: words that occur this often are one token each (0: plain BPE).
    """
    if word_frequency:
        tokenizer = train_on_words(texts, vocab_size, min_frequency, word_frequency)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(texts, make_trainer(vocab_size, min_frequency))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str] | None = None) -> int:
    """Train the tokenizer and write its two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, nargs="+", required=True, help="JSONL, or .gz")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the two files")
    size = bounded(int, 256 + 3, 2**20)  # bytes and special tokens
    parser.add_argument("--vocab_size", type=size, default=6400, help="tokens (6400)")
    count = bounded(int, 0)
    parser.add_argument("--min_frequency", type=count, default=2, help="of a merged pair (2)")
    parser.add_argument(
        "--word_frequency", type=count, default=0, help="words this frequent are one token (0: no)"
    )
    args = parser.parse_args(argv)
    texts = corpus_texts(args.data_path)
    tokenizer = train_tokenizer(texts, args.vocab_size, args.min_frequency, args.word_frequency)
    tokenizer.save_pretrained(args.output_dir, save_jinja_files=False)
    path = args.output_dir / "tokenizer_config.json"
    # The class name that every version of transformers knows.
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    print(f"{len(tokenizer)} tokens written to {args.output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
