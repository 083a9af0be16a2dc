"""Flags that the three training scripts share; a value that cannot work is refused here."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dataset.lm_dataset import CHAT_FIELDS
from dataset.world.generate import FILES_DIR, list_files
from model.cli import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, SIZE, UserError, limit, make_parser
from model.files import REPO_DIR
from model.machine import DEVICES, DTYPES, choose_device, choose_dtype
from model.model_minimind import DEFAULT_SHAPE

BASE_DIR = REPO_DIR / "model" / "base_xs"  # the world's base, where the scripts start by default
MAX_SEQ_LEN = 340  # tokens a sample; of training, and of the NLL that is compared with it


@dataclass(frozen=True)
class Stage:
    """What the flags depend on: a script's defaults, and what it reads."""

    name: str  # in run.json
    run_name: str
    from_weight: str
    reads: str  # the kind of data, see `load_dataset`
    name_flag: str = "--run_name"


PRETRAIN = Stage("pretrain", "pretrain", "none", "pretrain")
FULL_SFT = Stage("full_sft", "full_sft", str(BASE_DIR), "sft")
LORA = Stage("lora", "lora", str(BASE_DIR), "sft", "--lora_name")


def make_stage_parser(doc: str, stage: Stage) -> ArgumentParser:
    """Make a parser with the flags of all stages; a script sets other defaults and adds its own."""
    parser = make_parser(doc, usage="%(prog)s [flags]; --help explains them")
    add_run_flags(parser, stage)
    add_model_flags(parser, stage)
    add_data_flags(parser, stage)
    add_optimization_flags(parser)
    add_logging_flags(parser)
    return parser


def add_run_flags(parser: ArgumentParser, stage: Stage) -> None:
    """Add flags: where the run goes, and how it computes."""
    add = parser.add_argument_group("run").add_argument
    name = stage.run_name
    add("--save_dir", type=Path, default=REPO_DIR / "out", help="where run folders go (out/)")
    add(stage.name_flag, dest="run_name", default=name, help=f"run folder ({name})")
    add("--from_resume", action="store_true", help="continue this run from its resume.pt")
    add("--overwrite", action="store_true", help="delete the run folder first if it exists")
    add("--seed", type=limit(int, 0, 2**32 - 1), default=42, help="data, weights, dropout (42)")
    device = "(auto); on a busy CPU set OMP_NUM_THREADS to the cores that are free"
    add("--device", choices=DEVICES, default="auto", help=device)
    dtype = "of matrix products, not of weights (auto: bfloat16 where it is fast)"
    add("--dtype", choices=("auto", *DTYPES), default="auto", help=dtype)
    modes = {"nargs": "?", "choices": ("auto", "on", "off"), "const": "on"}
    add("--use_compile", **modes, default="auto", help="compile layers and loss (auto: long runs)")
    add("--num_workers", type=COUNT, default=0, help="data loading processes (0)")


def add_model_flags(parser: ArgumentParser, stage: Stage) -> None:
    """Add flags: where the weights come from, and their shape."""
    add = parser.add_argument_group("model").add_argument
    start = stage.from_weight
    add("--from_weight", default=start, help=f"start: folder, hub id, none ({start})")
    add("--tokenizer_path", type=Path, help="folder (the weights' own)")
    for flag, value in DEFAULT_SHAPE.items():
        if flag == "qk_norm":
            text = "normalize queries and keys (Qwen3)"
            add("--qk_norm", action="store_true", default=None, help=text)
        else:
            text = f"of random weights ({value}); of others it must agree"
            add(f"--{flag}", type=SIZE, help=text)


def add_data_flags(parser: ArgumentParser, stage: Stage) -> None:
    """Add flags: what is read."""
    add = parser.add_argument_group("data").add_argument
    paths = {"type": Path, "nargs": "+", "default": []}
    fields = CHAT_FIELDS if stage.reads == "sft" else '"text"'
    add("--data_path", **paths, help=f"JSONL or JSONL.gz of {fields} (the small world)")
    add("--eval_data_path", **paths, help="held-out JSONL for validation")
    add("--max_seq_len", type=limit(int, 2), default=MAX_SEQ_LEN, help="tokens a sample (340)")
    if stage.reads == "sft":
        add("--show_answers", type=COUNT, default=3, help="held-out answers to print at last (3)")
        add("--max_train_samples", type=SIZE, help="so many, drawn alike for every --seed (all)")
    add("--show_sample", action="store_true", help="print a sample's tokens beside labels and exit")


def add_optimization_flags(parser: ArgumentParser) -> None:
    """Add flags: steps, batches and rates."""
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


def add_logging_flags(parser: ArgumentParser) -> None:
    """Add flags: how often a run logs, validates and saves."""
    add = parser.add_argument_group("logging and saving, in optimizer steps").add_argument
    add("--log_interval", type=SIZE, default=10, help="a line of metrics.jsonl (10)")
    add("--eval_interval", type=COUNT, default=0, help="validation; 0: at the end only (0)")
    add("--save_interval", type=COUNT, default=500, help="resume.pt; 0: at the end only (500)")
    add("--keep_checkpoints", type=COUNT, default=0, help="sets of weights at equal steps (0)")
    trackers = ("none", *LOGGER_TYPE_TO_CLASS)
    add("--report_to", choices=trackers, default="none", help="a tracker of accelerate (none)")


def parse_args(parser: ArgumentParser, argv: list[str] | None, stage: Stage) -> Namespace:
    """Parse and check the flags, and fill in defaults; nothing is written."""
    args = parser.parse_args(argv)
    changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    check_flags(args, changed)
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.from_weight == "none":
        for flag, value in DEFAULT_SHAPE.items():
            if flag not in changed:
                setattr(args, flag, value)
    if not args.data_path:
        files = list_files(FILES_DIR)
        args.data_path = [files[stage.reads]]
        args.eval_data_path = args.eval_data_path or [files[f"{stage.reads}_valid"]]
        if args.from_weight == "none" and args.tokenizer_path is None:
            args.tokenizer_path = BASE_DIR
    elif args.from_weight == str(BASE_DIR) and "from_weight" not in changed:
        print("note: this starts from the small world's base; --from_weight names another")
    return args


def check_flags(args: Namespace, changed: set[str]) -> None:
    """Refuse values that cannot work; `changed` names the flags that were given."""
    name = args.run_name
    if Path(name).name != name or name in ("", "..") or not name.isprintable():
        raise UserError(f"--run_name or --lora_name {name!r}: must be a plain folder name")
    for pair in (("epochs", "max_steps"), ("from_resume", "overwrite")):
        if changed.issuperset(pair):
            raise UserError(f"--{' and --'.join(pair)}: contradict each other; give one")
    if args.lr_schedule == "constant" and "min_lr_ratio" in changed:
        reason = "--lr_schedule constant has no last rate"
        raise UserError(f"--min_lr_ratio: {reason}; drop one of both")
    if args.eval_interval and args.data_path and not args.eval_data_path:
        raise UserError("--eval_interval: needs --eval_data_path beside --data_path")
    tracker = args.report_to
    if tracker not in ("none", *map(str, get_available_trackers())):
        raise UserError(f"--report_to {tracker}: is not installed; pip install {tracker}")
    if args.from_weight.endswith(".pth"):
        remedy = "convert it to a folder by trainer/convert_minimind.py"
        raise UserError(f"--from_weight {args.from_weight}: {remedy}")
    for path in (*args.data_path, *args.eval_data_path):
        if not path.is_file():
            raise UserError(f"--data_path or --eval_data_path {path}: no such file")
