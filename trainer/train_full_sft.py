"""Fine-tune on conversations: every parameter trains, or the parts that --trainable names.

    python trainer/train_full_sft.py                        # the small world, from model/base_xs
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

from model.checkpoint import save_model
from model.files import run_script
from model.model_lora import TRAINABLE_PARTS, select_trainable
from model.model_minimind import weights_fingerprint
from trainer.arguments import BASE_DIR, add_conversation_flags, make_parser, parse_args
from trainer.run_folder import RunFolder
from trainer.trainer_utils import (
    load_data,
    load_start,
    make_accelerator,
    print_answers,
    train,
)


def main(argv: list[str] | None = None) -> int:
    """Train all parameters of a pretrained model, or the chosen parts."""
    # Settings.
    parser = make_parser(__doc__, run_name="full_sft", from_weight=str(BASE_DIR))
    add_conversation_flags(parser)
    parts = f"all, or parts joined by commas: {', '.join(TRAINABLE_PARTS)} (all)"
    parser.add_argument("--trainable", default="all", help=parts)
    parser.set_defaults(epochs=2.0, learning_rate=5e-4)
    args = parse_args(parser, argv, kind="sft")
    accelerator = make_accelerator(args)
    run = RunFolder(args, accelerator.is_main_process)
    if run.is_complete:
        print(f"{args.run_name}: complete, nothing to do")
        return 0

    # Data and model.
    model, tokenizer = load_start(args)
    train_set, eval_set = load_data(args, "sft", tokenizer, accelerator)
    facts = {"stage": "full_sft", "base_fingerprint": weights_fingerprint(model)}
    select_trainable(model, args.trainable)

    # The loop.
    def save_weights(trained, folder):
        save_model(trained, tokenizer.name_or_path, folder)

    def finish():
        if eval_set is not None:
            print_answers(run, model, tokenizer, eval_set, args.show_answers)

    data = (train_set, eval_set)
    return train(args, accelerator, run, model, *data, save_weights, facts, finish=finish)


if __name__ == "__main__":
    run_script(main)
