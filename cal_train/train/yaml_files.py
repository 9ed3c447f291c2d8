"""YAML that others wrote, with plain types only and of bounded size."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

_MOST_NODES = 100_000


def read_mapping(path: Path) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds; JSON is YAML.

    Raises:
        ValueError: If it holds none, or as `load_yaml`; names the file.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 among them
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of names to values, not a {type(values).__name__}")
    return values


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, with plain types only.

    Raises:
        ValueError: If it is not YAML, names a key twice (one would be lost), or is very large with its aliases written
            out: a few lines of aliases of aliases can stand for more than any memory holds.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_nodes(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _count_nodes(node: yaml.Node, counted: dict[int, int | None]) -> int:
    """Return the nodes below a node with aliases written out; ``counted`` holds None for nodes that are open."""
    if id(node) in counted:
        known = counted[id(node)]
        if known is None:
            raise yaml.YAMLError(f"a value contains itself{node.start_mark}")
        return known
    counted[id(node)] = None
    children: list[yaml.Node] = list(node.value) if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} is set twice{node.start_mark}")
        children = [child for pair in node.value for child in pair]
    total = 1 + sum(_count_nodes(child, counted) for child in children)
    if total > _MOST_NODES:
        raise yaml.YAMLError(f"more than {_MOST_NODES} values, aliases written out{node.start_mark}")
    counted[id(node)] = total
    return total
