"""Test doubles: a function and a formatter that satisfy the contract and do as little as possible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

BUILTIN = ["eager", "flex_attention", "sdpa", "sdpa_cudnn", "sdpa_efficient", "sdpa_flash", "sdpa_math", "varlen"]
"""What needs no plugin, sorted."""

CAUSAL, FREE = SimpleNamespace(is_causal=True), SimpleNamespace(is_causal=False)
"""Modules that say whether they are causal."""


def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """Return the query as it is: attention enough where only the registry is under test."""
    return query.transpose(1, 2), None


def formatter(**kwargs: Any) -> Any:
    """Hand the padding mask on."""
    return kwargs.get("attention_mask")


GOOD = """
import attnreg

def attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2), None

def mask(**kwargs):
    return kwargs.get("attention_mask")

@attnreg.hookimpl
def attnreg_register(registry):
    registry.add(attnreg.Backend(name={name!r}, attention=attention, mask=mask))
"""
