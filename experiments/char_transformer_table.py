"""N:M methods on a character-level transformer: held-out loss of every method at 2:4 and 1:8, three seeds each.

    python experiments/char_transformer_table.py --out=benchmarks/results/char_transformer [--only=dense,asp,"sr_ste"]

Every row trains configs/char_transformer.py for the same number of steps on the same tokens. ASP pays for its dense
phase out of them, and so do AST and CAST, which their papers start from a trained model. Writes the JSON after every row,
so that a broken run leaves what it has, then the table and a plot.
"""

from collections.abc import Iterator
from concurrent import futures
import copy
import json
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from matplotlib import figure
from ml_collections import ConfigDict
from ml_collections import config_flags
import numpy as np
import tqdm

from configs import char_transformer as char_config
from experiments import char_transformer
from experiments import corpus as corpus_lib

PATTERNS = ((2, 4), (1, 8))
B1 = 0.9  # of Adam, by default


def methods(base: ConfigDict) -> dict[str, tuple[dict, dict]]:
  """{row: (updater, changes of the optimizer)}, for runs like `base`.

  Where a paper gives a length in steps, it is scaled to the same share of the run. Nothing was tuned on the table; the
  second settings of AST and CAST were found on a decoder of two layers of 64, that of STEP on digits.
  """
  half, closing = base.steps // 2, base.steps * 8 // 10
  # An exponential that has come down to 1 % when it is cut off.
  decay = dict(stop=closing, rate=math.log(100) / closing)
  rising = lambda begin, end, top: dict(
    name="linear_schedule", init_value=0.0, end_value=top, transition_steps=end - begin, transition_begin=begin
  )
  # AST and CAST normalise the first moment by its own size, not by that of the gradient, which for noisy gradients is
  # this many times as large; with the rate divided by it (and the weight decay multiplied) steps are as long as the others'.
  longer = math.sqrt((1 + B1) / (1 - B1))
  shorter = lambda divisor, cycles=2: dict(
    name="adamw_nm",
    cycles=cycles,
    learning_rate=base.optimizer.learning_rate / divisor,
    weight_decay=base.optimizer.weight_decay * divisor,
  )
  switch = dict(name="AutoSwitch", earliest=base.steps // 10, latest=half)
  return {
    # The paper repeats the dense training's schedule; the other one is spared the second warm-up.
    "asp": (dict(name="asp", at=half), dict(cycles=2)),
    "asp, one schedule": (dict(name="asp", at=half), {}),
    "magnitude_ste": (dict(name="magnitude_ste"), {}),
    "sr_ste 2e-4": (dict(name="sr_ste", decay=2e-4), {}),
    "sr_ste 2e-3": (dict(name="sr_ste", decay=2e-3), {}),
    "mdgf": (dict(name="mdgf", **decay), {}),
    "mdgf chain": (dict(name="mdgf", flow="chain", **decay), {}),
    "step": (dict(name="step"), dict(name="adamw_nm", freeze_nu=switch)),
    "step, floor 1": (dict(name="step"), dict(name="adamw_nm", freeze_nu=switch, nu_floor=1.0)),
    # The pull rises over a quarter of the retraining, as over 10,000 of the paper's 40,000 steps.
    "ast 1e-4": (
      dict(name="ast", start=half),
      shorter(longer) | dict(masked_decay="l2", strength=rising(half, half + base.steps // 8, 1e-4)),
    ),
    "ast 2e-3": (
      dict(name="ast", start=half),
      shorter(2.0) | dict(masked_decay="l2", strength=rising(half, half + base.steps // 8, 2e-3)),
    ),
    # No strength is known; the first is about the size of the first moment that it is mixed with.
    "cast 1e-4": (
      dict(name="cast", start=half),
      shorter(longer) | dict(masked_decay="l1", strength=1e-4, mix=rising(half, base.steps, 1.0)),
    ),
    "cast 3e-3": (
      dict(name="cast", start=half),
      shorter(2.0) | dict(masked_decay="l1", strength=3e-3, mix=rising(half, base.steps * 95 // 100, 1.0)),
    ),
    "cast 3e-3, one schedule": (
      dict(name="cast"),
      shorter(2.0, cycles=1) | dict(masked_decay="l1", strength=3e-3, mix=rising(0, closing, 1.0)),
    ),
  }


def rows(base: ConfigDict) -> Iterator[tuple[str, str, ConfigDict]]:
  """(method, pattern, configuration): the dense model, then every method at every pattern."""
  yield "dense", "dense", base
  for n, m in PATTERNS:
    for name, (updater, optimizer) in methods(base).items():
      config = copy.deepcopy(base)
      config.updater = ConfigDict(updater | dict(rules=char_config.nm_rules(n, m)))
      with config.optimizer.unlocked():
        config.optimizer.update(optimizer)
      yield name, f"{n}:{m}", config


def summarize(found: list[dict]) -> list[dict]:
  """Adds means and standard errors over seeds: of the loss, and of the share of ASP's gap to dense that a method closes.

  ASP is the better of its rows at the same pattern. Seeds are paired: the same seed means the same first weights and
  batches in every row.
  """
  error = lambda values: float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0
  final = lambda row: np.array(row["final"])
  out = [row | {"mean": float(final(row).mean()), "standard error": error(final(row))} for row in found]
  dense = next((final(row) for row in out if row["method"] == "dense"), None)
  for row in out:
    asp = [r for r in out if r["method"].startswith("asp") and r["pattern"] == row["pattern"]]
    if asp and dense is not None:
      best = final(min(asp, key=lambda r: r["mean"]))
      row["gap closed"] = float((best.mean() - row["mean"]) / (best.mean() - dense.mean()))
      row["gap error"] = error((best - final(row)) / (best - dense))
  return out


def markdown(found: list[dict]) -> str:
  """The table of the documentation: a row a method, the loss in nats a character."""
  patterns = [pattern for pattern in (f"{n}:{m}" for n, m in PATTERNS) if any(r["pattern"] == pattern for r in found)]
  lines = [
    "| method | " + " | ".join(f"{pattern} | of ASP's gap" for pattern in patterns) + " |",
    "| --- |" + " ---: | ---: |" * len(patterns),
  ]
  loss = lambda r: f"{r['mean']:.4f} ± {r['standard error']:.4f}"
  for name in dict.fromkeys(r["method"] for r in found):
    rows = {r["pattern"]: r for r in found if r["method"] == name}
    if "dense" in rows:
      cells = [loss(rows["dense"]), ""] * len(patterns)
    else:
      closed = lambda r: f"{100 * r['gap closed']:z.0f} ± {100 * r['gap error']:.0f} %" if "gap closed" in r else ""
      cells = [cell for p in patterns for cell in ((loss(rows[p]), closed(rows[p])) if p in rows else ("", ""))]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, found: list[dict]) -> None:
  """Loss above dense by method, one panel a pattern, best first."""
  dense = next(row["mean"] for row in found if row["method"] == "dense")
  patterns = [f"{n}:{m}" for n, m in PATTERNS]
  fig = figure.Figure(figsize=(9, 4), layout="constrained", dpi=130)
  for axes, pattern in zip(fig.subplots(1, len(patterns)), patterns):
    chosen = sorted((r for r in found if r["pattern"] == pattern), key=lambda r: r["mean"])
    colors = ["#d9772b" if r["method"].startswith("asp") else "#2f6db3" for r in chosen]
    height = [r["mean"] - dense for r in chosen]
    axes.barh([r["method"] for r in chosen], height, xerr=[r["standard error"] for r in chosen], color=colors)
    # A run that failed must not flatten the others: its bar is cut off and labelled.
    furthest = 3 * max(h for r, h in zip(chosen, height) if r["method"].startswith("asp"))
    axes.set_xlim(0, min(furthest, 1.1 * max(height)))
    for i, h in enumerate(height):
      if h > furthest:
        axes.text(0.97 * furthest, i, f"{h:.2f}", ha="right", va="center", color="white", fontsize=9)
    axes.invert_yaxis()
    axes.set_title(pattern, fontsize=10)
    axes.set_xlabel("loss above dense, nats a character", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
  fig.savefig(path)


def earlier(path: pathlib.Path, config: ConfigDict, chosen: list[tuple]) -> list[dict]:
  """Rows of an earlier run of the same configuration, less those that are run again."""
  if not path.is_file():
    return []
  content = json.loads(path.read_text())
  again = {(name, pattern) for name, pattern, _ in chosen}
  same = content["config"] == json.loads(config.to_json_best_effort())
  return [row for row in content["rows"] if same and (row["method"], row["pattern"]) not in again]


def write(path: pathlib.Path, found: list[dict], config: ConfigDict) -> None:
  """The JSON, at once: a kill leaves the old one or the new one."""
  device = jax.devices()[0]
  content = {
    "environment": {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__},
    "config": json.loads(config.to_json_best_effort()),
    "rows": found,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=1))
  partial.replace(path)


if __name__ == "__main__":
  default = pathlib.Path(__file__).resolve().parents[1] / "configs/char_transformer.py"
  config_flag = config_flags.DEFINE_config_file("config", str(default), "What every row starts from.")
  only_flag = flags.DEFINE_list("only", [], "Rows to run, by name or 'name pattern'; all if empty.")
  threads_flag = flags.DEFINE_integer("threads", 8, "Rows that are compiled at the same time.")
  out_flag = flags.DEFINE_string("out", "results/char_transformer", "Where the files go, without suffix.")

  def main(argv):
    del argv
    base, only = config_flag.value, only_flag.value
    out, failed = pathlib.Path(out_flag.value), []
    corpus = corpus_lib.load(base.folder)
    text = jnp.asarray(corpus.train)
    windows = jnp.asarray(char_transformer.validation_windows(corpus.validation, base.length, base.windows))
    everything = list(rows(base))
    place = {(name, pattern): i for i, (name, pattern, _) in enumerate(everything)}
    unknown = set(only) - {name for name, _ in place} - {f"{name} {pattern}" for name, pattern in place}
    if unknown:
      raise app.UsageError(
        f"--only: there is no {', '.join(sorted(unknown))}. Rows are {'; '.join(dict.fromkeys(n for n, _ in place))}, perhaps "
        """with a pattern ("asp 2:4"); put names with a comma into double quotes: --only='asp,"step, floor 1"'."""
      )
    chosen = [row for row in everything if not only or row[0] in only or f"{row[0]} {row[1]}" in only]
    found = earlier(out.with_suffix(".json"), base, chosen)
    # All programs first: cuDNN's attention cannot be loaded while other threads compile ("capturing stream has unjoined
    # work").
    with futures.ThreadPoolExecutor(threads_flag.value) as pool:
      evaluate = pool.submit(char_transformer.compile_evaluate, base, len(corpus.alphabet), windows)
      compiled = [pool.submit(char_transformer.compile_run, c, len(corpus.alphabet), text) for _, _, c in chosen]
    for (name, pattern, config), run in tqdm.tqdm(list(zip(chosen, compiled))):
      try:
        done = char_transformer.train(*run.result(), text, evaluate.result(), windows)
      except jax.errors.JaxRuntimeError as error:  # One row of the device must not take the others with it.
        failed.append(f"{name} {pattern}: {error}")
        continue
      plain = {part: json.loads(config[part].to_json_best_effort()) for part in ("updater", "optimizer")}
      found.append({"method": name, "pattern": pattern, **done, **plain})
      found.sort(key=lambda row: place[row["method"], row["pattern"]])
      write(out.with_suffix(".json"), summarize(found), base)
      tqdm.tqdm.write(f"{name} {pattern}: {np.mean(done['final']):.4f} in {done['seconds']:.1f} s")
    found = summarize(found)
    if any(row["method"] == "dense" for row in found) and len(found) > 1:
      plot(out.with_suffix(".png"), found)
    print(markdown(found))
    if failed:
      raise SystemExit("\n".join(["Rows that are missing:", *failed]))

  app.run(main)
