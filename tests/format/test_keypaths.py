"""Names of leaves, and which of them cannot stand in one tree, against a model by brute force."""

from __future__ import annotations

from itertools import combinations, starmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_partial.errors import UnsupportedLeafError
from flax_partial.format.keypaths import KeyPath, KeyTree, flatten, form_tree, prefix_of

_KEYS = st.tuples(st.sampled_from(("a", "b", "a.b", "0", "1", "a/", "")), st.sampled_from("ds"))
_INDICES = st.tuples(st.sampled_from(("0", "1", "2")), st.just("s"))
paths = st.lists(st.one_of(_KEYS.filter(lambda key: key[1] == "d"), _INDICES), max_size=3).map(
    lambda keys: KeyPath(tuple(text for text, _ in keys), "".join(kind for _, kind in keys))
)


def collide(one: KeyPath, other: KeyPath) -> bool:
    """The rule, for two leaves, as one would write it down."""
    if one.texts == other.texts:  # the same leaf, in the same containers
        return [kind == "s" for kind in one.key_kinds] != [kind == "s" for kind in other.key_kinds]
    if prefix_of(one.name) == prefix_of(other.name):
        return True
    shared = 0
    while shared < min(len(one.texts), len(other.texts)):
        if (one.key_kinds[shared] == "s") != (other.key_kinds[shared] == "s"):
            return True  # list and dict children under one node
        if one.texts[shared] != other.texts[shared]:
            return False
        shared += 1
    return True  # one lies inside the other


@given(st.lists(paths, max_size=8), st.data())
def test_tree_finds_every_conflict_and_no_other(
    candidates: list[KeyPath], data: st.DataObject
) -> None:
    tree, held = KeyTree(), []
    for path in candidates:
        if held and data.draw(st.integers(0, 3)) == 0:
            gone = held.pop(data.draw(st.integers(0, len(held) - 1)))
            tree.discard(gone)
        expected = any(collide(path, other) for other in held)
        assert (tree.problem_with(path) is not None) == expected
        assert (path.name in tree) == any(
            prefix_of(path.name) == prefix_of(other.name) for other in held
        )
        assert (tree.add(path) is not None) == expected  # and then it changes nothing
        if not expected and path.texts not in [other.texts for other in held]:
            held.append(path)
    gaps = list(tree.gaps())
    lists: dict[tuple[str, ...], set[int]] = {}
    for path in held:
        for depth, kind in enumerate(path.key_kinds):
            if kind == "s":
                lists.setdefault(path.texts[:depth], set()).add(int(path.texts[depth]))
    assert len(gaps) == sum(indices != set(range(len(indices))) for indices in lists.values())


@given(st.lists(paths, max_size=5))
def test_paths_form_a_tree_where_no_two_are_the_same_or_collide(candidates: list[KeyPath]) -> None:
    distinct = len({path.texts for path in candidates}) == len(candidates)
    pairs = combinations(candidates, 2)
    assert form_tree(candidates) == (distinct and not any(starmap(collide, pairs)))


def test_names_join_keys_of_every_type() -> None:
    tree = {"a": [{1: 0}, (0,)], "b.c": 0}
    found, leaves, _ = flatten(tree)
    assert leaves == [0, 0, 0]
    assert [path.name for path in found] == ["a.0.1", "a.1.0", "b.c"]
    assert [path.key_kinds for path in found] == ["dsi", "dss", "d"]


# Not None: JAX 0.8 makes no DictKey of it.
@pytest.mark.parametrize("key", [1.5, True, b"x", ("a",), "\ud800"], ids=repr)
def test_key_that_is_no_text_or_integer_is_refused(key: object) -> None:
    with pytest.raises(UnsupportedLeafError):
        flatten({"outer": {key: 0}})
