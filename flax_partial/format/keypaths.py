"""Tree paths, the names of leaves, and which leaves cannot stand in one tree.

A leaf's *name* is its keys' texts joined with a dot, as Orbax does; its *prefix* is where its
chunks are in the database. Invariant of a `KeyTree`: no two of its leaves share a prefix, no leaf
is also a subtree, and no node has both list and mapping children. Adding or removing a path costs
time linear in its length, whatever the tree holds already.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

from jax import tree_util
from msgspec import Struct, field

from flax_partial.errors import UnsupportedLeafError, first_few

STR_KEY, INT_KEY, ATTRIBUTE, INDEX = "d", "i", "a", "s"
TEXT_KEYS = frozenset((STR_KEY, ATTRIBUTE))
KEY_KINDS = frozenset((STR_KEY, INT_KEY, ATTRIBUTE, INDEX))


class KeyPath(Struct, gc=False):
    """Path from the root of a tree to a leaf.

    Attributes:
      texts: The keys as text, outermost first; integers in decimal.
      key_kinds: One letter a key: `d` and `i` for a dictionary's string and integer keys, `a` for
        an attribute, `s` for an index of a list or tuple.
    """

    texts: tuple[str, ...] = field(name="path")
    key_kinds: str = field(name="keys")

    @property
    def name(self) -> str:
        """The leaf's name: its keys joined with a dot."""
        return ".".join(self.texts)


def is_leaf(node: object) -> bool:
    """Whether a node that JAX does not take for a leaf is one here: None, and empty containers.

    An empty container of a type that JAX has not registered is a leaf to JAX, and of no kind here.
    """
    is_empty = isinstance(node, (list, tuple, Mapping)) and not node
    return node is None or (is_empty and not tree_util.all_leaves([node]))


def values_of(tree: Any) -> tuple[list[Any], tree_util.PyTreeDef]:
    """Returns what JAX takes for the leaves of a tree, and its structure, in which the others are.

    Raises:
      UnsupportedLeafError: JAX cannot flatten it: keys of one dict cannot be compared, or it is
        nested too deeply, or in itself.
    """
    try:
        return _flatten_with_room(tree)
    except ValueError as error:
        raise _cannot_flatten(tree, error) from error


def flatten(tree: Any) -> tuple[list[KeyPath], list[Any], tree_util.PyTreeDef]:
    """Returns the paths of a tree's leaves, the leaves, and its structure.

    Raises:
      UnsupportedLeafError: As for `values_of`, and where a key is neither text nor an integer, or
        cannot be encoded as UTF-8.
    """
    values_of(tree)
    found, structure = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = list(_converted(path for path, _ in found))
    return paths, [leaf for _, leaf in found], structure


def _cannot_flatten(tree: Any, error: ValueError) -> UnsupportedLeafError:
    nodes, _ = tree_util.tree_flatten_with_path(tree, is_leaf=_cannot_be_sorted)
    where = [tree_util.keystr(path) for path, node in nodes if _cannot_be_sorted(node)]
    return UnsupportedLeafError(
        f"JAX cannot flatten this tree: {error} The keys of one dict must be all strings, or "
        f"all integers; those of {', '.join(map(repr, where))} are not."
    )


def _flatten_with_room(tree: Any, *, frames: int = 24) -> tuple[list[Any], tree_util.PyTreeDef]:
    """Refuses what is nested too deeply, with some frames to spare for what is called later.

    With `is_leaf` a tree that is too deep must not get to JAX (0.10.2): the thread would be left
    with a recursion depth that is used up for good, so that no further call of anything succeeds.
    """
    if frames:
        return _flatten_with_room(tree, frames=frames - 1)
    try:
        return tree_util.tree_flatten(tree)
    except (RecursionError, SystemError) as error:
        way_out = "Make it flatter."
        if sys.version_info < (3, 12):  # later versions bound the depth of C code by themselves
            limit = sys.getrecursionlimit()
            way_out = f"Make it flatter, or raise Python's recursion limit, which is {limit}."
        raise UnsupportedLeafError(
            f"This tree is nested in itself, or deeper than JAX can flatten. {way_out}"
        ) from error


def _cannot_be_sorted(node: object) -> bool:
    if not isinstance(node, Mapping):
        return False
    try:
        sorted(node)
    except TypeError:
        return True
    return False


def _converted(paths: Iterable[tuple[Any, ...]]) -> Iterator[KeyPath]:
    """Converts the key paths of one tree; the keys above siblings are converted once."""
    stem: tuple[Any, ...] = ()
    above: tuple[str, ...] = ()
    kinds_above = ""
    for path in paths:
        if not path:
            yield KeyPath((), "")
            continue
        if path[:-1] != stem:
            stem = path[:-1]
            keys = [_convert(key, path) for key in stem]
            above = tuple([text for text, _ in keys])
            kinds_above = "".join([kind for _, kind in keys])
        text, kind = _convert(path[-1], path)
        yield KeyPath((*above, text), sys.intern(kinds_above + kind))


def _convert(key: object, path: tuple[Any, ...]) -> tuple[str, str]:
    match key:
        case tree_util.DictKey(key=str(text)):
            kind = STR_KEY
        case tree_util.DictKey(key=int(number)) if not isinstance(number, bool):
            return _decimal(number, path), INT_KEY
        case tree_util.GetAttrKey(name=str(text)):
            kind = ATTRIBUTE
        case tree_util.SequenceKey(idx=number) | tree_util.FlattenedIndexKey(key=number):
            return str(number), INDEX
        case _:
            raise UnsupportedLeafError(
                f"Key {key!r} in {tree_util.keystr(path)!r} is a {_key_type(key)}: keys must be "
                "strings or integers. Rename it, for example with str()."
            )
    if not text.isascii():
        _require_utf8(text, path)
    return str.__str__(text), kind  # of an enum's member, its text, and not its name


def _decimal(number: int, path: tuple[Any, ...]) -> str:
    try:
        return str(int(number))  # of an enum's member, its number, and not its name
    except ValueError as error:
        raise UnsupportedLeafError(
            f"An integer key beside {tree_util.keystr(path[:-1])!r} is longer than Python writes."
        ) from error


def _key_type(key: object) -> str:
    return type(getattr(key, "key", key)).__name__


def _require_utf8(text: str, path: tuple[Any, ...]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedLeafError(
            f"Key {text!r} in {tree_util.keystr(path)!r} holds a lone surrogate, which UTF-8 "
            "cannot encode. Rename it."
        ) from error


def prefix_of(name: str) -> str:
    """Returns the prefix of the chunks of the leaf called `name`.

    zarr adds a slash only where none is, and to tensorstore a slash alone is the root.
    """
    stem = name.removesuffix("/")
    return stem and stem + "/"


class _Node(Struct, gc=False):
    """What has children: by their keys' texts further nodes, or None for a leaf.

    Attributes:
      is_list: Whether the keys are indices; None as long as there are no children.
      children: The children.
      places: Number of placeholders that hold the node, even where it has no children.
    """

    is_list: bool | None
    children: "_Children"
    places: int = 0


_Children = dict[str, _Node | None]


class KeyTree:
    """The tree that a set of leaves forms, to which leaves are added and from which they go."""

    def __init__(self) -> None:
        self._owners: dict[str, KeyPath] = {}  # by their names without a last slash
        self._top: _Children = {}  # the root, under the empty text
        self._last: tuple[tuple[str, ...], str, _Children] | None = None  # node of the last leaf

    def __bool__(self) -> bool:
        """Whether it holds anything, be it a leaf or an empty container."""
        return bool(self._top)

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, name: str) -> bool:
        return name.removesuffix("/") in self._owners

    def problem_with(self, path: KeyPath) -> str | None:
        """Returns why `path` cannot be added; None if it can, or is there already."""
        return self._walk(path, adds=False)

    def add(self, path: KeyPath) -> str | None:
        """Adds a leaf; returns why it cannot be added, and then changes nothing."""
        return self._walk(path, adds=True)

    def add_place(self, path: KeyPath) -> str | None:
        """Adds an empty container, which leaves may fill or replace; where it cannot be, as `add`.

        Nothing is added where a leaf stands.
        """
        found = self._parent_of(path, adds=True)
        if not isinstance(found, tuple):
            return found
        children, text = found
        if text not in children:
            children[text] = _Node(None, {})
        if (node := children[text]) is not None:
            node.places += 1
        return None

    def _walk(self, path: KeyPath, *, adds: bool) -> str | None:
        stem = path.name.removesuffix("/")
        owner = self._owners.get(stem)
        if owner is not None:
            return _problem_with_owner(owner, path)
        found = self._parent_of(path, adds=adds)
        if not isinstance(found, tuple):
            return found
        children, text = found
        node = children.get(text)
        if node is not None and node.children:
            return _leaf_and_subtree(path.name, path.name + "." + next(iter(node.children)))
        if adds:
            self._owners[stem] = path
            if node is not None:
                self._last = None  # it may be that node
            children[text] = None
        return None

    def _parent_of(self, path: KeyPath, *, adds: bool) -> tuple[_Children, str] | str | None:
        """Returns where the leaf belongs, and under which text; why nowhere; or None."""
        stem, last = path.texts[:-1], self._last
        if last is not None and last[0] == stem and last[1] == path.key_kinds:
            return last[2], path.texts[-1]
        children, text = self._top, ""
        for depth, (inner, kind) in enumerate(zip(path.texts, path.key_kinds, strict=True)):
            node = children.get(text)
            if node is None:
                if text in children:
                    return _leaf_and_subtree(".".join(path.texts[:depth]), path.name)
                if not adds:
                    return None
                node = children[text] = _Node(kind == INDEX, {})  # below it nothing can conflict
            elif node.is_list is None:
                if not adds:
                    return None
                node.is_list = kind == INDEX
            elif node.is_list != (kind == INDEX):
                return _mixed(".".join(path.texts[:depth]), path.name)
            children, text = node.children, inner
        if stem:
            self._last = stem, path.key_kinds, children
        return children, text

    def discard(self, path: KeyPath) -> None:
        """Removes a leaf, and the nodes that have no other leaf."""
        del self._owners[path.name.removesuffix("/")]
        self._prune(self._way_to(path))

    def discard_place(self, path: KeyPath) -> None:
        """Removes an empty container, unless a leaf has taken its place."""
        children, text = (way := self._way_to(path))[-1]
        if (node := children.get(text)) is not None:
            node.places -= 1
            self._prune(way)

    def _way_to(self, path: KeyPath) -> list[tuple["_Children", str]]:
        """For each node on the way to a path, what it lies in, and under which text."""
        children, way = self._top, []
        for text in ("", *path.texts):
            way.append((children, text))
            node = children.get(text)
            children = {} if node is None else node.children
        return way

    def _prune(self, way: list[tuple["_Children", str]]) -> None:
        self._last = None
        for children, text in reversed(way):
            node = children.get(text)
            if node is not None and (node.children or node.places > 0):
                if not node.children:
                    node.is_list = None
                return
            children.pop(text, None)

    def has_inside(self, path: KeyPath) -> bool:
        """Whether anything lies inside of `path`."""
        node = self._top.get("")
        for text in path.texts:
            if node is None:
                return False
            node = node.children.get(text)
        return node is not None and bool(node.children)

    def gaps(self) -> Iterator[str]:
        """Returns which lists lack an element; linear in the tree, whatever its indices are."""
        root = self._top.get("")
        stack: list[tuple[_Trail | None, _Node]] = [(None, root)] if root else []
        while stack:
            trail, node = stack.pop()
            if node.is_list:
                indices = sorted(map(int, node.children))
                if indices[-1] >= len(indices):
                    yield (
                        f"List {_joined(trail)!r} has element {indices[-1]} but lacks "
                        f"{_absent(indices)}. Save what is missing, or use a dict."
                    )
            inner = node.children.items()
            stack.extend(((trail, text), child) for text, child in inner if child is not None)


def form_tree(paths: Sequence[KeyPath]) -> bool:
    """Whether paths are distinct and the leaves of one tree; its lists may lack elements."""
    tree = KeyTree()
    return not any(map(tree.add, paths)) and len(tree) == len(paths)


_Trail = tuple["_Trail | None", str]  # the way to a node, innermost key first


def _joined(trail: _Trail | None) -> str:
    texts = []
    while trail is not None:
        trail, text = trail
        texts.append(text)
    return ".".join(reversed(texts))


def _absent(indices: list[int]) -> str:
    """Names the first few indices that are not among ascending ones, and counts the others."""
    gaps = (range(a + 1, b) for a, b in pairwise([-1, *indices]))
    absent = map(str, chain.from_iterable(gaps))
    return ", ".join(first_few(absent, most=5, count=indices[-1] + 1 - len(indices)))


def _problem_with_owner(owner: KeyPath, path: KeyPath) -> str | None:
    """Returns how a leaf conflicts with another of its name; nothing if both are one."""
    if owner.texts != path.texts:
        return _same_name(owner, path)
    for depth, (one, other) in enumerate(zip(owner.key_kinds, path.key_kinds, strict=True)):
        if (one == INDEX) != (other == INDEX):
            return _mixed(".".join(path.texts[:depth]), path.name)
    return None


def _same_name(one: KeyPath, other: KeyPath) -> str:
    return (
        f"Leaves {one.texts} and {other.texts} would both be stored as {other.name!r}: keys are "
        "joined with '.', and a trailing '/' does not count. Rename one of them."
    )


def _leaf_and_subtree(leaf: str, inner: str) -> str:
    return (
        f"{leaf!r} is a leaf, and {inner!r} lies inside it: a leaf cannot also be a subtree. "
        "Rename one of them, or abort the session to start over."
    )


def _mixed(node: str, name: str) -> str:
    return (
        f"Leaf {name!r}: node {node!r} has both list and dict children. Save all of them under "
        "a list, or all under a dict."
    )
