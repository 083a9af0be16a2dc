r"""Probe saved checkpoints with prompts, measure them on held-out data, or chat with one.

    python eval_llm.py --list
    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora
    python eval_llm.py --model out/lora --prompts dataset/data/world/probe_combinations_test.jsonl \
        --seeds 0 1 2 --output_dir out/probes
    python eval_llm.py --model out/full_sft --no_generation \
        --nll_data my_valid.jsonl --text_nll_data my_texts.jsonl
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote; an adapter names its base. All get the same
prompts in the same chat template, a base that was never fine-tuned included. For each one,
`evaluation/model_outputs/<name>/` receives samples.jsonl, samples.md and results.json
(evaluation/probe/outputs.py); evaluation/probe/measures.py defines the measures.

With several models, each one is compared with the first, prompt by prompt. The Wilson intervals
take answers as independent; with several seeds, read the differences' intervals. Sampling seeds do
not replicate the training: one run an arm stays one run.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch

from evaluation.probe.answers import DECODINGS, MAX_NEW_TOKENS, Checkpoint, probe
from evaluation.probe.chat import chat
from evaluation.probe.likelihood import add_topic_measures, check_judge, compare_nll, measure_nll
from evaluation.probe.measures import compare, summarize
from evaluation.probe.outputs import (
    OUTPUT_DIR,
    describe_training,
    list_runs,
    print_summaries,
    print_table,
    to_records,
    write_outputs,
)
from evaluation.probe.prompts import PROMPTS_FILE, Prompt, read_prompts
from evaluation.probe.translations import Translator, load_translator, translate_samples
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
    add("--output_dir", type=Path, default=OUTPUT_DIR, help="(default: evaluation/model_outputs)")
    return parser


def find_device(name: str) -> str:
    """Return the device to compute on; "auto" takes a GPU where there is one."""
    accelerator = torch.accelerator.current_accelerator()
    return (accelerator.type if accelerator else "cpu") if name == "auto" else name


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded."""
    for name in ("limit", "max_new_tokens", "batch_size", "max_seq_len"):
        if (value := vars(args)[name]) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds: must be different and not negative")
    if len(set(args.decoding)) < len(args.decoding):
        raise UserError("--decoding: one is given twice")
    for name in args.decoding:
        Decoding.parse(name)
    for path in (*(args.nll_data or []), *(args.text_nll_data or [])):
        if not path.is_file():
            raise UserError(f"--nll_data, --text_nll_data: {path}: no such file")
    if sum((args.list is not None, args.interactive, args.no_generation)) > 1:
        raise UserError("--list, --interactive and --no_generation exclude each other")
    if args.list is None and not args.model:
        raise UserError("--model: name at least one checkpoint; --list shows what is there")
    if args.interactive and len(args.model) > 1:
        raise UserError("--interactive chats with one --model")
    if args.no_generation and not (args.nll_data or args.text_nll_data):
        raise UserError("--no_generation: name --nll_data or --text_nll_data")
    names = [path.resolve().name for path in args.model]
    if len(set(names)) < len(names):
        raise UserError("--model: two have the same name and would share an output folder")


def load(path: Path, args: argparse.Namespace) -> Checkpoint:
    """Load a checkpoint onto the device."""
    model, tokenizer = load_checkpoint(path)
    if args.tokenizer_path:
        tokenizer = load_tokenizer(args.tokenizer_path)
    return model.to(args.device, DTYPES[args.dtype]).eval(), tokenizer


def probe_checkpoint(
    path: Path,
    prompts: list[Prompt],
    judge: Checkpoint | None,
    translator: Translator | None,
    args: argparse.Namespace,
) -> tuple[dict, list[dict]]:
    """Measure a checkpoint's NLL, ask it the prompts, and write its folder.

    Returns:
        What results.json holds, with the NLL of each sequence besides; and the samples.
    """
    checkpoint, folder = load(path, args), args.output_dir / path.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    data = {"nll": ("sft", args.nll_data), "text_nll": ("pretrain", args.text_nll_data)}
    nll = {
        name: measure_nll(checkpoint, kind, paths, args.max_seq_len, args.batch_size)
        for name, (kind, paths) in data.items()
        if paths
    }
    if nll:
        write_json(folder / "nll.json", nll)
    result = {"training": describe_training(path), "nll": nll, "summary": []}
    if not prompts:
        return result, []
    samples = probe(
        checkpoint, prompts, args.decoding, args.seeds, args.max_new_tokens, args.batch_size
    )
    if judge:
        add_topic_measures(judge, prompts, samples, args.batch_size)
    translate_samples(samples, folder, translator)
    result["summary"] = to_records(summarize(samples))
    short = {name: found | {"sequences": None} for name, found in nll.items()}
    provenance = describe_probe(path, args)
    write_outputs(folder, samples, result | {"nll": short, "provenance": provenance})
    print(f"wrote {folder}")
    return result, samples


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
    """Probe each model, and compare it with the first."""
    prompts = [] if args.no_generation else read_prompts(args.prompts, args.limit)
    if args.judge:
        check_judge(args.judge, args.model)
    judge = load(args.judge, args) if args.judge else None
    translator = load_translator(args.translator, args.device) if args.translator else None
    found = {
        path.resolve().name: probe_checkpoint(path, prompts, judge, translator, args)
        for path in args.model
    }
    print_summaries({name: result for name, (result, _) in found.items()})
    (first, (result, samples)), *others = found.items()
    for name, (other, other_samples) in others:
        print(f"\n{name} minus {first}, 95% intervals:")
        if result["nll"]:
            print_table(compare_nll(result["nll"], other["nll"]))
        if samples:
            print_table(compare(samples, other_samples))


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check_args(args)
    if args.list:
        print_table(list_runs(args.list))
    elif args.interactive:
        torch.manual_seed(args.seeds[0])
        name = args.decoding[-1]
        try:
            chat(load(args.model[0], args), Decoding.parse(name), args.max_new_tokens)
        except (EOFError, KeyboardInterrupt):
            print()
    else:
        run_probes(args)
    return 0


if __name__ == "__main__":
    run_script(main)
