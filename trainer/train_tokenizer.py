r"""Train the tokenizer: a byte-level BPE with the special tokens and chat template of model/.

    python trainer/train_tokenizer.py --data_path text.jsonl sft.jsonl --output_dir out/tokenizer
    python trainer/train_tokenizer.py --data_path dataset/data/world/pretrain_world.jsonl \
        --output_dir out/tokenizer_world --vocab_size 4096 --min_frequency 20 --word_frequency 20

Reads `{"text"}` and conversation records alike, so that words that occur only in fine-tuning
data (medical terms, say) get tokens of their own.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import read_jsonl, record_messages, record_text
from model.checkpoint import load_tokenizer
from model.cli import COUNT, limit, make_parser, run_script
from model.files import read_json, write_json

LEAST_SIZE = 256 + 3  # bytes and special tokens
WORDS = 0.8  # share of the vocabulary for whole words, where --word_frequency asks for them
CHINESE = "[\\u3000-\\u9fff\\uff00-\\uffef]"
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1 and 2


def read_texts(paths: list[Path]) -> Iterator[str]:
    """Yield the text of every record: a document, or each message's content."""
    for path in paths:
        for where, record in read_jsonl(path):
            if "text" in record:
                yield record_text(record, where)
            else:
                for message in record_messages(record, where):
                    yield message["content"]


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, min_frequency: int, word_frequency: int
) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens, special tokens first.

    Plain BPE spends part of a small vocabulary on pieces that occur only inside longer tokens. With
    a `word_frequency`, a word that occurs so often, or a Chinese character, is one token without
    merges (`ignore_merges`, as in Llama 3), and BPE finds the pieces of the other words.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    words = []
    if word_frequency:
        chinese = pre_tokenizers.Split(Regex(CHINESE), "isolated")
        split = pre_tokenizers.Sequence([chinese, split])
        counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
        words = choose_words(counts, word_frequency, round(WORDS * (vocab_size - LEAST_SIZE)))
        remaining = counts - Counter({word: counts[word] for word in words})
        texts = sorted(remaining.elements())  # cut already, so that nothing pre-tokenizes them
    else:
        tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(words),
        min_frequency=min_frequency,
        special_tokens=[PAD, BOS, EOS],
        show_progress=sys.stdout.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if word_frequency:
        tokenizer = add_words(tokenizer, words)
        tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def choose_words(counts: Counter, least: int, most: int) -> list[str]:
    """Choose the most frequent words of more than one byte: at most `most`, each `least` times."""
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in ranked if counts[word] >= least and len(word) > 1]
    return words[:most]


def add_words(tokenizer: Tokenizer, words: list[str]) -> Tokenizer:
    """Build a tokenizer that has these words as tokens beside those of another."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"]
    for word in words:
        vocab.setdefault(word, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer and write its two files."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    size = limit(int, LEAST_SIZE, 2**20)
    add("--data_path", type=Path, nargs="+", required=True, help="JSONL, or .gz")
    add("--output_dir", type=Path, required=True, help="folder for the two files")
    add("--vocab_size", type=size, default=6400, help="tokens (6400)")
    add("--min_frequency", type=COUNT, default=2, help="of a merged pair (2)")
    add("--word_frequency", type=COUNT, default=0, help="of words of one token each; 0: plain (0)")
    args = parser.parse_args(argv)
    texts = read_texts(args.data_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(
            texts, args.vocab_size, args.min_frequency, args.word_frequency
        ),
        pad_token=PAD,
        unk_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        chat_template=load_tokenizer().chat_template,
    )
    tokenizer.save_pretrained(args.output_dir, save_jinja_files=False)
    path = args.output_dir / "tokenizer_config.json"
    # The class name that every version of transformers knows.
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    print(f"{len(tokenizer)} tokens written to {args.output_dir}")


if __name__ == "__main__":
    run_script(main)
