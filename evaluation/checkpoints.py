"""Finds saved checkpoints and loads them for generation; lists the runs of a folder."""

import datetime
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from dataset.command_line import SettingsError
from model.checkpoint import TOKENIZER_FILES, load_model, tokenizer_of
from model.files import CheckpointError, read_json
from model.model_lora import ADAPTER_CONFIG, find_base, load_lora
from model.model_minimind import MiniMindForCausalLM
from trainer.run_folder import checkpoint_name


@dataclass(frozen=True)
class Checkpoint:
    """A saved model, or an adapter with the base it belongs to."""

    name: str
    path: Path
    base: Path | None  # for an adapter

    @property
    def model_path(self) -> Path:
        """Where the full weights are."""
        return self.base or self.path

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the full weights."""
        return (self.model_path / TOKENIZER_FILES[0]).is_file()

    def run_record(self) -> dict:
        """The run.json beside the weights; empty where there is none."""
        path = self.path / "run.json"
        return read_json(path) if path.is_file() else {}


def find_checkpoint(path: Path, flag: str = "--model") -> Checkpoint:
    """What `path` holds, before anything is loaded.

    Raises:
        CheckpointError: nothing is there, or the adapter's base is not.
        AdapterError: the adapter's config cannot be used.
    """
    name, config = checkpoint_name(path), path / ADAPTER_CONFIG
    if not path.exists():
        raise CheckpointError(f"{flag} {path}: no such file or folder; train it or mend the path")
    if not config.is_file():
        return Checkpoint(name, path, base=None)
    return Checkpoint(name, path, find_base(path))


def find_checkpoints(paths: list[Path], tokenizer_path: Path | None) -> list[Checkpoint]:
    """What `paths` hold.

    Raises:
        SettingsError: a tokenizer is named for models of which some have one and others none.
        CheckpointError, AdapterError: see `find_checkpoint`.
    """
    found = [find_checkpoint(path) for path in paths]
    owners = [checkpoint.name for checkpoint in found if checkpoint.has_tokenizer]
    if tokenizer_path and 0 < len(owners) < len(found):
        raise SettingsError(
            f"--tokenizer_path {tokenizer_path}: {owners[0]} has its own tokenizer; measure it in "
            "a call without the flag"
        )
    return found


def load_checkpoint(
    checkpoint: Checkpoint,
    tokenizer_path: Path | None,
    device: str,
    dtype: torch.dtype,
    num_attention_heads: int | None = None,
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]:
    """The model, adapter in place and not merged, ready to generate; and its tokenizer.

    Args:
        tokenizer_path: by default the model's own; a .pth has none.
        num_attention_heads: see `load_model`.

    Raises:
        CheckpointError: files do not fit, or a weight is not a number.
        AdapterError: the adapter does not fit, or was trained on another base.
    """
    model = load_model(checkpoint.model_path, num_attention_heads)
    if checkpoint.base:
        load_lora(model, checkpoint.path)
    tokenizer = tokenizer_of(model, checkpoint.model_path, tokenizer_path)
    return model.to(device, dtype).eval(), tokenizer


RUN_COLUMNS = (
    "name",
    "base",
    "stage",
    "status",
    "size",
    "trainable",
    "steps",
    "eval loss",
    "written",
)


def run_rows(folder: Path) -> list[list[str]]:
    """One row of `RUN_COLUMNS` for every run or checkpoint in `folder`, by name; "-": not known.

    Raises:
        CheckpointError: the folder is missing or holds none, or a run.json is broken.
    """
    if not folder.is_dir():
        raise CheckpointError(f"--list {folder}: no such folder; train something first")
    marks = ("run.json", "config.json", ADAPTER_CONFIG)
    found = [path for path in sorted(folder.iterdir()) if any((path / m).is_file() for m in marks)]
    if not found:
        raise CheckpointError(f"--list {folder}: holds no run; train something first")
    return [run_row(Checkpoint(path.name, path, base=None)) for path in found]


def base_name(run: Checkpoint) -> str:
    """The name of what a run started from, by its record or its adapter's config; "-": nothing."""
    start = run.run_record().get("settings", {}).get("from_weight", "none")
    config = run.path / ADAPTER_CONFIG
    if start == "none" and config.is_file():
        start = read_json(config).get("base_model_name_or_path") or "none"
    return "-" if start == "none" else checkpoint_name(Path(start))


def run_row(run: Checkpoint) -> list[str]:
    """What run.json tells of a run, as text."""
    record = run.run_record()

    def told(name: str, form: str = "") -> str:
        value = record.get(name)
        return "-" if value is None else format(value, form)

    steps = told("steps", ",")
    done = told("step", ",")
    written = max(path.stat().st_mtime for path in run.path.iterdir() if path.is_file())
    return [
        run.name,
        base_name(run),
        told("stage"),
        told("status"),
        told("parameters", ","),
        told("trainable_parameters", ","),
        steps if done in (steps, "-") else f"{done} of {steps}",
        told("eval_loss", ".4f"),
        f"{datetime.datetime.fromtimestamp(written):%Y-%m-%d %H:%M}",
    ]
