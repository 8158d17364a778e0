"""Layer densities of uniform+, Erdos-Renyi and ERK."""

import math

import numpy as np

from references.selection import keep_count


def scaled(raw, sizes, total):
  """Densities proportional to raw with a sum of `total` entries; what exceeds 1 is dense and the rest solved again."""
  dense = [False] * len(raw)
  while True:
    budget = total - sum(n for n, d in zip(sizes, dense) if d)
    factor = budget / sum(r * n for r, n, d in zip(raw, sizes, dense) if not d)
    density = [1.0 if d else factor * r for r, d in zip(raw, dense)]
    worst = int(np.argmax([-1 if d else x for x, d in zip(density, dense)]))
    if dense[worst] or density[worst] <= 1:
      return density
    dense[worst] = True


def erk(shapes, sparsity, power=1.0):
  sizes = [math.prod(s) for s in shapes]
  return scaled([(sum(s) / math.prod(s)) ** power for s in shapes], sizes, keep_count(sum(sizes), sparsity))


def erdos_renyi(shapes, sparsity):
  sizes = [math.prod(s) for s in shapes]
  raw = [(s[-2] + s[-1]) / (s[-2] * s[-1]) for s in shapes]
  return scaled(raw, sizes, keep_count(sum(sizes), sparsity))


def uniform_plus(shapes, sparsity, last_density=0.2):
  """First layer dense, last at least `last_density`, the others alike so that the total is met."""
  sizes = [math.prod(s) for s in shapes]
  last = max(last_density, 1 - sparsity)
  middle = (keep_count(sum(sizes), sparsity) - sizes[0] - last * sizes[-1]) / sum(sizes[1:-1])
  return [1.0, *[middle] * (len(shapes) - 2), last]


def counts(densities, sizes, total):
  """Rounds down, then hands what is left to the largest remainders."""
  wanted = [d * n for d, n in zip(densities, sizes)]
  out = [math.floor(w + 1e-9) for w in wanted]
  for i in sorted(range(len(out)), key=lambda i: out[i] - wanted[i])[: total - sum(out)]:
    out[i] += 1
  return out


def resnet50():
  """Shapes (HWIO) of ResNet-50's 53 convolutions and its classifier."""
  shapes = [(7, 7, 3, 64)]
  width = 64
  for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
    for b in range(blocks):
      shapes += [(1, 1, width, inner), (3, 3, inner, inner), (1, 1, inner, 4 * inner)]
      if b == 0:
        shapes.append((1, 1, width, 4 * inner))
      width = 4 * inner
  return [*shapes, (2048, 1000)]
