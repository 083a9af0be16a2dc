"""What bench.py measured, as Markdown: for the screen, and for the README through report.py."""

from statistics import median

METHODS = {"fft": "FFT", "lora_square": "LoRA, square r8", "lora_all": "LoRA, all-linear r8"}
TRAINING_COLUMNS = ("size", "trained", "tokens/s", "of the matrix peak", "Trainer's tokens/s")
TRAINING_COLUMNS += ("times as fast", "step beside FFT's", "compiling, s", "MiB", "Trainer's MiB")
GENERATION_COLUMNS = ("prompts", "type", "tokens/s", "transformers' tokens/s", "times as fast")
SWEEP_COLUMNS = ("batch", "trained", "tokens/s", "of the matrix peak", "MFU", "GPU busy", "MiB")


def markdown_table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Lay out a Markdown table; cells are Markdown already."""
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def bench_lines(result: dict) -> list[str]:
    """Every table, between what they were measured on and what no table holds."""
    lines = [machine_sentence(result), ""]
    rows = [
        training_row(size, method, measured)
        for size, measured in result["training"].items()
        for method in METHODS
    ]
    lines += [*markdown_table(TRAINING_COLUMNS, rows), "", peak_sentence(result)]
    lines += [floor_sentence(result), ""]
    lines += [*markdown_table(GENERATION_COLUMNS, generation_rows(result["generation"])), ""]
    lines += [generation_sentence(result["generation"]), "", *other_sentences(result)]
    lines += ["", sweep_sentence(result["sweep"]), ""]
    return lines + markdown_table(SWEEP_COLUMNS, sweep_rows(result))


def machine_sentence(result: dict) -> str:
    """Where, at which commit, and on what data."""
    machine, data = result["machine"], result["data"]
    where = machine["processor"]
    if machine["device"] == "cpu":
        where += f", {machine['threads']} threads"
    commit = result["git"].get("commit", "unknown")[:7]
    commit += " with changes" if result["git"].get("dirty") else ""
    return (
        f"`make bench`, at commit {commit} on {where}, in {result['dtype']}: batch "
        f"{result['batch_size']}, {data['conversations']:,} conversations of "
        f"{data['mean_tokens']:.0f} tokens in the mean and {data['max_tokens']} at most; medians "
        "(smallest and largest)."
    )


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def told_spread(values: dict[str, float], digits: int = 0) -> str:
    """`1,234 (1,200-1,300)`; one value stands alone."""
    median, low, high = (f"{values[name]:,.{digits}f}" for name in ("median", "min", "max"))
    return median if values["min"] == values["max"] else f"{median} ({low}-{high})"


def training_row(size: str, method: str, measured: dict) -> list[str]:
    """One row of `TRAINING_COLUMNS`."""
    ours, theirs = (measured["arms"][f"{engine}/{method}"] for engine in ("ours", "trainer"))
    full, share = measured["arms"]["ours/fft"], ours["share_of_peak"]
    return [
        f"{size}, {measured['parameters'] / 1e6:.1f}M",
        METHODS[method],
        told_spread(ours["tokens_per_second"]),
        f"{share['median']:.0%} ({share['min']:.0%}-{share['max']:.0%})",
        told_spread(theirs["tokens_per_second"]),
        told_spread(time_ratio(theirs, ours), 2),
        "1" if method == "fft" else told_spread(time_ratio(ours, full), 2),
        f"{ours['compile_seconds']:.0f}",
        f"{ours['peak_memory_bytes'] / 2**20:,.0f}",
        f"{theirs['peak_memory_bytes'] / 2**20:,.0f}",
    ]


def time_ratio(arm: dict, other: dict) -> dict[str, float]:
    """How many times as long as `other` an arm takes: median, smallest and largest.

    Of the turns, in each of which both take the same batch: a slow minute of the machine is in
    both.
    """
    return spread([a / b for a, b in zip(arm["seconds"], other["seconds"], strict=True)])


def floor_sentence(result: dict) -> str:
    """The least that an adapter's step can cost beside full fine-tuning's."""
    floors = [
        f"{told_spread(measured['floor'], 2)} at {size}"
        for size, measured in result["training"].items()
    ]
    return (
        "The floor of an adapter's step beside FFT's, with one adapter on the first block's q: "
        f"{', '.join(floors)}. Ratios are medians of the turns' own."
    )


def peak_sentence(result: dict) -> str:
    """What the matrix peak is at each size, and FFT's share of what the card's maker states."""
    peaks = [
        f"{measured['peak_flops_per_second']['median'] / 1e9:,.0f} at {size}"
        for size, measured in result["training"].items()
    ]
    text = f"The matrix peak, in GFLOP/s at a step's own shapes: {', '.join(peaks)}."
    if result["card_peak"] is None:
        return text
    shares = []
    for size, measured in result["training"].items():
        speed = measured["arms"]["ours/fft"]["tokens_per_second"]["median"]
        share = speed * nominal_flops_per_token("fft", measured) / result["card_peak"]
        shares.append(f"{share:.0%} at {size}")
    return f"{text} FFT's MFU, of {result['card_peak'] / 1e12:,.0f} TFLOP/s: {', '.join(shares)}."


def generation_rows(generation: dict) -> list[list[str]]:
    """The rows of `GENERATION_COLUMNS`."""
    rows = []
    for way, title in {"alone": "1", "batch": str(generation["prompts"])}.items():
        for dtype, engines in generation[way].items():
            ours, theirs = engines["ours"], engines["transformers"]
            ratio = told_spread(time_ratio(theirs, ours), 2)
            speeds = (told_spread(found["tokens_per_second"]) for found in (ours, theirs))
            rows.append([title, dtype, *speeds, ratio])
    return rows


def generation_sentence(generation: dict) -> str:
    """What was generated."""
    return (
        f"Generation at {generation['size']}, greedy: {generation['new_tokens']} tokens after "
        f"prompts of {generation['mean_prompt_tokens']:.0f} in the mean, the same weights."
    )


def other_sentences(result: dict) -> list[str]:
    """Start, tokenizing and loading, a sentence each."""
    start, tokens, loader = result["startup"], result["tokenizing"], result["loader"]
    loading = ", ".join(f"{time:.1f} ms with {count}" for count, time in loader.items())
    told = {name: told_spread(values, 1) for name, values in start.items()}
    ours, theirs = (told_spread(tokens[name], 1) for name in ("ours", "encode_batch"))
    return [
        f"A process begins its first step {told['cold']} s after its start, {told['warm']} s with "
        "tokens cached; that step, which compiles, takes another "
        f"{told['cold_first_step']} s, {told['warm_first_step']} s with code cached.",
        f"Tokenizing {', '.join(tokens['files'])} ({tokens['megabytes']:.1f} MB): {ours} MB/s from "
        f"JSONL to the cache, {theirs} MB/s by the tokenizer's own `encode_batch` alone.",
        f"Loading a step's batch, by data processes: {loading}.",
    ]


def sweep_sentence(sweep: dict) -> str:
    """What the table by batch size is of, and how to ask for it."""
    return f"By batch size at {sweep['size']}, with `--sweep {' '.join(sweep['batches'])}`:"


def sweep_rows(result: dict) -> list[list[str]]:
    """The rows of `SWEEP_COLUMNS`."""
    sweep, rows = result["sweep"], []
    measured = result["training"][sweep["size"]]
    for batch, methods in sweep["batches"].items():
        for method, found in methods.items():
            flops = found["tokens_per_second"]["median"] * nominal_flops_per_token(method, measured)
            busy, card = found["gpu_utilization"], result["card_peak"]
            rows.append(
                [
                    batch,
                    METHODS[method],
                    told_spread(found["tokens_per_second"]),
                    f"{flops / measured['peak_flops_per_second']['median']:.0%}",
                    "-" if card is None else f"{flops / card:.0%}",
                    "-" if busy is None else f"{busy:.0%}",
                    f"{found['peak_memory_bytes'] / 2**20:,.0f}",
                ]
            )
    return rows


def nominal_flops_per_token(method: str, measured: dict) -> int:
    """Model FLOPs of training on a token: 6 N, or 4 N where the N weights are frozen."""
    return (6 if method == "fft" else 4) * measured["parameters"]
