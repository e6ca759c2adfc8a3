import pytest

from linscale.config import ConfigError
from linscale.launch import hardware


@pytest.mark.parametrize(
    "text, chips, devices, hosts",
    [
        ("v5p:4x4x8", 128, 128, 32),
        ("v5e:16x16", 256, 256, 64),
        ("tpu7x:2x2x1", 4, 8, 1),
        ("V4:2x2x1", 4, 4, 1),
        ("v6e:1x1", 1, 1, 1),
        ("h100:16", 16, 16, 2),
        ("h200:4", 4, 4, 1),
    ],
)
def test_sizes(text, chips, devices, hosts):
    topology = hardware.parse(text)
    assert (topology.chips, topology.devices, topology.hosts) == (chips, devices, hosts)
    assert hardware.parse(topology.name) == topology


def test_every_chip_has_its_figures():
    for name, chip in hardware.CHIPS.items():
        assert chip.name == name and chip.peak > 1e14 and chip.hbm > 1e10 and chip.bandwidth > 5e11
        # machine balance: FLOPs a byte of memory; 100 to 700 for all chips of these generations
        assert 100 < chip.peak / chip.bandwidth < 700
        assert chip.maker == "tpu" or chip.network > 0


@pytest.mark.parametrize(
    "text, said",
    [
        ("v9:4x4", "unknown chip; known are v4, v5e, v5p, v6e, tpu7x, h100, h200"),
        ("", "unknown chip"),
        ("v5p", "v5p:NxNxN, as in v5p:4x4x8"),
        ("v5p:4x4", "v5p:NxNxN"),
        ("v5p:4x4x0", "v5p:NxNxN"),
        ("v5e:4x4x4", "v5e:NxN, as in v5e:16x16"),
        ("h100:8x2", "h100:N, as in h100:16"),
        ("v5p:3x1x2", "6 chips, which are not whole hosts of 4"),
        ("v5e:32x32", "1024 chips; a slice of v5e has at most 256"),
        ("h100:12", "12 chips, which are not whole hosts of 8"),
    ],
)
def test_mistakes(text, said):
    with pytest.raises(ConfigError) as error:
        hardware.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value)
