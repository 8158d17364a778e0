"""Text to tokens and back: a byte-level BPE tokenizer from a GGUF file, or a checkpoint's tokenizer.json."""

import pathlib
from typing import Any

from experiments import llama_files

# How each kind splits text before merging bytes: whether every digit stands alone.
_DIGITS_ALONE = {"smollm": True, "gpt-2": False}
_SPECIAL = 3  # gguf's token type of control tokens


def load(path: str | pathlib.Path) -> Any:
  """A `tokenizers.Tokenizer` from a `.gguf` file, a `tokenizer.json`, or a folder that holds one.

  Raises:
    ImportError: without the tokenizers package.
    FileNotFoundError: there is no tokenizer.
    ValueError: the GGUF file has a tokenizer of another kind.
  """
  path = pathlib.Path(path).expanduser()
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError("Tokenising text needs the tokenizers package: pip install 'jaxsparse[language]'") from error
  if path.suffix == ".gguf":
    return _of_gguf(llama_files.open_gguf(path), path)
  path = path / "tokenizer.json" if path.is_dir() else path
  if not path.is_file():
    raise FileNotFoundError(f"There is no tokenizer {path}; copy the tokenizer.json of the checkpoint there.")
  return tokenizers.Tokenizer.from_file(str(path))


def _of_gguf(reader: Any, path: pathlib.Path) -> Any:
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers

  field = lambda name: reader.fields[f"tokenizer.ggml.{name}"].contents()
  kind, split = field("model"), field("pre") if "tokenizer.ggml.pre" in reader.fields else "gpt-2"
  if kind != "gpt2" or split not in _DIGITS_ALONE:
    raise ValueError(
      f"{path} has a tokenizer of model {kind!r} with pre-tokenizer {split!r}; rebuilt are 'gpt2' ones with "
      f"{' or '.join(map(repr, _DIGITS_ALONE))}. Put the checkpoint's tokenizer.json beside and name that."
    )
  tokens = field("tokens")
  merges = [tuple(merge.split(" ")) for merge in field("merges")]
  built = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
  parts = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_ALONE[split] else []
  parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
  built.pre_tokenizer = pre_tokenizers.Sequence(parts)
  built.decoder = decoders.ByteLevel()
  special = [token for token, type_ in zip(tokens, field("token_type")) if type_ == _SPECIAL]
  built.add_special_tokens(special)
  return built
