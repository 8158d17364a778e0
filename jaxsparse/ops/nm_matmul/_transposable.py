"""Exact search for the best transposable 2:4 mask of a 4x4 block.

A transposable mask keeps exactly two entries in every row and in every column, so that the weight and its transpose are
2:4 together. There are 90 of them. They need not be tried one by one: `best_mask` shares their partial sums and takes
63 additions and 28 comparisons a block.

Write a, b, c, d for the rows. Two rows ask a column for 2, 1 or 0 kept entries, and the other two for the rest; so with
columns {i, j, k, l} a mask is one of

* 48 masks: rows a and b share column i, rows c and d share j (or the other way round); in k and l, one of a and b
  takes k and the other l, and so do c and d.
* 36 masks: rows a and b take complementary pairs of columns, and so do c and d.
* 6 masks: rows a and b both take {i, j}, rows c and d both take {k, l}.

`cross(p, q, k, l)`, the better of "p takes k, q takes l" and "p takes l, q takes k", is the whole of the search: it is
used on single rows for columns that two rows split, and on sums of two rows for columns that they share. Complementary
pairs are two crosses: the pairings {01}{23} and {02}{13} reach all six pairs between them.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

PAIRS = tuple(itertools.combinations(range(4), 2))
REST = {pair: tuple(c for c in range(4) if c not in pair) for pair in PAIRS}


def best_mask(
  block: Sequence[Sequence[Any]],
  cell: Callable[[int, int], Any],
  choose: Callable[[Any, Any, Any], Any],
) -> Any:
  """The transposable mask that keeps most.

  It works on whatever knows `+`, `>` and `|`: arrays (a block position an element) or the scalars of a kernel under
  construction. Sums are taken in one fixed order, so both find the same mask, ties included; where the float32 sums are
  exact (always, when a block's non-zero bfloat16 entries span less than a factor of 2**13) the mask is optimal.

  Args:
    block: magnitudes `block[row][column]`, 4x4, not negative and not NaN; float32.
    cell: bit pattern that stands for "row r keeps column c", a word or a constant that `|` accepts.
    choose: `choose(condition, a, b)` is a where condition holds, else b; for magnitudes and for words.

  Returns:
    The `|` of the cells kept.
  """

  def better(first, second):
    # The first wins a tie.
    take = second[0] > first[0]
    return choose(take, second[0], first[0]), choose(take, second[1], first[1])

  def best(candidates):
    while len(candidates) > 1:
      candidates = [better(*two) for two in zip(candidates[::2], candidates[1::2])] + candidates[len(candidates) & ~1 :]
    return candidates[0]

  def join(first, second):
    return first[0] + second[0], first[1] | second[1]

  def cross(p, q):
    """For each pair of columns {k, m}: p takes one of them and q the other."""
    return {(k, m): better(join(p[k], q[m]), join(p[m], q[k])) for k, m in PAIRS}

  def complementary(crossed):
    return better(join(crossed[0, 1], crossed[2, 3]), join(crossed[0, 2], crossed[1, 3]))

  a, b, c, d = [[(block[r][j], cell(r, j)) for j in range(4)] for r in range(4)]
  split_ab, split_cd = cross(a, b), cross(c, d)
  shared = cross([join(*two) for two in zip(a, b)], [join(*two) for two in zip(c, d)])
  mixed = best([join(shared[ij], join(split_ab[REST[ij]], split_cd[REST[ij]])) for ij in PAIRS])
  apart = join(complementary(split_ab), complementary(split_cd))
  return best([mixed, apart, complementary(shared)])[1]
