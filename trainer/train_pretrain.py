"""Pretrains the language model from random weights on plain text.

    python trainer/train_pretrain.py                        # the demo corpus
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

from model.checkpoint import save_model, weights_fingerprint
from trainer.arguments import add_model_flags, check_args, make_parser
from trainer.failures import run_script
from trainer.run_folder import find_run_folder
from trainer.trainer_utils import (
    Job,
    fill_data_paths,
    load_data,
    load_start,
    make_accelerator,
    show_sample,
    train,
)


def main(argv: list[str] | None = None) -> int:
    # Settings: every parameter trains, from random weights by default.
    parser = make_parser(__doc__, run_name="pretrain")
    add_model_flags(parser, from_weight="none")
    parser.add_argument(
        "--wrap_documents",
        action="store_true",
        help="put each document between the tokens that open and close a chat turn",
    )
    parser.set_defaults(learning_rate=2e-3, warmup_ratio=0.05, weight_decay=0.1)
    args = parser.parse_args(argv)
    check_args(args, parser)
    accelerator = make_accelerator(args)
    fill_data_paths(args, "pretrain", accelerator)
    run = find_run_folder(args, accelerator)
    if run.is_complete:
        print(f"{args.run_name}: complete, nothing to do")
        return 0

    # Model and data.
    model, tokenizer_dir = load_start(args)
    facts = {"stage": "pretrain"}
    if args.from_weight != "none":
        facts["base_fingerprint"] = weights_fingerprint(model)
    kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
    train_set, eval_set = load_data(args, kind, tokenizer_dir, accelerator)
    if args.show_sample:
        return show_sample(tokenizer_dir, train_set)

    # The loop.
    return train(
        Job(
            args=args,
            accelerator=accelerator,
            model=model,
            train_set=train_set,
            eval_set=eval_set,
            run=run,
            save=lambda trained, folder: save_model(trained, tokenizer_dir, folder),
            facts=facts,
        )
    )


if __name__ == "__main__":
    run_script(main)
