"""Small random models and adapters for the tests of this folder."""

from pathlib import Path

import torch
from torch import nn

from model.checkpoint import load_model
from model.model_lora import LoRALinear, LoraSettings, apply_lora, save_lora
from model.model_minimind import MiniMindForCausalLM, minimind_config, weights_fingerprint
from tests import DEVICE

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
IDS = torch.tensor([[5, 1, 300, 2, 17, 1, 4000, 99]])
# Logits are below 5; those of float32 and float64 differ by up to 5e-5.
ROUNDING = 1e-5 if DEVICE == "cpu" else 5e-4


def make_model(seed: int = 0, noise: float = 0.3, **shape: float) -> MiniMindForCausalLM:
    """Build a random model whose logits differ clearly between positions."""
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(minimind_config(**(SMALL | shape))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.shape[0] == 6400 else noise
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def compute_logits(model: nn.Module) -> torch.Tensor:
    """Compute the logits of `IDS` in evaluation mode, on `DEVICE`."""
    with torch.no_grad():
        return model.to(DEVICE).eval()(IDS.to(DEVICE)).logits


def lora_layers(model: nn.Module) -> list[LoRALinear]:
    """List the linears with a low-rank update."""
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def move_parameters(model: nn.Module, seed: int = 1) -> None:
    """Move every trainable parameter away from its start, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def save_adapter(
    base: Path, settings: LoraSettings, folder: Path, named: str = ""
) -> MiniMindForCausalLM:
    """Put an adapter on a saved base, move and save it; return the adapted model."""
    model = load_model(base)
    fingerprint = weights_fingerprint(model)
    apply_lora(model, settings)
    move_parameters(model)
    save_lora(model, settings, named or str(base), fingerprint, folder)
    return model
