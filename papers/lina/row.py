"""Rows: a number of the paper, what is simulated for it, and what must be known to compare the two."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Where the paper's own numbers do not agree, or do not allow what it claims.  Derived; letters mark rows.
CONTRADICTIONS = {
    "a": "the stated mean share of all-to-all, 34.1%, is not that of Table 1's twelve shares, 33.1%",
    "b": "Table 4's gains in utilisation are 17.2, 19.0 and 15.9 points, mean 17.4, the text says 17.6; BERT2GPT2's memory rises "
    "by 19.9 points there, by 19.5% in the text",
    "c": "Table 5: in 4 of 6 rows the 95th percentile is below the median, which one normaliser does not allow",
    "d": "phase 2 fires where two lists differ, accuracy counts where they are identical: 100% together, but 86-108% in Table 5",
    "e": "section 7.3's accuracies and phase-2 rate (58.41, 54.16%; 23%) are not Table 5's for l=3 (60.4, 63.5%; 25.7, 32.2%)",
    "f": "the tails at 16 experts, 1.82x and 1.68x, average 1.75x; the headline says 1.63x",
    "g": "Amdahl: without any all-to-all a step with 33.4% of it (Figure 4, 2 experts) is 1.50x as fast; 1.71x is claimed",
    "h": "with every backward all-to-all slowed by 1.83x, taking the slowdown away yields 1.12x; 1.36-1.42x is claimed",
    "i": "an all-to-all inside one node takes 78% of one over four nodes, so it isn't NVLink, or waiting is counted",
    "j": "Figure 4's share at 16 experts is 44.5%, Table 1's are 36.8-39.5%",
    "k": "with 16 experts an all-to-all of a training step takes 0.8 to 1.2 times what twice the top-1 rows take at inference "
    "(Table 1); were every backward one slowed by 1.83x it would be 1.4 times",
    "l": "a layer's dense gradients are 5 MB: pieces of 30 MB cut nothing but embeddings, so partitioning can't change more",
    "m": "Amdahl: without any all-to-all TXL's batch with 4 experts is 1.38x as fast (Table 1, 12 layers: 27.4%), with 16 1.48x; "
    "1.54x and 1.45x are claimed as medians",
    "n": "Figure 8 has three pieces in one place and five in another",
}

Value = float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`paper`: a number in `unit`, or a statement of what a curve shows, for which `simulated` says whether it holds.
    `simulated` None: not simulated, `note` says why."""

    id: str
    name: str
    paper: float | str
    simulated: Value
    unit: str = ""  # x | % | ms | points | ""
    fitted: bool = False  # constants were fitted on it, or it was put in
    put_in: bool = False  # what is simulated began with this number, or with what it follows from
    marks: str = ""  # letters of CONTRADICTIONS
    note: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.paper, str) and not (self.simulated is None or isinstance(self.simulated, bool)):
            raise ValueError(f"{self.id}: a statement holds or doesn't, {self.simulated!r} is neither")
        if self.put_in and not self.fitted:
            raise ValueError(f"{self.id}: what was put in is not held out")
        if self.simulated is None and not self.note:
            raise ValueError(f"{self.id}: say why it isn't simulated")
        if unknown := set(self.marks) - set(CONTRADICTIONS):
            raise ValueError(f"{self.id}: no contradiction {', '.join(sorted(unknown))}")

    @property
    def residual(self) -> float | None:
        """Simulated over the paper's, less one; None for statements, and where nothing was simulated."""
        if isinstance(self.paper, str) or self.simulated is None:
            return None
        return float(self.simulated) / self.paper - 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"residual": self.residual}


def mean_absolute(rows: Sequence[Row]) -> float:
    """Mean absolute residual of those that have one; nan without any."""
    found = [abs(row.residual) for row in rows if row.residual is not None]
    return sum(found) / len(found) if found else math.nan
