"""Experts of real models that tensor parallelism cuts inside a quant block."""

from dataclasses import dataclass

from benchmarks.quantized import BLOCK, Part


@dataclass(frozen=True)
class Case:
    """The routed experts of one model at one tensor-parallel size.

    Attributes:
        name: Model and size, for ``--cases``.
        experts: Experts of a layer.
        top_k: Experts of a token.
        hidden: Hidden size.
        total: Intermediate columns of an expert, over all ranks.
        tp_size: Tensor-parallel size.
        why: What the case is for.
        rank: The rank that is timed.
        has_bars: Whether the bars were set for this case.
        activation: What experts compute of gate and up, as vLLM calls it.
        swiglu_limit: What ``silu`` clamps gate and up to, if it does.

    """

    name: str
    experts: int
    top_k: int
    hidden: int
    total: int
    tp_size: int
    why: str
    rank: int = 1
    has_bars: bool = False
    activation: str = "silu"
    swiglu_limit: float | None = None

    @property
    def shard(self) -> Part:
        return self.shard_of(self.rank)

    def shard_of(self, rank: int) -> Part:
        return Part.of(self.total, rank, self.tp_size)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's real columns on a rank, with their scales."""
        blocks = self.shard.span // BLOCK * self.hidden // BLOCK
        return 3 * (self.shard.size * self.hidden + 4 * blocks)


CASES = (
    Case(
        *("Qwen3-235B-TP8", 128, 8, 4096, 1536, 8),
        why="192 columns: a block and a half, at either end of the span",
        has_bars=True,
    ),
    Case(
        *("Qwen3-30B-A3B-TP4", 128, 8, 2048, 768, 4),
        why="192 columns with half of the hidden size: more launch than work",
    ),
    Case(
        *("Qwen3-30B-A3B-TP8", 128, 8, 2048, 768, 8),
        why="96 columns over two blocks, 32 in one: padding is 2.7x; refines to 32",
    ),
    Case(
        *("Qwen3-Coder-480B-TP8", 160, 8, 6144, 2560, 8),
        why="320 columns in three blocks: the largest layer, the least padding",
    ),
    Case(
        *("Qwen3-Next-TP8", 512, 10, 2048, 512, 8),
        why="64 columns: half a block, many experts, top-10",
    ),
    Case(
        *("E512-640-TP8", 512, 10, 2048, 640, 8),
        why="80 columns over two blocks: vLLM cannot refine below 32",
    ),
    Case(
        *("GLM-4.5-Air-TP8", 128, 8, 4096, 1408, 8),
        why="176 columns from 48: no power of two divides the shard; cannot be refined",
    ),
    Case(
        *("Step-3.5-Flash-TP8", 288, 8, 4096, 1280, 8),
        why="160 columns, and the activation of its last layers, clamped after SiLU",
        activation="swiglustep",
    ),
    Case(
        *("Gemma-4-26B-A4B-TP4", 128, 8, 2816, 704, 4),
        why="176 columns, and GELU",
        activation="gelu_tanh",
    ),
    Case(
        *("DeepSeek-V4-Pro-TP16", 384, 6, 7168, 3072, 16),
        why="192 columns, and an activation that is clamped before SiLU",
        swiglu_limit=10.0,
    ),
)
