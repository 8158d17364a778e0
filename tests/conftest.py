"""Set before JAX starts: compile quickly. Most of the suite's time is XLA compiling programs that run once."""

import os

# Without LLVM's optimisations compiling takes a third less time. `make test-laws` runs with them.
if "JAXSPARSE_OPTIMISED_TESTS" not in os.environ:
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
