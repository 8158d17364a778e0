"""Which implementation of an op runs where: reasons are sentences, not exceptions."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax

# CUDA compute capability by the name of the card, for devices that are described and not there.
_CAPABILITIES = (
  ("H100", "9.0"),
  ("H200", "9.0"),
  ("GH200", "9.0"),
  ("A100", "8.0"),
  ("B200", "10.0"),
  ("GB200", "10.0"),
)


@dataclasses.dataclass(frozen=True)
class Target:
  """The device that is traced for.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: the device's name, "NVIDIA H100 80GB HBM3".
    capability: CUDA compute capability, (9, 0); None where there is none, or it is unknown.
  """

  platform: str
  kind: str
  capability: tuple[int, int] | None = None

  def __str__(self):
    return self.kind if self.platform in self.kind.lower() else f"{self.kind} ({self.platform})"


@dataclasses.dataclass(frozen=True)
class Choice:
  """Which implementation runs, and why not the others; prints as a list.

  Attributes:
    implementation: its name.
    reason: why it was taken.
    rejected: name of every other implementation -> why it does not run, as a sentence.
    target: the device that was chosen for.
  """

  implementation: str
  reason: str
  rejected: Mapping[str, str]
  target: Target

  def __str__(self):
    lines = [f"{self.implementation}: {self.reason}", *(f"  not {n}: {why}" for n, why in self.rejected.items())]
    return "\n".join(lines)


def current_target() -> Target:
  """The device that a computation traced here is meant for.

  That is the abstract device of the current mesh (`jax.sharding.use_abstract_mesh`: compiling ahead of time for a device
  that is not here), else `jax.default_device`, else the first device of the default backend.
  """
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None:
    kind = described.device_kind
    platform = getattr(described, "platform", None) or ("gpu" if "NVIDIA" in kind else kind.split()[0].lower())
    named = next((c for name, c in _CAPABILITIES if name in kind), None)
    return Target("gpu" if platform == "cuda" else platform, kind, _capability(named))
  device = jax.config.jax_default_device
  if device is None or isinstance(device, str):
    device = jax.devices(device)[0]
  return Target(device.platform, device.device_kind, _capability(getattr(device, "compute_capability", None)))


def _capability(text: Any) -> tuple[int, int] | None:
  if not text:
    return None
  major, _, minor = str(text).partition(".")
  return (int(major), int(minor or 0)) if major.isdigit() else None


def choose(
  op: str,
  named: str | None,
  reasons: Mapping[str, Callable[[], str | None]],
  preference: Sequence[tuple[str, str]],
  target: Target,
) -> Choice:
  """Takes the implementation that was named, or the first of `preference` that can run.

  Args:
    op: what errors call the op.
    named: an implementation's name, or None.
    reasons: for each implementation a function that returns None where it can run, else why not.
    preference: (name, why it would be taken), best first; the last one runs everywhere.
    target: the device.

  Raises:
    ValueError: the name is unknown.
    NotImplementedError: the named implementation cannot run; the message says why.
  """
  if named is not None:
    if named not in reasons:
      raise ValueError(f"{op}: implementation={named!r} is unknown; allowed are None, {', '.join(map(repr, reasons))}.")
    reason = reasons[named]()
    if reason is not None:
      raise NotImplementedError(
        f"{op}: implementation={named!r} cannot run here: {reason} implementation=None takes what can."
      )
    rejected = {name: f"{named!r} was named." for name in reasons if name != named}
    return Choice(named, "it was named.", rejected, target)
  found = {name: reason() for name, reason in reasons.items()}
  name, why = next((name, why) for name, why in preference if found[name] is None)
  rejected = {other: found[other] or f"{name!r} is preferred here." for other in reasons if other != name}
  return Choice(name, why, rejected, target)
