"""Models whose layers tensor parallelism cuts, by their public config.json."""

from dataclasses import dataclass, field
from typing import Any

BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
COMMON = {
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "head_dim": 128,
}
QWEN3 = {
    **COMMON,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_MOE = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}
GLM4_MOE = {
    **COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "rms_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": False,
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class Model:
    """A model at one tensor-parallel size.

    Attributes:
        name: For ``--models``.
        tp_size: Tensor-parallel size.
        why: What is cut.
        family: Fields of its config.json that its family shares.
        sizes: Those that it does not.

    """

    name: str
    tp_size: int
    why: str
    family: dict[str, Any] = field(repr=False)
    sizes: dict[str, int] = field(repr=False)

    def config(self, layers: int | None = None, **changes: Any) -> dict[str, Any]:
        """Return config.json, with fewer layers and other changes if asked for."""
        fields = {**self.family, **self.sizes, **changes}
        fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
        # Published checkpoints keep routers and the head in bfloat16.
        count = range(fields["num_hidden_layers"])
        gates = [f"model.layers.{layer}.mlp.gate" for layer in count]
        skipped = {"modules_to_not_convert": ["lm_head", *gates]}
        return {**fields, "quantization_config": {**BLOCKS, **skipped}}


QWEN3_30B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
}
MODELS = (
    Model(
        *("Qwen3-235B-TP8", 8, "experts: 192 columns", QWEN3_MOE),
        {
            "hidden_size": 4096,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
        },
    ),
    Model(
        *("Qwen3-Coder-480B-TP8", 8, "experts: 320 columns", QWEN3_MOE),
        {
            "hidden_size": 6144,
            "num_hidden_layers": 62,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "intermediate_size": 8192,
            "moe_intermediate_size": 2560,
            "num_experts": 160,
        },
    ),
    Model(
        *("GLM-4.5-Air-TP8", 8, "experts and shared expert: 176 columns", GLM4_MOE),
        {
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
        },
    ),
    Model("Qwen3-30B-A3B-TP4", 4, "experts: 192 columns", QWEN3_MOE, QWEN3_30B),
    Model("Qwen3-30B-A3B-TP8", 8, "experts: 96 columns", QWEN3_MOE, QWEN3_30B),
    Model(
        *("Qwen3-4B-TP8", 8, "linear layers: 1216 columns"),
        {**QWEN3, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        {
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 9728,
        },
    ),
)


def small(tp_size: int) -> Model:
    """Return a model whose experts are cut alike, small enough for any machine."""
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "moe_intermediate_size": 192 * tp_size,
        "num_experts": 16,
    }
    return Model(
        f"small-TP{tp_size}", tp_size, "experts: 192 columns", QWEN3_MOE, sizes
    )
