"""The machine and the code of a result: device, precision, memory, versions, commit."""

import os
import platform
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from model.cli import UserError
from model.files import REPO_DIR

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors")


def choose_device(name: str) -> str:
    """Choose where to compute; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    best = accelerator.type if accelerator else "cpu"
    if name not in ("auto", "cpu", best):
        raise UserError(f"--device {name}: this machine has none; use --device cpu")
    return best if name == "auto" else name


def choose_dtype(name: str, device: str) -> str:
    """Choose the type of matrix products; `auto` takes bfloat16 where that is fast."""
    if name == "float16" and device != "cuda":
        raise UserError(f"--dtype float16: needs CUDA, not {device}; use bfloat16 or float32")
    if name != "auto":
        return name
    is_fast = False
    if device == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        cpu = torch.cpu.get_capabilities()
        # Intel's processors are fast by AMX alone; AMD's by AVX512.
        is_enough = cpu.get("amx_bf16", False) or "Intel" not in cpu.get("cpu_name", "")
        is_fast = cpu.get("avx512_bf16", False) and is_enough
    return "bfloat16" if is_fast else "float32"


def git_state() -> dict:
    """Return the commit of this code and whether its files differ from it; empty without git."""
    git = partial(subprocess.check_output, cwd=REPO_DIR, text=True, stderr=subprocess.DEVNULL)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).strip()
        changes = git(["git", "status", "--porcelain", "--", "*.py", "*.toml", "model"])
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def peak_memory(device: str) -> int:
    """Return the most bytes that this process has had on the device; 0 where nothing tells."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # Windows has none
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine(device: str) -> dict:
    """Return the processor, cores and versions that rounding depends on."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    elif cpuinfo.is_file() and (model := re.search("model name\t: (.*)", cpuinfo.read_text())):
        processor = f"{model[1]}, {torch.backends.cpu.get_cpu_capability()}"  # such as AVX2
    return {
        "device": device,
        "processor": processor,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
