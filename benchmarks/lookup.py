"""What it costs to look a backend's attention function up by its name, in a loop with local variables.

Budget: at most twice a dictionary lookup. It is judged on `interface.resolved[name]`, the plain dictionary of the
names that have been looked up, and `interface[name]` is shown beside it with the same budget as a target: as a
method written in Python it also pays for a call, which a dictionary does not. The figure is the ratio to
`dictionary[name]` with the loop that both run in; "net" is the same ratio without it, "/ transformers" the ratio to
`ALL_ATTENTION_FUNCTIONS[name]`.
"""

from __future__ import annotations

from report import Figure, report, wants_json
from timing import interleaved
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnreg

BUDGET = 2.0
LOOP = "pass"
DICTIONARY = "dictionary[name]"
BOUND = "interface.resolved[name]"
BY_NAME = "interface[name]"
PEER = "ALL_ATTENTION_FUNCTIONS[name]"

STATEMENTS = (
    LOOP,
    DICTIONARY,
    "dictionary.get(name, None)",
    BOUND,
    BY_NAME,
    "interface.get_interface(name, None)",
    "get(name)",
    PEER,
    "ALL_ATTENTION_FUNCTIONS.get_interface(name, None)",
)


def main() -> int:
    """Run the benchmark and return its exit code."""
    as_json = wants_json(__doc__)
    name = "sdpa"
    interface = attnreg.AttentionInterface()
    values = {
        "name": name,
        "dictionary": {name: interface[name]},
        "interface": interface,
        "get": attnreg.get,
        "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS,
    }
    for statement in STATEMENTS:  # what is resolved at the first use is resolved now
        eval(statement.replace(LOOP, "None"), {}, values)  # noqa: S307 - the statements are those above
    seconds = interleaved(STATEMENTS, values, number=20_000, turns=100)
    return report("Looking a name up", [_figure(statement, seconds) for statement in STATEMENTS], as_json=as_json)


def _figure(statement: str, seconds: dict[str, float]) -> Figure:
    mine, loop, dictionary = seconds[statement], seconds[LOOP], seconds[DICTIONARY]
    return Figure(
        what=statement.replace(LOOP, "an empty loop"),
        rounds=[mine / dictionary],
        unit="x",
        budget=BUDGET if statement in {BOUND, BY_NAME} else None,
        target=statement == BY_NAME,
        beside={
            "time": f"{mine * 1e9:.0f} ns",
            "net": "" if statement == LOOP else f"{(mine - loop) / (dictionary - loop):.2f}x",
            "/ transformers": f"{mine / seconds[PEER]:.2f}x",
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
