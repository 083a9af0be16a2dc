"""How probable a token can become while the embedding and the final norm stay frozen.

    python evaluation/updates/reachability.py out/pretrain out/other --tokens '<|im_end|>'

No adapter below the final norm exceeds this bound (model/reachability.py). If the end token has a
low bound, sampled answers rarely end.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.checkpoint import load_model, load_tokenizer
from model.files import UserError, make_parser, run_script
from model.reachability import reachable_probability


def main(argv: list[str] | None = None) -> None:
    """Print the bound of each token at each checkpoint."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="folders or hub ids of bases")
    parser.add_argument("--tokens", nargs="+", help="their text (default: the end token)")
    args = parser.parse_args(argv)
    for path in args.checkpoints:
        model, tokenizer = load_model(path), load_tokenizer(path)
        tokens, vocabulary = args.tokens or [tokenizer.eos_token], tokenizer.get_vocab()
        if missing := [token for token in tokens if token not in vocabulary]:
            raise UserError(f"--tokens {missing[0]!r}: the tokenizer of {path} has no such token")
        bounds = reachable_probability(model, [vocabulary[token] for token in tokens])
        for token, bound in zip(tokens, bounds, strict=True):
            print(f"{path}\t{token}\t{float(bound):.4f}")


if __name__ == "__main__":
    run_script(main)
