"""What a kernel that starts early touches before it waits for the one before it."""

import pytest

from benchmarks import early_reads

WAIT = '%9 = tt.elementwise_inline_asm "griddepcontrol.wait; // dummy $0" -> i32'
START = WAIT.replace("wait", "launch_dependents")
LOOP = "%out:2 = scf.for %i = %c0 to %c8 iter_args(%w = %w_0, %h = %h_0) -> (i32) {"
LOAD = "%x = tt.load %h : tensor<1>"
FETCH = "%t = ttg.async_copy_global_to_local %w_1, %buffer mask %m : tensor<1x!tt.ptr>"


def ttgir(*lines):
    return "\n".join(
        [
            "tt.func public @down_kernel(%h_ptr: !tt.ptr, %w2_ptr: !tt.ptr) {",
            "  %h_0 = tt.splat %h_ptr : !tt.ptr<bf16>",
            "  %w_0 = tt.splat %w2_ptr : !tt.ptr<f8>",
            "  %w_1 = tt.addptr %w_0, %column : tensor<1x!tt.ptr<f8>>",
            *(f"  {line}" for line in lines),
            "}",
        ]
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([FETCH, LOOP, WAIT, "%x = tt.load %h : tensor<1>"], None),
        (
            ["^bb1:", WAIT, "tt.return", "^bb2:", FETCH, LOOP, WAIT, LOAD, "tt.return"],
            None,
        ),
        ([WAIT, LOOP, "%x = tt.load %h : tensor<1>", WAIT], "before tt.load of h_ptr"),
        (["%x = tt.load %h_0 : tensor<1>", WAIT], "before tt.load of h_ptr"),
        (["tt.store %w_1, %v : tensor<1>", WAIT], "before tt.store of w2_ptr"),
        (
            ["%x = tt.atomic_rmw add, relaxed, gpu, %w_1, %v, %m : i32", WAIT],
            "before tt.atomic_rmw of w2_ptr",
        ),
        ([FETCH], "does not wait"),
        ([START, WAIT], "start before it waits"),
        (["cf.cond_br %c, ^bb1", "^bb1:", "tt.return", "^bb2:", WAIT], "ends before"),
    ],
)
def test_a_kernel_that_depends(lines, said):
    problem = early_reads.problem("down_kernel", ttgir(*lines), depends=True)
    assert problem is None if said is None else said in problem.lower()


def test_other_kernels_read_nothing_early():
    text = ttgir(FETCH, WAIT)
    assert "of w2_ptr" in early_reads.problem("sum_kernel", text, depends=True)


def test_one_that_does_not_depend_waits_for_nothing():
    assert early_reads.problem("down_kernel", ttgir(FETCH), depends=False) is None
    assert early_reads.problem("down_kernel", ttgir(WAIT), depends=False)
