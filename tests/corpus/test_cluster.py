"""The same data sets from daft: on this machine, and on a Ray cluster of two worker nodes, one of which may die."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scale_wsl.corpus.counting import count_posts, label_posts
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.prepare import prepare
from scale_wsl.corpus.sources import TableSource
from scale_wsl.errors import UserError
from scale_wsl.hashtags import Vocabulary, VocabularyRule
from tests.corpus.test_publishing import contents
from tests.corpus.toy import CONFIG, ToySource

pytest.importorskip("daft")
pytest.importorskip("ray")

# In a process of its own: Ray leaves threads, sockets and warnings behind.
_JOB = """
import json, os, sys, threading, time
from pathlib import Path

out, cluster_wanted, victim = Path(sys.argv[1]), sys.argv[2] == "ray", sys.argv[3] == "kill"
os.environ["SCALE_WSL_TEST_NODES"] = str(out / "nodes")
(out / "nodes").mkdir()

from scale_wsl.corpus.counting import count_posts, label_posts
from scale_wsl.corpus.execution import Workers
from scale_wsl.corpus.prepare import prepare
from scale_wsl.corpus.sources import TableSource
from scale_wsl.hashtags import Vocabulary, VocabularyRule
from tests.corpus.test_cluster import SplitToySource
from tests.corpus.toy import CONFIG

if __name__ == "__main__":
    address = None
    if cluster_wanted:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})  # the head does no work
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        address = cluster.address
    if victim:
        def kill():
            while len(list((out / "nodes").iterdir())) < 2:
                time.sleep(0.05)
            cluster.remove_node(nodes[0], allow_graceful=False)
        threading.Thread(target=kill, daemon=True).start()
    workers = Workers(engine="daft", address=address, count=None if cluster_wanted else 2)
    prepared = prepare(SplitToySource(), out / "data", CONFIG, workers=workers)
    table = TableSource(path=str(out / "posts"))
    rule = VocabularyRule("noun")
    counts = count_posts(table, rule, workers=workers)
    counts.save(out / "counts.parquet")
    vocabulary, _ = Vocabulary.of_counts(counts, rule, min_count=2)
    vocabulary.save(out / "vocabulary.json")
    figures = label_posts(table, out / "vocabulary.json", out / "labelled", workers=workers)
    print(json.dumps(figures))
"""


class SplitToySource(ToySource):
    """In several parts, each of which says where it was read."""

    def splits(self) -> list[int]:
        return list(range(8))

    def posts(self, split: int | None = None):  # type: ignore[no-untyped-def]
        folder = os.environ.get("SCALE_WSL_TEST_NODES")
        if folder and split is not None:
            import ray

            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else str(os.getpid())
            (Path(folder) / node).touch()
        for number, post in enumerate(super().posts()):
            if split is None or number % 8 == split:
                yield post


def write_posts(folder: Path) -> None:
    folder.mkdir(parents=True)
    tags = ["cat", "#Dog", "birds fish", "#horse and #cow", "zzz", "brown_bear"]
    for number in range(6):
        rows = [f"{i}.png,{tags[(i * 7 + number) % len(tags)]}" for i in range(200)]
        (folder / f"{number}.csv").write_text("\n".join(["image,hashtags", *rows]) + "\n")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone")
    alone = Workers(count=1)
    prepare(SplitToySource(), out / "data", CONFIG, workers=alone)
    write_posts(out / "posts")
    table, rule = TableSource(path=str(out / "posts")), VocabularyRule("noun")
    counts = count_posts(table, rule, workers=alone)
    counts.save(out / "counts.parquet")
    Vocabulary.of_counts(counts, rule, min_count=2)[0].save(out / "vocabulary.json")
    label_posts(table, out / "vocabulary.json", out / "labelled", workers=alone)
    return whole(out)


def whole(out: Path) -> dict[str, dict[str, str]]:
    found = {name: contents(out / name) for name in ("data", "labelled")}
    found["labelled"].pop("labelled.json")  # says which table it was, by its times of change
    files = contents(out)
    return found | {"counts": {name: files[name] for name in ("counts.parquet", "vocabulary.json")}}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "fate"), [("native", "live"), ("ray", "live"), ("ray", "kill")])
def test_daft_makes_the_same(engine: str, fate: str, tmp_path: Path, expected: dict[str, dict[str, str]]) -> None:
    write_posts(tmp_path / "posts")
    (tmp_path / "job.py").write_text(_JOB)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "job.py"), str(tmp_path), engine, fate],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert whole(tmp_path) == expected
    assert len(list((tmp_path / "nodes").iterdir())) == 2  # both had something to do


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "spark"}, "workers.engine is 'spark', but must be processes or daft"),
        ({"count": 0}, "workers.count is 0"),
        ({"address": "auto"}, "needs workers.engine=daft"),
        ({"engine": "daft", "address": "auto", "count": 3}, "workers.count is of this machine's processes"),
    ],
)
def test_workers_that_there_are_not(options: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Workers(**options)  # type: ignore[arg-type]
