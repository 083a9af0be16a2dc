"""What this machine has, and how a script that computes sets itself up on it."""

import ctypes
import os
import platform
import resource
import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

from dataset.command_line import SettingsError

DEVICES = ("auto", "cpu", "cuda", "mps")
# Options of glibc's mallopt (malloc.h): how much free memory it keeps before it gives some back to
# the system, and how many blocks it may map one by one.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def choose_device(name: str) -> str:
    """The device to compute on; `auto` takes CUDA, then Apple's MPS, then the CPU."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there[name]:
        raise SettingsError(f"--device {name}: this machine has none; use --device cpu")
    return name


def choose_dtype(name: str, device: str) -> str:
    """The type of matrix products; `auto` takes bfloat16 where the processor computes it."""
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    else:
        has_bfloat16 = False
    if name == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    if name == "float16" and device != "cuda":
        raise SettingsError(f"--dtype float16: needs CUDA, not {device}; use bfloat16 or float32")
    return name


def can_compile(device: str) -> bool:
    """Whether generated code can be built here: C++ on the CPU, C launchers on CUDA."""
    has_header = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    return has_header and any(
        map(shutil.which, ("g++", "clang++") if device == "cpu" else ("gcc", "cc"))
    )


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step, where it is the C library.

    Each step frees what the next allocates. By default glibc returns large blocks to the system,
    which hands them out again page by page, each cleared: 6% of a step at the default shape.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def describe_machine(device: str) -> dict:
    """Processor, cores and versions that a run's numbers depend on."""
    processor = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if device == "cpu" and cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy", "safetensors")
    return {
        "device": device,
        "processor": processor,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def peak_memory_bytes(device: str) -> int:
    """The most memory held so far: allocated on the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
