"""Compile the Triton kernels for a GPU of a compute capability, which need not be there, and describe them as JSON.

python tests/compiled_kernels.py 90
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from difficulty_metadata.neighbor_search.triton_filter import (
    GROUPS_AT_ONCE,
    KERNEL_OPTIONS,
    TILE_GROUPS,
    TILE_POINTS,
    TILE_ROWS,
)
from difficulty_metadata.neighbor_search.triton_kernels import measure_groups, note_groups

# Of 150 neighbours among millions of points of 32 dimensions.
CAPACITY, ROOM, WIDTH = 160, 1024, 32
TYPES = {"limits": "fp32", "half_norms": "fp32", "thresholds": "fp32", "squared": "fp32"}


def compile_kernel(kernel: Any, capability: int, floats: str, constants: dict[str, int], **options: int) -> dict:
    """Compile a kernel whose points are of type `floats`, and say what its PTX holds."""
    types = {"queries": floats, "points": floats} | TYPES
    signature = {name: "constexpr" if name in constants else f"*{types.get(name, 'i32')}" for name in kernel.arg_names}
    if "num_tiles" in signature:
        signature["num_tiles"] = "i32"
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind.startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    product = re.search(r"^\s*(wgmma|mma)\.", compiled.asm["ptx"], re.MULTILINE)
    return {
        "name": kernel.__name__,
        "product": product and product.group(1),
        "has_atomics": bool(re.search(r"^\s*(@\S+ )?(atom|red)\.", compiled.asm["ptx"], re.MULTILINE)),
    }


def main() -> None:
    """Compile all kernels for the capability given, 90 for 9.0."""
    capability = int(sys.argv[1])
    lists = {"width": WIDTH, "num_groups": TILE_GROUPS, "capacity": CAPACITY}
    tiles = lists | {"tile_rows": TILE_ROWS, "tile_points": TILE_POINTS}
    found = [compile_kernel(note_groups, capability, "fp16", tiles, **KERNEL_OPTIONS)]
    measured = {"group_size": TILE_POINTS // TILE_GROUPS, "room": ROOM, "at_once": GROUPS_AT_ONCE}
    found.append(compile_kernel(measure_groups, capability, "fp32", lists | measured))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
