"""Bounds on the time of a step, by hand for small topologies."""

import itertools

import numpy as np
import pytest

from linscale.launch import hardware, roofline


def torus(shape, mesh):
    """Places of the devices of a mesh that is laid on a torus in order."""
    return np.array(list(itertools.product(*map(range, shape)))).reshape(*mesh.values(), len(shape))


def test_links_of_a_ring_a_line_and_two_dimensions():
    topology = hardware.parse("v5p:4x4x8")
    mesh = {"data": 4, "fsdp": 4, "sequence": 4, "tensor": 2}
    rate = topology.chip.link
    places = torus((4, 4, 8), mesh)
    at = lambda *axes: sum(roofline.link_rates(topology, mesh, places, axes).values()) / rate  # noqa: E731
    assert at("data") == 2 and at("fsdp") == 2  # whole dimensions of 4, which close to rings
    assert at("tensor") == 1  # a pair
    assert at("sequence") == 1  # every second of 8: no ring
    assert at("sequence", "tensor") == 2  # the whole dimension of 8
    assert at("data", "fsdp", "sequence", "tensor") == 6


def test_a_v5e_pod_closes_at_16_alone():
    mesh = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 8}
    topology = hardware.parse("v5e:8x8")
    rates = roofline.link_rates(topology, mesh, torus((8, 8), mesh), ("fsdp",))
    assert rates == {"dimension 0": topology.chip.link}
    mesh = {"data": 1, "fsdp": 16, "sequence": 1, "tensor": 16}
    topology = hardware.parse("v5e:16x16")
    rates = roofline.link_rates(topology, mesh, torus((16, 16), mesh), ("tensor",))
    assert rates == {"dimension 1": 2 * topology.chip.link}


def test_gpus_meet_over_nvlink_in_a_host_and_over_the_network_beyond():
    topology = hardware.parse("h100:16")
    mesh = {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 8}
    places = np.array([divmod(i, 8) for i in range(16)]).reshape(2, 1, 1, 8, 2)
    chip = topology.chip
    assert roofline.link_rates(topology, mesh, places, ("tensor",)) == {"NVLink": chip.link}
    assert roofline.link_rates(topology, mesh, places, ("data",)) == {"network": chip.network}
    assert roofline.link_rates(topology, mesh, places, ("data", "tensor")) == {"network": 8 * chip.network}


def test_the_bound_is_the_largest_and_axes_that_share_links_add_up():
    topology = hardware.parse("v5p:2x2x4")
    mesh = {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 2}
    places = torus((2, 2, 4), {"fsdp": 4, "sequence": 2, "tensor": 2}).reshape(1, 4, 2, 2, 3)
    chip = topology.chip
    sent = {"sequence": chip.link, "tensor": 3 * chip.link}  # both lie in the dimension of 4: a second and three
    found = roofline.bound(topology, mesh, places, 16 * chip.peak, 2 * chip.bandwidth, sent)
    assert (found.compute, found.memory) == (1.0, 2.0)
    assert found.by_axis == pytest.approx({"sequence": 1.0, "tensor": 3.0})
    assert found.links == pytest.approx(4.0) == found.seconds and found.by == "links"
    found = roofline.bound(topology, mesh, places, 160 * chip.peak, 0.0, {"fsdp": chip.link})
    assert found.by == "compute" and found.seconds == 10.0
    assert found.links == pytest.approx(0.5)  # fsdp has a link in each of two dimensions
