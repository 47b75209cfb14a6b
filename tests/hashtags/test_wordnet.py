from __future__ import annotations

import importlib.util
import io
import lzma
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections import defaultdict
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale_wsl.errors import UserError
from scale_wsl.hashtags import wordnet as module
from scale_wsl.hashtags.normalize import normalize
from scale_wsl.hashtags.wordnet import DETACHMENTS, Reading, WordNet, cache_folder

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "scale_wsl" / "hashtags" / "data"


@pytest.fixture(scope="module")
def lemmas(wordnet: WordNet) -> dict[str, list[int]]:
    """Lemma -> offsets as NLTK's own reader took them from index.noun."""
    return {lemma: by_pos["n"] for lemma, by_pos in wordnet.reader._lemma_pos_offset_map.items()}


def test_counts(wordnet: WordNet, lemmas: dict[str, list[int]]) -> None:
    assert len(wordnet.wnids) == 82_115
    assert len(lemmas) == len(set(wordnet.reader.all_lemma_names("n"))) == 117_798
    # Lower case, letters and digits:
    spellings: defaultdict[str, list[str]] = defaultdict(list)
    for lemma in lemmas:
        spellings["".join(filter(str.isalnum, lemma))].append(lemma)
    synsets = {tag: {offset for lemma in same for offset in lemmas[lemma]} for tag, same in spellings.items()}
    assert len(spellings) == 116_654
    assert sum(len(offsets) > 1 for offsets in synsets.values()) == 15_955
    assert sum(len(same) > 1 for same in spellings.values()) == 1_110
    # The normal form is the same, except that 52 numbers ("24/7", "1000") are no hashtags.
    numbers = {tag for tag in spellings if tag.isdigit()}
    assert len(numbers) == 52
    assert wordnet.hashtags == spellings.keys() - numbers
    assert len(wordnet.hashtags) == 116_602
    assert sum(len(wordnet.synsets(tag)) > 1 for tag in wordnet.hashtags) == 15_952
    assert sum(len(wordnet.spellings(tag)) > 1 for tag in wordnet.hashtags) == 1_108


def test_the_table_equals_nltks_for_every_lemma(wordnet: WordNet, lemmas: dict[str, list[int]]) -> None:
    expected: defaultdict[str, set[str]] = defaultdict(set)
    for lemma, offsets in lemmas.items():
        if (hashtag := normalize(lemma)) is not None:
            expected[hashtag].update(f"n{offset:08d}" for offset in offsets)
    assert {tag: set(wordnet.synsets(tag)) for tag in wordnet.hashtags} == expected


def test_synsets_equal_those_of_nltks_reader(wordnet: WordNet) -> None:
    for hashtag in random.Random(0).sample(sorted(wordnet.hashtags), 300):
        by_nltk = {s.offset() for lemma in wordnet.spellings(hashtag) for s in wordnet.reader.synsets(lemma, "n")}
        # NLTK adds the base forms of what is a lemma itself ("glasses" gives glass too).
        assert {int(wnid[1:]) for wnid in wordnet.synsets(hashtag)} <= by_nltk
        for wnid in wordnet.synsets(hashtag):
            assert hashtag in map(normalize, wordnet.lemmas(wnid))


def test_every_line_of_data_noun_is_at_its_offset_and_has_no_gloss(wordnet: WordNet) -> None:
    raw = (wordnet.corpus / "data.noun").read_bytes()
    found, position = set(), 0
    for line in raw.split(b"\n"):
        if line and not line.startswith(b" "):
            assert int(line[:8]) == position
            assert line.partition(b"|")[2].strip() == b""
            found.add(f"n{position:08d}")
        position += len(line) + 1
    assert found == wordnet.wnids
    assert b"Princeton University" in raw  # the notice stays on every copy


def test_what_is_in_a_synset_is_what_nltk_finds_there(wordnet: WordNet) -> None:
    for wnid in random.Random(5).sample(sorted(wordnet.wnids), 3000):
        synset = wordnet.reader.synset_from_pos_and_offset("n", int(wnid[1:]))
        assert wordnet.lemmas(wnid) == tuple(synset.lemma_names())
        above = {f"n{s.offset():08d}" for s in synset.hypernyms() + synset.instance_hypernyms()}
        assert wordnet.hypernyms(wnid) == tuple(sorted(above))


def test_brown_bear(wordnet: WordNet) -> None:
    assert wordnet.synsets("brownbear") == wordnet.synsets("ursusarctos") == {"n02132136"}
    assert wordnet.lemmas("n02132136") == ("brown_bear", "bruin", "Ursus_arctos")
    assert wordnet.hypernyms("n02132136") == ("n02131653",)
    assert wordnet.hypernyms("n02131653") == ("n02075296",)  # bear -> carnivore
    assert {"n02131653", "n01861778", "n00001740"} <= wordnet.ancestors("n02132136")  # bear, mammal, entity
    assert wordnet.ancestors("n00001740") == frozenset()
    paris = wordnet.synsets("capitaloffrance")
    assert len(paris) == 1
    assert wordnet.hypernyms(*paris) == ("n08691669",)  # an instance of a national capital


@pytest.mark.parametrize(
    ("hashtag", "how", "bases"),
    [
        ("glasses", "lemma", ("glasses",)),  # the spectacles, not several glasses
        ("goose", "lemma", ("goose",)),
        ("geese", "irregular form", ("goose",)),
        ("mice", "irregular form", ("mouse",)),
        ("menofwar", "irregular form", ("manofwar",)),  # noun.exc: men-of-war
        ("axes", "irregular form", ("ax", "axis")),
        ("canadageese", "irregular form", ("canadagoose",)),
        ("fieldmice", "irregular form", ("fieldmouse",)),
        ("women", "inflected form", ("woman",)),
        ("brownbears", "inflected form", ("brownbear",)),
        ("polarbears", "inflected form", ("polarbear",)),
        ("churches", "inflected form", ("church",)),
        ("butterflies", "inflected form", ("butterfly",)),
        ("boxesful", "inflected form", ("boxful",)),
        ("vases", "inflected form", ("vase", "vas")),
        ("cookies", "inflected form", ("cookie", "cooky")),
        ("gooses", "inflected form", ("goose",)),
        ("xyzzy", "unknown", ()),
        ("hiss", "lemma", ("hiss",)),
        ("chesss", "unknown", ()),  # nothing is detached from a form in -ss
        ("zs", "unknown", ()),  # nor from two letters
    ],
)
def test_morphology(wordnet: WordNet, hashtag: str, how: str, bases: tuple[str, ...]) -> None:
    reading = wordnet.read(hashtag)
    assert (reading.how, reading.bases) == (how, bases)
    assert reading.synsets == wordnet.synsets(hashtag) == {wnid for base in bases for wnid in wordnet.synsets(base)}


def test_a_compound_is_led_back_only_at_the_boundary_of_its_last_word(wordnet: WordNet) -> None:
    # "mongeese" ends in "geese", but "mongoose" is no compound of "goose".
    assert "mongoose" in wordnet.hashtags
    assert wordnet.read("mongeese").how == "unknown"


def test_the_detachment_rules_are_nltks(wordnet: WordNet) -> None:
    assert list(DETACHMENTS) == wordnet.reader.MORPHOLOGICAL_SUBSTITUTIONS["n"]


def test_one_word_forms_are_read_as_nltk_reads_them(wordnet: WordNet) -> None:
    words = sorted(tag for tag in wordnet.hashtags if wordnet.spellings(tag) == (tag,))
    for word in random.Random(1).sample(words, 3000):
        for form in (word + "s", word + "es", word[:-1] + "ies", word[:-3] + "men"):
            reading = wordnet.read(form)
            # Joined forms know more (compounds), but never less and, for one-word bases, never otherwise.
            by_nltk = wordnet.reader._morphy(form, "n")
            if reading.how == "inflected form" and all(wordnet.spellings(base) == (base,) for base in reading.bases):
                assert list(reading.bases) == by_nltk
            if by_nltk and len(form) > 2 and not form.endswith("ss"):
                assert set(by_nltk) <= {*reading.bases} or reading.how == "lemma"


@settings(deadline=None, max_examples=500)
@given(st.text(max_size=20))
def test_any_text_can_be_looked_up(wordnet: WordNet, text: str) -> None:
    assert wordnet.synsets(text) <= wordnet.wnids


def test_descendants_are_nltks_closure(wordnet: WordNet) -> None:
    animal = wordnet.resolve("animal.n.01")
    found = wordnet.descendants(animal)
    below = wordnet.reader.synset("animal.n.01").closure(lambda s: s.hyponyms() + s.instance_hyponyms())
    assert found == {animal} | {f"n{synset.offset():08d}" for synset in below}
    assert len(found) > 4000
    assert wordnet.descendants("n00001740") == wordnet.wnids  # everything is an entity
    assert wordnet.descendants("n02132136") >= {"n02132136"}
    capital = wordnet.descendants("n08691669")  # has instances only
    assert wordnet.synsets("capitaloffrance") < capital
    for wnid in random.Random(2).sample(sorted(wordnet.wnids), 200):
        assert (wnid in found) == (animal in wordnet.ancestors(wnid) | {wnid})
    with pytest.raises(UserError, match="no noun synset"):
        wordnet.descendants("n02132137")


def test_first_senses_are_nltks_of_the_first_spelling(wordnet: WordNet) -> None:
    for hashtag in random.Random(3).sample(sorted(wordnet.hashtags), 300):
        spelling = wordnet.spellings(hashtag)[0]
        assert int(wordnet.first_sense(hashtag)[1:]) == wordnet.reader._lemma_pos_offset_map[spelling]["n"][0]
        assert spelling == min(wordnet.spellings(hashtag))  # index.noun is in the order of its bytes
    assert wordnet.first_sense("brownbear") == "n02132136"
    with pytest.raises(KeyError):
        wordnet.first_sense("brownbears")


def test_names_of_synsets_are_nltks(wordnet: WordNet) -> None:
    for wnid in random.Random(4).sample(sorted(wordnet.wnids), 300):
        assert wordnet.resolve(wordnet.reader.synset_from_pos_and_offset("n", int(wnid[1:])).name()) == wnid
    assert wordnet.resolve("n02132136") == wordnet.resolve("Brown_Bear.n.01") == wordnet.resolve("brown bear.n.1")
    for name in (
        "animal",
        "animal.n.00",
        "animal.n.99",
        "animal.v.01",
        "n02132137",
        "",
        ".n.",
        "xyzzy.n.01",
        "animal.n.¹",
    ):
        with pytest.raises(UserError, match="no noun synset"):
            wordnet.resolve(name)
    with pytest.raises(UserError, match="crane has 5 noun senses"):
        wordnet.resolve("crane.n.06")


@pytest.mark.parametrize("wnid", ["n02132137", "02132136", "n2132136", "v02132136", ""])
def test_an_id_that_is_no_noun_synset_is_a_users_mistake(wordnet: WordNet, wnid: str) -> None:
    with pytest.raises(UserError, match="no noun synset"):
        wordnet.lemmas(wnid)


def test_only_the_one_warning_about_the_missing_omw_is_silenced(wordnet: WordNet, monkeypatch: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert WordNet(wordnet.corpus).reader
    assert not [w for w in caught if issubclass(w.category, UserWarning)]

    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    original = WordNetCorpusReader.__init__

    def noisy(self: Any, *args: Any) -> None:
        warnings.warn("something else", UserWarning, stacklevel=1)
        original(self, *args)

    monkeypatch.setattr(WordNetCorpusReader, "__init__", noisy)
    with pytest.warns(UserWarning, match="something else"):
        assert WordNet(wordnet.corpus).reader


# --- the cache -------------------------------------------------------------------------------------------------------


def _load_and_look(cache: Path) -> frozenset[str]:
    return WordNet.load(cache).synsets("brownbears")


def test_many_processes_may_unpack_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_load_and_look, [tmp_path] * 3, chunksize=1)
    assert found == [{"n02132136"}] * 3
    assert not list(tmp_path.rglob("*.part"))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_opens_a_reader_of_its_own(wordnet: WordNet) -> None:
    parents = wordnet.reader
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"own" if wordnet.reader is not parents and wordnet.reader.synset("dog.n.01") else b"shared")
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        assert answer.read() == b"own"
    assert wordnet.reader is parents


def _look(wordnet: WordNet) -> tuple[Path, Reading, tuple[str, ...]]:
    return wordnet.corpus, wordnet.read("geese"), wordnet.lemmas("n02132136")


def test_a_pickled_copy_reads_the_same_in_another_process(wordnet: WordNet) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_look, (wordnet,)) == _look(wordnet)
    assert pickle.loads(pickle.dumps(wordnet)) is WordNet.load(wordnet.corpus.parents[2])  # noqa: S301 (our own bytes)


def test_who_loads_the_same_cache_shares_the_table(tmp_path: Path) -> None:
    assert WordNet.load(tmp_path / "a") is WordNet.load(tmp_path / "a")
    assert WordNet.load(tmp_path / "a") is not WordNet.load(tmp_path / "b")


@pytest.mark.parametrize("name", ["data.noun", "index.noun", "noun.exc", "lexnames", "index.verb"])
def test_a_damaged_cache_is_noticed_and_mended(wordnet: WordNet, tmp_path: Path, name: str) -> None:
    key = wordnet.corpus.parents[1].name
    corpus = tmp_path / key / "corpora" / "wordnet"
    shutil.copytree(wordnet.corpus, corpus)
    whole = (corpus / name).read_bytes()
    (corpus / name).write_bytes(whole[:-1] + b"?" if whole else b"?")  # the same length where there is one
    untouched = corpus / ("lexnames" if name != "lexnames" else "noun.exc")
    before = untouched.stat().st_mtime_ns
    assert module._unpacked(tmp_path) == corpus
    assert (corpus / name).read_bytes() == whole
    (corpus / name).unlink()
    module._unpacked(tmp_path)
    assert (corpus / name).read_bytes() == whole
    assert untouched.stat().st_mtime_ns == before


def test_another_release_with_other_files_has_another_folder(
    wordnet: WordNet, tmp_path: Path, monkeypatch: Any
) -> None:
    _ship(tmp_path / "package", monkeypatch)
    sums = tmp_path / "package" / "data" / "SHA256SUMS"
    sums.write_text("\n".join(reversed(sums.read_text().splitlines())) + "\n")
    corpus = module._unpacked(tmp_path / "cache")
    assert corpus.parents[1].name != wordnet.corpus.parents[1].name
    assert (corpus / "data.noun").read_bytes() == (wordnet.corpus / "data.noun").read_bytes()


@pytest.mark.parametrize("content", [b"not xz", lzma.compress(b"other"), None])
def test_a_damaged_installation_is_said_so(tmp_path: Path, monkeypatch: Any, content: bytes | None) -> None:
    _ship(tmp_path / "package", monkeypatch)
    damaged = tmp_path / "package" / "data" / "noun.exc.xz"
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"noun\.exc\.xz is damaged; install scale-wsl again"):
        WordNet.load(tmp_path / "cache")


def _ship(package: Path, monkeypatch: Any) -> None:
    """Let the package ship from a copy of its data folder."""
    shutil.copytree(DATA, package / "data")
    monkeypatch.setattr(resources, "files", lambda _: package)


def test_a_cache_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set SCALE_WSL_CACHE"):
        WordNet.load(tmp_path / "file" / "cache")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
@pytest.mark.parametrize("umask", ["002", "000"])
def test_a_group_writable_umask_gives_a_cache_that_nltk_accepts(tmp_path: Path, umask: str) -> None:
    cache = tmp_path / "new" / "cache"
    assert _lemma_in_a_process_of_its_own(cache, umask=umask) == "brown_bear"
    made = [cache, *cache.rglob("*")]
    assert len(made) > 10
    assert not [path for path in made if path.stat().st_mode & 0o022]


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_cache_that_others_may_write_is_refused(tmp_path: Path) -> None:
    opened = WordNet.load(tmp_path)
    (opened.corpus / "data.noun").chmod(0o666)
    with pytest.raises(UserError, match="NLTK will not read"):
        module._open_reader(opened.corpus)


def test_another_wordnet_among_nltks_data_is_not_looked_at(tmp_path: Path) -> None:
    foreign = tmp_path / "nltk_data" / "corpora" / "wordnet"
    foreign.mkdir(parents=True)
    (foreign / "index.sense").write_text("no sense key\n")
    assert _lemma_in_a_process_of_its_own(tmp_path / "cache", NLTK_DATA=str(tmp_path / "nltk_data")) == "brown_bear"


LOOK = """
import os, sys
from pathlib import Path
from scale_wsl.hashtags.wordnet import WordNet

os.umask(int(sys.argv[2], 8))
print(WordNet.load(Path(sys.argv[1])).reader.synset_from_pos_and_offset("n", 2132136).lemma_names()[0])
"""


def _lemma_in_a_process_of_its_own(cache: Path, umask: str = "022", **environment: str) -> str:
    """What a process finds in which NLTK has not opened any corpus yet: it does so once, and remembers it."""
    inherited = {key: value for key, value in os.environ.items() if key != "NLTK_DATA"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, str(cache), umask],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("SCALE_WSL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "scale_wsl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "scale_wsl"
    monkeypatch.setenv("SCALE_WSL_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


# --- where the shipped files come from -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wordnet_data", ROOT / "tools" / "build_wordnet_data.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_shipped_files_are_those_rebuilt_from_wordnet_base(builder: ModuleType) -> None:
    source = Path(os.environ.get("WORDNET_BASE", "/usr/share/wordnet"))
    if not source.exists():
        pytest.skip("needs Debian's package wordnet-base, or $WORDNET_BASE naming its .deb or unpacked folder")
    rebuilt = builder.build(builder.read_source(source))
    assert {path.name for path in DATA.iterdir()} == {
        *(f"{name}.xz" for name in rebuilt),
        "SHA256SUMS",
        "LICENSE.wordnet",
        "imagenet1k.txt",  # not WordNet's
    }
    for name, content in rebuilt.items():  # uncompressed: another liblzma may pack otherwise
        assert lzma.decompress((DATA / f"{name}.xz").read_bytes()) == content, name
    assert (DATA / "SHA256SUMS").read_text() == builder.sums(rebuilt)
    assert (DATA / "LICENSE.wordnet").read_text() == builder.licence(rebuilt["data.noun"])


def test_a_debian_package_is_read_without_dpkg(builder: ModuleType, tmp_path: Path) -> None:
    files = {"data.noun": b"noun", "index.noun": b"index", "noun.exc": b"exc"}
    deb = tmp_path / "wordnet-base.deb"
    deb.write_bytes(_deb(files))
    assert builder.read_source(deb) == files
    with pytest.raises(UserError, match=r"not that of Debian's WordNet 3\.0"):
        builder.build(files)
    deb.write_bytes(_deb({"data.noun": b"noun"}))
    with pytest.raises(UserError, match="does not hold"):
        builder.read_source(deb)
    deb.write_bytes(b"no package")
    with pytest.raises(UserError, match="neither a folder nor a Debian package"):
        builder.read_source(deb)
    with pytest.raises(UserError, match="lacks data"):
        builder.read_source(tmp_path)


def _deb(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./usr/share/wordnet/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": packed.getvalue()}
    archive = b"!<arch>\n"
    for name, content in members.items():
        archive += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    return archive
