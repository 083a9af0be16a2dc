"""Fills the page: one file, that opens from disk and asks no network for anything.

page.html.jinja is the frame, page.css its style, page.js its behavior. What the page tells is JSON
in a <script type="application/json">, whose every `<` is written \\u003c, so that nothing in it can
end the element; page.js puts it on the page as text only. A Content-Security-Policy lets the
browser run the one script and the one style of this build, known by their hashes, and load nothing.
"""

import base64
import hashlib
import json
import math
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dataset.untrusted import shown
from evaluation.metrics import find_loop
from evaluation.outputs import FLAGS, OFF_TOPIC, check_result
from evaluation.records import (
    RATES,
    Record,
    Recovery,
    families,
    method,
    peak_rate,
    rate_of_answers,
    recoveries,
    short,
    thin,
    unfinished,
)

FOLDER = Path(__file__).parent
SPECIAL = re.compile(r"<\|(?:endoftext|im_start|im_end)\|>")  # the measures leave these tokens out
CURVE_POINTS = 80
SPECTRUM_POINTS = 40


def page_html(records: list[Record], rates: dict[str, str]) -> str:
    """The page as one HTML text; `rates` are those that it shows, with their labels."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined
    )
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    page = environment.get_template("page.html.jinja").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=csp_hash(style),
        script_hash=csp_hash(script),
        data=Markup(embedded_json(page_data(records, rates))),
    )
    return page + "\n"


def csp_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded_json(data: object) -> str:
    """JSON that can stand in a script element: ASCII, and without any `<`."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


# -------------------------------------------------------------------------------------------- data


def page_data(records: list[Record], rates: dict[str, str]) -> dict:
    """All that the page tells. A part for which a checkpoint has no results is null or empty."""
    shares = recoveries(records)
    samples = [sample for record in records for sample in record.samples]
    prompts = first_samples(samples)
    numbers = {key: number for number, key in enumerate(prompts)}
    return {
        "rates": rates,
        "decodings": list(dict.fromkeys(sample["decoding"] for sample in samples)),
        "prompts": [prompt_facts(sample) for sample in prompts.values()],
        "checkpoints": [
            {
                "base": base,
                **record_facts(record, shares),
                "rates": rate_facts(record, rates),
                "outputs": [
                    output_facts(sample, numbers, hidden_of(record, rates))
                    for sample in record.samples
                ],
            }
            for base, members in families(records).items()
            for record in members
        ],
    }


def first_samples(samples: list[dict]) -> dict[tuple[str, str], dict]:
    """The first sample of every prompt, by id and text: an id may have had another text before."""
    found: dict[tuple[str, str], dict] = {}
    for sample in samples:
        found.setdefault((sample["id"], sample["prompt"]), sample)
    return found


def prompt_facts(sample: dict) -> dict:
    """What is the same for every answer to a prompt."""
    return {
        "id": sample["id"],
        "section": sample["section"],
        "text": shown(sample["prompt"]),
        "translation": sample["prompt_translation"] and shown(sample["prompt_translation"]),
        "check": sample["check"] and shown(check_words(sample["check"])),
    }


def check_words(check: dict) -> str:
    """A check for people: `contains any: seven, 7; max words: 5`."""
    parts = []
    for key, value in check.items():
        values = value if isinstance(value, list) else [value]
        parts.append(f"{key.replace('_', ' ')}: {', '.join(map(str, values))}")
    return "; ".join(parts)


def record_facts(record: Record, shares: dict[str, Recovery]) -> dict:
    """What is told of one checkpoint beside its answers."""
    run, rate = record.run or {}, peak_rate(record)
    return {
        "name": record.name,
        "method": method(record),
        "ending": unfinished(record).strip(),
        "data": record.data,
        "trainable": run.get("trainable_parameters"),
        "rate": rate and short(rate),
        "steps": run.get("step"),
        "nll": record.nll,
        "text_nll": record.text_nll,
        "recovery": recovery_facts(shares.get(record.name)),
        "curve": {
            "train": rounded_points(thin(record.curve, "loss", CURVE_POINTS)),
            "valid": rounded_points(thin(record.curve, "eval_loss", CURVE_POINTS)),
        },
        "spectra": spectra(record.update["matrices"] if record.update else []),
    }


def recovery_facts(found: Recovery | None) -> list[float] | None:
    """[R], or [R, low, high] where there is an interval."""
    if found is None:
        return None
    interval = found.interval
    return [found.share, *((interval.low, interval.high) if interval else ())]


def rate_facts(record: Record, rates: dict[str, str]) -> dict:
    """[k, n, low, high] by decoding and rate; the reference answers' too."""
    decodings = record.results["decodings"] if record.results else {}
    return {
        decoding: {
            key: [rate[part] for part in ("k", "n", "low", "high")]
            for key in rates
            if (rate := rate_of_answers(record, decoding, key))
        }
        for decoding in decodings
    }


def rounded_points(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points of a curve to a thousandth, which is finer than the page can draw."""
    return [(step, round(value, 3)) for step, value in points]


def spectra(matrices: list[dict]) -> dict[str, dict]:
    """By matrix: its update's spectrum, thinned, and the measures of its rank and its size."""
    return {
        matrix["name"]: {
            "values": thin_spectrum(matrix["singular_values"]),
            "r90": matrix["r90"],
            "effective": matrix["effective_rank"],
            "stable": matrix["stable_rank"],
            "relative": matrix["relative"],
        }
        for matrix in matrices
    }


def thin_spectrum(values: list[float]) -> list[tuple[int, float]]:
    """(rank, singular value), the rank counted from 1, at `SPECTRUM_POINTS` ranks or fewer.

    The ranks are evenly spaced on the logarithmic axis that they are drawn on; the last is kept.
    """
    share = math.log(len(values)) / (SPECTRUM_POINTS - 1)
    ranks = sorted({round(math.exp(point * share)) for point in range(SPECTRUM_POINTS)})
    return [(rank, float(f"{values[rank - 1]:.3g}")) for rank in ranks]


# ----------------------------------------------------------------------------------------- outputs


def hidden_of(record: Record, rates: dict[str, str]) -> set[str]:
    """The measures that are not shown of a record: by the calibration, or by its own judge's."""
    return {*record.hidden, *(key for key in RATES if key not in rates)}


def output_facts(sample: dict, prompts: dict[tuple, int], hidden: set[str]) -> dict:
    """One answer; what does not apply to it is left out, since there are thousands."""
    facts = {
        "prompt": prompts[sample["id"], sample["prompt"]],
        "decoding": sample["decoding"],
        "seed": sample["seed"],
        "tokens": sample["tokens"],
        "text": text_parts(sample, marks_loop="loop" not in hidden),
        "flags": [key for key in (*FLAGS, OFF_TOPIC) if key not in hidden and sample.get(key)],
        "translation": sample["output_translation"] and shown(sample["output_translation"]),
        "check": check_result(sample, hidden),
    }
    return {key: value for key, value in facts.items() if value not in (None, [], "")}


def text_parts(sample: dict, marks_loop: bool) -> list[str]:
    """The output, in one piece, or as [before, loop, after] if it ends in a loop.

    Unsafe characters are written as escapes in each piece.
    """
    output = sample["output"]
    span = loop_span(output) if marks_loop and sample["loop"] else None
    if span is None:
        return [shown(output)]
    start, end = span
    return [shown(output[:start]), shown(output[start:end]), shown(output[end:])]


def loop_span(output: str) -> tuple[int, int] | None:
    """Where `find_loop` finds a loop in `output`, special tokens left out as they are measured."""
    special = {i for match in SPECIAL.finditer(output) for i in range(*match.span())}
    kept = [i for i in range(len(output)) if i not in special]
    span = find_loop("".join(output[i] for i in kept))
    return span and (kept[span[0]], kept[span[1] - 1] + 1)
