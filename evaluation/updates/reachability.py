"""Print the end token's highest probability under a frozen embedding and final norm.

    python evaluation/updates/reachability.py out/pretrain out/other

No adapter below the final norm exceeds this bound (model/reachability.py). If it is low, sampled
answers end late or never.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.checkpoint import load_model, load_tokenizer
from model.cli import make_parser, run_script
from model.reachability import reachable_probability


def main(argv: list[str] | None = None) -> None:
    """Print the end token and its bound at each checkpoint."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="folders or hub ids of bases")
    args = parser.parse_args(argv)
    for path in args.checkpoints:
        model = load_model(path)
        tokenizer = load_tokenizer(path)
        bound = reachable_probability(model, tokenizer.eos_token_id)
        print(f"{path}: {tokenizer.eos_token} has a probability of at most {bound:.4f}")


if __name__ == "__main__":
    run_script(main)
