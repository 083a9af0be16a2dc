"""Weights of the Hugging Face hub, by their id."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from model.files import CheckpointError

WHAT = ["*.json", "*.safetensors", "*.jinja"]  # no code


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path here may be an id: `owner/name`."""
    path = Path(name)
    is_local = path.exists() or path.is_absolute() or name.startswith((".", "out/"))
    return not is_local and path.suffix != ".pth" and name.count("/") == 1


def fetch(name: str, where: str) -> Path:
    """The folder that holds a hub id's weights, downloaded if they are not cached.

    Args:
        where: what names it, for the error.

    Raises:
        CheckpointError: it is not to be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=WHAT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{where} {name}: neither a local path nor to be had from the hub "
            f"({type(error).__name__})"
        ) from error
