"""What each rank of the real engine holds of its quantized layers, in bytes.

``python -m tests.engine.held MODEL TP OUT`` writes, for each rank, the bytes of each
module that has block scales when its weights are loaded.
"""

import json
import os
import sys
from pathlib import Path

from vllm_patch.cli.cpu_fp8 import operators

SCALES = "weight_scale_inv", "w13_weight_scale_inv", "weight_scale", "w13_weight_scale"


def weights_and_scales(module) -> list:
    """Return them without biases, such as those by which some routers choose."""
    return [p for name, p in module.named_parameters(recurse=False) if "weight" in name]


def note_bytes() -> None:
    """Write them as soon as they are loaded: kernels lay them out anew after that."""
    from vllm.model_executor.model_loader import base_loader

    stock = base_loader.process_weights_after_loading

    def process(model, *args, **kwargs):
        from vllm.distributed import get_tensor_model_parallel_rank

        held = {
            name: sum(p.nbytes for p in weights_and_scales(module))
            for name, module in model.named_modules()
            if any(hasattr(module, scale) for scale in SCALES)
        }
        rank = get_tensor_model_parallel_rank()
        Path(f"{os.environ['HELD_OUT']}.{rank}").write_text(json.dumps(held))
        return stock(model, *args, **kwargs)

    base_loader.process_weights_after_loading = process


if __name__ in ("__main__", "__mp_main__"):  # The latter in processes it spawns.
    operators.install()
    note_bytes()

if __name__ == "__main__":
    model, tp, out = sys.argv[1:]
    os.environ["HELD_OUT"] = out
    from vllm import LLM
    from vllm_patch.cli.cpu_fp8 import check
    from vllm_patch.cli.engine_run import ON_CPU

    check.run()
    LLM(model, tensor_parallel_size=int(tp), max_model_len=128, **ON_CPU)
