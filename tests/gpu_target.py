"""Compiles for an H100 on a machine without one, where JAX's CUDA plugin and NVIDIA's compiler packages are installed."""

import importlib.util

import jax

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


def unavailable():
  """Why nothing can be compiled for a GPU here, or None."""
  if jax.__version_info__ < (0, 11):
    return f"GPU kernels need jax >= 0.11, this is {jax.__version__}"
  missing = [name for name in ("jax_plugins.xla_cuda13", "nvidia.cu13") if not _installed(name)]
  return f"not installed: {', '.join(missing)}" if missing else None


def _installed(name):
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False


def h100():
  """Context in which code is traced for an H100."""
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def compile_for_h100(fun, *args):
  """Machine code of `fun(*args)`, arguments as `jax.ShapeDtypeStruct`; what cannot be built raises."""
  from jax.experimental import topologies

  topology = topologies.get_topology_desc(topology_name="h100", platform="cuda", target_config=_H100, topology="1x1x1")
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
  args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), args)
  with h100():
    return jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",)).compile()
