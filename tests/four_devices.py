"""Runs a program where there are four devices: their number must be known before JAX begins, so in a process of its own."""

import os
import pathlib
import subprocess
import sys


def run(program: str) -> None:
  """Fails with what the program said unless it ends well."""
  root = pathlib.Path(__file__).parents[1]
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
  env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
