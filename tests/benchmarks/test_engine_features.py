"""The check of the engine's features, with processes that answer at once."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import engine_child, engine_features
from benchmarks.lora_adapters import ADAPTERS, LORA_RANK, write_adapters, write_stock
from benchmarks.quantized import BLOCK, dequantized
from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

TP, RANK = 8, 1
# 192 of 1536 from 64 of a block: of 256 on a rank of stock.
MINE, STOCK, LEAD = slice(192, 384), slice(256, 512), 64


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    cut, stock = folder / "cut", folder / "stock"
    cut.mkdir()
    config = ModelConfig.read(engine_features.MODELS / "qwen3_moe_1536.json")
    config = config.with_layers(1)._with_text(num_experts=2, num_experts_per_tok=2)
    write_checkpoint(config, cut)
    write_adapters(cut)
    write_stock(config, cut, stock, RANK, TP)
    return cut, stock


def columns_of(tensors, projection) -> torch.Tensor:
    """Return the expert's weight, its columns first."""
    name = f"model.layers.0.mlp.experts.1.{projection}.weight"
    weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
    value = dequantized(weight, scale, (0, 0), BLOCK)
    return value.T if projection == "down_proj" else value


@pytest.mark.parametrize("projection", ADAPTERS["experts"])
def test_stock_gets_the_ranks_columns_between_zeros(models, projection):
    cut, stock = (
        columns_of(load_file(model / "model.safetensors"), projection)
        for model in models
    )
    expected = torch.zeros(256, cut.shape[1])
    expected[LEAD:] = cut[MINE]
    assert cut.shape[0] == 1536 and stock.shape[0] == TP * 256
    assert torch.equal(stock[STOCK], expected) and cut[MINE].any()


@pytest.mark.parametrize(("adapter", "lead"), [("experts", LEAD), ("tail", 0)])
def test_so_do_its_adapters(models, adapter, lead):
    """But the one that shall show: its columns come first."""
    cut, stock = (
        load_file(model / name / "adapter_model.safetensors")
        for model, name in zip(models, ("experts", adapter), strict=True)
    )
    for projection in ADAPTERS["experts"]:
        name = f"base_model.model.model.layers.0.mlp.experts.1.{projection}"
        products = [
            t[f"{name}.lora_B.weight"].float() @ t[f"{name}.lora_A.weight"].float()
            for t in (cut, stock)
        ]
        if projection == "down_proj":
            products = [product.T for product in products]
        expected = torch.zeros(256, products[0].shape[1])
        expected[lead : lead + 192] = products[0][MINE]
        assert torch.allclose(products[1][STOCK], expected)


def test_vllm_reads_the_adapters(models, monkeypatch):
    from vllm.lora import lora_model
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    # Which needs a GPU that is not only made believe.
    monkeypatch.setattr(lora_model, "PIN_MEMORY", False)

    cut, _ = models
    targets = {*ADAPTERS["attention"]}
    targets |= {f"experts.{e}.{p}" for e in range(2) for p in ADAPTERS["experts"]}
    for name, layers in (("attention", 4), ("experts", 6)):
        helper = PEFTHelper.from_local_dir(str(cut / name), 4096)
        adapter = LoRAModel.from_local_checkpoint(
            *(str(cut / name), targets),
            peft_helper=helper,
            lora_model_id=1,
            device="cpu",
        )
        assert len(adapter.loras) == layers
        assert {lora.rank for lora in adapter.loras.values()} == {LORA_RANK}


class Processes:
    """What stands for processes of ``served_row``."""

    def __init__(self):
        self.specs = []
        self.uses = {"on a stream": 8, "on a stream in graphs": 4, "dependent plans": 1}
        self.off = self.noise = 0.0
        self.experts = "TritonExperts 256"

    def __call__(self, spec, variables, module):
        assert module == "benchmarks.served_row"
        self.specs.append((spec, variables))
        is_twin = engine_features.ONE_STREAM.items() <= variables.items() or (
            variables["VLLM_FP8_TP_PADDING"] == "off"
        )
        steps = [1 + index for index, _ in enumerate(spec["adapters"])]
        turns = (0.0, self.noise) if is_twin else (self.off, self.off)
        logits = [[[torch.full((2, 8), n + t)] * 2 for t in turns] for n in steps]
        torch.save(logits, spec["logits"])
        return [{"experts": self.experts, "uses": {} if is_twin else self.uses}]


@pytest.fixture
def processes(monkeypatch):
    found = Processes()
    monkeypatch.setattr(engine_child, "process", found)
    monkeypatch.setattr(engine_features, "write_checkpoint", lambda *_: None)
    monkeypatch.setattr(engine_features, "write_adapters", lambda *_: None)
    monkeypatch.setattr(engine_features, "write_stock", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return found


def test_lora_is_compared_with_stock(processes, capsys):
    assert engine_features.main(["lora"]) == 0
    assert "PASS lora" in capsys.readouterr().out
    (this, auto), (stock, off) = processes.specs
    assert this["engine"]["enable_lora"] and this["rank"] == RANK
    assert [*auto.values(), *off.values()] == ["auto", "off"]
    assert len(this["adapters"]) == 3 and len(stock["adapters"]) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"off": 1e-3}, "lora, attention: differs by 5.0e-04, the twin by 0.0e+00"),
        ({"off": float("nan")}, "lora, experts: differs by inf, the twin by 0.0e+00"),
        ({"experts": "TritonExperts 192"}, "this: experts are TritonExperts 192"),
    ],
)
def test_what_is_off_with_lora_is_a_problem(processes, capsys, change, said):
    vars(processes).update(change)
    assert engine_features.main(["lora"]) == 1
    out = capsys.readouterr().out
    assert said in out and "FAIL lora" in out


def test_shared_experts_are_compared_with_one_stream(processes, capsys):
    processes.experts = "MaskedTritonExperts 176"
    assert engine_features.main(["shared"]) == 0
    graphs = [
        spec for spec, _ in processes.specs if "enforce_eager" not in spec["engine"]
    ]
    assert len(processes.specs) == 4 and len(graphs) == 2
    processes.off, processes.noise = 1e-3, 2e-3
    assert engine_features.main(["shared"]) == 0, "the twin does not repeat itself"
    processes.noise = 0.0
    assert engine_features.main(["shared"]) == 1
    processes.off = 0.0
    for use in [*processes.uses]:
        del processes.uses[use]
        assert engine_features.main(["shared"]) == 1
        assert f"not used: {use}" in capsys.readouterr().out
        processes.uses[use] = 1


def test_a_process_that_fails_shows_its_log(processes, monkeypatch, capsys):
    def fail(*_):
        raise engine_child.RowFailed(
            "ValueError: refused", "line\nValueError: refused\n"
        )

    monkeypatch.setattr(engine_child, "process", fail)
    assert engine_features.main([]) == 1
    out = capsys.readouterr().out
    assert "this failed:\nline\n" in out and "eager, one stream: ValueError" in out
