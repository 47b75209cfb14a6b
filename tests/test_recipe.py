from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.recipe import describe, load_recipe, recipe_dict, recipe_yaml, section, setting


@dataclass(frozen=True, kw_only=True)
class Batch:
    micro: int = setting(24, "images per micro-batch")
    lr: float = setting(0.1, "learning rate")

    def __post_init__(self) -> None:
        if self.micro < 1:
            raise UserError(f"batch.micro is {self.micro}, but must be 1 or more")
        if self.micro * self.lr > 1e6:
            raise UserError(
                "lr is too large for so many images (batch.micro)" if self.lr > 1e6 else "micro is too large"
            )


@dataclass(frozen=True, kw_only=True)
class Model:
    depth: int = setting(101, "depth of the trunk", choices=(26, 50, 101))
    name: str = setting("", "name")
    norm: bool = setting(True, "whether to normalise")
    resize: int | None = setting(None, "short side")
    sizes: tuple[int, ...] = setting((1, 2), "sizes")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    batch: Batch = section(Batch)
    model: Model = section(Model)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_command_line_overrules_file_overrules_extended_file_overrules_default(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "batch: {micro: 1, lr: 1e-4}\nmodel: {depth: 26}\n")
    child = write(tmp_path, "child.yaml", "extends: base.yaml\nbatch:\n  micro: 2\nmodel:\n  name: '007'\n")
    recipe = load_recipe(Recipe, child, ["model.depth=50", "model.resize=96", "model.sizes=[3, 4]"])
    assert recipe == Recipe(batch=Batch(micro=2, lr=1e-4), model=Model(depth=50, name="007", resize=96, sizes=(3, 4)))


def test_text_on_the_command_line_stays_text() -> None:
    assert load_recipe(Recipe, overrides=["model.name=1e3"]).model.name == "1e3"
    assert load_recipe(Recipe, overrides=["model.name="]).model.name == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bach: {micro: 1}", ["bach.micro", "did you mean batch.micro?"]),
        ("batch: {micro: many}", ["batch.micro is 'many'", "must be a whole number"]),
        ("batch: {micro: true}", ["batch.micro is True", "must be a whole number"]),
        ("batch: {micro: 1.5}", ["batch.micro is 1.5"]),
        ("batch: {lr: .nan}", ["batch.lr", "must be a number"]),
        ("batch: 3", ["batch", "is a section"]),
        ("model: {depth: 34}", ["model.depth is 34", "26, 50, 101"]),
        ("model: {norm: 1}", ["model.norm is 1", "true or false"]),
        ("model: {sizes: [1, x]}", ["model.sizes is 'x'"]),
        ("batch: {micro: 1, micro: 2}", ["'micro' is given twice"]),
        ("a: &a [1]\nb: *a", ["aliases"]),
        ("- 1", ["must be a mapping"]),
        ("batch: [", ["not valid YAML"]),
        ("1: 2", ["is not text"]),
        ("!!python/object/apply:os.system ['true']", ["not valid YAML"]),
        ("extends: nowhere.yaml", ["cannot read the recipe", "nowhere.yaml"]),
        ("extends: bad.yaml", ["extends itself"]),
        ('extends: "a\\0b"', ["cannot read the recipe"]),
        (f"extends: {'a' * 300}", ["cannot read the recipe"]),
        (
            "batch: {micro: 1" + "0" * 400 + "}",
            ["batch.micro is 1000", "401 characters", "whole number of smaller size"],
        ),
        ("batch: {micro: 1e30}", ["batch.micro is '1e30'", "must be a whole number"]),
        ("batch: {lr: 1" + "0" * 400 + "}", ["batch.lr is 1000", "must be a number of smaller size"]),
        ("batch: {lr: 0x" + "f" * 5000 + "}", ["batch.lr is a number of thousands of digits"]),
        ("model: {sizes: " + "[" * 5000 + "]" * 5000 + "}", ["nested too deeply"]),
        ("batch: {micro: !!int ''}", ["not valid YAML"]),
        ("model: {norm: !!bool perhaps}", ["not valid YAML"]),
        ("extends: [a.yaml]", ["path of one other recipe"]),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, says: list[str]) -> None:
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_recipe(Recipe, path)
    for part in [*says, str(tmp_path)]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_chain_is_not_said_to_extend_itself(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path, f"{number}.yaml", f"extends: {number + 1}.yaml\nbatch: {{micro: {number + 1}}}")
    write(tmp_path, "15.yaml", "model: {depth: 26}")
    assert load_recipe(Recipe, tmp_path / "0.yaml") == Recipe(batch=Batch(micro=1), model=Model(depth=26))
    with pytest.raises(UserError, match="extends more than 15 recipes") as caught:
        load_recipe(Recipe, tmp_path / "16.yaml")
    assert "itself" not in str(caught.value)


def test_what_a_section_refuses_is_named_with_where_it_was_set(tmp_path: Path) -> None:
    def refusal(*overrides: str, text: str = "") -> str:
        with pytest.raises(UserError) as caught:
            load_recipe(Recipe, write(tmp_path, "my.yaml", text), overrides)
        return str(caught.value).replace(str(tmp_path / "my.yaml"), "my.yaml")

    micro, base = "batch.micro is 0, but must be 1 or more", "batch: {micro: 0}"
    assert refusal(text=base) == f"{micro} (set in my.yaml)"
    assert refusal("batch.micro=0") == f"{micro} (set on the command line)"
    assert refusal("batch.micro=0", text="batch: {micro: 7}") == f"{micro} (set on the command line)"
    # A message without the section's name; and one that names a key at its default.
    assert refusal("batch.micro=1000000", text="batch: {lr: 2}") == "micro is too large (set on the command line)"
    assert refusal(text="batch: {lr: 1e9, micro: 5}").endswith("(batch.micro) (set in my.yaml)")
    assert refusal("batch.lr=1e9", text="model: {depth: 26}").endswith("(batch.micro) (set on the command line)")
    with pytest.raises(UserError, match=r"or more$"):
        load_recipe(Defaults)


@dataclass(frozen=True, kw_only=True)
class Refused(Batch):
    micro: int = setting(0, "images per micro-batch")


@dataclass(frozen=True, kw_only=True)
class Defaults:
    batch: Refused = section(Refused)


@dataclass(frozen=True, kw_only=True)
class Contradiction(Recipe):
    def __post_init__(self) -> None:
        raise UserError("batch.micro does not go with model.depth")


def test_two_places_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "my.yaml", "batch: {micro: 2}")
    with pytest.raises(UserError, match=r"\(batch.micro set in .*my.yaml, model.depth set on the command line\)$"):
        load_recipe(Contradiction, path, ["model.depth=26"])


@pytest.mark.parametrize(
    "override",
    [
        *("batch.micro", "=3", "batch.micro=x", "batch.mcro=3", "batch=3"),
        *("batch.micro=" + "[" * 5000, "model.sizes=" + "[" * 5000, "model.resize=" + "{a: " * 5000),
        *("batch.lr=1" + "0" * 400, "batch.micro=1" + "0" * 400, "batch.micro=1e400", "batch.micro=0x" + "f" * 5000),
        *("batch.micro=!!int ''", "batch.lr=" + "1:" * 300 + "1.0", "model.norm=!!bool perhaps"),
    ],
)
def test_a_mistake_on_the_command_line_says_so(override: str) -> None:
    with pytest.raises(UserError, match="command line") as caught:
        load_recipe(Recipe, overrides=[override])
    assert len(str(caught.value)) < 250


def test_a_folder_or_binary_file_is_a_users_mistake(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "binary.yaml"):
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="cannot read the recipe"):
            load_recipe(Recipe, path)


def test_a_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(Recipe, overrides=["batch.lr=3e-5", "model.name=ü: #", "model.sizes=[]"])
    assert load_recipe(Recipe, write(tmp_path, "resolved.yaml", recipe_yaml(recipe))) == recipe
    assert recipe_dict(recipe)["batch.lr"] == 3e-5


def test_describe_lists_every_key_with_default_and_meaning() -> None:
    text = describe(Recipe)
    for key in recipe_dict(Recipe()):
        assert f"  {key}=" in text
    assert "model.depth=101  (26 | 50 | 101)\n      depth of the trunk" in text


@given(st.text())
def test_any_text_is_a_recipe_or_a_users_mistake(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(UserError):
            load_recipe(Recipe, path)


@given(st.text(), st.text())
def test_any_override_is_a_value_or_a_users_mistake(key: str, value: str) -> None:
    for override in (f"{key}={value}", f"batch.micro={value}", f"model.sizes={value}"):
        with contextlib.suppress(UserError):
            load_recipe(Recipe, overrides=[override])
