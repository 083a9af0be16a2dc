"""Merges an adapter into its base and writes a plain checkpoint.

    python trainer/merge_lora.py --adapter out/lora --output_dir out/lora_merged
    python trainer/merge_lora.py --adapter lora_medical_512.pth --base full_sft_512.pth \
        --output_dir out/medical_merged

The adapter is a folder of ours or of PEFT's, or a MiniMind adapter .pth, whose base is named with
--base. The result loads in transformers, vLLM or llama.cpp's converter without any adapter. An
update of a head that is tied to the embedding is refused: merging it would change both ends.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.untrusted import shown
from model.model_lora import AdapterError, find_base, load_lora, load_minimind_lora, merged_model
from model.model_minimind import TOKENIZER_DIR, load_model, save_model
from trainer.arguments import Parser, SettingsError
from trainer.trainer_utils import run_script


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="adapter folder, or a MiniMind adapter .pth")
    add("--base", type=Path, help="its base (default: the one that the adapter's config names)")
    add("--num_attention_heads", type=int, default=8, help="of a base that is a .pth (8)")
    add("--output_dir", type=Path, required=True, help="folder to make")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.output_dir.exists():
        raise SettingsError(f"--output_dir {args.output_dir}: exists; name another folder")
    if args.num_attention_heads < 1:
        raise SettingsError(f"--num_attention_heads {args.num_attention_heads}: must be 1 or more")
    is_minimind = args.adapter.suffix == ".pth"
    if is_minimind and args.base is None:
        raise AdapterError(f"{args.adapter}: a MiniMind adapter names no base; give --base")
    base = args.base or find_base(args.adapter)
    model = load_model(base, args.num_attention_heads)
    load = load_minimind_lora if is_minimind else load_lora
    load(model, args.adapter)
    save_model(merged_model(model), base if base.is_dir() else TOKENIZER_DIR, args.output_dir)
    print(shown(f"{args.adapter} merged into {base}: {args.output_dir}"))
    return 0


if __name__ == "__main__":
    run_script(main)
