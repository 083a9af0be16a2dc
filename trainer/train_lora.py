r"""Train LoRA on conversations: low-rank updates of chosen linear layers, a frozen base.

    python trainer/train_lora.py                            # the small world, from model/base_xs
    python trainer/train_lora.py --lora_name lora_s --from_weight out/pretrain_s \
        --data_path dataset/data/dolly.jsonl.gz --eval_data_path dataset/data/dolly_valid.jsonl.gz

MiniMind's own script starts from its fully fine-tuned model. The next command starts from the
pretrained base, with MiniMind's placement, scaling, initialization and rate:

    python trainer/train_lora.py --lora_name lora_minimind --lora_targets square --lora_rank 8 \
        --lora_alpha 8 --lora_init gaussian --learning_rate 1e-4

The folder loads in PEFT; `python eval_llm.py --model out/<lora_name>` probes it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedTokenizerFast

from model.checkpoint import save_tokenizer
from model.cli import COUNT, POSITIVE, UserError, limit, run_script
from model.model_lora import (
    EMBEDDING,
    TARGET_NAMES,
    WHOLE,
    LoraSettings,
    apply_lora,
    name_roles,
    save_lora,
)
from model.model_minimind import MiniMindForCausalLM
from model.reachability import reachable_probability
from trainer.arguments import LORA, make_stage_parser, parse_args
from trainer.trainer_utils import Method, load_data, start_session, train

# Flags about adapted matrices, which do nothing where --lora_rank 0 adapts none.
OF_MATRICES = [
    "lora_alpha",
    "lora_dropout",
    "lora_init",
    "lora_targets",
    "loraplus_lr_ratio",
    "use_dora",
    "use_rslora",
]


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    """Add flags: what is adapted, and how."""
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_rank", type=COUNT, default=8, help="r (8)")
    add("--lora_alpha", type=POSITIVE, default=32.0, help="the update counts alpha / r times (32)")
    add("--lora_dropout", type=limit(float, 0, 0.999), default=0.0, help="on A's input (0)")
    targets = f"{', '.join(TARGET_NAMES)}, or names, joined by commas; square is MiniMind's"
    add("--lora_targets", default="all-linear", help=f"{targets} placement (all-linear)")
    init = "of A: kaiming, PEFT's U(+-1/sqrt(in)), or gaussian, MiniMind's N(0, .02) (kaiming)"
    add("--lora_init", choices=("kaiming", "gaussian"), default="kaiming", help=init)
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(r)")
    add("--use_dora", action="store_true", help="train each weight row's length apart (DoRA)")
    ratio = {"type": POSITIVE, "default": 1.0}
    many = {"nargs": "+", "default": []}
    add("--loraplus_lr_ratio", **ratio, help="LoRA+: rate of B over that of A (1)")
    add("--train_tokens", **many, help="tokens whose embedding rows train too, e.g. '<|im_end|>'")
    parts = "parts trained whole and saved with the adapter: embeddings, norms, or modules"
    add("--modules_to_save", **many, help=parts)
    add("--modules_to_save_lr_ratio", **ratio, help="rate of these parts over --learning_rate (1)")


def warn_of_rare_ends(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Warn if the end token stays unlikely, whatever an adapter below a frozen embedding learns."""
    parts = (model.model.embed_tokens, model.model.norm, model.lm_head)
    if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return
    bound = reachable_probability(model, tokenizer.eos_token_id)
    if bound < 0.501:  # two tokens with equal rows reach 0.5; the bound is computed to 0.1%
        end = tokenizer.eos_token
        cause = f"with the embedding frozen, the probability of {end} stays below {bound:.3f}"
        print(f"warning: {cause}: sampled answers may not end; add --train_tokens '{end}'")


def check_lora_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags of the adapter that cannot work or would do nothing."""
    if args.from_weight == "none":
        raise UserError("--from_weight none: random weights; name a pretrained folder")
    if args.modules_to_save_lr_ratio != 1 and not args.modules_to_save:
        reason = "is of --modules_to_save; drop it, or name parts"
        raise UserError(f"--modules_to_save_lr_ratio: {reason}")
    for flag in OF_MATRICES:
        if args.lora_rank == 0 and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag}: --lora_rank 0 adapts no matrix; drop one of both")


def read_settings(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LoraSettings:
    """Turn flags into an adapter's settings."""
    vocabulary = tokenizer.get_vocab()
    for token in args.train_tokens:
        if token not in vocabulary:
            raise UserError(f"--train_tokens {token}: no single token of the vocabulary")
    return LoraSettings(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.lora_targets,
        init=args.lora_init,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        train_tokens=tuple(vocabulary[token] for token in args.train_tokens),
        modules_to_save=tuple(args.modules_to_save),
    )


def round_frozen(model: MiniMindForCausalLM, dtype: torch.dtype) -> None:
    """Give frozen matrices the type of the products once, not at every step.

    The embedding keeps its own: the residual stream takes it, float32 as in full fine-tuning.
    """
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith(EMBEDDING)
        if is_matrix and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def main(argv: list[str] | None = None) -> int:
    """Train an adapter of a pretrained model."""
    parser = make_stage_parser(__doc__, LORA)
    add_lora_flags(parser)
    parser.set_defaults(learning_rate=3e-3)
    args = parse_args(parser, argv, LORA)
    check_lora_flags(args, parser)

    session = start_session(args)
    model, tokenizer = session.model, session.tokenizer
    settings = read_settings(args, tokenizer)
    adapted = apply_lora(model, settings)
    data = load_data(args, LORA.reads, session)
    round_frozen(model, getattr(torch, args.dtype))
    if session.accelerator.is_main_process:
        warn_of_rare_ends(model, tokenizer)

    def save_adapter(folder: Path) -> None:
        """Write the adapter, and beside it the tokenizer that it was trained with."""
        save_lora(model, settings, args.from_weight, session.base_fingerprint, folder)
        save_tokenizer(tokenizer.name_or_path, folder)

    method = Method(
        stage=LORA.name,
        roles=name_roles(model),
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354) gives B a higher rate than A.
        learning_rate_ratios={
            "B": args.loraplus_lr_ratio,
            WHOLE: args.modules_to_save_lr_ratio,
        },
        facts={"adapted": adapted},
        save_weights=save_adapter,
    )
    return train(args, session, data, method)


if __name__ == "__main__":
    run_script(main)
