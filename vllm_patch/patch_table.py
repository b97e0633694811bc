# SPDX-License-Identifier: Apache-2.0
"""What is replaced in vLLM, why, and until when."""

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.version import Version

from vllm_patch import formats, releases, wrappers

ISSUE = "https://github.com/vllm-project/vllm/issues/17569"


@dataclass(frozen=True)
class Patch:
    """One attribute of vLLM that is replaced.

    Attributes:
        name: Short name for logs and ``vllm-patch status``.
        module: Module that holds the attribute; patched once vLLM imports it.
        attribute: Dotted path inside the module.
        wrapper: Takes the original and returns the replacement.
        parameters: Parameters of the original, if it is a function. Another
            signature means an unknown vLLM, which stays stock.
        why: What the replacement is for.
        until: What makes the row removable.
        link: Where upstream discusses it.
        without: What becomes of layers if only this row cannot be applied; without
            that, vLLM stays stock.
        since: The first release that has the target.
        earlier: The wrapper in releases before that, if they have it in another form.

    """

    name: str
    module: str
    attribute: str
    wrapper: Callable
    parameters: tuple[str, ...] | None
    why: str
    until: str
    link: str = ISSUE
    without: str = ""
    since: str = releases.SUPPORTED[0]
    earlier: Callable | None = None

    @property
    def target(self) -> str:
        return f"{self.module}.{self.attribute}"

    def is_of(self, vllm_version: str) -> bool:
        """Whether a release has the target."""
        return Version(vllm_version) >= Version(self.since)

    def form_of(self, vllm_version: str) -> "Patch | None":
        """Return the row as it is in a release, or None."""
        if self.is_of(vllm_version):
            return self
        return self.earlier and replace(self, wrapper=self.earlier)


def _format_row(
    name: str, config: str, checkpoint_format: str, since: str = releases.SUPPORTED[0]
) -> Patch:
    """Return the row of a checkpoint format beside plain FP8."""
    module, _, config = config.rpartition(".")
    return Patch(
        name=name,
        module=f"vllm.model_executor.layers.quantization.{module}",
        attribute=f"{config}.get_quant_method",
        wrapper=formats.with_cut_layers(checkpoint_format),
        parameters=("self", "layer", "prefix"),
        why=f"likewise in {name} checkpoints",
        until="as above",
        without=f"layers of {name} checkpoints that are cut inside a quant block stay "
        "stock",
        since=since,
        earlier=formats.with_reasons(since),
    )


def _adapter_row(function: str, parameter: str, wrapper: str, of: str) -> Patch:
    """Return the row of a function that slices LoRA adapters of experts."""
    return Patch(
        name=f"lora-{wrapper}".replace("_", "-"),
        module="vllm.lora.layers.fused_moe",
        attribute=function,
        wrapper=wrappers.with_lora_slices(wrapper),
        parameters=("self", parameter),
        why=f"LoRA adapters of padded experts' {of} lie where the weights do",
        until="vLLM slices adapters by the layout of the weights",
        without="with LoRA, experts that are cut inside a quant block stay stock",
    )


PATCHES = (
    Patch(
        name="env-var",
        module="vllm.envs",
        attribute="environment_variables",
        wrapper=wrappers.with_padding_variable,
        parameters=None,
        why="VLLM_FP8_TP_PADDING is read like vLLM's own variables, without a warning",
        until="vLLM defines VLLM_FP8_TP_PADDING",
    ),
    Patch(
        name="layers",
        module="vllm.model_executor.layers.quantization.fp8",
        attribute="Fp8Config.get_quant_method",
        wrapper=formats.with_cut_layers("fp8"),
        parameters=("self", "layer", "prefix"),
        why="experts and linear layers cut inside a quant block get methods of ours",
        until="vLLM loads block-FP8 layers at any tensor-parallel size",
    ),
    _format_row(
        "compressed-tensors",
        "compressed_tensors.compressed_tensors.CompressedTensorsConfig",
        "compressed_tensors",
    ),
    _format_row("quark", "quark.quark.QuarkConfig", "quark", since="0.30.0"),
    _format_row(
        "modelopt", "modelopt.ModelOptQuantConfigBase", "modelopt", since="0.30.0"
    ),
    _format_row(
        "modelopt-mixed",
        "modelopt.ModelOptMixedPrecisionConfig",
        "modelopt",
        since="0.30.0",
    ),
    _format_row("inc", "inc.inc.INCConfig", "inc", since="0.29.0"),
    Patch(
        name="masked",
        module="vllm.model_executor.layers.fused_moe.oracle.fp8",
        attribute="backend_to_kernel_cls",
        wrapper=wrappers.with_masked_experts,
        parameters=("backend",),
        why="vLLM's choice of experts knows the masked Triton kernels",
        until="vLLM's Triton experts take columns that are cut inside a quant block",
        without="experts are padded, and not multiplied by masked kernels",
    ),
    _adapter_row(
        "FusedMoEWithLoRA._slice_w13_b", "w13_lora_b", "gate_or_up", "gate or up"
    ),
    _adapter_row(
        "FusedMoE3DWithLoRA._slice_w13_b",
        "w13_lora_b",
        "gate_and_up",
        "gate and up in one",
    ),
    _adapter_row("FusedMoEWithLoRA._slice_w2_a", "w2_lora_a", "down", "down"),
)

# Row name -> (original, replacement) while the row is applied.
_applied: dict[str, tuple[Any, Any]] = {}


class UnexpectedTarget(Exception):
    """A target is not what its row says; vLLM must stay stock."""


def apply(patch: Patch) -> None:
    """Replace the row's target; does nothing if it is replaced already.

    Raises:
        UnexpectedTarget: The target is missing, has another signature, or
            belongs to somebody else.

    """
    if patch.name in _applied:
        return
    check(patch)
    owner, leaf = _owner(patch)
    original = vars(owner)[leaf]
    replacement = patch.wrapper(original)
    setattr(owner, leaf, replacement)
    _applied[patch.name] = original, replacement


def revert(patch: Patch) -> None:
    """Put the row's original back; does nothing if it is not replaced.

    Raises:
        UnexpectedTarget: Somebody else replaced our replacement, and may call it.

    """
    if patch.name not in _applied:
        return
    if other := put_on_top(patch):
        raise UnexpectedTarget(
            f"{patch.target} was replaced by {other} after vllm_patch did, so it "
            "cannot be put back"
        )
    original, _ = _applied[patch.name]
    owner, leaf = _owner(patch)
    setattr(owner, leaf, original)
    del _applied[patch.name]


def check(patch: Patch) -> None:
    """Raise UnexpectedTarget if the row's target is not what vLLM ships."""
    owner, leaf = _owner(patch)
    if patch.parameters is None or patch.name in _applied:
        return
    original = vars(owner)[leaf]
    if not inspect.isfunction(original) or original.__globals__ is not vars(
        importlib.import_module(patch.module)
    ):
        raise UnexpectedTarget(
            f"{patch.target} was already replaced by {_name(original)}, so vllm_patch "
            "leaves it alone"
        )
    _check_parameters(patch, tuple(inspect.signature(original).parameters))


def check_source(patch: Patch, package: Path) -> None:
    """Raise UnexpectedTarget if the row's target is another in vLLM's source.

    Nothing is imported, so what another plugin replaces at run time does not show.

    Args:
        patch: A row that the release has.
        package: vLLM's folder.

    """
    file = package.joinpath(*patch.module.split(".")[1:])
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    found = ast.parse(file.read_bytes()) if file.is_file() else None
    for part in patch.attribute.split("."):
        body = getattr(found, "body", [])
        found = next((node for node in body if part in _names(node)), None)
    if found is None:
        raise UnexpectedTarget(f"{patch.target} does not exist")
    if isinstance(found, ast.FunctionDef):
        kinds = found.args
        in_order = *kinds.posonlyargs, *kinds.args, kinds.vararg, *kinds.kwonlyargs
        parameters = (*in_order, kinds.kwarg)
        _check_parameters(patch, tuple(each.arg for each in parameters if each))


def _names(node: ast.stmt) -> list[str]:
    """Return what a statement defines."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = getattr(node, "targets", None) or [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]


def _check_parameters(patch: Patch, found: tuple[str, ...]) -> None:
    if found != patch.parameters:
        raise UnexpectedTarget(
            f"{patch.target} takes {found}, expected {patch.parameters}"
        )


def put_on_top(patch: Patch) -> str | None:
    """Return who replaced our replacement, or None."""
    if patch.name not in _applied:
        return None
    owner, leaf = _owner(patch)
    current = vars(owner)[leaf]
    return None if current is _applied[patch.name][1] else _name(current)


def _owner(patch: Patch) -> tuple[Any, str]:
    owner: Any = importlib.import_module(patch.module)
    *path, leaf = patch.attribute.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    if leaf not in getattr(owner, "__dict__", {}):
        raise UnexpectedTarget(f"{patch.target} does not exist")
    return owner, leaf


def _name(replacement: Any) -> str:
    """Say whose a replacement is: ``module.function``, or the type of an object."""
    if inspect.isfunction(replacement):
        # functools.wraps copies __module__, not the globals.
        return f"{replacement.__globals__['__name__']}.{replacement.__qualname__}"
    return f"an object of {type(replacement).__module__}.{type(replacement).__name__}"
