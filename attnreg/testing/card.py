"""The capability card: what was declared, what was measured, law by law."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

Verdict = Literal["holds", "fails", "refused", "not applicable", "not judged"]

VERDICTS: Final[dict[Verdict, str]] = {
    "holds": "the law holds in every case that was computed",
    "fails": "there is a case in which it does not hold; the detail says which",
    "refused": "every case was refused before anything was computed, and nothing that is declared was",
    "not applicable": "there is nothing to ask this backend; the detail says why",
    "not judged": "a law that it rests on fails, so the answer would only repeat that",
}
"""What can be said about a law, and what it means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One law, judged in one dtype.

    Attributes:
        law: its name.
        says: the law in one sentence.
        dtype: in which it was judged; `"any"` if it does not depend on that.
        declared: what the backend says about the feature: `"yes"`, `"no"`, `"any"` (nothing is left out), or nothing.
        verdict: see `VERDICTS`.
        error: the largest error, where one was measured: the one that comes closest to what is allowed.
        allowed: what is allowed in its place.
        seconds: a typical call, formatting the mask included; the median over the cases.
        cases: how many cases were judged.
        detail: the failing case, the reason of a refusal, or a note.
        remedy: what to do about a failure.
    """

    law: str
    says: str
    dtype: str
    declared: str
    verdict: Verdict
    error: float | None = None
    allowed: float | None = None
    seconds: float | None = None
    cases: int = 0
    detail: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.law} ({self.dtype}): {self.verdict}"
        if self.verdict == "fails":
            return f"{text}: {self.detail}.\n  The law: {self.says}\n  What to do: {self.remedy}"
        return f"{text}: {self.detail}" if self.detail else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a backend was found to do.

    Attributes:
        backend: its name.
        origin: who provides it, with the version.
        device: the device's name, as its maker gives it.
        dtypes: in which it was examined.
        versions: of attnreg, torch and Python.
        date: when, as `2026-01-31`.
        command: what repeats it.
        lossy: it declares an error above that of the dtype.
        rows: the laws.
    """

    backend: str
    origin: str
    device: str
    dtypes: tuple[str, ...]
    versions: dict[str, str]
    date: str
    command: str
    lossy: bool
    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether no law fails."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows of the laws that fail."""
        return tuple(row for row in self.rows if row.verdict == "fails")

    @property
    def summary(self) -> str:
        """How many laws got which verdict, in words."""
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}
        return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)

    def as_dict(self) -> dict[str, Any]:
        """Return the card as plain data: what `attnreg verify --json` prints. An infinite error is None."""
        data = asdict(self)
        data["dtypes"] = list(self.dtypes)
        data["rows"] = [
            {**row, "error": _finite(row["error"]), "allowed": _finite(row["allowed"])} for row in data["rows"]
        ]
        return {**data, "holds": self.holds, "summary": self.summary}


def _finite(number: float | None) -> float | None:
    return number if number is not None and number < float("inf") else None
