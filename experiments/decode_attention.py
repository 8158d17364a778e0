"""Attention of one decoding step in one kernel on an H100, for the decoder block: scores, softmax and values in a pass.

At a few sequences the small kernels around the products cost as much as a product. This one reads keys and values once,
at the speed of memory; `reference` says what it computes.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

_ROWS = 64  # of a wgmma; the query heads that share a key head take the first few
_QUERIES = 8  # rows of queries brought in, the height of a swizzled tile
_LOG2E = math.log2(math.e)


def reference(q: jax.Array, cache: jax.Array, position: jax.Array) -> jax.Array:
  """Attention of one query position over a cache.

  Args:
    q: `[B, kv_heads, G, head_dim]`, the G query heads that share a key head; not scaled.
    cache: `[B, 2, kv_heads, T, head_dim]`, keys and values.
    position: int32 scalar; entries of the cache beyond it are not seen.

  Returns:
    `[B, kv_heads, G, head_dim]`.
  """
  scores = jnp.einsum("bkgd,bktd->bkgt", q, cache[:, 0], preferred_element_type=jnp.float32)
  visible = jnp.arange(scores.shape[-1]) <= position
  weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf), -1)
  return jnp.einsum("bkgt,bktd->bkgd", weights.astype(q.dtype), cache[:, 1])


@functools.partial(jax.jit, static_argnames=("block", "steps", "interpret"))
def attention(q, cache, position, *, block: int = 64, steps: int = 5, interpret=None) -> jax.Array:
  """`reference` as one kernel: a block of threads for each pair of sequence and key head.

  Args:
    q, cache, position: as in `reference`; bfloat16 or float16, G <= 8, head_dim 64 or 128, T a multiple of `block`.
    block: entries of the cache in a step of the pipeline.
    steps: steps in flight.
    interpret: `InterpretGPUParams`, to run on a CPU.

  Raises:
    ValueError: G or T does not fit.
  """
  from jaxsparse.ops._mosaic_gpu import pl, plgpu

  batch, heads, group, dim = q.shape
  length = cache.shape[3]
  if group > _QUERIES or length % block:
    raise ValueError(f"q has shape {q.shape} and cache {cache.shape}; G <= {_QUERIES} and T % {block} == 0 are needed.")
  q = jnp.pad(q, ((0, 0), (0, 0), (0, _QUERIES - group), (0, 0)))
  tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  layout = plgpu.Layout.WGMMA

  def kernel(q_gmem, cache_gmem, position_gmem, out_gmem, q_smem, weights_smem, out_smem, barrier):
    b, h = lax.axis_index("batch"), lax.axis_index("heads")
    position = position_gmem[0]
    # The other rows of q_smem hold what was there; each row's result depends on that row alone.
    plgpu.copy_gmem_to_smem(q_gmem.at[b, h], q_smem.at[pl.ds(0, _QUERIES)], barrier)
    plgpu.barrier_wait(barrier)

    def product(a, b, columns):
      def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

      return pl.run_scoped(multiply, plgpu.ACC((_ROWS, columns), jnp.float32))

    def step(index, k_smem, v_smem, carry):
      acc, highest, total = carry
      scores = product(q_smem, k_smem.transpose((1, 0)), block)
      at = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout) + index[0] * block
      scores = jnp.where(at <= position, scores * (_LOG2E * dim**-0.5), -jnp.inf)
      higher = jnp.maximum(highest, scores.max(axis=1))
      shrink = jnp.exp2(highest - higher)
      weights = jnp.exp2(scores - lax.broadcast_in_dim(higher, scores.shape, [0]))
      total = total * shrink + weights.sum(axis=1)
      weights_smem[...] = weights.astype(q.dtype)
      plgpu.commit_smem()
      acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + product(weights_smem, v_smem, dim)
      return acc, higher, total

    row = lambda value: plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), layout.reduce(1))
    start = plgpu.layout_cast(jnp.zeros((_ROWS, dim), jnp.float32), layout), row(-jnp.inf), row(0.0)
    spec = plgpu.BlockSpec((block, dim), lambda i: (i, 0), transforms=tiles, memory_space=plgpu.SMEM)
    acc, _, total = plgpu.emit_pipeline(
      step, grid=(position // block + 1,), in_specs=[spec, spec], max_concurrent_steps=steps, init_carry=start
    )(cache_gmem.at[b, 0, h], cache_gmem.at[b, 1, h])
    out_smem[...] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, group)], out_gmem.at[b, h])
    plgpu.wait_smem_to_gmem(0)

  run = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((batch, heads, group, dim), q.dtype),
    grid=(batch, heads),
    grid_names=("batch", "heads"),
    scratch_types=dict(
      q_smem=plgpu.SMEM((_ROWS, dim), q.dtype, transforms=tiles),
      weights_smem=plgpu.SMEM((_ROWS, block), q.dtype, transforms=tiles),
      out_smem=plgpu.SMEM((_ROWS, dim), q.dtype),
      barrier=plgpu.Barrier(),
    ),
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    kernel_name="decode_attention",
    interpret=interpret,
  )
  return run(q, cache, jnp.reshape(position, (1,)).astype(jnp.int32))
