"""LoRA on conversations: the base is frozen, low-rank updates of chosen linears train.

    python trainer/train_lora.py                            # the demo corpus, from out/pretrain
    python trainer/train_lora.py --lora_name lora_all_s --from_weight out/pretrain_s \
        --data_path dataset/data/dolly.jsonl.gz dataset/data/alpaca.jsonl.gz \
        --eval_data_path dataset/data/dolly_valid.jsonl.gz dataset/data/alpaca_valid.jsonl.gz

MiniMind's placement, scaling, initialization and rate (q_proj and o_proj alone, scaling 1, 1e-4),
from the pretrained base; MiniMind's own script starts from its fully fine-tuned model, and has
AdamW's default weight decay of 0.01, which at this rate does next to nothing, where this has none:

    python trainer/train_lora.py --lora_name lora_minimind --lora_targets square --lora_rank 8 \
        --lora_alpha 8 --lora_init gaussian --learning_rate 1e-4

The folder loads in PEFT; `python eval_llm.py --model out/<lora_name>` probes it.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.command_line import Parser, SettingsError, refuse_ignored
from model.checkpoint import load_tokenizer, weights_fingerprint
from model.model_lora import INITS, TARGET_NAMES, LoraSettings, apply_lora, save_lora
from trainer.arguments import (
    OUT_DIR,
    add_conversation_flags,
    add_model_flags,
    check_args,
    check_conversation_args,
    make_parser,
)
from trainer.failures import run_script
from trainer.run_folder import base_reference, find_run_folder
from trainer.trainer_utils import (
    Job,
    fill_data_paths,
    load_data,
    load_start,
    make_accelerator,
    show_sample,
    train,
)

# Flags that say how matrices are adapted.
OF_MATRICES = ("lora_alpha", "lora_dropout", "lora_targets", "lora_init", "use_rslora")
OF_MATRICES += ("loraplus_lr_ratio",)


def add_lora_flags(parser: Parser) -> None:
    """What is adapted, and how."""
    add = parser.add_argument_group("adapter").add_argument
    add("--lora_rank", type=int, default=8, help="r (default 8)")
    add("--lora_alpha", type=float, default=32.0, help="the update counts alpha / r times (32)")
    add("--lora_dropout", type=float, default=0.0, help="on the adapter's input (default 0)")
    add(
        "--lora_targets",
        default="all-linear",
        help=f"{', '.join(TARGET_NAMES)}, or names, several joined by commas (default: "
        "all-linear); square is MiniMind's placement",
    )
    add(
        "--lora_init",
        choices=INITS,
        default="kaiming",
        help="of A: kaiming, PEFT's U(+-1/sqrt(in)) (default), or gaussian, MiniMind's N(0, .02)",
    )
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(r)")
    add("--loraplus_lr_ratio", type=float, default=1.0, help="LoRA+: rate of B over that of A (1)")
    add(
        "--train_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens whose embedding rows train too, e.g. '<|im_start|>' '<|im_end|>'",
    )
    add(
        "--modules_to_save",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="parts, with spaces between, trained whole and saved with the adapter: embeddings, "
        "norms, or such a module's name",
    )
    add(
        "--modules_to_save_lr_ratio",
        type=float,
        default=1.0,
        help="rate of the parts of --modules_to_save over --learning_rate (1)",
    )


def lora_settings(args: argparse.Namespace, tokenizer_dir: Path) -> LoraSettings:
    """The adapter's settings from the flags.

    Raises:
        SettingsError: a value that cannot work, or a token that the tokenizer does not have.
    """
    vocabulary = load_tokenizer(tokenizer_dir).get_vocab()
    for token in args.train_tokens:
        if token not in vocabulary:
            raise SettingsError(f"--train_tokens {token}: no single token of {tokenizer_dir}")
    return LoraSettings(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.lora_targets,
        init=args.lora_init,
        use_rslora=args.use_rslora,
        train_tokens=tuple(vocabulary[token] for token in args.train_tokens),
        modules_to_save=tuple(args.modules_to_save),
    )


def check_lora_args(args: argparse.Namespace, parser: Parser) -> None:
    """Refuses adapter flags that cannot work or would be ignored, before anything is loaded."""
    if args.from_weight == "none":
        raise SettingsError("--from_weight none: random weights; name a pretrained folder")
    if args.lora_rank < 0:
        raise SettingsError(f"--lora_rank {args.lora_rank}: must be 0 or more")
    if not 0 <= args.lora_dropout < 1:
        raise SettingsError(f"--lora_dropout {args.lora_dropout}: must lie in [0, 1)")
    for flag in ("lora_alpha", "loraplus_lr_ratio", "modules_to_save_lr_ratio"):
        if not 0 < vars(args)[flag] < float("inf"):
            raise SettingsError(f"--{flag} {vars(args)[flag]}: must be a positive number")
    if args.lora_rank == 0:
        refuse_ignored(args, parser, OF_MATRICES, "--lora_rank 0 adapts no matrix")
    if args.modules_to_save_lr_ratio != 1:
        check_modules_ratio(args)


def check_modules_ratio(args: argparse.Namespace) -> None:
    """Refuses a ratio of two rates where only one of them is anything's."""
    flag = f"--modules_to_save_lr_ratio {args.modules_to_save_lr_ratio}"
    if not args.modules_to_save:
        raise SettingsError(f"{flag}: no part has this rate; name some by --modules_to_save")
    if args.lora_rank == 0 and not args.train_tokens:
        raise SettingsError(f"{flag}: nothing else trains; give their rate as --learning_rate")


def lr_ratio(name: str, args: argparse.Namespace) -> float:
    """A trained parameter's rate over --learning_rate.

    That of B is LoRA+'s lr_B / lr_A (Hayou et al. 2024, arXiv 2402.12354).
    """
    if name.endswith(("lora_B.weight", "lora_embedding_A")):  # zero at the start
        return args.loraplus_lr_ratio
    if ".lora_" in name or ".token_adapter." in name:
        return 1.0
    return args.modules_to_save_lr_ratio  # nothing but adapters, rows and these parts trains


def freeze_in_half(model: torch.nn.Module, dtype: str) -> None:
    """Keeps frozen weights in the type of the matrix products: cast once, not at every step.

    Not the embedding, whose type the residual stream takes: float32, as in full fine-tuning.
    """
    if dtype != "float32":
        for name, parameter in model.named_parameters():
            is_matrix = parameter.ndim == 2 and not name.startswith("model.embed_tokens")
            if not parameter.requires_grad and is_matrix:
                parameter.data = parameter.data.to(getattr(torch, dtype))


def main(argv: list[str] | None = None) -> int:
    # Settings.
    parser = make_parser(__doc__, run_name="lora", name_flag="--lora_name")
    add_model_flags(parser, from_weight=str(OUT_DIR / "pretrain"))
    add_conversation_flags(parser)
    add_lora_flags(parser)
    parser.set_defaults(epochs=2.0, learning_rate=3e-3)
    args = parser.parse_args(argv)
    check_args(args, parser)
    check_conversation_args(args)
    check_lora_args(args, parser)
    accelerator = make_accelerator(args)
    fill_data_paths(args, "sft", accelerator)
    run = find_run_folder(args, accelerator)
    if run.is_complete:
        print(f"{args.run_name}: complete, nothing to do")
        return 0

    # Model and data.
    model, tokenizer_dir = load_start(args)
    settings = lora_settings(args, tokenizer_dir)
    fingerprint = weights_fingerprint(model)
    adapted = apply_lora(model, settings)
    freeze_in_half(model, args.dtype)
    train_set, eval_set = load_data(args, "sft", tokenizer_dir, accelerator, args.max_train_samples)
    if args.show_sample:
        return show_sample(tokenizer_dir, train_set)

    # The loop.
    base = base_reference(args.from_weight)
    return train(
        Job(
            args=args,
            accelerator=accelerator,
            model=model,
            train_set=train_set,
            eval_set=eval_set,
            run=run,
            save=lambda trained, folder: save_lora(trained, settings, folder, base, fingerprint),
            facts={"stage": "lora", "base_fingerprint": fingerprint, "adapted": adapted},
            lr_ratio=partial(lr_ratio, args=args),
        )
    )


if __name__ == "__main__":
    run_script(main)
