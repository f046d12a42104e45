"""On what a number was made: versions of the packages and the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "timm", "numpy", "flwr")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide numbers; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine(device: str) -> dict[str, str | int | None]:
    gpu = None
    if device.startswith("cuda"):
        import torch  # here, because everything else in this module does without it

        gpu = torch.cuda.get_device_name(device)
    return {
        "device": device,
        "gpu": gpu,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
