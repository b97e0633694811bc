"""Makes torch say that this CPU has AVX2 and no more, in every Python process.

vLLM then loads its build for such CPUs, which has no FP8 operators.
"""

import os

import wrapt

os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"


def _without_avx512(cpu) -> None:
    for name in dir(cpu):
        if name.startswith(("_is_avx512", "_is_amx")) and name.endswith("_supported"):
            setattr(cpu, name, lambda: False)


wrapt.register_post_import_hook(_without_avx512, "torch.cpu")
