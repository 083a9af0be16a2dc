r"""Fine-tune on conversations: every parameter trains, or the parts that --trainable names.

    python trainer/train_full_sft.py                        # the small world, from model/base_xs
    python trainer/train_full_sft.py --run_name full_sft_s --from_weight out/pretrain_s \
        --data_path dataset/data/dolly.jsonl.gz --eval_data_path dataset/data/dolly_valid.jsonl.gz
    python trainer/train_full_sft.py --trainable norms,embeddings   # these alone, no adapter

Only the assistant's and end tokens count in the loss; --show_sample prints labels and exits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.cli import run_script
from model.model_lora import TRAINABLE_PARTS, name_roles, select_trainable
from trainer.arguments import FULL_SFT, make_stage_parser, parse_args
from trainer.trainer_utils import Method, load_data, start_session, train


def main(argv: list[str] | None = None) -> int:
    """Train all parameters of a pretrained model, or the chosen parts."""
    parser = make_stage_parser(__doc__, FULL_SFT)
    parts = f"all, or parts joined by commas: {', '.join(TRAINABLE_PARTS)} (all)"
    parser.add_argument("--trainable", default="all", help=parts)
    args = parse_args(parser, argv, FULL_SFT)

    session = start_session(args)
    select_trainable(session.model, args.trainable)
    data = load_data(args, FULL_SFT.reads, session)
    method = Method(FULL_SFT.name, name_roles(session.model))
    return train(args, session, data, method)


if __name__ == "__main__":
    run_script(main)
