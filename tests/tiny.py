"""Tiny random models, and the way that scripts end, for tests of different files."""

from collections.abc import Callable

import pytest
import torch

from model.files import run_script
from model.model_minimind import MiniMindForCausalLM, minimind_config


def tiny_model(seed: int = 0, vocab_size: int = 6400) -> MiniMindForCausalLM:
    """A random model; scaled up, so that its outputs vary and greedy choices are clear."""
    torch.manual_seed(seed)
    config = minimind_config(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model


def exit_code(main: Callable[[list[str]], int], words: list[str]) -> int:
    """What a script with these words on its command line ends with."""
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: main(words))
    return caught.value.code
