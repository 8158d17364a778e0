"""The sentence encoder of the experiments: against NumPy, its files, its pruning; wheels that hold data."""

import functools
import hashlib
import json
import math
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments import encoder as encoders
from experiments import pruners
from experiments import pypi
import jaxsparse as js
from jaxsparse import calibration

SIZE, INNER, HEADS, BLOCKS = 8, 16, 2, 2
WORDS = ("[PAD]", "the", "state", "of", "union", "is", "good")
CONFIG = dict(model_type="bert", hidden_act="gelu", num_hidden_layers=BLOCKS, num_attention_heads=HEADS)


def write_checkpoint(folder, **changes):
  """A random BERT of two blocks with a tokenizer of seven words; returns its tensors."""
  tokenizers = pytest.importorskip("tokenizers")
  draw = np.random.RandomState(0).standard_normal
  tensors = {}

  def put(name, *shape):
    tensors[name] = draw(shape).astype(np.float32)

  for name, rows in ("word", len(WORDS)), ("position", 6), ("token_type", 2):
    put(f"embeddings.{name}_embeddings.weight", rows, SIZE)
  shapes = {"attention.self.query": (SIZE, SIZE), "attention.self.key": (SIZE, SIZE)}
  shapes |= {"attention.self.value": (SIZE, SIZE), "attention.output.dense": (SIZE, SIZE)}
  shapes |= {"intermediate.dense": (INNER, SIZE), "output.dense": (SIZE, INNER)}
  norms = ["embeddings.LayerNorm"]
  for i in range(BLOCKS):
    for name, shape in shapes.items():
      put(f"encoder.layer.{i}.{name}.weight", *shape)
      put(f"encoder.layer.{i}.{name}.bias", shape[0])
    norms += [f"encoder.layer.{i}.{part}.LayerNorm" for part in ("attention.output", "output")]
  for name in norms:
    put(f"{name}.weight", SIZE)
    put(f"{name}.bias", SIZE)
  folder.mkdir(exist_ok=True)
  safetensors_numpy.save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({**CONFIG, "layer_norm_eps": 1e-3, **changes}))
  model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  return tensors


def reference(tensors, ids):
  """The vector of one sentence without padding, as the paper's equations have it, in float64."""
  at = lambda name: tensors[name].astype(np.float64)

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * at(f"{name}.weight") + at(f"{name}.bias")

  linear = lambda x, name: x @ at(f"{name}.weight").T + at(f"{name}.bias")
  words, positions = at("embeddings.word_embeddings.weight")[ids], at("embeddings.position_embeddings.weight")
  x = words + positions[: len(ids)] + at("embeddings.token_type_embeddings.weight")[0]
  x = norm(x, "embeddings.LayerNorm")
  for i in range(BLOCKS):
    part = f"encoder.layer.{i}."
    q, k, v = (linear(x, f"{part}attention.self.{name}") for name in ("query", "key", "value"))
    heads = []
    for columns in np.split(np.arange(SIZE), HEADS):
      weights = np.exp(q[:, columns] @ k[:, columns].T / math.sqrt(len(columns)))
      heads.append(weights / weights.sum(1, keepdims=True) @ v[:, columns])
    attended = linear(np.concatenate(heads, 1), f"{part}attention.output.dense")
    x = norm(x + attended, f"{part}attention.output.LayerNorm")
    inner = linear(x, f"{part}intermediate.dense")
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    x = norm(x + linear(inner, f"{part}output.dense"), f"{part}output.LayerNorm")
  return x.mean(0) / np.linalg.norm(x.mean(0))


def test_vectors_are_those_of_the_equations_and_padding_counts_for_nothing(tmp_path):
  tensors = write_checkpoint(tmp_path / "bert")
  encoder = encoders.load(tmp_path / "bert")
  ids, present = encoders.tokens(encoder, ["the state of the union is good", "union is good"], 6)
  assert ids.tolist() == [[1, 2, 3, 1, 4, 5], [4, 5, 6, 0, 0, 0]]
  assert present.sum(1).tolist() == [6, 3]
  found = encoders.encode(encoder, ids, present)
  wanted = [reference(tensors, ids[0]), reference(tensors, ids[1, :3])]
  np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_an_encoder_is_pruned_block_by_block(tmp_path):
  write_checkpoint(tmp_path / "bert")
  encoder = encoders.load(tmp_path / "bert")
  ids = np.random.RandomState(1).randint(1, len(WORDS), (16, 6))
  apply_block = functools.partial(encoders.apply_block, heads=encoder.heads, epsilon=encoder.epsilon)
  blocks, hidden = encoder.params["blocks"], [encoders.embed(encoder, jnp.asarray(ids))]
  prune = pruners.Pruner("sparsegpt", js.NM(2, 4), None)
  done = list(calibration.prune_blocks(apply_block, blocks, hidden, prune.callback(), encoders.LINEARS, gram=True))
  for block, dense in zip(done, blocks, strict=True):
    assert set(block.masks) == set(encoders.LINEARS)
    for name, mask in block.masks.items():
      assert (np.asarray(mask).reshape(-1, 4, mask.shape[1]).sum(1) == 2).all()
      np.testing.assert_array_equal(block.params[name] != 0, mask)
    np.testing.assert_array_equal(block.params["up_bias"], dense["up_bias"])
    assert 0 < block.errors["down"] < 1


def test_another_architecture_is_an_error(tmp_path):
  write_checkpoint(tmp_path / "bert", hidden_act="relu")
  with pytest.raises(ValueError, match="is no BERT model with gelu"):
    encoders.load(tmp_path / "bert")


def test_a_wheel_is_read_from_the_folder_and_checked(tmp_path, monkeypatch):
  path = tmp_path / "some_data-1.0-py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("some_data/a.txt", "text")
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  with pypi.wheel("some-data", "1.0", digest, tmp_path) as archive:
    pypi.unpack(archive, "some_data/a.txt", tmp_path / "new" / "a.txt")
  assert [file.read_text() for file in (tmp_path / "new").iterdir()] == ["text"]
  with pytest.raises(ValueError, match="its SHA-256 is .* Delete it"), pypi.wheel("some-data", "1.0", "0", tmp_path):
    pass
  path.unlink()
  monkeypatch.setattr(pypi.sys, "executable", "false")
  with (
    pytest.raises(RuntimeError, match=f"copy {path.name} to {tmp_path}"),
    pypi.wheel("some-data", "1.0", digest, tmp_path),
  ):
    pass
