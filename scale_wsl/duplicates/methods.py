"""The two ways of looking at images: R-MAC for copies that were edited, thumbnails for those that are nearly exact.

A method turns an image into pixels (in threads), pixels into features (which are kept), and features into the vectors
that `search` compares. Must never let an image's features depend, but for rounding, on its neighbours in a batch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from scale_wsl.corpus.dedup import NEAR, correlation_vectors
from scale_wsl.corpus.images import SIDE, RefusedImage, look
from scale_wsl.duplicates.network import Network
from scale_wsl.duplicates.rmac import SCALES, Whitening, region_vectors, rmac
from scale_wsl.errors import UserError
from scale_wsl.loading.decode import CorruptImage, decode

__all__ = ["MAX_PIXELS", "Method", "RmacMethod", "ThumbnailMethod", "Unreadable", "input_size", "network_input"]

MAX_PIXELS = 100_000_000
"""Width x height of the largest image that is decoded."""

# Of EfficientNet-Lite0: 99.2 and 99.6 % of the edited copies of benchmarks/duplicates.py are at least so similar to
# their original, and 6 and 7 % of the other images to some image.
_SUGGESTED, _SUGGESTED_WHITENED = 0.75, 0.6
_STRIDE = 32  # pixels of the image for one place of the last feature map, of every network here
_WIDEST = 3.0  # aspect ratio beyond which an image is squeezed


class Unreadable(Exception):  # noqa: N818 - it names the image
    """An image that has no features; the message says why."""


class Method(Protocol):
    """See the module's docstring."""

    @property
    def name(self) -> str:
        """One of `rmac` and `thumbnail`."""

    @property
    def about(self) -> str:
        """A line for people."""

    @property
    def suggested(self) -> float:
        """The similarity from which on a pair is worth a close look; where the report's slider starts."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that features depend on beside the image, as JSON."""

    @property
    def dtype(self) -> type[np.generic]:
        """Of features."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's features."""

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file's pixels, as `features` takes them; safe in threads.

        Raises:
            Unreadable: It is damaged, too large, or no image.
        """

    def features(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """The features `[n, *shape]` of images whose pixels have one shape."""

    def vectors(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """The vectors `[n, D]` of training images."""

    def queries(self, features: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The vectors `[n, D]` of evaluation images, once for each way to hold them up; the most similar way counts."""


class ThumbnailMethod:
    """Correlation of grey 16 x 16 thumbnails, mirror images included: the rule of `corpus.dedup` without a threshold.

    The similarity is `1 - |a - b|^2 / 2` of the scaled thumbnails, which is their correlation unless one hardly varies.
    """

    name = "thumbnail"
    about = f"correlation of grey {SIDE} x {SIDE} thumbnails, mirror images included"
    suggested = NEAR
    dtype = np.uint8
    shape: tuple[int, ...] = (SIDE, SIDE)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Method.identity`."""
        return {"method": self.name, "side": SIDE, "max_pixels": MAX_PIXELS}

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """See `Method.pixels`."""
        try:
            return look(data, MAX_PIXELS).thumbnail
        except RefusedImage as error:
            raise Unreadable(error.detail or error.reason) from None

    def features(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """See `Method.features`."""
        return np.stack(pixels)

    def vectors(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """See `Method.vectors`."""
        return _with_lengths(correlation_vectors(features), query=False)

    def queries(self, features: NDArray[Any]) -> list[NDArray[np.float32]]:
        """See `Method.queries`."""
        return [_with_lengths(correlation_vectors(features, mirrored=way), query=True) for way in (False, True)]


def _with_lengths(vectors: NDArray[np.float32], *, query: bool) -> NDArray[np.float32]:
    """Two more coordinates, with which a dot product becomes 1 - |a - b|^2 / 2 = ab + (1 - aa) / 2 + (1 - bb) / 2."""
    lack = (1 - (vectors.astype(np.float64) ** 2).sum(1)) / 2
    ends = (lack, np.ones(len(vectors))) if query else (np.ones(len(vectors)), lack)
    return np.column_stack([vectors, *ends]).astype(np.float32)


class RmacMethod:
    """R-MAC of a network's last feature map; features in fp16.

    Args:
        network: Whose feature maps.
        side: Images are resized to about `side` x `side` pixels, see `input_size`.
        whitening: Of the region vectors; None: none.
        device: Where the network runs.
    """

    name = "rmac"
    dtype = np.float16

    def __init__(
        self,
        network: Network,
        *,
        side: int = 224,
        whitening: Whitening | None = None,
        device: torch.device | None = None,
    ) -> None:
        if not _STRIDE <= side <= 2048:
            raise UserError(f"--side is {side}, but must be between {_STRIDE} and 2048 pixels")
        self.device = device or torch.device("cpu")
        self.network = network.to(self.device)
        self.side = side
        self.whitening = whitening.to(self.device) if whitening else None
        self.shape: tuple[int, ...] = (whitening.projection.shape[1] if whitening else network.channels,)

    @property
    def about(self) -> str:
        """See `Method.about`."""
        whitened = f", whitened to {self.shape[0]} dimensions" if self.whitening else ""
        weights = "random weights, so its neighbours mean little" if self.network.is_random else self.network.weights
        return f"R-MAC of {self.network.name} ({weights}) at {self.side} pixels{whitened}"

    @property
    def suggested(self) -> float:
        """See `Method.suggested`."""
        return _SUGGESTED_WHITENED if self.whitening else _SUGGESTED

    @property
    def identity(self) -> dict[str, Any]:
        """See `Method.identity`."""
        found: dict[str, Any] = {
            "method": self.name,
            **self.network.identity,
            "side": self.side,
            "scales": SCALES,
            "max_pixels": MAX_PIXELS,
        }
        return found | ({"whitening": self.whitening.digest} if self.whitening else {})

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """See `Method.pixels`; `[3, h, w]`."""
        try:
            return network_input(decode(data, MAX_PIXELS), self.side)
        except CorruptImage as error:
            raise Unreadable(str(error)) from None

    def features(self, pixels: Sequence[NDArray[np.uint8]]) -> NDArray[Any]:
        """See `Method.features`.

        Raises:
            UserError: The network gives no finite numbers.
        """
        with torch.no_grad():
            found = rmac(self._maps(pixels), self.whitening).half()
        if not found.isfinite().all():
            raise UserError(f"{self.network.name} gives values that are not finite: are its weights whole?")
        return np.asarray(found.cpu().numpy())

    def regions(self, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Region vectors `[n * R, channels]`, from which a whitening is learned."""
        with torch.no_grad():
            return region_vectors(self._maps(pixels)).flatten(0, 1)

    def _maps(self, pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        return self.network.feature_maps(torch.from_numpy(np.stack(pixels)).to(self.device))

    def vectors(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """See `Method.vectors`."""
        return features.astype(np.float32)

    def queries(self, features: NDArray[Any]) -> list[NDArray[np.float32]]:
        """See `Method.queries`; one way: networks are trained on mirrored images as well."""
        return [self.vectors(features)]


def input_size(width: int, height: int, side: int) -> tuple[int, int]:
    """The (width, height) that an image is resized to: about `side` x `side` pixels, multiples of 32, its aspect ratio.

    A fixed area costs the same for every image, and few sizes let images be batched. Beyond 3:1 an image is squeezed
    to that.
    """
    ratio = min(_WIDEST, max(1 / _WIDEST, width / height))
    return tuple(  # type: ignore[return-value]
        max(_STRIDE, _STRIDE * math.floor(length / _STRIDE + 0.5))
        for length in (side * math.sqrt(ratio), side / math.sqrt(ratio))
    )


def network_input(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """An RGB image as `[3, h, w]`, bilinear with antialiasing."""
    resized = image.resize(input_size(*image.size, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def preview(data: bytes, side: int) -> bytes | None:
    """A small JPEG of an image for a report, its longer side `side` pixels; None where it cannot be read."""
    try:
        image = decode(data, MAX_PIXELS)
    except CorruptImage:
        return None
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75, optimize=True)
    return buffer.getvalue()
