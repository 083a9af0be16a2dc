r"""Pretrain the language model from random weights on plain text.

    python trainer/train_pretrain.py                        # the small world
    python trainer/train_pretrain.py --run_name pretrain_s \
        --hidden_size 256 --num_hidden_layers 6 --num_attention_heads 4 --intermediate_size 704 \
        --data_path dataset/data/simplewiki.jsonl.gz dataset/data/tinystories.jsonl.gz \
        --eval_data_path dataset/data/simplewiki_valid.jsonl.gz
    torchrun --nproc_per_node 2 trainer/train_pretrain.py   # two GPUs

Documents are packed into blocks of --max_seq_len tokens, each document closed by <|endoftext|>.
With --wrap_documents each also stands between <|im_start|> and <|im_end|>, as in MiniMind's own
pretraining data, so the base reads the tokens that mark the turns of a chat.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.cli import run_script
from model.model_lora import name_roles
from trainer.arguments import PRETRAIN, make_stage_parser, parse_args
from trainer.trainer_utils import Method, load_data, start_session, train


def main(argv: list[str] | None = None) -> int:
    """Train every parameter, from random weights by default."""
    parser = make_stage_parser(__doc__, PRETRAIN)
    parser.add_argument("--wrap_documents", action="store_true", help="chat tokens around texts")
    parser.set_defaults(learning_rate=2e-3, warmup_ratio=0.05, weight_decay=0.1)
    args = parse_args(parser, argv, PRETRAIN)

    session = start_session(args)
    kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
    data = load_data(args, kind, session)
    method = Method(PRETRAIN.name, name_roles(session.model))
    return train(args, session, data, method)


if __name__ == "__main__":
    run_script(main)
