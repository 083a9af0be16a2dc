"""What fine-tuning changed: dW = W - W0 of a checkpoint or an adapter, matrix by matrix.

    python evaluation/update_analysis.py --base out/pretrain --tuned out/full_sft     # analysis
    python evaluation/update_analysis.py --base out/pretrain --tuned out/lora_all \\
        --compare out/lora_minimind                           # do two updates share directions?

or checkpoints with a part of the update, ordinary folders in --output_dir for eval_llm.py and
transformers, each with a run.json that says how it was made:

    ... --truncate 1 2 4 8 16           <tuned>_rank<r>: dW of each linear cut to rank r
    ... --keep square mlp mlp,norms     <tuned>_only_<parts>: base and these parts' update alone
    ... --random_rank 8 --seed 0        <tuned>_random_rank8_seed0: a random update of rank 8 with
                                        the norm of dW in each linear, the control for --truncate
    ... --shrink                        <tuned>_no_intruders: each linear's update without its part
                                        along intruder dimensions, and <tuned>_shrunk, its control:
                                        the whole update scaled to the norm that this leaves

--truncate and --random_rank change the linears of the blocks. --rest says what becomes of the
update of embedding and norms: kept whole (the default), dropped, or changed alike, a vector
counting as a matrix of rank 1; the folder's name then ends in _rest_drop or _rest_alike. Matrices
of a smaller rank than asked keep their own.

The analysis is JSON, evaluation/results/<tuned>/update_analysis.json, computed in float64 and
rounded to 5 digits. Formulas, with their sources, are those of evaluation/spectra.py.

    provenance       base, tuned run, SHA-256 of the float32 weights, seed
    total            norm of the update over all weights; relative: over that of the base
    shares           by_kind (q_proj...) and by_layer: of the update's squared norm, and of the
                     parameters; what lies outside the blocks stands among the layers by its kind
    vectors          norms: name, kind, layer, frobenius and relative as for matrices
    unchanged        names of weights without an update
    matrices         a line each
      shape            [out, in]; of the embedding [tokens, width]
      frobenius        ||dW||_F; relative: ||dW||_F / ||W0||_F
      r90              the smallest r with s_1^2 + ... + s_r^2 >= .9 ||dW||_F^2
      effective_rank   exp(-sum p ln p), p = s / sum s
      stable_rank      ||dW||_F^2 / s_1^2
      intruders        left singular vectors of W among the top k = max(3, min(shape) / 50) whose
                       |cos| with every left singular vector of W0 is below .5
        max_cos          the largest |cos| of each of the k
        null95           95th percentile of the same for a random direction
        count            intruders
        random           intruders that dW's singular values make in random directions, mean of 5:
                         what the size of the update alone explains
        weight_share     share of ||W||_F^2 along the intruders
        update_share     ||U^T dW||_F^2 / ||dW||_F^2, U the intruders
      amplification    for each r: factor ||dW_r||_F / ||U^T W0 V||_F, with U and V the top r
                       singular vectors of dW; and its nulls, U and V random, or the top of W0
      singular_values  s of dW, descending, without those that are zero in float64

--compare writes evaluation/results/<tuned>/update_vs_<other>.json, whose matrices hold

      of               whose right singular vectors: A of two adapters, else dW
      phi              ||U_i^T U_j||_F^2 / min(i, j), a row for each i of the tuned run, a column
                       for each j of the other
      excess           (phi - null) / (1 - null), null = max(i, j) / in: 1 is the same subspace, 0
                       chance, null where the null is 1
      equal_norm       intruders of both, the larger dW scaled down to the norm of the smaller
"""

import argparse
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from dataset.command_line import Parser, SettingsError, check_writable
from evaluation.outputs import RESULTS_DIR, as_json
from evaluation.spectra import (
    amplification,
    describe_intruders,
    effective_rank,
    energy_rank,
    excess_similarity,
    intruder_directions,
    intruders_at_equal_norm,
    low_rank,
    random_low_rank,
    ranks_to_show,
    right_directions,
    similarity,
    stable_rank,
    svd,
    svd_of_update,
)
from model.checkpoint import (
    fill_weights,
    load_model,
    save_copy,
    tokenizer_folder,
    tokenizer_of,
    weights_fingerprint,
)
from model.files import CheckpointError, read_json, write_text
from model.model_lora import (
    ADAPTER_CONFIG,
    HEAD,
    TRAINABLE_PARTS,
    find_targets,
    load_lora,
    lora_layers,
    merged_model,
    select_trainable,
)
from model.model_minimind import MiniMindForCausalLM
from trainer.arguments import OUT_DIR
from trainer.failures import run_script
from trainer.run_folder import checkpoint_name, git_state

REST = ("keep", "drop", "alike")


# ----------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Base:
    """The checkpoint that fine-tuning started from; its weights in float64 by name."""

    path: Path
    model: MiniMindForCausalLM
    weights: dict[str, Tensor]
    fingerprint: str


@dataclass(frozen=True)
class Update:
    """What a run made of its base; tensors are float64, under the plain model's names."""

    name: str
    fingerprint: str  # of the tuned weights, an adapter merged
    delta: dict[str, Tensor]
    lora_a: dict[str, Tensor]  # A (r, in) of adapted linears; empty for a full checkpoint
    weights: Path  # whose tokenizer a changed copy gets: the base's for an adapter


def named_weights(model: MiniMindForCausalLM) -> dict[str, Tensor]:
    """Every weight in float64, a tied head once."""
    tensors = {name: tensor.double() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors[f"{HEAD}.weight"]
    return tensors


def load_base(path: Path, num_attention_heads: int | None = None) -> Base:
    """The base of a path; of its number of heads see `load_model`."""
    model = load_model(path, num_attention_heads)
    return Base(path, model, named_weights(model), weights_fingerprint(model))


def load_update(base: Base, path: Path) -> Update:
    """The update of a checkpoint or an adapter.

    An adapted linear's update is taken from its factors, so that it has their rank; W - W0 of the
    merged weights would have full rank by rounding.

    Raises:
        AdapterError: the adapter does not fit the base, or adapts a head that is tied.
        CheckpointError: the checkpoint does not fit the base, or nothing changed.
    """
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    heads = base.model.config.num_attention_heads
    factors, lora_a = {}, {}
    if is_adapter:
        adapted = load_model(base.path, heads)
        load_lora(adapted, path)
        adapted.double()
        factors = {f"{name}.weight": layer.delta() for name, layer in lora_layers(adapted)}
        lora_a = {f"{name}.weight": layer.lora_A.detach() for name, layer in lora_layers(adapted)}
        model = merged_model(adapted)
    else:
        model = load_model(path, heads if path.suffix == ".pth" else None)
        check_base(base, path)
    after = named_weights(model)
    check_shapes(base, after, path)
    delta = {n: factors[n] if n in factors else after[n] - w0 for n, w0 in base.weights.items()}
    if not any(tensor.any() for tensor in delta.values()):
        raise CheckpointError(f"{path}: has the weights of {base.path}; there is no update")
    weights = base.path if is_adapter else path
    return Update(checkpoint_name(path), weights_fingerprint(model), delta, lora_a, weights)


def check_base(base: Base, tuned: Path) -> None:
    """Refuses a full checkpoint whose run.json names another base."""
    path = tuned / "run.json"
    trained_on = read_json(path).get("base_fingerprint") if path.is_file() else None
    if trained_on is not None and trained_on != base.fingerprint:
        raise CheckpointError(
            f"{path}: the run started from another base than {base.path}; give that as --base"
        )


def check_shapes(base: Base, after: dict[str, Tensor], tuned: Path) -> None:
    """Refuses a checkpoint with other weights, or weights of another shape, than the base's."""
    for name in sorted(base.weights.keys() | after.keys()):
        in_base, in_tuned = (
            tuple(weights[name].shape) if name in weights else "missing"
            for weights in (base.weights, after)
        )
        if in_base != in_tuned:
            raise CheckpointError(
                f"{tuned}: {name} is {in_tuned}, in {base.path} {in_base}; give the base that the "
                "run started from as --base"
            )


# ----------------------------------------------------------------------------- analysis


def place(name: str) -> dict:
    """A weight's kind (the module's last name) and layer, None outside the blocks."""
    words = name.split(".")
    return {
        "name": name.removesuffix(".weight"),
        "kind": words[-2],
        "layer": int(words[2]) if words[1] == "layers" else None,
    }


def norms(w0: Tensor, delta: Tensor) -> dict:
    """Frobenius norm of an update, absolute and relative to the weights."""
    return {"frobenius": delta.norm().item(), "relative": (delta.norm() / w0.norm()).item()}


def describe_matrix(name: str, w0: Tensor, delta: Tensor, generator: torch.Generator) -> dict:
    """An entry of `matrices`."""
    u0, s0, _ = svd(w0)
    s = svd_of_update(delta)[1]
    return {
        **place(name),
        "shape": list(delta.shape),
        **norms(w0, delta),
        "r90": energy_rank(s, 0.9),
        "effective_rank": effective_rank(s),
        "stable_rank": stable_rank(s),
        "intruders": describe_intruders(w0, u0, delta, generator),
        "amplification": amplification(w0, s0, delta),
        "singular_values": s.tolist(),
    }


def shares(delta: dict[str, Tensor]) -> dict:
    """Shares of the squared norm and of the parameters, by module kind and by layer.

    What lies outside the blocks stands among the layers under its kind.
    """
    energy = sum(tensor.square().sum().item() for tensor in delta.values())
    parameters = sum(tensor.numel() for tensor in delta.values())
    found: dict[str, dict] = {"by_kind": {}, "by_layer": {}}
    for name, tensor in delta.items():
        kind, layer = place(name)["kind"], place(name)["layer"]
        keys = {"by_kind": kind, "by_layer": kind if layer is None else str(layer)}
        for table, key in keys.items():
            row = found[table].setdefault(key, {"update": 0.0, "parameters": 0.0})
            row["update"] += tensor.square().sum().item() / energy
            row["parameters"] += tensor.numel() / parameters
    return found


def total_norm(tensors: dict[str, Tensor]) -> Tensor:
    """Frobenius norm over all tensors."""
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


def analyze(base: dict[str, Tensor], update: Update, seed: int) -> dict:
    """Everything the docstring lists but `provenance`."""
    generator = torch.Generator().manual_seed(seed)
    changed = {name: tensor for name, tensor in update.delta.items() if tensor.any()}
    size = total_norm(update.delta)
    return {
        "total": {"frobenius": size.item(), "relative": (size / total_norm(base)).item()},
        "shares": shares(update.delta),
        "vectors": [
            place(name) | norms(base[name], delta)
            for name, delta in changed.items()
            if delta.ndim == 1
        ],
        "unchanged": [place(name)["name"] for name in update.delta if name not in changed],
        "matrices": [
            describe_matrix(name, base[name], delta, generator)
            for name, delta in changed.items()
            if delta.ndim == 2
        ],
    }


# ----------------------------------------------------------------------------- comparison


def compare(base: dict[str, Tensor], update: Update, other: Update) -> dict:
    """Similarity, and intruders at equal norm, of the matrices that both updates change.

    Raises:
        SettingsError: there is none.
    """
    both = [
        name
        for name, delta in update.delta.items()
        if delta.ndim == 2 and delta.any() and other.delta[name].any()
    ]
    if not both:
        raise SettingsError(f"--compare: {other.name} and {update.name} change no matrix in common")
    return {"matrices": [compare_matrix(name, base[name], update, other) for name in both]}


def compare_matrix(name: str, w0: Tensor, update: Update, other: Update) -> dict:
    """An entry of `matrices` in a comparison."""
    of = "A" if name in update.lora_a and name in other.lora_a else "dW"
    first, second = (
        right_directions(each.lora_a[name] if of == "A" else each.delta[name])
        for each in (update, other)
    )
    rows, columns = ranks_to_show(first.shape[1]), ranks_to_show(second.shape[1])
    dimension = w0.shape[1]
    phi = [[similarity(first, second, i, j) for j in columns] for i in rows]
    excess = [
        [excess_similarity(value, i, j, dimension) for j, value in zip(columns, row, strict=True)]
        for i, row in zip(rows, phi, strict=True)
    ]
    return {
        **place(name),
        "shape": list(w0.shape),
        "of": of,
        "i": rows,
        "j": columns,
        "phi": phi,
        "excess": excess,
        "equal_norm": intruders_at_equal_norm(w0, update.delta[name], other.delta[name]),
    }


# ----------------------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Variant:
    """A checkpoint to be written: the base and a changed update, made when its turn comes."""

    name: str
    how: str  # one line for its run.json
    make: Callable[[], dict[str, Tensor]]


def change_linears(
    delta: dict[str, Tensor], linears: set[str], rest: str, change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """`change` applied to the update of every linear, and to the rest if that says `alike`."""

    def changed(name: str, tensor: Tensor) -> Tensor:
        if name in linears or rest == "alike":
            return change(tensor)
        return tensor if rest == "keep" else torch.zeros_like(tensor)

    return {name: changed(name, tensor) for name, tensor in delta.items()}


def truncated(
    delta: dict[str, Tensor], linears: set[str], rest: str, rank: int
) -> dict[str, Tensor]:
    """The update of every linear cut to `rank`."""
    return change_linears(delta, linears, rest, partial(low_rank, rank=rank))


def randomized(
    delta: dict[str, Tensor], linears: set[str], rest: str, rank: int, seed: int
) -> dict[str, Tensor]:
    """The update of every linear replaced by a random one of the same norm."""
    generator = torch.Generator().manual_seed(seed)
    change = partial(random_low_rank, rank=rank, generator=generator)
    return change_linears(delta, linears, rest, change)


def only(delta: dict[str, Tensor], kept: set[str]) -> dict[str, Tensor]:
    """The update of the weights in `kept` alone."""
    return {n: tensor if n in kept else torch.zeros_like(tensor) for n, tensor in delta.items()}


def without_intruders(delta: dict[str, Tensor], intruders: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update without its part along `intruders`, orthonormal columns of some weights."""
    taken = {name: u @ (u.T @ delta[name]) for name, u in intruders.items()}
    return {n: tensor - taken[n] if n in taken else tensor for n, tensor in delta.items()}


def shrunk(delta: dict[str, Tensor], intruders: dict[str, Tensor]) -> dict[str, Tensor]:
    """The update scaled, weight by weight, to the norms of `without_intruders`."""
    smaller = without_intruders(delta, intruders)
    scales = {name: smaller[name].norm() / delta[name].norm() for name in intruders}
    return {n: tensor * scales[n] if n in scales else tensor for n, tensor in delta.items()}


def find_intruders(base: Base, update: Update, linears: set[str]) -> dict[str, Tensor]:
    """The intruders of every changed linear that has any.

    Raises:
        SettingsError: none has.
    """
    found = {
        name: intruder_directions(base.weights[name], update.delta[name])
        for name in sorted(linears)
        if update.delta[name].any()
    }
    found = {name: u for name, u in found.items() if u.shape[1]}
    if not found:
        raise SettingsError(f"--shrink: {update.name} has no intruder dimension to take out")
    return found


def linear_weights(model: MiniMindForCausalLM) -> set[str]:
    """Names of the weights of the blocks' linears."""
    return {f"{name}.weight" for name in find_targets(model, "all-linear")}


def part_weights(model: MiniMindForCausalLM, spec: str) -> set[str]:
    """Names of the weights that `--trainable spec` trains; `requires_grad` then says so."""
    select_trainable(model, spec)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def plan_variants(args: argparse.Namespace, base: Base, update: Update) -> list[Variant]:
    """Every checkpoint that the flags ask for; only intruders are computed yet.

    Raises:
        SettingsError: a rank that no linear has, or no intruder.
    """
    delta, linears, rest = update.delta, linear_weights(base.model), args.rest
    check_ranks(args, max(min(delta[name].shape) for name in linears))
    suffix = "" if rest == "keep" else f"_rest_{rest}"
    variants = [
        Variant(
            f"_rank{rank}{suffix}",
            f"linears cut to rank {rank}, embedding and norms: {rest}",
            partial(truncated, delta, linears, rest, rank),
        )
        for rank in args.truncate
    ]
    variants += [
        Variant(
            f"_only_{spec.replace(',', '_')}",
            f"{spec} kept, all else as in the base",
            partial(only, delta, part_weights(base.model, spec)),
        )
        for spec in args.keep
    ]
    if args.random_rank is not None:
        rank, seed = args.random_rank, args.seed
        variants.append(
            Variant(
                f"_random_rank{rank}_seed{seed}{suffix}",
                f"random update of rank {rank} and the run's norm in each linear, seed {seed}, "
                f"embedding and norms: {rest}",
                partial(randomized, delta, linears, rest, rank, seed),
            )
        )
    if args.shrink:
        intruders = find_intruders(base, update, linears)
        count = sum(u.shape[1] for u in intruders.values())
        variants += [
            Variant(
                "_no_intruders",
                f"{count} intruder dimensions of linears taken out of the update",
                partial(without_intruders, delta, intruders),
            ),
            Variant(
                "_shrunk",
                "update scaled, linear by linear, to the norm it has without intruders",
                partial(shrunk, delta, intruders),
            ),
        ]
    return variants


def check_ranks(args: argparse.Namespace, largest: int) -> None:
    """Refuses ranks that no linear can have."""
    for rank in args.truncate:
        if not 0 <= rank <= largest:
            raise SettingsError(f"--truncate {rank}: the largest rank of a linear is {largest}")
    if args.random_rank is not None and not 1 <= args.random_rank <= largest:
        raise SettingsError(f"--random_rank {args.random_rank}: must lie between 1 and {largest}")


def write_checkpoints(args: argparse.Namespace, base: Base, update: Update) -> None:
    """Writes every checkpoint that the flags ask for.

    Raises:
        SettingsError: a folder exists, or one is asked for twice; nothing is written then.
        CheckpointError: a .pth, which has no tokenizer of its own, or one that does not fit.
    """
    tokenizer_dir = tokenizer_folder(update.weights, args.tokenizer_path)
    if args.tokenizer_path:  # the weights' own is copied as it is
        tokenizer_of(base.model, update.weights, args.tokenizer_path)
    variants = plan_variants(args, base, update)
    folders = [args.output_dir / f"{update.name}{variant.name}" for variant in variants]
    for folder in folders:
        if folder.exists():
            raise SettingsError(f"{folder}: exists; remove it or name another --output_dir")
        if folders.count(folder) > 1:
            raise SettingsError(f"{folder.name}: asked for twice; drop one")
    for variant, folder in zip(variants, folders, strict=True):
        write_variant(variant, base, update, tokenizer_dir, folder)


def squared_norm_ratio(
    delta: dict[str, Tensor], tuned: dict[str, Tensor], names: Set[str]
) -> float | None:
    """The squared norm of `delta` over that of `tuned` in `names`; None where that is 0."""
    numerator, denominator = (
        sum(update[name].square().sum().item() for name in names) for update in (delta, tuned)
    )
    return numerator / denominator if denominator else None


def write_variant(
    variant: Variant, base: Base, update: Update, tokenizer_dir: Path, folder: Path
) -> None:
    """Writes a checkpoint folder, and says so."""
    delta = variant.make()
    linears = linear_weights(base.model)
    kept = {
        "linears": squared_norm_ratio(delta, update.delta, linears),
        "rest": squared_norm_ratio(delta, update.delta, delta.keys() - linears),
    }
    model = MiniMindForCausalLM(base.model.config)
    fill_weights(model, {n: w0 + delta[n] for n, w0 in base.weights.items()})
    record = {
        "status": "completed",
        "stage": "update_analysis",
        "settings": {
            "base": checkpoint_name(base.path),
            "tuned": update.name,
            "change": variant.how,
        },
        "base_fingerprint": base.fingerprint,
        "tuned_fingerprint": update.fingerprint,
        "squared_norm_over_tuned": rounded(kept),
        "git": git_state(),
    }
    save_copy(model, tokenizer_dir, folder, record)
    print(f"{folder}: {variant.how}")


# ----------------------------------------------------------------------------- main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder or .pth that fine-tuning started from")
    add("--tuned", type=Path, required=True, help="checkpoint or adapter folder, or full .pth")
    add("--num_attention_heads", type=int, help="of a .pth (default 8)")
    add("--compare", type=Path, metavar="OTHER", help="another update of the same base")
    add("--output", type=Path, help="JSON file (default: under evaluation/results/<tuned>/)")
    add("--seed", type=int, help="of random directions and updates (default 0)")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--truncate", type=int, nargs="+", default=[], metavar="RANK", help="cut dW to these ranks")
    add(
        "--keep",
        nargs="+",
        default=[],
        metavar="PARTS",
        help=f"parts, joined by commas, whose update is kept: {', '.join(TRAINABLE_PARTS)}",
    )
    add("--random_rank", type=int, metavar="RANK", help="a random update of this rank, same norm")
    add("--shrink", action="store_true", help="without intruders, and its size-matched control")
    add("--rest", choices=REST, help="embedding and norms of --truncate, --random_rank (keep)")
    add("--output_dir", type=Path, help="where the folders go (default: out/)")
    add("--tokenizer_path", type=Path, help="folder (default: the weights' own; a .pth has none)")
    args = parser.parse_args(argv)
    check_args(args)
    args.seed, args.rest = args.seed or 0, args.rest or "keep"
    args.output_dir = args.output_dir or OUT_DIR
    return args


def writes_checkpoints(args: argparse.Namespace) -> bool:
    """Whether checkpoints are asked for, in place of an analysis."""
    return bool(args.truncate or args.keep or args.random_rank is not None or args.shrink)


def check_args(args: argparse.Namespace) -> None:
    """Refuses values that cannot work, and flags that would be ignored."""
    writes, is_random = writes_checkpoints(args), args.random_rank is not None
    if writes and args.compare:
        raise SettingsError("--compare writes no checkpoint; give it in a call of its own")
    used = {
        "output": not writes,
        "output_dir": writes,
        "tokenizer_path": writes,
        "rest": bool(args.truncate) or is_random,
        "seed": is_random or not (writes or args.compare),
    }
    for flag, is_used in used.items():
        if vars(args)[flag] is not None and not is_used:
            raise SettingsError(f"--{flag}: would be ignored by this call; drop it")
    if args.output:
        if args.output.is_dir():
            raise SettingsError(f"--output {args.output}: is a folder; name a file")
        check_writable(args.output.parent, "--output")
    if args.output_dir:
        check_writable(args.output_dir, "--output_dir")
    if args.num_attention_heads is not None and args.num_attention_heads < 1:
        raise SettingsError(f"--num_attention_heads {args.num_attention_heads}: must be 1 or more")
    if args.seed is not None and args.seed < 0:
        raise SettingsError(f"--seed {args.seed}: must be 0 or more")
    for part in ",".join(args.keep).split(",") if args.keep else []:
        if part not in TRAINABLE_PARTS:
            raise SettingsError(f"--keep {part!r}: known are {', '.join(TRAINABLE_PARTS)}")


def provenance(base: Base, updates: dict[str, Update], seed: int | None) -> dict:
    """What a result was computed from; `updates` by their role."""
    runs = {
        role: {"name": update.name, "sha256": update.fingerprint}
        for role, update in updates.items()
    }
    return {
        "base": {"name": checkpoint_name(base.path), "sha256": base.fingerprint},
        **runs,
        "seed": seed,
        "torch": torch.__version__,
    }


def rounded(value: object) -> object:
    """JSON values with every float at 5 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def print_analysis(result: dict) -> None:
    """The spectra, a line a matrix, and the shares."""
    total = result["total"]
    print(f"update: norm {total['frobenius']:.4g}, {total['relative']:.1%} of the base's\n")
    heads = ("shape", "dW/W0", "r90", "effective", "stable", "intruders", "(random)", "amplified")
    print(f"{'matrix':36}" + "".join(f"{head:>11}" for head in heads))
    for row in result["matrices"]:
        intruders, factors = row["intruders"], row["amplification"]
        cells = (
            "x".join(map(str, row["shape"])),
            f"{row['relative']:.1%}",
            row["r90"],
            f"{row['effective_rank']:.1f}",
            f"{row['stable_rank']:.1f}",
            f"{intruders['count']} of {intruders['k']}",
            f"{intruders['random']:.1f}",
            f"{factors['factor'][-1]:.2f}",
        )
        print(f"{row['name']:36}" + "".join(f"{cell:>11}" for cell in cells))
    for table, rows in result["shares"].items():
        print(f"\n{table:26}{'update':>10}{'parameters':>12}")
        for key, row in rows.items():
            print(f"{key:26}{row['update']:>10.1%}{row['parameters']:>12.1%}")


def print_comparison(result: dict) -> None:
    """Similarity of the first direction and of subspaces of the same size, a line a matrix."""
    heads = ("of", "phi(1,1)", "i=j", "phi(i,j)", "null", "excess", "intruders")
    print(f"{'matrix':36}" + "".join(f"{head:>11}" for head in heads))
    for row in result["matrices"]:
        size = max(set(row["i"]) & set(row["j"]))
        i, j = row["i"].index(size), row["j"].index(size)
        excess, equal = row["excess"][i][j], row["equal_norm"]
        cells = (
            row["of"],
            f"{row['phi'][0][0]:.3f}",
            size,
            f"{row['phi'][i][j]:.3f}",
            f"{size / row['shape'][1]:.3f}",
            "-" if excess is None else f"{excess:.3f}",
            f"{equal['tuned']} / {equal['other']}",
        )
        print(f"{row['name']:36}" + "".join(f"{cell:>11}" for cell in cells))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    base = load_base(args.base, args.num_attention_heads)
    update = load_update(base, args.tuned)
    if writes_checkpoints(args):
        write_checkpoints(args, base, update)
        return 0
    if args.compare:
        other = load_update(base, args.compare)
        output = args.output or RESULTS_DIR / update.name / f"update_vs_{other.name}.json"
        origin = provenance(base, {"tuned": update, "other": other}, seed=None)
        result = {"provenance": origin} | compare(base.weights, update, other)
        print_comparison(result)
    else:
        output = args.output or RESULTS_DIR / update.name / "update_analysis.json"
        origin = provenance(base, {"tuned": update}, args.seed)
        result = {"provenance": origin} | analyze(base.weights, update, args.seed)
        print_analysis(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, as_json(rounded(result)))
    print(f"\n{output}")
    return 0


if __name__ == "__main__":
    run_script(main)
