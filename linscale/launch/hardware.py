"""The chips that plans and launch scripts know, and how a topology is named: `v5p:4x4x8`, `h100:16`.

Figures are the makers' data sheets: Google's TPU pages (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and NVIDIA's
data sheets. Google states interconnect per chip, all links and both ways together; `link` is that over the number of
links and over two: v5e 400 GB/s over 4 links, v5p 1,200 GB/s (its page also says 4,800 Gbps one way) over 6. Peaks are
those of linscale.scaling.flops, the one place for them. TPU memory is what the compiler leaves to a program, a little less
than what is sold; it is measured with libtpu, see `hbm`. `network` is one 400 Gbit/s adapter for each GPU, as in DGX H100.
"""

import dataclasses
import math
import re

from linscale.config import ConfigError
from linscale.scaling import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Figures are per jax device, except where they say chip."""

    name: str
    kind: str  # jax.Device.device_kind, the key of flops.peak_flops
    maker: str  # tpu | gpu
    hbm: int  # bytes that a program can have on a device
    bandwidth: float  # bytes/s between a device and its memory
    link: float  # bytes/s one way of one link of a chip: ICI to a neighbour; NVLink, all links of a GPU together
    dimensions: int  # of the torus of links; 0: all to all inside a host
    chips_per_host: int
    most: int = 0  # chips of a slice; 0: no limit
    devices_per_chip: int = 1
    network: float = 0.0  # bytes/s one way between hosts for each device, where a slice has no torus
    gcloud: str = ""  # prefix of --accelerator-type; empty: not offered as a TPU VM
    gcloud_counts: int = 1  # what the accelerator type counts: units per chip (cores on v4 and v5p)
    gke: str = ""  # value of the node label cloud.google.com/gke-tpu-accelerator or gke-accelerator

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s of one device."""
        return flops.peak_flops(self.kind, "bfloat16")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", "TPU v4", "tpu", int(30.75 * GIB), 1.228e12, 50e9, 3, 4,
            most=4096, gcloud="v4", gcloud_counts=2, gke="tpu-v4-podslice",
        ),
        Chip(
            "v5e", "TPU v5 lite", "tpu", int(15.75 * GIB), 0.819e12, 50e9, 2, 4,
            most=256, gcloud="v5litepod", gke="tpu-v5-lite-podslice",
        ),
        Chip(
            "v5p", "TPU v5", "tpu", int(95.74 * GIB), 2.765e12, 100e9, 3, 4,
            most=6144, gcloud="v5p", gcloud_counts=2, gke="tpu-v5p-slice",
        ),
        Chip(
            "v6e", "TPU v6 lite", "tpu", int(31.25 * GIB), 1.638e12, 100e9, 2, 4,
            most=256, gcloud="v6e", gke="tpu-v6e-slice",
        ),
        Chip("tpu7x", "TPU7x", "tpu", int(94.75 * GIB), 3.690e12, 200e9, 3, 4, most=9216, devices_per_chip=2, gke="tpu7x"),
        Chip("h100", "NVIDIA H100", "gpu", 80 * 10**9, 3.35e12, 450e9, 0, 8, network=50e9, gke="nvidia-h100-80gb"),
        Chip("h200", "NVIDIA H200", "gpu", 141 * 10**9, 4.80e12, 450e9, 0, 8, network=50e9, gke="nvidia-h200-141gb"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of a pod, or a number of GPUs."""

    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of the torus; GPUs: (number,)

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chip.chips_per_host)

    @property
    def accelerator_type(self) -> str:
        """The name gcloud gives the slice, as v5p-256 for v5p:4x4x8."""
        return f"{self.chip.gcloud}-{self.chips * self.chip.gcloud_counts}"

    def links(self, axis: int) -> int:
        """Links of a chip along a dimension of the torus, one way each: 2 on a ring or inside a line, 1 for a pair."""
        return min(2, self.shape[axis] - 1)

    def wraps(self, axis: int) -> bool:
        """Whether the chips along a dimension form a ring: multiples of 4 on the 3D tori, 16 on v5e and v6e."""
        return self.shape[axis] % 4 == 0 if self.chip.dimensions == 3 else self.shape[axis] == 16


def parse(text: str) -> Topology:
    """'v5p:4x4x8' or 'h100:16' -> Topology. ConfigError names what is known and what a shape must be."""
    name, _, size = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise ConfigError(
            f"--topology {text!r} is of an unknown chip; known are {', '.join(CHIPS)}, as in v5p:4x4x8 or h100:16."
        )
    chip = CHIPS[name]
    wanted = "x".join(["N"] * max(1, chip.dimensions))
    example = {0: f"{name}:16", 2: f"{name}:16x16", 3: f"{name}:4x4x8"}[chip.dimensions]
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", size) or size.count("x") + 1 != max(1, chip.dimensions):
        raise ConfigError(f"--topology {text!r} does not have the form {name}:{wanted}, as in {example}.")
    topology = Topology(chip, tuple(int(n) for n in size.split("x")))
    if chip.most and topology.chips > chip.most:
        raise ConfigError(f"--topology {text!r} has {topology.chips} chips; a slice of {name} has at most {chip.most}.")
    if topology.chips > chip.chips_per_host and topology.chips % chip.chips_per_host:
        raise ConfigError(
            f"--topology {text!r} has {topology.chips} chips, which are not whole hosts of {chip.chips_per_host}."
        )
    return topology
