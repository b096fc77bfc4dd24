"""How hard the pages are to read: the length of their sentences, now and at an earlier commit.

    python benchmarks/readability.py --before f1393fd
    python benchmarks/readability.py --before f1393fd docs/design.md docs/simulator.md

Code, tables, headings and addresses don't count.  A sentence ends with a full stop, a question or an exclamation mark; an item
of a list is a sentence.  `stumbles`: words by which a native reader notices that a page was written by somebody who isn't one
("whoever", "likewise", "told", ...), per thousand words.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "design", "simulator", "strategies", "inference", "locality", "pipelines", "when-does-scheduling-pay", "reliability",
            "cluster",
        )
    ),
)  # fmt: skip
LONG = 30  # words
STUMBLES = re.compile(r"\b(whoever|nobody|likewise|told|tells|such an?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Figures:
    """Of one page: `words_per_sentence` is the mean, `long_share` is of sentences of more than `LONG` words, 0 to 1."""

    words: int
    words_per_sentence: float
    long_share: float
    stumbles: float


def sentences_of(page: str) -> list[list[str]]:
    """The words of each sentence of a page in Markdown."""
    page = re.sub(r"^(```|~~~).*?^\1\s*$", "", page, flags=re.S | re.M)
    page = re.sub(r"<[^>]+>|\$\$.*?\$\$", "", page, flags=re.S)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"`[^`]*`", "code", page)
    paragraphs, current = [], ""
    for line in page.splitlines():
        text = line.strip()
        if not text or text.startswith(("|", "#", "---", "!!!", "===")):
            paragraphs.append(current)
            current = ""
        elif re.match(r"([-*+]|\d+\.)\s", text):
            paragraphs.append(current)
            current = re.sub(r"^([-*+]|\d+\.)\s+", "", text)
        else:
            current += " " + text
    paragraphs.append(current)
    found = []
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])[\"')*_]*\s+(?=[A-Z\"'(*_]|code)", paragraph):
            if words := re.findall(r"[A-Za-z][A-Za-z'-]*|\d[\d.,]*", sentence):
                found.append(words)
    return found


def figures_of(page: str) -> Figures:
    """Raises ValueError when the page has no sentence."""
    sentences = sentences_of(page)
    if not sentences:
        raise ValueError("the page has no sentence")
    words = sum(map(len, sentences))
    text = " ".join(" ".join(sentence) for sentence in sentences)
    return Figures(
        words,
        words / len(sentences),
        sum(len(sentence) > LONG for sentence in sentences) / len(sentences),
        1000 * len(STUMBLES.findall(text)) / words,
    )


def at_commit(commit: str, path: str) -> str | None:
    """The page as it was then; None when it wasn't there.  Raises ValueError for a commit that isn't there."""
    known = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True, check=False)
    if known.returncode:
        raise ValueError(f"git knows no commit {commit!r} here: a shallow clone has few; git fetch --unshallow")
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return None if shown.returncode else shown.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="compare with the pages of this commit")
    parser.add_argument("pages", nargs="*", default=PAGES, metavar="PAGE", help="default: ten of the longest")
    args = parser.parse_args(arguments)
    print("| page | words | words per sentence | sentences above 30 words | stumbles per 1,000 words |\n|---|---|---|---|---|")
    for path in args.pages:
        try:
            now = figures_of((ROOT / path).read_text())
            then = at_commit(args.before, path) if args.before else None
            both = [figures_of(then), now] if then is not None else [now]
        except (OSError, ValueError) as error:
            sys.exit(f"readability: {path}: {error}")
        columns = (
            [f"{f.words:,}" for f in both],
            [f"{f.words_per_sentence:.1f}" for f in both],
            [f"{f.long_share:.0%}" for f in both],
            [f"{f.stumbles:.1f}" for f in both],
        )
        print(f"| {path} | " + " | ".join(" → ".join(column) for column in columns) + " |")


if __name__ == "__main__":
    main()
