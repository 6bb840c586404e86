"""Laws about the form of what is returned, and of what is declared about it: shape, dtype, device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from attnreg.capabilities import Request, reasons
from attnreg.testing import patterns
from attnreg.testing.inputs import inputs_of
from attnreg.testing.judgement import BrokenError, Finding, NotApplicableError, Refused, agrees, attempt
from attnreg.testing.law import Law

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject

_DTYPES: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _shapes(subject: Subject) -> Iterable[Case]:
    yield subject.case()
    yield subject.case(pattern=patterns.CAUSAL, q_length=5)
    yield subject.case(batch=1, q_length=1)


def _shape(subject: Subject, case: Case) -> Finding:
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    wanted = (case.batch, case.q_length, case.heads, case.value_head_dim or case.head_dim)
    if tuple(result.output.shape) != wanted:
        raise BrokenError(f"the output has the shape {tuple(result.output.shape)} instead of {wanted}", case)
    return Finding(seconds=result.seconds)


def _dtype(subject: Subject, case: Case) -> Finding:
    result = attempt(subject, case)
    if isinstance(result, Refused):
        return Finding(refused=result)
    if result.output.dtype != subject.dtype:
        raise BrokenError(f"the output is {result.output.dtype}, and the query {subject.dtype}", case)
    if result.output.device != result.inputs.query.device:
        raise BrokenError(f"the output is on {result.output.device}, and the query on {subject.device}", case)
    return Finding(seconds=result.seconds)


def _dtypes(subject: Subject, case: Case) -> Finding:
    """Judge every floating dtype: right where it is declared, refused where it is not."""
    judged = [_in_dtype(replace(subject, dtype=dtype), case) for dtype in _DTYPES]
    refused = [finding.refused.why for finding in judged if finding.refused is not None]
    return Finding(note=f"{len(refused)} refused: {refused[0]}" if refused else "")


def _in_dtype(subject: Subject, case: Case) -> Finding:
    try:
        return agrees(subject, case)
    except BrokenError as error:
        name = str(subject.dtype).removeprefix("torch.")
        declared = subject.supports.dtypes
        how = f"declares {name}" if declared is not None else f"declares no dtypes, so that {name} is among them"
        raise BrokenError(f"it {how}, and there {error}", None, error.found) from error


def _devices(subject: Subject, case: Case) -> Finding:
    """Judge a device that nobody computes on: torch's `meta`."""
    elsewhere = replace(subject, device=torch.device("meta"))
    if not reasons(subject.backend.supports, Request(device="meta")):
        raise NotApplicableError("it declares no devices, which means any")
    result = attempt(elsewhere, case, inputs_of(case, elsewhere))
    return Finding(refused=result if isinstance(result, Refused) else None)


LAWS: Final = (
    Law(
        name="shape",
        says="It returns (output, weights or None), with an output of shape (B, Sq, Hq, Dv).",
        remedy="Transpose the kernel's output into (batch, query_length, query_heads, value_head_dim).",
        table=_shapes,
        check=_shape,
        needs=(),
    ),
    Law(
        name="dtype",
        says="The output has the query's dtype, and is on its device.",
        remedy="Cast the output back to query.dtype.",
        table=lambda subject: [subject.case(), subject.case(pattern=patterns.CAUSAL)],
        check=_dtype,
    ),
    Law(
        name="dtypes",
        says="Every floating dtype that is declared is right, and every other one is refused.",
        remedy="Declare the dtypes that the kernel has: Capabilities(dtypes={...}).",
        table=lambda subject: [subject.case(pattern=patterns.CAUSAL)],
        check=_dtypes,
        once=True,
        needs=("shape", "causal"),
    ),
    Law(
        name="devices",
        says="Devices that are not declared are refused.",
        remedy="Let the guard refuse them: call backend.call, which goes by Capabilities(devices=...).",
        check=_devices,
        once=True,
    ),
)
