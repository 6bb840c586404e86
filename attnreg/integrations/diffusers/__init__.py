"""Every attnreg backend, in an unmodified diffusers model.

    attnreg.set_attn_implementation(transformer, "sdpa")
    attnreg.set_attn_implementation(transformer, {"transformer_blocks.*": "eager"})
    attnreg.set_attn_implementation(transformer, "diffusers:native")  # and back

diffusers' own choice is a closed enumeration. But what it calls `native` is torch's `scaled_dot_product_attention`, and
so is what models call that do not let one choose. So a module that is given a backend dispatches to `native`, and its
calls of that function are answered by the backend: in that module and that thread, and nowhere else.

The choice stays with the module, whatever processor it is given later, such as that of fused projections, until
`set_attn_implementation` or diffusers' own `set_attention_backend` is called.
"""

from attnreg.errors import BridgeError

try:
    from attnreg.integrations.diffusers.host import HOST, Diffusers, reset
except ImportError as error:
    raise BridgeError(
        "diffusers",
        f"its dispatcher cannot be imported ({error})",
        "pip install 'attnreg[diffusers]' (diffusers 0.35 or newer).",
    ) from error

__all__ = ["HOST", "Diffusers", "reset"]
