"""The least time that a step can take: arithmetic at peak, memory at full bandwidth, links at full bandwidth.

The three run beside each other at best, so the bound is the largest of them; a real step is longer. What is sent along
several mesh axes adds up where the axes share links.

Links. On a torus an axis uses the dimensions along which its devices differ. A whole dimension that closes to a ring
carries two ways at once; a part of one, or a pair, has an end that hears from one side only, and counts as one link. On
GPUs an axis inside a host has NVLink; beyond it the host's network too, whose part of the bytes is the smaller, as each
byte need enter a host but once.
"""

import dataclasses

import numpy as np

from linscale.launch import hardware


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds a step."""

    compute: float
    memory: float
    links: float  # the busiest dimension of the torus, or network
    by_axis: dict[str, float]  # links, each axis alone

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def by(self) -> str:
        parts = {"compute": self.compute, "memory bandwidth": self.memory, "links": self.links}
        return max(parts, key=parts.get)


def bound(
    topology: hardware.Topology, mesh: dict[str, int], places: np.ndarray, flops: float, memory: float, sent: dict
) -> Bound:
    """flops: of all devices. memory: bytes moved by a device. sent: of communication.by_axis. places: of `places`."""
    by_axis, load = {}, {}
    for axes, count in sent.items():
        rates = link_rates(topology, mesh, places, tuple(axes.split("+")))
        together = sum(rates.values())
        by_axis[axes] = count / together if together else 0.0
        for link in rates:
            load[link] = load.get(link, 0.0) + by_axis[axes]
    return Bound(
        compute=flops / (topology.devices * topology.chip.peak),
        memory=memory / topology.chip.bandwidth,
        links=max(load.values(), default=0.0),
        by_axis=by_axis,
    )


def places(topology: hardware.Topology, devices: np.ndarray) -> np.ndarray:
    """[*mesh, coordinates]: where each device of a mesh stands: in the torus, or (host, place in it) for GPUs."""
    if topology.chip.dimensions:
        coordinates = [device.coords[: topology.chip.dimensions] for device in devices.flat]
    else:
        coordinates = [divmod(device.id, topology.chip.chips_per_host) for device in devices.flat]
    return np.asarray(coordinates).reshape(*devices.shape, -1)


def link_rates(topology: hardware.Topology, mesh: dict[str, int], places: np.ndarray, axes: tuple[str, ...]) -> dict:
    """Bytes/s that a device can send along mesh axes: name of the link -> rate; what is sent is spread over them."""
    moved = np.moveaxis(places, [list(mesh).index(axis) for axis in axes], range(len(axes)))
    group = moved.reshape(-1, *moved.shape[len(axes) :])  # [members, the other axes.., coordinates]
    group = group.reshape(group.shape[0], -1, group.shape[-1])[:, 0]
    extent = [len(set(column)) for column in group.T.tolist()]
    chip = topology.chip
    if not chip.dimensions:
        hosts, inside = extent
        if hosts == 1:
            return {"NVLink": chip.link}
        return {"network": chip.network * inside}
    rates = {}
    for dimension, n in enumerate(extent):
        if n > 1:
            ring = n == topology.shape[dimension] and n > 2 and topology.wraps(dimension)
            rates[f"dimension {dimension}"] = (2 if ring else 1) * chip.link / chip.devices_per_chip
    return rates
