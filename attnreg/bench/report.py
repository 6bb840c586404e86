"""What a benchmark found, as plain data: rows, and where, when and with which command they were measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from attnreg.bench.workload import Workload
from attnreg.errors import InvalidInputError

Status = Literal["works", "refused", "broken", "wrong"]

STATUSES: Final[dict[Status, str]] = {
    "works": "it was measured, and agrees with the oracle",
    "wrong": "it was measured, and does not agree with the oracle: its time says nothing",
    "refused": "it cannot serve the call, and says why",
    "broken": "it raised",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One backend at one length.

    Attributes:
        backend: its name.
        origin: who provides it, with the version.
        status: see `STATUSES`.
        length: queries and keys of a row; None for what was refused whatever the length.
        milliseconds: a call, the median of all rounds.
        low: the 20th percentile of the rounds, in milliseconds.
        high: the 80th percentile.
        rounds: how often it was timed.
        teraflops: 10¹² floating-point operations per second; see `Workload.flops`.
        ratio_to_sdpa: its time over that of `sdpa` in the same run; None if that was not measured.
        deviation: the largest deviation from the oracle in a sample of the call, over the largest magnitude there:
            of the output, and of each gradient with a backward pass. None if it is not finite.
        peak_bytes: memory that the mask and one call take beside the inputs, at the most; None where nobody counts.
        mask_milliseconds: formatting the mask, which a model does once for all layers; not part of `milliseconds`.
        problem: why it was refused, what it raised, or how it is wrong.
    """

    backend: str
    origin: str
    status: Status
    length: int | None = None
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    teraflops: float | None = None
    ratio_to_sdpa: float | None = None
    deviation: float | None = None
    peak_bytes: int | None = None
    mask_milliseconds: float | None = None
    problem: str = ""

    @property
    def spread(self) -> float | None:
        """From the 20th to the 80th percentile, as a share of the median."""
        if self.milliseconds is None or self.low is None or self.high is None:
            return None
        return (self.high - self.low) / self.milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows of one run.

    Attributes:
        workload: what was timed.
        hardware: `device` and `cpu` by the names that their makers give them, and the number of `cores`.
        versions: of attnreg, torch, Python, and the packages that kernels are in.
        date: when, as `2026-01-31`.
        command: what repeats it.
        rows: in the order in which they were measured, what was refused first.
    """

    workload: Workload
    hardware: dict[str, str]
    versions: dict[str, str]
    date: str
    command: str
    rows: tuple[Row, ...]

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows that have a time, by length, and the fastest of each first."""
        timed = [row for row in self.rows if row.milliseconds is not None]
        return tuple(sorted(timed, key=lambda row: (row.length or 0, row.milliseconds or 0.0)))

    @property
    def curves(self) -> dict[str, list[Row]]:
        """The measured rows of each backend, by length; one that is wrong has no time that counts."""
        curves: dict[str, list[Row]] = {}
        for row in sorted(self.measured, key=lambda row: row.backend):
            if row.status == "works":
                curves.setdefault(row.backend, []).append(row)
        return curves

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data: what `attnreg bench --json` prints."""
        rows = [{**asdict(row), "spread": row.spread} for row in self.rows]
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "workload": asdict(self.workload)} | {
            "rows": rows
        }

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Read what `as_dict` returned.

        Raises:
            InvalidInputError: it is something else.
        """
        try:
            rows = tuple(
                Row(**{name: value for name, value in row.items() if name != "spread"}) for row in data["rows"]
            )
            return cls(**{**data, "workload": Workload(**data["workload"]), "rows": rows})
        except (TypeError, KeyError, AttributeError) as error:
            wanted = "what attnreg bench --json prints"
            raise InvalidInputError("the result", f"of another form ({error})", wanted) from error
