"""Packing a weight in the decode kernel's order, and back; `_decode_layout` says what lies where."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxsparse.ops.nm_matmul import _decode_layout

_SCALE_DTYPES = ("bfloat16", "float16", "float32")


def pack_decode(values, indices, n, m, scales=None, *, shape=None) -> _decode_layout.DecodeLayout:
  """Packs an N:M weight for the decode kernel.

  Args:
   values: [K / m, n, O], bfloat16, float16, int8 or int4.
   indices: uint8 [K / m, n, O], strictly increasing along axis 1, below m.
   n: kept entries per group.
   m: group size, 4, 8 or 16.
   scales: None, or [K / group, O] bfloat16, float16 or float32; group is 32 (m = 4 only),
    64 or a multiple of 128.
   shape: (K, O) if K is not a multiple of m (the last group is then padded).

  Returns:
   A DecodeLayout; `unpack_decode` gives the same arrays back.

  Raises:
   ValueError: a pattern, shape or scale group that the layout does not take.
   TypeError: a dtype that it does not take.
  """
  reason = _decode_layout.check_pattern(n, m)
  if reason:
    raise ValueError(reason)
  dtype = jnp.dtype(values.dtype).name
  if dtype not in _decode_layout.VALUE_DTYPES:
    raise TypeError(
      f"values are {dtype}; the decode layout takes {', '.join(_decode_layout.VALUE_DTYPES)}: convert them with "
      "w.astype(jnp.bfloat16), or quantize them"
    )
  groups, kept, outputs = values.shape
  if kept != n or indices.shape != values.shape:
    raise ValueError(f"values {values.shape} and indices {indices.shape} must both be [K / {m}, {n}, O]")
  shape = tuple(shape or (groups * m, outputs))
  if shape != (shape[0], outputs) or not groups * m - m < shape[0] <= groups * m:
    raise ValueError(f"shape {shape} does not fit values {values.shape} with m = {m}")
  group, scale_dtype = 0, ""
  if scales is not None:
    scale_dtype = jnp.dtype(scales.dtype).name
    group = _scale_group(shape, scales.shape)
    if scale_dtype not in _SCALE_DTYPES:
      raise TypeError(f"scales are {scale_dtype}; the decode layout takes {', '.join(_SCALE_DTYPES)}")
    if group == 32 and m > 4:
      raise ValueError(f"scales of groups of 32 need m = 4, got {n}:{m}; use groups of 64 or a multiple of 128")
  data = _pack(values, indices, scales, n, m, group, scale_dtype)
  return _decode_layout.DecodeLayout(data, n, m, shape, dtype, group, scale_dtype)


def _scale_group(shape, scale_shape):
  k, outputs = shape
  if len(scale_shape) != 2 or scale_shape[1] != outputs or not scale_shape[0]:
    raise ValueError(f"scales have shape {scale_shape}; a weight {shape} needs [K / group, {outputs}]")
  rows = scale_shape[0]
  for group in (32, 64, *range(128, 128 * (k // 128 + 2), 128)):
    if -(-k // group) == rows:
      return group
  raise ValueError(f"{rows} scale rows for K = {k}: the group must be 32, 64 or a multiple of 128")


@functools.partial(jax.jit, static_argnames=("n", "m", "group", "scale_dtype"))
def _pack(values, indices, scales, n, m, group, scale_dtype):
  bits = _decode_layout.VALUE_DTYPES[jnp.dtype(values.dtype).name]
  chunk = _decode_layout.chunk_of(n, m, bits, group, scale_dtype)
  step = _decode_layout.STEP * chunk.parts
  k_pad = -values.shape[0] % (step // m)
  o_pad = -values.shape[2] % _decode_layout.ROWS
  if bits == 16:
    raw = jax.lax.bitcast_convert_type(values, jnp.uint16)
  else:
    raw = values.astype(jnp.int32).astype(jnp.uint16)
  # Padding has increasing indices too, so that the padded weight is itself a valid one.
  fill = jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint8)[None, :, None], (k_pad, n, values.shape[2]))
  index = jnp.concatenate([indices.astype(jnp.uint8), fill])
  index = jnp.concatenate(
    [index, jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint8)[None, :, None], (index.shape[0], n, o_pad))], axis=2
  )
  raw = jnp.pad(raw, ((0, k_pad), (0, 0), (0, o_pad)))
  parts = []
  for layer in chunk.layers:
    take = slice(layer.first, layer.first + (2 if layer.pairs else 1))
    pack = _pack_pairs if layer.pairs else functools.partial(_pack_singles, m=m)
    parts.append(pack(_by_chunk(raw[:, take], m), _by_chunk(index[:, take], m), bits=bits))
  data = jnp.concatenate(parts, axis=-1)  # uint32 [U, C64, words]
  if chunk.parts == 2:
    data = data.reshape(data.shape[0], -1, 2 * data.shape[2])
    data = jnp.concatenate([data, _pack_scales(scales, data.shape[1], chunk, group, o_pad)], axis=-1)
  return jax.lax.bitcast_convert_type(data, jnp.int32)


def _by_chunk(x, m):
  """[K / m, entries, O] -> [units, chunks, entries, blocks, mt, e, g]."""
  blocks = _decode_layout.STEP // m
  groups, entries, outputs = x.shape
  x = x.reshape(groups // blocks, blocks, entries, outputs // _decode_layout.ROWS, 4, 2, 8)
  return x.transpose(3, 0, 2, 1, 4, 5, 6)


def _block_axes(m):
  """Names of the axes into which the blocks of 64 of K unfold, and their sizes."""
  return {4: (("s", 2), ("h", 2), ("c", 4)), 8: (("c", 4), ("s", 2)), 16: (("c", 4),)}[m]


def _arrange(x, m, order):
  """Transposes [U, C, blocks, mt, e, g] with the blocks unfolded, to axes `u k` + order."""
  axes = _block_axes(m)
  x = x.reshape(*x.shape[:2], *[size for _, size in axes], 4, 2, 8)
  names = ["u", "k"] + [name for name, _ in axes] + ["t", "e", "g"]
  return x.transpose([names.index(a) for a in "uk" + order])


def _restore(x, m, order):
  """Inverse of `_arrange`."""
  axes = _block_axes(m)
  names = ["u", "k"] + [name for name, _ in axes] + ["t", "e", "g"]
  sizes = dict(axes, t=4, e=2, g=8)
  x = x.reshape(*x.shape[:2], *[sizes[a] for a in order])
  source = ["u", "k", *order]
  x = x.transpose([source.index(a) for a in names])
  return x.reshape(*x.shape[:2], -1, 4, 2, 8)


def _combine(fields, positions):
  """Ors uint32 fields along the last axis into words; positions are their lowest bits (fields must not overlap)."""
  shifted = fields.astype(jnp.uint32) << jnp.asarray(positions, jnp.uint32)
  return jnp.sum(shifted, axis=-1, dtype=jnp.uint32)


def _pieces(words):
  """[..., lane, words] -> flat, in pieces of at most four words per lane."""
  *lead, lanes, count = words.shape
  piece = min(4, count)
  words = words.reshape(*lead, lanes, count // piece, piece)
  return jnp.moveaxis(words, -2, -3).reshape(*lead, -1)


def _unpieces(flat, count):
  *lead, _ = flat.shape
  piece = min(4, count)
  words = flat.reshape(*lead, count // piece, 32, piece)
  return jnp.moveaxis(words, -3, -2).reshape(*lead, 32, count)


def _value_words(halves, bits):
  """uint16 [..., lane, 2 * w] (low and high entry of w register words) -> uint32 [..., lane, w * bits / 16]."""
  *lead, count = halves.shape
  if bits == 16:
    return _combine(halves.reshape(*lead, count // 2, 2), (0, 16))
  if bits == 8:
    return _combine(halves.reshape(*lead, count // 4, 4) & 0xFF, (0, 8, 16, 24))
  # Nibble j and j + 4 are the entries of register word j, stored as q + 8.
  halves = (halves + 8) & 0xF
  return _combine(halves.reshape(*lead, count // 8, 8), (0, 16, 4, 20, 8, 24, 12, 28))


def _value_halves(words, bits):
  """Inverse of `_value_words`: sign-extended integers for 8 and 4 bits."""
  positions = {16: (0, 16), 8: (0, 8, 16, 24), 4: (0, 16, 4, 20, 8, 24, 12, 28)}[bits]
  fields = (words[..., None] >> jnp.asarray(positions, jnp.uint32)) & jnp.uint32(2**bits - 1)
  fields = fields.reshape(*words.shape[:-1], -1)
  if bits == 16:
    return fields.astype(jnp.uint16)
  if bits == 8:
    return fields.astype(jnp.uint8).astype(jnp.int8)
  return fields.astype(jnp.int8) - 8


def _pack_pairs(raw, index, bits):
  """Layer of pairs with m = 4 -> uint32 [U, C, words]."""
  low, high = (_arrange(raw[:, :, j], 4, "gctshe") for j in (0, 1))
  units, chunks = low.shape[:2]
  halves = jnp.stack([low, high], axis=-1).reshape(units, chunks, 32, 64)
  values = _pieces(_value_words(halves, bits))
  # Lane 2 s + h of a quad carries the nibbles of all four lanes' groups in (s, h).
  nibble = index[:, :, 0] | index[:, :, 1] << 2
  nibble = _arrange(nibble, 4, "gshtec").reshape(units, chunks, 32, 4, 8)
  meta = _pieces(_combine(nibble, range(0, 32, 4)))
  return jnp.concatenate([values, meta], axis=-1)


# Fields (t, e, c) of the two words of metadata bits: word t // 2, nibble 4 e + c, low or high half of it.
_META_BITS = [4 * (4 * e + c) + 2 * t for t in range(2) for e in range(2) for c in range(4)]
# Bit of the 16 that tells about value j of a lane, j = (w, e): bit 7 - w of byte e, so that the bits of both entries of
# a register word are sign bits of bytes after one shift. With m = 16 the half bits follow the step bits.
_PLACE_BITS = {8: [8 * (j % 2) + 7 - j // 2 for j in range(16)], 16: [8 * (j % 2) + 7 - j // 2 for j in range(8)]}
_LANE_ORDER = {4: "gctshe", 8: "gctse", 16: "gcte"}
_META_ORDER = {4: "gshtec", 8: "gstec", 16: "gtec"}


def _pack_singles(raw, index, bits, m):
  """Layer of single entries -> uint32 [U, C, words]."""
  raw, index = raw[:, :, 0], index[:, :, 0].astype(jnp.uint32)
  units, chunks = raw.shape[:2]
  values = _arrange(raw, m, _LANE_ORDER[m]).reshape(units, chunks, 32, -1)
  values = _pieces(_value_words(values, bits))
  meta = _combine(_arrange(index & 3, m, _META_ORDER[m]).reshape(units, chunks, -1, 16), _META_BITS)
  if m == 4:
    return jnp.concatenate([values, meta], axis=-1)
  own = _arrange(index >> 2, m, _LANE_ORDER[m]).reshape(units, chunks, 32, -1)
  if m == 8:
    place = _combine(own, _PLACE_BITS[8])
  else:
    place = _combine(own >> 1, _PLACE_BITS[16]) | _combine(own & 1, _PLACE_BITS[16]) >> 4
  place = _combine(place.reshape(units, chunks, 16, 2), (0, 16))
  return jnp.concatenate([values, meta, place], axis=-1)


def _pack_scales(scales, chunks, chunk, group, o_pad):
  rows = chunk.scales * chunks
  scales = jnp.repeat(scales, max(1, group // _decode_layout.SCALED_STEP), axis=0)[:rows]
  scales = jnp.pad(scales, ((0, rows - scales.shape[0]), (0, o_pad)))
  # [chunk, row, unit, mt, e, g] -> [unit, chunk, row, g, mt, e]
  scales = scales.reshape(chunks, chunk.scales, -1, 4, 2, 8).transpose(2, 0, 1, 5, 3, 4)
  if scales.dtype == jnp.float32:
    words = jax.lax.bitcast_convert_type(scales, jnp.uint32)
  else:
    words = _combine(jax.lax.bitcast_convert_type(scales, jnp.uint16), (0, 16))
  return words.reshape(words.shape[0], chunks, -1)


def unpack_decode(layout: _decode_layout.DecodeLayout):
  """The arrays that were packed.

  Args:
   layout: a DecodeLayout.

  Returns:
   (values [K / m, n, O], indices uint8 [K / m, n, O], scales [K / group, O] or None), bit for bit.
  """
  return _unpack(layout)


@jax.jit
def _unpack(layout):
  m, bits, chunk = layout.m, layout.bits, layout.chunk
  data = jax.lax.bitcast_convert_type(layout.data, jnp.uint32)
  scales = None
  if layout.group:
    scales = _unpack_scales(data[..., chunk.part * chunk.parts // 4 :], layout)
    data = data[..., : chunk.part * chunk.parts // 4].reshape(data.shape[0], -1, chunk.part // 4)
  raws, indices = [], []
  for layer in chunk.layers:
    read = _unpack_pairs if layer.pairs else functools.partial(_unpack_singles, m=m)
    raw, index = read(data, layer, bits=bits)
    raws += raw
    indices += index
  groups, outputs = math.ceil(layout.shape[0] / m), layout.shape[1]
  values = jnp.stack([_from_chunks(r) for r in raws], axis=1)[:groups, :, :outputs]
  indices = jnp.stack([_from_chunks(i) for i in indices], axis=1)[:groups, :, :outputs]
  if bits == 16:
    values = jax.lax.bitcast_convert_type(values, layout.dtype)
  else:
    values = values.astype(layout.dtype)
  return values, indices.astype(jnp.uint8), scales


def _from_chunks(x):
  """[U, C, blocks, mt, e, g] -> [K / m, O]."""
  return x.reshape(*x.shape[:3], _decode_layout.ROWS).transpose(1, 2, 0, 3).reshape(x.shape[1] * x.shape[2], -1)


def _section(data, offset, nbytes):
  return data[..., offset // 4 : (offset + nbytes) // 4]


def _fields(words, positions, mask):
  return (words[..., None] >> jnp.asarray(positions, jnp.uint32)) & jnp.uint32(mask)


def _unpack_pairs(data, layer, bits):
  lead = data.shape[:2]
  words = _unpieces(_section(data, layer.values, layer.words * 128), layer.words)
  halves = _value_halves(words, bits).reshape(*lead, -1, 2)
  raws = [_restore(halves[..., j], 4, "gctshe") for j in (0, 1)]
  meta = _unpieces(_section(data, layer.meta, 512), 4)
  nibble = _restore(_fields(meta, range(0, 32, 4), 15).reshape(*lead, -1), 4, "gshtec")
  return raws, [nibble & 3, nibble >> 2]


def _unpack_singles(data, layer, bits, m):
  lead = data.shape[:2]
  words = _unpieces(_section(data, layer.values, layer.words * 128), layer.words)
  raw = _restore(_value_halves(words, bits).reshape(*lead, -1), m, _LANE_ORDER[m])
  meta = _section(data, layer.meta, layer.place - layer.meta)
  index = _restore(_fields(meta, _META_BITS, 3).reshape(*lead, -1), m, _META_ORDER[m])
  if m > 4:
    place = _fields(_section(data, layer.place, 64), (0, 16), 0xFFFF).reshape(*lead, 32)
    own = _fields(place, _PLACE_BITS[m], 1)
    if m == 16:
      own = own << 1 | _fields(place << 4, _PLACE_BITS[16], 1)
    index |= _restore(own.reshape(*lead, -1), m, _LANE_ORDER[m]) << 2
  return [raw], [index]


def _unpack_scales(words, layout):
  chunk, (k, outputs) = layout.chunk, layout.shape
  units, chunks = words.shape[:2]
  if layout.scale_dtype == "float32":
    scales = jax.lax.bitcast_convert_type(words, jnp.float32)
  else:
    scales = jax.lax.bitcast_convert_type(_fields(words, (0, 16), 0xFFFF).astype(jnp.uint16), layout.scale_dtype)
  scales = scales.reshape(units, chunks, chunk.scales, 8, 4, 2).transpose(1, 2, 0, 4, 5, 3)
  scales = scales.reshape(chunks * chunk.scales, -1)[:: max(1, layout.group // _decode_layout.SCALED_STEP)]
  return scales[: math.ceil(k / layout.group), :outputs]
