"""Calibrates the measures: which of them tell reference answers from deliberately spoiled ones?

    python evaluation/calibrate.py
    python evaluation/calibrate.py --judge out/full_sft
    python evaluation/calibrate.py --prompts dataset/data/dolly_valid.jsonl.gz --output dolly.json

Every measure is taken on the reference answers of a prompt set and on a control made of them:

    shuffled   each prompt gets the reference of another prompt in the same script
    half       the first half of the words of the reference (a reference recalls itself by
               definition, so content recall is tried on half of it)
    emptied    nothing before the end token
    endless    the reference without its end token
    repeated   the last words of the reference (at most 4) again and again up to the length limit,
               without an end token

Separation is the AUC, the chance that a reference scores better than a control, with its 95%
interval over prompts. **Rule: a measure is shown if in every prompt set that has it the lower end
of this interval is at least MIN_AUC.** For a yes-or-no measure, .6 means that it says yes 20 points
more often where it should. Corpus measures are taken on groups of answers, since they need text.
Blank and runaway separate by definition; what their calibration tells is how often they strike a
reference. Off-topic depends on the judge: `eval_llm.py --judge` calibrates it anew on the prompts
that it asks, by the same rule.

Writes `evaluation/calibration.json`, which `eval_llm.py` reads: what is not shown there is left out
of its tables and of results.json. The default prompt sets are in the repository, or generated.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dataset.command_line import Parser, SettingsError, check_writable
from dataset.demo import ensure_demo_corpus
from dataset.jsonl import DataError
from dataset.lm_dataset import encode_batch
from evaluation.checkpoints import find_checkpoint, load_checkpoint
from evaluation.intervals import CONFIDENCE, DRAWS, auc
from evaluation.likelihood import Judge, add_topic_measures
from evaluation.metrics import has_cjk, split_words
from evaluation.outputs import FLAGS, rounded
from evaluation.probe import answer_samples, make_sample
from evaluation.prompts import PROMPTS_FILE, Prompt, read_prompts
from evaluation.summary import CHARACTER_SLICES, TOKEN_SLICES, corpus_measures, rate
from model.checkpoint import load_tokenizer
from model.files import CheckpointError, read_json, write_text
from trainer.failures import run_script

CALIBRATION_FILE = Path(__file__).resolve().parent / "calibration.json"
MIN_AUC = 0.6
SHUFFLE_SEED = 0
LENGTH_LIMIT = 128  # tokens an answer may have, as in eval_llm.py
PHRASE_WORDS = 4
JUDGE_BATCH = 10  # answers that a judge reads at once
GROUP = 10  # answers that a corpus measure is taken on
QUANTILES = (0.05, 0.5, 0.95)
# What each measure is compared on, and whether more of it is better.
SAMPLE_MEASURES = {
    "check_strict": ("references", "shuffled", True),
    "check_loose": ("references", "shuffled", True),
    "content_recall": ("half", "shuffled", True),
    "blank": ("references", "emptied", False),
    "runaway": ("references", "endless", False),
    "loop": ("references", "repeated", False),
    "seq_rep_4": ("references", "repeated", False),
    "diversity": ("references", "repeated", True),
    "off_topic": ("references", "shuffled", False),
}
JUDGED = "off_topic"  # the measure that needs a judge
CORPUS_MEASURES = {
    "distinct_1": ("references", "repeated", True),
    "distinct_2": ("references", "repeated", True),
    "distinct_3": ("references", "repeated", True),
    "compression_ratio": ("references", "repeated", False),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        nargs="+",
        help="prompt sets with references, .md or JSONL (default: ours and the demo corpus')",
    )
    add("--judge", type=Path, help="checkpoint that tells off-topic answers (default: none)")
    add("--output", type=Path, default=CALIBRATION_FILE, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.output.is_dir():
        raise SettingsError(f"--output {args.output}: is a folder; name a file")
    check_writable(args.output.parent, "--output")
    return args


# --------------------------------------------------------------------------------------- controls


def shuffled_references(prompts: list[Prompt]) -> list[str]:
    """For each prompt another's reference, from a fixed seed, in the same script (Chinese or not).

    Raises:
        DataError: a script has a single prompt, so there is none to change places with.
    """
    generator = np.random.default_rng(SHUFFLE_SEED)
    answers = [prompt.reference for prompt in prompts]
    for is_chinese in (True, False):
        group = [i for i, prompt in enumerate(prompts) if has_cjk(prompt.text) == is_chinese]
        if len(group) == 1:
            raise DataError(f"{prompts[group[0]].id!r}: no other prompt in its script; add some")
        order = generator.permutation(group)
        for here, there in zip(order, np.roll(order, 1), strict=True):  # a cycle: none stays
            answers[here] = prompts[there].reference
    return answers


def first_half(text: str) -> str:
    """The first half of the words of a text, rounded up, joined by spaces."""
    words = split_words(text)
    return " ".join(words[: (len(words) + 1) // 2])


def repeated_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a text whose last words come again up to the length limit."""
    words = text.split() if not has_cjk(text) else split_words(text)
    gap = "" if has_cjk(text) else " "
    phrase = gap + gap.join(words[-PHRASE_WORDS:])
    (ids,) = encode_batch(
        tokenizer.backend_tokenizer, [text + phrase * LENGTH_LIMIT], special=False
    )
    return ids[:LENGTH_LIMIT]


def make_arms(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> dict[str, list[dict]]:
    """The samples of the references and of each control, in the order of `prompts`."""
    end = tokenizer.eos_token_id
    texts = [prompt.reference for prompt in prompts]
    ids = encode_batch(tokenizer.backend_tokenizer, texts, special=False)
    arms = {
        "references": [[*of_one, end][:LENGTH_LIMIT] for of_one in ids],  # long ones run away
        "emptied": [[end] for _ in ids],
        "endless": [of_one[:LENGTH_LIMIT] for of_one in ids],
        "repeated": [repeated_ids(tokenizer, text) for text in texts],
    }
    samples = {
        name: [
            make_sample(tokenizer, prompt, [], answer, name, None)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for name, answers in arms.items()
    }
    samples["shuffled"] = answer_samples(
        tokenizer, prompts, shuffled_references(prompts), "shuffled"
    )
    halves = [first_half(text) for text in texts]
    samples["half"] = answer_samples(tokenizer, prompts, halves, "half")
    return samples


# ------------------------------------------------------------------------------------- separation


def separation(references: list[float], controls: list[float], more_is_better: bool) -> dict:
    """AUC of references against controls, paired by prompt, and whether it passes the rule."""
    sign = 1 if more_is_better else -1
    found = auc(sign * np.array(references, dtype=float), sign * np.array(controls, dtype=float))
    return {
        "auc": rounded(found.estimate),
        "low": rounded(found.low),
        "high": rounded(found.high),
        "separates": found.low >= MIN_AUC,
    }


def describe_values(values: list[float]) -> dict:
    """A yes-or-no measure's rate, or the quantiles of another one."""
    if isinstance(values[0], bool):
        return rate(values)
    found = np.quantile(np.array(values, dtype=float), QUANTILES)
    return {f"q{q:g}": rounded(float(v)) for q, v in zip(QUANTILES, found, strict=True)}


def calibrate_samples(arms: dict[str, list[dict]], name: str) -> dict | None:
    """One measure of single answers; None if no prompt has it (no checks)."""
    positive, control, more_is_better = SAMPLE_MEASURES[name]
    values = [
        (a[name], b[name])
        for a, b in zip(arms[positive], arms[control], strict=True)
        if a[name] is not None and b[name] is not None  # no check, or under four tokens
    ]
    if not values:
        return None
    good, bad = map(list, zip(*values, strict=True))
    return {
        "n": len(values),
        "of": positive,
        "against": control,
        **separation(good, bad, more_is_better),
        positive: describe_values(good),
        control: describe_values(bad),
    }


def calibrate_corpus(arms: dict[str, list[dict]], name: str) -> dict:
    """One measure of groups of answers, the last incomplete group left out."""
    positive, control, more_is_better = CORPUS_MEASURES[name]
    groups = {
        arm: [arms[arm][i : i + GROUP] for i in range(0, len(arms[arm]) - GROUP + 1, GROUP)]
        for arm in (positive, control)
    }
    every = [group for of_arm in groups.values() for group in of_arm]
    slices = (
        slices_within(every, "output_ids", TOKEN_SLICES[0]),
        slices_within(every, "text", CHARACTER_SLICES[0]),
    )
    good, bad = (
        [corpus_measures(group, *slices)[name] for group in groups[arm]]
        for arm in (positive, control)
    )
    return {
        "n": len(good),
        "of": f"groups of {GROUP} {positive}",
        "against": control,
        **separation(good, bad, more_is_better),
        positive: describe_values(good),
        control: describe_values(bad),
    }


def slices_within(groups: list[list[dict]], field: str, size: int) -> tuple[int, int]:
    """Size and budget of `equal_slices` that the shortest of some groups of answers can fill."""
    return size, min(sum(len(sample[field][:size]) for sample in group) for group in groups)


def calibrate_judge(judge: Judge, prompts: list[Prompt], batch_size: int) -> dict:
    """How well `judge` tells the references of `prompts` from shuffled ones, by off-topic rate.

    Raises:
        DataError: fewer than ten prompts have a reference.
    """
    known = [prompt for prompt in prompts if prompt.reference]
    if len(known) < GROUP:
        raise DataError(
            f"--judge: {len(known)} prompts have a reference answer, and calibrating the judge "
            f"needs {GROUP}"
        )
    arms = {}
    answers = {
        "references": [prompt.reference for prompt in known],
        "shuffled": shuffled_references(known),
    }
    for name, texts in answers.items():
        arms[name] = answer_samples(judge.tokenizer, known, texts, name)
        add_topic_measures(judge, prompts, arms[name], batch_size)
    return calibrate_samples(arms, JUDGED)


def calibrate_set(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], judge: Judge | None
) -> dict:
    """Every measure on one prompt set."""
    known = [prompt for prompt in prompts if prompt.reference]
    if len(known) < GROUP:
        raise DataError(f"--prompts: {len(known)} reference answers; calibrating needs {GROUP}")
    arms = make_arms(tokenizer, known)
    measures = {name: calibrate_samples(arms, name) for name in SAMPLE_MEASURES if name != JUDGED}
    measures |= {name: calibrate_corpus(arms, name) for name in CORPUS_MEASURES}
    measures[JUDGED] = judge and calibrate_judge(judge, prompts, JUDGE_BATCH)
    return {"references": len(known), "measures": measures}


def decide(sets: dict[str, dict]) -> dict[str, bool | None]:
    """Whether each measure is shown: it separates wherever it was measured; None: nowhere was."""
    shown = {}
    for name in next(iter(sets.values()))["measures"]:
        found = [of_set["measures"][name] for of_set in sets.values()]
        verdicts = [measure["separates"] for measure in found if measure]
        shown[name] = all(verdicts) if verdicts else None
    return shown


def read_hidden(path: Path = CALIBRATION_FILE) -> list[str]:
    """The measures that a calibration says not to show.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; make it with python evaluation/calibrate.py")
    return [name for name, shown in read_json(path)["shown"].items() if shown is False]


# ------------------------------------------------------------------------------------------- main


def load_judge(path: Path, device: str, dtype: torch.dtype) -> Judge:
    """The judge checkpoint of a folder.

    Raises:
        CheckpointError: it is a .pth, which holds no tokenizer, or cannot be loaded.
    """
    checkpoint = find_checkpoint(path, flag="--judge")
    if not checkpoint.model_path.is_dir():
        raise CheckpointError(f"--judge {path}: holds no tokenizer; name a checkpoint's folder")
    return Judge(checkpoint, *load_checkpoint(checkpoint, None, device, dtype))


def calibrate(prompt_files: dict[str, Path], judge: Judge | None) -> dict:
    """What calibration.json holds."""
    tokenizer = load_tokenizer()
    sets = {
        name: calibrate_set(tokenizer, read_prompts(path), judge)
        for name, path in prompt_files.items()
    }
    return {
        "rule": f"shown where no set's {CONFIDENCE:.0%} AUC interval begins below {MIN_AUC}",
        "min_auc": MIN_AUC,
        "draws": DRAWS,
        "length_limit": LENGTH_LIMIT,
        "judge": judge and judge.checkpoint.name,
        "shown": decide(sets),
        "sets": sets,
    }


def print_calibration(calibration: dict) -> None:
    """One line for each set and measure."""
    for name, of_set in calibration["sets"].items():
        print(f"{name}: {of_set['references']} references")
        for measure, found in of_set["measures"].items():
            if not found:
                print(f"  {measure:18} not calibrated here")
                continue
            verdict = "separates" if found["separates"] else "DOES NOT SEPARATE"
            interval = f"AUC {found['auc']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
            print(f"  {measure:18} {interval}  {verdict}: {found['of']} from {found['against']}")
            if measure in FLAGS:
                print(f"  {'':18} strikes {found['references']['rate']:.1%} of the references")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    judge = load_judge(args.judge, "cpu", torch.float32) if args.judge else None
    if args.prompts:
        files = {path.name: path for path in args.prompts}
    else:
        files = {path.name: path for path in (PROMPTS_FILE, ensure_demo_corpus()["sft_valid"])}
    calibration = calibrate(files, judge)
    print_calibration(calibration)
    write_text(args.output, json.dumps(calibration, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
