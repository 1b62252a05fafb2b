"""The attention kernel `flash3`: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), for Hopper cards."""

from hf_accel.attention.flash import FlashAttention


class Flash3(FlashAttention):
    """FlashAttention-3, from its package or from the hub."""

    name = "flash3"
    module = "flash_attn_interface"
    hub = "kernels-community/vllm-flash-attn3"
    hub_version = 1
    capability = (9, 0)
    newest = 9
