"""Pretrain the language model from random weights on plain text.

    python trainer/train_pretrain.py                        # the small world
    python trainer/train_pretrain.py --run_name pretrain_s \
        --hidden_size 256 --num_hidden_layers 6 --num_attention_heads 4 --intermediate_size 704 \
        --data_path dataset/data/simplewiki.jsonl.gz dataset/data/tinystories.jsonl.gz \
        --eval_data_path dataset/data/simplewiki_valid.jsonl.gz
    torchrun --nproc_per_node 2 trainer/train_pretrain.py   # two GPUs

Documents are packed into blocks of --max_seq_len tokens, each document closed by <|endoftext|>.
With --wrap_documents each also stands between <|im_start|> and <|im_end|>, as in MiniMind's own
pretraining data: the base has then seen the tokens that chats are made of.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import save_model
from model.files import run_script
from model.model_minimind import weights_fingerprint
from trainer.arguments import make_parser, parse_args
from trainer.run_folder import RunFolder
from trainer.trainer_utils import load_data, load_start, make_accelerator, train


def main(argv: list[str] | None = None) -> int:
    """Train every parameter, from random weights by default."""
    # Settings.
    parser = make_parser(__doc__, run_name="pretrain", from_weight="none")
    wrap = "put each document between the tokens that open and close a chat turn"
    parser.add_argument("--wrap_documents", action="store_true", help=wrap)
    parser.set_defaults(learning_rate=2e-3, warmup_ratio=0.05, weight_decay=0.1)
    args = parse_args(parser, argv, kind="pretrain")
    accelerator = make_accelerator(args)
    run = RunFolder(args, accelerator.is_main_process)
    if run.is_complete:
        print(f"{args.run_name}: complete, nothing to do")
        return 0

    # Data and model.
    model, tokenizer = load_start(args)
    kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
    train_set, eval_set = load_data(args, kind, tokenizer, accelerator)
    fingerprint = weights_fingerprint(model) if args.from_weight != "none" else None
    facts = {"stage": "pretrain", "base_fingerprint": fingerprint}

    # The loop.
    def save_weights(trained, folder):
        save_model(trained, tokenizer.name_or_path, folder)

    return train(args, accelerator, run, model, train_set, eval_set, save_weights, facts)


if __name__ == "__main__":
    run_script(main)
