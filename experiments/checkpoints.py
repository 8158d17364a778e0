"""Checkpoints with orbax: whole or not at all, and only into the run that they came from."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp

# What a resumed run may change: none of these alters the weights or the rows already written.
_FREE = ("data_dir", "checkpoint_every")


class Checkpoints:
  """Saves and restores the training state of one run, a tree of arrays.

  Leaves are stored under their paths, so that a checkpoint does not depend on the classes of the optimizer's state, and
  an error can name the leaf that differs.

  Args:
    workdir: checkpoints go to workdir/checkpoints; the last two are kept.
    config: stored beside the arrays; a checkpoint of another configuration is refused.
  """

  def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict):
    self._folder = workdir / "checkpoints"
    self._config = json.loads(config.to_json_best_effort())
    # Saving in the foreground: at this size it takes a tenth of a second, and the file is there when `save` returns.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def restore_or(self, step: int, state: Any) -> tuple[int, Any]:
    """The last checkpoint's (step, state), or the given one where there is no checkpoint.

    Args:
      step: where to start without a checkpoint.
      state: the state there; a checkpoint must have the same leaves.

    Raises:
      ValueError: if the checkpoint has another configuration or other leaves; the message names what differs.
    """
    last = self._manager.latest_step()
    if last is None:
      return step, state
    about = self._manager.restore(last, args=ocp.args.Composite(about=ocp.args.JsonRestore())).about
    leaves, treedef = _named_leaves(state)
    self._check("configuration", _flat(about["config"]), _flat(self._config))
    self._check("state", about["leaves"], _describe(leaves))
    restored = self._manager.restore(last, args=ocp.args.Composite(state=ocp.args.StandardRestore(leaves))).state
    return last, treedef.unflatten([restored[name] for name in leaves])

  def save(self, step: int, state: Any) -> None:
    """Writes a checkpoint; nothing of it is visible under its final name until all of it is there."""
    leaves, _ = _named_leaves(state)
    about = {"config": self._config, "leaves": _describe(leaves)}
    self._manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about))
    )

  def close(self) -> None:
    """Ends orbax's threads."""
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()

  def _check(self, what: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    missing = "(not there)"
    names = [n for n in [*saved, *(n for n in now if n not in saved)] if n not in _FREE]
    differ = [n for n in names if saved.get(n, missing) != now.get(n, missing)]
    if differ:
      lines = [f"  {n}: {saved.get(n, missing)} in the checkpoint, {now.get(n, missing)} now" for n in differ[:10]]
      more = [f"  ... and {len(differ) - 10} more"] if len(differ) > 10 else []
      raise ValueError(
        "\n".join([f"The checkpoint in {self._folder} has another {what}:", *lines, *more])
        + "\nChoose another --workdir, remove this one, or go back to its configuration."
      )


def _named_leaves(state: Any) -> tuple[dict[str, jax.Array], Any]:
  paths, treedef = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}, treedef


def _describe(leaves: Mapping[str, jax.Array]) -> dict[str, str]:
  return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"updater": {"sparsity": 0.9}} -> {"updater.sparsity": 0.9}"""
  out = {}
  for key, value in config.items():
    out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return out
