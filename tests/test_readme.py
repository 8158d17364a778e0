"""The documentation runs: every Python block of README.md and docs/*.md, and its lists agree with the code."""

import inspect
import pathlib
import re

import pytest

import jaxsparse as js

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: pathlib.Path) -> list[tuple[int, str]]:
  """(line of the file, code) of each ```python block."""
  text = page.read_text(encoding="utf-8")
  found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
  return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


def algorithm_names(page: pathlib.Path) -> list[str]:
  """First cells of the table between the `algorithms` marks."""
  (table,) = re.findall(r"<!-- algorithms -->\n(.*?)<!-- /algorithms -->", page.read_text(encoding="utf-8"), re.DOTALL)
  return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page):
  # Warnings are errors in all tests. Blank lines before the code make tracebacks point into the page.
  namespace = {"__name__": page.stem}
  for line, code in python_blocks(page):
    exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_readme_has_code():
  assert len(python_blocks(ROOT / "README.md")) >= 8


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_tables_list_all_algorithms(page):
  assert algorithm_names(ROOT / page) == list(js.all_algorithm_names())


def documented_defaults() -> dict[str, dict[str, str]]:
  """algorithm -> {argument: default, as text} in the table of defaults; "as `other`" takes those of the other."""
  rows = re.findall(
    r"^\| `(\w+)` \| (.*?) \| .*\n", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.MULTILINE
  )
  text = {name: cell for name, cell in rows if re.search(r"`\w+=|^as `|^none", cell)}

  def defaults(name):
    base = re.match(r"as `(\w+)`", text.get(name, ""))
    own = dict(re.findall(r"`(\w+)=([^`]+)`", text.get(name, "").split("; inside")[0]))
    return (defaults(base[1]) if base else {}) | own

  return {name: defaults(name) for name in text}


def test_documented_defaults_are_those_of_the_code():
  found = documented_defaults()
  assert len(found) > 30
  checked = 0
  for name, arguments in found.items():
    parameters = inspect.signature(js.get_algorithm(name)).parameters
    for argument, value in arguments.items():
      if argument in parameters and value not in parameters:  # `ramp_stop=stop` names another argument
        want = eval(value, vars(js).copy())
        default = parameters[argument].default
        assert default == want or default is None, f"{name}: {argument}={default!r}, not {want!r} as in docs/methods.md"
        checked += default is not None
  assert checked > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_text_exist(page):
  """`js.name` and `js.module.name` anywhere in the text are real."""
  for dotted in set(re.findall(r"\bjs\.([A-Za-z_][\w.]*\w)", page.read_text(encoding="utf-8"))):
    found = js
    for name in dotted.split("."):
      assert hasattr(found, name), f"{page.name} mentions js.{dotted}"
      found = getattr(found, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
  for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
    if not target.startswith("http"):
      assert (page.parent / target).exists(), f"{page.name} links to {target}"
