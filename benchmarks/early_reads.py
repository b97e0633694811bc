"""What a compiled kernel touches before it waits for the kernel before it.

Read from Triton's IR after loops are pipelined: loads that a loop makes ahead of its
turns stand before the loop there, and what runs first stands first.
"""

import re

WAIT, START = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
READS = "tt.load", "ttg.async_copy_global_to_local"
TOUCHES = re.compile(rf"({'|'.join(READS)}|tt\.store|tt\.atomic\w*) [^%]*(%[\w#]+)")
RESULT = re.compile(r"^\s*(%\w+)(?::\d+)? = [^%]*(%[\w#]+)")
CARRIED = re.compile(r"(%\w+) = (%[\w#]+)")
ARGUMENT = re.compile(r"%(\w+_ptr): ")

SORTED = {"sorted_pairs_ptr", "block_experts_ptr", "num_blocks_ptr"}
ROUTED = {"topk_ids_ptr", "topk_weights_ptr"}
# What no kernel writes that could still run when one of these starts. Sorted pairs were
# there before gate and up began.
EARLY = {
    "gate_up_kernel": {"topk_ids_ptr"},
    "down_kernel": {"w2_ptr", "w2_scale_ptr"} | ROUTED | SORTED,
    "down_and_sum_kernel": {"w2_ptr", "w2_scale_ptr"} | ROUTED,
}


def problem(name: str, ttgir: str, depends: bool) -> str | None:
    """Return what is wrong with a kernel's waiting, or None.

    Args:
        name: Of the kernel.
        ttgir: Its IR.
        depends: Whether it starts while the kernel before it ends.

    """
    if not depends:
        return "WAITS FOR NOTHING" if WAIT in ttgir else None
    if WAIT not in ttgir:
        return "DOES NOT WAIT"
    if START in ttgir[: ttgir.index(WAIT)]:
        return "LETS THE NEXT ONE START BEFORE IT WAITS"
    if _ends_early(ttgir):
        return "ENDS BEFORE IT WAITS"
    wrong = {
        f"{operation} of {argument}"
        for operation, argument in touched_early(ttgir)
        if operation not in READS or argument not in EARLY.get(name, ())
    }
    return f"DOES NOT WAIT BEFORE {', '.join(sorted(wrong))}" if wrong else None


def _ends_early(ttgir: str) -> bool:
    """Whether some way to a return has no wait: what follows could come too soon."""
    entry, *blocks = re.split(r"^  \^bb\d+.*", ttgir, flags=re.M)
    if WAIT in entry:
        return False
    return any("tt.return" in block and WAIT not in block for block in blocks)


def touched_early(ttgir: str) -> set[tuple[str, str]]:
    """Return operations before the last wait, each with the argument it goes to."""
    before = ttgir[: ttgir.rindex(WAIT)].splitlines()
    sources = dict.fromkeys((f"%{name}" for name in ARGUMENT.findall(ttgir)), "")
    for line in before:
        if "iter_args(" in line:
            sources |= dict(CARRIED.findall(line.partition("iter_args(")[2]))
        elif match := RESULT.match(line):
            sources[match[1]] = match[2]
    found = set()
    for line in before:
        if match := TOUCHES.search(line):
            pointer = match[2]
            while sources[pointer]:
                pointer = sources[pointer].partition("#")[0]
            found.add((match[1], pointer[1:]))
    return found
