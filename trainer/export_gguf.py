r"""Write a model as one GGUF file: weights, shape, tokenizer and chat template.

    python trainer/export_gguf.py --model out/lora --output out/lora.gguf \
        --check_text dataset/data/world/probe_combinations_tune.jsonl --allow_differences 0.02

An adapter is merged into its base first. llama.cpp runs the file, and transformers reads its
weights by `from_pretrained(folder, gguf_file="lora.gguf")`. Transformers' own reading of the
tokenizer in it knows fewer rules than llama.cpp's, so take the tokenizer from the model's folder.

A GGUF file only names the rules that cut text into words, and the reader has them built in. Under
other rules a model reads tokens that it never saw in training. So the texts of --check_text are
tokenized by the rules of each name, the name that fits best is written, and the export is refused
if more texts change than --allow_differences says. This script needs `pip install gguf`.
"""

import json
import re
import sys
from pathlib import Path

try:
    import gguf
except ImportError:
    gguf = None  # nothing else here needs it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.checkpoint import Checkpoint, Tokenizer, load_checkpoint
from model.cli import SHARE, UserError, escape_control, make_parser, run_script
from model.files import write_aside
from model.model_lora import merge_lora
from model.model_minimind import Config, MiniMindForCausalLM, list_weights
from trainer.pre_tokenizers import choose_pre_tokenizer


def write_gguf(checkpoint: Checkpoint, pre_tokenizer: str, path: Path) -> None:
    """Write a file in float32."""
    model, tokenizer = checkpoint
    writer = gguf.GGUFWriter(path, model.config.model_type)
    add_shape(writer, model.config)
    add_weights(writer, model)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: "gguf.GGUFWriter", config: Config) -> None:
    """Add the numbers that describe the layers."""
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


def add_weights(writer: "gguf.GGUFWriter", model: MiniMindForCausalLM) -> None:
    """Add the weights with the names and the order of rows of llama.cpp's converter."""
    config = model.config
    is_llama = config.model_type == "llama"
    architecture = gguf.MODEL_ARCH.LLAMA if is_llama else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in list_weights(model).items():
        if is_llama and name.endswith(("q_proj.weight", "k_proj.weight")):
            # The two rows of a rotary pair stand half a head apart here, and side by side there.
            halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))  # (heads, 2, half, in)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())


def add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add tokens, merges and the chat template; the model may have rows without a token."""
    kinds = dict.fromkeys(tokenizer.get_vocab().values(), gguf.TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        kinds[token_id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    ids = range(vocab_size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
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


def main(argv: list[str] | None = None) -> None:
    """Export by the flags on the command line."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="folder of a model or an adapter, or a model's hub id")
    add("--output", type=Path, required=True, help="file to make")
    add("--check_text", type=Path, required=True, help="JSONL of texts or pairs like your prompts")
    share = "share of these texts that may become other tokens (0)"
    add("--allow_differences", type=SHARE, default=0.0, help=share)
    args = parser.parse_args(argv)
    if args.output.exists():
        raise UserError(f"--output {args.output}: exists; name another file")
    if gguf is None:
        raise UserError("the package gguf is missing: pip install gguf")

    model, tokenizer = load_checkpoint(args.model)
    pre_tokenizer = choose_pre_tokenizer(tokenizer, args.check_text, args.allow_differences)
    checkpoint = (merge_lora(model), tokenizer)
    write_aside(args.output, lambda aside: write_gguf(checkpoint, pre_tokenizer, aside))
    print(escape_control(f"{args.output}: written with the pre-tokenizer {pre_tokenizer}"))


if __name__ == "__main__":
    run_script(main)
