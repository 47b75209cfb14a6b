from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scale_wsl.engines import ds_config, ds_zero, json_file
from scale_wsl.engines.ds_config import BatchSizes, find, read, resolve
from scale_wsl.engines.ds_zero import Offloading
from scale_wsl.engines.optimizer import OptimizerSettings
from scale_wsl.engines.world import World
from scale_wsl.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
BATCH = BatchSizes(micro=8, accumulation=3, world=2)
ZERO = "zero_optimization"
SGD = OptimizerSettings(weight_decay=1e-4)


OPTIMIZER = ("lr", "momentum", "nesterov", "weight_decay", "betas", "eps", "adam_w_mode", "torch_adam")


def resolved(
    content: dict[str, Any], *, precision: str = "fp32", clip: float = 0.0, optimizer: OptimizerSettings = SGD
) -> dict[str, Any]:
    return resolve(
        content,
        "mine.json",
        batch=BATCH,
        optimizer=optimizer,
        learning_rate=0.025,
        clip=clip,
        precision=precision,
        offloading=Offloading(Path("here"), "my_run", largest=1000, pin_memory=False),
    )


def optimizer_of(path: Path) -> OptimizerSettings:
    """The optimizer that a shipped file is written for, by its name; any where it says none."""
    name = path.stem.partition("_")[2]
    return OptimizerSettings(name=name if name in ("adam", "adamw") else "sgd")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_resolve_and_leave_nothing_auto(path: Path, precision: str) -> None:
    config = resolved(read(path), precision=precision, clip=1.0, optimizer=optimizer_of(path))
    assert '"auto"' not in json.dumps(config)
    assert config["train_batch_size"] == 48
    assert config["gradient_clipping"] == 0.0
    assert ("torch_autocast" in config) == (precision == "bf16")
    assert len(path.read_text().splitlines()) < 25


def test_there_is_a_file_for_each_stage_place_and_optimizer() -> None:
    found = [resolved(read(path), optimizer=optimizer_of(path))[ZERO] for path in SHIPPED]
    places = {(block["stage"], *(block.get(key, {}).get("device") for key in ds_zero._OFFLOAD)) for block in found}
    stages = {(stage, None, None) for stage in range(4)}
    assert places == stages | {(1, "cpu", None), (2, "cpu", None), (3, "cpu", "cpu"), (3, "nvme", "nvme")}
    assert {read(path).get("optimizer", {}).get("type") for path in SHIPPED} == {None, "SGD", "Adam", "AdamW"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train_batch_size": 50}, ["train_batch_size to 50", "8 x 3 x 2", "48"]),
        ({"train_batch_size": 10**400}, ["train_batch_size to 1000"]),
        ({"train_batch_size": "48"}, ['train_batch_size to "48"']),
        ({"train_batch_size": float("nan")}, ["train_batch_size to NaN"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu to 4", "batch.micro is 8"]),
        ({"gradient_accumulation_steps": 2}, ["batch.accumulation is 3"]),
        ({"gradient_clipping": 1.0}, ["optim.clip is 0"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer.type", "optim.name is sgd", "AdamW"]),
        ({"optimizer": {"type": "SGD", "param": {}}}, ["optimizer.param,", "did you mean optimizer.params?"]),
        (
            {"optimizer": {"type": "SGD", "params": {"lr": 1}}},
            ["optimizer.params.lr to 1", "optim.lr x batch / 256 = 0.025"],
        ),
        ({"optimizer": {"params": {"lr": 10**400}}}, ["optimizer.params.lr"]),
        ({"optimizer": {"params": {"momentum": 0.8}}}, ["optimizer.params.momentum to 0.8", "optim.momentum is 0.9"]),
        ({"optimizer": {"params": {"nesterov": 1}}}, ["optim.nesterov is true"]),
        ({"optimizer": {"params": {"betas": [0, 1]}}}, ["optimizer.params.betas"]),
        ({"optimizer": {"params": []}}, ["optimizer.params to []", "JSON object"]),
        ({"bf16": {"enabled": True}}, ["bf16", "engine.precision=bf16"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled to true", "engine.precision"]),
        ({"fp16": {"enabled": 1}}, ["fp16.enabled to 1", "true or false"]),
        ({"fp16": True}, ["fp16 to true", "JSON object"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler"]),
        (
            {"torch_autocast": {"enabled": True}},
            ["mine.json sets torch_autocast.enabled to true, but engine.precision is fp32: make them agree"],
        ),
        ({"torch_autocast": 1}, ["torch_autocast", "JSON object"]),
        ({"torch_autocast": {"enable": True}}, ["did you mean torch_autocast.enabled?"]),
        ({"torch_autocast": {"dtype": 16}}, ["torch_autocast.dtype to 16", "a string"]),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
            ["lower_precision_safe_modules to a list", "reduced in bf16"],
        ),
        ({"steps_per_print": 0}, ["steps_per_print to 0", "a whole number of at least 1"]),
        ({"steps_per_print": True}, ["steps_per_print to true"]),
        ({"wall_clock_breakdown": "yes"}, ["wall_clock_breakdown", "true or false"]),
        ({"flops_profiler": True}, ["flops_profiler to true", "JSON object"]),
        ({"flops_profiler": {"profile_step": "x"}}, ["flops_profiler.profile_step"]),
        ({"comms_logger": {"prof_ops": [1]}}, ["comms_logger.prof_ops", "a list of strings"]),
        ({"comms_logger": {"verbos": True}}, ["did you mean comms_logger.verbose?"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer to false", "torch.optim.SGD"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer to true", "torch.optim.SGD"]),
        ({ZERO: {"stage": 4}}, ["stage to 4", "0, 1, 2 and 3"]),
        ({ZERO: {"stage": True}}, ["stage"]),
        ({ZERO: {"stage": "auto"}}, ["stage"]),
        ({ZERO: True}, ["zero_optimization to true", "JSON object"]),
        ({ZERO: {"compute_grad_norm": False}}, ["compute_grad_norm to false", "not finite"]),
        ({ZERO: {"stage": 2, "offload_param": {"device": "cpu"}}}, ['offload_param.device to "cpu"', "stage 3"]),
        ({ZERO: {"offload_optimizer": {"device": "cpu"}}}, ["ZeRO-0 does not partition", "stage 1 or 2 or 3"]),
        ({ZERO: {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, ["only ZeRO-3 offloads"]),
        (
            {ZERO: {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": ""}}},
            ['nvme_path to ""', "local disk"],
        ),
        ({ZERO: {"stage": 3, "offload_optimizer": {"device": "disk"}}}, ['to "disk"', "none, cpu or nvme"]),
        ({ZERO: {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, ["ratio to 0.5", "only 1.0 works"]),
        ({ZERO: {"stage": 3, "offload_param": {"devise": "cpu"}}}, ["did you mean", "offload_param.device?"]),
        ({ZERO: {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
        ({ZERO: {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": 5}}}, ["buffer_count, which does no"]),
        (
            {ZERO: {"stage": 2, "offload_optimizer": {"device": "cpu", "nvme_path": "/x"}}},
            ["offload_optimizer.nvme_path, which does nothing", '"cpu"'],
        ),
        ({ZERO: {"stage": 2, "stage3_max_live_parameters": 9}}, ["stage3_max_live_parameters, which does nothing"]),
        ({ZERO: {"stage": 1, "sub_group_size": 9}}, ["sub_group_size", "ZeRO-1"]),
        ({ZERO: {"stage": 0, "reduce_bucket_size": 9}}, ["reduce_bucket_size", "ZeRO-0"]),
        ({ZERO: {"stage": 3, "allgather_bucket_size": 8}}, ["allgather_bucket_size, which does nothing in ZeRO-3"]),
        ({ZERO: {"stage": 2, "allgather_partitions": False}}, ["allgather_partitions to false", "whatever it says"]),
        ({ZERO: {"stage3_gather_16bit_weights_on_model_save": True}}, ["16bit", "scale-wsl checkpoint export"]),
        ({"aio": {"block": 1}}, ["aio.block", "did you mean aio.block_size?"]),
        ({"aio": {"block_size": 1}, ZERO: {"stage": 3}}, ["aio, which does nothing", '"nvme"']),
        ({ZERO: {"mics_shard_size": 2}}, ["mics_shard_size", "groups of ranks"]),
        ({ZERO: {"zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size to 2", "only 1 works"]),
        ({ZERO: {"zero_quantized_weights": True}}, ["zero_quantized_weights", "recipe"]),
        ({ZERO: {"zenflow": {"topk_ratio": 0.1}}}, ["zenflow", "stale"]),
        ({ZERO: {"round_robin_gradients": True}}, ["round_robin_gradients", "momentum"]),
        ({ZERO: {"parameter_alignment": True}}, ["parameter_alignment", "not tested"]),
        ({ZERO: {"reduce_bucket_size": "big"}}, ['zero_optimization.reduce_bucket_size to "big"', "a whole number"]),
        ({ZERO: {"reduce_bucket_size": 1.5}}, ["reduce_bucket_size to 1.5"]),
        ({ZERO: {"reduce_bucket_size": 10**400}}, ["reduce_bucket_size to 1000"]),
        ({ZERO: {"sub_group_size": float("inf")}}, ["sub_group_size to Infinity"]),
        ({ZERO: {"allgather_bucket_size": 3}}, ["allgather_bucket_size to 3", "an even whole number"]),
        ({ZERO: {"overlap_comm": 1}}, ["overlap_comm to 1", "true or false"]),
        ({ZERO: {"overlap_com": True}}, ["did you mean zero_optimization.overlap_comm?"]),
        ({ZERO: {"prefetch_bucket_size": 1}}, ["stage3_prefetch_bucket_size?"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean zero_optimization?"]),
        ({"qwertz": 1}, ["qwertz", "it takes"]),
        ({"a\nb\x1b": 1}, ["a\\nb\\u001b"]),
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
            "optimizer": {"type": "SGD", "params": {"lr": 0.02500000001, "momentum": 0.9, "nesterov": True}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 5e8},
            "wall_clock_breakdown": True,
            "steps_per_print": 10,
            "zero_allow_untested_optimizer": True,
            "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": None},
        }
    )
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": 500_000_000}
    assert isinstance(config["zero_optimization"]["allgather_bucket_size"], int)
    assert config["wall_clock_breakdown"] is True
    assert config["steps_per_print"] == 10
    assert config["flops_profiler"] == {"enabled": True, "module_depth": -1}
    assert "optimizer" not in config


def test_what_goes_to_disk_goes_to_the_run_folder_unless_the_file_says_where() -> None:
    block = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "auto"},
        "offload_param": {"device": "cpu"},
    }
    found = resolved({ZERO: block})[ZERO]
    assert found["offload_optimizer"] == {"device": "nvme", "nvme_path": "here", "pin_memory": False}
    assert found["offload_param"] == {"device": "cpu", "pin_memory": False}
    block["offload_optimizer"] = {"device": "nvme", "nvme_path": "/local_nvme", "buffer_count": 6}
    assert resolved({ZERO: block})[ZERO]["offload_optimizer"]["nvme_path"] == "/local_nvme/my_run"


def test_a_buffer_holds_a_ranks_part_of_the_largest_kernel() -> None:
    def buffer_size(**keys: Any) -> int:
        block = {"stage": 3, "offload_param": {"device": "nvme", **keys}}
        size = resolved({ZERO: block})[ZERO]["offload_param"]["buffer_size"]
        assert isinstance(size, int)
        return size

    assert buffer_size() == buffer_size(buffer_size="auto") == 1000
    assert buffer_size(buffer_size=2000) == 2000
    with pytest.raises(UserError, match=r"buffer_size to 999, but .* has 1000 elements"):
        buffer_size(buffer_size=999)
    with torch.device("meta"):
        trunk = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3))
    world = World(1, 2, 1, torch.device("cpu"))
    first, other = (Offloading.of(Path(folder), trunk, world) for folder in ("runs/a", "runs/b"))
    assert first.largest == -(-5 * 7 * 9 // 2)
    assert first.run != other.run


ADAM = {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}}


def test_adam_is_adamw_to_deepspeed_unless_it_is_told_otherwise() -> None:
    adam, adamw = OptimizerSettings(name="adam"), OptimizerSettings(name="adamw")
    plain = {**ADAM, "params": {**ADAM["params"], "adam_w_mode": False, "torch_adam": True}}
    for content, fits, other in (
        (ADAM, adamw, adam),
        ({"type": "AdamW"}, adamw, adam),
        (plain, adam, adamw),
    ):
        both = {**plain, "params": {**ADAM["params"], "adam_w_mode": "auto"}}
        assert "optimizer" not in resolved({"optimizer": both}, optimizer=fits)
        assert "optimizer" not in resolved({"optimizer": content}, optimizer=fits)
        with pytest.raises(UserError, match=r"optimizer\.type to \"Adam"):
            resolved({"optimizer": content}, optimizer=other)
    with pytest.raises(UserError, match=r"optimizer\.params\.betas to a list, but optim\.beta1 and optim\.beta2 are"):
        resolved({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}}, optimizer=adamw)
    with pytest.raises(UserError, match=r"optimizer\.params\.momentum, which this engine does not use"):
        resolved({"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}, optimizer=adamw)


@pytest.mark.parametrize(("stage", "reason"), [(0, "no engine"), (1, "pieces of layers"), (3, "pieces of layers")])
def test_lamb_is_refused_with_the_reason(stage: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolved({"optimizer": {"type": "Lamb"}, ZERO: {"stage": stage}})


def test_what_says_nothing_is_dropped() -> None:
    config = resolved(
        {
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
            "amp": {"enabled": "auto", "opt_level": "auto"},
            "scheduler": {},
            "optimizer": {"type": "auto", "params": {"lr": "auto", "weight_decay": "auto"}},
            "torch_autocast": {"enabled": False, "lower_precision_safe_modules": []},
            "steps_per_print": None,
            "dump_state": "auto",
            "zero_force_ds_cpu_optimizer": "auto",
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "none", "pin_memory": True},
                "offload_optimizer": {"device": "none", "pin_memory": True},
                "reduce_bucket_size": "auto",
                "overlap_comm": None,
                "compute_grad_norm": True,
                "zero_hpz_partition_size": 1,
                "round_robin_gradients": False,
            },
        }
    )
    assert config == resolved({"zero_optimization": {"stage": 3}})


def test_every_tuning_key_is_one_that_deepspeed_takes() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    fields = zero_config.model_fields.items()
    names = {field.alias or name: field.annotation for name, field in fields}
    for key, kind in ds_zero._ZERO_TUNING.items():
        value: Any = True if kind is json_file.BOOLEAN else 8
        assert names[key] in ((bool, bool | None) if value is True else (int,)), key
        assert zero_config(stage=3, **{key: value}).model_dump(by_alias=True)[key] == value


NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 48, 8, 3, 0.025, 5e8, 10**400, -(10**400), 1e300])
WORDS = st.sampled_from(["auto", "none", "cpu", "SGD", "bfloat16", "bf16", ""]) | st.text()
KEYS = st.sampled_from(
    sorted(
        {*ds_config._FROM_RECIPE, *ds_config._REPORTING, *ds_config._REPORTING_BLOCKS, *ds_config._FIXED}
        | {*ds_config._SWITCHED, *ds_config._REFUSED, *ds_zero._ZERO_TUNING, *ds_zero._ZERO_FIXED}
        | {key for kinds in ds_config._REPORTING_BLOCKS.values() for key in kinds}
        | {"stage", "type", "params", "dtype", "lower_precision_safe_modules", "offload_param", "device", *OPTIMIZER}
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=3),
    max_leaves=12,
)


def below(keys: Iterable[str], values: st.SearchStrategy[Any] = JSON) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(sorted(keys)), values, max_size=2) | JSON


BLOCKS = {
    "zero_optimization": below(
        {"stage", *ds_zero._OFFLOAD, *ds_zero._ZERO_TUNING, *ds_zero._ZERO_FIXED},
        below(["device", "nvme_path", "ratio", "buffer_count"]) | NUMBERS,
    ),
    "aio": below(ds_zero._AIO),
    "torch_autocast": below(["enabled", "dtype", "lower_precision_safe_modules"]),
    "optimizer": below(["type", "params"], below(OPTIMIZER)),
    **{key: below(kinds) for key, kinds in ds_config._REPORTING_BLOCKS.items()},
    **{key: below(["enabled"]) for key in ds_config._SWITCHED},
}


# One key at a time as well, or an early refusal would hide what comes later.
@settings(max_examples=600, deadline=None)
@given(
    content=st.sampled_from(sorted(BLOCKS)).flatmap(lambda key: st.fixed_dictionaries({key: BLOCKS[key]}))
    | st.dictionaries(KEYS, JSON, max_size=2)
    | st.dictionaries(KEYS | st.text(), JSON),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_any_json_object_resolves_or_is_a_users_mistake(content: dict[str, Any], precision: str) -> None:
    try:
        config = resolved(content, precision=precision)
    except UserError as error:
        sentence = str(error)
        assert sentence.startswith("mine.json sets ")
        assert "\n" not in sentence
        return
    assert config["train_batch_size"] == 48
    assert config["zero_optimization"]["stage"] in (0, 1, 2, 3)
    assert set(config["zero_optimization"]) <= {"stage", *ds_zero._ZERO_TUNING, *ds_zero._OFFLOAD}
    assert config["steps_per_print"] >= 1


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
