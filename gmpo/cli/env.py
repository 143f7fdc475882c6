"""gmpo env: what a bug report needs."""

import importlib.metadata
import platform
from collections.abc import Sequence

PACKAGES = (
    "gmpo",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "vllm",
    "deepspeed",
    "reasoning-gym",
)


def run(arguments: Sequence[str]) -> None:
    """Print versions and devices."""
    if arguments:
        raise ValueError(f"it takes no arguments, got {' '.join(arguments)!r}.")
    lines = {"python": f"{platform.python_version()} on {platform.platform()}"}
    lines |= {package: version(package) for package in PACKAGES}
    lines["device"] = device()
    for name, value in lines.items():
        print(f"{name:<14}{value}")


def version(package: str) -> str:
    """Return the installed version of `package`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> str:
    """Return the accelerators that torch sees, or the processor."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(
            f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices
        )
        return f"{names}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU, {torch.get_num_threads()} threads"
