"""Laws about a backend as a thing in a program: compiled, copied, pickled, imported, honest, and no writer."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import AttnregError, Capabilities, default_registry
from attnreg.testing import patterns
from attnreg.testing.call import Layer, formatted
from attnreg.testing.inputs import inputs_of
from attnreg.testing.judgement import (
    BrokenError,
    Finding,
    NotApplicableError,
    Refused,
    attempt,
    compare,
    computed,
)
from attnreg.testing.law import MASKED, Law, at_once
from attnreg.testing.laws.pages import paged_case
from attnreg.testing.laws.results import judged_lse, judged_weights
from attnreg.testing.paging import inputs_in_pages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from attnreg.testing.case import Case
    from attnreg.testing.subject import Subject

_LENGTHS: Final = (9, 12, 14)
_GRAPHS: Final = 2
"""One for the first length, and one for all others."""


def _compilable(subject: Subject) -> Iterable[Case]:
    yield subject.case(pattern=patterns.CAUSAL, padding="left")
    if not subject.quick:
        yield subject.case(pattern=patterns.CAUSAL)


def _compiled(subject: Subject, case: Case) -> Finding:
    """Compile with the backend's function inside one graph, for several lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    computed(subject, case)
    counter = CompileCounterWithBackend("eager")  # the graph is what counts, not the code that is made of it
    layer, call = Layer(case), subject.backend.call

    def attend(query: Any, key: Any, value: Any, mask: Any) -> Any:
        return call(layer, query, key, value, mask, is_causal=True)[0]

    torch._dynamo.reset()  # noqa: SLF001 - what was compiled before does not count
    try:
        compiled = torch.compile(attend, backend=counter, fullgraph=True)
        findings = [_compared(subject, case, compiled, length) for length in _LENGTHS]
    finally:
        torch._dynamo.reset()  # noqa: SLF001
    if counter.frame_count > _GRAPHS:
        raise BrokenError(f"{counter.frame_count} graphs were compiled for {len(_LENGTHS)} lengths", case)
    return findings[-1]


def _compared(subject: Subject, case: Case, compiled: Any, length: int) -> Finding:
    case = subject.case(pattern=case.pattern, padding=case.padding, q_length=length, kv_length=length)
    inputs = inputs_of(case, subject)
    plain = computed(subject, case, inputs)
    mask = formatted(subject.backend, subject, case, inputs)
    try:
        output = compiled(*inputs.heads, mask)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BrokenError(f"fullgraph=True raised {type(error).__name__}: {lines[0] if lines else ''}", case) from error
    return Finding(found=compare(subject, case, replace(plain, output=output)), seconds=plain.seconds)


def _copied(subject: Subject, _: Case) -> Finding:
    """Copy and pickle what a model binds: the record, its guarded function and its fitted formatter."""
    backend = subject.backend
    halves = {"the record": backend, "backend.call": backend.call, "backend.format": backend.format}
    for name, half in halves.items():
        try:
            copied = copy.deepcopy({"bound": half})["bound"]
        except Exception as error:
            raise BrokenError(f"copy.deepcopy of {name} raised {type(error).__name__}: {error}") from error
        if copied is not half and name == "the record":
            raise BrokenError(f"copy.deepcopy of {name} is another one")
    if not _registered(subject):
        return Finding(note="it is not registered, so pickling, which goes by name, was not tried")
    for name, half in halves.items():
        try:
            again = pickle.loads(pickle.dumps(half))  # noqa: S301 - our own bytes
        except Exception as error:
            raise BrokenError(f"pickling {name} raised {type(error).__name__}: {error}") from error
        if getattr(again, "attention", again) != getattr(half, "attention", half):
            raise BrokenError(f"{name} comes back from a pickle as something else")
    return Finding()


def _registered(subject: Subject) -> bool:
    try:
        return default_registry.get(subject.backend.name).attention is subject.backend.attention
    except AttnregError:
        return False


_TORCHS_OWN: Final = frozenset(
    {
        *("attnreg", "torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx", "triton", "jinja2"),
        *("markupsafe", "filelock", "fsspec", "typing_extensions", "setuptools", "packaging", "optree", "einops"),
        *("importlib_metadata", "zipp"),  # `Kernel.version`
    }
)
"""What attnreg and torch import themselves, now or when something of theirs is first used."""

_PROBE: Final = """
import json, sys
import torch, attnreg, attnreg.masks, attnreg.reference
import torch._dynamo, torch.nn.attention.flex_attention  # torch's compiler brings modules of its own making
attnreg.names(), attnreg.get("eager")  # what attnreg itself needs to find and load a backend
before = set(sys.modules)
attnreg.get(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def _lazy(subject: Subject, _: Case) -> Finding:
    """Resolve the name in a fresh interpreter, and see which packages came in."""
    origin = subject.backend.origin
    if origin is None or origin.kind == "user" or not _registered(subject):
        raise NotApplicableError("it is registered by user code, which imports what it likes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-P", "-c", _PROBE, subject.backend.name],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise BrokenError(f"it could not be resolved in a fresh interpreter: {done.stderr.strip().splitlines()[-1]}")
    own = {name.partition(".")[0] for name in (subject.backend.attention.__module__, origin.target)}
    came: set[str] = set(json.loads(done.stdout.strip().splitlines()[-1]))
    if heavy := sorted(came - own - _TORCHS_OWN - set(sys.stdlib_module_names)):
        raise BrokenError(f"resolving the name imports {', '.join(name for name in heavy)}")
    return Finding()


_ADDED: Final[dict[str, dict[str, Any]]] = {
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": True},
    "position_bias": {"bias": "full"},
    "lse": {"lse": True},
    "weights": {"weights": True},
}
"""Features that a function reads from a keyword of its own, and how a case asks for each."""

_SHAPED: Final = ("value_head_dim", "grouped_query")
"""Features of the inputs' shapes, which many a function has by chance."""


def _declaration(subject: Subject, case: Case) -> Finding:
    """Call the function without its guard, as if it declared more."""
    hidden = [name for name, changes in _ADDED.items() if _works(subject, case, name, changes)]
    if hidden:
        names = ", ".join(f"{name}=True" for name in hidden)
        raise BrokenError(f"the function honours what it does not declare: Capabilities({names})")
    shapes = ({"value_head_dim": subject.other_head_dims[0]}, {"kv_heads": 2})
    chance = [name for name, changes in zip(_SHAPED, shapes, strict=True) if _works(subject, case, name, changes)]
    return Finding(note=f"could be declared: {', '.join(f'{name}=True' for name in chance)}" if chance else "")


def _works(subject: Subject, case: Case, feature: str, changes: dict[str, Any]) -> bool:
    """Whether the function, asked for a feature that is not declared, computes what the oracle does with it.

    A function that swallows the keyword unread gives the result without the feature, which is not the oracle's.
    """
    if getattr(subject.supports, feature):
        return False
    claims = {**{name: getattr(subject.backend.supports, name) for name in _PLAIN}, feature: True}
    bold = replace(subject, written=[], backend=replace(subject.backend, supports=Capabilities(**claims)))
    judge = {"lse": judged_lse, "weights": judged_weights}.get(feature)
    asked = replace(case, **changes)
    try:
        if judge is not None:
            return judge(bold, asked).refused is None
        result = attempt(bold, asked)
        if isinstance(result, Refused):
            return False
        compare(bold, asked, result)
    except (BrokenError, NotApplicableError):
        return False
    return True


_PLAIN: Final = ("devices", "dtypes", "min_head_dim", "max_head_dim", "head_dim_multiple", "is_causal", "lossy")


def _packed(subject: Subject) -> Iterable[Case]:
    for is_causal in (True, False):
        yield subject.case(batch=1, pattern=None, packed=True, is_causal=is_causal, q_length=9)


def _unjudged(subject: Subject, case: Case) -> Finding:
    """Refused where it is not declared; where it is, the kit has no case of its own."""
    if subject.supports.sparse:
        raise NotApplicableError("it is declared, and the kit has no cases for it")
    result = attempt(subject, case)
    return Finding(refused=result if isinstance(result, Refused) else None)


def _all_inputs(subject: Subject) -> Iterable[Case]:
    if subject.supports.paged:
        yield paged_case(subject)
    if subject.pages_alone:
        return
    yield at_once(subject, pattern=patterns.CAUSAL)
    yield subject.case(pattern=patterns.CAUSAL, padding="left")
    yield from (subject.case(pattern=None, ready=kind) for kind in sorted(subject.takes))


def _untouched(subject: Subject, case: Case) -> Finding:
    """Judge this call, and all that were made for other laws before it."""
    result = attempt(subject, case, inputs_in_pages(case, subject) if case.pages is not None else None)
    if subject.written:
        raise BrokenError(subject.written[0])
    return Finding(refused=result) if isinstance(result, Refused) else Finding(seconds=result.seconds)


LAWS: Final = (
    Law(
        name="packing",
        says="Without a mask, cu_seq_lens_q and cu_seq_lens_k tell where the sequences of a packed row begin.",
        remedy="Declare packing=False or honour them.",
        table=_packed,
        feature="packing",
    ),
    Law(
        name="sparse",
        says="Keys selected by indices are refused unless that is declared.",
        remedy="Let the guard refuse it: leave Capabilities(sparse=False), and models call backend.call.",
        table=lambda subject: [subject.case(skip=True, sparse=True)],
        check=_unjudged,
        feature="sparse",
        once=True,
    ),
    Law(
        name="declaration",
        says="A feature that the function has is declared: what is not declared is refused to everybody.",
        remedy="Declare it, or do not read the keyword.",
        table=lambda subject: [subject.case(q_length=7, kv_length=7)],
        check=_declaration,
        once=True,
        needs=("shape", "plain"),
    ),
    Law(
        name="compile",
        says="torch.compile(fullgraph=True) takes it without a graph break, and once more for all other lengths.",
        remedy="Register the kernel with torch.library.custom_op; read no tensor's contents on the way to it.",
        table=_compilable,
        check=_compiled,
        once=True,
        needs=MASKED,
    ),
    Law(
        name="copies",
        says="What a model binds can be copied, and pickled by name.",
        remedy="Hold no locks, streams or files in the attention function or the formatter.",
        check=_copied,
        once=True,
        needs=(),
        dense=False,
    ),
    Law(
        name="laziness",
        says="Resolving the name imports the plugin's module, and not the kernel's package.",
        remedy="Import the kernel inside the attention function.",
        check=_lazy,
        once=True,
        needs=(),
        dense=False,
    ),
    Law(
        name="inputs_untouched",
        says="No input is written to: not query, key and value, nor a mask, a bias or sinks.",
        remedy="Write to a copy.",
        table=_all_inputs,
        check=_untouched,
        dense=False,
    ),
)
