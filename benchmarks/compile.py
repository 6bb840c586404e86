"""Whether a model that looks its backend up by name in `forward` compiles as one graph, and stays compiled.

Budgets: no graph break, one compilation, and none more when another backend is registered, looked up in the same
interface, and taken back. The names are looked up once before, as the first use may have to import a plugin.

The model is compiled with `torch.compile(fullgraph=True, backend="eager")`, where a graph break is an error; the
compilations are what `torch._dynamo.testing.CompileCounter` counts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from report import Figure, report, wants_json
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import attnreg

OTHER = "benchmark-other"


class ByName(torch.nn.Module):
    """Looks its backend up as `interface[name]`."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation
        self.interface = attnreg.AttentionInterface()
        self.look_up()  # the first use may import a plugin, which cannot be traced

    def look_up(self) -> Any:
        """Return the attention function."""
        return self.interface[self.implementation]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention with the backend of that name."""
        output, _ = self.look_up()(self, query, key, value, None, scaling=None, dropout=0.0)
        return cast("torch.Tensor", output)


class ByGetInterface(ByName):
    """Looks its backend up as `interface.get_interface(name, default)`, as transformers' models do."""

    def look_up(self) -> Any:
        """Return the attention function."""
        return self.interface.get_interface(self.implementation, None)


def main() -> int:
    """Run the benchmark and return its exit code."""
    as_json = wants_json(__doc__)
    figures = [
        figure
        for label, model in {"interface[name]": ByName, "interface.get_interface(name)": ByGetInterface}.items()
        for implementation in ("sdpa", "eager")
        for figure in _measure(f"{label}, {implementation}", model(implementation))
    ]
    return report("Under torch.compile(fullgraph=True)", figures, as_json=as_json)


def _measure(what: str, model: ByName) -> list[Figure]:
    torch.compiler.reset()
    counters.clear()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    inputs = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    try:
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    except Unsupported:
        return [Figure(what=f"{what}: graph breaks", rounds=[1], unit="", budget=0)]
    breaks = sum(counters["graph_break"].values())
    compilations = counter.frame_count
    _register_another(model.interface)
    compiled(*inputs)
    attnreg.AttentionInterface.unregister(OTHER)
    compiled(*inputs)
    return [
        Figure(what=f"{what}: graph breaks", rounds=[breaks], unit="", budget=0),
        Figure(what=f"{what}: compilations", rounds=[compilations], unit="", budget=1),
        Figure(what=f"{what}: recompilations", rounds=[counter.frame_count - compilations], unit="", budget=0),
    ]


def _register_another(interface: attnreg.AttentionInterface) -> None:
    def other(_: Any, query: Any, *_inputs: Any, **_keywords: Any) -> Any:
        return query.transpose(1, 2), None

    attnreg.AttentionInterface.register(OTHER, other, mask=attnreg.NO_MASK)
    interface[OTHER]


if __name__ == "__main__":
    raise SystemExit(main())
