"""Generates text with a language model that experiments/prune_lm.py has saved, or with any other.

    python experiments/generate.py --model=runs/smollm2_sparsegpt/model --prompt="The state of the Union is"

Layers that are stored as N:M run through `jaxsparse.ops.nm_matmul`; on an H100 they are packed for its kernels first.
"""

from collections.abc import Iterator
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

from experiments import language_models
from experiments import llama
from jaxsparse import ops
from jaxsparse.arrays import NMArray


class Decoder:
  """Decodes one sequence with a cache of keys and values, a token at a time.

  Args:
    model: of `language_models.load`.
    length: tokens of prompt and answer together, at most.
    temperature: 0 takes the most likely token, 1 samples from the model's distribution.
    seed: of the samples.
  """

  def __init__(self, model: language_models.LanguageModel, length: int, temperature: float = 0.0, seed: int = 0):
    config = self._config = model.config
    self._temperature, self._length = temperature, length
    change = _pack if jax.devices()[0].platform == "gpu" else lambda w: w
    layers = [language_models.fused(block, change) for block in model.params["blocks"]]
    self.layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    self._top = {name: value for name, value in model.params.items() if name != "blocks"}
    shape = (config.layers, 1, 2, config.kv_heads, length, config.head_dim)
    self._cache = jnp.zeros(shape, self._top["embedding"].dtype)
    self._key, self._position = jax.random.key(seed), 0
    self._step = jax.jit(self._one_token, donate_argnums=0)

  def generate(self, prompt: list[int], end: frozenset[int] = frozenset()) -> Iterator[int]:
    """Tokens after the prompt, until one of `end` or the length is reached.

    Raises:
      ValueError: an empty prompt, or one that does not fit.
    """
    if not prompt or len(prompt) >= self._length:
      raise ValueError(f"The prompt has {len(prompt)} tokens; between 1 and {self._length - 1} fit.")
    for token in prompt:
      token = self._feed(token)
    while int(token) not in end:
      yield int(token)
      if self._position + 1 == self._length:
        return
      token = self._feed(token)

  def _feed(self, token):
    self._cache, token = self._step(
      self._cache, self.layers, self._top, jnp.int32(token), jnp.int32(self._position), self._key
    )
    self._position += 1
    return token

  def _one_token(self, cache, layers, top, token, position, key):
    def body(x, layer_and_cache):
      layer, cache = layer_and_cache
      cache, x = llama.decode_block(layer, cache, x, position, self._config)
      return x, cache

    x = llama.embed(top, token[None])
    x, cache = jax.lax.scan(body, x, (layers, cache))
    logits = llama.logits(top, x, self._config)[0]
    if not self._temperature:
      return cache, jnp.argmax(logits)
    return cache, jax.random.categorical(jax.random.fold_in(key, position), logits / self._temperature)


def _pack(w: Any) -> Any:
  return ops.pack(w, batch=1) if isinstance(w, NMArray) else w


def main(argv):
  logging.set_verbosity(logging.WARNING)
  if len(argv) > 1:
    raise app.UsageError(f"Unknown arguments: {argv[1:]}.")
  model = language_models.load(_MODEL.value)
  prompt = _PROMPT.value
  if _CHAT.value:
    prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
  tokens = model.tokenizer.encode(prompt).ids
  ends = [model.tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>", "</s>")]
  decoder = Decoder(model, len(tokens) + _TOKENS.value, _TEMPERATURE.value, _SEED.value)
  sparse = [w for w in decoder.layers if not isinstance(w, (jax.Array, tuple))]
  print(
    f"{len(sparse)} of 4 products of a block run nm_matmul: " + ", ".join(sorted({type(w).__name__ for w in sparse}))
  )
  print(_PROMPT.value, end="", flush=True)
  found, said = [], ""
  for token in decoder.generate(tokens, frozenset(end for end in ends if end is not None)):
    found.append(token)
    if len(found) == 1:
      start = time.perf_counter()  # the step is compiled, and the prompt is read
    text = model.tokenizer.decode(found)
    print(text[len(said) :], end="", flush=True)
    said = text
  seconds = time.perf_counter() - start if len(found) > 1 else float("nan")
  print(f"\n{len(found)} tokens, {(len(found) - 1) / seconds:.1f} tokens/s")


if __name__ == "__main__":
  _MODEL = flags.DEFINE_string("model", None, "A folder of prune_lm.py, a Llama checkpoint, a .gguf file, or smollm2.")
  _PROMPT = flags.DEFINE_string("prompt", "The state of the Union is", "What the text starts with.")
  _CHAT = flags.DEFINE_boolean("chat", False, "Ask an instruction-tuned model, in place of going on with the text.")
  _TOKENS = flags.DEFINE_integer("tokens", 64, "The most tokens to generate.", lower_bound=1)
  _TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.", lower_bound=0.0)
  _SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
  flags.mark_flag_as_required("model")
  app.run(main)
