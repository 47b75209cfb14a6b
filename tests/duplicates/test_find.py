from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from scale_wsl.duplicates import features as features_module
from scale_wsl.duplicates import find as find_module
from scale_wsl.duplicates.features import Features
from scale_wsl.duplicates.find import FindConfig, find, with_whitening
from scale_wsl.duplicates.methods import Method, RmacMethod, ThumbnailMethod
from scale_wsl.duplicates.network import open_network
from scale_wsl.duplicates.report import neighbours, read_report
from scale_wsl.duplicates.sets import DatasetImages, ImageSet, open_images
from scale_wsl.errors import UserError
from tests.duplicates.toy import evaluation_images, training_images, write


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sets")
    return write(folder / "train", "train", training_images()), write(folder / "val", "val", evaluation_images())


@pytest.fixture
def opened(sets: tuple[Path, Path]) -> tuple[ImageSet, ImageSet]:
    return open_images(sets[0], "train"), open_images(sets[1], "val")


@pytest.fixture(scope="module")
def rmac() -> RmacMethod:
    return RmacMethod(open_network("resnet18", "random"), side=64)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "BLOCK", 4)
    monkeypatch.setattr(find_module, "BLOCK", 4)


CONFIG = FindConfig(neighbours=5, workers=2, batch=3)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def expected_neighbours(method: Method, train: ImageSet, evaluation: ImageSet, k: int) -> dict[str, list[str]]:
    """One image at a time, all pairs in float64."""

    def features(images: ImageSet, number: int) -> np.ndarray:
        return method.features([method.pixels(images.read(number))])

    trained = {
        key: method.vectors(features(train, number))[0].astype(np.float64)
        for number, key in enumerate(map(train.key, range(len(train))))
        if key != "broken"
    }
    found = {}
    for number, key in enumerate(map(evaluation.key, range(len(evaluation)))):
        if key == "damaged":
            continue
        ways = [way[0].astype(np.float64) for way in method.queries(features(evaluation, number))]
        similarity = {other: max(float(way @ vector) for way in ways) for other, vector in trained.items()}
        found[key] = sorted(similarity, key=lambda other: -similarity[other])[:k]
    return found


@pytest.mark.parametrize("name", ["thumbnail", "rmac"])
def test_the_nearest_of_every_image(
    name: str, rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    method: Method = rmac if name == "rmac" else ThumbnailMethod()
    train, evaluation = opened
    found = find(train, evaluation, method, tmp_path / "out", tmp_path / "features", CONFIG)
    assert found.report is not None
    assert found.report.images == (31, 12)
    assert found.report.unreadable == (1, 1)
    table = neighbours(found.report)
    by_key = {key: list(pairs) for key, pairs in itertools.groupby(table, key=lambda pair: pair[0])}
    expected = expected_neighbours(method, train, evaluation, 5)
    assert {key: [training for _, training in pairs] for key, pairs in by_key.items()} == expected
    assert [expected[f"copy{number}"][0] for number in range(6)] == [f"t{number}" for number in range(6)]
    again = find(train, evaluation, method, tmp_path / "out", tmp_path / "features", CONFIG)
    assert again.reused
    assert again.report == found.report
    random = "random weights, so its neighbours mean little" in found.report.summary()
    assert random == (name == "rmac")


def test_parts_in_any_order_make_the_report_of_the_whole(
    rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    whole = find(*opened, rmac, tmp_path / "whole", tmp_path / "a", CONFIG)
    assert whole.report is not None
    for step, part in enumerate((2, 0, 1)):
        config = FindConfig(neighbours=5, workers=1, batch=3, part=part, parts=3)
        found = find(*opened, rmac, tmp_path / "parts", tmp_path / "b", config)
        assert found.missing == 2 - step
        assert (found.report is None) == (step < 2)
        assert (tmp_path / "parts").exists() == (step == 2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    # Once more, with the features that are there.
    third = find(*opened, rmac, tmp_path / "third", tmp_path / "b", CONFIG)
    assert third.report is not None
    assert contents(tmp_path / "third") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # faiss's SWIG bindings: types without a module
def test_faiss_gives_the_same_report(rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    config = FindConfig(neighbours=5, workers=1, batch=3, faiss=True)
    find(*opened, rmac, tmp_path / "whole", tmp_path / "a", CONFIG)
    find(*opened, rmac, tmp_path / "faiss", tmp_path / "b", config)
    assert contents(tmp_path / "faiss") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="--faiss is for the CPU"):
        find(*opened, rmac, tmp_path / "c", tmp_path / "b", config, device=torch.device("cuda"))


class Interrupted(Exception):  # noqa: N818
    """Stands for the end of the process."""


class Counting(DatasetImages):
    """A data set that counts what is read, and stops the search at some point."""

    def __init__(self, images: ImageSet, stop_at: int | None = None) -> None:
        assert isinstance(images, DatasetImages)
        super().__init__(images._dataset)
        self.read_images: list[int] = []
        self.stop_at = stop_at

    def read(self, i: int) -> bytes:
        if i == self.stop_at:
            raise Interrupted
        self.read_images.append(i)
        return super().read(i)


def test_a_search_that_was_stopped_goes_on_where_it_was(
    rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    train, evaluation = opened
    with pytest.raises(Interrupted):
        find(Counting(train, 18), evaluation, rmac, tmp_path / "out", tmp_path / "features", CONFIG)
    assert not (tmp_path / "out").exists()
    own = Features(tmp_path / "features", train, rmac, workers=1, batch=1).folder
    finished = sorted(path.name for path in own.glob("*.npz"))
    assert finished == [f"{number:08d}.npz" for number in range(4)]  # images 0 to 15
    assert not list(tmp_path.rglob("*.part"))

    counting, of_evaluation = Counting(train), Counting(evaluation)
    monkeypatched = find_module.write_report
    looked_at: list[list[int]] = []

    def remember(*arguments: object, **options: object) -> object:
        looked_at.append(list(counting.read_images))
        looked_at.append(list(of_evaluation.read_images))
        return monkeypatched(*arguments, **options)  # type: ignore[arg-type]

    find_module.write_report = remember  # type: ignore[assignment]
    try:
        find(counting, of_evaluation, rmac, tmp_path / "out", tmp_path / "features", CONFIG)
    finally:
        find_module.write_report = monkeypatched
    assert sorted(looked_at[0]) == list(range(16, 31))
    assert looked_at[1] == []
    find(train, evaluation, rmac, tmp_path / "undisturbed", tmp_path / "other", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["cut short", "flipped", "other", "pickle"])
def test_damaged_features_are_made_again(
    rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path, damage: str
) -> None:
    train, _ = opened
    made = Features(tmp_path, train, rmac, workers=1, batch=2)
    before = made.block(1)
    path = made.folder / "00000001.npz"
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:-100])
    elif damage == "flipped":
        place = content.index(before.features.tobytes()) + 100
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "pickle":
        with open(path, "wb") as handle:
            np.savez(handle, features=np.array([{}] * 4, object), readable=before.readable, more=bytes(3900))
    else:
        with open(path, "wb") as handle:
            np.savez(handle, features=before.features[:, ::2], readable=before.readable, more=bytes(2048))
    counting = Counting(train)
    again = Features(tmp_path, counting, rmac, workers=1, batch=2).block(1)
    assert counting.read_images == [4, 5, 6, 7]
    np.testing.assert_array_equal(again.features, before.features)
    assert path.read_bytes() == content


def test_features_of_another_method_or_set_are_others(
    rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    train, evaluation = opened

    def folder(images: ImageSet, method: Method) -> Path:
        return Features(tmp_path, images, method, workers=1, batch=1).folder

    wider = RmacMethod(rmac.network, side=96)
    folders = [folder(images, method) for images in (train, evaluation) for method in (rmac, wider, ThumbnailMethod())]
    assert len(set(folders)) == 6
    (folders[0] / "identity.json").write_text("{}")
    with pytest.raises(UserError, match="is of other features than its folder's name says"):
        folder(train, rmac)


def test_whitening_is_learned_once_and_changes_the_features(
    rmac: RmacMethod, opened: tuple[ImageSet, ImageSet], tmp_path: Path
) -> None:
    train, evaluation = opened
    counting = Counting(train)
    whitened = with_whitening(rmac, counting, 20, 8, tmp_path / "features", workers=1, batch=4)
    assert len(set(counting.read_images)) == 20
    assert whitened.shape == (8,)
    again = Counting(train)
    assert with_whitening(rmac, again, 20, 8, tmp_path / "features").identity == whitened.identity
    assert again.read_images == []
    assert whitened.identity != rmac.identity
    found = find(train, evaluation, whitened, tmp_path / "out", tmp_path / "features", CONFIG)
    assert found.report is not None
    assert "whitened to 8 dimensions" in found.report.method
    table = neighbours(found.report)
    for number in (0, 2, 4):  # the others are mirrored, which random weights do not see through
        nearest = next(training for key, training in table if key == f"copy{number}")
        assert nearest == f"t{number}"
    with pytest.raises(UserError, match="must be 2 training images or more"):
        with_whitening(rmac, train, 1, None, tmp_path)


def test_a_folder_of_images_as_evaluation_set(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for key, data in evaluation_images().items():
        (folder / "cats").mkdir(parents=True, exist_ok=True)
        (folder / "cats" / f"{key}.png").write_bytes(data)
    images = open_images(folder, "val")
    assert len(images) == 12
    assert images.labels(0) == ("cats",)
    identity = images.identity
    assert open_images(folder, "val").identity == identity
    found = find(
        open_images(sets[0], "train"), images, ThumbnailMethod(), tmp_path / "out", tmp_path / "features", CONFIG
    )
    assert found.report is not None
    nearest = dict(reversed(neighbours(found.report)))
    for number in range(6):
        (key,) = (key for key in nearest if f"copy{number}" in key)
        assert nearest[key] == f"t{number}"
    (folder / "cats" / "copy0.png").write_bytes(b"other")
    assert open_images(folder, "val").identity != identity
    (folder / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match="is no file any more, or leads nowhere"):
        open_images(folder, "val")


def test_mistakes(opened: tuple[ImageSet, ImageSet], sets: tuple[Path, Path], tmp_path: Path) -> None:
    train, evaluation = opened
    thumbnail = ThumbnailMethod()
    with pytest.raises(UserError, match="are the same images"):
        find(train, train, thumbnail, tmp_path / "out", tmp_path / "features", CONFIG)
    find(train, evaluation, thumbnail, tmp_path / "out", tmp_path / "features", CONFIG)
    with pytest.raises(UserError, match="is the report of another search"):
        find(train, evaluation, thumbnail, tmp_path / "out", tmp_path / "features", FindConfig(neighbours=4))
    with pytest.raises(UserError, match="is there already, and is no report"):
        find(train, evaluation, thumbnail, sets[0], tmp_path / "features", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep features"):
        find(train, evaluation, thumbnail, tmp_path / "new", tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="is no folder"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no report of scale-wsl duplicates find"):
        read_report(sets[0])
    for wrong in ({"neighbours": 0}, {"batch": 0}, {"workers": -1}, {"part": 3, "parts": 3}, {"parts": 0}):
        with pytest.raises(UserError):
            FindConfig(**wrong)
