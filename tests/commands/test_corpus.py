from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scale_wsl import cli
from scale_wsl.corpus.resample import expected_epoch, threshold_for
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.views import View, ViewSpec


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["corpus", *words]) == 0
    return capsys.readouterr().out


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


@pytest.fixture(scope="module")
def train(emoji_corpus: Path) -> Dataset:
    return Dataset.open(find_dataset(emoji_corpus, "train"))


def test_subset(emoji_corpus: Path, train: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "subset", str(emoji_corpus), "--images", "30", "50 %", str(len(train)), "--below", "4")
    header, *rows = text.splitlines()[:4]
    assert cells(header) == ["name", "images", "share", "labels/image", "hashtags", "lost", "rare (< 4)"]
    whole = np.bincount(train.label_ids, minlength=len(train.vocabulary))
    for row, images in zip(rows, (30, "50 %", len(train)), strict=True):
        view = View(train, ViewSpec(images=images))
        counts = np.bincount(view.label_ids, minlength=len(whole))
        name, size, _, mean, there, lost, rare = cells(row)
        assert (name, size) == (str(view.name), str(len(view)))
        assert mean == f"{len(view.label_ids) / len(view):.2f}"
        assert (int(there), int(lost)) == ((counts > 0).sum(), (whole > 0).sum() - (counts > 0).sum())
        assert int(rare) == ((counts > 0) & (counts < 4)).sum()
        first_lost = [train.vocabulary.entries[h].hashtag for h in np.flatnonzero((counts == 0) & (whole > 0))[:1]]
        assert (f"{name} has lost {''.join(first_lost)}" in text) == bool(first_lost)


def test_subset_with_noise(train: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    # By the data set's own folder, and with the vocabulary's own min_count.
    words = ["--images", "40", "--label-noise", "0.5", "--noise-seed", "3", "--subset-seed", "2"]
    text = printed(capsys, "subset", str(train.folder), *words)
    noise = View(train, ViewSpec(images=40, subset_seed=2, label_noise=0.5, noise_seed=3)).noise
    assert noise is not None
    assert f"rare (< {train.vocabulary.min_count})" in text
    assert f"label noise 0.5: {noise.replaced} of {noise.pairs} hashtags replaced" in text


def test_resample(emoji_corpus: Path, train: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [tmp_path / "a.png", tmp_path / "b.svg"]
    out = [word for path in figures for word in ("--out", str(path))]
    text = printed(capsys, "resample", str(emoji_corpus), "--threshold", "0.05", *out)
    first, header, *rows = text.splitlines()
    assert first == f"{train.name}: {len(train)} images, {len(train.vocabulary)} hashtags"
    assert cells(header)[:4] == ["resampling", "threshold", "epoch length", "x images"]
    assert rows[3:] == [f"figure  {path}" for path in figures]
    for row, mode in zip(rows, ("natural", "square-root", "uniform"), strict=False):
        epoch = expected_epoch(train.label_ids, train.label_start, len(train.vocabulary), mode, 0.05)
        name, threshold, length, times, top, gini, perplexity, repeated, largest = cells(row)
        assert (name, threshold) == (mode, "-" if mode == "natural" else "0.05")
        assert (length, times) == (f"{epoch.length:,.0f}", f"{epoch.length / len(train):.3f}")
        assert (top, gini, perplexity) == (f"{epoch.top_share:.2%}", f"{epoch.gini:.3f}", f"{epoch.perplexity:,.1f}")
        assert repeated.startswith(f"{epoch.repeated} (")
        assert largest == f"{epoch.largest:.3g}"
    with Image.open(figures[0]) as image:
        assert image.format == "PNG"
    assert figures[1].read_text().startswith("<?xml")


def test_resample_to_a_length_of_a_subset(
    emoji_corpus: Path, train: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "resample", str(emoji_corpus), "--epoch-length", "150 images", "--images", "100")
    view = View(train, ViewSpec(images=100))
    assert text.startswith(f"{view.name}: 100 images")
    for row, mode in zip(text.splitlines()[3:], ("square-root", "uniform"), strict=True):
        threshold = threshold_for(view.label_ids, view.label_start, mode, 150)
        assert cells(row)[:3] == [mode, f"{threshold:.6g}", "150"]
    assert cells(text.splitlines()[2])[:3] == ["natural", "-", "100"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["subset", "nowhere", "--images", "5"], "there is no data set of the role train in nowhere"),
        (["subset", "x" * 300, "--images", "5"], "cannot read xxx"),
        (["subset", "CORPUS", "--images", "5", "35M"], "a subset of 35,000,000 images is wanted"),
        (["subset", "CORPUS", "--images", "few"], "images is 'few', but must be"),
        (["subset", "CORPUS", "--images", "5", "--below", "0"], "--below is 0"),
        (["subset", "CORPUS", "--images", "5", "--label-noise", "7"], "label_noise is 7.0"),
        (["subset", "CORPUS", "--images", "5", "--bellow", "0"], "--bellow means nothing here"),
        (["resample", "CORPUS", "--threshold", "0.1", "--epoch-length", "5k"], "the same thing twice"),
        (["resample", "CORPUS", "--threshold", "1.5"], "--threshold is 1.5, but must be above 0 and at most 1"),
        (["resample", "CORPUS", "--threshold", "nan"], "--threshold is nan"),
        (["resample", "CORPUS", "--epoch-length", "soon"], "--epoch-length is 'soon'"),
        (["resample", "CORPUS", "--epoch-length", "3"], "an epoch of 3 images is wanted, but square-root resampling"),
        (["resample", "CORPUS", "--subset-seed", "3"], "subset_seed is set, but not images"),
        (["resample", "CORPUS", "--out", "a.gif"], "a.gif is no figure that can be drawn"),
    ],
)
def test_mistakes(words: list[str], says: str, emoji_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["corpus", *(str(emoji_corpus) if word == "CORPUS" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert says in captured.err
    assert captured.out == ""
