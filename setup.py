"""Packaging of jaxsparse."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jaxsparse/__init__.py").read_text()).group(1)

EXTRAS = {
  "nn": ["flax>=0.12"],
  "safetensors": ["safetensors>=0.5"],
  "quickstart": ["matplotlib>=3.8", "scikit-learn>=1.4", "tqdm>=4.66"],
  "language": ["gguf>=0.17", "matplotlib>=3.8", "safetensors>=0.5", "tokenizers>=0.21", "tqdm>=4.66"],
  "lint": ["ruff>=0.12"],
  "experiments": [
    "flax>=0.12",
    "matplotlib>=3.8",
    "orbax-checkpoint>=0.11.20",
    "scikit-learn>=1.4",
    "tensorboardX>=2.6",
    "tqdm>=4.66",
  ],
}
# Compile GPU kernels to machine code on a machine without a GPU; of the same version as jax, which `make` sees to.
EXTRAS["gpu-compile"] = [
  f"{name}; python_version >= '3.12' and sys_platform == 'linux'"
  for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
]
EXTRAS["colabs"] = [*EXTRAS["experiments"], "ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
EXTRAS["test"] = [
  *EXTRAS["colabs"],
  *EXTRAS["gpu-compile"],
  *EXTRAS["language"],
  *EXTRAS["safetensors"],
  "hypothesis>=6.100",
  "pytest>=8.2",
  "pytest-xdist>=3.6",
]

setuptools.setup(
  name="jaxsparse",
  version=VERSION,
  description="Pruning and sparse training for JAX, as Optax transformations",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=setuptools.find_packages(include=["jaxsparse", "jaxsparse.*"]),
  package_data={
    "jaxsparse.ops.block_matmul": ["measured/*.json"],
    "jaxsparse.ops.nm_matmul": ["measured/*.json"],
  },
  python_requires=">=3.11",
  install_requires=["absl-py>=2.1", "chex>=0.1.90", "jax>=0.10.2", "ml_collections>=1.0", "numpy>=2.0", "optax>=0.2.5"],
  extras_require=EXTRAS,
)
