"""The example plugin keeps the contract for what it declares, refuses the rest, and fits on a page."""

import ast
import inspect

import attnreg_loopback

from attnreg.testing import BackendContract


class TestLoopback(BackendContract):
    """Every law of the contract."""

    name = "loopback"
    device = "cpu"


def test_code_fits_on_a_page() -> None:
    """The plugin is at most 25 lines of code, docstrings and blank lines aside."""
    tree = ast.parse(inspect.getsource(attnreg_loopback))
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = inspect.getsource(attnreg_loopback).splitlines()
    code = [line for number, line in enumerate(lines, 1) if line.strip() and number not in docstrings]
    assert len(code) <= 25
