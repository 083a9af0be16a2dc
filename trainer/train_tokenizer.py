"""Trains the tokenizer: a byte-level BPE with MiniMind's special tokens and chat template.

    python trainer/train_tokenizer.py --data_path pretrain.jsonl.gz sft.jsonl.gz \
        --output_dir model

Reads `{"text"}` and conversation records alike, so that words that occur only in fine-tuning
data (medical terms, say) get tokens of their own. Writes `tokenizer.json` and
`tokenizer_config.json`; `AutoTokenizer.from_pretrained(output_dir)` loads them.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.command_line import Parser, SettingsError, check_writable
from dataset.jsonl import read_jsonl
from dataset.lm_dataset import record_messages, record_text
from dataset.untrusted import shown
from model.files import write_text
from trainer.failures import run_script

MAX_VOCAB = 2**20
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


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        show_progress=sys.stdout.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
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
    tokenizer = train_tokenizer(corpus_texts(args.data_path), args.vocab_size)
    save_tokenizer(tokenizer, args.output_dir)
    print(shown(f"{len(tokenizer)} tokens written to {args.output_dir}"))
    return 0


if __name__ == "__main__":
    run_script(main)
