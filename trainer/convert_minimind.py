r"""Convert MiniMind's .pth files, which no other script reads, to folders.

    python trainer/convert_minimind.py full_sft_512.pth --tokenizer_path minimind/model \
        --output_dir out/minimind_sft
    python trainer/convert_minimind.py lora_medical_512.pth --base out/minimind_sft \
        --output_dir out/minimind_medical

A model's .pth holds neither tokenizer nor number of heads: name its tokenizer's folder, and
--num_attention_heads if it is not 8. An adapter's .pth needs --base. Code in a .pth is not run.
"""

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.checkpoint import load_model, load_tokenizer, save_model
from model.cli import SIZE, UserError, escape_control, make_parser, run_script
from model.model_lora import LoraSettings, apply_lora, save_lora
from model.model_minimind import (
    Config,
    MiniMindForCausalLM,
    fill_model,
    minimind_config,
    weights_fingerprint,
)

MATRICES = ("embed_tokens", "layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj")


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """Read a MiniMind file's tensors, float32; refuse code inside the pickle."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        # MiniMind stores its rotary tables with the weights; they are computed here.
        return {k: v.float() for k, v in tensors.items() if not k.startswith("model.freqs_")}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        problem = f"not a plain file of tensors, or damaged ({type(error).__name__})"
        raise UserError(f"{path}: {problem}; save it again as a state dict") from error


def find_config(tensors: dict[str, torch.Tensor], heads: int, path: Path) -> Config:
    """Find the shape that a MiniMind model's tensors and its number of heads imply."""
    names = [f"model.{name}.weight" for name in MATRICES]
    for name in names:
        if name not in tensors:
            raise UserError(f"{path}: no {name}; a dense model or an adapter (--base) is read")
    embedding, key, gate = (tensors[name] for name in names)
    vocab_size, hidden_size = embedding.shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    qk_norm = "model.layers.0.self_attn.q_norm.weight" in tensors
    return minimind_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=max(1, key.shape[0] * heads // hidden_size),
        intermediate_size=gate.shape[0],
        qk_norm=qk_norm,
        # Not in the file: MiniMind changed it with the version that brought q_norm.
        rms_norm_eps=1e-6 if qk_norm else 1e-5,
    )


def convert_adapter(tensors: dict[str, torch.Tensor], base: str, path: Path, folder: Path) -> None:
    """Write a MiniMind adapter as a folder: scaling 1, as its scripts compute it."""
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    frozen = model.state_dict()
    renamed = {}
    for name, tensor in tensors.items():
        renamed[name.removeprefix("module.").replace(".lora.", ".lora_")] = tensor
    factors = [name for name in renamed if name.endswith(".lora_A.weight")]
    if not factors:
        raise UserError(f"{path}: no matrix named ...lora.A.weight; leave out --base for a model")
    rank = renamed[factors[0]].shape[0]
    targets = {name.partition(".lora_")[0] for name in renamed}
    settings = LoraSettings(rank=rank, alpha=rank, targets=",".join(targets), init="gaussian")
    adapted = apply_lora(model, settings)
    fill_model(model, frozen | renamed, path)
    save_lora(model, settings, base, fingerprint, folder)
    print(escape_control(f"{path}: {len(adapted)} matrices, r={rank}: {folder}"))


def main(argv: list[str] | None = None) -> None:
    """Convert by the flags on the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("pth", type=Path, help="a model's or an adapter's .pth")
    add("--output_dir", type=Path, required=True, help="folder to make")
    add("--base", help="of an adapter: the folder of the model that it was trained on")
    add("--tokenizer_path", help="of a model: the folder of its tokenizer")
    add("--num_attention_heads", type=SIZE, default=8, help="of a model (default 8)")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir}: exists; name another folder")
    if bool(args.base) == bool(args.tokenizer_path):
        raise UserError("--tokenizer_path of a model, or --base of an adapter: give one of both")

    tensors = read_pth(args.pth)
    if args.base:
        convert_adapter(tensors, args.base, args.pth, args.output_dir)
        return
    model = MiniMindForCausalLM(find_config(tensors, args.num_attention_heads, args.pth))
    fill_model(model, tensors, args.pth)
    load_tokenizer(args.tokenizer_path, model.config.vocab_size)
    save_model(model, args.tokenizer_path, args.output_dir)
    print(escape_control(f"{args.pth}: {model.num_parameters():,} parameters: {args.output_dir}"))


if __name__ == "__main__":
    run_script(main)
