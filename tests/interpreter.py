"""Import this before torch: kernels in Triton run in its interpreter where there is no GPU.

Triton reads the environment when it is imported, which torch may do.
"""

import os
import shutil
from pathlib import Path

if shutil.which("nvidia-smi") is None and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
