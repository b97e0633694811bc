"""The command as a whole: exit codes, output, what it needs, time and memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_patch.cli.check import command, report
from vllm_patch.cli.check.checkpoint import Tensor
from vllm_patch.cli.main import main

from . import files
from .known_models import QUANTIZATION, config

MODELS = Path(__file__).parents[2] / "models"
QWEN = str(MODELS / "qwen3_moe_1536.json")
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
NOT_NEEDED = "vllm", "torch", "transformers", "psutil", "huggingface_hub", "safetensors"


@pytest.mark.parametrize(
    ("model", "arguments", "code", "says"),
    [
        (
            "qwen3_moe_1536",
            ["-tp", "4"],
            0,
            "TP 4 (vLLM 0.33.0, hopper): runs in",
        ),
        ("qwen3_moe_1536", ["-tp", "8"], 0, "on refined blocks, faster with this"),
        (
            "qwen3_moe_1536",
            ["-tp", "8", "--vllm-version", "0.28.0"],
            *(1, "The output_size of gate's and up's weight = 192 is not divisible by"),
        ),
        (
            "qwen3_moe_1536",
            ["-tp", "8", "--platform", "cpu"],
            *(1, "Unsupported FP8 MoE backend: NONE"),
        ),
        (
            "qwen3_moe_1536",
            ["--tensor-parallel-size", "8", "--moe-backend", "deep_gemm"],
            *(0, "whole blocks, 2 of 8 ranks idle"),
        ),
        (
            "glm4_moe_1408",
            ["-tp", "4", "--platform", "cpu", "--vllm-version", "0.28.0"],
            *(2, "CPUs take experts of groups from vLLM 0.30.0 on"),
        ),
        ("glm4_moe_1408", ["-tp", "4", "--platform", "cpu"], 1, "backend: NONE"),
        ("qwen3_2432", ["-tp", "4", "-tp", "2"], 1, "TP 2 (vLLM"),
        ("qwen3_2432", ["-tp", "3"], 2, "Total number of attention heads (8) must be"),
        ("qwen3_2432_modelopt", ["-tp", "8"], 1, "FP8_PB_WO requires in divisible by"),
        # Its attention is as wide as heads of 128 at TP 8: nothing else is cut.
        ("qwen3_moe_1536", ["-tp", "8"], 0, "block on ranks: 1: 0+1, 4: 2+3, 7: 4+5"),
        ("qwen3_moe_1536", ["-tp", "8"], 0, "or: TP 4 keeps blocks whole"),
        ("qwen3_moe_1536", ["-tp", "8"], 0, "or: --enable-expert-parallel: whole"),
        # 256 instead of 192 columns of each expert, and the same attention.
        ("qwen3_moe_1536", ["-tp", "8"], 0, "any of vLLM's kernels, 26.2 MB a rank"),
    ],
)
def test_what_it_says(capsys, monkeypatch, model, arguments, code, says):
    monkeypatch.setattr(command, "_installed", lambda: "0.33.0")
    assert main(["check", str(MODELS / f"{model}.json"), *arguments]) == code
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([QWEN, "-tp", "0"], "--tp 0: give a number from 1 to 1024"),
        ([QWEN, "-tp", "99999999999"], "give a number from 1 to 1024"),
        (["no.json", "-tp", "8"], "is no folder, no file and no hub id"),
        (["./qwen", "-tp", "8"], "is no folder, no file and no hub id"),
        (
            [QWEN, "-tp", "8", "--platform", "cpu", "--moe-backend", "triton"],
            "triton has kernels for GPUs only. Give auto on cpu",
        ),
        ([QWEN, "-tp", "8", "--plot", "x.gif"], "ends in .svg or .png"),
        # Of a size that cuts nothing, too.
        ([QWEN, "-tp", "4", "--plot", "x.gif"], "ends in .svg or .png"),
        ([QWEN, "-tp", "8", "--plot", "/no/x.svg"], "Give another place"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    assert main(["check", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_was_drawn_is_said(tmp_path, capsys):
    file = tmp_path / "cut.svg"
    asked = [QWEN, "-tp", "8", "--vllm-version", "0.33.0", "--json"]
    assert main(["check", *asked, "--plot", str(file)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{file}: how TP 8 cuts model.layers.*.mlp.experts\n"
    assert json.loads(said.out) and file.is_file()


@pytest.mark.parametrize(
    ("model", "changes", "tp", "code"),
    [
        ("qwen3_moe_1536", {}, 4, 0),
        ("qwen3_2432", {}, 3, 2),  # Eight heads.
        # Its dense layer ends inside a block, which no two ranks share.
        ("glm4_moe_1408", {}, 1, 1),
        ("qwen3_moe_1536", {"quantization_config": None}, 8, 0),
    ],
)
def test_nothing_to_draw(tmp_path, capsys, model, changes, tp, code):
    fields = json.loads((MODELS / f"{model}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    file = tmp_path / "cut.svg"
    asked = [str(tmp_path), "-tp", str(tp), "--vllm-version", "0.33.0"]
    assert main(["check", *asked, "--plot", str(file)]) == code
    said = "not written: ranks cut no layer that this package takes"
    assert capsys.readouterr().err == f"{file}: {said}\n"
    assert not file.exists()


def test_one_rank(capsys):
    """Where the checkpoint itself ends inside a block, ranks have no part in it."""
    asked = ["check", str(MODELS / "glm4_moe_1408.json"), "-tp", "1"]
    assert main([*asked, "--vllm-version", "0.33.0"]) == 1
    out = capsys.readouterr().out
    down = "ends inside a block: 1 x model.layers.*.mlp.down_proj, 1024 x 10944: "
    assert f"{down}85.5 blocks\n" in out
    assert not re.search(r"^ +(cut|or): |/ 1\b", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("quantization", "code", "says"),
    [
        (None, 0, "unquantized: no weights in FP8 blocks"),
        (PER_TENSOR, 0, "fp8: no weights in FP8 blocks"),
        ({"quant_method": "awq"}, 2, "awq: no weights in FP8 blocks that"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            *(2, "not judged here"),
        ),
        ({"quant_method": "mxfp8"}, 2, "MXFP8, NVFP4, INT4, scales per tensor"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}},
            },
            *(2, "compressed-tensors: no weights"),
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_formats_that_are_not_taken(
    tmp_path, capsys, quantization, code, says, as_json
):
    fields = {**config("MiniMax-M2"), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = ["--json"] if as_json else []
    assert main(["check", str(tmp_path), "-tp", "8", *options]) == code
    out = capsys.readouterr().out
    assert says in out
    if as_json:
        assert json.loads(out)["sizes"] == [] and json.loads(out)["code"] == code


@pytest.mark.parametrize(
    ("quantization", "code", "says"),
    [
        # In a file of its own and lower case, as ModelOpt wrote it.
        (
            {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "fp8_pb_wo", "exclude_modules": None},
            },
            *(2, "FP8 in blocks of 128 x 128 (modelopt), by headers"),
        ),
        (None, 2, "not known: model.layers.0.self_attn."),
        (
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
            *(2, "modelopt: no weights in FP8 blocks that"),
        ),
    ],
)
def test_tensors_that_only_modelopt_explains(
    tmp_path, capsys, quantization, code, says
):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    del fields["quantization_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    if quantization:
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    options = ["-tp", "4", "--vllm-version", "0.33.0"]
    assert main(["check", str(folder), *options]) == code
    assert says in "".join(capsys.readouterr())


def test_block_scales_of_a_config_without_blocks(tmp_path, capsys):
    """Which would be loaded as scales of whole tensors."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    fields["quantization_config"] = PER_TENSOR
    (folder / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(folder), "-tp", "4"]) == 2
    assert "in blocks of None (by config.json's fp8)" in capsys.readouterr().err


def test_layers_without_blocks_of_a_config_with_them(tmp_path, capsys):
    """There are block scales for each of vLLM's; those of drafts do not count."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    tensors = files.tensors_of(fields)
    draft = "model.layers.1.mlp.up_proj"
    tensors[f"{draft}.weight"] = Tensor("F8_E4M3", (256, 256), "")
    tensors[f"{draft}.weight_scale"] = Tensor("F32", (), "")
    files.write_file(folder / "model.safetensors", tensors)
    asked = ["check", str(folder), "-tp", "2", "--vllm-version", "0.28.0"]
    assert main(asked) == 0
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = Tensor("F32", (), "")
    files.write_file(folder / "model.safetensors", tensors)
    capsys.readouterr()
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert "o_proj.weight_scale_inv in model.safetensors is per tensor, but" in error


@pytest.mark.parametrize("quantization", [None, PER_TENSOR])
@pytest.mark.parametrize(
    ("change", "tp", "says"),
    [
        ({}, "7", "TP 7 cannot run: Total number of attention heads (64) must be"),
        ({"num_key_value_heads": 6}, "8", "TP 8 cannot run: 6 KV heads are not divis"),
        ({}, "8", None),
        # Of a model whose layers nobody here knows.
        ({"hidden_size": None}, "7", "TP 7 cannot run: Total number of attention h"),
    ],
)
def test_sizes_that_do_not_divide_without_blocks(
    tmp_path, capsys, quantization, change, tp, says
):
    fields = {**config("Qwen3-235B-A22B"), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
    assert main(["check", str(tmp_path), "-tp", "1", "-tp", tp]) == (2 if says else 0)
    out = capsys.readouterr().out
    assert (says or "no weights in FP8 blocks") in out and "TP 1 " not in out
    assert says or "cannot run" not in out


BLOCKS_OF_CT = {
    "weights": {"type": "float", "num_bits": 8, "block_structure": [128, 128]}
}
EXPERT = "model.layers.0.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("quantization", "unknown"),
    [
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {**BLOCKS_OF_CT, "targets": ["re:.*mlp.*"]}},
            },
            "layers of config_groups for other targets than Linear",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": dict.fromkeys(
                    "ab", {**BLOCKS_OF_CT, "targets": ["Linear"]}
                ),
            },
            "layers of config_groups for other targets than Linear",
        ),
        (
            {**QUANTIZATION, "modules_to_not_convert": [EXPERT]},
            f"experts, of which {EXPERT} is left out",
        ),
        (
            {**QUANTIZATION, "ignored_layers": [r"re:.*experts\.[0-3]\..*"]},
            r"experts, of which re:.*experts\.[0-3]\..* is left out",
        ),
        *(
            (
                {**QUANTIZATION, "modules_to_not_convert": [name]},
                f"{module}: left out by a part of its name, or by a pattern",
            )
            for name, module in (
                ("self_attn", "model.layers.0.self_attn.q_proj"),
                ("re:.*o_proj", "model.layers.0.self_attn.o_proj"),
                ("model.layers.0.mlp", "model.layers.0.mlp.experts.gate_up_proj"),
            )
        ),
        (
            {**QUANTIZATION, "modules_to_not_convert": ["model"]},
            "layers in FP8 blocks: config.json names none of those that it implies",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.self_attn.o_proj": {"quant_algo": "FP8_PB_WO"},
                    "model.layers.0.mlp": {"quant_algo": "FP8_PB_WO"},
                },
            },
            "quantized_layers: model.layers.0.mlp",
        ),
        (
            {
                **json.loads((MODELS / "qwen3_moe_1536_quark.json").read_text())[
                    "quantization_config"
                ],
                "layer_quant_config": {"*o_proj": {}},
            },
            "layers of layer_quant_config",
        ),
    ],
)
def test_what_config_json_alone_does_not_tell(tmp_path, capsys, quantization, unknown):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    fields["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "1", "--vllm-version", "0.33.0"]) == 2
    out = capsys.readouterr().out
    assert f"not known: {unknown}\n" in out
    assert "the checkpoint's folder or hub id would tell" in out


@pytest.mark.parametrize(
    ("quantization", "kinds"),
    [
        (
            {
                **QUANTIZATION,
                "ignored_layers": [
                    f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"
                ],
                "modules_to_not_convert": ["model.layers.0.mlp.experts"],
            },
            ["experts"],
        ),
        (
            {**QUANTIZATION, "modules_to_not_convert": ["model.layers.0.mlp.experts"]},
            ["qkv", "row"],
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "FP8_PB_WO",
                "exclude_modules": ["*.experts*"],
            },
            ["qkv", "row"],
        ),
        (
            {
                "quant_method": "modelopt",
                "quantization": {
                    "quant_algo": "fp8_pb_wo",
                    "exclude_modules": ["model.layers.0.self_attn*"],
                },
            },
            ["experts"],
        ),
        # As vLLM, by the first expert; ModelOpt's other name for it; lower case.
        *(
            (
                {
                    "quant_method": "modelopt",
                    "quant_algo": "mixed_precision",
                    "quantized_layers": {
                        f"model.layers.0.mlp.experts.{n}.{leaf}": {"quant_algo": name}
                        for n in range(128)
                        for leaf in ("gate_proj", "up_proj", "down_proj")
                    },
                },
                ["experts"],
            )
            for name in ("FP8_PB_WO", "fp8_block_scales")
        ),
        # The first of their siblings, where nothing names experts.
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.mlp.gate_proj": {"quant_algo": "FP8_PB_WO"},
                    "model.layers.0.mlp.down_proj": {"quant_algo": "NVFP4"},
                },
            },
            ["experts"],
        ),
        # One shard speaks for those that vLLM merges with it; or the merged name.
        *(
            (
                {
                    "quant_method": "modelopt",
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        f"model.layers.0.self_attn.{name}": {"quant_algo": "FP8_PB_WO"}
                    },
                },
                ["qkv"],
            )
            for name in ("k_proj", "qkv_proj")
        ),
        # Experts' own entry comes first, wherever it is.
        (
            {
                "quant_method": "modelopt_mixed",
                "quantization": {
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        "model.layers.0.mlp.experts.gate_up_proj": {
                            "quant_algo": "NVFP4"
                        },
                        "model.layers.0.mlp.experts": {"quant_algo": "FP8_PB_WO"},
                    },
                },
            },
            ["experts"],
        ),
    ],
)
def test_what_config_json_leaves_out(tmp_path, capsys, quantization, kinds):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    fields["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(fields))
    main(["check", str(tmp_path), "-tp", "4", "--vllm-version", "0.33.0", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["unknown"] == []
    assert [layer["kind"] for layer in found["sizes"][0]["layers"]] == kinds


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (
            {**QUANTIZATION, "activation_scheme": "static"},
            "activation_scheme 'static': with blocks vLLM takes 'dynamic' alone",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "no activation_scheme, without which vLLM does not start",
        ),
        (
            {"quant_method": "fp8", "activation_scheme": None},
            "activation_scheme None: vLLM takes ('static', 'dynamic')",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_BLOCK_SCALES"},
            "FP8_BLOCK_SCALES: vLLM takes it of experts in MIXED_PRECISION alone",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"x.o_proj": {"quant_algo": "FP8_BLOCK_SCALES"}},
            },
            "x.o_proj: vLLM takes FP8_BLOCK_SCALES of experts alone",
        ),
        (
            {
                "quant_method": "modelopt",
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "x.experts": {"quant_algo": "FP8_PB_WO", "group_size": 64}
                },
            },
            "x.experts: blocks of 64, not 128",
        ),
    ],
)
def test_what_vllm_does_not_take(tmp_path, capsys, quantization, says):
    fields = {**config("Qwen3-30B-A3B"), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "4"]) == 2
    assert says in capsys.readouterr().err


def test_a_variable_that_stops_vllm(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_FP8_TP_PADDING", "bogus")
    assert main(["check", QWEN, "-tp", "8"]) == 2
    error = capsys.readouterr().err
    assert "VLLM_FP8_TP_PADDING=bogus: with this, vLLM stops at its start." in error
    assert "one of auto, padded, off" in error


FORMATS = {
    "fp8": QUANTIZATION,
    "compressed-tensors": json.loads(
        (MODELS / "qwen3_moe_1536_compressed_tensors.json").read_text()
    )["quantization_config"],
    "quark": json.loads((MODELS / "qwen3_moe_1536_quark.json").read_text())[
        "quantization_config"
    ],
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    "modelopt-mixed": {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            f"model.layers.{n}.mlp.experts": {"quant_algo": "FP8_PB_WO"} for n in (0, 1)
        },
    },
    "inc": {
        "quant_method": "auto-round",
        "bits": 8,
        "data_type": "fp",
        "group_size": [128, 128],
    },
}


@pytest.mark.parametrize(
    ("name", "release", "stock", "ours", "why"),
    [
        ("fp8", "0.26.0", "error", "compact", ""),
        ("compressed-tensors", "0.33.0", "error", "compact", ""),
        ("quark", "0.33.0", "error", "compact", ""),
        ("quark", "0.28.0", "unknown", "left", "taken from vLLM 0.30.0"),
        ("modelopt", "0.33.0", "error", "left", "vLLM has no experts of modelopt"),
        ("modelopt-mixed", "0.33.0", "refined", "compact", ""),
        ("inc", "0.33.0", "error", "left", "vLLM has no experts of inc"),
    ],
)
def test_formats(tmp_path, capsys, name, release, stock, ours, why):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
    fields["quantization_config"] = FORMATS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    main(["check", str(tmp_path), "-tp", "4", "--vllm-version", release, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == name
    (size,) = found["sizes"]
    (layer,) = (each for each in size["layers"] if each["kind"] == "experts")
    assert layer["stock"]["kind"] == stock
    assert layer["ours"]["kind"] == ours and why in layer["ours"]["why"]


def test_experts_that_vllm_does_not_have(tmp_path, capsys):
    """Whole blocks do not help, so nothing is advised."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
    fields["quantization_config"] = FORMATS["inc"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    asked = ["check", str(tmp_path), "--vllm-version", "0.33.0"]
    assert main([*asked, "-tp", "2"]) == 2
    out = capsys.readouterr().out
    assert (
        "\n  2 x model.layers.*.mlp.experts, 128 experts of 768 + 768 x 2048\n" in out
    )
    assert "stock:        vLLM has no experts of inc" in out and "or:" not in out
    assert main([*asked, "-tp", "4"]) == 2
    out = capsys.readouterr().out
    assert "or: expert parallelism does not help: vLLM has no experts of inc" in out
    assert "or: no smaller TP runs in stock vLLM" in out


@pytest.mark.parametrize("heads", ["linear_num_key_heads", "linear_num_value_heads"])
def test_heads_of_linear_attention(tmp_path, capsys, heads):
    """Qwen3.5's are fewer than those of its attention: 16 // 32 would be none."""
    fields = {**config("Qwen3-Next-80B-A3B"), "num_hidden_layers": 4}
    fields |= {"num_attention_heads": 32, "linear_num_key_heads": 32, heads: 16}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "32"]) == 2
    assert f"{heads} (16) must be divisible by tensor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (1152, "or: --enable-expert-parallel: whole experts"),
        (1000, "or: expert parallelism does not help: The output_size of gate's"),
    ],
)
def test_experts_that_ranks_cannot_share(tmp_path, capsys, size, says):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 80, "num_key_value_heads": 80}
    fields["moe_intermediate_size"] = size
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "80"]) == 2
    out = capsys.readouterr().out
    assert f"{size} columns are not divisible by TP 80" in out and says in out


def test_the_documented_schema(capsys):
    """Each name is in the module's documentation, which is the schema."""
    main(["check", QWEN, "-tp", "8", "-tp", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    documented = set(re.findall(r"\w+", report.__doc__))
    size = found["sizes"][0]
    cut = [layer for layer in size["layers"] if layer["cut"]]
    assert cut[0]["cut"][0]["shared"]["1"] == [0, 1]
    names = {*found, *size, *size["bytes"], *cut[0], *cut[0]["cut"][0]}
    assert not names - documented
    assert found["schema"] == report.SCHEMA and found["code"] == 2


def test_what_vllm_leaves_unquantized(tmp_path, capsys):
    """By pattern and by name; and one layer of two is enough to be cut."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
    fields["quantization_config"] = {
        **fields["quantization_config"],
        "modules_to_not_convert": ["re:.*self_attn.*", "model.layers.0.mlp.experts"],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    main(["check", str(tmp_path), "-tp", "4", "--json"])
    (size,) = json.loads(capsys.readouterr().out)["sizes"]
    assert [(each["kind"], each["count"]) for each in size["layers"]] == [
        ("experts", 1)
    ]


def test_names_are_whole(tmp_path, capsys):
    """MiniMax-M2's "gate" is the router, not each gate_proj."""
    fields = config("MiniMax-M2")
    fields["quantization_config"] = {
        **fields["quantization_config"],
        "modules_to_not_convert": [
            "gate",
            "e_score_correction_bias",
            "lm_head",
            "o_pr*",
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    main(["check", str(tmp_path), "-tp", "8", "--json"])
    (size,) = json.loads(capsys.readouterr().out)["sizes"]
    assert [each["kind"] for each in size["layers"]] == ["qkv", "row", "experts"]


@pytest.mark.parametrize(
    "pattern", [r"re:(?:.*\.)*visual\..*", r"re:(.*)\.(.*)\.(.*)\.(.*)_proj_(.*)"]
)
def test_patterns_that_repeat(tmp_path, capsys, pattern):
    """As published; vLLM matches them, too."""
    assert listed(tmp_path, pattern) == 1
    assert "needs this package" in capsys.readouterr().out


def test_a_pattern_that_is_none(tmp_path, capsys):
    assert listed(tmp_path, "re:(") == 2
    assert "makes no sense (ValueError(" in capsys.readouterr().err


def listed(tmp_path, *names: str) -> int:
    """Return the exit code for a config that leaves modules in 16 bits."""
    fields = config("Qwen3-30B-A3B")
    fields["quantization_config"] = {
        **fields["quantization_config"],
        "modules_to_not_convert": names,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    options = ["-tp", "4", "--vllm-version", "0.28.0"]
    return main(["check", str(tmp_path), *options])


def test_what_nobody_knows_is_said(tmp_path, capsys):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    fields["latent_expert_size"] = 640
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "1"]) == 2
    out = capsys.readouterr().out
    assert "not known: latent_expert_size = 640" in out
    assert "cannot be told, for what is not known" in out


def test_shared_experts_of_hunyuan(tmp_path, capsys):
    """Which it has with a field that says so; without, nobody knows."""
    fields = {**config("Hunyuan-A13B *"), "num_hidden_layers": 1}
    without = {"qkv", "row", "experts"}
    for is_mixed, kinds in ((True, {*without, "merged"}), (False, without)):
        fields["use_mixed_mlp_moe"] = is_mixed
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert main(["check", str(tmp_path), "-tp", "8", "--json"]) == 0
        (size,) = json.loads(capsys.readouterr().out)["sizes"]
        assert {layer["kind"] for layer in size["layers"]} == kinds
    del fields["use_mixed_mlp_moe"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "8"]) == 2
    assert "not known: num_shared_expert = 1" in capsys.readouterr().out


def test_a_model_that_pads_its_own_layers(tmp_path, capsys):
    """Its type may be that of the whole only."""
    fields = {"model_type": "deepseek_v41", "text_config": config("DeepSeek-V3")}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["check", str(tmp_path), "-tp", "32"]) == 2
    out = capsys.readouterr().out
    assert "not known: vLLM's model of deepseek_v41 pads its own layers" in out
    assert "cut:" not in out and "largest rank" not in out


def test_a_model_whose_only_cut_is_at_its_end(tmp_path, capsys):
    """Stock loads it, and there is no expert to have a backend for."""
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    down = {"m.down_proj.weight": Tensor("F8_E4M3", (256, 1216), "")}
    down["m.down_proj.weight_scale_inv"] = Tensor("F32", (2, 10), "")
    files.write_file(folder / "model.safetensors", down)
    assert main(["check", str(folder), "-tp", "1"]) == 0
    assert "block: 1 x m.down_proj, 256 x 1216: 9.5 blocks" in capsys.readouterr().out


def test_unknown_tensors_are_said(tmp_path, capsys):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    tensors = files.tensors_of(fields)
    for name in [n for n in tensors if ".o_proj." in n]:
        tensors[name.replace("o_proj", "mystery")] = tensors.pop(name)
    files.write_file(folder / "model.safetensors", tensors)
    assert main(["check", str(folder), "-tp", "1"]) == 2
    assert "not known: model.layers.*.self_attn.mystery" in capsys.readouterr().out


def test_blocks_unlike_the_tensors(tmp_path, capsys):
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 1}
    folder = files.write(tmp_path / "model", fields)
    fields["quantization_config"]["weight_block_size"] = [64, 64]
    (folder / "config.json").write_text(json.dumps(fields))
    fields["quantization_config"]["weight_block_size"] = [128, 128]
    assert main(["check", str(folder), "-tp", "1"]) == 2
    assert (
        "in blocks of [64, 64] (by config.json's fp8) needs" in capsys.readouterr().err
    )


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(command, "_installed", lambda: "0.33.0")
    assert main(["check", QWEN, "--all"]) == 0
    name, derived, _, head, *lines = capsys.readouterr().out.splitlines()
    assert name == f"{QWEN}: FP8 in blocks of 128 x 128 (fp8), by config"
    assert "derived from config.json alone" in derived
    assert head.split(None, 4) == ["TP", "real", "stock", "ours", "vLLM 0.33.0, hopper"]
    sizes = [int(line[2:5]) for line in lines[:-2]]
    assert sizes == [1, 2, 4, 8]
    (marked,) = (line for line in lines if line.startswith(">"))
    assert int(marked[2:5]) == 8
    said = "Left out, as they do not divide the model"
    assert lines[-1] == f"{said}: 3, 5-7, 9-64 (num_attention_heads 8)."
    assert main(["check", QWEN, "--all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["code"] == 0 and "heads (8)" in found["left_out"]["3"]


@pytest.mark.parametrize(
    ("name", "arguments", "code", "says"),
    [
        ("fp8", [], 0, "runs in this vLLM, which has the padding built in"),
        # That pads nothing else; and a release that is named is the published one.
        ("compressed-tensors", [], 2, "left (what is built into this vLLM pads plain"),
        ("fp8", ["--vllm-version", "0.28.0"], 1, "needs this package"),
    ],
)
def test_a_vllm_with_the_padding_built_in(
    tmp_path, capsys, monkeypatch, name, arguments, code, says
):
    monkeypatch.setattr(command.plugin, "built_in", lambda: "built in")
    monkeypatch.setattr(command.releases, "installed", lambda: "0.28.0+cpu")
    fields = {**config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
    fields["quantization_config"] = FORMATS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    asked = ["check", str(tmp_path), "-tp", "4", *arguments]
    assert main(asked) == code
    assert says in capsys.readouterr().out
    assert main([*asked, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["built_in"] == (not arguments)


def test_an_installed_vllm_that_nobody_knows(capsys, monkeypatch):
    monkeypatch.setattr(command.releases, "installed", lambda: "0.28.1.dev7")
    assert main(["check", QWEN, "-tp", "8"]) == 2
    error = capsys.readouterr().err
    assert "vLLM 0.28.1.dev7 is installed, of which check knows nothing" in error


def test_neither_vllm_nor_torch():
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
        f"from vllm_patch.cli.main import main; main(['check', {QWEN!r}, '-tp', '8'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "this package: compact" in done.stdout


def test_two_hundred_shards(tmp_path):
    """DeepSeek-V3's 91,000 tensors: under 300 MB, and 3 seconds, which depend."""
    folder = files.write(tmp_path / "m", config("DeepSeek-V3"), shards=200, apart=True)
    script = (
        "import sys; from vllm_patch.cli.main import main\n"
        f"code = main(['check', {str(folder)!r}, '-tp', '32'])\n"
        # Not getrusage(), which counts what this process was before it was that one.
        "held = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        "print(held, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "58 x model.layers.*.mlp.experts, 256 experts of" in done.stdout
    assert int(done.stderr.split()[-1]) < 300 << 10
