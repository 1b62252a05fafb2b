"""The ladder of attention kernels: the order in which a call goes down from one to the next."""

from hf_accel.attention.cudnn import Cudnn
from hf_accel.attention.flash2 import Flash2
from hf_accel.attention.flash3 import Flash3
from hf_accel.attention.flash4 import Flash4
from hf_accel.attention.flex import Flex
from hf_accel.attention.native import Native
from hf_accel.attention.registry import KERNELS, add_kernel
from hf_accel.attention.sdpa import Sdpa
from hf_accel.attention.tiled import Tiled

for _kernel in (Flash4, Flash3, Flash2, Cudnn, Flex, Sdpa, Native, Tiled):
    add_kernel(_kernel())

__all__ = ["KERNELS"]
