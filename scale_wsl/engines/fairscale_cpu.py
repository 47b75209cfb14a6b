"""Lets fairscale 0.4.13 run where there is no GPU, so that the engine can be tested: it uses CUDA streams throughout.

Only what fairscale's own module sees of `torch.cuda` is replaced, by streams that do nothing, and
`Tensor.record_stream`, which torch refuses on CPU tensors. Never used where there is a GPU.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch

__all__ = ["install"]


class _Stream:
    def wait_stream(self, *_: Any) -> None:
        """Nothing runs beside the CPU's own order."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


_STREAM = _Stream()


class _View(types.ModuleType):
    """A module with some attributes replaced."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install() -> None:
    """Replace what fairscale's FSDP module calls `torch`; a second call does nothing."""
    import fairscale.nn.data_parallel.fully_sharded_data_parallel as fairscale_fsdp

    if isinstance(fairscale_fsdp.torch, _View):
        return
    cuda = _View(
        torch.cuda,
        {
            "Stream": lambda *_, **__: _STREAM,
            "current_stream": lambda *_: _STREAM,
            "stream": lambda _: contextlib.nullcontext(),
            "is_available": lambda: True,
            "synchronize": lambda *_: None,
        },
    )
    fairscale_fsdp.torch = _View(torch, {"cuda": cuda})
    on_gpu = torch.Tensor.record_stream

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        if tensor.is_cuda:
            on_gpu(tensor, stream)

    torch.Tensor.record_stream = record_stream  # type: ignore[assignment,method-assign]
