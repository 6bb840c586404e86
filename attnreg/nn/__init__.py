"""Attention layers for `torch.nn`: fused projections around one call of attention, on any backend.

A layer is bound to its backend when it is built: a name is resolved and checked then, and only `auto` is decided by
what a call needs. State dicts hold the projections and nothing else, whatever the backend.

`AttentionLayer` and `AttentionModel` are for authors of models whose layers are their own.
"""

from attnreg.nn.attention_layer import AttentionLayer
from attnreg.nn.attention_model import AttentionModel
from attnreg.nn.cross_attention import CrossAttention
from attnreg.nn.self_attention import SelfAttention

__all__ = ["AttentionLayer", "AttentionModel", "CrossAttention", "SelfAttention"]
