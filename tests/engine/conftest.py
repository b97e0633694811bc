"""A model that several tests start an engine for, and what stock answers."""

import random

import pytest

from vllm_patch.cli.model_config import ModelConfig
from vllm_patch.cli.synthetic import write_checkpoint

from .test_serve import QWEN3_MOE, answered


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A Qwen3-MoE model of two layers with experts of 384 columns: 192 at TP 2."""
    config = ModelConfig.read(QWEN3_MOE)
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(config._with_text(moe_intermediate_size=384), directory)
    return directory


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 4096) for _ in range(n)] for n in (4, 64, 64)]


@pytest.fixture(scope="session")
def expected(checkpoint, prompts, tmp_path_factory) -> dict:
    """What stock answers at TP 1, offline."""
    return answered(checkpoint, prompts, tmp_path_factory.mktemp("logs"))
