import pytest

from gpt2_jax.runtime.chips import CHIPS, chip_named, chip_of


def test_names_and_kinds_are_each_of_one_chip():
    names = [name for chip in CHIPS for name in (*chip.names, *chip.kinds)]
    assert len({name.lower() for name in names}) == len(names)
    for chip in CHIPS:
        assert all(chip_named(name) is chip for name in (*chip.names, *chip.kinds))
        assert all(chip_of(kind) is chip for kind in chip.kinds)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_published_peaks(kind, peak):
    assert chip_of(kind).peak_flops == peak


def test_a_part_of_a_chip_or_another_is_not_in_the_table():
    for kind in ("cpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10", "TPU v5x"):
        assert chip_of(kind) is None


def test_an_unknown_chip_is_refused_with_the_names_that_there_are():
    with pytest.raises(
        ValueError, match=r"chip 'v4-32' is not .* v4, .*h100.*16 of v4"
    ):
        chip_named("v4-32")
    assert chip_named("H100") is chip_named("NVIDIA H100 80GB HBM3")


def test_units():
    """Of each device: GiB that no chip exceeds, and FLOPs a byte that all have."""
    for chip in CHIPS:
        assert 16 <= chip.memory / 2**30 <= 180
        assert 50 < chip.peak_flops / chip.bandwidth < 800
