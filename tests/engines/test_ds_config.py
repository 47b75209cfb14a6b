from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scale_wsl.engines.ds_config import BatchSizes, find, read, resolve
from scale_wsl.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
BATCH = BatchSizes(micro=8, accumulation=3, world=2)
OPTIMIZER = {"lr": 0.025, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def resolved(content: dict[str, Any], *, precision: str = "fp32", clip: float = 0.0) -> dict[str, Any]:
    return resolve(content, "mine.json", batch=BATCH, optimizer=OPTIMIZER, clip=clip, precision=precision)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_resolve_and_leave_nothing_auto(path: Path, precision: str) -> None:
    config = resolved(read(path), precision=precision, clip=1.0)
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 48
    assert config["gradient_clipping"] == 0.0
    assert ("torch_autocast" in config) == (precision == "bf16")
    assert len(path.read_text().splitlines()) < 25


def test_there_is_a_file_for_each_stage() -> None:
    stages = {read(path)["zero_optimization"]["stage"] for path in SHIPPED}
    assert stages == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train_batch_size": 50}, ["train_batch_size to 50", "8 x 3 x 2", "48"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu to 4", "batch.micro is 8"]),
        ({"gradient_accumulation_steps": 2}, ["batch.accumulation is 3"]),
        ({"gradient_clipping": 1.0}, ["optim.clip is 0"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer.type", "SGD"]),
        ({"optimizer": {"type": "SGD", "params": {"lr": 1}}}, ["optimizer.params.lr to 1", "0.025"]),
        ({"optimizer": {"params": {"betas": [0, 1]}}}, ["optimizer.params.betas"]),
        ({"bf16": {"enabled": True}}, ["bf16", "engine.precision=bf16"]),
        ({"fp16": {"enabled": "auto"}}, ["fp16"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled", "engine.precision"]),
        ({"torch_autocast": 1}, ["torch_autocast", "JSON object"]),
        ({"zero_optimization": {"stage": 4}}, ["stage to 4", "0, 1, 2 and 3"]),
        ({"zero_optimization": {"stage": True}}, ["stage"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, ["offload_param"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean zero_optimization?"]),
        ({"qwertz": 1}, ["qwertz", "it takes"]),
    ],
)
def test_contradictions_are_refused_with_both_values(content: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolved(content)
    for part in ["mine.json", *says]:
        assert part in str(caught.value)


def test_equal_values_are_accepted_and_tuning_is_handed_on() -> None:
    config = resolved(
        {
            "train_batch_size": 48,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9, "nesterov": True}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
            "wall_clock_breakdown": True,
            "fp16": {"enabled": False},
        }
    )
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True
    assert "optimizer" not in config
    assert "fp16" not in config


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "nul", '"x"', "[" * 100_000])
def test_a_file_that_is_no_object_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.json"):
        read(path)


def test_files_are_found_here_first_then_among_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("zero2.json").parent.name == "ds_configs"
    (tmp_path / "zero2.json").write_text("{}")
    assert find("zero2.json") == Path("zero2.json")
    with pytest.raises(UserError, match=r"zero9\.json.*zero2\.json"):
        find("zero9.json")
