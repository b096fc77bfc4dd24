"""What somebody may have meant who wrote a word that there isn't."""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the nearest of `words`, or nothing when none is near."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""
