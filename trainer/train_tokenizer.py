"""Trains the tokenizer: a byte-level BPE with MiniMind's special tokens and chat template.

    python trainer/train_tokenizer.py --data_path pretrain.jsonl.gz sft.jsonl.gz \
        --output_dir model
    python trainer/train_tokenizer.py --data_path dataset/data/world/pretrain_world.jsonl \
        --output_dir model/base_xs --vocab_size 4096 --min_frequency 20 --word_frequency 20

Reads `{"text"}` and conversation records alike, so that words that occur only in fine-tuning
data (medical terms, say) get tokens of their own. Writes `tokenizer.json` and
`tokenizer_config.json`; `AutoTokenizer.from_pretrained(output_dir)` loads them.
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

from dataset.command_line import Parser, SettingsError, check_writable
from dataset.jsonl import read_jsonl
from dataset.lm_dataset import record_messages, record_text
from dataset.untrusted import shown
from model.files import write_text
from trainer.failures import run_script

MAX_VOCAB = 2**20
WORDS = 0.8  # share of the vocabulary for whole words, where --word_frequency asks for them
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data_path", type=Path, nargs="+", required=True, help="JSONL, or .gz")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--vocab_size", type=int, default=6400, help="tokens (default: 6400)")
    parser.add_argument(
        "--min_frequency", type=int, default=2, help="how often a merged pair occurs (default: 2)"
    )
    parser.add_argument(
        "--word_frequency",
        type=int,
        default=0,
        help="words that occur this often are one token each (default: 0, plain BPE)",
    )
    args = parser.parse_args(argv)
    if not 256 + 3 <= args.vocab_size <= MAX_VOCAB:
        raise SettingsError(
            f"--vocab_size {args.vocab_size}: must be 259 (256 bytes and 3 special tokens) to "
            f"{MAX_VOCAB}"
        )
    check_writable(args.output_dir, "--output_dir")
    return args


def corpus_texts(paths: list[Path]) -> Iterator[str]:
    """The text of every record: a document, or each message's content."""
    for path in paths:
        for where, record in read_jsonl(path):
            if "text" in record:
                yield record_text(record, where)
            else:
                yield from (message["content"] for message in record_messages(record, where))


def split_text() -> pre_tokenizers.PreTokenizer:
    """Split as GPT-2 does, and each Chinese character from the next; spell words in bytes."""
    chinese = pre_tokenizers.Split(Regex("[\\u3000-\\u9fff\\uff00-\\uffef]"), "isolated")
    return pre_tokenizers.Sequence([chinese, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def train_on_words(
    texts: list[str], vocab_size: int, min_frequency: int, word_frequency: int
) -> Tokenizer:
    """Train a BPE whose tokens are frequent words, and pieces of the other words.

    Plain BPE fills part of a small vocabulary with steps on the way to a word, which never occur
    themselves. Here a frequent word, or a Chinese character, is one token without merges
    (`ignore_merges`, as in Llama 3), so nearly every token but unused bytes occurs.
    """
    split = split_text()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in ranked if counts[word] >= word_frequency and len(word) > 1]
    words = words[: round(WORDS * (vocab_size - 259))]
    rest = Counter(counts)
    for word in words:
        del rest[word]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(words),
        min_frequency=min_frequency,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    pieces = Tokenizer(models.BPE())
    pieces.train_from_iterator(sorted(rest.elements()), trainer)
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
    """A byte-level BPE of at most `vocab_size` tokens, special tokens first.

    Args:
        min_frequency: a pair of tokens must occur this often to be merged.
        word_frequency: words that occur this often are one token each (0: plain BPE).
    """
    if word_frequency:
        tokenizer = train_on_words(list(texts), vocab_size, min_frequency, word_frequency)
        return wrap_tokenizer(tokenizer)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[PAD, BOS, EOS],
        show_progress=sys.stdout.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add the byte-level ends, the special tokens and the chat template."""
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


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the two files, under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    texts = corpus_texts(args.data_path)
    tokenizer = train_tokenizer(texts, args.vocab_size, args.min_frequency, args.word_frequency)
    save_tokenizer(tokenizer, args.output_dir)
    print(shown(f"{len(tokenizer)} tokens written to {args.output_dir}"))
    return 0


if __name__ == "__main__":
    run_script(main)
