"""Rebuilds the WordNet 3.0 files in scale_wsl/hashtags/data from Debian's package `wordnet-base`.

    apt-get download wordnet-base
    python tools/build_wordnet_data.py wordnet-base_*.deb

Also takes the unpacked folder (`/usr/share/wordnet` where the package is installed). Must never change a byte offset:
ImageNet's ids are offsets into `data.noun`, so glosses are blanked in place, not cut out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import re
import sys
import tarfile
from pathlib import Path

from scale_wsl.errors import UserError
from scale_wsl.files import published_file

__all__ = ["build", "licence", "read_source", "sums"]

DATA = Path(__file__).resolve().parents[1] / "scale_wsl" / "hashtags" / "data"
SOURCES = ("data.noun", "index.noun", "noun.exc")
# SHA-256 of Debian's data.noun: WordNet 3.0, and no other version (3.1 has other offsets).
DATA_NOUN = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
# The lexicographer files in WordNet's numbering, from lexnames(5WN), which the package has only as a man page.
LEXNAMES = """
    adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
    noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
    noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation
    noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication
    verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception
    verb.possession verb.social verb.stative verb.weather adj.ppl
"""
PARTS_OF_SPEECH = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


def read_source(source: Path) -> dict[str, bytes]:
    """The three noun files as they are in a `wordnet-base` .deb or in a folder."""
    if source.is_dir():
        missing = [name for name in SOURCES if not (source / name).is_file()]
        if missing:
            raise UserError(f"{source} lacks {', '.join(missing)}; give the folder of WordNet's dictionary files")
        return {name: (source / name).read_bytes() for name in SOURCES}
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(_data_member(source))) as tar:
        for member in tar:
            name = member.name.rpartition("usr/share/wordnet/")[2]
            content = tar.extractfile(member) if name in SOURCES else None
            if content is not None:
                found[name] = content.read()
    if len(found) != len(SOURCES):
        raise UserError(f"{source} does not hold {', '.join(SOURCES)}; give Debian's package wordnet-base")
    return found


def _data_member(deb: Path) -> bytes:
    """The member `data.tar.*` of a Debian package, which is an `ar` archive: 60-byte headers, even offsets."""
    raw = deb.read_bytes()
    if not raw.startswith(b"!<arch>\n"):
        raise UserError(f"{deb} is neither a folder nor a Debian package; give wordnet-base_*.deb")
    position = 8
    while position + 60 <= len(raw):
        name = raw[position : position + 16].decode("ascii", "replace").strip().rstrip("/")
        size = int(raw[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar"):
            return raw[position : position + size]
        position += size + size % 2
    raise UserError(f"{deb} has no data.tar member; download wordnet-base again")


def build(source: dict[str, bytes]) -> dict[str, bytes]:
    """The files that unpack from the package (by name, as bytes), from the three noun files of WordNet 3.0."""
    if hashlib.sha256(source["data.noun"]).hexdigest() != DATA_NOUN:
        raise UserError("data.noun is not that of Debian's WordNet 3.0; no other version has ImageNet's ids")
    # Synset lines only: the header keeps the licence notice, which is to appear on all copies.
    blanked = re.sub(rb"(?m)^(?! )([^|\n]*\|)([^\n]*)", lambda line: line[1] + b" " * len(line[2]), source["data.noun"])
    assert len(blanked) == len(source["data.noun"])
    names = (f"{i:02d}\t{name}\t{PARTS_OF_SPEECH[name.partition('.')[0]]}\n" for i, name in enumerate(LEXNAMES.split()))
    return source | {"data.noun": blanked, "lexnames": "".join(names).encode()}


def sums(files: dict[str, bytes]) -> str:
    """What SHA256SUMS says: the hash of each file before compressing, by which the unpacked cache is checked."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(files.items()))


def licence(data_noun: bytes) -> str:
    """WordNet's licence, as the 29 numbered lines at the head of `data.noun` give it."""
    header = data_noun.decode("ascii").splitlines()[:29]
    text = "\n".join(re.sub(r"^ +\d+ ", "", line).rstrip() for line in header)
    return (
        "The files beside this one are the nouns of WordNet 3.0 (data.noun without its glosses), compressed by xz.\n"
        f"WordNet's own notice follows.\n\n{text}\n"
    )


def main() -> None:
    """Build and write; exit code 2 and one sentence on a mistake."""
    parser = argparse.ArgumentParser(description="Rebuild the WordNet files that the package ships.")
    parser.add_argument("source", type=Path, help="wordnet-base_*.deb, or the folder with WordNet's dictionary files")
    parser.add_argument("--out", type=Path, default=DATA, help="where to write (default: the package's data folder)")
    args = parser.parse_args()
    try:
        files = build(read_source(args.source))
    except (UserError, OSError, tarfile.TarError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    outputs = {f"{name}.xz": lzma.compress(content, preset=9 | lzma.PRESET_EXTREME) for name, content in files.items()}
    outputs |= {"SHA256SUMS": sums(files).encode(), "LICENSE.wordnet": licence(files["data.noun"]).encode()}
    for name, content in outputs.items():
        with published_file(args.out / name) as path:
            path.write_bytes(content)
        print(f"{len(content):9,d} bytes  {args.out / name}")


if __name__ == "__main__":
    main()
