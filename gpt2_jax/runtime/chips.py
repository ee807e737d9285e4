"""Accelerators, as their makers publish them."""

import dataclasses

from gpt2_jax.checks import shown


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    From TPU v4 on a device is a chip, but in the names of slices a core: v4-32 and
    v5p-32 are 16 devices, v5e-32 and v6e-32 are 32. A device of TPU v3 and v7x is one
    of the two cores of a chip, with half of what is published for that.
    """

    names: tuple[str, ...]  # the first is what we call it, the others do too
    kinds: tuple[str, ...]  # `device_kind`
    peak_flops: float  # dense bfloat16 FLOP/s, summed up in float32
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes/s

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_gpu(self) -> bool:
        return self.kinds[0].startswith("NVIDIA")


GB, GIB = 10**9, 2**30

# Sources: docs.cloud.google.com/tpu/docs/ v3, v4, v5e, v5p, v6e, tpu7x, whose GB are
# GiB by what XLA finds there; NVIDIA's data sheets and, for the two GeForce cards, the
# white papers of Ada and GA102, with GB of 10^9 bytes.
CHIPS = (
    Chip(("v3",), ("TPU v3",), 61.5e12, 16 * GIB, 450e9),
    Chip(("v4",), ("TPU v4",), 275e12, 32 * GIB, 1200e9),
    Chip(("v5e",), ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9),
    Chip(("v5p",), ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9),
    Chip(("v6e", "trillium"), ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9),
    Chip(("v7x", "ironwood"), ("TPU7x",), 1153.5e12, 96 * GIB, 3690e9),
    Chip(
        ("a100-40gb",),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312e12,
        40 * GB,
        1555e9,
    ),
    Chip(
        ("a100-80gb", "a100"),
        ("NVIDIA A100-SXM4-80GB",),
        312e12,
        80 * GB,
        2039e9,
    ),
    Chip(("a100-pcie",), ("NVIDIA A100 80GB PCIe",), 312e12, 80 * GB, 1935e9),
    Chip(("h100", "h100-sxm"), ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GB, 3350e9),
    Chip(("h100-pcie",), ("NVIDIA H100 PCIe",), 756e12, 80 * GB, 2000e9),
    Chip(("h100-nvl",), ("NVIDIA H100 NVL",), 835e12, 94 * GB, 3900e9),
    Chip(("h200",), ("NVIDIA H200",), 989e12, 141 * GB, 4800e9),
    Chip(("b200",), ("NVIDIA B200",), 2250e12, 180 * GB, 8000e9),
    Chip(("l4",), ("NVIDIA L4",), 121e12, 24 * GB, 300e9),
    Chip(("l40s",), ("NVIDIA L40S",), 362e12, 48 * GB, 864e9),
    Chip(("rtx3090",), ("NVIDIA GeForce RTX 3090",), 71e12, 24 * GB, 936e9),
    Chip(("rtx4090",), ("NVIDIA GeForce RTX 4090",), 165e12, 24 * GB, 1008e9),
)


def chip_named(name: str) -> Chip:
    """By its name or its `device_kind`, in capitals or not.

    Raises:
      ValueError: when there is none, with the names that there are.
    """
    for chip in CHIPS:
        if name.lower() in (*chip.names, *(kind.lower() for kind in chip.kinds)):
            return chip
    raise ValueError(
        f"chip {shown(name)} is not one of {', '.join(chip.name for chip in CHIPS)}; a "
        "TPU slice is a chip and a number of devices: v4-32 is 16 of v4"
    )


def chip_of(device_kind: str) -> Chip | None:
    """The chip that reports itself so; None: not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
