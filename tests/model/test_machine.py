"""What a result's record says of the machine and the code."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import machine
from model.cli import UserError

AMX = {"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}


def test_code_is_dirty_when_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results beside the code do not make it another."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.setattr(machine, "REPO_DIR", tmp_path)
    assert machine.git_state() == {}
    (tmp_path / "loop.py").write_text("a = 1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    (tmp_path / "run.json").write_text("{}")
    assert machine.git_state()["dirty"] is False
    (tmp_path / "loop.py").write_text("a = 2\n")
    assert machine.git_state()["dirty"] is True


def test_memory_is_unknown_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Windows has no module `resource`; nothing else may need it."""
    assert machine.peak_memory("cpu") > 1e7
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_memory("cpu") == 0


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        (AMX, "bfloat16"),
        (AMX | {"amx_bf16": False}, "float32"),  # Intel's AVX512 alone is slower
        (AMX | {"amx_bf16": False, "cpu_name": "AMD EPYC"}, "bfloat16"),
        ({}, "float32"),  # not x86
    ],
)
def test_precision_is_chosen_by_speed(
    capabilities: dict, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.choose_dtype("auto", "cpu") == dtype
    assert machine.choose_dtype("float32", "cpu") == "float32"
    with pytest.raises(UserError, match="--dtype float16: needs CUDA"):
        machine.choose_dtype("float16", "cpu")
