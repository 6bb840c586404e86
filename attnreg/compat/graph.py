"""One operator of a foreign kernel, for graphs: torch.compile, torch.export and torch.jit.trace see a single node.

Outside of graphs nothing of this is needed, and it is not free: adapters call the kernel itself there.

Source: https://docs.pytorch.org/tutorials/advanced/python_custom_ops.html.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch

from attnreg.capabilities import Reason
from attnreg.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Tensors = tuple[torch.Tensor, ...]
    Gradients = tuple[torch.Tensor | None, ...]

_SCHEMA: Final = re.compile(r"\((?P<args>.*)\) -> \(?(?P<returns>Tensor(, Tensor)*)\)?")


def graph_op(
    name: str,
    schema: str,
    forward: Callable[..., Tensors],
    fake: Callable[..., Tensors],
    *,
    backward: Callable[[Gradients, Tensors, tuple[Any, ...]], Gradients] | None = None,
    differentiable: Sequence[str] = (),
    without_gradient: Sequence[int] = (),
    random: bool = False,
) -> Callable[..., Any]:
    """Make one operator of a kernel.

    Args:
        name: `"namespace::name"`, the namespace a plugin's own.
        schema: arguments and results as torch writes them, such as `"(Tensor query, float scale) -> (Tensor, Tensor)"`;
            no argument is keyword-only or has a default, all results are tensors.
        forward: runs the kernel, without autograd; called with the arguments by position. It returns a tuple, none of
            which is an argument.
        fake: returns empty, contiguous tensors of the results' shapes, dtypes and devices.
        backward: `(grads, outputs, args) -> gradients`: of each result a gradient or None, the results, the
            arguments; it returns one gradient, or None, for each name in *differentiable*.
        differentiable: arguments that have gradients.
        without_gradient: results, by number, through which no gradient flows: asking for one raises.
        random: it draws random numbers, so that running it again, as checkpointing does, must draw the same ones.

    Returns:
        The operator, called by position. It returns a tuple, or the one tensor if there is one.

    Raises:
        InvalidInputError: *schema* is none, or *differentiable* names no argument.
    """
    found = _SCHEMA.fullmatch(schema)
    if found is None or "=" in found["args"]:  # torch leaves out what is as by default
        raise InvalidInputError("the schema", repr(schema), "such as '(Tensor query, float scale) -> (Tensor, Tensor)'")
    count = found["returns"].count("Tensor")
    names = [argument.split()[-1] for argument in found["args"].split(",") if argument.strip()]
    if unknown := set(differentiable) - set(names):
        raise InvalidInputError("differentiable", ", ".join(sorted(unknown)), f"some of {', '.join(names)}")
    operator = _operator(name, schema, forward, fake, single=count == 1, random=random)
    if backward is not None:
        places = tuple(names.index(each) for each in differentiable)
        outputs = ", ".join(f"Tensor output_{number}" for number in range(count))
        grads = ", ".join(f"Tensor? grad_{number}" for number in range(count))
        returns = ", ".join(["Tensor"] * len(places))
        adjoint = _operator(
            f"{name}_backward",
            f"({grads}, {outputs}, {found['args']}) -> ({returns})",
            _adjoint(backward, count, places),
            lambda *args: tuple(_like(args[2 * count + place], args[0]) for place in places),
            single=len(places) == 1,
        )
        _differentiate(operator, adjoint, places, count, tuple(without_gradient))
    called: Callable[..., Any] = operator
    return called


def _operator(
    name: str,
    schema: str,
    run: Callable[..., Tensors],
    fake: Callable[..., Tensors],
    *,
    single: bool,
    random: bool = False,
) -> Any:
    def result(found: Tensors) -> Any:
        # The graph was laid out for contiguous results; and an operator's result must not be another one in disguise.
        return found[0].contiguous() if single else tuple(each.contiguous() for each in found)

    def computed(*args: Any) -> Any:
        with torch.no_grad():
            return result(run(*args))

    tags = (torch.Tag.nondeterministic_seeded,) if random else ()
    operator = torch.library.custom_op(name, computed, mutates_args=(), schema=schema, tags=tags)
    operator.register_fake(lambda *args: result(fake(*args)))
    return operator


def _adjoint(
    backward: Callable[[Gradients, Tensors, tuple[Any, ...]], Gradients], count: int, places: tuple[int, ...]
) -> Callable[..., Tensors]:
    def computed(*args: Any) -> Tensors:
        rest = args[2 * count :]
        found = backward(args[:count], args[count : 2 * count], rest)
        pairs = zip(found, places, strict=True)
        return tuple(_like(rest[place], args[count]) if grad is None else grad for grad, place in pairs)

    return computed


def _like(argument: torch.Tensor | None, output: torch.Tensor | None) -> torch.Tensor:
    """Return room for a gradient; for an argument that was not given, nothing that anybody reads."""
    if argument is not None:
        return torch.zeros_like(argument, memory_format=torch.contiguous_format)
    return torch.zeros(0) if output is None else output.new_zeros(0)


def _differentiate(
    operator: Any, adjoint: Any, places: tuple[int, ...], count: int, without_gradient: tuple[int, ...]
) -> None:
    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        outputs = (output,) if count == 1 else tuple(output)
        tensors = [each for each in inputs if isinstance(each, torch.Tensor)]
        ctx.save_for_backward(*outputs, *tensors)
        ctx.rest = tuple(None if isinstance(each, torch.Tensor) else (each,) for each in inputs)

    def differentiate(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        if any(grads[number] is not None for number in without_gradient):
            fix = "Detach it, also where a compiled function returns it, or choose a backend whose log-sum-exp has one."
            reason = Reason("backward", "the gradient of the log-sum-exp", "that of the output", fix)
            raise UnsupportedError(operator._qualname.partition("::")[0], [reason])  # noqa: SLF001
        outputs, tensors = ctx.saved_tensors[:count], iter(ctx.saved_tensors[count:])
        inputs = tuple(next(tensors) if each is None else each[0] for each in ctx.rest)
        found = adjoint(*grads, *outputs, *inputs)
        found = (found,) if len(places) == 1 else found
        gradients: list[torch.Tensor | None] = [None] * len(inputs)
        for place, gradient in zip(places, found, strict=True):
            gradients[place] = gradient if isinstance(inputs[place], torch.Tensor) else None
        return tuple(gradients)

    operator.register_autograd(differentiate, setup_context=remember)


def rerun(
    function: Callable[..., Tensors], places: Sequence[int]
) -> Callable[[Gradients, Tensors, tuple[Any, ...]], Gradients]:
    """Make a *backward* for `graph_op` of a function that is differentiable itself, by computing it once more.

    For kernels that publish no backward pass. The function must hand its arguments to an autograd function of the
    kernel's as they are: inside of an operator, torch keeps no account of its own operations.

    Args:
        function: `(*args) -> tuple of tensors`.
        places: which arguments have gradients.

    Raises:
        UnsupportedError: inside of the backward pass, if the results have none.
    """

    def backward(grads: Gradients, _: Tensors, args: tuple[Any, ...]) -> Gradients:
        given = list(args)
        for place in places:
            given[place] = args[place].detach().requires_grad_()
        with torch.enable_grad():
            found = function(*given)
        pairs = [
            (output, grad)
            for output, grad in zip(found, grads, strict=True)
            if output.requires_grad and grad is not None
        ]
        if not pairs:
            fix = "Call it outside of a compiled graph, or choose another backend."
            reason = Reason("backward", "gradients in a graph", "a kernel that is an autograd function", fix)
            raise UnsupportedError(getattr(function, "__qualname__", "the kernel"), [reason])
        leaves = [given[place] for place in places]
        outputs, gradients = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    return backward
