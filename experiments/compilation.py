"""How programs are compiled for a GPU where that takes longer than running them."""

import jax


def untuned() -> dict[str, bool]:
  """Compiler options. On a GPU: no search for the better of two ways to emit each fusion, and no Triton dots.

  Both are most of what compiling takes there, since every candidate is compiled and run: minutes for ALPS, whose dots
  have a shape of their own in each layer. Dots go to cuBLAS, whose algorithms are still compared. Triton's make
  training of a dense transformer slower, by 3 of 26 ms.
  """
  if jax.default_backend() != "gpu":
    return {}
  return {"xla_gpu_experimental_enable_fusion_autotuner": False, "xla_gpu_enable_triton_gemm": False}
