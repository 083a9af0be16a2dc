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
from model.files import UserError, run_script
from model.model_lora import TARGET_NAMES, LoraSettings, apply_lora, save_lora
from model.model_minimind import MiniMindForCausalLM
from model.reachability import reachable_probability
from trainer.arguments import BASE_DIR, COUNT, POSITIVE, limit, make_stage_parser, parse_args
from trainer.trainer_utils import load_data, load_start, start_run, train


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
    ratio, many = {"type": POSITIVE, "default": 1.0}, {"nargs": "+", "default": []}
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


def main(argv: list[str] | None = None) -> int:
    """Train an adapter of a pretrained model."""
    parser = make_stage_parser(__doc__, "lora", from_weight=str(BASE_DIR), name_flag="--lora_name")
    add_lora_flags(parser)
    parser.set_defaults(learning_rate=3e-3)
    args = parse_args(parser, argv, kind="sft")
    if args.from_weight == "none":
        parser.error("--from_weight none: random weights; name a pretrained folder")
    if args.modules_to_save_lr_ratio != 1 and not args.modules_to_save:
        parser.error("--modules_to_save_lr_ratio: is of --modules_to_save; drop it, or name parts")
    of_matrices = "lora_alpha lora_dropout lora_targets lora_init use_rslora loraplus_lr_ratio"
    for flag in of_matrices.split():
        if args.lora_rank == 0 and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag}: --lora_rank 0 adapts no matrix; drop one of both")
    accelerator, run = start_run(args)

    model, tokenizer, fingerprint = load_start(args)
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in args.train_tokens if token not in vocabulary]:
        raise UserError(f"--train_tokens {missing[0]}: no single token of the vocabulary")
    settings = LoraSettings(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=args.lora_targets,
        init=args.lora_init,
        use_rslora=args.use_rslora,
        train_tokens=tuple(vocabulary[token] for token in args.train_tokens),
        modules_to_save=tuple(args.modules_to_save),
    )
    adapted = apply_lora(model, settings)
    data = load_data(args, "sft", tokenizer, accelerator)
    # Frozen matrices take the type of the products once, not at every step. The embedding keeps its
    # own: the residual stream takes it, float32 as in full fine-tuning.
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith("model.embed_tokens")
        if is_matrix and not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, args.dtype))
    if accelerator.is_main_process:
        warn_of_rare_ends(model, tokenizer)
    facts = {"stage": "lora", "base_fingerprint": fingerprint, "adapted": adapted}

    def lr_ratio(name: str) -> float:
        """Return a parameter's rate over --learning_rate; LoRA+: arXiv 2402.12354."""
        if ".lora_B" in name:
            return args.loraplus_lr_ratio
        is_whole = name.endswith(("norm.weight", "embed_tokens.weight"))
        return args.modules_to_save_lr_ratio if is_whole else 1.0

    def save_weights(folder: Path) -> None:
        """Write the adapter, and beside it the tokenizer that it was trained with."""
        save_lora(model, settings, args.from_weight, fingerprint, folder)
        save_tokenizer(tokenizer.name_or_path, folder)

    return train(args, accelerator, run, model, tokenizer, *data, facts, save_weights, lr_ratio)


if __name__ == "__main__":
    run_script(main)
