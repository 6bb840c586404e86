"""What a benchmark found, as plain data: rows, and where, when and with which command they were measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

from attnreg.bench.forms import FLAG, LIST, TEXT, Form, checked, number, one_of, or_null, texts, whole
from attnreg.bench.workload import DTYPES, Workload
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
            InvalidInputError: it is something else; the text says which field holds what.
        """
        data = checked(data, "the result", _REPORT)
        workload = Workload(**checked(data["workload"], "the workload of the result", _WORKLOAD))
        rows = tuple(_row_of(row, f"row {index} of the result") for index, row in enumerate(data["rows"], start=1))
        return cls(**{**data, "workload": workload, "rows": rows})


def _row_of(data: Any, where: str) -> Row:
    """Read a row; the spread is what its times make it."""
    data = checked(data, where, _ROW, optional=_ROW.keys() - {"backend", "origin", "status"})
    if data.get("milliseconds") is not None and data.get("length") is None:
        raise InvalidInputError(f"length of {where}", "missing", "the length that its milliseconds belong to")
    return Row(**{name: value for name, value in data.items() if name != "spread"})


_TIME: Final = or_null(number(1e-9, 1e12))
"""Milliseconds, from a picosecond to thirty years: what has a logarithm that an axis can hold."""
_SIZE: Final = or_null(number(0))

_WORKLOAD: Final[dict[str, Form]] = {
    "device": TEXT,
    "dtype": one_of(DTYPES),
    "batch": whole(1),
    "heads": whole(1),
    "kv_heads": whole(1),
    "head_dim": whole(1),
    "is_causal": FLAG,
    "backward": FLAG,
    "padding": number(0),
}
_REPORT: Final[dict[str, Form]] = {
    "workload": Form("an object", lambda value: isinstance(value, dict)),
    "hardware": texts("device", "cpu", "cores"),
    "versions": texts(),
    "date": TEXT,
    "command": TEXT,
    "rows": LIST,
}
_ROW: Final[dict[str, Form]] = {
    "backend": TEXT,
    "origin": TEXT,
    "status": one_of(STATUSES),
    "length": or_null(whole(1)),
    "milliseconds": _TIME,
    "low": _TIME,
    "high": _TIME,
    "spread": or_null(number(float("-inf"))),
    "rounds": whole(0),
    "teraflops": _SIZE,
    "ratio_to_sdpa": _SIZE,
    "deviation": _SIZE,
    "peak_bytes": or_null(whole(0)),
    "mask_milliseconds": _SIZE,
    "problem": TEXT,
}
