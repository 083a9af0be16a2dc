r"""What fine-tuning changed: dW = W - W0 of a checkpoint or an adapter, matrix by matrix.

    python evaluation/updates/update_analysis.py --base out/pretrain --tuned out/full_sft

prints ranks, singular vectors far from all of W0's, and shares of squared norm and parameters by
kind of module (by layer: <tuned>/update_analysis.json). These flags write checkpoints instead:

    --truncate 1 2 4 8 16     <tuned>_rank<r>: dW of each linear layer cut to rank r, not of others
    --keep square mlp,norms   <tuned>_only_<parts>: the base, and the update of these parts alone
    --restore_rows FILE...    <tuned>_read_rows: tuned, but W0's embedding rows of tokens in no FILE
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dataset.lm_dataset import load_dataset
from model.checkpoint import load_checkpoint, load_model, load_tokenizer, save_model
from model.cli import SIZE, UserError, make_parser, run_script
from model.files import write_json
from model.model_lora import merge_lora, select_trainable
from model.model_minimind import EMBEDDING_WEIGHT, MiniMindForCausalLM, weights_fingerprint

Update = dict[str, Tensor]  # float64, by the name of the weight; a tied head is the embedding
INTRUDER_COS = 0.5  # epsilon of Shuttleworth et al. 2024, arXiv 2410.21228


def measure_ranks(singular_values: Tensor) -> dict[str, float]:
    """Measure the rank of an update by its singular values, in 3 ways.

    r90 singular values hold 90% of the squared norm. The effective rank is exp(-sum p ln p) with
    p = s / sum s (Roy and Vetterli 2007, EUSIPCO). The stable rank is the squared Frobenius norm
    over the squared spectral norm.
    """
    s = singular_values
    p = s / s.sum()
    energy = s.square().cumsum(0)
    enough = (0.9 - 1e-9) * energy[-1]  # rounding aside
    r90 = int((energy < enough).sum()) + 1
    effective_rank = torch.special.entr(p).sum().exp()
    stable_rank = energy[-1] / s[0] ** 2
    return {
        "r90": r90,
        "effective_rank": effective_rank.item(),
        "stable_rank": stable_rank.item(),
    }


def cut_to_rank(delta: Tensor, rank: int) -> Tensor:
    """Return the best approximation of rank at most `rank`."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def count_intruders(w0: Tensor, delta: Tensor) -> dict:
    """Count intruder dimensions; `max_cos` has the cosines that decide.

    An intruder is one of W's top k left singular vectors, k = max(3, min(m, n) / 50), whose |cos|
    with every left singular vector of W0 is below 0.5. The paper has k = 10 at width 512.
    """
    smaller_side = min(delta.shape)
    k = min(smaller_side, max(3, smaller_side // 50))
    before = torch.linalg.svd(w0, full_matrices=False).U
    after = torch.linalg.svd(w0 + delta, full_matrices=False).U
    cosines = (before.T @ after[:, :k]).abs().amax(0)
    intruders = cosines < INTRUDER_COS
    return {"k": k, "max_cos": cosines.tolist(), "count": int(intruders.sum())}


def describe_matrix(w0: Tensor, delta: Tensor) -> dict:
    """Describe the update of one matrix: size, ranks, intruders, singular values."""
    singular_values = torch.linalg.svdvals(delta)
    return {
        "shape": list(delta.shape),
        "frobenius": delta.norm().item(),
        "relative": (delta.norm() / w0.norm()).item(),
        **measure_ranks(singular_values),
        "intruders": count_intruders(w0, delta),
        "singular_values": singular_values.tolist(),
    }


def read_update(base: MiniMindForCausalLM, path: Path) -> Update:
    """Return what the checkpoint or adapter at `path` added to its base."""
    before = dict(base.named_parameters())
    tuned, _ = load_checkpoint(path)
    after = dict(merge_lora(tuned).named_parameters())
    shapes_before = {name: weight.shape for name, weight in before.items()}
    shapes_after = {name: weight.shape for name, weight in after.items()}
    if shapes_before != shapes_after:
        raise UserError(f"{path}: has other weights than --base; name its own base")
    delta = {}
    for name, weight in before.items():
        delta[name] = (after[name].double() - weight).detach()
    if not any(tensor.any() for tensor in delta.values()):
        raise UserError(f"{path}: has the weights of --base; there is no update")
    return delta


def compute_shares(delta: Update) -> dict[str, dict]:
    """Return the shares of squared norm and of parameters, by kind of module and by layer."""
    rows = []
    for tensor in delta.values():
        rows.append({"update": tensor.square().sum().item(), "parameters": tensor.numel()})
    sizes = pd.DataFrame(rows)  # a row a weight
    shares = sizes / sizes.sum()
    words = pd.Index(delta).str.split(".")  # model.layers.0.mlp.up_proj.weight, model.norm.weight
    kinds = words.str[-2]
    layers = words.str[2].where(words.str[1] == "layers", kinds)
    return {
        "by_kind": shares.groupby(kinds, sort=False).sum().to_dict("index"),
        "by_layer": shares.groupby(layers, sort=False).sum().to_dict("index"),
    }


def cut_linear_layers(delta: Update, rank: int) -> Update:
    """Return the update with each linear layer of a block cut to a rank, all else as it is."""
    changed = dict(delta)
    for name, tensor in delta.items():
        if ".layers." in name and tensor.ndim == 2:
            changed[name] = cut_to_rank(tensor, rank)
    return changed


def keep_parts(delta: Update, base: str | Path, parts: str) -> Update:
    """Return the update of the weights that `--trainable` PARTS would train, and 0 elsewhere."""
    model = load_model(base)
    select_trainable(model, parts)
    changed = {}
    for name, weight in model.named_parameters():
        changed[name] = delta[name] * weight.requires_grad
    return changed


def restore_rows(delta: Update, tokenizer: Path, files: list[Path]) -> Update:
    """Return the update without that of the embedding's rows whose tokens stand in no file."""
    longest = 2**20  # no conversation is cut
    data = load_dataset("sft", files, load_tokenizer(tokenizer), longest)
    seen_tokens = torch.from_numpy(np.unique(data.tokens)).long()
    rows = delta[EMBEDDING_WEIGHT]
    is_seen = torch.isin(torch.arange(len(rows)), seen_tokens)
    return delta | {EMBEDDING_WEIGHT: rows * is_seen[:, None]}


def make_variants(args: argparse.Namespace, delta: Update) -> dict[str, Update]:
    """Return the changed updates that the flags name, by the ending of their folder."""
    variants = {}
    for rank in args.truncate:
        variants[f"_rank{rank}"] = cut_linear_layers(delta, rank)
    for parts in args.keep:
        ending = parts.replace(",", "_")
        variants[f"_only_{ending}"] = keep_parts(delta, args.base, parts)
    if args.restore_rows:
        variants["_read_rows"] = restore_rows(delta, args.tokenizer, args.restore_rows)
    return variants


def save_variant(args: argparse.Namespace, ending: str, delta: Update, record: dict) -> Path:
    """Write the base with a changed update as a checkpoint; return its folder."""
    folder = (args.output_dir or args.tuned.parent) / f"{args.tuned.name}{ending}"
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it or name another --output_dir")
    model = load_model(args.base)
    for name, weight in model.named_parameters():
        weight.data += delta[name]
    save_model(model, args.tokenizer, folder)
    write_json(folder / "run.json", record | {"part_of_update": ending.removeprefix("_")})
    return folder


def analyze(base: MiniMindForCausalLM, delta: Update) -> dict:
    """Describe each matrix that changed, list what did not, and compute shares of the update."""
    weights = dict(base.named_parameters())
    matrices = []
    unchanged = []
    for name, tensor in delta.items():
        if not tensor.any():
            unchanged.append(name)
        elif tensor.ndim == 2:
            description = describe_matrix(weights[name].detach().double(), tensor)
            matrices.append({"name": name.removesuffix(".weight"), **description})
    return {"shares": compute_shares(delta), "unchanged": unchanged, "matrices": matrices}


def print_analysis(analysis: dict) -> None:
    """Print a line for each matrix, and the shares by kind of module."""
    table = pd.json_normalize(analysis["matrices"])
    table = table.drop(columns=["singular_values", "intruders.max_cos"])
    print(table.to_string(index=False, float_format="{:.3f}".format))
    shares = pd.DataFrame(analysis["shares"]["by_kind"]).T
    print(shares.to_string(float_format="{:.1%}".format))


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; the tokenizer is that of the tuned model, if it has one."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="where fine-tuning started, or another base")
    add("--tuned", type=Path, required=True, help="checkpoint or adapter folder")
    add("--truncate", type=SIZE, nargs="+", default=[], metavar="RANK")
    add("--keep", nargs="+", default=[], metavar="PARTS")
    add("--restore_rows", type=Path, nargs="+", metavar="FILE")
    add("--output_dir", type=Path, help="of checkpoints (default: beside --tuned)")
    args = parser.parse_args(argv)
    has_tokenizer = (args.tuned / "tokenizer.json").is_file()
    args.tokenizer = args.tuned if has_tokenizer else args.base
    return args


def main(argv: list[str] | None = None) -> None:
    """Analyze an update, or write checkpoints with a part of it."""
    args = parse_flags(argv)
    base = load_model(args.base)
    delta = read_update(base, args.tuned)
    record = {"base": args.base.name, "base_fingerprint": weights_fingerprint(base)}
    variants = make_variants(args, delta)
    for ending, changed in variants.items():
        print(save_variant(args, ending, changed, record))
    if not variants:
        analysis = analyze(base, delta)
        print_analysis(analysis)
        record["tuned"] = args.tuned.name
        write_json(args.tuned / "update_analysis.json", record | analysis)


if __name__ == "__main__":
    run_script(main)
