"""The engine: asks every law, with a table of cases and with random ones, and writes the card."""

from __future__ import annotations

import platform
import shlex
import statistics
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Flaky

from attnreg import Backend, InvalidInputError, KernelError, Request, UnsupportedError, __version__, get
from attnreg.capabilities import reasons
from attnreg.testing.card import Card, Row, Verdict
from attnreg.testing.judgement import BrokenError, Finding, NotApplicableError
from attnreg.testing.laws import LAWS
from attnreg.testing.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from attnreg.testing.case import Case
    from attnreg.testing.law import Law
    from attnreg.testing.tolerance import Measured

EXAMPLES: Final = 40
"""Random cases of each law, beside its table."""
QUICK: Final = 6
"""The same, when it has to be quick."""
DTYPES: Final = ("float32", "float16", "bfloat16")
"""In which a backend is examined, as far as it declares them; in float64 if it declares none of them."""
PLAIN: Final = "plain"
"""The law about what every backend computes; one that refuses all of it can do nothing."""

PAGES_ALONE: Final = "it takes pages alone"
"""Why a backend is not asked about dense keys and values."""


class UnusableError(InvalidInputError):
    """The backend cannot be examined here: the device is missing, or it does not run on it."""


@dataclass(slots=True)
class _Tally:
    """What the cases of a law have shown so far."""

    cases: int = 0
    computed: int = 0
    largest: Measured | None = None
    seconds: list[float] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: BrokenError | None = None

    def add(self, finding: Finding) -> None:
        self.cases += 1
        if finding.refused is None:
            self.computed += 1
        else:
            (self.declared if finding.refused.declared else self.refused).append(finding.refused.why)
        if finding.found is not None and (self.largest is None or _share(finding.found) > _share(self.largest)):
            self.largest = finding.found
        if finding.seconds is not None:
            self.seconds.append(finding.seconds)
        if finding.note:
            self.notes.append(finding.note)


@dataclass(frozen=True, slots=True)
class Examination:
    """All laws of one subject; each is judged once, when it is first asked for."""

    subject: Subject
    rows: dict[str, Row] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """Judge the law of that name, after those that it needs."""
        if name not in self.rows:
            law = LAWS[name]
            if law.dense and self.subject.pages_alone:
                return _row(law, self.subject, "not applicable", detail=PAGES_ALONE)
            broken = [each for each in law.needs if self.row(each).verdict in ("fails", "not judged")]
            self.rows[name] = self._not_judged(law, broken) if broken else judge(law, self.subject)
        return self.rows[name]

    def _not_judged(self, law: Law, broken: list[str]) -> Row:
        return _row(law, self.subject, "not judged", detail=f"it rests on {', '.join(broken)}")


def verify(
    backend: Backend | str,
    *,
    device: str | torch.device | None = None,
    dtypes: Iterable[str | torch.dtype] | None = None,
    quick: bool = False,
    laws: Iterable[str] | None = None,
    command: str = "",
    progress: Callable[[str], object] = lambda _: None,
) -> Card:
    """Examine a backend, and return its capability card.

    Args:
        backend: the record, or its name in the default registry.
        device: where to examine it; by default the first that it declares and that is here, the CPU before others.
        dtypes: by default those of float32, float16 and bfloat16 that it declares, else float64.
        quick: fewer random cases.
        laws: names in `LAWS`; all by default.
        command: what the card says that repeats it.
        progress: called with the name of each law before it is judged.

    Raises:
        UnknownBackendError: nobody provides that name.
        UnusableError: it does not run on that device, or the device is missing.
    """
    backend = get(backend) if isinstance(backend, str) else backend
    where = device_for(backend, device)
    wanted = [_name(dtype) for dtype in dtypes] if dtypes else dtypes_of(backend, where)
    found: list[Row] = []
    for number, dtype in enumerate(wanted):
        subject = Subject(backend=backend, device=where, dtype=getattr(torch, dtype), quick=quick)
        examination = Examination(subject)
        for name in laws or LAWS:
            if number == 0 or not LAWS[name].once:
                progress(f"{name} in {dtype}")
                found.append(examination.row(name))
    return Card(
        backend=backend.name,
        origin=str(backend.origin or "user code"),
        device=_device_name(where),
        dtypes=tuple(wanted),
        versions={"attnreg": __version__, "torch": torch.__version__, "python": platform.python_version()},
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        command=command or f"attnreg verify {shlex.quote(backend.name)} --device {where.type}{' --quick' * quick}",
        lossy=backend.supports.lossy,
        rows=tuple(found),
    )


def device_for(backend: Backend, wanted: str | torch.device | None) -> torch.device:
    """Return the device to examine *backend* on.

    Raises:
        UnusableError: it is not here, the backend does not declare it, or its kernel is not here.
        KernelError: its kernel is here, and cannot be used.
    """
    declared = backend.supports.devices
    if wanted is None:
        here = [name for name in ("cpu", "cuda", *sorted(declared or ())) if declared is None or name in declared]
        wanted = next((name for name in here if _present(name)), here[0] if here else "cpu")
    name = str(wanted)
    if not _present(name):
        raise UnusableError("the device", f"{name}, which is not here", "one that torch sees")
    device = torch.device(wanted)
    if against := reasons(backend.supports, Request(device=device.type)):
        raise UnusableError("the device", device.type, f"one that {backend.name} declares: {against[0].supported}")
    _check_kernel(backend)
    return device


def _check_kernel(backend: Backend) -> None:
    """Import the kernel; where it is only missing, the backend cannot be examined, anything else is its fault.

    Raises:
        UnusableError: the package is not installed, or is not for this GPU.
        KernelError: it is there, and cannot be used.
    """
    if backend.kernel is None:
        return
    try:
        backend.kernel.load()
    except KernelError as error:
        if all(reason.code in ("kernel_missing", "gpu") for reason in error.reasons):
            why = error.reasons[0]
            raise UnusableError("the kernel", f"{why.wanted}: {why.supported}", why.fix.rstrip(".")) from error
        raise


def dtypes_of(backend: Backend, device: torch.device) -> list[str]:
    """Return the names of the dtypes that *backend* is examined in.

    Raises:
        UnsupportedError: it declares none of float32, float16, bfloat16 and float64.
    """
    asked = (*DTYPES, "float64")
    against = {name: reasons(backend.supports, Request(device=device.type, dtype=name)) for name in asked}
    if found := [name for name, why in against.items() if not why]:
        return [name for name in found if name in DTYPES] or found
    raise UnsupportedError(backend.name, [reason for why in against.values() for reason in why])


def judge(law: Law, subject: Subject) -> Row:
    """Ask one law: its table first, then random cases, of which a failing one is made as small as it gets."""
    tally = _Tally()

    def one(case: Case) -> None:
        try:
            tally.add(law.check(subject, case))
        except BrokenError as error:
            tally.broken = error
            raise

    try:
        with _threads(None if law.threaded else 1):
            for case in law.table(subject):
                one(case)
            if law.cases is not None and tally.computed:
                _at_random(law, subject, one)
    except (BrokenError, Flaky):
        return _failed(law, subject, tally)
    except NotApplicableError as error:
        return _row(law, subject, "not applicable", tally, str(error))
    return _concluded(law, subject, tally)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside the block; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _at_random(law: Law, subject: Subject, one: Callable[[Case], None]) -> None:
    assert law.cases is not None  # noqa: S101 - the caller looked
    config = settings(
        max_examples=QUICK if subject.quick else EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        phases=[Phase.generate, Phase.shrink],
    )
    config(given(law.cases(subject))(one))()


def _failed(law: Law, subject: Subject, tally: _Tally) -> Row:
    """Say in which case it has failed last: the smallest, or one of a backend that fails only sometimes."""
    assert tally.broken is not None  # noqa: S101 - that is what brought us here
    return _row(law, subject, "fails", tally, str(tally.broken), tally.broken.found, remedy=law.remedy)


def _concluded(law: Law, subject: Subject, tally: _Tally) -> Row:
    """Say what it means that no case has failed."""
    if tally.refused and not tally.computed and law.declared(subject):
        detail = f"{law.feature} is declared, and always refused: {tally.refused[0]}"
        return _row(law, subject, "fails", tally, detail, remedy=law.remedy)
    if law.name == PLAIN and not tally.computed and not _undeclared_dtype(subject):
        refusals = [*tally.refused, *tally.declared]
        detail = f"even plain attention is refused in every case: {refusals[0]}"
        return _row(law, subject, "fails", tally, detail, remedy=law.remedy)
    notes = list(dict.fromkeys(tally.notes))
    if tally.computed:
        refusals = [*tally.declared, *tally.refused]
        notes += [f"{len(refusals)} of {tally.cases} cases refused: {refusals[0]}"] if refusals else []
        return _row(law, subject, "holds", tally, "; ".join(notes), tally.largest)
    return _row(law, subject, "refused", tally, "; ".join([*tally.refused, *tally.declared][:1]))


def _undeclared_dtype(subject: Subject) -> bool:
    return bool(reasons(subject.supports, Request(dtype=_name(subject.dtype))))


def _row(
    law: Law,
    subject: Subject,
    verdict: Verdict,
    tally: _Tally | None = None,
    detail: str = "",
    found: Measured | None = None,
    remedy: str = "",
) -> Row:
    tally = tally or _Tally()
    return Row(
        law=law.name,
        says=law.says,
        dtype="any" if law.once else _name(subject.dtype),
        declared=_declared(law, subject),
        verdict=verdict,
        error=None if found is None else found.error,
        allowed=None if found is None else found.allowed,
        seconds=statistics.median(tally.seconds) if tally.seconds else None,
        cases=tally.cases,
        detail=detail,
        remedy=remedy,
    )


def _declared(law: Law, subject: Subject) -> str:
    if not law.feature:
        return ""
    declared = law.declared(subject)
    return "any" if declared is None else "yes" if declared else "no"


def _share(found: Measured) -> float:
    return found.error / found.allowed if found.allowed else 0.0


def _present(device: str) -> bool:
    kind = device.partition(":")[0]
    if kind == "cpu":
        return True
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return kind != "meta"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    return f"{platform.machine()} {device.type}" if device.type == "cpu" else device.type


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
