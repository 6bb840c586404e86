"""The laws as a pytest class: subclass it, name the backend, and the plugin's test file is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnreg import AttnregError, Backend, get
from attnreg.testing.engine import Examination, UnusableError, device_for, dtypes_of
from attnreg.testing.laws import LAWS
from attnreg.testing.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence


class BackendContract:
    """Every law, as a test of its own for each dtype.

    `class TestMine(BackendContract): name = "mine"` is a whole test file. A law that fails is a failing test whose
    text is the case, the law and what to do; one that cannot be judged is skipped with the reason, and so is
    everything where the device is missing.

    Attributes:
        name: of an installed or registered backend.
        backend: the record itself, in place of the name.
        device: where to examine it; by default the first that it declares and that is here.
        dtypes: names of dtypes; by default those of float32, float16 and bfloat16 that it declares, else float64.
        quick: fewer random cases.
    """

    name: ClassVar[str | None] = None
    backend: ClassVar[Backend | None] = None
    device: ClassVar[str | None] = None
    dtypes: ClassVar[Sequence[str] | None] = None
    quick: ClassVar[bool] = False
    _examinations: ClassVar[dict[str, Examination]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._examinations = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Make a test for each law and dtype."""
        if {"law", "dtype"} <= set(metafunc.fixturenames):
            dtypes = self._dtypes()
            pairs = [
                (law, dtype) for number, dtype in enumerate(dtypes) for law in LAWS if number == 0 or not LAWS[law].once
            ]
            ids = [law if LAWS[law].once else f"{law}-{dtype}" for law, dtype in pairs]
            metafunc.parametrize(("law", "dtype"), pairs, ids=ids)

    def test_law(self, law: str, dtype: str) -> None:
        """The law holds, or what it asks for is refused as declared."""
        import pytest

        try:
            row = self._examination(dtype).row(law)
        except UnusableError as error:
            pytest.skip(str(error))
        if row.verdict == "fails":
            pytest.fail(str(row), pytrace=False)
        if row.verdict in ("not applicable", "not judged"):
            pytest.skip(str(row))

    @classmethod
    def _record(cls) -> Backend:
        if cls.backend is not None:
            return cls.backend
        if cls.name is None:
            raise TypeError(f"{cls.__name__} says neither `name` nor `backend`, so there is nothing to examine")
        return get(cls.name)

    @classmethod
    def _dtypes(cls) -> Sequence[str]:
        """Return what to examine; whatever is wrong with the backend is for the tests to say."""
        if cls.dtypes is not None:
            return cls.dtypes
        try:
            backend = cls._record()
            return dtypes_of(backend, device_for(backend, cls.device))
        except (AttnregError, TypeError):
            return ["float32"]

    @classmethod
    def _examination(cls, dtype: str) -> Examination:
        if dtype not in cls._examinations:
            backend = cls._record()
            device = device_for(backend, cls.device)
            subject = Subject(backend=backend, device=device, dtype=getattr(torch, dtype), quick=cls.quick)
            cls._examinations[dtype] = Examination(subject)
        return cls._examinations[dtype]
