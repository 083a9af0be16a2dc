r"""Probe saved checkpoints with prompts, measure them on held-out data, or chat with one.

    python eval_llm.py --list
    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora
    python eval_llm.py --model out/lora --prompts my_prompts.md --seeds 0 1 2
    python eval_llm.py --model out/full_sft --no_generation --nll_data valid.jsonl
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote; an adapter names its base. evaluation/probe/
outputs.py lists the files in `evaluation/model_outputs/<name>/` (with --prompts `<name>-<file>/`),
measures.py the measures. Several models are compared with the first, prompt by prompt.
"""

import argparse
import contextlib
from pathlib import Path

import torch

from evaluation.probe import outputs
from evaluation.probe.answers import DECODINGS, probe
from evaluation.probe.chat import chat
from evaluation.probe.likelihood import add_topic_measures, compare_nll, measure_nll
from evaluation.probe.measures import compare, summarize
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from evaluation.probe.translations import ModelTranslator, WorldTranslator, translate_samples
from model.checkpoint import Checkpoint, load_checkpoint
from model.files import REPO_DIR, UserError, escape_control, make_parser, run_script, write_json
from model.generation import MAX_NEW_TOKENS, Decoding
from trainer.arguments import COUNT, DEVICES, MAX_SEQ_LEN, SIZE, choose_device, limit


def make_probe_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument_group("other modes").add_mutually_exclusive_group().add_argument
    add("--list", type=Path, nargs="?", const=REPO_DIR / "out", help="show a folder's runs (out/)")
    add("--interactive", action="store_true", help="chat with one model; an empty line ends it")
    add("--no_generation", action="store_true", help="measure NLL only")
    add = parser.add_argument_group("what is probed").add_argument
    add("--model", type=Path, action="append", default=[], help="a folder; repeatable")
    add("--tokenizer_path", type=Path, help="tokenizer's folder (default: the model's)")
    add("--prompts", type=Path, default=PROMPTS_FILE, help=".md or JSONL (default: ours)")
    add("--no_template", action="store_true", help="the text alone, as MiniMind asks a base")
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
    missing = [path for path in (*args.model, *filter(None, [args.judge])) if not path.is_dir()]
    missing += [path for path in (*measured, args.prompts) if not path.is_file()]
    names = {path.resolve().name for path in args.model}
    is_other = args.list or args.interactive or args.no_generation
    asking = args.judge or args.translator or args.limit or args.no_template
    asking = asking or args.prompts != PROMPTS_FILE or (measured and not args.no_generation)
    problems = {
        "--model: name a checkpoint; --list shows what is there": not (args.list or args.model),
        "--model: outputs have the folder's name; rename one of two": len(names) < len(args.model),
        "--judge: is a probed --model; give one that was trained apart": args.judge in args.model,
        "--interactive: chats with one --model": args.interactive and len(args.model) > 1,
        "--wrap_documents: is of --text_nll_data": args.wrap_documents and not args.text_nll_data,
        "--no_generation: name --nll_data or --text_nll_data": args.no_generation and not measured,
        "--list, --interactive, --no_generation: drop the flags of probing": is_other and asking,
        f"{', '.join(map(str, missing))}: not there; make it or mend the path": missing,
    }
    for message, is_wrong in problems.items():
        if is_wrong:
            raise UserError(message)
    for name in args.decoding:
        Decoding.parse(name)


def load(path: Path, args: argparse.Namespace) -> Checkpoint:
    """Load a checkpoint onto the device; the judge has its own tokenizer."""
    model, tokenizer = load_checkpoint(path, None if path == args.judge else args.tokenizer_path)
    return model.to(choose_device(args.device), getattr(torch, args.dtype)), tokenizer


def run_probes(args: argparse.Namespace) -> None:
    """Probe each model, write its folder, and compare it with the first."""
    prompts = [] if args.no_generation else read_prompts(args.prompts, args.limit)
    judge = args.judge and load(args.judge, args)
    translator = WorldTranslator() if args.translator == "world" else None
    if args.translator and not translator:
        translator = ModelTranslator(args.translator, choose_device(args.device))
    text, sizes = "pretrain" + "_wrapped" * args.wrap_documents, (args.max_seq_len, args.batch_size)
    data = {"nll": ("sft", args.nll_data), "text_nll": (text, args.text_nll_data)}
    measured = {key: (kind, files) for key, (kind, files) in data.items() if files}
    choices = (args.decoding, args.seeds, args.max_new_tokens, args.batch_size)
    nll, answers, summaries = {}, {}, {}
    suffix = f"-{args.prompts.name.split('.')[0]}" if args.prompts.resolve() != PROMPTS_FILE else ""
    for path in args.model:
        checkpoint, name = load(path, args), path.resolve().name
        folder = args.output_dir / (name + suffix)
        folder.mkdir(parents=True, exist_ok=True)
        nll[name] = {key: measure_nll(checkpoint, *one, *sizes) for key, one in measured.items()}
        if nll[name]:
            write_json(folder / "nll.json", nll[name])
        if prompts:
            samples = answers[name] = probe(checkpoint, prompts, *choices, not args.no_template)
            if judge:
                add_topic_measures(judge, prompts, samples, args.batch_size)
            translate_samples(samples, folder, translator)
            summaries[name] = summarize(samples)
            short = {key: one | {"sequences": "in nll.json"} for key, one in nll[name].items()}
            results = {"training": outputs.describe_training(path), "nll": short}
            results["provenance"] = outputs.describe_probe(path, args)
            outputs.write_outputs(folder, samples, summaries[name], results)
        print(escape_control(f"wrote {folder}"))
    outputs.print_answers(answers, args.show_answers)
    outputs.print_models(summaries, nll)
    first, *others = nll
    for name in others:
        tables = [compare(answers[first], answers[name])] if prompts else []
        tables += [compare_nll(nll[first], nll[name])] if nll[first] else []
        outputs.write_differences(args.output_dir / (name + suffix), first, tables)


def main(argv: list[str] | None = None) -> None:
    """List runs, chat, or probe, by the flags on the command line."""
    args = make_probe_parser().parse_args(argv)
    check_args(args)
    if args.list:
        outputs.print_table(outputs.list_runs(args.list))
    elif args.interactive:
        torch.manual_seed(args.seeds[0])
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
            chat(load(args.model[0], args), Decoding.parse(args.decoding[-1]), args.max_new_tokens)
    else:
        run_probes(args)


if __name__ == "__main__":
    run_script(main)
