"""R-MAC (Tolias, Sicre and Jegou 2016): one vector for an image, from the maxima of its feature map over regions.

Must never depend on what else is in a batch: an image's vector is a function of its own feature map alone.

Regions are squares at L scales (their section 3.2). At scale 1 the side is the shorter side of the map, and m of them
are spread over the longer side, as many as make neighbours overlap by 40 % as nearly as possible. At scale l the side
is 2 / (l + 1) of the shorter one, with l regions along the shorter side and l + m - 1 along the longer. Each region's
maxima are scaled to length 1, whitened and scaled again where there is a whitening, added up, and scaled to length 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = ["SCALES", "Grid", "Moments", "Whitening", "region_grids", "region_vectors", "rmac"]

SCALES = 3
"""L, as in Tolias et al. 2016, section 5."""

_OVERLAP = Fraction(2, 5)  # of neighbours at scale 1 (section 3.2)
_TINY = 1e-12  # a region in which nothing is active has no direction, and keeps length 0
_LEAST_VARIANCE = 1e-6  # of the largest one's; directions of less are rounding, which whitening would blow up


@dataclass(frozen=True)
class Grid:
    """The regions of one scale: squares of `side`, one for each pair of a top and a left edge."""

    side: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]


def region_grids(height: int, width: int, scales: int = SCALES) -> list[Grid]:
    """The regions of a feature map of `height` x `width`, by scale.

    A map so small that a scale's side would be 0 has regions of side 1 there.
    """
    short, long = sorted((height, width))
    along = _count_along(short, long)
    grids = []
    for scale in range(1, scales + 1):
        side = max(1, 2 * short // (scale + 1))
        fewer, more = scale, scale + along - 1
        tops, lefts = (fewer, more) if height <= width else (more, fewer)
        grids.append(Grid(side, _spread(height - side, tops), _spread(width - side, lefts)))
    return grids


def _count_along(short: int, long: int) -> int:
    """Regions at scale 1: 1 for a square, else the number (2 or more) whose overlap is nearest to 40 %; ties: fewer."""
    if short == long:
        return 1
    most = 2 + 2 * -(-long // short)  # overlap grows with the number, and is above 40 % long before

    def off(count: int) -> tuple[Fraction, int]:
        return abs(
            1 - Fraction(long - short, (count - 1) * short) - _OVERLAP
        ), count  # exact, or ties would be rounding's

    return min(range(2, most + 1), key=off)


def _spread(room: int, count: int) -> tuple[int, ...]:
    """`count` whole numbers from 0 to `room`, evenly spread and rounded down; 0 alone where there is one."""
    return tuple(number * room // max(1, count - 1) for number in range(count))


def region_vectors(maps: Tensor, scales: int = SCALES) -> Tensor:
    """The maxima of each region, scaled to length 1: `[b, R, c]` from feature maps `[b, c, h, w]`."""
    found = []
    for grid in region_grids(maps.shape[2], maps.shape[3], scales):
        everywhere = F.max_pool2d(maps, grid.side, stride=1)
        tops, lefts = (torch.tensor(edges, device=maps.device) for edges in (grid.tops, grid.lefts))
        found.append(everywhere.index_select(2, tops).index_select(3, lefts).flatten(2))
    return F.normalize(torch.cat(found, dim=2).transpose(1, 2), dim=2, eps=_TINY)


def rmac(maps: Tensor, whitening: Whitening | None = None, scales: int = SCALES) -> Tensor:
    """R-MAC vectors of length 1, `[b, c]` from feature maps `[b, c, h, w]`; `[b, d]` with a whitening."""
    regions = region_vectors(maps, scales)
    if whitening is not None:
        regions = whitening(regions)
    return F.normalize(regions.sum(dim=1), dim=1, eps=_TINY)


# --- whitening ---------------------------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of vectors `[n, c]` that come a batch at a time; takes c x c x 8 bytes."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.products = torch.zeros(channels, channels, dtype=torch.float64)

    def add(self, vectors: Tensor) -> None:
        """Take in `[n, c]`."""
        vectors = vectors.double().cpu()
        self.count += len(vectors)
        self.sum += vectors.sum(0)
        self.products += vectors.t() @ vectors


@dataclass(frozen=True)
class Whitening:
    """PCA whitening of region vectors: `(x - mean) @ projection`, scaled to length 1 (Jegou and Chum 2012).

    Attributes:
        mean: `[c]`
        projection: `[c, d]`, the principal axes, each divided by the standard deviation along it.
    """

    mean: Tensor
    projection: Tensor

    @classmethod
    def learn(cls, moments: Moments, dimensions: int | None = None) -> Whitening:
        """From the moments of region vectors.

        Args:
            moments: Of a sample.
            dimensions: Axes to keep, those of most variance; None: all whose variance is more than rounding.

        Raises:
            UserError: The sample varies in fewer directions than are asked for.
        """
        if moments.count < 2:
            raise UserError(f"whitening is learned from regions of images, and there are {moments.count}, too few")
        mean = moments.sum / moments.count
        covariance = moments.products / moments.count - torch.outer(mean, mean)
        variance, axes = torch.linalg.eigh(covariance)
        variance, axes = variance.flip(0), axes.flip(1)
        there = int((variance > _LEAST_VARIANCE * variance[0]).sum()) if variance[0] > 0 else 0
        if there == 0 or (dimensions is not None and dimensions > there):
            raise UserError(
                f"the sample's regions vary in {there} directions, too few to whiten "
                f"{dimensions or 'any'} dimensions: take a larger sample, or fewer dimensions"
            )
        kept = dimensions or there
        largest = axes[:, :kept].abs().argmax(0)  # an axis has no sign of its own: its largest element is positive
        signs = axes[largest, torch.arange(kept)].sign()
        projection = axes[:, :kept] * signs / variance[:kept].sqrt()
        return cls(mean.float(), projection.float())

    def __call__(self, vectors: Tensor) -> Tensor:
        """`[..., c]` to `[..., d]`, length 1."""
        return F.normalize((vectors - self.mean) @ self.projection, dim=-1, eps=_TINY)

    def to(self, device: torch.device) -> Whitening:
        """The same, on a device."""
        return Whitening(self.mean.to(device), self.projection.to(device))

    @property
    def digest(self) -> str:
        """SHA-256 of its numbers."""
        parts = (self.mean.cpu().numpy().tobytes(), self.projection.cpu().contiguous().numpy().tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors, published by one rename."""
        from safetensors.torch import save_file

        with published_file(path) as aside:
            save_file({"mean": self.mean.contiguous(), "projection": self.projection.contiguous()}, aside)

    @classmethod
    def load(cls, path: Path, channels: int) -> Whitening:
        """Read what `save` wrote.

        Raises:
            UserError: It is no whitening of vectors `[..., channels]`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is no whitening that can be read ({error}): remove it, and it is learned again"
            ) from None
        mean, projection = tensors.get("mean"), tensors.get("projection")
        if (
            mean is None
            or projection is None
            or mean.shape != (channels,)
            or projection.ndim != 2
            or projection.shape[0] != channels
            or not (mean.dtype == projection.dtype == torch.float32)
            or not (mean.isfinite().all() and projection.isfinite().all())
        ):
            raise UserError(f"{path} is no whitening of {channels} channels: remove it, and it is learned again")
        return cls(mean, projection)
