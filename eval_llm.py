r"""Probe saved checkpoints with prompts, measure them on held-out data, or chat with one.

    python eval_llm.py                 # the models of this repository
    python eval_llm.py --no_template   # asked as MiniMind asks a pretrained model
    python eval_llm.py --interactive   # chat with the best of them
    python eval_llm.py --list
    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora
    python eval_llm.py --model out/lora --prompts my_prompts.md --seeds 0 1 2
    python eval_llm.py --model out/lora --on_weights out/full_sft
    python eval_llm.py --model out/full_sft --no_generation --nll_data valid.jsonl
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote; an adapter names its base. evaluation/probe/
outputs.py lists the files in `evaluation/model_outputs/<name>/`, measures.py the measures. The name
is the model's folder; runs of the study have names in words (names.csv there). What is asked in
another way has a longer one: `-on-<weights>`, `-without-template`, and with --prompts `-<file>`.
Several models are compared with the first, prompt by prompt. Without --model the models of
model/trained/ answer a few prompts side by side, and nothing is written.
"""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

import torch

from evaluation.probe import console, outputs
from evaluation.probe.answers import DECODINGS, probe
from evaluation.probe.chat import chat
from evaluation.probe.likelihood import add_topic_measures, compare_nll, measure_nll
from evaluation.probe.measures import compare, summarize
from evaluation.probe.names import SHIPPED_DIR, list_shipped, name_folder, name_run, name_way
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from evaluation.probe.translations import ModelTranslator, WorldTranslator, translate_samples
from model.checkpoint import Checkpoint, find_base, load_checkpoint
from model.cli import COUNT, SIZE, UserError, escape_control, limit, make_parser, run_script
from model.files import REPO_DIR, read_json, write_json
from model.generation import MAX_NEW_TOKENS, Decoding
from model.machine import DEVICES, choose_device
from model.model_lora import ADAPTER_CONFIG
from trainer.arguments import BASE_DIR, MAX_SEQ_LEN

BEST = SHIPPED_DIR / "1.3M-full-fine-tuning-frozen-embedding"  # of all methods at 1.3M
SHOWN_PROMPTS = 3  # that the models of this repository answer, if --limit does not say how many
ASK_BARE = "--no_template asks them as MiniMind's script asks a pretrained model."
WHAT_NEXT = """Next: --limit 12 asks more, --prompts FILE asks yours, --interactive chats.
Models that you train are asked with --model."""
# Flags that do not decide what a model answers, and are not told in a command.
NOT_IN_COMMAND = {"model", "output_dir", "device", "show_answers"}


def make_probe_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("other modes").add_mutually_exclusive_group().add_argument
    add("--list", type=Path, nargs="?", const=REPO_DIR / "out", help="show a folder's runs (out/)")
    add("--interactive", action="store_true", help="chat with one model; an empty line ends it")
    add("--no_generation", action="store_true", help="measure NLL only")
    add = parser.add_argument_group("what is probed").add_argument
    add("--model", type=Path, action="append", default=[], help="a folder; repeatable (ours)")
    add("--tokenizer_path", type=Path, help="tokenizer's folder (default: the model's)")
    add("--prompts", type=Path, default=PROMPTS_FILE, help=".md or JSONL (default: ours)")
    add("--no_template", action="store_true", help="the text alone, as MiniMind asks a base")
    add("--on_weights", type=Path, help="put adapters on this model, not on their own base")
    add("--show_answers", type=COUNT, default=3, help="prompts to print answers to (3)")
    add("--limit", type=SIZE, help="only the first so many prompts")
    add("--nll_data", type=Path, nargs="+", help="conversations to measure response NLL on")
    add("--text_nll_data", type=Path, nargs="+", help="pretraining text to measure NLL on")
    add("--wrap_documents", action="store_true", help="that text as train_pretrain.py wraps it")
    add("--max_seq_len", type=limit(int, 2), default=MAX_SEQ_LEN, help="NLL: tokens a text (340)")
    add("--judge", type=Path, help="checkpoint, trained apart, that finds off-topic answers")
    add("--translator", help="'world', or a transformers model that translates into English")
    add = parser.add_argument_group("generation").add_argument
    add("--decoding", nargs="+", default=list(DECODINGS), help="greedy, t1.0, t0.85p0.85, ...")
    add("--seeds", type=COUNT, nargs="+", default=[0], help="of sampled decodings (0)")
    add("--max_new_tokens", type=SIZE, default=MAX_NEW_TOKENS, help="(default: %(default)s)")
    add("--batch_size", type=SIZE, default=32, help="prompts at once (default: %(default)s)")
    add("--device", choices=DEVICES, default="auto", help="(default: auto)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    add("--output_dir", type=Path, default=outputs.OUTPUT_DIR, help="evaluation/model_outputs")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    measured = [*(args.nll_data or []), *(args.text_nll_data or [])]
    if not (args.list or args.interactive or args.model):
        refuse_flags_of_models(args)
    names = {name_run(name_folder(path), args.output_dir) for path in args.model}
    if len(names) < len(args.model):
        raise UserError("--model: outputs have the folder's name; rename one of two")
    if args.judge in args.model:
        raise UserError("--judge: is a probed --model; give one that was trained apart")
    if args.interactive and len(args.model) > 1:
        raise UserError("--interactive: chats with one --model")
    if args.wrap_documents and not args.text_nll_data:
        raise UserError("--wrap_documents: is of --text_nll_data")
    if args.no_generation and not measured:
        raise UserError("--no_generation: name --nll_data or --text_nll_data")
    asking = [args.judge, args.translator, args.limit, args.no_template]
    asking.append(args.prompts != PROMPTS_FILE)
    asking.append(measured and not args.no_generation)
    asking.append(args.list and args.on_weights)
    if (args.list or args.interactive or args.no_generation) and any(asking):
        raise UserError("--list, --interactive, --no_generation: drop the flags of probing")
    folders = [*args.model, args.judge, args.on_weights]
    missing = [path for path in folders if path and not path.is_dir()]
    missing += [path for path in [*measured, args.prompts] if not path.is_file()]
    if missing:
        raise UserError(f"{', '.join(map(str, missing))}: not there; make it or mend the path")
    for path in args.model if args.on_weights else []:
        if not (path / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"--on_weights: {path} is a whole model; only adapters are put on others"
            )
    for name in args.decoding:
        Decoding.parse(name)


def refuse_flags_of_models(args: argparse.Namespace) -> None:
    """Refuse flags that say how a --model is measured, if none is named."""
    allowed = {"prompts", "no_template", "on_weights", "limit", "max_new_tokens", "batch_size"}
    allowed |= {"device", "dtype"}
    for name, value in vars(args).items():
        if name not in allowed and value != make_probe_parser().get_default(name):
            raise UserError(f"--{name}: name a --model; --list shows what is there")


def make_probe_command(args: argparse.Namespace, path: Path) -> str:
    """Return the command that probes a model alone in the same way.

    Paths outside the repository are shortened to their names.
    """
    words = ["python", "eval_llm.py", "--model", shorten_path(path)]
    for name, value in vars(args).items():
        if name in NOT_IN_COMMAND or value == make_probe_parser().get_default(name):
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [shorten_path(v) if isinstance(v, Path) else str(v) for v in values]
    return shlex.join(words)


def shorten_path(path: Path) -> str:
    """Return a path as seen from the repository; of one outside it, the name alone."""
    if path.resolve().is_relative_to(REPO_DIR):
        return path.resolve().relative_to(REPO_DIR).as_posix()
    return path.name


def load(path: Path, args: argparse.Namespace, base: Path | None = None) -> Checkpoint:
    """Load a checkpoint onto the device; an adapter on `base`, if that is given."""
    tokenizer_path = None if path == args.judge else args.tokenizer_path  # a judge has its own
    model, tokenizer = load_checkpoint(path, tokenizer_path, base)
    return model.to(choose_device(args.device), getattr(torch, args.dtype)), tokenizer


def warn_of_bare_prompts(path: Path) -> None:
    """Warn that a model that learned from conversations is asked without the chat template."""
    is_ours = outputs.describe_training(path)["stage"] in ("lora", "full_sft")
    if is_ours or (path / ADAPTER_CONFIG).is_file():
        verb = "was" if is_ours else "may have been"
        problem = f"{verb} trained with the chat template; asked without it, its answers say little"
        print(escape_control(f"warning: --no_template: {path} {problem}"), file=sys.stderr)


def choose_name(path: Path, args: argparse.Namespace) -> str:
    """Name a model's outputs by the model and by how it is asked, its prompts left out."""
    name = name_run(name_folder(path), args.output_dir)
    weights = args.on_weights and name_run(name_folder(args.on_weights), args.output_dir)
    return name_way(name, weights, not args.no_template)


def make_translator(args: argparse.Namespace) -> WorldTranslator | ModelTranslator | None:
    """Make the translator that --translator names."""
    if args.translator == "world":
        return WorldTranslator()
    if args.translator:
        return ModelTranslator(args.translator, choose_device(args.device))
    return None


def measure_likelihoods(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, dict]:
    """Measure the NLL of the held-out files that were named."""
    sizes = (args.max_seq_len, args.batch_size)
    nll = {}
    if args.nll_data:
        nll["nll"] = measure_nll(checkpoint, "sft", args.nll_data, *sizes)
    if args.text_nll_data:
        kind = "pretrain_wrapped" if args.wrap_documents else "pretrain"
        nll["text_nll"] = measure_nll(checkpoint, kind, args.text_nll_data, *sizes)
    return nll


def can_be_put_on(path: Path, weights: Path) -> bool:
    """Say whether a folder holds an adapter whose base has the shape of other weights."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    base = read_json(Path(find_base(path)) / "config.json")
    other = read_json(weights / "config.json")
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    return all(base[name] == other[name] for name in names)


def show_shipped(args: argparse.Namespace) -> None:
    """Print what the models of this repository answer, greedily, side by side; write nothing."""
    prompts = read_prompts(args.prompts, args.limit or SHOWN_PROMPTS)
    folders = {"1.3M-base": BASE_DIR} | {path.name: path for path in list_shipped()}
    how = "without the chat template of their training" if args.no_template else "greedily"
    print(f"Models of model/trained/ answer {how}; a program judges, and says so in brackets.")
    answers = {}
    for name, path in folders.items():
        if args.on_weights and not can_be_put_on(path, args.on_weights):
            continue
        answers[name] = probe(
            load(path, args, args.on_weights),
            prompts,
            ["greedy"],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            has_template=not args.no_template,
        )
    console.print_answers(answers, len(prompts))
    print()
    print(WHAT_NEXT)
    if not args.no_template:
        print(ASK_BARE)


def refuse_to_shorten(folder: Path, args: argparse.Namespace) -> None:
    """Refuse to replace saved answers to all prompts by answers to the first of them."""
    path = folder / "results.json"
    if args.limit and path.is_file() and read_json(path)["provenance"].get("limit") is None:
        raise UserError(
            f"--limit {args.limit}: {folder} holds answers to all prompts, which fewer would "
            "replace; name another folder with --output_dir"
        )


def run_probes(args: argparse.Namespace) -> None:
    """Probe each model, write its folder, and compare it with the first."""
    prompts = [] if args.no_generation else read_prompts(args.prompts, args.limit)
    judge = load(args.judge, args) if args.judge else None
    translator = make_translator(args)
    is_ours = args.prompts.resolve() == PROMPTS_FILE
    suffix = "" if is_ours else f"-{args.prompts.name.split('.')[0]}"
    folders = {}  # by name, like the next ones
    for path in args.model:
        name = choose_name(path, args)
        folders[name] = args.output_dir / (name + suffix)
        refuse_to_shorten(folders[name], args)
    nll, answers, summaries = {}, {}, {}
    for path, (name, folder) in zip(args.model, folders.items(), strict=True):
        if args.no_template:
            warn_of_bare_prompts(path)
        checkpoint = load(path, args, args.on_weights)
        folder.mkdir(parents=True, exist_ok=True)
        nll[name] = measure_likelihoods(args, checkpoint)
        if nll[name]:
            write_json(folder / "nll.json", nll[name])
        if prompts:
            answers[name] = probe(
                checkpoint,
                prompts,
                args.decoding,
                args.seeds,
                args.max_new_tokens,
                args.batch_size,
                has_template=not args.no_template,
            )
            if judge:
                add_topic_measures(judge, prompts, answers[name], args.batch_size)
            translate_samples(answers[name], folder, translator)
            summaries[name] = summarize(answers[name])
            size = {"model_parameters": outputs.count_parameters(checkpoint[0])}
            results = {
                "training": outputs.describe_training(path) | size,
                "nll": {
                    key: value | {"sequences": "in nll.json"} for key, value in nll[name].items()
                },
                "provenance": outputs.describe_probe(path, args)
                | {"command": make_probe_command(args, path)},
            }
            outputs.write_outputs(folder, answers[name], summaries[name], results)
        print(escape_control(f"wrote {folder}"))
    console.print_answers(answers, args.show_answers)
    console.print_models(summaries, nll)
    first, *others = nll
    for name in others:
        tables = [compare(answers[first], answers[name])] if prompts else []
        if nll[first]:
            tables.append(compare_nll(nll[first], nll[name]))
        console.write_differences(folders[name], first, tables)


def main(argv: list[str] | None = None) -> None:
    """List runs, chat, or probe, by the flags on the command line."""
    args = make_probe_parser().parse_args(argv)
    check_args(args)
    if args.list:
        outputs.print_table(console.list_runs(args.list))
    elif args.interactive:
        torch.manual_seed(args.seeds[0])
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
            (path,) = args.model or [BEST]
            checkpoint = load(path, args, args.on_weights)
            print(escape_control(f"chat with {name_folder(path)}"))
            chat(checkpoint, Decoding.parse(args.decoding[-1]), args.max_new_tokens)
    elif args.model:
        run_probes(args)
    else:
        show_shipped(args)


if __name__ == "__main__":
    run_script(main)
