r"""
Probes saved checkpoints with prompts, or chats with one.

    python eval_llm.py --model out/full_sft
    python eval_llm.py --model out/pretrain --model out/full_sft --model out/lora_r8
    python eval_llm.py --model out/lora_r8 --prompts dataset/data/dolly_valid.jsonl.gz \
        --limit 500 --nll_data dataset/data/dolly_valid.jsonl.gz --output_dir out/probes
    python eval_llm.py --model out/full_sft --interactive

A model is a folder that a training script wrote (one with adapter_config.json is an adapter, and
names its base), or a MiniMind .pth file. All get the same prompts in the same chat template, a base
model that was never fine-tuned included. For each, `evaluation/model_outputs/<name>/` receives

    samples.jsonl   a line per prompt, decoding and seed: prompt, output, translations, measures
    samples.md      the same to read
    results.json    rates with 95% Wilson intervals, NLL, and where all of it came from

The same command writes the same bytes. To translate an output, put the English into its
`output_translation` in samples.jsonl: it is kept for as long as prompt and output stay the same.
The measures are defined in evaluation/metrics.py. Intervals treat answers as independent: with
several seeds, compare per prompt instead. The row "references" measures the reference answers.
"""

import argparse
import hashlib
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, TextStreamer

from dataset.lm_dataset import (
    CACHE_DIR,
    IGNORE_INDEX,
    DataError,
    collate,
    encode_batch,
    encode_conversations,
    file_sha256,
    load_dataset,
)
from dataset.untrusted import error_line
from evaluation.metrics import (
    check_answer,
    compression_ratio,
    content_recall,
    distinct_n,
    diversity,
    is_blank,
    is_loop,
    is_runaway,
    seq_rep_n,
    wilson_interval,
)
from evaluation.outputs import (
    FLAGS,
    print_table,
    read_translations,
    shown,
    table_rows,
    write_outputs,
)
from evaluation.prompts import Prompt, read_prompts
from model.model_lora import ADAPTER_CONFIG, AdapterError, find_base, load_lora
from model.model_minimind import (
    TOKENIZER_DIR,
    CheckpointError,
    MiniMindForCausalLM,
    load_model,
    load_tokenizer,
    read_json,
)

REPOSITORY = Path(__file__).resolve().parent
PROMPTS_FILE = REPOSITORY / "evaluation" / "qualitative_prompts.md"
OUTPUT_DIR = REPOSITORY / "evaluation" / "model_outputs"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# top_k 0 turns off the top 50 that transformers would otherwise sample from.
DECODINGS = {
    "greedy": {"do_sample": False},
    "t1.0": {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "t0.85p0.85": {"do_sample": True, "temperature": 0.85, "top_p": 0.85, "top_k": 0},  # MiniMind's
}
DISTINCT_BUDGET = 1000  # tokens that distinct-n is counted over, the same for every checkpoint
RUN_FACTS = ("stage", "status", "settings", "steps", "trainable_parameters", "eval_loss", "git")
MEANS = ("tokens", "seq_rep_4", "diversity", "content_recall")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a value that cannot work ends here with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is probed")
    what.add_argument(
        "--model", type=Path, action="append", required=True, help="folder or .pth; repeatable"
    )
    what.add_argument(
        "--tokenizer_path",
        type=Path,
        help="tokenizer's folder (default: the model's; for a .pth, this repository's)",
    )
    what.add_argument(
        "--prompts", type=Path, default=PROMPTS_FILE, help="prompts, .md or JSONL (default: ours)"
    )
    what.add_argument("--limit", type=int, help="only the first so many prompts")
    what.add_argument(
        "--nll_data", type=Path, nargs="+", help="conversations to measure response NLL on"
    )
    what.add_argument(
        "--max_seq_len", type=int, default=512, help="tokens of an NLL conversation (default: 512)"
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
    how.add_argument("--device", default=default_device(), help="(default: %(default)s)")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument(
        "--output_dir", type=Path, default=OUTPUT_DIR, help="(default: evaluation/model_outputs)"
    )
    parser.add_argument("--interactive", action="store_true", help="chat; empty line to quit")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def default_device() -> str:
    """The accelerator's kind if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses values that cannot work, and flags that would be ignored."""
    for name in ("limit", "max_seq_len", "max_new_tokens", "batch_size"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds}: must be different and not negative")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device}: no such device; try cpu or cuda")
    here = ("cpu", default_device())
    if device.type not in here or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        parser.error(f"--device {args.device}: not on this machine; here: {', '.join(set(here))}")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir}: is a file; name a folder")
    if len(set(args.decoding)) < len(args.decoding):
        parser.error("--decoding: one is given twice")
    names = [checkpoint_name(path) for path in args.model]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--model: two are called {name!r} and would share an output folder")
    if args.interactive and len(args.model) > 1:
        parser.error("--interactive chats with one --model")
    if args.interactive and (args.nll_data or args.limit or args.prompts != PROMPTS_FILE):
        parser.error("--interactive asks and measures nothing: no --prompts, --limit, --nll_data")


# ----------------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A saved model, or an adapter with the base it belongs to."""

    name: str
    path: Path
    base: Path | None  # for an adapter

    @property
    def model_path(self) -> Path:
        """Where the full weights are."""
        return self.base or self.path


def checkpoint_name(path: Path) -> str:
    """The folder's name, or a .pth file's without its ending."""
    path = path.resolve()
    return path.stem if path.suffix == ".pth" else path.name


def find_checkpoint(path: Path) -> Checkpoint:
    """What `path` holds, before anything is loaded.

    Raises:
        CheckpointError: nothing is there, or the adapter's base is not.
        AdapterError: the adapter's config cannot be used.
    """
    name, config = checkpoint_name(path), path / ADAPTER_CONFIG
    if not path.exists():
        raise CheckpointError(f"--model {path}: no such file or folder; train it or mend the path")
    if not config.is_file():
        return Checkpoint(name, path, base=None)
    return Checkpoint(name, path, find_base(path))


def load_checkpoint(
    checkpoint: Checkpoint, args: argparse.Namespace
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]:
    """The model, adapter in place and not merged, ready to generate; and its tokenizer.

    Raises:
        CheckpointError: files do not fit, or a weight is not a number.
        AdapterError: the adapter does not fit, or was trained on another base.
    """
    model = load_model(checkpoint.model_path)
    if checkpoint.base:
        load_lora(model, checkpoint.path)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise CheckpointError(f"{checkpoint.path}: weights that are no numbers: the run diverged")
    own_tokenizer = checkpoint.model_path if checkpoint.model_path.is_dir() else TOKENIZER_DIR
    tokenizer = load_tokenizer(args.tokenizer_path or own_tokenizer)
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.model_path}: {model.config.vocab_size} tokens, but the tokenizer has "
            f"{len(tokenizer)}; give the model's own as --tokenizer_path"
        )
    tokenizer.padding_side = "left"  # so that every prompt ends where its answer begins
    return model.to(args.device, DTYPES[args.dtype]).eval(), tokenizer


# ------------------------------------------------------------------------------------ generation


def encode_prompts(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, up to where the assistant's answer begins."""
    conversations = [prompt.messages for prompt in prompts]
    encoded = encode_conversations(tokenizer, conversations, generation_prompt=True)
    return [ids for ids, _ in encoded]


def generation_config(
    tokenizer: PreTrainedTokenizerFast, decoding: str, max_new_tokens: int
) -> GenerationConfig:
    """The settings of one decoding; generation ends at the tokenizer's end token."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **DECODINGS[decoding],
    )


def generate(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    encoded: list[list[int]],
    config: GenerationConfig,
    batch_size: int,
    progress: tqdm,
) -> list[list[int]]:
    """New token ids for each of `encoded`, in its order; an end token that was produced is last."""
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    answers: dict[int, list[int]] = {}
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        inputs = tokenizer.pad({"input_ids": [encoded[i] for i in batch]}, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        output = model.generate(**inputs.to(model.device), generation_config=config)
        for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
            end = ids.index(config.eos_token_id) + 1 if config.eos_token_id in ids else len(ids)
            answers[i] = ids[:end]
        progress.update(len(batch))
    return [answers[i] for i in range(len(encoded))]


def runs_of(decodings: list[str], seeds: list[int]) -> Iterator[tuple[str, int | None]]:
    """Every decoding with every seed; greedy decoding draws nothing, so it runs once."""
    for decoding in decodings:
        for seed in seeds if DECODINGS[decoding]["do_sample"] else [None]:
            yield decoding, seed


def probe(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[Prompt],
    args: argparse.Namespace,
    name: str,
) -> list[dict]:
    """A sample for every decoding, seed and prompt, in that order."""
    encoded = encode_prompts(tokenizer, prompts)
    limit = model.config.max_position_embeddings - args.max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > limit:
            raise DataError(
                f"--prompts: {prompt.id!r} has {len(ids)} tokens, and {limit} is all that leaves "
                "room for the answer; shorten it or lower --max_new_tokens"
            )
    runs = list(runs_of(args.decoding, args.seeds))
    samples = []
    with tqdm(total=len(runs) * len(prompts), desc=name, unit=" answers", disable=None) as progress:
        for decoding, seed in runs:
            torch.manual_seed(seed or 0)
            config = generation_config(tokenizer, decoding, args.max_new_tokens)
            answers = generate(model, tokenizer, encoded, config, args.batch_size, progress)
            samples += [
                make_sample(tokenizer, prompt, rendered, answer, decoding, seed)
                for prompt, rendered, answer in zip(prompts, encoded, answers, strict=True)
            ]
    return samples


def make_sample(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    prompt_ids: list[int],
    answer_ids: list[int],
    decoding: str,
    seed: int | None,
) -> dict:
    """One line of samples.jsonl.

    `output` shows every token but the end token; the measures leave out special tokens, which say
    nothing: an answer of <|endoftext|> alone is blank.
    """
    stopped = answer_ids[-1:] == [tokenizer.eos_token_id]
    ids = answer_ids[:-1] if stopped else answer_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    recall = prompt.reference and content_recall(text, prompt.reference)
    return {
        "id": prompt.id,
        "section": prompt.section,
        "decoding": decoding,
        "seed": seed,
        "prompt": prompt.text,
        "prompt_translation": prompt.translation,
        "output": tokenizer.decode(ids),
        "output_translation": None,
        "output_ids": ids,
        "tokens": len(ids),
        "stopped": stopped,
        "blank": is_blank(text),
        "runaway": is_runaway(stopped),
        "loop": is_loop(text),
        "seq_rep_4": rounded(seq_rep_n(ids)),
        "diversity": rounded(diversity(ids)),
        "content_recall": rounded(recall),
        "check": prompt.check,
        "check_strict": prompt.check and check_answer(text, prompt.check),
        "check_loose": prompt.check and check_answer(text, prompt.check, strict=False),
        "prompt_sha256": hashlib.sha256(tokenizer.decode(prompt_ids).encode()).hexdigest(),
    }


def reference_samples(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> list[dict]:
    """The reference answers as if a model had given them: what every measure is calibrated on."""
    known = [prompt for prompt in prompts if prompt.reference]
    texts = [prompt.reference for prompt in known]
    encoded = encode_batch(tokenizer.backend_tokenizer, texts, special=False)
    return [
        make_sample(tokenizer, prompt, [], [*ids, tokenizer.eos_token_id], "references", None)
        for prompt, ids in zip(known, encoded, strict=True)
    ]


def rounded(value: float | None) -> float | None:
    """Six decimals, so that a last bit does not make two files differ."""
    return None if value is None else round(value, 6)


# --------------------------------------------------------------------------------------- results


def rate(flags: list[bool]) -> dict:
    """How often a flag is set, with its 95% Wilson interval."""
    low, high = wilson_interval(sum(flags), len(flags))
    value = sum(flags) / len(flags) if flags else None
    return {
        "rate": rounded(value),
        "k": sum(flags),
        "n": len(flags),
        "low": rounded(low),
        "high": rounded(high),
    }


def check_rates(samples: list[dict]) -> dict:
    """Strict and loose pass rates of the samples that have a check."""
    checked = [sample for sample in samples if sample["check"]]
    return {name: rate([s[name] for s in checked]) for name in ("check_strict", "check_loose")}


def summarize(samples: list[dict]) -> dict:
    """Rates and means over the samples of one decoding."""
    by_section: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        by_section[sample["section"]].append(sample)
    means = {name: [s[name] for s in samples if s[name] is not None] for name in MEANS}
    outputs = [sample["output_ids"] for sample in samples]
    return {
        "samples": len(samples),
        **check_rates(samples),
        **{name: rate([sample[name] for sample in samples]) for name in FLAGS},
        **{f"mean_{name}": rounded(fmean(v)) if v else None for name, v in means.items()},
        **{f"distinct_{n}": rounded(distinct_n(outputs, n, DISTINCT_BUDGET)) for n in (1, 2, 3)},
        "compression_ratio": rounded(compression_ratio("\n".join(s["output"] for s in samples))),
        "sections": {name: check_rates(group) for name, group in by_section.items()},
    }


@torch.inference_mode()
def response_nll(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    paths: list[Path],
    max_seq_len: int,
    batch_size: int,
    cache_dir: Path = CACHE_DIR,
) -> dict:
    """Mean negative log-likelihood of the response tokens in `paths`, in nats per token."""
    dataset = load_dataset("sft", paths, tokenizer, max_seq_len, cache_dir)
    by_length = sorted(range(len(dataset)), key=lambda i: int(dataset.lengths[i]))
    total, tokens = 0.0, 0
    for start in tqdm(range(0, len(dataset), batch_size), desc="NLL", leave=False, disable=None):
        samples = [dataset[i] for i in by_length[start : start + batch_size]]
        batch = collate(samples, tokenizer.pad_token_id)
        input_ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))
        tokens += int((labels[:, 1:] != IGNORE_INDEX).sum())
        total += model(input_ids, labels=labels, num_items_in_batch=1).loss.item()  # their sum
    return {
        "data": [{"name": path.name, "sha256": file_sha256(path)} for path in paths],
        "conversations": len(dataset),
        "max_seq_len": max_seq_len,
        "response_tokens": tokens,
        "nats_per_token": rounded(total / tokens),
    }


def provenance(checkpoint: Checkpoint, prompts: list[Prompt], args: argparse.Namespace) -> dict:
    """What made the outputs: checkpoint, its run, prompts, generation settings and versions."""
    run_file = checkpoint.path / "run.json"
    run = read_json(run_file) if run_file.is_file() else {}
    return {
        "checkpoint": checkpoint.name,
        "base": checkpoint.base and checkpoint_name(checkpoint.base),
        "weights_sha256": weights_sha256(checkpoint.path),
        "run": {name: run.get(name) for name in RUN_FACTS} if run else None,
        "prompts": {
            "file": args.prompts.name,
            "sha256": file_sha256(args.prompts),
            "count": len(prompts),
        },
        "generation": {
            "decodings": {name: DECODINGS[name] for name in args.decoding},
            "seeds": args.seeds,
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "dtype": args.dtype,
            "device": torch.device(args.device).type,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def weights_sha256(path: Path) -> str:
    """SHA-256 of the file that holds a checkpoint's own weights."""
    if path.is_file():
        return file_sha256(path)
    names = ("adapter_model.safetensors", "model.safetensors")
    return file_sha256(next(path / name for name in names if (path / name).is_file()))


# ------------------------------------------------------------------------------------------ chat


class SafeStreamer(TextStreamer):
    """Prints an answer as it is generated, without what could steer the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(shown(text), end="\n" if stream_end else "", flush=True)


def chat(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast, config: GenerationConfig
) -> None:
    """Answers line by line, remembering the conversation; an empty line or Ctrl-D ends it."""
    limit = model.config.max_position_embeddings - config.max_new_tokens
    streamer = SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while question := input("> ").strip():
        messages.append({"role": "user", "content": question})
        (ids, _), *_ = encode_conversations(tokenizer, [messages], generation_prompt=True)
        if len(ids) > limit:
            print(f"(the conversation has {len(ids)} tokens, the limit is {limit}: starting anew)")
            messages = []
            continue
        inputs = tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, generation_config=config, streamer=streamer)
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})


# ------------------------------------------------------------------------------------------ main


def run_chat(args: argparse.Namespace) -> None:
    """Chats with the one model given."""
    checkpoint = find_checkpoint(args.model[0])
    model, tokenizer = load_checkpoint(checkpoint, args)
    decoding = args.decoding[0] if args.decoding != list(DECODINGS) else "t0.85p0.85"
    torch.manual_seed(args.seeds[0])
    try:
        chat(model, tokenizer, generation_config(tokenizer, decoding, args.max_new_tokens))
    except (EOFError, KeyboardInterrupt):
        print()


def run_probes(args: argparse.Namespace) -> None:
    """Probes every model given, writes its folder, and prints the comparison."""
    checkpoints = [find_checkpoint(path) for path in args.model]
    folders = [args.output_dir / checkpoint.name for checkpoint in checkpoints]
    translations = [read_translations(folder / "samples.jsonl") for folder in folders]
    prompts = read_prompts(args.prompts, args.limit)
    for path in args.nll_data or []:
        if not path.is_file():
            raise DataError(f"--nll_data {path}: no such file")
    rows = []
    for checkpoint, folder, known in zip(checkpoints, folders, translations, strict=True):
        samples, results = probe_checkpoint(checkpoint, prompts, args)
        for sample in samples:
            sample["output_translation"] = known.get((sample["prompt"], sample["output"]))
        dropped = len(known.keys() - {(sample["prompt"], sample["output"]) for sample in samples})
        if dropped:
            print(f"{folder}: translations dropped because their outputs changed: {dropped}")
        write_outputs(folder, checkpoint.name, samples, results)
        rows += table_rows(checkpoint.name, results)
    print_table(rows, list(DECODINGS))


def probe_checkpoint(
    checkpoint: Checkpoint, prompts: list[Prompt], args: argparse.Namespace
) -> tuple[list[dict], dict]:
    """The samples and the results of one checkpoint."""
    model, tokenizer = load_checkpoint(checkpoint, args)
    nll = None
    if args.nll_data:
        nll = response_nll(model, tokenizer, args.nll_data, args.max_seq_len, args.batch_size)
    samples = probe(model, tokenizer, prompts, args, checkpoint.name)
    groups = {"references": reference_samples(tokenizer, prompts)}
    groups |= {name: [s for s in samples if s["decoding"] == name] for name in args.decoding}
    results = {
        "provenance": provenance(checkpoint, prompts, args),
        "nll": nll,
        "decodings": {name: summarize(group) for name, group in groups.items() if group},
    }
    for sample in samples:
        del sample["output_ids"]  # the text says the same
    return samples, results


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.interactive:
            run_chat(args)
        else:
            run_probes(args)
    except (DataError, CheckpointError, AdapterError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
