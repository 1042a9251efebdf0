"""Metal kernels run on a host: the text that MLX would compile, translated, checked, compiled and run.

Nothing here knows Apple's compiler or a GPU's speed. What it does know is in shim.h and machine.cpp.
"""

from tests.metal.emulator.run import Emulator, Report
from tests.metal.emulator.toolchain import KernelError, missing

__all__ = ["Emulator", "KernelError", "Report", "missing"]
