"""Merges an adapter into its base and writes a plain checkpoint.

    python trainer/merge_lora.py --adapter out/lora --output_dir out/lora_merged
    python trainer/merge_lora.py --adapter lora_medical_512.pth --base full_sft_512.pth \
        --tokenizer_path minimind/model --output_dir out/medical_merged

The adapter is a folder of ours or of PEFT's, or a MiniMind adapter .pth, whose base is named with
--base; a base that is a .pth holds no tokenizer and does not show its heads, so --tokenizer_path
and --num_attention_heads (8, if not given) name them. The result loads in transformers, vLLM or
llama.cpp's converter without any adapter. An update of a head that is tied to the embedding is
refused: merging it would change both ends. The folder's run.json says what was merged into what.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import (
    load_model,
    save_copy,
    tokenizer_folder,
    tokenizer_of,
    weights_fingerprint,
)
from model.files import UserError, escape_control, file_sha256, run_script
from model.hub import fetch, is_hub_id
from model.model_lora import (
    AdapterError,
    LoraSettings,
    find_base,
    load_lora,
    load_minimind_lora,
    merged_model,
)
from model.model_minimind import count_parameters
from trainer.run_folder import describe_machine, git_state


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="adapter folder, or a MiniMind adapter .pth")
    add("--base", help="its base: a folder, hub id or .pth (default: what its config names)")
    add("--num_attention_heads", type=int, help="of a base that is a .pth (default 8)")
    add("--tokenizer_path", type=Path, help="folder (default: the base's own; a .pth has none)")
    add("--output_dir", type=Path, required=True, help="folder to make")
    return parser.parse_args(argv)


def merge_record(
    base: Path, base_fingerprint: str, adapter: Path, settings: LoraSettings, parameters: int
) -> dict:
    """The merged model's run.json, with the keys of a run that trained where they apply."""
    adapted = asdict(settings) | {"targets": settings.targets.split(",") if settings.rank else []}
    return {
        "status": "completed",
        "stage": "merge_lora",
        "settings": {
            "base": base.resolve().stem,
            "tuned": adapter.resolve().stem,
            "change": "adapter merged",
            "adapter": adapted,
        },
        "base_fingerprint": base_fingerprint,
        "adapter_sha256": file_sha256(
            adapter if adapter.is_file() else adapter / "adapter_model.safetensors"
        ),
        "parameters": parameters,
        "git": git_state(),
        "machine": describe_machine("cpu"),
    }


def given_base(named: str) -> Path:
    """The base of --base: a path, or an id of the hub, which is fetched."""
    return fetch(named, "--base") if is_hub_id(named) else Path(named)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir}: exists; name another folder")
    if args.num_attention_heads is not None and args.num_attention_heads < 1:
        raise UserError(f"--num_attention_heads {args.num_attention_heads}: must be 1 or more")
    is_minimind = args.adapter.suffix == ".pth"
    if is_minimind and args.base is None:
        raise AdapterError(f"{args.adapter}: a MiniMind adapter names no base; give --base")
    base = given_base(args.base) if args.base else find_base(args.adapter)
    model = load_model(base, args.num_attention_heads)
    tokenizer_dir = tokenizer_folder(base, args.tokenizer_path)
    if args.tokenizer_path:  # a base's own is copied as it is: the merged model needs no template
        tokenizer_of(model, base, args.tokenizer_path)
    fingerprint = weights_fingerprint(model)
    load = load_minimind_lora if is_minimind else load_lora
    settings = load(model, args.adapter)
    merged = merged_model(model)
    parameters, _ = count_parameters(merged)
    record = merge_record(base, fingerprint, args.adapter, settings, parameters)
    save_copy(merged, tokenizer_dir, args.output_dir, record)
    print(escape_control(f"{args.adapter} merged into {base}: {args.output_dir}"))
    return 0


if __name__ == "__main__":
    run_script(main)
