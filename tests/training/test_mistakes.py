"""A user's mistake is one clear sentence, and exit code 2 on every rank."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from scale_wsl.checkpoint import layout
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.errors import UserError
from tests.checkpoint import states
from tests.ranks import run_ranks
from tests.training.launching import ROOT, TINY


def _main(argv: list[str]) -> tuple[int, str]:
    from scale_wsl.training.pretrain import main

    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(argv, ROOT / "recipes" / "pretrain" / "emoji.yaml")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, errors.getvalue()


def mistake(argv: list[str], size: int = 2) -> str:
    """The sentence of a launch that must fail as a user's mistake on every rank, printed by one rank alone."""
    results = run_ranks(_main, size, argv, process_group=False)
    assert [code for code, _ in results] == [2] * size, results
    (sentence,) = [line for _, text in results for line in text.splitlines() if line.startswith("error: ")]
    assert any(text.endswith(sentence + "\n") for _, text in results)
    assert not any("Traceback" in text for _, text in results)
    return sentence


def arguments(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.train={corpus}",
        f"data.validation={corpus}",
        f"run.folder={tmp_path / 'run'}",
        "tracking.enabled=false",
        "batch.micro=4",
        "schedule.length=1 steps",
        *more,
    ]


@pytest.fixture
def own_corpus(emoji_corpus: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(emoji_corpus, tmp_path / "corpus"))


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_an_unknown_recipe_key(emoji_corpus: Path, tmp_path: Path) -> None:
    assert "did you mean batch.micro?" in mistake(arguments(emoji_corpus, tmp_path, "bach.micro=3"))


def test_an_unknown_option(emoji_corpus: Path, tmp_path: Path) -> None:
    assert "--ds_confg" in mistake(["--ds_confg", "x.json", *arguments(emoji_corpus, tmp_path)])


@pytest.mark.parametrize("setting", ["engine.batchnorm=pooled", "engine.batchnorm_group=0"])
def test_statistics_of_norms_that_have_none(emoji_corpus: Path, tmp_path: Path, setting: str) -> None:
    sentence = mistake(arguments(emoji_corpus, tmp_path, "model.norm=frozen", setting))
    assert f"{setting.partition('=')[0]} is set, but model.norm is frozen" in sentence


def test_groups_of_a_norm_that_has_none(emoji_corpus: Path, tmp_path: Path) -> None:
    assert "model.norm is batch, which has no groups" in mistake(
        arguments(emoji_corpus, tmp_path, "model.norm_groups=8")
    )


def test_data_that_was_never_prepared(tmp_path: Path) -> None:
    assert "scale-wsl prepare" in mistake(arguments(tmp_path / "nothing", tmp_path))


def test_a_missing_shard(own_corpus: Path, tmp_path: Path) -> None:
    one(own_corpus, "train-*/000000.tar").unlink()
    assert "000000.tar" in mistake(arguments(own_corpus, tmp_path))


def test_a_vocabulary_that_is_not_the_shards(own_corpus: Path, tmp_path: Path) -> None:
    vocabulary = one(own_corpus, "train-*/vocabulary.json")
    vocabulary.write_text(vocabulary.read_text().replace('"hash": "', '"hash": "0'))
    assert "vocabulary" in mistake(arguments(own_corpus, tmp_path))


def test_another_vocabularys_checkpoint(emoji_corpus: Path, tmp_path: Path) -> None:
    (result,) = run_ranks(_main, 1, arguments(emoji_corpus, tmp_path), process_group=False)
    assert result == (0, "")
    newest = layout.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    meta = (newest / "meta.json").read_bytes()
    states.rewrite_meta(newest, vocabulary_hash="f" * 64)
    sentence = mistake(["--resume", "auto", *arguments(emoji_corpus, tmp_path)])
    assert "vocabulary ffffffffffff" in sentence
    (newest / "meta.json").write_bytes(meta)
    assert "run.seed" in mistake(["--resume", str(newest), *arguments(emoji_corpus, tmp_path, "run.seed=7")])
    assert "--resume auto" in mistake(arguments(emoji_corpus, tmp_path))
    other_network = mistake(["--resume", str(newest), *arguments(emoji_corpus, tmp_path, "model.width=8")])
    assert "model section" in other_network


def test_a_ds_config_that_contradicts_the_recipe(emoji_corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 5, "zero_optimization": {"stage": 2}}')
    sentence = mistake(["--ds_config", str(config), *arguments(emoji_corpus, tmp_path)])
    assert "train_micro_batch_size_per_gpu to 5, but batch.micro is 4" in sentence


def test_a_train_batch_size_that_does_not_factor(emoji_corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.json"
    config.write_text('{"train_batch_size": 9, "zero_optimization": {"stage": 2}}')
    assert "4 x 1 x 2" in mistake(["--ds_config", str(config), *arguments(emoji_corpus, tmp_path)])


def test_a_head_group_that_does_not_divide_the_ranks(emoji_corpus: Path, tmp_path: Path) -> None:
    assert "head.group_size is 3" in mistake(arguments(emoji_corpus, tmp_path, "head.group_size=3"))


def test_a_run_folder_that_is_a_file(emoji_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "run folder" in mistake(arguments(emoji_corpus, tmp_path))


def test_a_shard_that_goes_while_one_rank_reads_it(own_corpus: Path, tmp_path: Path) -> None:
    results = run_ranks(_main_that_loses_a_shard, 2, arguments(own_corpus, tmp_path), process_group=False)
    assert [code for code, _ in results] == [2, 2], results
    (sentence,) = [line for _, text in results for line in text.splitlines() if line.startswith("error: ")]
    assert "000000.tar" in sentence
    assert not any("Traceback" in text for _, text in results), results


def _main_that_loses_a_shard(argv: list[str]) -> tuple[int, str]:
    """Rank 1's workers find the shard gone; rank 0 learns of it in a collective only."""
    from scale_wsl.corpus import shards

    if os.environ["RANK"] == "1":

        def read(self: shards.Dataset, i: int) -> bytes:
            raise UserError(f"{self.folder}/000000.tar is gone")

        shards.Dataset.read = read  # type: ignore[method-assign]
    return _main([*argv, "data.workers=0"])


def test_two_runs_in_one_folder(emoji_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another run is at work" in mistake(arguments(emoji_corpus, tmp_path))


def test_one_thing_said_twice(emoji_corpus: Path, tmp_path: Path) -> None:
    twice = ["--ds_config", "zero2.json", "engine.name=ddp", *arguments(emoji_corpus, tmp_path)]
    assert "twice" in mistake(twice, size=1)
    assert "twice" in mistake(["--resume", "auto", "checkpoint.resume=x", *arguments(emoji_corpus, tmp_path)], size=1)
    assert "is empty" in mistake(["--resume", "", *arguments(emoji_corpus, tmp_path)], size=1)


def test_paths_and_numbers_that_no_system_takes(emoji_corpus: Path, tmp_path: Path) -> None:
    assert "data.train" in mistake(arguments(emoji_corpus, tmp_path, f"data.train={'x' * 300}"), size=1)
    assert "optim.lr" in mistake(arguments(emoji_corpus, tmp_path, f"optim.lr=1{'0' * 400}"), size=1)
    assert "warm_up" in mistake(arguments(emoji_corpus, tmp_path, "schedule.warm_up=2 steps"), size=1)
    assert "checkpoint.every" in mistake(arguments(emoji_corpus, tmp_path, "checkpoint.every=often"), size=1)


def test_too_many_corrupt_images_stop_all_ranks(own_corpus: Path, tmp_path: Path) -> None:
    shard = one(own_corpus, "train-*/000000.tar")
    data = bytearray(shard.read_bytes())
    position = data.find(b"\x89PNG")
    while position >= 0:  # every image loses its first bytes, no size changes
        data[position : position + 8] = b"no image"
        position = data.find(b"\x89PNG")
    shard.write_bytes(data)
    sentence = mistake(arguments(own_corpus, tmp_path, "data.max_corrupt=0.001", "schedule.length=9 steps"))
    assert "data.max_corrupt" in sentence


def _flip(checkpoint: Path) -> str:
    """Flip a bit of the elements of some tensor; returns its name."""
    name, stored = next(iter(Checkpoint.open(checkpoint).tensors.items()))
    file = checkpoint / "tensors" / stored.chunks[0].file
    content = bytearray(file.read_bytes())
    content[stored.chunks[0].position] ^= 4
    file.write_bytes(content)
    return name


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(emoji_corpus: Path, tmp_path: Path) -> None:
    more = ["schedule.length=2 steps", "checkpoint.every=1 steps"]
    results = run_ranks(_main, 2, arguments(emoji_corpus, tmp_path, *more), process_group=False)
    assert results == [(0, "")] * 2
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    name = _flip(newest)
    sentence = mistake(["--resume", str(newest), *arguments(emoji_corpus, tmp_path, *more)])
    assert f"{newest} is damaged" in sentence
    assert f"other bytes of {name} than were saved" in sentence
    (code, told), (_, silent) = run_ranks(
        _main, 2, ["--resume", "auto", *arguments(emoji_corpus, tmp_path, *more)], process_group=False
    )
    assert (code, silent) == (0, "")
    assert told.count("passing over a damaged checkpoint") == 1
    assert f"{newest} is damaged" in told
    Checkpoint.open(newest).verify()  # the step was done again, from the one before
    assert layout.read_meta(newest).step == 2
