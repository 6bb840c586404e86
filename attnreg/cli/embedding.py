"""Sentence embeddings on any backend: what the demonstration runs and measures."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg import reference
from attnreg.backend import Backend
from attnreg.builtin import eager
from attnreg.capabilities import Request
from attnreg.default import default_registry
from attnreg.errors import AttnregError, BridgeError, InvalidInputError, UnsupportedError
from attnreg.integrations.transformers import alias, bind
from attnreg.masks import eager_mask

if TYPE_CHECKING:
    from collections.abc import Callable

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest deviation of a component of a unit vector that still is rounding, through a dozen layers."""

ORACLE: Final = Backend(
    name="oracle",
    attention=reference.attention_function,
    mask=eager_mask,
    supports=replace(eager.SUPPORTS, dropout=False),
)


@dataclass(frozen=True, slots=True)
class Result:
    """What one backend did: `milliseconds` for a forward pass and the largest `deviation`, or the `problem`."""

    backend: str
    status: str
    mask: str = ""
    milliseconds: float | None = None
    deviation: float | None = None
    problem: str = ""


class Embedder:
    """A transformers model with mean pooling over the real tokens, whose attention backend can be exchanged.

    Args:
        path: a folder, or an id on the Hub.
        sentences: what to embed, in one padded batch.
        device: torch device.
        dtype: one of `DTYPES`.
    """

    def __init__(self, path: str, sentences: list[str], *, device: str, dtype: str) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        if dtype not in DTYPES:
            raise InvalidInputError("dtype", repr(dtype), f"one of {', '.join(DTYPES)}")
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModel.from_pretrained(path, dtype=DTYPES[dtype])
            self.model = model.to(device).eval()
        except (OSError, ValueError, RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            remedy = "Name another model (--model) or device (--device)."
            raise BridgeError("transformers", f"it cannot load {path!r} on {device}: {problem}", remedy) from error
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.path, self.device, self.dtype = path, device, dtype
        self.batch = tokenizer(sentences, padding=True, return_tensors="pt").to(device)

    def facts(self) -> dict[str, Any]:
        """What is run, for the heading."""
        real = self.batch["attention_mask"]
        return {
            "model": self.path,
            "class": type(self.model).__name__,
            "device": self.device,
            "dtype": self.dtype,
            "sentences": real.shape[0],
            "tokens": real.shape[1],
            "padding": 1 - float(real.float().mean()),
        }

    def backends(self) -> list[str]:
        """Every name that may be asked for; `measure` says what came of it."""
        return default_registry.names()

    def oracle(self) -> torch.Tensor:
        """Embed with the float64 oracle in a float64 copy of the model: `(sentences, hidden_size)`."""
        self._mask_format(ORACLE)  # a model that chooses its own attention is refused here, before anything is measured
        model, self.model = self.model, copy.deepcopy(self.model).double()
        try:
            self._select(bind(ORACLE))
            return self._embed()
        finally:
            self.model = model

    def measure(self, name: str, oracle: torch.Tensor, repeats: int) -> Result:
        """Embed with backend *name*; what it cannot do is a row with the reason."""
        try:
            backend = default_registry.get(name)
            if refused := backend.reasons(Request(device=self.device, dtype=self.dtype)):
                return Result(name, "refused", problem="; ".join(map(str, refused)))
            mask = self._mask_format(backend)
            self._select(alias(name))
            deviation = float((self._embed().double() - oracle).abs().max())
            milliseconds = self._time(repeats)
        except UnsupportedError as error:
            return Result(name, "refused", problem="; ".join(map(str, error.reasons)))
        except AttnregError as error:
            return Result(name, "broken", problem=str(error))
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises belongs into its row
            return Result(name, "broken", problem=f"{type(error).__name__}: {error}")
        if not math.isfinite(deviation):
            return Result(name, "wrong", mask, milliseconds, problem=f"deviates from the oracle by {deviation}")
        status = "works" if deviation <= TOLERANCES[self.dtype] else "wrong"
        return Result(name, status, mask, milliseconds, deviation)

    def _mask_format(self, backend: Backend) -> str:
        seen: list[str] = []

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append(described(args[4] if len(args) > 4 else kwargs.get("attention_mask")))  # noqa: PLR2004
            return backend.attention(*args, **kwargs)

        self._select(bind(replace(backend, attention=spy)))
        self._embed()
        if not seen:
            problem = f"{type(self.model).__name__} does not call the attention function that was chosen"
            raise BridgeError("transformers", problem, "Name another model.")
        return seen[0]

    def _select(self, implementation: str) -> None:
        self.model.set_attn_implementation(implementation)
        if self.model.config._attn_implementation != implementation:  # noqa: SLF001 - there is no public way to read it
            raise BridgeError(
                "transformers",
                f"{type(self.model).__name__} does not let its attention be chosen",
                "Name another model.",
            )

    def _embed(self) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.model(**self.batch).last_hidden_state.double()
        real = self.batch["attention_mask"][..., None].double()
        return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)

    def _time(self, repeats: int) -> float:
        synchronize: Callable[[], None] = torch.cuda.synchronize if self.device.startswith("cuda") else lambda: None
        times = []
        for _ in range(repeats):
            synchronize()
            started = time.perf_counter()
            with torch.no_grad():
                self.model(**self.batch)
            synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1000


def described(mask: object) -> str:
    """Say in a few words what an attention function was handed."""
    if mask is None:
        return "none"
    if isinstance(mask, torch.Tensor):
        return f"{mask.dim()}D {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
    return type(mask).__name__


def similar_pairs(embeddings: torch.Tensor) -> list[tuple[float, int, int]]:
    """Return `(cosine, i, j)` for all pairs of rows, the most similar first."""
    cosine = (embeddings @ embeddings.T).tolist()
    count = len(cosine)
    return sorted(((cosine[i][j], i, j) for i in range(count) for j in range(i + 1, count)), reverse=True)
