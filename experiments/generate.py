"""Generates text with a language model that experiments/prune_lm.py has saved, or with any other.

    python experiments/generate.py --model=runs/smollm2_sparsegpt/model --prompt="The state of the Union is"

Layers that are stored as N:M run through `jaxsparse.ops.nm_matmul`; on an H100 they are packed for its kernels first.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import functools
import itertools
import pathlib
import sys
import time
from typing import Any

# `python experiments/generate.py` puts experiments/ on the path; the packages beside it are found from the root.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments import decode_attention
from experiments import language_models
from experiments import llama
from jaxsparse import ops
from jaxsparse.arrays import NMArray

CHUNK = 16  # positions in one call of the compiled loop
_POSITIONS = 64  # what a cache's length is a multiple of, for the kernel of `decode_attention`


class Decoder:
  """Decodes sequences of equal length with a cache of keys and values, `CHUNK` positions in a compiled loop.

  Args:
    model: of `language_models.load`.
    length: tokens of prompt and answer together, at most.
    batch: sequences at a time.
    temperature: 0 takes the most likely token, 1 samples from the model's distribution.
    seed: of the samples.
  """

  def __init__(
    self,
    model: language_models.LanguageModel,
    length: int,
    *,
    batch: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
  ):
    self._config, self._temperature, self._length, self._batch = model.config, temperature, length, batch
    on_gpu = jax.devices()[0].platform == "gpu"
    change = functools.partial(_pack, batch=batch) if on_gpu else lambda w: w
    self.layers = [language_models.fused(block, change) for block in model.params["blocks"]]
    self._top = {name: value for name, value in model.params.items() if name != "blocks"}
    self._dtype = self._top["embedding"].dtype
    one_kernel = on_gpu and self._dtype == jnp.bfloat16 and model.config.head_dim in (64, 128)
    self._attend = decode_attention.attention if one_kernel else decode_attention.reference
    self._key = jax.random.key(seed)
    self._run = jax.jit(self._chunk, donate_argnums=0)

  def products(self) -> dict[str, str]:
    """What runs each of the four products of a block: "dense", or the implementation of `nm_matmul`."""
    layer, weights = self.layers[0], {}
    for name in ("qkv", "out", "gate_up", "down"):
      parts = getattr(layer, name)
      for i, w in enumerate(parts if isinstance(parts, tuple) else (parts,)):
        label = f"{name}[{i}]" if isinstance(parts, tuple) else name
        x = jax.ShapeDtypeStruct((self._batch, w.shape[0]), self._dtype)
        weights[label] = "dense" if isinstance(w, jax.Array) else ops.which_nm_matmul(x, w).implementation
    return weights

  def generate(self, prompt: Sequence[int], end: frozenset[int] = frozenset()) -> Iterator[int]:
    """Tokens after the prompt of one sequence, until one of `end` or the length is reached.

    Raises:
      ValueError: as `extend`.
    """
    for tokens in self.extend([prompt] * self._batch):
      for token in tokens[0].tolist():
        if token in end:
          return
        yield token

  def extend(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Tokens after the prompts, int32 `[batch, <= CHUNK]` at a time, until the length is reached.

    Args:
      prompts: tokens of each sequence, of equal length.

    Raises:
      ValueError: as many prompts as sequences are needed, of one length that leaves room for an answer.
    """
    known = np.array(prompts, np.int32)
    if known.ndim != 2 or known.shape[0] != self._batch:
      raise ValueError(f"{self._batch} prompts of equal length are needed, got an array of shape {known.shape}.")
    if not 0 < known.shape[1] < self._length:
      raise ValueError(f"The prompt has {known.shape[1]} tokens; between 1 and {self._length - 1} fit.")
    positions = -(-self._length // _POSITIONS) * _POSITIONS
    prompts = jnp.asarray(np.pad(known, ((0, 0), (0, positions - known.shape[1]))))
    shape = (self._batch, 2, self._config.kv_heads, positions, self._config.head_dim)
    caches, token = [jnp.zeros(shape, self._dtype) for _ in self.layers], prompts[:, 0]
    for start in range(0, self._length - 1, CHUNK):
      args = (self.layers, self._top, prompts, jnp.int32(known.shape[1]), jnp.int32(start), token, self._key)
      caches, token, said = self._run(caches, *args)
      # Column i follows position start + i; those inside the prompt are of no interest.
      first, last = known.shape[1] - 1 - start, self._length - 1 - start
      if first < CHUNK:
        yield np.asarray(said)[:, max(first, 0) : last]

  def _chunk(self, caches, layers, top, prompts, known, start, token, key):
    """CHUNK positions, each of which is fed with the prompt or with the token before: the tokens `[batch, CHUNK]`."""

    def step(carry, position):
      caches, token = carry
      token = jnp.where(position < known, prompts[:, position], token)
      caches, logits = self._one_position(caches, layers, top, token, position)
      if self._temperature:
        token = jax.random.categorical(jax.random.fold_in(key, position), logits / self._temperature)
      else:
        token = jnp.argmax(logits, -1)
      return (caches, token.astype(jnp.int32)), token

    (caches, token), said = jax.lax.scan(step, (caches, token), start + jnp.arange(CHUNK))
    return caches, token, said.T

  def _one_position(self, caches, layers, top, token, position):
    # Every block with weights of its own: a loop over stacked ones would copy each weight before it is read.
    x, written = llama.embed(top, token), []
    for layer, cache in zip(layers, caches):
      cache, x = llama.decode_block(layer, cache, x, position, self._config, attend=self._attend)
      written.append(cache)
    return written, llama.logits(top, x, self._config)


def _pack(w: Any, batch: int) -> Any:
  return ops.pack(w, batch=batch) if isinstance(w, NMArray) else w


def main(argv):
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {argv[1:]}.")
  model = language_models.load(_MODEL.value, dtype=_DTYPE.value)
  prompt = _PROMPT.value
  if _CHAT.value:
    prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
  tokens = model.tokenizer.encode(prompt).ids
  ends = {model.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "</s>")}
  decoder = Decoder(
    model, len(tokens) + _TOKENS.value, batch=_BATCH.value, temperature=_TEMPERATURE.value, seed=_SEED.value
  )
  print(f"products of a block: {', '.join(f'{name} {how}' for name, how in decoder.products().items())}")
  print(_PROMPT.value, end="", flush=True)
  found, said, seconds = [], "", []
  for chunk in decoder.extend([tokens] * _BATCH.value):
    seconds.append(time.perf_counter())
    found += itertools.takewhile(lambda token: token not in ends, chunk[0].tolist())
    text = model.tokenizer.decode(found)
    print(text[len(said) :], end="", flush=True)
    said = text
    if ends & set(chunk[0].tolist()):
      break
  print(f"\n{len(found)} tokens")
  if len(seconds) > 1:  # the loop is compiled in the first call
    rate = _BATCH.value * (CHUNK * (len(seconds) - 2) + chunk.shape[1]) / (seconds[-1] - seconds[0])
    print(f"{rate:.1f} tokens/s after the first {CHUNK}, {_BATCH.value} sequence(s) at a time")


if __name__ == "__main__":
  _MODEL = flags.DEFINE_string("model", None, "A folder of prune_lm.py, a Llama checkpoint, a .gguf file, or smollm2.")
  _PROMPT = flags.DEFINE_string("prompt", "The state of the Union is", "What the text starts with.")
  _CHAT = flags.DEFINE_boolean("chat", False, "Ask an instruction-tuned model, in place of going on with the text.")
  _TOKENS = flags.DEFINE_integer("tokens", 64, "The most tokens to generate.", lower_bound=1)
  _BATCH = flags.DEFINE_integer("batch", 1, "Answers at a time, of which the first is printed.", lower_bound=1)
  _DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of dense models; saved ones keep their own.")
  _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
  _SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
  flags.mark_flag_as_required("model")
  app.run(main)
