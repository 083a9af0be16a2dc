"""What fine-tuning changed: dW = W - W0 of a checkpoint or an adapter, matrix by matrix.

    python evaluation/updates/update_analysis.py --base out/pretrain --tuned out/full_sft

prints norms and ranks, and writes them to <tuned>/update_analysis.json with singular values and the
shares of squared norm and of parameters by kind of module and by layer. `--truncate 1 2 4` writes
checkpoints <tuned>_rank<r> instead, for eval_llm.py and transformers: there dW of each linear layer
is cut to rank r, and dW of embedding and norms is whole.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pandas as pd
import torch
from torch import Tensor

from model.checkpoint import load_checkpoint, load_model, save_model, weights_fingerprint
from model.files import UserError, run_script, write_json
from model.model_lora import build_merged
from model.model_minimind import MiniMindForCausalLM
from trainer.arguments import SIZE

Update = dict[str, Tensor]  # float64, by the name of the weight; a tied head is the embedding


def read_update(base: MiniMindForCausalLM, path: Path) -> Update:
    """Return what the checkpoint or adapter at `path` added to its base."""
    tuned = dict(build_merged(load_checkpoint(path)[0]).named_parameters())
    before = dict(base.named_parameters())
    if {n: w.shape for n, w in before.items()} != {n: w.shape for n, w in tuned.items()}:
        raise UserError(f"{path}: has other weights than --base; name its own base")
    delta = {name: (tuned[name].double() - weight).detach() for name, weight in before.items()}
    if not any(tensor.any() for tensor in delta.values()):
        raise UserError(f"{path}: has the weights of --base; there is no update")
    return delta


def describe_matrix(w0: Tensor, delta: Tensor) -> dict:
    """Describe the update of one matrix: norms, singular values s, and its rank in 3 ways.

    r90 singular values hold 90% of the squared norm. The effective rank is exp(-sum p ln p) with
    p = s / sum s (Roy and Vetterli 2007, EUSIPCO). The stable rank is the squared Frobenius norm
    over the squared spectral norm.
    """
    s = torch.linalg.svdvals(delta)
    energy = s.square().cumsum(0)
    return {
        "shape": list(delta.shape),
        "frobenius": delta.norm().item(),
        "relative": (delta.norm() / w0.norm()).item(),
        "r90": int((energy < (0.9 - 1e-9) * energy[-1]).sum()) + 1,  # rounding aside
        "effective_rank": torch.special.entr(s / s.sum()).sum().exp().item(),
        "stable_rank": (energy[-1] / s[0] ** 2).item(),
        "singular_values": s.tolist(),
    }


def compute_shares(delta: Update) -> dict:
    """Return the shares of squared norm and of parameters, by kind of module and by layer."""
    rows = [(tensor.square().sum().item(), tensor.numel()) for tensor in delta.values()]
    sizes = pd.DataFrame(rows, columns=["update", "parameters"])
    words = pd.Index(delta).str.split(".")
    kinds = words.str[-2]
    layers = words.str[2].where(words.str[1] == "layers", kinds)
    tables = {"by_kind": kinds, "by_layer": layers}
    shares = sizes / sizes.sum()
    return {k: shares.groupby(by, sort=False).sum().to_dict("index") for k, by in tables.items()}


def write_truncated(base: Path, delta: Update, rank: int, folder: Path) -> None:
    """Write the base plus its update, that of each linear layer cut to a rank."""
    model = load_model(base)
    for name, weight in model.named_parameters():
        if ".layers." in name and weight.ndim == 2:
            u, s, vh = torch.linalg.svd(delta[name], full_matrices=False)
            weight.data += (u[:, :rank] * s[:rank]) @ vh[:rank]
        else:
            weight.data += delta[name]
    save_model(model, base, folder)
    print(folder)


def main(argv: list[str] | None = None) -> None:
    """Analyze an update, or write checkpoints in which it is cut to a rank."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--base", type=Path, required=True, help="where fine-tuning started")
    parser.add_argument("--tuned", type=Path, required=True, help="checkpoint or adapter folder")
    parser.add_argument("--truncate", type=SIZE, nargs="+", default=[], metavar="RANK")
    args = parser.parse_args(argv)
    base = load_model(args.base)
    delta = read_update(base, args.tuned)
    for rank in args.truncate:
        folder = Path(f"{args.tuned}_rank{rank}")
        if folder.exists():
            raise UserError(f"{folder}: exists; remove it")
        write_truncated(args.base, delta, rank, folder)
    if args.truncate:
        return
    before = dict(base.named_parameters())
    matrices = [
        {"name": name.removesuffix(".weight")}
        | describe_matrix(before[name].detach().double(), tensor)
        for name, tensor in delta.items()
        if tensor.ndim == 2 and tensor.any()
    ]
    unchanged = [name for name, tensor in delta.items() if not tensor.any()]
    shares, table = compute_shares(delta), pd.DataFrame(matrices)
    print(table.drop(columns="singular_values").round(3).to_string(index=False))
    print(pd.DataFrame(shares["by_kind"]).T.to_string(float_format="{:.1%}".format))
    record = {"base": args.base.name, "base_fingerprint": weights_fingerprint(base)}
    record |= {"tuned": args.tuned.name, "shares": shares, "unchanged": unchanged}
    write_json(args.tuned / "update_analysis.json", record | {"matrices": matrices})


if __name__ == "__main__":
    run_script(main)
