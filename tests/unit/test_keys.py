"""The names that the scripts compute are those of shared/keys.py; their headers tell the truth."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from shared import keys
from shared.store import SCRIPTS

FOLDER = Path(__file__).parents[2] / "shared" / "scripts"
NAMES = sorted(path.stem for path in FOLDER.glob("*.lua"))
# A string that begins with the prefix, and whatever is joined to it.
_KEY = re.compile(r"'rts:[^']*'(?:\s*\.\.\s*(?:'[^']*'|\w+(?:\.\w+|\[[^\]]*\])*))*")


def lines_of(name: str) -> list[str]:
    """A script without the line that is for the server."""
    lines = (FOLDER / f"{name}.lua").read_text().splitlines()
    return lines if name == "common" else lines[1:]


def header(name: str) -> str:
    """The comment at the top of a script."""
    lines = lines_of(name)
    n = next(i for i, line in enumerate(lines) if not line.startswith("--"))
    return "\n".join(lines[:n])


def code(name: str) -> str:
    """A script without its comments."""
    lines = lines_of(name)
    return "\n".join(line for line in lines if not line.lstrip().startswith("--"))


def shape(expression: str) -> str:
    """A key's form: every variable part is a question mark."""
    parts = []
    for part in re.split(r"\s*\.\.\s*", expression):
        # A queue is a model version and a class.
        parts.append(part[1:-1] if part.startswith("'") else "?:?" if part == "queue" else "?")
    return "".join(parts).replace("?@?", "?")


def shapes_of_keys() -> dict[str, str]:
    """Form -> name, of everything in shared/keys.py."""
    shapes = {}
    for name, value in vars(keys).items():
        if inspect.isfunction(value) and name != "model_version":
            shapes[value(*["?"] * len(inspect.signature(value).parameters))] = name
        elif isinstance(value, str) and value.startswith(keys.PREFIX) and value != keys.PREFIX:
            shapes[value] = name
    return shapes


def kinds(text: str) -> set[str]:
    """What comes after the prefix: r, l, q, lane..."""
    return set(re.findall(r"\brts:(\w+)", text))


def touched() -> dict[str, set[str]]:
    """Function of common.lua -> the kinds of keys it touches, by itself or through another one."""
    parts = re.split(r"^local function (\w+)", code("common"), flags=re.M)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    found: dict[str, set[str]] = {}
    # Lua needs a function above those that call it.
    for name, body in bodies.items():
        found[name] = kinds(body) | calls(body, found)
    return found


def calls(text: str, functions: dict[str, set[str]]) -> set[str]:
    called = [touches for name, touches in functions.items() if re.search(rf"\b{name}\(", text)]
    return set().union(*called)


def test_there_is_a_file_for_each_script() -> None:
    assert {*NAMES} == {*SCRIPTS, "common"}


@pytest.mark.parametrize("name", NAMES)
def test_names_agree_with_keys(name: str) -> None:
    known = shapes_of_keys()
    for expression in _KEY.findall(code(name)):
        assert shape(expression) in known, expression


def test_every_literal_is_seen() -> None:
    for name in NAMES:
        assert code(name).count("'rts:") == len(_KEY.findall(code(name)))
        assert '"rts:' not in code(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_lists_the_keys(name: str) -> None:
    functions = touched()
    text = header(name)
    listed = kinds(text)
    if "those of finish()" in text:
        listed |= functions["finish"]
    body = code(name)
    assert listed == kinds(body) | (calls(body, functions) if name != "common" else set())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "common"])
def test_the_header_tells_arguments_and_return_codes(name: str) -> None:
    assert re.search(r"^-- Keys: ", header(name), re.M)
    assert re.search(r"^-- ARGV: ", header(name), re.M)
    assert re.search(r"^-- Returns ", header(name), re.M)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "common"])
def test_the_first_line_tells_the_server_whether_it_writes(name: str) -> None:
    first, _, _ = (FOLDER / f"{name}.lua").read_text().partition("\n")
    assert first == "#!lua"


@pytest.mark.parametrize("name", NAMES)
def test_scripts_keep_the_rules(name: str) -> None:
    text = code(name)
    # Return codes instead; and only integers and strings survive a reply.
    assert "error_reply" not in text
    # Every variable is local: a script must leave nothing to the next one.
    assert not re.findall(r"^function \w+\(", text, re.M)
    # The order of a table's pairs is not the same everywhere.
    assert not re.search(r"\bpairs\(", text.replace("ipairs(", ""))


def test_constants_agree() -> None:
    common = code("common")
    classes = re.search(r"CLASSES = \{(.*?)\}", common)
    assert classes
    assert tuple(re.findall(r"'(\w+)'", classes[1])) == keys.CLASSES
    assert f"local GROUP = '{keys.GROUP}'" in common
    assert f"local NOBODY = '{keys.NOBODY}'" in common


def test_every_key_says_what_it_is() -> None:
    source = inspect.getsource(keys)
    kinds_of_value = ("Stream", "List", "Hash", "Sorted set", "String", "Set", "Channel")
    for name in shapes_of_keys().values():
        value = getattr(keys, name)
        if inspect.isfunction(value):
            doc = value.__doc__ or ""
        else:
            doc = re.search(rf'^{name} = .*\n"""(.*)"""', source, re.M)[1]
        assert doc.startswith(kinds_of_value), name


def test_names_are_distinct() -> None:
    examples = [re.sub(r"\?", "x", form) for form in shapes_of_keys()]
    assert len(set(examples)) == len(examples)
    assert keys.model_version("llama", "2") == "llama@2"
    assert keys.lane("llama@2", "high", "alice") == "rts:lane:llama@2:high:alice"
