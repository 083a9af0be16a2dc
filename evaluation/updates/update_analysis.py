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


def measure_ranks(s: Tensor) -> dict[str, float]:
    """Measure the rank of an update by its singular values, in 3 ways.

    r90 singular values hold 90% of the squared norm. The effective rank is exp(-sum p ln p) with
    p = s / sum s (Roy and Vetterli 2007, EUSIPCO). The stable rank is the squared Frobenius norm
    over the squared spectral norm.
    """
    energy = s.square().cumsum(0)
    return {
        "r90": int((energy < (0.9 - 1e-9) * energy[-1]).sum()) + 1,  # rounding aside
        "effective_rank": torch.special.entr(s / s.sum()).sum().exp().item(),
        "stable_rank": (energy[-1] / s[0] ** 2).item(),
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
    count = min(delta.shape)
    k = min(count, max(3, count // 50))
    before, after = (torch.linalg.svd(w, full_matrices=False).U for w in (w0, w0 + delta))
    cosines = (before.T @ after[:, :k]).abs().amax(0)
    return {"k": k, "max_cos": cosines.tolist(), "count": int((cosines < INTRUDER_COS).sum())}


def describe_matrix(w0: Tensor, delta: Tensor) -> dict:
    """Describe the update of one matrix: size, ranks, intruders, singular values."""
    s = torch.linalg.svdvals(delta)
    return {
        "shape": list(delta.shape),
        "frobenius": delta.norm().item(),
        "relative": (delta.norm() / w0.norm()).item(),
        **measure_ranks(s),
        "intruders": count_intruders(w0, delta),
        "singular_values": s.tolist(),
    }


def read_update(base: MiniMindForCausalLM, path: Path) -> Update:
    """Return what the checkpoint or adapter at `path` added to its base."""
    tuned = dict(merge_lora(load_checkpoint(path)[0]).named_parameters())
    before = dict(base.named_parameters())
    if {n: w.shape for n, w in before.items()} != {n: w.shape for n, w in tuned.items()}:
        raise UserError(f"{path}: has other weights than --base; name its own base")
    delta = {name: (tuned[name].double() - weight).detach() for name, weight in before.items()}
    if not any(tensor.any() for tensor in delta.values()):
        raise UserError(f"{path}: has the weights of --base; there is no update")
    return delta


def compute_shares(delta: Update) -> dict:
    """Return the shares of squared norm and of parameters, by kind of module and by layer."""
    rows = [(tensor.square().sum().item(), tensor.numel()) for tensor in delta.values()]
    sizes = pd.DataFrame(rows, columns=["update", "parameters"])
    words = pd.Index(delta).str.split(".")
    kinds = words.str[-2]
    tables = {"by_kind": kinds, "by_layer": words.str[2].where(words.str[1] == "layers", kinds)}
    shares = sizes / sizes.sum()
    return {k: shares.groupby(by, sort=False).sum().to_dict("index") for k, by in tables.items()}


def make_variants(args: argparse.Namespace, delta: Update) -> dict[str, Update]:
    """Return the changed updates that the flags name, by the ending of their folder."""
    variants = {}
    linears = [name for name, t in delta.items() if ".layers." in name and t.ndim == 2]
    for rank in args.truncate:
        variants[f"_rank{rank}"] = delta | {n: cut_to_rank(delta[n], rank) for n in linears}
    for spec in args.keep:
        model = load_model(args.base)
        select_trainable(model, spec)
        trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
        variants[f"_only_{spec.replace(',', '_')}"] = {n: t * trained[n] for n, t in delta.items()}
    if args.restore_rows:
        tokenizer, longest = load_tokenizer(args.tokenizer), 2**20  # no conversation is cut
        data = load_dataset("sft", args.restore_rows, tokenizer, longest)
        rows = delta[EMBEDDING_WEIGHT]
        read = torch.isin(torch.arange(len(rows)), torch.from_numpy(np.unique(data.tokens)).long())
        variants["_read_rows"] = delta | {EMBEDDING_WEIGHT: rows * read[:, None]}
    return variants


def main(argv: list[str] | None = None) -> None:
    """Analyze an update, or write checkpoints with a part of it."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="where fine-tuning started, or another base")
    add("--tuned", type=Path, required=True, help="checkpoint or adapter folder")
    add("--truncate", type=SIZE, nargs="+", default=[], metavar="RANK")
    add("--keep", nargs="+", default=[], metavar="PARTS")
    add("--restore_rows", type=Path, nargs="+", metavar="FILE")
    add("--output_dir", type=Path, help="of checkpoints (default: beside --tuned)")
    args = parser.parse_args(argv)
    args.tokenizer = args.tuned if (args.tuned / "tokenizer.json").is_file() else args.base
    base = load_model(args.base)
    delta = read_update(base, args.tuned)
    record = {"base": args.base.name, "base_fingerprint": weights_fingerprint(base)}
    variants = make_variants(args, delta)
    for ending, changed in variants.items():
        folder = (args.output_dir or args.tuned.parent) / f"{args.tuned.name}{ending}"
        if folder.exists():
            raise UserError(f"{folder}: exists; remove it or name another --output_dir")
        model = load_model(args.base)
        for name, weight in model.named_parameters():
            weight.data += changed[name]
        save_model(model, args.tokenizer, folder)
        write_json(folder / "run.json", record | {"part_of_update": ending[1:]})
        print(folder)
    if variants:
        return
    before = dict(base.named_parameters())
    matrices = [
        {"name": name.removesuffix(".weight")}
        | describe_matrix(before[name].detach().double(), tensor)
        for name, tensor in delta.items()
        if tensor.ndim == 2 and tensor.any()
    ]
    unchanged = [name for name, tensor in delta.items() if not tensor.any()]
    shares, table = compute_shares(delta), pd.json_normalize(matrices)
    table = table.drop(columns=["singular_values", "intruders.max_cos"])
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(pd.DataFrame(shares["by_kind"]).T.to_string(float_format="{:.1%}".format))
    record |= {"tuned": args.tuned.name, "shares": shares, "unchanged": unchanged}
    write_json(args.tuned / "update_analysis.json", record | {"matrices": matrices})


if __name__ == "__main__":
    run_script(main)
