"""Linear layers of real models that tensor parallelism cuts inside a quant block."""

from dataclasses import dataclass, replace

import torch

from benchmarks import checkpoint as checkpoints
from benchmarks.checkpoint import Checkpoint
from benchmarks.one_rank import rank_of
from benchmarks.quantized import (
    BLOCK,
    FP8,
    Part,
    dequantized,
    normal,
    random_scales,
    round_up,
)

MERGED, ROW, QKV = (
    "MergedColumnParallelLinear",
    "RowParallelLinear",
    "QKVParallelLinear",
)


@dataclass(frozen=True)
class Case:
    """One linear layer of a model.

    Attributes:
        name: Model and layer.
        kind: Its class in ``vllm.model_executor.layers.linear``.
        whole: The dimension that is not cut.
        cut: Sizes that are cut, over all ranks: the input of a row-parallel layer,
            the logical shards of a merged one, query and KV heads of a QKV one.
        tp_size: Tensor-parallel size.
        head: Head size of a QKV layer.

    """

    name: str
    kind: str
    whole: int
    cut: tuple[int, ...]
    tp_size: int = 8
    head: int = 64

    @property
    def is_row(self) -> bool:
        return self.kind == ROW

    def parts(self, rank: int) -> list[Part]:
        """Return rank ``rank``'s part of each logical shard."""
        if self.kind != QKV:
            return [Part.of(size, rank, self.tp_size) for size in self.cut]
        heads, kv_heads = self.cut
        replicas = max(1, self.tp_size // kv_heads)
        kv = Part.of(kv_heads * self.head, rank // replicas, self.tp_size // replicas)
        return [Part.of(heads * self.head, rank, self.tp_size), kv, kv]

    def aligned(self) -> "Case":
        """Return the stock layer of the next aligned size: the control."""
        sizes = [round_up(p.size) * self.tp_size for p in self.parts(0)]
        kind = ROW if self.is_row else MERGED
        return replace(self, name=f"{self.name}, aligned", kind=kind, cut=tuple(sizes))

    def build(
        self,
        rank: int,
        device: torch.device,
        checkpoint: Checkpoint = checkpoints.FP8,
    ) -> torch.nn.Module:
        """Return vLLM's layer for one rank, its parameters full of NaN."""
        from vllm.model_executor.layers import linear

        with rank_of(self.tp_size, rank), device:
            config = checkpoint.quant_config()
            layer = getattr(linear, self.kind)(
                **self._sizes(), bias=False, quant_config=config, prefix=self.name
            )
        for param in layer.parameters():
            if param.dtype == FP8:
                param.data.view(torch.uint8).fill_(0x7F)
            else:
                param.data.fill_(float("nan"))
        return layer

    def _sizes(self) -> dict:
        if self.is_row:
            sizes = {"input_size": self.cut[0], "output_size": self.whole}
            return {**sizes, "reduce_results": False}
        if self.kind == MERGED:
            return {"input_size": self.whole, "output_sizes": list(self.cut)}
        heads, kv_heads = self.cut
        sizes = {"hidden_size": self.whole, "head_size": self.head}
        return {**sizes, "total_num_heads": heads, "total_num_kv_heads": kv_heads}

    def load(
        self,
        layer: torch.nn.Module,
        tensors: list["Quantized"],
        rank: int,
        checkpoint: Checkpoint = checkpoints.FP8,
    ):
        """Load whole checkpoint tensors and let vLLM prepare them for its kernel."""
        merged = [(index,) for index in range(len(tensors))]
        ids = {ROW: [()], QKV: [("q",), ("k",), ("v",)], MERGED: merged}[self.kind]
        weight, scale = layer.weight, checkpoint.scales(layer, "weight")
        stored = checkpoint.block_format.stored
        for shard_id, tensor in zip(ids, tensors, strict=True):
            weight.weight_loader(weight, tensor.weight, *shard_id)
            scale.weight_loader(scale, stored(tensor.scale), *shard_id)
        with rank_of(self.tp_size, rank):
            layer.quant_method.process_weights_after_loading(layer)

    def tensors(self, device: torch.device) -> list["Quantized"]:
        """Return a random checkpoint: one tensor for each logical shard."""
        generator = torch.Generator(device).manual_seed(0)
        totals = [p.total for p in self.parts(0)]
        shapes = [(t, self.whole) for t in totals]
        if self.is_row:
            shapes = [(self.whole, totals[0])]
        return [Quantized.random(*shape, generator) for shape in shapes]


def method_of(layer: torch.nn.Module):
    """Return the layer's method; of INC's, the one that its scheme wraps."""
    method = layer.quant_method
    return getattr(getattr(method, "scheme", None), "linear_method", method)


def kernel_of(layer: torch.nn.Module):
    """Return the kernel that vLLM chose, wherever a format keeps it."""
    kernels = (
        getattr(owner, name, None)
        for owner in (method_of(layer), getattr(layer, "scheme", None))
        for name in ("fp8_linear", "linear_kernel", "kernel")
    )
    return next(kernel for kernel in kernels if kernel is not None)


@dataclass(frozen=True)
class Quantized:
    """A checkpoint tensor ``[rows, columns]`` and its scale for each 128x128 block."""

    weight: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def random(cls, rows: int, columns: int, generator: torch.Generator):
        """Make one whose neighbouring blocks differ 10x in scale."""
        weight = normal(rows, columns, generator=generator).to(FP8)
        blocks = round_up(rows) // BLOCK, round_up(columns) // BLOCK
        return cls(weight, random_scales(*blocks, generator=generator))

    def dequantized(self) -> torch.Tensor:
        return dequantized(self.weight, self.scale, (0, 0), BLOCK)


CASES = (
    # 64 of each rank's 1216 are half a block.
    Case("Qwen3-4B gate_up", MERGED, 2560, (9728, 9728)),
    Case("Qwen3-4B down", ROW, 2560, (9728,)),
    # 64 per rank: less than a block.
    Case("Qwen3-Next shared gate_up", MERGED, 2048, (512, 512)),
    Case("Qwen3-Next shared down", ROW, 2048, (512,)),
    # 1368 per rank; spans differ between ranks, the checkpoint's last block is partial.
    Case("DeepSeek-V2-Lite gate_up", MERGED, 2048, (10944, 10944)),
    Case("DeepSeek-V2-Lite down", ROW, 2048, (10944,)),
    # 176 per rank, and the largest hidden size of these.
    Case("GLM-4.5-Air shared gate_up", MERGED, 4096, (1408, 1408)),
    Case("GLM-4.5-Air shared down", ROW, 4096, (1408,)),
    # Heads of 64: 192 query columns per rank, each KV head on two ranks.
    Case("24 heads of 64, 4 KV: qkv", QKV, 1536, (24, 4)),
    Case("24 heads of 64, 4 KV: o", ROW, 1536, (24 * 64,)),
)
