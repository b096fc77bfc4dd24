"""Held-out documents as text."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megalina.data.gpt_dataset import Span
from megalina.data.indexed import IndexedDataset
from megalina.data.tokenizer import Tokenizer

MOST_TOKENS = 1 << 15  # of a document
MOST_DOCUMENTS = 256
MOST_TOKENS_OF_ALL = 1 << 19


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """The documents of some spans, in order."""

    spans: Sequence[tuple[IndexedDataset, Span]]
    tokenizer: Tokenizer

    def documents(self, *, seed: int) -> list[str]:
        """Texts of documents spread evenly over the spans, `MOST_DOCUMENTS` and `MOST_TOKENS_OF_ALL` at most; long ones are cut.

        Which ones is a function of the seed where there are more.  What an end of document divides are several."""
        ends = list(accumulate(span.last_document - span.first_document for _, span in self.spans))
        count, out, total = min(ends[-1], MOST_DOCUMENTS), list[str](), 0
        for k in range(count):
            number = (seed + k * ends[-1] // count) % ends[-1]
            i = bisect_right(ends, number)
            ids = self._tokens(*self.spans[i], self.spans[i][1].last_document - (ends[i] - number))
            out += self._texts(ids)
            total += len(ids)
            if total >= MOST_TOKENS_OF_ALL:
                break
        return out

    def _tokens(self, dataset: IndexedDataset, span: Span, document: int) -> list[int]:
        first = max(dataset.document_start(document), span.first_token)
        last = min(dataset.document_start(document + 1), span.last_token, first + MOST_TOKENS)
        ids: list[int] = dataset.tokens[first:last].tolist()
        return ids

    def _texts(self, ids: Sequence[int]) -> list[str]:
        parts: list[list[int]] = [[]]
        for token in ids:
            if token == self.tokenizer.eod:
                parts.append([])
            else:
                parts[-1].append(token)
        return [text for part in parts if (text := self.tokenizer.decode(part)).strip()]
