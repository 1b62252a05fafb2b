"""The attention kernel `flash4`: FlashAttention-4, written in CuTe, for Hopper cards and later."""

from hf_accel.attention.flash import FlashAttention


class Flash4(FlashAttention):
    """FlashAttention-4, from its package or from the hub."""

    name = "flash4"
    module = "flash_attn.cute"
    hub = "kernels-community/flash-attn4"
    hub_version = 0
    capability = (9, 0)
