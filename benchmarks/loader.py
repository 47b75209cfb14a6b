"""Images/s of the loader's decode + random resized crop + flip on one core, against torchvision's own pipelines.

    python benchmarks/loader.py                       # about half a minute
    python benchmarks/loader.py --repeats 3 --images 8

Each case decodes the same encoded images (smooth random colours with some grain, made here) into uint8 crops. The
peers are torchvision's transforms on Pillow images (RandomResizedCrop, RandomHorizontalFlip, PILToTensor) and its
tensor path (`torchvision.io.decode_image` and transforms.v2, antialiased). Time is the process's CPU time on one
thread, so that other load on the machine counts little; contestants take turns within each repeat, so that what is left
of it hits them alike. The ratio is ours / theirs in the same repeat: above 1 the loader is faster.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from scale_wsl.loading.decode import decode, train_crop
from scale_wsl.randomness import generator

CASES: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("JPEG", 500, 375, {"quality": 90}),
    ("JPEG", 1280, 960, {"quality": 90}),
    ("PNG", 272, 272, {}),  # the median of openclipart's drawings
    ("PNG", 500, 375, {}),
)


def encoded(format: str, width: int, height: int, options: dict[str, Any], images: int) -> list[bytes]:
    """Encoded images of random colours that change every 16 pixels or so, with a grain of two levels."""
    files = []
    for image in range(images):
        rng = generator("benchmark", format, width, height, image)
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.integers(-2, 3, (height, width, 3))
        pixels = (np.asarray(smooth).astype(int) + grain).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format, **options)
        files.append(buffer.getvalue())
    return files


def contestants(size: int) -> dict[str, Callable[[int, bytes], torch.Tensor]]:
    """What turns the bytes of the image at a position into a crop `[3, size, size]`, by name; ours first."""
    from torchvision import transforms
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    on_images = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    on_tensors = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    return {
        "scale_wsl": lambda position, data: train_crop(decode(data, 10**8), size, generator("augment", 0, position)),
        "torchvision (Pillow)": lambda _, data: on_images(Image.open(io.BytesIO(data)).convert("RGB")),
        "torchvision (tensors)": lambda _, data: on_tensors(
            decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        ),
    }


def rates(files: list[bytes], size: int, repeats: int) -> dict[str, list[float]]:
    """Images per CPU second of each contestant in each repeat; a first round, which warms up, is not counted."""
    measured: dict[str, list[float]] = {name: [] for name in contestants(size)}
    for repeat in range(repeats + 1):
        for name, crop in contestants(size).items():
            start = time.process_time()
            for position, data in enumerate(files):
                assert crop(repeat * len(files) + position, data).shape == (3, size, size)
            if repeat:
                measured[name].append(len(files) / (time.process_time() - start))
    return measured


def spread(values: list[float], digits: int) -> str:
    """Median and range, as `median (min - max)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="distinct images of each case (default: 32)")
    parser.add_argument("--repeats", type=int, default=9, help="measured rounds over them (default: 9)")
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels (default: 224)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # torchvision 0.29 announces the move of its decoders to another package; they are still the ones in wide use
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)
    print(f"{arguments.repeats} repeats of {arguments.images} images, crop {arguments.size}: median (min - max)")
    print("| image | pipeline | images/s per core | scale_wsl / it |\n|---|---|---|---|")
    for format, width, height, options in CASES:
        files = encoded(format, width, height, options, arguments.images)
        kilobytes = sum(map(len, files)) / len(files) / 1000
        measured = rates(files, arguments.size, arguments.repeats)
        ours = measured["scale_wsl"]
        for name, theirs in measured.items():
            ratio = "" if name == "scale_wsl" else spread([a / b for a, b in zip(ours, theirs, strict=True)], 2)
            print(f"| {format} {width} x {height}, {kilobytes:.0f} kB | {name} | {spread(theirs, 0)} | {ratio} |")


if __name__ == "__main__":
    main()
