"""What a run ran on: versions, hardware and the commit of the code. Never environment variables: they hold secrets."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["environment"]

_PACKAGES = ("torch", "torchvision", "deepspeed", "numpy", "pillow", "nltk", "pyarrow", "safetensors", "mlflow")


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages that matter, platform, CPU, GPUs, and the commit where there is one."""
    return {
        "python": platform.python_version(),
        "packages": {name: version for name in ("scale-wsl", *_PACKAGES) if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
        "git": _git(Path(__file__).resolve()),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git(file: Path) -> dict[str, Any] | None:
    """The commit of the working tree that `file` is a tracked part of, and whether the tree differs from it."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", file.name) is None:
        return None  # installed somewhere inside another project's tree, or no tree at all
    commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(status)} if commit else None
