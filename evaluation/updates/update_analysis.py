r"""What fine-tuning changed: dW = W - W0 of a checkpoint or an adapter, matrix by matrix.

    python evaluation/updates/update_analysis.py --base out/pretrain --tuned out/full_sft

prints ranks and intruder dimensions, and writes them to --output (default:
<tuned>/update_analysis.json): `shares` of the update's squared norm and of the parameters by kind
of module and by layer, and `matrices`, a line each. The formulas are in spectra.py.

With one of these flags it writes checkpoints with a part of the update to --output_dir instead,
ordinary folders for eval_llm.py and transformers:

    --truncate 1 2 4 8 16     <tuned>_rank<r>: dW of each linear layer cut to rank r
    --keep square mlp,norms   <tuned>_only_<parts>: the base, and the update of these parts alone
    --random_rank 8 --seed 0  <tuned>_random_rank8_seed0: a random update of rank 8 with the norm
                              of dW in each linear layer, the control for --truncate

--rest says what happens to the update of embedding and norms under --truncate and --random_rank:
`keep` (default), `drop`, or `alike`: changed as the linear layers are, a vector as one column.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from torch import Tensor

from evaluation.updates.spectra import cut_to_rank, describe_matrix, draw_low_rank
from model.checkpoint import load_checkpoint, load_model, save_model, weights_fingerprint
from model.files import UserError, run_script, write_json
from model.model_lora import build_merged, select_trainable
from model.model_minimind import MiniMindForCausalLM

Update = dict[str, Tensor]  # float64, by the name of the weight in the plain model


def read_weights(model: MiniMindForCausalLM) -> Update:
    """Return every weight in float64; a tied head counts once, as the embedding."""
    return {name: tensor.detach().double() for name, tensor in model.named_parameters()}


def read_update(base: Update, path: Path) -> Update:
    """Return what the checkpoint or adapter at `path` added to its base."""
    model, _ = load_checkpoint(path)
    tuned = read_weights(build_merged(model))
    shapes = ({name: tensor.shape for name, tensor in each.items()} for each in (base, tuned))
    if len({str(sorted(each.items())) for each in shapes}) > 1:
        raise UserError(
            f"{path}: has other weights than --base; name the base that it started from"
        )
    delta = {name: tuned[name] - before for name, before in base.items()}
    if not any(tensor.any() for tensor in delta.values()):
        raise UserError(f"{path}: has the weights of --base; there is no update")
    return delta


def compute_shares(delta: Update) -> dict:
    """Return the shares of squared norm and of parameters, by kind of module and by layer."""
    words = [name.split(".") for name in delta]
    parts = pd.DataFrame(
        {
            "by_kind": [word[-2] for word in words],
            "by_layer": [word[2] if word[1] == "layers" else word[-2] for word in words],
            "update": [tensor.square().sum().item() for tensor in delta.values()],
            "parameters": [tensor.numel() for tensor in delta.values()],
        }
    )
    sizes = ["update", "parameters"]
    parts[sizes] /= parts[sizes].sum()
    tables = {key: parts.groupby(key, sort=False)[sizes].sum() for key in ("by_kind", "by_layer")}
    return {key: table.to_dict("index") for key, table in tables.items()}


def analyze_update(base: Update, delta: Update, seed: int) -> dict:
    """Describe an update: shares, and each changed matrix."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "shares": compute_shares(delta),
        "unchanged": [name for name, tensor in delta.items() if not tensor.any()],
        "matrices": [
            {"name": name.removesuffix(".weight")} | describe_matrix(base[name], tensor, generator)
            for name, tensor in delta.items()
            if tensor.ndim == 2 and tensor.any()
        ],
    }


def change_linears(delta: Update, change: partial, rest: str) -> Update:
    """Apply `change` to the update of each linear layer; `rest` decides for the other weights."""

    def change_one(name: str, tensor: Tensor) -> Tensor:
        is_linear = ".layers." in name and tensor.ndim == 2
        if is_linear or rest == "alike":
            return change(tensor)
        return tensor if rest == "keep" else torch.zeros_like(tensor)

    return {name: change_one(name, tensor) for name, tensor in delta.items()}


def keep_parts(model: MiniMindForCausalLM, delta: Update, spec: str) -> Update:
    """Return the update of the parts that `--trainable spec` would train, the rest zero."""
    select_trainable(model, spec)
    kept = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: t if name in kept else torch.zeros_like(t) for name, t in delta.items()}


def make_variants(args: argparse.Namespace, model: MiniMindForCausalLM, delta: Update) -> dict:
    """Return the changed updates that the flags name, by the ending of their folder."""
    suffix = "" if args.rest == "keep" else f"_rest_{args.rest}"
    variants = {}
    for rank in args.truncate:
        cut = partial(cut_to_rank, rank=rank)
        variants[f"_rank{rank}{suffix}"] = change_linears(delta, cut, args.rest)
    for spec in args.keep:
        variants[f"_only_{spec.replace(',', '_')}"] = keep_parts(model, delta, spec)
    if args.random_rank:
        generator = torch.Generator().manual_seed(args.seed)
        draw = partial(draw_low_rank, rank=args.random_rank, generator=generator)
        name = f"_random_rank{args.random_rank}_seed{args.seed}{suffix}"
        variants[name] = change_linears(delta, draw, args.rest)
    return variants


def write_variant(base: Update, delta: Update, like: Path, folder: Path, record: dict) -> None:
    """Write a new checkpoint folder with the weights base + delta."""
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it or name another --output_dir")
    model = load_model(like)
    model.float().load_state_dict(
        {n: before + delta[n] for n, before in base.items()}, strict=False
    )
    save_model(model, like, folder)
    write_json(folder / "run.json", record)
    print(folder)


def print_analysis(result: dict) -> None:
    """Print a line for each matrix, and the shares by kind of module."""
    table = pd.DataFrame(result["matrices"])
    intruders = pd.DataFrame(list(table.intruders))[["count", "random", "k"]]
    table = table.drop(columns=["intruders", "singular_values"]).join(intruders)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(pd.DataFrame(result["shares"]["by_kind"]).T.to_string(float_format="{:.1%}".format))


def main() -> None:
    """Analyze an update, or write checkpoints with a part of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="where fine-tuning started")
    parser.add_argument("--tuned", type=Path, required=True, help="checkpoint or adapter folder")
    parser.add_argument("--truncate", type=int, nargs="+", default=[], metavar="RANK")
    parser.add_argument("--keep", nargs="+", default=[], metavar="PARTS")
    parser.add_argument("--random_rank", type=int, metavar="RANK")
    parser.add_argument("--rest", choices=("keep", "drop", "alike"), default="keep")
    parser.add_argument("--seed", type=int, default=0, help="of random directions and updates")
    parser.add_argument("--output", type=Path, help="JSON file of the analysis")
    parser.add_argument("--output_dir", type=Path, help="of checkpoints (default: beside --tuned)")
    args = parser.parse_args()
    if min([*args.truncate, args.random_rank or 1]) < 1:
        parser.error("--truncate and --random_rank: a rank is 1 or more")
    model = load_model(args.base)
    base = read_weights(model)
    delta = read_update(base, args.tuned)
    record = {"base": args.base.name, "base_fingerprint": weights_fingerprint(model)}
    variants = make_variants(args, model, delta)
    for ending, changed in variants.items():
        folder = (args.output_dir or args.tuned.parent) / f"{args.tuned.name}{ending}"
        write_variant(base, changed, args.base, folder, record | {"part_of_update": ending[1:]})
    if not variants:
        result = record | {"tuned": args.tuned.name} | analyze_update(base, delta, args.seed)
        print_analysis(result)
        write_json(args.output or args.tuned / "update_analysis.json", result)


if __name__ == "__main__":
    run_script(main)
