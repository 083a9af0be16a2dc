"""Flags that the three training scripts share; a value that cannot work is refused here."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers

from dataset.world.generate import ensure_world
from model.files import REPO_DIR, UserError, make_parser
from model.model_minimind import DEFAULT_SHAPE

BASE_DIR = REPO_DIR / "model" / "base_xs"  # the world's base, where the scripts start by default
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names
MAX_SEQ_LEN = 340  # tokens a sample; of training, and of the NLL that is compared with it


def limit(kind: type, least: float, most: float = 1e12) -> Callable[[str], float]:
    """Make an argparse type: a number from `least` to `most`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise ArgumentTypeError(f"{text}: must lie between {least:g} and {most:g}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT, SIZE = limit(int, 0), limit(int, 1)
NOT_NEGATIVE, POSITIVE, SHARE = limit(float, 0), limit(float, 1e-12), limit(float, 0, 1)


def make_stage_parser(
    doc: str, run_name: str, from_weight: str, name_flag: str = "--run_name"
) -> ArgumentParser:
    """Make a parser with the flags of all stages; a stage sets other defaults and adds its own."""
    parser = make_parser(doc, usage="%(prog)s [flags]; --help explains them")
    add = parser.add_argument_group("run").add_argument
    add("--save_dir", type=Path, default=REPO_DIR / "out", help="where run folders go (out/)")
    add(name_flag, dest="run_name", default=run_name, help=f"run folder ({run_name})")
    add("--from_resume", action="store_true", help="continue this run from its resume.pt")
    add("--overwrite", action="store_true", help="delete the run folder first if it exists")
    add("--seed", type=limit(int, 0, 2**32 - 1), default=42, help="data, weights, dropout (42)")
    add("--device", choices=DEVICES, default="auto", help="(auto)")
    dtype = "of matrix products, not of weights (auto: bfloat16 where it is fast)"
    add("--dtype", choices=("auto", *DTYPES), default="auto", help=dtype)
    compile_flag = {"nargs": "?", "choices": ("auto", "on", "off"), "const": "on"}
    add("--use_compile", **compile_flag, default="auto", help="compile the loss (auto: long runs)")
    add("--num_workers", type=COUNT, default=0, help="data loading processes (0)")

    add = parser.add_argument_group("model").add_argument
    add("--from_weight", default=from_weight, help=f"start: folder, hub id, none ({from_weight})")
    add("--tokenizer_path", type=Path, help="folder (the weights' own)")
    for flag, value in list(DEFAULT_SHAPE.items())[:-1]:
        add(f"--{flag}", type=SIZE, help=f"of random weights ({value}); of others it must agree")
    add("--qk_norm", action="store_true", default=None, help="normalize queries and keys (Qwen3)")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", type=Path, nargs="+", default=[], help="JSONL or JSONL.gz (the small world)")
    add("--eval_data_path", type=Path, nargs="+", default=[], help="held-out JSONL for validation")
    add("--max_seq_len", type=limit(int, 2), default=MAX_SEQ_LEN, help="tokens a sample (340)")
    if from_weight != "none":  # by default pretraining starts from none and reads no conversations
        add("--show_answers", type=COUNT, default=3, help="held-out answers to print at last (3)")
        add("--max_train_samples", type=SIZE, help="so many, drawn alike for every --seed (all)")
    add("--show_sample", action="store_true", help="print a sample's tokens beside labels and exit")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=POSITIVE, default=1.0, help="passes over the data (%(default)s)")
    add("--max_steps", type=SIZE, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=SIZE, default=32, help="samples a process and micro-batch (32)")
    add("--accumulation_steps", type=SIZE, default=1, help="micro-batches an optimizer step (1)")
    add("--learning_rate", type=POSITIVE, default=5e-4, help="peak (%(default)s)")
    add("--lr_schedule", choices=("cosine", "linear", "constant"), default="cosine", help="cosine")
    add("--warmup_ratio", type=SHARE, default=0.0, help="share of steps warming up (%(default)s)")
    add("--min_lr_ratio", type=SHARE, default=0.1, help="last rate / peak (0.1)")
    add("--weight_decay", type=NOT_NEGATIVE, default=0.0, help="of linear layers (%(default)s)")
    add("--grad_clip", type=NOT_NEGATIVE, default=1.0, help="largest gradient norm; 0: none (1.0)")

    add = parser.add_argument_group("logging and saving, in optimizer steps").add_argument
    add("--log_interval", type=SIZE, default=10, help="a line of metrics.jsonl (10)")
    add("--eval_interval", type=COUNT, default=0, help="validation; 0: at the end only (0)")
    add("--save_interval", type=COUNT, default=500, help="resume.pt; 0: at the end only (500)")
    add("--keep_checkpoints", type=COUNT, default=0, help="sets of weights at equal steps (0)")
    trackers = ("none", *map(str, get_available_trackers()))
    add("--report_to", choices=trackers, default="none", help="a tracker of accelerate (none)")
    return parser


def parse_args(parser: ArgumentParser, argv: list[str] | None, kind: str) -> Namespace:
    """Parse and check the flags, and fill in defaults; the default data are of this `kind`."""
    args, refuse = parser.parse_args(argv), parser.error
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    name, weights = args.run_name, args.from_weight
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        refuse(f"--run_name or --lora_name {name!r}: must be a plain folder name")
    for one, other in (("epochs", "max_steps"), ("from_resume", "overwrite")):
        if {one, other} <= changed:
            refuse(f"--{one} and --{other}: contradict each other; give one")
    if args.lr_schedule == "constant" and "min_lr_ratio" in changed:
        refuse("--min_lr_ratio: --lr_schedule constant has no last rate; drop one of both")
    if args.eval_interval and args.data_path and not args.eval_data_path:
        refuse("--eval_interval: needs --eval_data_path beside --data_path")
    if weights.endswith(".pth"):
        refuse(f"--from_weight {weights}: convert it to a folder by trainer/convert_minimind.py")
    for path in (*args.data_path, *args.eval_data_path):
        if not path.is_file():
            refuse(f"--data_path or --eval_data_path {path}: no such file")
    if weights == "none":
        for flag in DEFAULT_SHAPE.keys() - changed:
            setattr(args, flag, DEFAULT_SHAPE[flag])
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    if not args.data_path:
        files = ensure_world()
        args.data_path = [files[kind]]
        args.eval_data_path = args.eval_data_path or [files[f"{kind}_valid"]]
        if weights == "none" and args.tokenizer_path is None:
            args.tokenizer_path = BASE_DIR
    elif weights == str(BASE_DIR) and "from_weight" not in changed:
        print("note: no --from_weight, so this starts from the small world's base")
    return args


def choose_device(name: str) -> str:
    """Choose where to compute; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    best = found.type if found else "cpu"
    if name not in ("auto", "cpu", best):
        raise UserError(f"--device {name}: this machine has none; use --device cpu")
    return best if name == "auto" else name


def choose_dtype(name: str, device: str) -> str:
    """Choose the type of matrix products; `auto` takes bfloat16 if fast: on Intel only by AMX."""
    if name == "float16" and device != "cuda":
        raise UserError(f"--dtype float16: needs CUDA, not {device}; use bfloat16 or float32")
    if name != "auto":
        return name
    cpu = torch.cpu.get_capabilities() if device == "cpu" else {}
    is_fast = cpu.get("avx512_bf16", False) and (cpu["amx_bf16"] or "Intel" not in cpu["cpu_name"])
    is_fast |= device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_fast else "float32"
