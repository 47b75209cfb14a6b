"""What a checkpoint says of itself is not believed: damage is noticed, and malice refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.checkpoint import index
from scale_wsl.checkpoint.layout import read_meta
from scale_wsl.checkpoint.reader import Checkpoint
from scale_wsl.errors import UserError
from tests.checkpoint import states
from tests.ranks import run_ranks

NUMBERS: list[Any] = [-1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 10**30, 1.0, 1e300]
OTHERS: list[Any] = [None, True, "", "float32", "../x", "__0_0.distcp", "a\0b", [], {}]
VALUES = st.sampled_from(NUMBERS + OTHERS) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(states.save_steps, 2, folder, [1])
    return folder / "step-00000001"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value inside a JSON document is."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


def _changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = json.loads(json.dumps(content))
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return content


@settings(max_examples=300)
@given(data=st.data())
def test_no_index_is_believed_that_does_not_hold_each_element_once(saved: Path, data: st.DataObject) -> None:
    checkpoint = Checkpoint.open(saved)
    sizes = {name.removeprefix("tensors/"): size for name, size in checkpoint.meta.files.items()}
    content = json.loads((saved / "index.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        places = [place for place in _places(content) if place]
        content = _changed(content, data.draw(st.sampled_from(places)), data.draw(VALUES))
        if not isinstance(content.get("tensors"), dict):
            break
    try:
        tensors = index.parse(json.dumps(content).encode(), sizes, "here")
    except UserError:
        return
    # What is let through can be read, and is no larger than the files.
    assert sum(tensor.nbytes for tensor in tensors.values()) <= sum(sizes.values())
    believed = Checkpoint(saved, checkpoint.meta, tensors)
    for name, tensor in tensors.items():
        assert believed.read(name, tensor.shape, 0, tensor.nbytes // tensor.itemsize).nbytes == tensor.nbytes


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_an_index_or_a_users_error(text: bytes) -> None:
    with pytest.raises(UserError, match="here is damaged"):
        index.parse(text, {}, "here")


BREAKING = [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"\xff", b'{"files":[],"tensors":1e999}']


@pytest.mark.parametrize("text", BREAKING)
def test_json_that_breaks_parsers_is_a_users_error(copy: Path, text: bytes) -> None:
    with pytest.raises(UserError, match="is damaged"):
        index.parse(text, {}, "index.json is damaged")
    (copy / "meta.json").write_bytes(text)
    with pytest.raises(UserError, match=r"meta\.json|format"):
        Checkpoint.open(copy)


BIAS = ("tensors", "head.bias")
CHUNK = (*BIAS, "chunks", 0)
ATTACKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a file outside": (lambda c: c | {"files": ["../../secret.distcp", *c["files"][1:]]}, "no name of a tensor file"),
    "an absolute path": (lambda c: c | {"files": ["/etc/passwd", *c["files"][1:]]}, "no name of a tensor file"),
    "a file that is not listed": (lambda c: c | {"files": ["__77_0.distcp", *c["files"][1:]]}, "beyond the end"),
    "a negative position": (lambda c: _changed(c, (*CHUNK, 1), -8), "no place or size"),
    "a place beyond the end": (lambda c: _changed(c, (*CHUNK, 1), 10**12), "beyond the end"),
    "an absurd shape": (lambda c: _changed(c, (*BIAS, "shape"), [2**40, 2**40]), "does not exist"),
    "a huge tensor": (lambda c: _changed(c, (*BIAS, "shape"), [2**40]), "of its 1099511627776"),
    "too many dimensions": (lambda c: _changed(c, (*BIAS, "shape"), [1] * 500), "does not exist"),
    "a gap": (lambda c: _changed(c, (*BIAS, "chunks"), []), "0 of its 5 elements"),
    "bytes twice": (lambda c: _changed(c, ("tensors", "copy"), c["tensors"]["head.bias"]), "two chunks share bytes of"),
    "no such type": (lambda c: _changed(c, (*BIAS, "dtype"), "object"), "no type of elements"),
    "a number of no file": (lambda c: _changed(c, (*CHUNK, 0), 99), "is damaged"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_index_that_means_harm(copy: Path, attack: str) -> None:
    change, says = ATTACKS[attack]
    content = json.loads((copy / "index.json").read_text())
    states.rewrite_index(copy, json.dumps(change(content)).encode())
    with pytest.raises(UserError, match=says):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": {"a" * 300: 1}}, "is not whole"),
        ({"files": {"a\0b": 1}}, "is not whole"),
        ({"files": {"../meta.json": 1}}, "is not whole"),
        ({"files": {"tensors/../meta.json": 1}}, "is not whole"),
        ({"files": {"meta.json": 1}}, "is not whole"),
        ({"files": {"index.json": -1}}, "is not whole"),
        ({"files": []}, "files is missing or of a wrong type"),
        ({"files": {"index.json": "1"}}, "files is missing or of a wrong type"),
        ({"hashes": {}}, "no hash of index.json"),
        ({"hashes": {"index.json": "0", "/etc/passwd": "0"}}, "is not as it was saved"),
        ({"step": "many"}, "step is missing or of a wrong type"),
        ({"step": True}, "step is missing or of a wrong type"),
        ({"recipe": None}, "recipe is missing or of a wrong type"),
        ({"format": 99}, "format 99"),
        ({"format": True}, "format True"),
    ],
)
def test_a_meta_that_means_harm(copy: Path, changes: dict[str, Any], says: str) -> None:
    states.rewrite_meta(copy, **changes)
    with pytest.raises(UserError, match=says):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["meta.json", "index.json", "vocabulary.json", "tensors/.metadata"])
def test_every_flipped_bit_of_the_small_files_is_noticed(copy: Path, name: str) -> None:
    text = (copy / name).read_bytes()
    for place in range(0, len(text), max(1, len(text) // 300)):
        for bit in range(8):
            (copy / name).write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
            with pytest.raises(UserError, match=copy.name):
                Checkpoint.open(copy)
    (copy / name).write_bytes(text)
    Checkpoint.open(copy)


def test_every_flipped_bit_of_the_elements_is_noticed_and_named(copy: Path) -> None:
    checkpoint = Checkpoint.open(copy)
    for name, tensor in checkpoint.tensors.items():
        for chunk in tensor.chunks:
            path = copy / "tensors" / chunk.file
            content = path.read_bytes()
            place = chunk.position + (chunk.length * tensor.itemsize) // 2
            path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
            with pytest.raises(UserError, match=rf"{chunk.file} has other bytes of {name} than were saved$"):
                Checkpoint.open(copy).verify()
            path.write_bytes(content)
    checkpoint.verify()


def test_a_file_that_is_cut_short(copy: Path) -> None:
    opened = Checkpoint.open(copy)
    for path in sorted((copy / "tensors").glob("*.distcp")):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        with pytest.raises(
            UserError, match=rf"tensors/{path.name}' is missing or does not have its {len(content)} bytes"
        ):
            Checkpoint.open(copy)
        path.write_bytes(content[:100])
        with pytest.raises(UserError, match=rf"{path.name} ends within"):
            opened.verify()  # it was cut after it had been opened
        path.write_bytes(content)


def test_nothing_is_unpickled(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    pickled, meta = b"cos\nsystem\n(S'false'\ntR.", read_meta(copy)
    (copy / "tensors" / ".metadata").write_bytes(pickled)
    with pytest.raises(UserError, match=r"'tensors/\.metadata' is missing or does not have"):
        Checkpoint.open(copy)
    states.rewrite_meta(
        copy,
        files=meta.files | {"tensors/.metadata": len(pickled)},
        hashes=meta.hashes | {"tensors/.metadata": hashlib.sha256(pickled).hexdigest()},
    )
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, refuse)
    Checkpoint.open(copy).verify()
    assert states.differing(states.contents(copy), states.tensors(1)) == []
