"""Hit rates if every known duplicate were wrong: by hand, on any number of ranks, and all the way through a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus.judgements import DUPLICATES, Duplicates, Judgements, Pair, SetId, Verdicts, read_duplicates
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.engines.build import build_engine
from scale_wsl.engines.config import EngineConfig
from scale_wsl.engines.world import World
from scale_wsl.loading.decode import CorruptImage, decode, eval_crop, normalize
from scale_wsl.loading.loader import DataConfig
from scale_wsl.models.head import ShardedHead, head_mesh
from scale_wsl.training.evaluate import EvaluateConfig, Evaluator
from scale_wsl.training.metrics import EvaluationResult, LowerBound, bootstrap_interval
from scale_wsl.training.schedule import OptimConfig
from scale_wsl.training.spool import Spool
from tests.duplicates.toy import evaluation_images, training_images, write
from tests.engines import parity
from tests.ranks import run_ranks
from tests.training.launching import TINY, Ranks

COPIES = [f"copy{number}" for number in range(6)]


def known(dataset: Dataset, train: Dataset, keys: list[str]) -> Duplicates:
    evaluation = SetId(str(dataset.name), dataset.manifest_hash)
    pairs = tuple(Pair(key, str(train.keys[0]), 0.99, "duplicate") for key in keys)
    judgements = Judgements(SetId(str(train.name), train.manifest_hash), evaluation, "thumbnails", pairs)
    return Duplicates(evaluation, (Verdicts(judgements, None, "duplicate"),))


# --- the figures -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_duplicate_is_wrong_whatever_was_predicted(images: list[tuple[bool, bool, bool]]) -> None:
    first, more, duplicate = np.array(images).T
    five = first | more
    bound = LowerBound.of(first, five, duplicate, resamples=100, seed=3)
    assert bound.duplicates == sum(copy for _, _, copy in images)
    assert bound.top1 == pytest.approx(sum(hit and not copy for hit, _, copy in images) / len(images))
    assert bound.top5 == pytest.approx(sum((hit or also) and not copy for hit, also, copy in images) / len(images))
    assert bound.top1_interval == bootstrap_interval(first & ~duplicate, resamples=100, seed=3)
    # The bound is as far below the hit rate as there are duplicates at most.
    assert first.mean() - duplicate.mean() - 1e-12 <= bound.top1 <= first.mean()
    assert bound.top1_interval[0] <= bound.top1_interval[1]


def result(duplicate: Any) -> EvaluationResult:
    ids = np.arange(20)[:, None] % 4
    top = np.stack([(ids[:, 0] + (np.arange(20) % 3 == 0) + step) % 10 for step in range(5)], axis=1)
    return EvaluationResult.of(
        row_loss=np.ones(20),
        confidence=np.full(20, 0.5),
        target_probability=np.full(20, 0.5),
        top_ids=top,
        ids=ids,
        average_precision=None,
        train_counts=np.arange(10),
        duplicate=duplicate,
        resamples=100,
    )


def test_nothing_changes_where_nothing_is_known() -> None:
    without, of_none, of_some = result(None), result(np.zeros(20, bool)), result(np.arange(20) < 4)
    assert without.bound is None
    assert "Duplicates" not in without.table()
    for other in (of_none, of_some):
        metrics = other.as_metrics()
        more = {name: metrics.pop(name) for name in list(metrics) if "lower_bound" in name or "duplicates" in name}
        assert metrics == without.as_metrics()
        assert other.table().startswith(without.table())
        assert len(more) == 7
    assert of_none.as_metrics()["validation/top1_lower_bound"] == without.top1.model
    metrics = of_some.as_metrics()
    assert metrics["validation/duplicates"] == 4
    wrong = without.top1.model - metrics["validation/top1_lower_bound"]
    assert wrong == pytest.approx(2 / 20)  # of images 0 to 3, those predicted rightly
    low, high = (metrics[f"validation/top1_lower_bound_{end}"] for end in ("low", "high"))
    assert low <= metrics["validation/top1_lower_bound"] <= high
    assert "4 of the images too (20.00%)" in of_some.table()
    assert f"top-1  {metrics['validation/top1_lower_bound']:.3f}  ({low:.3f} to {high:.3f})" in of_some.table()


# --- on any number of ranks --------------------------------------------------------------------------------------


def _evaluate(train_folder: Path, folder: Path, group_size: int) -> tuple[dict[str, float], int] | None:
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    train, validation = Dataset.open(train_folder), Dataset.open(folder)
    trunk = parity.describe()
    evaluator = Evaluator(
        build_engine(EngineConfig(name="ddp"), trunk, parity.WEIGHTS, OptimConfig().settings, world, None),
        ShardedHead(len(train.vocabulary), trunk.num_features, mesh=head_mesh(group_size), seed=5),
        train,
        validation,
        config=EvaluateConfig(resamples=200),
        data=DataConfig(image_size=32, workers=0),
        micro_batch=3,
        world=world,
        seed=1,
        duplicates=read_duplicates(folder, validation.manifest_hash),
    )
    found = evaluator.evaluate()
    return None if found is None else (found[0].as_metrics(), found[1])


def test_every_world_size_counts_the_same_duplicates(tmp_path: Path) -> None:
    train = write(tmp_path / "train", "train", training_images())
    folder = write(tmp_path / "val", "val", evaluation_images(strangers=13))
    (one, *_) = run_ranks(_evaluate, 1, train, folder, 1)
    assert one is not None
    assert not [name for name in one[0] if "bound" in name or "duplicates" in name]

    dataset = Dataset.open(folder)
    known(dataset, Dataset.open(train), [*COPIES, "damaged"]).save(folder)
    found = {
        (size, group): run_ranks(_evaluate, size, train, folder, group) for size, group in ((1, 1), (2, 2), (3, 1))
    }
    metrics, corrupt = found[1, 1][0]
    assert corrupt == 1
    assert {name: value for name, value in metrics.items() if name in one[0]} == one[0]
    for other in found.values():
        assert other[0][0] == pytest.approx(metrics, rel=1e-5)
        assert other[1:] == [None] * (len(other) - 1)

    # Image by image, with a plain trunk.
    trunk = parity.make_trunk()
    weight = ShardedHead(len(dataset.vocabulary), trunk.num_features, seed=5).weight
    hits = {1: 0, 5: 0}
    config = DataConfig(image_size=32, workers=0)
    for record, key in enumerate(dataset.keys):
        try:
            image = decode(dataset.read(record), 10**6)
        except CorruptImage:
            assert key == "damaged"
            continue
        with torch.no_grad():
            logits = trunk(normalize(eval_crop(image, config.short_side, 32)[None])) @ weight.t()
        for k in hits:
            hits[k] += key not in COPIES and int(dataset.labels(record)[0]) in logits[0].topk(k).indices.tolist()
    assert metrics["validation/duplicates"] == 6  # one more cannot be read
    assert metrics["validation/images"] == 19
    assert metrics["validation/top1_lower_bound"] == pytest.approx(hits[1] / 19)
    assert metrics["validation/top5_lower_bound"] == pytest.approx(hits[5] / 19)
    assert metrics["validation/top5_lower_bound"] < metrics["validation/top5"]


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_it_and_refuses_duplicates_of_another_set(emoji_corpus: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(emoji_corpus, corpus)
    train, validation = (Dataset.open(find_dataset(corpus, role)) for role in ("train", "val"))
    known(validation, train, [str(key) for key in validation.keys[:5]]).save(validation.folder)

    def launch(name: str, size: int) -> Ranks:
        settings = [f"data.train={corpus}", f"data.validation={corpus}", f"run.folder={tmp_path / name}"]
        more = ["batch.micro=4", "schedule.length=2 steps", "schedule.evaluate_every=0 steps", "tracking.enabled=true"]
        uri = f"tracking.uri=sqlite:///{tmp_path / name}.db"
        return Ranks(["engine.name=ddp", *TINY, *settings, *more, uri], size, tmp_path / f"{name}-output")

    ranks = launch("run", 2)
    assert ranks.wait() == [0, 0], ranks.output()
    assert "5 validation images are known to be in a training set (duplicates.json)" in ranks.output()
    assert "not searched" not in ranks.output()
    assert "Duplicates: the training set has 5 of the images too" in ranks.output()
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["step"] == 2
    assert written["validation"]["sha256"] == validation.manifest_hash
    assert written["metrics"]["validation/duplicates"] == 5
    events = [event for event, _ in Spool(tmp_path / "run" / "spool").read() if event.get("kind") == "metrics"]
    (sent,) = [event["values"] for event in events if "validation/top1_lower_bound" in event["values"]]
    assert {name: sent[name] for name in written["metrics"] if "lower_bound" in name} == {
        name: value for name, value in written["metrics"].items() if "lower_bound" in name
    }

    content = json.loads((validation.folder / DUPLICATES).read_text())
    content["evaluation"]["sha256"] = "0" * 64
    (validation.folder / DUPLICATES).write_text(json.dumps(content))
    ranks = launch("refused", 2)
    assert ranks.wait() == [2, 2]
    assert "duplicates.json was made for another set of images" in ranks.output() + ranks.output(1)
