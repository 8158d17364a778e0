"""cuSPARSELt through PyTorch, as another yardstick for 2:4 products."""

import importlib
from typing import Any

import jax


def load() -> tuple[Any, str]:
  """(torch, note): torch with CUDA and cuSPARSELt, or None and why not."""
  if jax.default_backend() != "gpu":
    return None, "no GPU"
  try:
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
      return None, f"torch {torch.__version__} sees no CUDA device"
    version = torch.backends.cusparselt.version()
  except Exception as error:  # noqa: BLE001  A broken installation is as good as none.
    return None, f"{type(error).__name__}: {str(error)[:100]}"
  if not version:
    return None, f"torch {torch.__version__} has no cuSPARSELt"
  return torch, f"torch {torch.__version__}, cuSPARSELt {version}"


def weights(torch, k: int, o: int, copies: int) -> list:
  """Random bfloat16 weights `[O, K]`, 2:4 along K, compressed; copies of one another."""
  groups = torch.randn(o, k // 4, 4, device="cuda", dtype=torch.bfloat16)
  keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, torch.rand_like(groups).topk(2, dim=2).indices, True)
  packed = torch._cslt_compress(torch.where(keep, groups, 0).reshape(o, k))
  return [packed] + [packed.clone() for _ in range(copies - 1)]


def calls(torch, packed: list, batch: int, k: int) -> list:
  """One call for each copy, with the algorithm that the library's search finds for the shape; each has run once."""
  x = torch.randn(batch, k, device="cuda", dtype=torch.bfloat16).T
  search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
  if search is None:
    options = {"alg_id": torch._cslt_sparse_mm_search(packed[0], x)}
  else:  # also searches splits of the reduction
    algorithm, split_k, split_k_mode, *_ = search(packed[0], x, None, None, None, False)
    options = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": split_k_mode}
  found = [lambda p=p: torch._cslt_sparse_mm(p, x, **options) for p in packed]
  for call in found:
    call()
  torch.cuda.synchronize()
  return found
