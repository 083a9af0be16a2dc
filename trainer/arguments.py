"""Flags that the three training scripts share, and what refuses values that cannot work."""

import argparse
import math
import reprlib
from pathlib import Path

from accelerate.tracking import get_available_trackers

from dataset.command_line import REPO_DIR, Parser, SettingsError, refuse_ignored
from trainer.machine import DEVICES

OUT_DIR = REPO_DIR / "out"
MAX_SEQ_LEN = 340  # tokens a sample; of training, and of the NLL that is compared with it
LONGEST_NAME = 200  # bytes of a run's name; file systems take 255, endings included
# Of a model with random weights, where the flags do not say otherwise: MiniMind2-small's.
DEFAULT_SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "qk_norm": False,
}


def make_parser(doc: str, run_name: str, name_flag: str = "--run_name") -> Parser:
    """A parser with the flags that all stages share; stages set other defaults and add theirs."""
    parser = Parser(doc)
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", type=Path, default=OUT_DIR, help="where run folders go (default: out/)")
    add(name_flag, dest="run_name", default=run_name, help=f"run folder (default: {run_name})")
    add("--from_resume", action="store_true", help="continue this run from its resume/ state")
    add("--overwrite", action="store_true", help="delete the run folder first if it exists")
    add("--seed", type=int, default=42, help="order of data, initial weights, dropout (default 42)")
    add("--device", choices=DEVICES, default="auto", help="default: auto")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of matrix products; weights and optimizer stay float32. auto: bfloat16 where the "
        "processor computes it, else float32 (default: auto)",
    )
    add(
        "--use_compile",
        nargs="?",
        choices=("auto", "on", "off"),
        const="on",
        default="auto",
        help="compile the transformer block; auto, the default: when the run is long enough to "
        "earn it back",
    )
    add("--num_workers", type=int, default=0, help="data loading processes (default 0)")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", type=Path, nargs="+", help="JSONL or JSONL.gz (default: the demo corpus)")
    add("--eval_data_path", type=Path, nargs="+", help="held-out JSONL for the validation loss")
    add("--max_seq_len", type=int, default=MAX_SEQ_LEN, help="tokens a sample (%(default)s)")
    add("--show_sample", action="store_true", help="print a sample's tokens beside labels and exit")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=float, default=1.0, help="passes over the data (default %(default)s)")
    add("--max_steps", type=int, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=int, default=32, help="samples a process and micro-batch (32)")
    add("--accumulation_steps", type=int, default=1, help="micro-batches an optimizer step (1)")
    add("--learning_rate", type=float, default=5e-4, help="peak (default %(default)s)")
    add("--lr_schedule", choices=("cosine", "linear", "constant"), default="cosine", help="cosine")
    add("--warmup_ratio", type=float, default=0.0, help="share of steps warming up (%(default)s)")
    add("--min_lr_ratio", type=float, default=0.1, help="last rate / peak (default 0.1)")
    add("--weight_decay", type=float, default=0.0, help="on matrices but embeddings (%(default)s)")
    add("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0: none (1.0)")
    add = parser.add_argument_group("logging and saving, in optimizer steps").add_argument
    add("--log_interval", type=int, default=10, help="a line of metrics.jsonl (default 10)")
    add("--eval_interval", type=int, default=0, help="validation; 0: at the end only (0)")
    add("--save_interval", type=int, default=500, help="resume state; 0: at the end only (500)")
    add("--report_to", default="none", help="none, or a tracker of accelerate: tensorboard, wandb")
    return parser


def add_model_flags(parser: Parser, from_weight: str) -> None:
    """Where the weights come from, and the shape for a run from random weights."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--from_weight",
        default=from_weight,
        help="folder, hub id or MiniMind .pth (with --tokenizer_path and --num_attention_heads) to "
        "start from, or none for random weights "
        f"(default: {from_weight})",
    )
    add("--tokenizer_path", type=Path, help="folder (default: the weights' own; a .pth has none)")
    for flag, value in DEFAULT_SHAPE.items():
        if flag != "qk_norm":
            shape = f"default {value}; with --from_weight a folder it must agree"
            add(f"--{flag}", type=int, help=shape)
    add("--qk_norm", action="store_true", default=None, help="normalize queries and keys (Qwen3)")


def add_conversation_flags(parser: Parser) -> None:
    """What fine-tuning alone asks of its data."""
    parser.add_argument(
        "--max_train_samples",
        type=int,
        help="train on so many conversations, a random choice that is the same for every --seed "
        "(default: all)",
    )


def check_conversation_args(args: argparse.Namespace) -> None:
    """Refuses values of `add_conversation_flags` that cannot work."""
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise SettingsError(f"--max_train_samples {args.max_train_samples}: must be 1 or more")


def check_args(args: argparse.Namespace, parser: Parser) -> None:
    """Refuses values that cannot work and flags that would be ignored, before anything is loaded.

    What is then left open of the shape of random weights is filled in.

    Raises:
        SettingsError: names the flag.
    """
    positive = ("epochs", "batch_size", "accumulation_steps", "learning_rate")
    positive += tuple(flag for flag in DEFAULT_SHAPE if flag != "qk_norm")
    for flag in positive:
        value = vars(args)[flag]
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingsError(f"--{flag} {value}: must be a positive number")
    not_negative = ("weight_decay", "grad_clip", "num_workers", "eval_interval", "save_interval")
    for flag in not_negative:
        value = vars(args)[flag]
        if not (math.isfinite(value) and value >= 0):
            raise SettingsError(f"--{flag} {value}: must be 0 or more")
    for flag in ("warmup_ratio", "min_lr_ratio"):
        if not 0 <= vars(args)[flag] <= 1:
            raise SettingsError(f"--{flag} {vars(args)[flag]}: must lie between 0 and 1")
    if args.max_steps is not None and args.max_steps < 1:
        raise SettingsError(f"--max_steps {args.max_steps}: must be 1 or more")
    if args.log_interval < 1:
        raise SettingsError(f"--log_interval {args.log_interval}: must be 1 or more")
    if args.max_seq_len < 2:
        raise SettingsError(f"--max_seq_len {args.max_seq_len}: must be 2 or more")
    if args.max_steps is not None:
        refuse_ignored(args, parser, ("epochs",), "--max_steps says when to stop")
    if args.lr_schedule == "constant":
        refuse_ignored(args, parser, ("min_lr_ratio",), "--lr_schedule constant has no last rate")
    check_run_name(args.run_name)
    if not 0 <= args.seed < 2**32:
        raise SettingsError(f"--seed {args.seed}: must lie between 0 and {2**32 - 1}")
    trackers = ["none", *map(str, get_available_trackers())]
    if args.report_to not in trackers:
        raise SettingsError(
            f"--report_to {args.report_to}: no tracker installed here; use {', '.join(trackers)}, "
            "or install it with pip"
        )
    if args.eval_interval and args.data_path and not args.eval_data_path:
        raise SettingsError("--eval_interval needs --eval_data_path beside --data_path")
    if args.from_resume and args.overwrite:
        raise SettingsError("--from_resume and --overwrite contradict each other; give one")
    fill_shape(args)


def fill_shape(args: argparse.Namespace) -> None:
    """Resolves what was not given of the shape of random weights; saved ones bring their own."""
    if args.from_weight == "none":
        given = {flag: vars(args)[flag] for flag in DEFAULT_SHAPE if vars(args)[flag] is not None}
        vars(args).update(DEFAULT_SHAPE | given)


def check_run_name(name: str) -> None:
    """Refuses what is no plain folder name that a terminal and every system can show."""
    is_plain = name not in ("", "..") and Path(name).name == name and "\\" not in name
    if not (is_plain and name.isprintable() and len(name.encode()) <= LONGEST_NAME):
        raise SettingsError(
            f"--run_name or --lora_name {reprlib.repr(name)}: must be a plain folder name of at "
            f"most {LONGEST_NAME} bytes"
        )
