"""The precisions that a backbone can compute in; without torch, which those that only read them do not need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """The type of the weights, and whether products are rounded further."""

    weights: str
    autocast: bool = False  # products in bfloat16; between the blocks everything stays float32
    tf32: bool = False  # products with 10 bits of mantissa instead of 23


# The fastest first.
MODES = {
    "bfloat16": Mode("bfloat16"),
    "bfloat16_autocast": Mode("float32", autocast=True),
    "tf32": Mode("float32", tf32=True),
    "float32": Mode("float32"),
}
