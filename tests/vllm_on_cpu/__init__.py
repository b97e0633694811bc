"""The real vLLM with its CUDA code paths, on a machine without a GPU.

``install`` makes an imported vLLM believe that it runs on a Hopper GPU, while
tensors stay on the CPU, Triton kernels run in Triton's interpreter and the few
compiled operators that are met have stand-ins. Call it before vLLM is imported.
"""

from tests.vllm_on_cpu.platform import install

__all__ = ["install"]
