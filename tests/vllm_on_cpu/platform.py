"""A Hopper look-alike platform for vLLM on a CPU."""

import importlib.machinery
import os
import sys
import types

COMPILED_MODULES = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch")
# Kernels that need compiled operators; the Triton one remains.
DISABLED_LINEAR_KERNELS = (
    "FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
    "DeepGemmFp8BlockScaledMMKernel",
    "CutlassFp8BlockScaledMMKernel",
    "MarlinFP8ScaledMMLinearKernel",
)
# What methods of the platform return.
ANSWERS = {
    "get_device_name": "NVIDIA H200",
    "get_device_total_memory": 140 << 30,
    "num_compute_units": 132,
    "device_count": 8,
    "is_pin_memory_available": False,
    "set_device": None,
    "get_device_communicator_cls": (
        "vllm.distributed.device_communicators.base_device_communicator."
        "DeviceCommunicatorBase"
    ),
}


def install() -> None:
    """Prepare this process; vLLM must not be imported yet."""
    assert "vllm" not in sys.modules, "vLLM was imported before the look-alike"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["VLLM_USE_DEEP_GEMM"] = "0"
    os.environ["VLLM_DISABLED_KERNELS"] = ",".join(DISABLED_LINEAR_KERNELS)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    # Tensors are small, and pytest's workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch

    from tests.vllm_on_cpu import compiled_ops, triton_interpreter

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None
    triton_interpreter.install()
    for name in COMPILED_MODULES:
        _stub(f"vllm.{name}")
    # These two look for CUDA and ROCm when imported; nothing here calls them.
    _stub("vllm.vllm_flash_attn", lambda *a, **k: None).__path__ = []
    _stub("vllm.platforms.rocm", lambda *a, **k: False)
    compiled_ops.install()
    _become_hopper()


def _stub(name: str, function=None) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def attribute(attr: str):
        if function is None or attr.startswith("__"):
            raise AttributeError(attr)
        return function

    module.__getattr__ = attribute
    sys.modules[name] = module
    return module


def _become_hopper() -> None:
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class HopperLookAlike(NonNvmlCudaPlatform):
        device_name = device_type = "cpu"
        dispatch_key = "CPU"
        dist_backend = "gloo"
        simple_compile_backend = "eager"

        @classmethod
        def has_device_capability(cls, capability, device_id=0):
            if not isinstance(capability, int):
                capability = capability[0] * 10 + capability[1]
            return capability <= 90

    answers = {**ANSWERS, "get_device_capability": DeviceCapability(9, 0)}
    for name, answer in answers.items():
        says = staticmethod(lambda *args, answer=answer, **kwargs: answer)
        setattr(HopperLookAlike, name, says)
    vllm.platforms._current_platform = HopperLookAlike()
