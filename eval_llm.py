r"""Probes saved checkpoints with prompts, measures them on held-out data, or chats with one.

    python eval_llm.py --list
    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora_all
    python eval_llm.py --model out/lora_all --prompts dataset/data/dolly_valid.jsonl.gz \
        --limit 500 --nll_data dataset/data/dolly_valid.jsonl.gz --output_dir out/probes
    python eval_llm.py --model out/full_sft --no_generation \
        --nll_data dataset/data/dolly_valid.jsonl.gz \
        --text_nll_data dataset/data/simplewiki_valid.jsonl.gz
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote (one with adapter_config.json is an adapter, and
names its base), or a MiniMind .pth file. All get the same prompts in the same chat template, a base
model that was never fine-tuned included. For each, `evaluation/model_outputs/<name>/` receives

    samples.jsonl        a line per prompt, decoding and seed: output, translations, measures
    samples.md           the same to read
    results.json         rates with 95% Wilson intervals, NLL, and where all of it came from
    nll.json             with --nll_data or --text_nll_data: NLL by sequence, for paired comparisons
    translations.jsonl   every translation of prompts and outputs, kept for good

With --rates_only it receives rates_<prompts>.json alone: results.json's content and no text, for
prompts that must not be published.

The same command with as many threads writes the same bytes on the same machine. Translations are
made by --translator, or by hand in samples.jsonl (see evaluation/translations.py). The measures are
defined in evaluation/metrics.py and likelihood.py; those that evaluation/calibration.json
found unable to tell reference answers from controls are not shown. The row "references" measures
the reference answers.

With several models, the table of differences compares each with the first, prompt by prompt. The
Wilson intervals treat answers as independent; with several seeds, read the differences' instead.
Sampling seeds are no replication of the training: one run a method stays one run.
"""

import argparse
import platform
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from dataset.jsonl import file_sha256
from evaluation.arguments import DTYPES, parse_args
from evaluation.calibrate import calibrate_judge, load_judge, read_hidden
from evaluation.chat import chat
from evaluation.checkpoints import (
    RUN_COLUMNS,
    Checkpoint,
    find_checkpoints,
    load_checkpoint,
    run_rows,
)
from evaluation.likelihood import (
    CANDIDATES,
    Judge,
    add_topic_measures,
    check_independence,
    held_out_nll,
)
from evaluation.outputs import (
    DIFFERENCE_COLUMNS,
    NLL_COLUMNS,
    difference_rows,
    nll_row,
    print_nll_counts,
    print_rows,
    print_table,
    table_rows,
    write_nll,
    write_outputs,
    write_rates,
)
from evaluation.probe import DECODINGS, UNSAVED, ask, decoding_of, reference_samples, runs_of
from evaluation.prompts import Prompt, read_prompts
from evaluation.summary import NotComparable, compare, compare_all_nll, summarize
from evaluation.translations import (
    Store,
    Translator,
    fill_slots,
    load_translator,
    read_store,
    translate_missing,
    write_store,
)
from model.generation import Decoder
from model.model_minimind import MiniMindForCausalLM
from trainer.failures import run_script
from trainer.machine import keep_freed_memory
from trainer.run_folder import checkpoint_name, weights_sha256

RUN_FACTS = ("stage", "status", "settings", "steps", "trainable_parameters", "eval_loss", "git")


# ----------------------------------------------------------------------------------------- probing


@dataclass(frozen=True)
class Probe:
    """What one call uses for every checkpoint."""

    prompts: list[Prompt]
    judge: Judge | None
    judge_facts: dict | None  # what results.json says of the judge
    translator: Translator | None
    hidden: list[str]  # measures that are not shown


@dataclass(frozen=True)
class Probed:
    """What was measured on one checkpoint."""

    name: str
    samples: list[dict]
    nll: dict[str, dict | None]  # what `measure_nll` returns
    results: dict


def run_probes(args: argparse.Namespace) -> None:
    """Probes every model given, writes its folder, and prints the comparison."""
    checkpoints = find_checkpoints(args.model, args.tokenizer_path)
    prompts = read_prompts(args.prompts, args.limit)
    folders = [args.output_dir / found.name for found in checkpoints]
    stores = [{} if args.rates_only else read_store(folder, prompts) for folder in folders]
    for folder in folders:
        if not args.rates_only and (folder / "samples.jsonl").is_file():
            print(f"{folder}: its answers will be replaced; another --output_dir keeps them")
    probe = prepare(checkpoints, prompts, args)
    probed = []
    for checkpoint, folder, store in zip(checkpoints, folders, stores, strict=True):
        found = probe_checkpoint(checkpoint, probe, args)
        if args.rates_only:
            write_rates(folder, args.prompts, found.results)
        else:
            cut = translate_samples(found.samples, store, probe.translator)
            found.results["provenance"]["translations_cut"] = cut
            write_store(folder, store)
            write_outputs(folder, checkpoint.name, found.samples, found.results)
        write_nll(folder, provenance(checkpoint) | compute(args), found.nll)
        probed.append(found)
    print_table([row for found in probed for row in table_rows(found.name, found.results)])
    print_nll_counts(probed[0].nll)  # the same data for all
    print_differences(probed, probe.hidden)
    print(f"wrote {', '.join(map(str, folders))}")


def prepare(
    checkpoints: list[Checkpoint], prompts: list[Prompt], args: argparse.Namespace
) -> Probe:
    """Loads judge and translator, calibrates the judge, and reads which measures are shown."""
    hidden = [name for name in read_hidden() if name != "off_topic"]  # of another judge
    judge = facts = None
    if args.judge:
        judge = load_judge(args.judge, args.device, DTYPES[args.dtype])
        facts = judge_facts(judge, checkpoints, prompts, args.batch_size)
        if not facts["calibration"]["separates"]:
            print("--judge: cannot tell reference answers from shuffled ones; off-topic not shown")
            hidden += ["off_topic", "prompt_pmi"]
    translator = load_translator(args.translator, args.device) if args.translator else None
    return Probe(prompts, judge, facts, translator, hidden)


def judge_facts(
    judge: Judge, checkpoints: list[Checkpoint], prompts: list[Prompt], batch_size: int
) -> dict:
    """Who judges, how independent it is, and how well it knows references from shuffled ones."""
    relatives = check_independence(judge, checkpoints)
    if relatives:
        print(f"--judge: was trained from the same base as {', '.join(relatives)}")
    return {
        "checkpoint": judge.checkpoint.name,
        "weights_sha256": weights_sha256(judge.checkpoint.path),
        "shares_base_with": relatives,
        "candidates": CANDIDATES,
        "calibration": calibrate_judge(judge, prompts, batch_size),
    }


def loaded(
    checkpoint: Checkpoint, args: argparse.Namespace
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]:
    """The model and the tokenizer of a checkpoint, as the flags say."""
    dtype = DTYPES[args.dtype]
    return load_checkpoint(
        checkpoint, args.tokenizer_path, args.device, dtype, args.num_attention_heads
    )


def probe_checkpoint(checkpoint: Checkpoint, probe: Probe, args: argparse.Namespace) -> Probed:
    """The answers of one checkpoint and what they and its likelihoods come to."""
    model, tokenizer = loaded(checkpoint, args)
    nll = measure_nll(model, tokenizer, args)
    runs = list(runs_of(args.decoding, args.seeds))
    samples = ask(
        model, tokenizer, probe.prompts, runs, args.max_new_tokens, args.batch_size, checkpoint.name
    )
    references = reference_samples(tokenizer, probe.prompts)
    if probe.judge:
        add_topic_measures(probe.judge, probe.prompts, samples + references, args.batch_size)
    groups = {"references": references}
    groups |= {name: [s for s in samples if s["decoding"] == name] for name in args.decoding}
    results = {
        "provenance": provenance(checkpoint) | asked(probe, args),
        **{name: found and without_sequences(found) for name, found in nll.items()},
        "judge": probe.judge_facts,
        "not_shown": probe.hidden,
        "decodings": {
            name: summarize(group, probe.hidden) for name, group in groups.items() if group
        },
    }
    for sample in samples:
        for name in UNSAVED:
            del sample[name]
    return Probed(checkpoint.name, samples, nll, results)


def measure_nll(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> dict[str, dict | None]:
    """NLL on conversations ("nll") and on pretraining text ("text_nll"); None without data."""
    nll = {"nll": None, "text_nll": None}
    size = (args.max_seq_len, args.batch_size)
    if args.nll_data:
        nll["nll"] = held_out_nll("sft", model, tokenizer, args.nll_data, *size)
    if args.text_nll_data:
        nll["text_nll"] = held_out_nll("pretrain", model, tokenizer, args.text_nll_data, *size)
    return nll


def without_sequences(nll: dict) -> dict:
    """An NLL without its values by sequence, which nll.json has."""
    return {name: value for name, value in nll.items() if name != "sequences"}


def translate_samples(samples: list[dict], store: Store, translator: Translator | None) -> int:
    """Fills the translation slots from what is known, and from `translator`.

    Returns:
        How many lines were too long for the translator, and cut.
    """
    fill_slots(samples, store)
    if not translator:
        return 0
    cut = translate_missing(samples, store, translator)
    fill_slots(samples, store)
    if cut:
        print(f"--translator: {cut} lines were longer than it reads or writes, and were cut")
    return cut


def provenance(checkpoint: Checkpoint) -> dict:
    """What was measured: the checkpoint, its run, and versions."""
    run = checkpoint.run_record()
    return {
        "checkpoint": checkpoint.name,
        "base": checkpoint.base and checkpoint_name(checkpoint.base),
        "weights_sha256": weights_sha256(checkpoint.path),
        "run": {name: run.get(name) for name in RUN_FACTS} if run else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def asked(probe: Probe, args: argparse.Namespace) -> dict:
    """Which prompts were asked, and how answers were generated and translated."""
    return {
        "prompts": {
            "file": args.prompts.name,
            "sha256": file_sha256(args.prompts),
            "count": len(probe.prompts),
        },
        "generation": {
            "decodings": {name: DECODINGS[name] for name in args.decoding},
            "seeds": args.seeds,
            "max_new_tokens": args.max_new_tokens,
            **compute(args),
        },
        "translator": probe.translator and probe.translator.name,
    }


def compute(args: argparse.Namespace) -> dict:
    """What last bits depend on."""
    return {
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
    }


def print_differences(probed: list[Probed], hidden: list[str]) -> None:
    """How every checkpoint differs from the first, where they can be compared."""
    first, *others = probed
    for other in others:
        found = {}
        try:
            found |= compare(first.samples, other.samples)
        except NotComparable as error:
            print(f"answers of {other.name} cannot be compared with {first.name}'s: {error}")
        try:
            found["-"] = compare_all_nll(first.nll, other.nll)
        except NotComparable as error:
            print(f"NLL of {other.name} cannot be compared with {first.name}'s: {error}")
        print(f"\n{other.name} minus {first.name}, 95% intervals:")
        print_rows(DIFFERENCE_COLUMNS, difference_rows(found, hidden))


# ------------------------------------------------------------------------------------- other modes


def run_nll(args: argparse.Namespace) -> None:
    """Measures NLL only; saved answers and their results stay as they are."""
    checkpoints = find_checkpoints(args.model, args.tokenizer_path)
    probed = []
    for checkpoint in checkpoints:
        model, tokenizer = loaded(checkpoint, args)
        nll = measure_nll(model, tokenizer, args)
        write_nll(args.output_dir / checkpoint.name, provenance(checkpoint) | compute(args), nll)
        probed.append(Probed(checkpoint.name, [], nll, {}))
    print_rows(NLL_COLUMNS, [nll_row(found.name, found.nll) for found in probed])
    print_nll_counts(probed[0].nll)
    print_differences(probed, hidden=[])


def run_list(args: argparse.Namespace) -> None:
    """Shows the runs of a folder."""
    print_rows(RUN_COLUMNS, run_rows(args.list))


def run_chat(args: argparse.Namespace) -> None:
    """Chats with the one model given."""
    (checkpoint,) = find_checkpoints(args.model, args.tokenizer_path)
    model, tokenizer = loaded(checkpoint, args)
    decoding = args.decoding[0] if args.decoding != list(DECODINGS) else "t0.85p0.85"
    torch.manual_seed(args.seeds[0])
    try:
        chat(Decoder(model), tokenizer, decoding_of(tokenizer, decoding, args.max_new_tokens))
    except (EOFError, KeyboardInterrupt):
        print()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(__doc__, argv)
    if args.device == "cpu":
        keep_freed_memory()
    if args.list:
        run_list(args)
    elif args.interactive:
        run_chat(args)
    elif args.no_generation:
        run_nll(args)
    else:
        run_probes(args)
    return 0


if __name__ == "__main__":
    run_script(main)
