"""A run trains on the part of the data set that its recipe takes, and goes on with that part alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scale_wsl.corpus.resample import DEFAULT_THRESHOLD, image_factors
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.views import View, ViewSpec
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError
from scale_wsl.recipe import load_recipe
from scale_wsl.training.job import Job, PretrainRecipe, prepare_job
from scale_wsl.training.spool import Spool
from tests.training.launching import TINY, Ranks
from tests.training.test_mistakes import arguments, mistake

ALONE = World(0, 1, 0, torch.device("cpu"))


def job_of(corpus: Path, tmp_path: Path, *settings: str) -> Job:
    job = prepare_job(load_recipe(PretrainRecipe, None, arguments(corpus, tmp_path, *settings)), ALONE)
    assert job.lock is not None
    job.lock.release()
    return job


def test_the_job_takes_of_the_training_set_what_the_recipe_says(emoji_corpus: Path, tmp_path: Path) -> None:
    job = job_of(emoji_corpus, tmp_path, "data.images=50", "data.label_noise=0.5", "data.noise_seed=3")
    train, validation = (Dataset.open(find_dataset(emoji_corpus, role)) for role in ("train", "val"))
    view = View(train, ViewSpec(images=50, label_noise=0.5, noise_seed=3))
    assert isinstance(job.train, View)
    assert job.train.manifest_hash == view.manifest_hash
    assert job.order.images == 50
    assert view.manifest_hash in job.order.identity
    # noise and subsets never reach the validation set
    assert type(job.validation) is Dataset
    assert np.array_equal(job.validation.label_ids, validation.label_ids)
    assert job.threshold == DEFAULT_THRESHOLD

    whole = job_of(emoji_corpus, tmp_path)
    assert type(whole.train) is Dataset
    for fact in ("training set", "order of images"):
        assert job.facts()[fact] != whole.facts()[fact]
    assert job.facts()["validation set"] == whole.facts()["validation set"]


@pytest.mark.parametrize("mode", ["square-root", "uniform"])
def test_an_epoch_has_the_stated_length(emoji_corpus: Path, tmp_path: Path, mode: str) -> None:
    settings = ("data.images=100", f"data.resampling={mode}", "data.epoch_length=140 images")
    job = job_of(emoji_corpus, tmp_path, *settings)
    factors = image_factors(job.train.label_ids, job.train.label_start, mode, job.threshold)
    assert factors.sum() == pytest.approx(140)
    assert f"t={job.threshold!r}" in job.facts()["order of images"]
    given = job_of(emoji_corpus, tmp_path, *settings[:2], f"data.threshold={job.threshold!r}")
    assert given.order.identity == job.order.identity
    with pytest.raises(UserError, match="an epoch of 99 images is wanted"):
        job_of(emoji_corpus, tmp_path, *settings[:2], "data.epoch_length=99")


def _damage_all_but(view: View, folder: Path) -> None:
    """Make every image file of a data set unreadable that is not in the view."""
    kept = set(view.records.tolist())
    for record in range(len(view.dataset)):
        if record not in kept:
            with open(folder / f"{int(view.dataset.shard[record]):06d}.tar", "rb+") as tar:
                tar.seek(int(view.dataset.offset[record]))
                tar.write(b"no image")


@pytest.mark.slow
def test_a_run_reads_nothing_else_and_goes_on_with_nothing_else(emoji_corpus: Path, tmp_path: Path) -> None:
    corpus = Path(shutil.copytree(emoji_corpus, tmp_path / "corpus"))
    folder = find_dataset(corpus, "train")
    view = View(Dataset.open(folder), ViewSpec(images=24, label_noise=0.25))
    _damage_all_but(view, folder)
    run = tmp_path / "run"
    strict = [
        *TINY,
        f"data.train={corpus}",
        f"data.validation={emoji_corpus}",
        f"run.folder={run}",
        "batch.micro=4",
        "data.threshold=null",
        "data.epoch_length=30",
        "data.max_corrupt=0",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]
    taken = ["data.images=24", "data.label_noise=0.25"]
    first = Ranks([*strict, *taken, "schedule.length=8 steps"], 2, tmp_path / "first")
    assert first.wait() == [0, 0], first.output()
    assert "train-emoji-24-" in first.output()
    assert view.summary() in first.output()
    assert "30 images an epoch on average" in first.output()
    assert (run / "resampling.png").is_file()
    events = [event for event, _ in Spool(run / "spool").read()]
    (tags,) = [event["tags"] for event in events if event["kind"] == "start"]
    assert tags["data_set"] == str(view.name)
    assert tags["data_view"] == view.summary()
    drawn = [event for event in events if event["kind"] == "artifact" and event["name"].endswith("/resampling.png")]
    assert [event["folder"] for event in drawn] == ["pictures"]

    rest = [*strict, "checkpoint.resume=auto", "schedule.length=12 steps"]
    sentence = mistake([*rest, "data.images=25", "data.label_noise=0.25"], 1)
    assert "another sequence of images" in sentence
    assert "data.images" in sentence
    for other in (
        ["data.images=24", "data.label_noise=0.25", "data.subset_seed=1"],
        ["data.images=24", "data.label_noise=0.5"],
        ["data.images=24", "data.label_noise=0.25", "data.noise_seed=1"],
        ["data.images=24", "data.label_noise=0.25", "data.epoch_length=31"],
        ["data.images=24"],
    ):
        with pytest.raises(UserError, match="another sequence of images"):
            prepare_job(load_recipe(PretrainRecipe, None, [*rest, *other]), ALONE)
    rest.append("tracking.enabled=false")
    (run / "resampling.png").unlink()
    (run / "resampling.png" / "in the way").mkdir(parents=True)  # no reason to stop
    again = Ranks([*rest, *taken], 1, tmp_path / "again")
    assert again.wait() == [0], again.output()
    assert "going on from" in again.output()
    assert "cannot write the figure" in again.output()

    unlike = Ranks([*rest, "data.images=26", "run.folder=other"], 1, tmp_path / "unlike")
    assert unlike.wait() == [2], unlike.output()  # the damage is found where another subset is read
    assert "data.max_corrupt" in unlike.output()
