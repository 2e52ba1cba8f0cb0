"""How recipes inherit and how `--set` changes them.

A recipe and those it `extends` are files in a row: parents in the order they are named, each
behind its own parents, and the recipe last; a file that is reached twice stands where it is
reached first.  Each is merged over all before it.
A parent is a file below the recipe's folder or, as `preset:NAME`, one that ships with the package.
Mappings merge key by key; lists and scalars of a later file replace those of the earlier ones.
A key written with a trailing `+` appends to the list that the earlier files gave instead.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from carnice_build.errors import RecipeError, nearest
from carnice_build.recipe.presets import PREFIX, presets, shown
from carnice_build.yaml_tree import MAX_DEPTH, Node, parse_tree, read_tree

MAX_PARENTS = 16


def read_with_parents(path: Path) -> Node:
    """The recipe at `path` merged over the recipes it `extends`, the last one named nearest."""
    files: dict[Path, Node] = {}
    _collect(path, (), files)
    merged = Node({}, "")
    for tree in files.values():
        merged = merge(merged, tree)
    assert isinstance(merged.value, dict)
    merged.value.pop("extends", None)
    return merged


def _collect(path: Path, children: tuple[Path, ...], files: dict[Path, Node]) -> None:
    """Add the file at `path` to `files`, after its parents; `children` are those that extend it."""
    tree, place = _mapping_at(path), path.resolve()
    for parent in _parents(tree, path):
        if parent.resolve() in (*children, place):
            raise RecipeError("extends itself", where=tree.where)
        if parent.resolve() in files:
            continue
        if len(files) + len(children) >= MAX_PARENTS:
            raise RecipeError(f"extends more than {MAX_PARENTS} others", where=tree.where)
        _collect(parent, (*children, place), files)
    files[place] = tree


def _mapping_at(path: Path) -> Node:
    tree = read_tree(path, shown(path))
    if not isinstance(tree.value, dict):
        raise RecipeError("is not a mapping", where=tree.where, expected="keys and values")
    return tree


def _parents(tree: Node, path: Path) -> list[Path]:
    assert isinstance(tree.value, dict)
    node = tree.value.get("extends")
    if node is None:
        return []
    names = node.value if isinstance(node.value, list) else [node]
    return [_parent(name, path) for name in names]


def _parent(node: Node, path: Path) -> Path:
    if not isinstance(node.value, str):
        raise RecipeError("extends is not a file name", where=node.where)
    if node.value.startswith(PREFIX):
        return _preset(node.value, node.where)
    pure = PurePosixPath(node.value)
    if pure.is_absolute() or ".." in pure.parts or "\0" in node.value:
        raise RecipeError(
            f"extends {node.value!r}, which is outside the recipe's folder", where=node.where
        )
    parent = path.parent / pure
    if not _is_file(parent):
        names = [item.relative_to(path.parent).as_posix() for item in path.parent.rglob("*.yaml")]
        names += _preset_names()
        raise RecipeError(
            f"extends {node.value!r}, which does not exist",
            where=node.where,
            nearest=nearest(node.value, names),
        )
    return parent


def _preset(name: str, where: str) -> Path:
    found = presets().get(name.removeprefix(PREFIX))
    if found is None:
        raise RecipeError(
            f"extends {name!r}, which is no preset",
            where=where,
            expected="one of those that `carnice new --list` shows",
            nearest=nearest(name, _preset_names()),
        )
    return found


def _preset_names() -> list[str]:
    return [PREFIX + name for name in presets()]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def merge(parent: Node, child: Node) -> Node:
    """`child` over `parent`; what neither rule covers is the child's."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    table = dict(parent.value)
    for key, node in child.value.items():
        if key.endswith("+"):
            table[key[:-1]] = _append(table.get(key[:-1]), node)
        elif key in table:
            table[key] = merge(table[key], node)
        else:
            table[key] = merge(Node({}, node.where), node)
    return Node(table, child.where)


def _append(current: Node | None, addition: Node) -> Node:
    old = current.value if current else []
    if not isinstance(old, list):
        raise RecipeError("cannot append: the value is not a list", where=addition.where)
    new = addition.value if isinstance(addition.value, list) else [addition]
    return Node([*old, *new], current.where if current else addition.where)


def override(tree: Node, assignment: str) -> Node:
    """Apply one `--set PATH=VALUE` to `tree`.

    PATH is keys and list positions joined by dots; a trailing `+` appends to a list.
    VALUE is YAML.
    """
    where = f"--set {assignment}"
    path, separator, text = assignment.partition("=")
    parts = path.strip().split(".")
    if not separator or not all(parts) or len(parts) > MAX_DEPTH:
        raise RecipeError("is not PATH=VALUE", where=where)
    value = parse_tree(text, where, fixed_where=where)
    return _assign(tree, parts, value, where)


def _assign(node: Node, parts: list[str], value: Node, where: str) -> Node:
    head, rest = parts[0], parts[1:]
    if isinstance(node.value, list):
        if not head.isdecimal() or len(head) > 6 or int(head) >= len(node.value):
            raise RecipeError(
                f"{head!r} is not a position in the list",
                where=where,
                expected=f"0 to {len(node.value) - 1}",
            )
        items = list(node.value)
        items[int(head)] = _assign(items[int(head)], rest, value, where) if rest else value
        return Node(items, node.where)
    if not isinstance(node.value, dict):
        raise RecipeError(f"{head!r} is below a value that has no keys", where=where)
    if not rest:
        return merge(node, Node({head: value}, node.where))
    child = node.value.get(head, Node({}, where))
    return Node({**node.value, head: _assign(child, rest, value, where)}, node.where)
