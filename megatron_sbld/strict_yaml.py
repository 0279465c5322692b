"""YAML that users write: nothing is given twice, and a number is what it looks like.

A key that stands twice would wipe what the first one says, so it is refused. Plain words and numbers are read as YAML
1.2's core schema has them (1e-5 is a number, yes and on are words, 2024-01-01 is text), and what other readers take for
a number in another notation, as 0100, 0x10, 1_000 and 1:30, is refused. Anchors and merge keys work as in YAML 1.1.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"""[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$
    |[-+]?[0-9]+[eE][-+]?[0-9]+$
    |[-+]?\.(?:inf|Inf|INF)$
    |\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_OTHER_NOTATION = re.compile(
    r"""[-+]?(?:
    0[0-9_]+                                                # octal in YAML 1.1
    |0[oO][0-7_]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+
    |[0-9]+_[0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?            # base 60 in YAML 1.1
    )$""",
    re.VERBOSE,
)
_NUMBERS = "-+.0123456789"
_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's constructors with the resolvers below alone."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  # PyYAML's own way

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put merged keys in: a mapping's own win, then those of the mapping that is named first, as YAML 1.1 has it.

        PyYAML 6.0.4 compares keys by the identity of their text, and lets the last one win where that is not shared.
        """
        sources = [value for key, value in node.value if key.tag == _MERGE]
        own = node.value = [(key, value) for key, value in node.value if key.tag != _MERGE]
        merged: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
        for source in sources:
            for mapping in source.value if isinstance(source, yaml.SequenceNode) else [source]:
                if not isinstance(mapping, yaml.MappingNode):
                    what = f"what is merged in line {_line(mapping)} must be a mapping or a list of mappings"
                    raise yaml.constructor.ConstructorError(None, None, what, mapping.start_mark)
                self.flatten_mapping(mapping)
                for pair in mapping.value:
                    merged.setdefault(_name(pair[0]), pair)
        names = {_name(key) for key, _ in own}
        node.value = [*(pair for name, pair in merged.items() if name not in names), *own]


_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(f"{_TAG}int", _INTEGER, list(_NUMBERS))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list(_NUMBERS))
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])


class _Dumper(yaml.SafeDumper):
    """Puts text into quotes where the loader would not give it back as text."""


for _form in (_FLOAT, _OTHER_NOTATION):
    _Dumper.add_implicit_resolver(f"{_TAG}float", _form, list(_NUMBERS))


def load_yaml(text: str) -> Any:
    """What one document stands for.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a key stands twice in a mapping, or a number is in another notation; with the key and its lines.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump_yaml(content: Any) -> str:
    """Text that `load_yaml` and other readers take for the same content, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def check_notation(name: str, text: str) -> None:
    """Refuse a number in another notation than decimal digits. Raises ValueError with what to write."""
    if _OTHER_NOTATION.match(text):
        raise ValueError(
            f"{name}: {text} is not allowed: write a number in decimal digits, without leading zeros, underscores, "
            f"colons or letters, as {' or '.join(_meant(text))}; write text in quotes"
        )


def _check(node: yaml.Node, name: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and node.style is None:
        if node.tag == f"{_TAG}str":
            check_notation(f"{name or 'the file'} (line {_line(node)})", node.value)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value, start=1):
            _check(item, f"{name}[{number}]", seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, value in node.value:
            key_name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            full = f"{name}.{key_name}" if name else key_name
            if isinstance(key, yaml.ScalarNode):
                other = first.setdefault((key.tag, key.value), key)
                if other is not key:
                    advice = "write <<: [first, second]" if key.tag == _MERGE else "leave one out"
                    raise ValueError(f"{full} is given twice, in lines {_line(other)} and {_line(key)}: {advice}")
            _check(value, name if key.tag == _MERGE else full, seen)


def _name(key: yaml.Node) -> object:
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _meant(text: str) -> list[str]:
    """The numbers that a notation may stand for, in decimal digits."""
    sign, digits = ("-", text[1:]) if text[0] == "-" else ("", text.lstrip("+"))
    digits = digits.replace("_", "")
    if ":" in digits:
        total = 0.0
        for part in digits.split(":"):
            total = 60 * total + float(part or 0)
        return [f"{sign}{total:g}"]
    if digits[:2].lower() in ("0o", "0x", "0b"):
        return [f"{sign}{int(digits, 0)}"] if digits[2:] else ["16"]
    if "." in digits or "e" in digits.lower():
        return [f"{sign}{digits}"]
    plain = digits.lstrip("0") or "0"
    octal = digits.startswith("0") and plain != "0" and not set(digits) & set("89")
    return [f"{sign}{plain}", *([f"{sign}{int(digits, 8)} (octal)"] if octal else [])]
