"""Backends for whole models: by sub-model, by sub-configuration, by pattern, at run time and when loading."""

from attnreg.models.loader import load_model
from attnreg.models.parts import Host, Part
from attnreg.models.setting import get_attn_implementation, set_attn_implementation

__all__ = ["Host", "Part", "get_attn_implementation", "load_model", "set_attn_implementation"]
