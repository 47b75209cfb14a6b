from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus import views
from scale_wsl.corpus.keyhash import text_hashes, uniform
from scale_wsl.corpus.shards import Dataset
from scale_wsl.corpus.views import Images, View, ViewSpec, first_in_line, view_of, wanted_images
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary, WordNet
from scale_wsl.randomness import derived_seed
from tests.corpus.test_keyhash import mix, reference
from tests.corpus.writing import write_dataset
from tests.loading.batches import order_of, take
from tests.loading.fakes import encode, zipf_rows

NOUNS = ("cat", "dog", "fish", "bird", "horse", "tree", "house", "boat", "car", "flower", "mountain", "river")
IMAGES = 200
ROWS = zipf_rows(IMAGES, len(NOUNS))


def key(i: int) -> str:
    return f"photo-{i * 7919 % 100_003}"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    # Counts that fall from hashtag to hashtag, so that class i is NOUNS[i].
    posts = [NOUNS[: len(NOUNS) - i] for i in range(len(NOUNS))]
    built, _ = Vocabulary.build(posts, WordNet.load())
    assert tuple(entry.hashtag for entry in built.entries) == NOUNS
    return built


@pytest.fixture(scope="module")
def write(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """Writes images by their numbers, in the order given."""

    def write(numbers: Sequence[int], records_per_shard: int = 64, role: str = "train") -> Dataset:
        folder = tmp_path_factory.mktemp("data")
        records = [(key(i), "png", encode(np.full((2, 2, 3), i % 256, np.uint8)), (), ROWS[i]) for i in numbers]
        write_dataset(folder, records, vocabulary, records_per_shard=records_per_shard, role=role)
        return Dataset.open(folder)

    return write


@pytest.fixture(scope="module")
def dataset(write: Callable[..., Dataset]) -> Dataset:
    return write(range(IMAGES))


def keys(images: Images) -> set[str]:
    return set(images.keys.tolist())


def labels(images: Images) -> dict[str, list[int]]:
    return {str(name): images.labels(i).tolist() for i, name in enumerate(images.keys)}


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_a_view_is_its_part_of_the_data_set(dataset: Dataset) -> None:
    view = View(dataset, ViewSpec(images=77))
    assert len(view) == view.name.images == 77
    assert str(view.name) == "train-toy-77-12"
    assert (view.label_ids.dtype, view.label_start.dtype, view.records.dtype) == (np.int32, np.int64, np.int64)
    assert len(view.label_start) == 78
    assert view.label_start[-1] == len(view.label_ids)
    assert view.max_labels == max(len(view.labels(i)) for i in range(77))
    assert (view.vocabulary, view.vocabulary_hash) == (dataset.vocabulary, dataset.vocabulary_hash)
    assert view.noise is None
    for i, record in enumerate(view.records.tolist()):
        assert view.keys[i] == dataset.keys[record]
        assert view.read(i) == dataset.read(record)
        assert view.labels(i).tolist() == dataset.labels(record).tolist()


def test_the_subset_is_pinned(dataset: Dataset) -> None:
    first = View(dataset, ViewSpec(images=6))
    other = View(dataset, ViewSpec(images=6, subset_seed=1))
    assert first.records.tolist() == [7, 22, 84, 141, 173, 175]
    assert other.records.tolist() == [18, 46, 112, 117, 173, 189]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_size_is_exact_and_part_of_the_next(dataset: Dataset, seed: int) -> None:
    before: set[str] = set()
    for size in range(1, IMAGES):
        now = keys(View(dataset, ViewSpec(images=size, subset_seed=seed)))
        assert len(now) == size
        assert before < now
        before = now
    by_hash = sorted(dataset.keys, key=lambda name: mix(reference(str(name)) ^ derived_seed("subset", seed)))
    assert before == set(by_hash[:-1])


@pytest.mark.parametrize(("share", "size"), [(0.1, 20), ("10 %", 20), ("0.1%", 1), (0.9999, 200), ("100 %", 200)])
def test_shares(dataset: Dataset, share: float | str, size: int) -> None:
    assert len(view_of(dataset, ViewSpec(images=share))) == size


def test_neither_shards_nor_order_matter(dataset: Dataset, write: Callable[..., Dataset]) -> None:
    shuffled = list(range(IMAGES))
    random.Random(5).shuffle(shuffled)
    other = write(shuffled, 33)
    for spec in (ViewSpec(images=50), ViewSpec(images=120, subset_seed=4, label_noise=0.5, noise_seed=2)):
        assert labels(View(other, spec)) == labels(View(dataset, spec))


def test_growth_keeps_places_in_line(dataset: Dataset, write: Callable[..., Dataset]) -> None:
    small = write(range(120))
    for size in (1, 30, 90):
        old, new = keys(View(small, ViewSpec(images=size))), keys(View(dataset, ViewSpec(images=size)))
        assert new & keys(small) <= old  # newcomers took places, no old image gained one
        reached = next(n for n in range(size, IMAGES + 1) if old <= keys(view_of(dataset, ViewSpec(images=n))))
        assert keys(view_of(dataset, ViewSpec(images=reached))) & keys(small) == old
    old, new = keys(View(small, ViewSpec(images=0.5))), keys(View(dataset, ViewSpec(images=0.5)))
    assert len(old & new) > 0.8 * len(old)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_ties_go_by_key(places: list[int], data: st.DataObject) -> None:
    names = data.draw(st.permutations([f"k{i:02d}" for i in range(len(places))]))
    count = data.draw(st.integers(1, len(places)))
    chosen = first_in_line(np.array(places, np.uint64), names, count)
    line = sorted(range(len(places)), key=lambda i: (places[i], names[i]))
    assert chosen.tolist() == sorted(line[:count])


def test_all_of_it_is_the_data_set_itself(dataset: Dataset) -> None:
    for images in (None, IMAGES, "100 %", "0.2k"):
        assert view_of(dataset, ViewSpec(images=images)) is dataset
    assert view_of(dataset, ViewSpec(images=IMAGES, subset_seed=3)) is dataset
    assert view_of(dataset, ViewSpec(label_noise=0.1)) is not dataset


# --- noise -----------------------------------------------------------------------------------------------------------


def noisy_reference(dataset: Dataset, record: int, probability: float, seed: int) -> list[int]:
    """The rule, one hashtag at a time."""
    image = mix(reference(str(dataset.keys[record])) ^ derived_seed("label noise", seed))
    found = set()
    for label in dataset.labels(record).tolist():
        draw = mix(image ^ reference(NOUNS[label]))
        if (draw >> 11) * 2.0**-53 < probability:
            place = (mix(draw) >> 11) * 2.0**-53 * len(dataset.label_ids)
            label = next(h for h in range(len(NOUNS)) if place < (dataset.label_ids <= h).sum())
        found.add(label)
    return sorted(found)


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_equals_the_rule_hashtag_by_hashtag(
    dataset: Dataset, probability: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "_BLOCK", 17)
    view = View(dataset, ViewSpec(label_noise=probability, noise_seed=7))
    for record in range(IMAGES):
        assert view.labels(record).tolist() == noisy_reference(dataset, record, probability, 7)
    assert (view.label_ids.dtype, view.label_start.dtype) == (np.int32, np.int64)


def test_an_image_has_the_same_noise_in_every_subset(dataset: Dataset) -> None:
    whole = labels(View(dataset, ViewSpec(label_noise=0.5)))
    for size in (1, 40, 199):
        part = labels(View(dataset, ViewSpec(images=size, label_noise=0.5)))
        assert part == {name: whole[name] for name in part}


def test_what_is_replaced_at_little_noise_is_replaced_alike_at_more(dataset: Dataset) -> None:
    single = [record for record in range(IMAGES) if len(ROWS[record]) == 1]
    little, much = (View(dataset, ViewSpec(label_noise=p)) for p in (0.25, 0.5))
    changed = [record for record in single if little.labels(record).tolist() != ROWS[record]]
    assert len(changed) > 3
    assert all(much.labels(record).tolist() == little.labels(record).tolist() for record in changed)


@given(st.floats(0.001, 1.0), st.integers(0, 5), st.integers(1, IMAGES))
def test_no_image_is_left_without_a_hashtag(dataset: Dataset, probability: float, seed: int, size: int) -> None:
    view = View(dataset, ViewSpec(images=size, label_noise=probability, noise_seed=seed))
    assert len(view) == size
    for i, record in enumerate(view.records.tolist()):
        row = view.labels(i).tolist()
        assert 1 <= len(row) <= len(ROWS[record])
        assert row == sorted(set(row))
    assert view.noise is not None
    assert view.noise.pairs - view.noise.collapsed == len(view.label_ids)
    assert view.noise.unchanged <= view.noise.replaced <= view.noise.pairs
    assert view.max_labels == int(np.diff(view.label_start).max())


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 1.0])
def test_the_share_and_the_marginal_distribution(probability: float) -> None:
    # One hashtag an image, so that nothing collapses; 120,000 images whose first hashtag is never drawn.
    n, marginal = 120_000, np.array([0, 60, 30, 9, 1])
    ids, starts, noise = views._replaced(
        np.zeros(n, np.int32),
        np.arange(n + 1),
        text_hashes([f"image {i}" for i in range(n)]),
        hashtags=text_hashes(["a", "b", "c", "d", "e"]),
        marginal=marginal,
        probability=probability,
    )
    assert (noise.collapsed, noise.unchanged) == (0, 0)
    assert abs(noise.replaced - n * probability) <= 4.5 * np.sqrt(n * probability * (1 - probability))
    assert np.diff(starts).tolist() == [1] * n
    counts = np.bincount(ids, minlength=5)
    assert counts[0] == n - noise.replaced
    share = marginal / marginal.sum()
    deviation = np.sqrt(noise.replaced * share * (1 - share))
    assert (np.abs(counts[1:] - noise.replaced * share[1:]) <= 4.5 * deviation[1:]).all()


@given(st.integers(1, 1 << 53))
def test_the_largest_draw_is_the_last_hashtag(total: int) -> None:
    largest = uniform(np.array([np.iinfo(np.uint64).max]))
    assert int((largest * np.int64(total)).astype(np.int64)[0]) == total - 1


# --- identity, copies, loading ---------------------------------------------------------------------------------------


def test_every_part_of_the_spec_is_in_the_identity(dataset: Dataset, write: Callable[..., Dataset]) -> None:
    specs = [
        ViewSpec(images=50),
        ViewSpec(images=51),
        ViewSpec(images=50, subset_seed=1),
        ViewSpec(images=50, label_noise=0.1),
        ViewSpec(images=50, label_noise=0.2),
        ViewSpec(images=50, label_noise=0.1, noise_seed=1),
        ViewSpec(label_noise=0.1),
    ]
    hashes = [View(dataset, spec).manifest_hash for spec in specs]
    assert len({dataset.manifest_hash, *hashes}) == len(specs) + 1
    assert [View(dataset, spec).manifest_hash for spec in specs] == hashes
    assert View(write(range(150)), specs[0]).manifest_hash != hashes[0]
    assert View(dataset, ViewSpec(images="25 %")).manifest_hash == hashes[0]  # 50 images, however they are written
    orders = {order_of(View(dataset, spec)).identity for spec in specs}
    assert len(orders) == len(specs)


def test_a_pickled_copy_is_small_and_the_same_in_another_process(dataset: Dataset) -> None:
    view = View(dataset, ViewSpec(images=40, label_noise=0.5))
    pickled = pickle.dumps(view)
    assert len(pickled) < 1000
    script = (
        "import pickle,sys; v = pickle.load(sys.stdin.buffer); print(v.manifest_hash, v.label_ids.tolist(), v.read(7))"
    )
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True)
    assert done.stdout.decode().strip() == f"{view.manifest_hash} {view.label_ids.tolist()} {view.read(7)!r}"


def test_the_loader_reads_the_views_images_and_labels(dataset: Dataset) -> None:
    view = View(dataset, ViewSpec(images=30, label_noise=0.5))
    seen = set()
    for batch in take(view, 20):
        assert batch.corrupt == 0
        for image, ids, record in zip(batch.images, batch.ids.tolist(), batch.records.tolist(), strict=True):
            assert [label for label in ids if label >= 0] == view.labels(record).tolist()
            assert set(image.flatten().tolist()) == {int(view.records[record]) % 256}
            seen.add(record)
    assert seen == set(range(30))


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_more_images_than_there_are(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"a subset of 201 images is wanted, but train-toy-200-12 in .* has only 200"):
        view_of(dataset, ViewSpec(images=201))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"images": 0}, "images is 0, but must be a number of images"),
        ({"images": -3}, "images is -3, but a share"),
        ({"images": 2.5}, "images is 2.5, but must be a number of images"),
        ({"images": "120 %"}, "images is '120 %', but a share"),
        ({"images": "many"}, "images is 'many', but must be a number of images"),
        ({"images": "nan"}, "images is 'nan', but must be a number of images"),
        ({"images": "inf %"}, "images is 'inf %', but a share"),
        ({"label_noise": 1.5}, "label_noise is 1.5, but must be between 0 and 1"),
        ({"label_noise": float("nan")}, "label_noise is nan, but must be between 0 and 1"),
        ({"subset_seed": 1}, "subset_seed is set, but not images"),
        ({"images": 5, "subset_seed": -1}, "subset_seed is -1, but must be 0 or more"),
        ({"noise_seed": 1}, "noise_seed is set, but not label_noise"),
    ],
)
def test_a_spec_that_means_nothing(spec: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as refused:
        ViewSpec(**spec)  # type: ignore[arg-type]
    assert str(refused.value).startswith(says)


@given(st.text(max_size=30) | st.text("0123456789.e+-_ %kMBTimages", max_size=20) | st.floats() | st.integers())
def test_any_number_of_images_is_read_or_refused(value: str | float) -> None:
    try:
        wanted = wanted_images(value, 1000, "data.images")
    except UserError:
        return
    assert type(wanted) is int
    assert 1 <= wanted <= 10**15
