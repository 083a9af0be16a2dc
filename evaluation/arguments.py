"""The flags of `eval_llm.py`, and what refuses values that cannot work."""

import argparse
from pathlib import Path

import torch

from dataset.command_line import Parser, check_writable, refuse_ignored
from evaluation.outputs import OUTPUT_DIR
from evaluation.probe import DECODINGS
from evaluation.prompts import PROMPTS_FILE
from trainer.arguments import MAX_SEQ_LEN, OUT_DIR
from trainer.machine import DEVICES, choose_device
from trainer.run_folder import checkpoint_name

# Flags by what they are for; a mode refuses those that it would not read.
ASKING = (
    *("prompts", "limit", "judge", "translator", "rates_only"),
    *("decoding", "seeds", "max_new_tokens"),
)
CHATTING = {"decoding", "seeds", "max_new_tokens"}
MEASURING = ("nll_data", "text_nll_data", "max_seq_len")
COMPUTING = ("tokenizer_path", "num_attention_heads", "batch_size", "device", "dtype", "output_dir")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        SettingsError: a value that cannot work, or a flag that would be ignored.
    """
    parser = Parser(doc)
    mode = parser.add_argument_group("what to do instead of probing with prompts")
    mode.add_argument(
        "--list",
        type=Path,
        nargs="?",
        const=OUT_DIR,
        metavar="FOLDER",
        help="show the runs in out/, or in FOLDER",
    )
    mode.add_argument("--interactive", action="store_true", help="chat; empty line to quit")
    mode.add_argument("--no_generation", action="store_true", help="measure NLL only")
    what = parser.add_argument_group("what is probed")
    what.add_argument(
        "--model", type=Path, action="append", default=[], help="folder or .pth; repeatable"
    )
    what.add_argument(
        "--tokenizer_path",
        type=Path,
        help="tokenizer's folder (default: the model's; a .pth has none)",
    )
    what.add_argument(
        "--num_attention_heads",
        type=int,
        help="of a .pth, whose tensors do not show it (default: 8)",
    )
    what.add_argument(
        "--prompts", type=Path, default=PROMPTS_FILE, help="prompts, .md or JSONL (default: ours)"
    )
    what.add_argument("--limit", type=int, help="only the first so many prompts")
    what.add_argument(
        "--nll_data", type=Path, nargs="+", help="conversations to measure response NLL on"
    )
    what.add_argument(
        "--text_nll_data",
        type=Path,
        nargs="+",
        help="pretraining text to measure NLL on: what fine-tuning forgets",
    )
    what.add_argument(
        "--max_seq_len",
        type=int,
        default=MAX_SEQ_LEN,
        help="tokens of an NLL conversation or block of text (default: training's, %(default)s)",
    )
    what.add_argument(
        "--judge",
        type=Path,
        help="checkpoint, trained apart from those probed, that tells off-topic answers",
    )
    what.add_argument(
        "--translator",
        help="folder or hub id of a model that translates into English; fills empty slots",
    )
    how = parser.add_argument_group("generation")
    how.add_argument(
        "--decoding",
        nargs="+",
        choices=DECODINGS,
        default=list(DECODINGS),
        help="subset (default: all; with --interactive, the first given or t0.85p0.85)",
    )
    how.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of sampled decodings (default: 0)"
    )
    how.add_argument(
        "--max_new_tokens", type=int, default=128, help="tokens an answer may have (default: 128)"
    )
    how.add_argument("--batch_size", type=int, default=32, help="prompts at once (default: 32)")
    how.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="default: auto, a GPU if there is one; which of several: CUDA_VISIBLE_DEVICES",
    )
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--output_dir", type=Path, default=OUTPUT_DIR, help="(default: evaluation/model_outputs)"
    )
    parser.add_argument(
        "--rates_only",
        action="store_true",
        help="write rates_<prompts>.json and no text, for prompts that must not be published",
    )
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.device = choose_device(args.device)
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses values that cannot work, and flags that would be ignored."""
    for name in ("limit", "max_new_tokens", "batch_size", "num_attention_heads"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if args.max_seq_len < 2:
        parser.error(f"--max_seq_len {args.max_seq_len}: must be at least 2")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds}: must be different and not negative")
    for name in ("nll_data", "text_nll_data"):
        for path in vars(args)[name] or []:
            if not path.is_file():
                parser.error(f"--{name} {path}: no such file")
    if len(set(args.decoding)) < len(args.decoding):
        parser.error("--decoding: one is given twice")
    names = [checkpoint_name(path) for path in args.model]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--model: two are called {name!r} and would share an output folder")
    check_mode(parser, args)


def check_mode(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses modes that exclude each other, and flags that the mode would ignore."""
    modes = [name for name in ("list", "interactive", "no_generation") if vars(args)[name]]
    if len(modes) > 1:
        parser.error(f"--{modes[0]} and --{modes[1]} exclude each other")
    if args.list is None and not args.model:
        parser.error("--model: name at least one checkpoint; --list shows what is there")
    if args.interactive and len(args.model) > 1:
        parser.error("--interactive chats with one --model")
    measured = args.nll_data or args.text_nll_data
    if args.no_generation and not measured:
        parser.error("--no_generation measures NLL: name --nll_data or --text_nll_data")
    if args.rates_only:
        refuse_ignored(args, parser, ("translator",), "--rates_only saves no text")
    if args.list:
        refuse_ignored(
            args, parser, ("model", *ASKING, *MEASURING, *COMPUTING), "--list only lists"
        )
    if args.interactive:
        flags = ("batch_size", "output_dir", *MEASURING, *(set(ASKING) - CHATTING))
        refuse_ignored(args, parser, tuple(sorted(flags)), "--interactive only chats")
        if len(args.seeds) > 1 or 1 < len(args.decoding) < len(DECODINGS):
            parser.error("--interactive: give one of --seeds and one --decoding")
    if args.no_generation:
        refuse_ignored(args, parser, ASKING, "--no_generation asks nothing")
    if not (args.list or args.interactive):
        check_writable(args.output_dir, "--output_dir")
    if not measured:
        refuse_ignored(args, parser, ("max_seq_len",), "is of --nll_data and --text_nll_data")
    if args.decoding == ["greedy"]:
        refuse_ignored(args, parser, ("seeds",), "greedy decoding draws nothing")
