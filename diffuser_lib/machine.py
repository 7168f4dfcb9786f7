"""What a machine has and how fast it is.

Packages    PACKAGES, is_installed, package_version
Speed       matrix_rate: products of matrices, in GFLOP/s
Words       duration: seconds for people

Needs torch.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time

import torch

# Packages that can be missing: what is imported, what is installed with pip, what asks for it.
PACKAGES = (
    ("torchvision", "torchvision", "datasets other than digits and your own"),
    ("scipy", "scipy", "the datasets svhn and flowers102"),
    ("pyarrow", "pyarrow", "--path_to_data with Parquet files"),
    ("datasets", "datasets", "--path_to_data hf:OWNER/NAME"),
    ("matplotlib", "matplotlib", "plot_loss.py"),
    ("tensorboard", "tensorboard", "--use_tensorboard"),
    ("wandb", "wandb", "--use_wandb"),
    ("psutil", "psutil", "the load of the machine in metrics.csv"),
    ("pynvml", "nvidia-ml-py", "the load of NVIDIA GPUs"),
    ("diffusers", "diffusers", "convert.py"),
    ("safetensors", "safetensors", "convert.py"),
    ("torch_fidelity", "torch-fidelity", "the Inception metrics of evaluate.py"),
    ("gradio", "gradio", "app.py"),
    ("huggingface_hub", "huggingface_hub", "convert.py to-hub"),
)


def is_installed(module: str) -> bool:
    """Whether a module could be imported, without importing it. A mere folder of that name is none."""
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None
    except (ImportError, ValueError):                            # half removed, or switched off
        return False


def package_version(package: str) -> str:
    """The version of an installed package; empty where its files do not say."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """How fast square matrices are multiplied, in GFLOP/s: the best of products that take about so many seconds."""
    def multiply(size: int) -> float:
        a = torch.ones(size, size, device=device, dtype=dtype)
        start_time = time.perf_counter()
        float((a @ a)[0, 0])                                     # waits for the device
        return time.perf_counter() - start_time

    size = 256
    multiply(size)                                               # the first one loads a library
    took = multiply(size)
    while took < seconds / 10 and size < 8192:
        size *= 2
        took = min(multiply(size), multiply(size)) if took < seconds / 50 else multiply(size)

    end = time.perf_counter() + seconds - took
    while time.perf_counter() < end:
        took = min(took, multiply(size))
    return 2 * size**3 / took / 1e9


def duration(seconds: float) -> str:
    """Seconds as people say them: 182 ms, 4.5 s, 45 s, 12 min, 3 h 20 min, 26 days."""
    if seconds < 0.995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 72:
        return f"{hours} h {minutes} min"
    return f"{round(hours / 24):,} days"
