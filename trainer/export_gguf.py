r"""Write a model as one GGUF file: weights, shape, tokenizer and chat template.

    python trainer/export_gguf.py --model out/lora --output out/lora.gguf \
        --check_text dataset/data/world/probe_combinations_tune.jsonl

An adapter is merged into its base first. llama.cpp runs the file, and transformers reads its
weights by `from_pretrained(folder, gguf_file="lora.gguf")`. Transformers' own reading of the
tokenizer in it knows fewer rules than llama.cpp's, so take the tokenizer from the model's folder.

A GGUF file only names the rules that cut text into words, and the reader has them built in. Under
other rules than the tokenizer's own, the model reads other tokens than in its training. So the
texts of --check_text are tokenized by the rules of each name, the name that fits best is written,
and the export is refused if more texts change than --allow_differences says. English prompts of the
small world fit, but its Chinese does not. This script needs `pip install gguf`.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.world.generate import ensure_world
from model.checkpoint import Checkpoint, load_checkpoint
from model.files import UserError, escape_control, make_parser, run_script, write_aside
from model.model_lora import merge_lora
from model.model_minimind import list_weights
from trainer.arguments import SHARE
from trainer.pre_tokenizers import choose_pre_tokenizer


def write_gguf(checkpoint: Checkpoint, pre_tokenizer: str, path: Path) -> None:
    """Write a file in float32, with the names and the order of rows of llama.cpp's converter."""
    import gguf  # not at the head: nothing else here needs the package

    model, tokenizer = checkpoint
    config = model.config
    is_llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    architecture = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in list_weights(model).items():
        if is_llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            # The two rows of a rotary pair stand half a head apart here, and side by side there.
            halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))  # (heads, 2, half, in)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())

    ids = range(config.vocab_size)  # the tokenizer may have fewer
    kinds = dict.fromkeys(tokenizer.get_vocab().values(), gguf.TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        kinds[token_id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = stored["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([tokenizer.convert_ids_to_tokens(i) or f"[PAD{i}]" for i in ids])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in ids])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # where a model expects it, the template has it
    # Only transformers knows the tag around what trains, so it becomes one that all Jinja has.
    template = re.sub(r"(\{%-? *)generation\b", r"\1if true", tokenizer.chat_template)
    writer.add_chat_template(re.sub(r"(\{%-? *)endgeneration\b", r"\1endif", template))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(argv: list[str] | None = None) -> None:
    """Export by the flags on the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model or an adapter, or a model's hub id")
    add("--output", type=Path, required=True, help="file to make")
    add("--check_text", type=Path, help="JSONL of texts or pairs (the world's held-out text)")
    share = "share of these texts that may become other tokens (0.02)"
    add("--allow_differences", type=SHARE, default=0.02, help=share)
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"--output {args.output}: exists; name another file")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is missing: pip install gguf")

    model, tokenizer = load_checkpoint(args.model)
    check_text = args.check_text or ensure_world()["pretrain_valid"]
    name = choose_pre_tokenizer(tokenizer, check_text, args.allow_differences)
    checkpoint = (merge_lora(model), tokenizer)
    write_aside(args.output, lambda aside: write_gguf(checkpoint, name, aside))
    print(escape_control(f"{args.output}: written with the pre-tokenizer {name}"))


if __name__ == "__main__":
    run_script(main)
