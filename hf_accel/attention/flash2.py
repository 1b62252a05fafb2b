"""The attention kernel `flash2`: FlashAttention-2 (Dao 2023, arXiv:2307.08691), for Ampere cards and later."""

from hf_accel.attention.flash import FlashAttention


class Flash2(FlashAttention):
    """FlashAttention-2, from its package or from the hub."""

    name = "flash2"
    module = "flash_attn"
    hub = "kernels-community/flash-attn2"
    hub_version = 4
    capability = (8, 0)
