"""Writes the index at the top of docs/log.md: what was measured when, and all negative results, each with a link to its entry.

python tools/write_log_index.py             after an entry was added
python tools/write_log_index.py --check     exit code 1 if the index isn't what the entries say

An entry begins with "## DATE...: title".  A negative result is a sentence that begins with **Negative**.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "log.md"
BEGIN, END = "<!-- index -->\n", "<!-- end of the index -->\n"
MOST_LETTERS = 240  # of a negative result here


@dataclass(frozen=True, slots=True)
class Entry:
    heading: str
    text: str

    @property
    def anchor(self) -> str:
        """As GitHub and Python-Markdown make it of a heading."""
        return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", self.heading.lower()).strip())

    @property
    def when(self) -> str:
        return self.heading.partition(":")[0]

    @property
    def title(self) -> str:
        return self.heading.partition(":")[2].strip()

    @property
    def negatives(self) -> list[str]:
        """In the order of the text, each from its first word on, without the one that marks it."""
        out = []
        for paragraph in re.split(r"\n\s*\n", self.text):
            words = " ".join(paragraph.split())
            for found in re.finditer(r"\*\*Negative(?P<bold>[^*]*)\*\*[:.]?\s*", words):
                bold = found["bold"].lstrip(": ")
                rest = words[found.end() :].partition("**Negative")[0]
                out.append(shortened(bold if bold.strip(". ") else rest))
        return out


def shortened(text: str) -> str:
    """Its first sentence, and of a long one the beginning."""
    text = re.split(r"(?<=[a-z0-9)`%])\.\s", text, maxsplit=1)[0].rstrip(". ")
    if len(text) > MOST_LETTERS:
        text = text[:MOST_LETTERS].rsplit(" ", 1)[0].rstrip(",;:") + " ..."
    return text + "`" * (text.count("`") % 2)


def entries_of(page: str) -> list[Entry]:
    """The newest first, as they stand."""
    parts = re.split(r"^## ", page.partition(END)[2] or page, flags=re.M)[1:]
    return [Entry(heading.strip(), text) for heading, _, text in (part.partition("\n") for part in parts)]


def index_of(entries: Sequence[Entry]) -> str:
    lines = [BEGIN, "| when | what was measured |\n", "|---|---|\n"]
    lines += [f"| {entry.when} | [{entry.title}](#{entry.anchor}) |\n" for entry in entries]
    lines += ["\n**Negative results**, the newest first:\n\n"]
    lines += [f"- {text} ([{entry.when}](#{entry.anchor}))\n" for entry in entries for text in entry.negatives]
    return "".join([*lines, "\n", END])


def with_index(page: str) -> str:
    """The page with the index of its entries, before the first of them."""
    index = index_of(entries_of(page))
    if BEGIN in page:
        return page.partition(BEGIN)[0] + index + page.partition(END)[2]
    head, mark, rest = page.partition("\n## ")
    return f"{head}\n{index}{mark}{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    page = PAGE.read_text()
    if args.check:
        if page != with_index(page):
            print(f"{PAGE.name}: the index isn't what the entries say: run python tools/write_log_index.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(with_index(page))
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
