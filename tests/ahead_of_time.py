"""Compiling for a GPU that is not here: XLA, Mosaic GPU and ptxas need a description of the device, not a device.

`pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt` of the version of jax; no
driver. Illegal PTX, too much shared memory or registers, and instructions that the architecture lacks really fail.
"""

import importlib.util

import jax
from jax.sharding import SingleDeviceSharding

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KIND = "NVIDIA H100 80GB HBM3"


def unavailable() -> str | None:
  """Why nothing can be compiled for an H100 here, or None."""
  try:
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is not None:
      return None
  except ModuleNotFoundError:
    pass
  return "the CUDA compiler packages (jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc) are not installed"


def h100_mesh():
  """Under `jax.sharding.use_abstract_mesh` of this, tracing believes that it is on an H100."""
  device = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
  return jax.sharding.AbstractMesh((), (), abstract_device=device)


def compile_for_h100(f, *args):
  """Compiles `f` for arguments of the shapes of `args` (a pytree each) to machine code of an H100."""
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(topology_name="h100", platform="cuda", target_config=_H100, topology="1x1x1")
  sharding = SingleDeviceSharding(topology.devices[0])
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  with jax.sharding.use_abstract_mesh(h100_mesh()):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).compile()
