r"""Probe saved checkpoints with prompts, measure them on held-out data, or chat with one.

    python eval_llm.py --list
    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora
    python eval_llm.py --model out/lora --prompts dataset/data/world/probe_combinations_test.jsonl \
        --seeds 0 1 2 --output_dir out/probes
    python eval_llm.py --model out/full_sft --no_generation --nll_data valid.jsonl
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote; an adapter names its base. All get the same
prompts in the same chat template. For each one, `evaluation/model_outputs/<name>/` receives
samples.jsonl, samples.md and results.json; evaluation/probe/measures.py defines the measures.

With several models, each one is compared with the first, prompt by prompt. The Wilson intervals
take answers as independent; with several seeds, read the differences' intervals. Sampling seeds do
not replicate the training: one run an arm stays one run.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch

from evaluation.probe import outputs
from evaluation.probe.answers import DECODINGS, MAX_NEW_TOKENS, Checkpoint, probe
from evaluation.probe.chat import chat
from evaluation.probe.likelihood import add_topic_measures, check_judge, compare_nll, measure_nll
from evaluation.probe.measures import compare, summarize
from evaluation.probe.prompts import PROMPTS_FILE, read_prompts
from evaluation.probe.translations import load_translator, translate_samples
from model.checkpoint import load_checkpoint, load_tokenizer
from model.files import REPO_DIR, UserError, file_sha256, run_script, write_json
from model.generation import Decoding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("instead of probing").add_argument
    out = REPO_DIR / "out"
    add("--list", type=Path, nargs="?", const=out, metavar="FOLDER", help="show the runs in out/")
    add("--interactive", action="store_true", help="chat with one model; an empty line ends it")
    add("--no_generation", action="store_true", help="measure NLL only")
    add = parser.add_argument_group("what is probed").add_argument
    add("--model", type=Path, action="append", default=[], help="a folder; repeatable")
    add("--tokenizer_path", type=Path, help="tokenizer's folder (default: the model's)")
    add("--prompts", type=Path, default=PROMPTS_FILE, help=".md or JSONL (default: ours)")
    add("--show_answers", type=int, default=3, help="prompts whose answers are printed (3)")
    add("--limit", type=int, help="only the first so many prompts")
    add("--nll_data", type=Path, nargs="+", help="conversations to measure response NLL on")
    add("--text_nll_data", type=Path, nargs="+", help="pretraining text to measure NLL on")
    add("--max_seq_len", type=int, default=340, help="tokens of an NLL sequence (%(default)s)")
    add("--judge", type=Path, help="checkpoint, trained apart, that finds off-topic answers")
    add("--translator", help="'world', or a transformers model that translates into English")
    add = parser.add_argument_group("generation").add_argument
    add("--decoding", nargs="+", default=list(DECODINGS), help="greedy, t1.0, t0.85p0.85, ...")
    add("--seeds", type=int, nargs="+", default=[0], help="of sampled decodings (default: 0)")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help="(default: %(default)s)")
    add("--batch_size", type=int, default=32, help="prompts at once (default: %(default)s)")
    add("--device", type=find_device, default="auto", help="cpu, cuda or mps (default: auto)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    add("--output_dir", type=Path, default=outputs.OUTPUT_DIR, help="evaluation/model_outputs")
    return parser


def find_device(name: str) -> str:
    """Return the device to compute on; "auto" takes a GPU where there is one."""
    accelerator = torch.accelerator.current_accelerator()
    there = ["cpu", accelerator.type] if accelerator else ["cpu"]
    if name not in ("auto", *there):
        raise argparse.ArgumentTypeError(f"this machine has {' and '.join(there)}, not {name}")
    return there[-1] if name == "auto" else name


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    counts = ("limit", "max_new_tokens", "batch_size", "max_seq_len")
    too_small = [name for name in counts if vars(args)[name] is not None and vars(args)[name] < 1]
    measured = [*(args.nll_data or []), *(args.text_nll_data or [])]
    missing = [path for path in (*args.model, *filter(None, [args.judge])) if not path.is_dir()]
    missing += [path for path in measured if not path.is_file()]
    several = {"--model": [path.resolve().name for path in args.model]}
    several |= {"--seeds": args.seeds, "--decoding": args.decoding}
    twice = [flag for flag, values in several.items() if len(set(values)) < len(values)]
    modes = (args.list is not None, args.interactive, args.no_generation)
    asking = args.judge or args.translator or args.limit or args.prompts != PROMPTS_FILE
    problems = {
        f"--{', --'.join(too_small)}: must be at least 1": too_small,
        "--seeds: must not be negative": min(args.seeds) < 0,
        f"{', '.join(twice)}: give each name or number once": twice,
        "--list, --interactive and --no_generation exclude each other": sum(modes) > 1,
        "--model: name a checkpoint; --list shows what is there": not any((args.list, args.model)),
        "--interactive: chats with one --model": args.interactive and len(args.model) > 1,
        "--no_generation: name --nll_data or --text_nll_data": args.no_generation and not measured,
        "--judge, --translator, --limit, --prompts: are of probing; drop them": any(modes)
        and asking,
        f"{', '.join(map(str, missing))}: not there; train it or mend the path": missing,
    }
    for message, is_wrong in problems.items():
        if is_wrong:
            raise UserError(message)
    for name in args.decoding:
        Decoding.parse(name)


def load(path: Path, args: argparse.Namespace) -> Checkpoint:
    """Load a checkpoint onto the device."""
    model, tokenizer = load_checkpoint(path)
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path)
    return model.to(args.device, DTYPES[args.dtype]).eval(), tokenizer


def describe_probe(path: Path, args: argparse.Namespace) -> dict:
    """Describe where results come from: weights, prompts, settings, versions."""
    names = ("adapter_model.safetensors", "model.safetensors")
    weights = next(path / name for name in names if (path / name).is_file())
    keys = ("decoding", "seeds", "max_new_tokens", "batch_size", "dtype", "translator")
    return {
        "weights_sha256": file_sha256(weights),
        "prompts": {"file": args.prompts.name, "sha256": file_sha256(args.prompts)},
        "judge": args.judge and args.judge.resolve().name,
        **{key: vars(args)[key] for key in keys},
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def run_probes(args: argparse.Namespace) -> None:
    """Probe each model, write its folder, and compare it with the first."""
    prompts = [] if args.no_generation else read_prompts(args.prompts, args.limit)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.judge:
        check_judge(args.judge, args.model)
    judge = load(args.judge, args) if args.judge else None
    translator = load_translator(args.translator, args.device) if args.translator else None
    data = {"nll": ("sft", args.nll_data), "text_nll": ("pretrain", args.text_nll_data)}
    results, answers = {}, {}
    for path in args.model:
        checkpoint, name = load(path, args), path.resolve().name
        folder = args.output_dir / name
        folder.mkdir(exist_ok=True)
        nll = {
            key: measure_nll(checkpoint, kind, files, args.max_seq_len, args.batch_size)
            for key, (kind, files) in data.items()
            if files
        }
        if nll:
            write_json(folder / "nll.json", nll)
        training = outputs.describe_training(path)
        results[name] = {"training": training, "nll": nll, "summary": []}
        if prompts:
            samples = answers[name] = probe(
                checkpoint, prompts, args.decoding, args.seeds, args.max_new_tokens, args.batch_size
            )
            if judge:
                add_topic_measures(judge, prompts, samples, args.batch_size)
            translate_samples(samples, folder, translator)
            results[name]["summary"] = outputs.to_records(summarize(samples))
            short = {key: found | {"sequences": "in nll.json"} for key, found in nll.items()}
            saved = results[name] | {"nll": short, "provenance": describe_probe(path, args)}
            outputs.write_outputs(folder, samples, saved)
        print(f"wrote {folder}")
    outputs.print_answers(answers, args.show_answers)
    outputs.print_summaries(results)
    first, *others = results
    for name in others:
        print(f"\n{name} minus {first}, 95% intervals:")
        if results[first]["nll"]:
            outputs.print_table(compare_nll(results[first]["nll"], results[name]["nll"]))
        if answers:
            outputs.print_table(compare(answers[first], answers[name]))


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check_args(args)
    if args.list:
        outputs.print_table(outputs.list_runs(args.list))
    elif args.interactive:
        torch.manual_seed(args.seeds[0])
        decoding = Decoding.parse(args.decoding[-1])
        try:
            chat(load(args.model[0], args), decoding, args.max_new_tokens)
        except (EOFError, KeyboardInterrupt):
            print()
    else:
        run_probes(args)
    return 0


if __name__ == "__main__":
    run_script(main)
