"""Full fine-tuning on conversations: every parameter trains, or the parts that --trainable names.

    python trainer/train_full_sft.py                        # the demo corpus, from out/pretrain
    python trainer/train_full_sft.py --run_name full_sft_s --from_weight out/pretrain_s \
        --data_path dataset/data/dolly.jsonl.gz dataset/data/alpaca.jsonl.gz \
        --eval_data_path dataset/data/dolly_valid.jsonl.gz dataset/data/alpaca_valid.jsonl.gz \
        --epochs 2 --learning_rate 5e-4
    python trainer/train_full_sft.py --trainable norms,embeddings   # a floor for the adapters

Loss falls on the assistant's tokens and end tokens; --show_sample prints them and exits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import save_model, weights_fingerprint
from model.model_lora import TRAINABLE_PARTS, select_trainable
from trainer.arguments import (
    OUT_DIR,
    add_conversation_flags,
    add_model_flags,
    check_args,
    check_conversation_args,
    make_parser,
)
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
    # Settings.
    parser = make_parser(__doc__, run_name="full_sft")
    add_model_flags(parser, from_weight=str(OUT_DIR / "pretrain"))
    add_conversation_flags(parser)
    parser.add_argument(
        "--trainable",
        default="all",
        help=f"all, or parts joined by commas: {', '.join(TRAINABLE_PARTS)} (default: all)",
    )
    parser.set_defaults(epochs=2.0, learning_rate=5e-4)
    args = parser.parse_args(argv)
    check_args(args, parser)
    check_conversation_args(args)
    accelerator = make_accelerator(args)
    fill_data_paths(args, "sft", accelerator)
    run = find_run_folder(args, accelerator)
    if run.is_complete:
        print(f"{args.run_name}: complete, nothing to do")
        return 0

    # Model and data.
    model, tokenizer_dir = load_start(args)
    facts = {"stage": "full_sft", "base_fingerprint": weights_fingerprint(model)}
    select_trainable(model, args.trainable)
    train_set, eval_set = load_data(args, "sft", tokenizer_dir, accelerator, args.max_train_samples)
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
