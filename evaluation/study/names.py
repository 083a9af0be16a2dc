"""Names of sizes, decodings and methods, as prose, tables and figures use them."""

from dataclasses import dataclass

SIZES = {"xs": "1.3M", "s": "5.5M", "m26": "25M"}  # parameters
DECODINGS = {"greedy": "greedy", "t0.85p0.85": "sampled"}
OUTCOMES = {
    "composition": "composition",
    "plain": "plain questions",
    "unseen": "unseen things",
}

GREY = "#8a8a8a"
BLUE = "#1f5a99"
BLACK = "#1a1a1a"
GREEN = "#2e8b57"
ORANGE = "#c9772e"  # what has no color of its own

# What a figure or a table may have to say of a number.
ONE_RUN = "*"
TUNED_SHORTER = "†"
AT_EDGE = "‡"
FOOTNOTES = {
    ONE_RUN: r"\* One run on these prompts.",
    TUNED_SHORTER: "† The learning rate was chosen after fewer epochs than these.",
    AT_EDGE: "‡ The best learning rate of those that ran lies at the edge of its grid.",
}


@dataclass(frozen=True)
class Method:
    """A row of the short tables: which arm of study.toml stands for it at each size."""

    key: str  # in the names of inline values
    title: str
    color: str
    arms: dict[str, str]


def use_everywhere(arm: str) -> dict[str, str]:
    """Return one arm for all sizes."""
    return dict.fromkeys(SIZES, arm)


# The original LoRA on all layers and at a higher rate. At 25M round 3 tried rates with one seed
# alone; the better one on the tuning half stands here.
BOTH_MENDED = {"xs": "study_all_tuned", "m26": "study_all_tuned*0.0025"}

WIDTH_16 = {"xs": "all_r8", "s": "all_r16", "m26": "all_r32"}  # rank = width / 16

METHODS = [
    Method("base", "before fine-tuning", ORANGE, use_everywhere("base")),
    Method("original", "the original LoRA", GREY, use_everywhere("study")),
    Method(
        "original_tuned",
        "the original LoRA at its best rate",
        GREY,
        use_everywhere("study_tuned"),
    ),
    Method("r8", "all-layer LoRA, rank 8", BLUE, use_everywhere("all_r8")),
    Method("width16", "all-layer LoRA, rank = width/16", BLUE, WIDTH_16),
    Method("fft", "full fine-tuning", BLACK, use_everywhere("fft")),
    Method(
        "fft_frozen",
        "full fine-tuning, embedding frozen",
        GREEN,
        use_everywhere("fft_frozen"),
    ),
]

# LoRAs whose gap to full fine-tuning is reported, by the words of inline values.
GAP_LORAS = {
    "r8": use_everywhere("all_r8"),
    "width16": WIDTH_16,
    "r64": {"xs": "all_r64"},
}
