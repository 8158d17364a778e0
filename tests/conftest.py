"""Set before JAX starts: run on the CPU, and compile quickly: most of the suite's time is compiling what runs once."""

import os

# Without LLVM's optimisations compiling takes a third less time. `make test-laws` runs with them.
if "JAXSPARSE_OPTIMISED_TESTS" not in os.environ:
  os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# The tests are for the CPU; compiling for a GPU (`ahead_of_time.py`) needs none, but its packages would look for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
