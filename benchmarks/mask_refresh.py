"""Time to choose a mask: exact top-k over a large leaf, ties included, and N:M.

  python benchmarks/mask_refresh.py [--reps=5] [--argsort] [--big] [--out=results/mask_refresh]

Every mask is checked: its count, that nothing removed scores above anything kept, and that ties go to the lowest index.
`--big` adds a leaf of 16384 x 16384 (268 M entries; the default on a GPU), `--argsort` the usual way for comparison.
"""

import functools
import statistics
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import report
import tqdm

from jaxsparse import selection

_REPS = flags.DEFINE_integer("reps", None, "Timed runs of each case; the median is reported (5, on a GPU 20).")
_ARGSORT = flags.DEFINE_bool("argsort", False, "Also time a double argsort of the same leaf.")
_BIG = flags.DEFINE_bool("big", None, "Add the 16384 x 16384 leaf; default: on a GPU only.")
_OUT = flags.DEFINE_string("out", "results/mask_refresh", "Where the JSON and the plot go, without suffix.")

_DENSITY = 0.1


def scores(kind: str, shape: tuple[int, int]) -> jax.Array:
  """Scores of a leaf: |normal|, or with ties as they come in practice."""
  x = jnp.abs(jax.random.normal(jax.random.key(0), shape))
  if kind == "bfloat16":
    return x.astype(jnp.bfloat16)
  if kind == "bfloat16 values in float32":
    return x.astype(jnp.bfloat16).astype(jnp.float32)
  if kind == "all equal":
    return jnp.full(shape, 0.5)
  if kind == "90 % masked":
    return jnp.where(jax.random.uniform(jax.random.key(1), shape) < 0.9, -jnp.inf, x)
  return x


def by_argsort(x: jax.Array, keep: int) -> jax.Array:
  """The mask by two sorts of the whole leaf."""
  flat = x.ravel()
  order = jnp.argsort(flat, descending=True, stable=True)
  return jnp.zeros(flat.shape, bool).at[order[:keep]].set(True).reshape(x.shape)


@jax.jit
def _summary(x, mask):
  kept = jnp.where(mask, x, jnp.inf).astype(jnp.float32)
  lost = jnp.where(mask, -jnp.inf, x).astype(jnp.float32)
  cut = kept.min()
  return (
    mask.sum(dtype=jnp.int32),
    cut,
    lost.max(),
    mask & (x.astype(jnp.float32) == cut),
    ~mask & (x.astype(jnp.float32) == cut),
  )


def check(x: jax.Array, mask: jax.Array, keep: int) -> bool:
  """Exact count, nothing better removed, and the first of the tied ones kept."""
  count, cut, best_lost, tied_kept, tied_lost = _summary(x, mask)
  tied_kept, tied_lost = np.flatnonzero(np.asarray(tied_kept)), np.flatnonzero(np.asarray(tied_lost))
  in_order = not tied_lost.size or tied_kept.max() < tied_lost.min()
  return int(count) == keep and float(best_lost) <= float(cut) and bool(in_order)


def median_ms(fn, *args, reps: int, queued: int = 1) -> float:
  """Median wall-clock milliseconds of a call, after a warm-up; with `queued` calls in flight, their share each.

  A single call on a GPU carries about 0.1 ms of dispatch that a training loop hides; queued calls do not.
  """
  jax.block_until_ready(fn(*args))
  times = []
  for _ in range(reps):
    start = time.perf_counter()
    out = [fn(*args) for _ in range(queued)]
    jax.block_until_ready(out[-1])
    times.append((time.perf_counter() - start) / queued)
    del out
  return 1e3 * statistics.median(times)


def main(argv):
  del argv
  gpu = jax.default_backend() == "gpu"
  reps = _REPS.value or (20 if gpu else 5)
  big = gpu if _BIG.value is None else _BIG.value
  shapes = [(16384, 4096)] + ([(16384, 16384)] if big else [])
  kinds = ["float32", "bfloat16", "bfloat16 values in float32", "all equal", "90 % masked"]
  cases = [
    (shape, kind, pattern) for shape in shapes for kind, pattern in [(k, "10 %") for k in kinds] + [("float32", "2:4")]
  ]
  rows = []
  for shape, kind, pattern in tqdm.tqdm(cases):
    x = jax.block_until_ready(jax.jit(scores, static_argnums=(0, 1))(kind, shape))
    read = median_ms(jax.jit(lambda x: (x > 0).sum(dtype=jnp.int32)), x, reps=reps, queued=8 if gpu else 1)
    if pattern == "2:4":
      view = jax.jit(lambda x: x.reshape(shape[0] // 4, 4, shape[1]))(x)
      fn = jax.jit(lambda v: selection.topk_mask(v, 2, axis=-2))
      args, exact = (view,), bool((fn(view).sum(1, dtype=jnp.int32) == 2).all())
    else:
      keep = selection.keep_count(x.size, 1 - _DENSITY)
      fn = jax.jit(functools.partial(selection.topk_mask, keep=keep))
      args, exact = (x,), check(x, fn(x), keep)
    row = {
      "leaf": f"{shape[0]} x {shape[1]}",
      "scores": kind,
      "kept": pattern,
      "ms": median_ms(fn, *args, reps=reps),
      "queued ms": median_ms(fn, *args, reps=reps, queued=8 if gpu else 1),
      "one read ms": read,
      "exact": exact,
    }
    if _ARGSORT.value and kind == "float32" and pattern == "10 %":
      row["argsort ms"] = median_ms(jax.jit(by_argsort, static_argnums=1), x, keep, reps=reps if gpu else 1)
    rows.append(row)
    del x
  report.print_table(rows, ["leaf", "scores", "kept", "ms", "queued ms", "one read ms", "argsort ms", "exact"])
  report.write_json(_OUT.value + ".json", rows, reps=reps)
  labels = [f"{r['leaf']}, {r['scores']}, {r['kept']}" for r in rows]
  title = f"Time to choose a mask ({report.environment()['device']})"
  report.bar_plot(_OUT.value + ".png", labels, [r["ms"] for r in rows], title, "milliseconds, median")
  if not all(r["exact"] for r in rows):
    raise SystemExit("A mask is not exact.")


if __name__ == "__main__":
  app.run(main)
