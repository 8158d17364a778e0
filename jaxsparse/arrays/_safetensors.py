"""Trees with sparse nodes in one safetensors file.

A dense leaf is one tensor. An `NMArray` called `mlp/up` is `mlp/up.values`, `mlp/up.indices` (positions of ceil(log2 m)
bits each, in row-major order, lowest bits first, as a run of bytes) and `mlp/up.scales` where it is quantised. A
`BlockArray` is `.blocks`, `.rows` and `.cols`, a `FixedFanInArray` `.values` and `.indices`. The header's `jaxsparse` entry holds, as JSON, the path of every leaf in
the tree and what an array node needs besides.
"""

import contextlib
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import _tree
from jaxsparse.arrays import _block_array
from jaxsparse.arrays import _fixed_fan_in_array
from jaxsparse.arrays import _nm_array

_VERSION = 1
_BLOCK_PARTS = ("blocks", "rows", "cols")
_NODES = (_nm_array.NMArray, _block_array.BlockArray, _fixed_fan_in_array.FixedFanInArray)
_CHUNK = 1 << 24  # positions unpacked to bits at a time: 16 MiB of positions take 128 MiB


def save_safetensors(path: str | os.PathLike, tree: Any) -> None:
  """Writes a tree of arrays, `NMArray`, `BlockArray` and `FixedFanInArray` nodes to a safetensors file.

  The file appears in one piece: it is written beside its place and renamed, so a broken run leaves no half file.

  Args:
    path: of the file; what is there is replaced.
    tree: parameters in any containers. Packed layouts (`js.ops.pack`) are made for a device: save the `NMArray`.

  Raises:
    ImportError: without the safetensors package.
    TypeError: for a leaf that is no array of numbers, or a packed layout.
    ValueError: two leaves of one name.
  """
  save_file = _library("numpy").save_file
  tensors, leaves = {}, {}
  for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)[0]:
    name = _tree.leaf_name(key_path)
    entry = {"path": [_encode_key(k) for k in key_path]}
    if name in leaves:
      raise ValueError(f"Two leaves are called {name!r}; rename a key that holds a '/'.")
    if isinstance(leaf, _nm_array.NMArray):
      parts, entry["nm"] = _encode_nm(leaf)
      tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    elif isinstance(leaf, _block_array.BlockArray):
      entry["blocks"] = {"shape": list(leaf.shape), "static": leaf.static}
      tensors |= {f"{name}.{part}": np.ascontiguousarray(getattr(leaf, part)) for part in _BLOCK_PARTS}
    elif isinstance(leaf, _fixed_fan_in_array.FixedFanInArray):
      entry["fan_in"] = {"inputs": leaf.inputs}
      tensors |= {f"{name}.{part}": np.ascontiguousarray(getattr(leaf, part)) for part in ("values", "indices")}
    elif hasattr(leaf, "unpack"):
      raise TypeError(
        f"tree{jax.tree_util.keystr(key_path)} is a {type(leaf).__name__}, packed for a device; save its unpack()."
      )
    else:
      tensors[name] = _to_numpy(leaf, "tree" + jax.tree_util.keystr(key_path))
    leaves[name] = entry
  if len(tensors) < len(leaves):
    raise ValueError("A dense leaf has the name of a part of an NMArray, such as 'w.values' beside 'w': rename it.")
  header = {"jaxsparse": json.dumps({"version": _VERSION, "leaves": leaves})}
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    save_file(tensors, partial, metadata=header)
    partial.replace(path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      partial.unlink()


def load_safetensors(path: str | os.PathLike, like: Any = None) -> Any:
  """Reads a tree that `save_safetensors` wrote.

  Args:
    path: of the file.
    like: a tree of arrays or `jax.ShapeDtypeStruct` (and `NMArray`s of them) with the containers that are wanted; needed
      for anything but nested dictionaries and lists.

  Returns:
    The tree, bit for bit; every `NMArray` has been checked. Without `like`: dictionaries and lists.

  Raises:
    ImportError: without the safetensors package.
    FileNotFoundError: there is no such file.
    ValueError: the file is damaged, was not written by `save_safetensors`, breaks a rule of `NMArray`, or does not hold
      the leaves of `like`.
  """
  library = _library()
  try:
    with library.safe_open(os.fspath(path), framework="flax") as file:
      header = (file.metadata() or {}).get("jaxsparse")
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except library.SafetensorError as error:
    raise ValueError(f"{path} is no complete safetensors file: {error}") from error
  if header is None:
    raise ValueError(f"{path} was not written by save_safetensors: its header has no 'jaxsparse' entry.")
  header = json.loads(header)
  if header["version"] > _VERSION:
    raise ValueError(f"{path} has format {header['version']}; this jaxsparse reads up to {_VERSION}. Update it.")
  leaves = {name: _decode(name, entry, tensors, path) for name, entry in header["leaves"].items()}
  if like is not None:
    return _fill(like, leaves, path)
  return _build([(entry["path"], leaves[name]) for name, entry in header["leaves"].items()])


def _library(module: str | None = None) -> Any:
  try:
    import safetensors
    import safetensors.flax
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "save_safetensors and load_safetensors need the safetensors package: pip install 'jaxsparse[safetensors]'"
    ) from error
  return safetensors if module is None else getattr(safetensors, module)


def _is_node(x: Any) -> bool:
  return isinstance(x, _NODES) or hasattr(x, "unpack")


def _encode_key(key: Any) -> list[Any]:
  """["k", dictionary key], ["i", position] or ["a", attribute]."""
  if isinstance(key, jax.tree_util.SequenceKey):
    return ["i", key.idx]
  if isinstance(key, jax.tree_util.GetAttrKey):
    return ["a", key.name]
  return ["k", key.key if isinstance(key.key, (str, int)) else str(key.key)]


def _to_numpy(leaf: Any, label: str) -> np.ndarray:
  try:
    array = np.asarray(leaf)
  except TypeError as error:
    raise TypeError(f"{label} cannot be saved: {error}") from error
  if array.dtype == object or array.dtype.kind in "US":
    raise TypeError(f"{label} is a {type(leaf).__name__}; only arrays of numbers can be saved.")
  return np.ascontiguousarray(array).reshape(array.shape)


def _encode_nm(w: _nm_array.NMArray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  values = np.asarray(w.values)
  entry = {"n": w.n, "m": w.m, "shape": list(values.shape), "dtype": values.dtype.name}
  if values.dtype.name == "int4":  # Two to a byte, as unsigned halves.
    values = _pack_bits(values.astype(np.int8).view(np.uint8) & 15, 4)
  parts = {"values": np.ascontiguousarray(values), "indices": _pack_bits(np.asarray(w.indices), (w.m - 1).bit_length())}
  if w.scales is not None:
    parts["scales"] = np.ascontiguousarray(np.asarray(w.scales))
  return parts, entry


def _decode(name: str, entry: dict[str, Any], tensors: dict[str, Any], path: Any) -> Any:
  parts = _BLOCK_PARTS if "blocks" in entry else ("values", "indices") if {"nm", "fan_in"} & set(entry) else ()
  wanted = [f"{name}.{part}" for part in parts] or [name]
  for key in wanted:
    if key not in tensors:
      raise ValueError(f"{path} names {name!r}, but has no tensor {key!r}.")
  if not parts:
    return tensors[name]
  if "blocks" in entry:
    blocks = entry["blocks"]
    try:
      arrays = (jnp.asarray(tensors[f"{name}.{part}"]) for part in parts)
      return _block_array.BlockArray(*arrays, shape=tuple(blocks["shape"]), static=blocks["static"])
    except (ValueError, TypeError) as error:
      raise ValueError(f"{path}: {name!r} is damaged. {error}") from error
  if "fan_in" in entry:
    try:
      arrays = (jnp.asarray(tensors[f"{name}.{part}"]) for part in parts)
      return _fixed_fan_in_array.FixedFanInArray(*arrays, inputs=entry["fan_in"]["inputs"])
    except (ValueError, TypeError) as error:
      raise ValueError(f"{path}: {name!r} is damaged. {error}") from error
  nm = entry["nm"]
  shape, m = tuple(nm["shape"]), nm["m"]
  count = math.prod(shape)
  values, packed = tensors[f"{name}.values"], np.asarray(tensors[f"{name}.indices"])
  bits = (m - 1).bit_length()
  if packed.size != -(-count * bits // 8):
    raise ValueError(f"{path}: {name}.indices has {packed.size} bytes; {count} positions of {bits} bits do not fit.")
  if nm["dtype"] == "int4":
    halves = _unpack_bits(np.asarray(values), 4, count).astype(np.int8)
    values = jnp.asarray(np.where(halves > 7, halves - 16, halves).astype(np.int8).reshape(shape)).astype(jnp.int4)
  indices = jnp.asarray(_unpack_bits(packed, bits, count).reshape(shape))
  try:
    return _nm_array.NMArray(values, indices, tensors.get(f"{name}.scales"), n=nm["n"], m=m)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path}: {name!r} is damaged. {error}") from error


def _pack_bits(x: np.ndarray, bits: int) -> np.ndarray:
  """The low `bits` bits of every uint8, one after the other, lowest first: uint8 `[ceil(size * bits / 8)]`."""
  flat = x.reshape(-1)
  # A multiple of eight entries fills whole bytes, so chunks can be joined.
  pieces = [
    np.packbits(
      np.unpackbits(flat[at : at + _CHUNK, None], axis=1, bitorder="little")[:, :bits].reshape(-1), bitorder="little"
    )
    for at in range(0, flat.size, _CHUNK)
  ]
  return np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)


def _unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
  """The inverse of `_pack_bits`: uint8 `[count]`."""
  out = np.empty(count, np.uint8)
  for at in range(0, count, _CHUNK):
    part = min(_CHUNK, count - at)
    first = at * bits // 8
    flat = np.unpackbits(packed[first : first + -(-part * bits // 8)], bitorder="little")[: part * bits]
    out[at : at + part] = np.packbits(flat.reshape(part, bits), axis=1, bitorder="little")[:, 0]
  return out


def _build(items: list[tuple[list[list[Any]], Any]]) -> Any:
  """Nested dictionaries and lists from (path, leaf) pairs."""
  if len(items) == 1 and not items[0][0]:
    return items[0][1]
  branches: dict[Any, list[Any]] = {}
  for (head, *rest), leaf in items:
    # The box that flax puts around an array is not part of the tree.
    if head[0] == "a" and head[1] in ("value", "raw_value") and not rest:
      return leaf
    branches.setdefault(tuple(head), []).append((rest, leaf))
  built = {head: _build(below) for head, below in branches.items()}
  if all(kind == "i" for kind, _ in built) and sorted(i for _, i in built) == list(range(len(built))):
    return [built["i", i] for i in range(len(built))]
  return {key: value for (_, key), value in built.items()}


def _fill(like: Any, leaves: dict[str, Any], path: Any) -> Any:
  """The loaded leaves in the containers of `like`."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_node)
  names = [_tree.leaf_name(p) for p, _ in paths]
  if set(names) != set(leaves):
    missing, extra = sorted(set(names) - set(leaves))[:5], sorted(set(leaves) - set(names))[:5]
    raise ValueError(f"{path} holds another tree: it lacks {missing} and has {extra} besides.")
  for name, (_, want) in zip(names, paths):
    have = leaves[name]
    same = all(isinstance(have, t) == isinstance(want, t) for t in _NODES)
    if not same or getattr(have, "pattern", None) != getattr(want, "pattern", None):
      raise ValueError(f"{path}: {name!r} is {_kind(have)}, wanted is {_kind(want)}.")
    if tuple(have.shape) != tuple(want.shape) or have.dtype != want.dtype:
      raise ValueError(f"{path}: {name!r} is {_kind(have)}, wanted is {_kind(want)}.")
  return treedef.unflatten([leaves[name] for name in names])


def _kind(leaf: Any) -> str:
  return repr(leaf) if _is_node(leaf) else f"a dense {leaf.dtype} of shape {tuple(leaf.shape)}"
