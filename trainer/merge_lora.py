"""Merge an adapter into its base and write a plain checkpoint.

    python trainer/merge_lora.py --adapter out/lora --output_dir out/lora_merged

The adapter is a folder of ours or of PEFT's. Transformers loads the result without our code.
llama.cpp's converter refuses it, because the converter knows tokenizers by a fixed list of hashes
and ours are not in it; export_gguf.py writes a file for llama.cpp. An adapter on a tied head alone
is refused here, because the merge would change the embedding as well.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import (
    TOKENIZER_FILES,
    find_base,
    find_file,
    find_tokenizer,
    load_model,
    save_model,
)
from model.cli import UserError, escape_control, make_parser, run_script
from model.files import file_sha256, write_json
from model.model_lora import ADAPTER_WEIGHTS, load_lora, merge_lora
from model.model_minimind import weights_fingerprint


def main(argv: list[str] | None = None) -> None:
    """Merge by the flags on the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="adapter folder")
    add("--base", help="its base: a folder or hub id (default: what its config names)")
    add("--tokenizer_path", help="tokenizer's folder (default: the adapter's, or the base's)")
    add("--output_dir", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise UserError(f"--output_dir {args.output_dir}: exists; name another folder")

    base = args.base or find_base(args.adapter)
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    settings = load_lora(model, args.adapter)
    merged = merge_lora(model)
    tokenizer_path = args.tokenizer_path or find_tokenizer(args.adapter, base)
    find_file(tokenizer_path, TOKENIZER_FILES[0])  # refused before a file is written
    save_model(merged, tokenizer_path, args.output_dir)
    record = {
        "status": "completed",
        "stage": "merge_lora",
        "base_fingerprint": fingerprint,
        "settings": {"from_weight": Path(base).name, "adapter": asdict(settings)},
        "adapter": args.adapter.resolve().name,
        "adapter_sha256": file_sha256(args.adapter / ADAPTER_WEIGHTS),
        "parameters": merged.num_parameters(),
    }
    write_json(args.output_dir / "run.json", record)
    print(escape_control(f"{args.adapter} merged into {base}: {args.output_dir}"))


if __name__ == "__main__":
    run_script(main)
