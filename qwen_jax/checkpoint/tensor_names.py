"""The names of tensors in a Hugging Face checkpoint, and the leaves of the decoder that they hold.

This module knows no file format, and no shapes.
"""

# For each tensor, the leaves that are stacked along its rows, in the order of the original's
# modules. {L} is the number of the layer.
TABLE: dict[str, tuple[str, ...]] = {
    "transformer.wte.weight": ("embedding",),
    "transformer.h.{L}.ln_1.weight": ("layers.{L}.attn_norm",),
    "transformer.h.{L}.attn.c_attn.weight": (
        "layers.{L}.attn.q",
        "layers.{L}.attn.k",
        "layers.{L}.attn.v",
    ),
    "transformer.h.{L}.attn.c_attn.bias": (
        "layers.{L}.attn.q_bias",
        "layers.{L}.attn.k_bias",
        "layers.{L}.attn.v_bias",
    ),
    "transformer.h.{L}.attn.c_proj.weight": ("layers.{L}.attn.o",),
    "transformer.h.{L}.ln_2.weight": ("layers.{L}.ffn_norm",),
    "transformer.h.{L}.mlp.w1.weight": ("layers.{L}.ffn.up",),
    "transformer.h.{L}.mlp.w2.weight": ("layers.{L}.ffn.gate",),
    "transformer.h.{L}.mlp.c_proj.weight": ("layers.{L}.ffn.down",),
    "transformer.ln_f.weight": ("final_norm",),
    "lm_head.weight": ("head",),
}
