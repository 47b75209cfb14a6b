from __future__ import annotations

from pathlib import Path

import pytest

from scale_wsl import cli
from tests.duplicates.toy import evaluation_images, training_images, write


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What prepare makes: a folder with a data set of each role."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "train-toy-31-8", "train", training_images())
    write(tmp_path / "data" / "val-toy-12-8", "val", evaluation_images())
    return tmp_path


def test_from_finding_to_showing(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find = ["duplicates", "find", "data", "data", "--out", "report", "--method", "thumbnail", "--neighbours", "3"]
    assert cli.main([*find, "--part", "1/2"]) == 0
    assert "part 1/2 is done; 1 of 2 are not yet" in capsys.readouterr().out
    assert cli.main([*find, "--part", "0/2"]) == 0
    text = capsys.readouterr().out
    assert "12 images of val-toy-12-8 against 31 of train-toy-31-8, by correlation of grey 16 x 16" in text
    assert "6 have a neighbour of similarity 0.97 or more; judge them in report/page-0001.html" in text
    assert "not readable: 1 training and 1 evaluation images" in text
    assert "features are kept in report.features" in text
    assert cli.main(find) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert cli.main(["duplicates", "apply", "report", "--accept-above", "0.97"]) == 0
    assert "6 images have a duplicate in a training set" in capsys.readouterr().out
    assert cli.main(["duplicates", "show", "data"]) == 0
    assert "that is 50.00% of 12 images" in capsys.readouterr().out


def test_with_a_network_and_whitening(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find = ["duplicates", "find", "data", "data", "--network", "resnet18", "--weights", "random", "--side", "64"]
    options = ["--whiten", "10", "--dimensions", "4", "--device", "cpu", "--workers", "1"]
    assert cli.main([*find, *options, "--out", "report", "--show-above", "0.5", "--features", "kept"]) == 0
    text = capsys.readouterr().out
    assert "R-MAC of resnet18 (random weights, so its neighbours mean little) at 64 pixels, whitened to 4 dim" in text
    assert list((prepared / "kept").glob("whitening-*.safetensors"))
    assert "random weights" in (prepared / "report" / "page-0001.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["find", "data", "data", "--out", "r"], "resnet50 needs weights"),
        (["find", "data", "data", "--out", "r", "--network", "vgg16"], "'vgg16' is no network"),
        (["find", "data", "data", "--out", "r", "--weights", "none.pth"], "cannot read the weights none.pth"),
        (
            ["find", "data", "data", "--out", "r", "--method", "thumbnail", "--side", "64"],
            "--side is for --method rmac",
        ),
        (["find", "data", "data", "--out", "r", "--method", "thumbnail", "--part", "2/2"], "--part 2/2 is none"),
        (["find", "data", "data", "--out", "r", "--method", "thumbnail", "--part", "a"], "--part is 'a'"),
        (["find", "data", "data", "--out", "r", "--method", "thumbnail", "--neighbours", "0"], "--neighbours is 0"),
        (["find", "data", "data", "--out", "r", "--device", "tpu"], "--device is 'tpu'"),
        (["find", "data", "data", "--out", "r", "--device", "cuda:99"], "GPUs here"),
        (["find", "data", "data", "--out", "r", "--batch", "0"], "--batch is 0"),
        (["find", "data", "data", "--out", "r", "--dimensions", "3"], "needs --whiten"),
        (["find", "data", "data", "--out", "data", "--method", "thumbnail"], "is no report"),
        (["find", "data", "data", "--out", "/", "--method", "thumbnail"], "must name a folder to be made"),
        (["find", "nowhere", "data", "--out", "r", "--method", "thumbnail"], "nowhere is no folder"),
        (["find", "data", "data", "--out", "r", "--more"], "--more means nothing here"),
        (["apply", "data"], "nothing to apply"),
        (["apply", "data", "--accept-above", "0.9"], "is no report"),
        (["show", "nowhere"], "nowhere is no folder"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes(prepared: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["duplicates", *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not (prepared / "r").exists()
