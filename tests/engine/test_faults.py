"""What becomes of a real engine that loses a worker while it loads."""

import os
import uuid

import psutil
import pytest

from vllm_patch.cli import engine_process
from vllm_patch.cli.engine_process import EngineProcess

from .test_serve import START_SECONDS

# A plugin of vLLM's that ends rank 1 with the first tensor, as the kernel does a
# process for which there is no memory.
KILLER = """
import os, signal
import wrapt

def end(module):
    from vllm.distributed import get_tensor_model_parallel_rank
    stock = module.DefaultModelLoader.get_all_weights
    def get_all_weights(self, *args):
        for weight in stock(self, *args):
            if get_tensor_model_parallel_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield weight
    module.DefaultModelLoader.get_all_weights = get_all_weights

def register():
    name = "vllm.model_executor.model_loader.default_loader"
    wrapt.register_post_import_hook(end, name)
"""


@pytest.fixture
def killer(tmp_path, monkeypatch):
    (tmp_path / "killer.py").write_text(KILLER)
    dist = tmp_path / "killer-1.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Name: killer\nVersion: 1\n")
    (dist / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkiller = killer:register\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def with_mark(mark: str) -> list[psutil.Process]:
    """Return the processes that have a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_worker_that_is_killed_while_it_loads(
    checkpoint, tmp_path, monkeypatch, killer
):
    """It is an error, neither a hang nor a verdict, and nothing runs on."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("VLLM_PATCH_TEST_MARK", mark)
    engine = {"model": str(checkpoint), "max_model_len": 128}
    result = engine_process.run(
        EngineProcess("patched", {**engine, "tensor_parallel_size": 2}, patched=True),
        [[[17, 4, 99]]],
        tmp_path,
        START_SECONDS,
    )
    assert result.scores is None
    log = (tmp_path / "patched.log").read_text()
    assert result.error.startswith("Exception: WorkerProc init"), log[-3000:]
    assert result.ended_outside
    # On a busy machine a process that was told to end takes its time.
    _, alive = psutil.wait_procs(with_mark(mark), timeout=60)
    assert not alive
