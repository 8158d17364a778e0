"""Metrics of a run: metrics.csv, metrics.jsonl and TensorBoard events, consistent with a checkpoint after a kill."""

from collections.abc import Sequence
import csv
import io
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tensorboardX

import jaxsparse as js


class MetricsWriter:
  """Appends one row a call to metrics.csv and metrics.jsonl, and scalars to TensorBoard.

  Rows hold nothing but functions of the step (no clock), so a run that was killed and resumed leaves the same bytes as
  one that was not.

  Args:
    workdir: where the files go; TensorBoard events go to workdir/tensorboard.
    columns: names of the metrics; a row may leave some out.
    step: the step that training resumes from. Rows after it are removed: they will be written again.
  """

  def __init__(self, workdir: pathlib.Path, columns: Sequence[str], step: int = 0):
    self._columns = ["step", *columns]
    self._csv_path, self._jsonl_path = workdir / "metrics.csv", workdir / "metrics.jsonl"
    # A kill may have come between two files or in the middle of a line: the JSON lines decide, the table follows.
    self._rows = [row for row in read_rows(self._jsonl_path) if row["step"] <= step]
    _replace(self._jsonl_path, "".join(_json_line(row) for row in self._rows))
    _replace(self._csv_path, _csv_line(self._columns) + "".join(self._csv_row(row) for row in self._rows))
    self._csv, self._jsonl = self._csv_path.open("a"), self._jsonl_path.open("a")
    # TensorBoard's writer has a thread with a queue, which a kill empties: its file is made again from the rows.
    for old in (workdir / "tensorboard").glob("events.out.tfevents.*"):
      old.unlink()
    self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), flush_secs=10)
    for row in self._rows:
      self._add_events(row)

  @property
  def rows(self) -> list[dict[str, float]]:
    """All rows so far, those of earlier sessions included."""
    return self._rows

  def write(self, step: int, **values: float) -> None:
    """Writes and flushes a row."""
    unknown = values.keys() - set(self._columns)
    if unknown:
      raise ValueError(f"Metrics {sorted(unknown)} are not among the columns {self._columns}.")
    row = {"step": step} | {name: float(value) for name, value in values.items()}
    self._rows.append(row)
    for file, line in ((self._jsonl, _json_line(row)), (self._csv, self._csv_row(row))):
      file.write(line)
      file.flush()
    self._add_events(row)

  def close(self) -> None:
    """Closes the files."""
    self._csv.close()
    self._jsonl.close()
    self._tensorboard.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _add_events(self, row) -> None:
    for name, value in row.items():
      if name != "step":
        self._tensorboard.add_scalar(name, value, row["step"])

  def _csv_row(self, row) -> str:
    return _csv_line([repr(row[name]) if name in row else "" for name in self._columns])


def weight_sparsity(params: Any, masks: Any) -> dict[str, jax.Array]:
  """Sparsity by masks of every weight (two dimensions or more) and of all together; works under jit.

  `js.summarize_sparsity(masks)` leaves out what has no mask. Here a weight that the distribution keeps dense counts as
  kept, so that the total is the sparsity that the updater was asked for.
  """
  is_node = lambda x: isinstance(x, optax.MaskedNode)

  def fill(mask, param):
    return jnp.ones(param.shape, bool) if is_node(mask) and param.ndim >= 2 else mask

  return js.summarize_sparsity(jax.tree.map(fill, masks, params, is_leaf=is_node))


def read_rows(path: pathlib.Path) -> list[dict[str, float]]:
  """Rows of a metrics.jsonl; a last line that was cut off is left out."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _json_line(row) -> str:
  return json.dumps(row) + "\n"


def _csv_line(cells) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerow(cells)
  return text.getvalue()


def _replace(path: pathlib.Path, text: str) -> None:
  """Writes a file at once: a kill leaves the old one or the new one."""
  temporary = path.with_suffix(path.suffix + ".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)
