"""The page that says what works with what is what the check of a configuration says."""

from random import Random

import pytest

from tools.write_support_matrix import KINDS, PAGE, document, pairs, refusal

SOME = 12


def test_the_page_is_of_this_check() -> None:
    """A part of the pairs, drawn anew each time the features change; all of them in the full suite."""
    page, every = PAGE.read_text(), pairs()
    for a, b in Random(len(every)).sample(every, SOME):
        why = refusal(a, b)
        row = f"| {a.name} | {b.name} | "
        assert (row in page) == bool(why), f"{a.name}, {b.name}: {why or 'accepted'}: run python tools/write_support_matrix.py"
        assert not why or f"{row}{why.splitlines()[0]}"[:120] in page


def test_all_features_are_named() -> None:
    page = PAGE.read_text()
    assert all(f"{feature.name} (`" in page for of_kind in KINDS.values() for feature in of_kind)


@pytest.mark.full
def test_the_whole_page() -> None:
    assert PAGE.read_text() == document(), "run python tools/write_support_matrix.py"
