"""Train the tokenizer: a byte-level BPE with MiniMind's special tokens and chat template.

    python trainer/train_tokenizer.py --data_path pretrain.jsonl.gz sft.jsonl.gz --output_dir model

Reads `{"text"}` and conversation records alike, so that words that occur only in fine-tuning
data (medical terms, say) get tokens of their own. `AutoTokenizer.from_pretrained(output_dir)`
loads what is written.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.lm_dataset import read_jsonl, record_messages, record_text
from model.files import read_json, run_script, write_json
from trainer.arguments import bounded

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


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens, special tokens first."""
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


def main(argv: list[str] | None = None) -> int:
    """Train the tokenizer and write its two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, nargs="+", required=True, help="JSONL, or .gz")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the two files")
    size = bounded(int, 256 + 3, 2**20)  # bytes and special tokens
    parser.add_argument("--vocab_size", type=size, default=6400, help="tokens (6400)")
    args = parser.parse_args(argv)
    tokenizer = train_tokenizer(corpus_texts(args.data_path), args.vocab_size)
    tokenizer.save_pretrained(args.output_dir, save_jinja_files=False)
    path = args.output_dir / "tokenizer_config.json"
    # The class name that every version of transformers knows.
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    print(f"{len(tokenizer)} tokens written to {args.output_dir}")
    return 0


if __name__ == "__main__":
    run_script(main)
