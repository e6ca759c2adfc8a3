"""Where rows and parameters lie when one process judges a checkpoint with all its devices."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from linscale import models
from linscale.config import Model

SMALLEST = 2**20  # elements; arrays below it are whole on every device


def over_devices(model: Model, devices: list | None = None):
    """(sharding of a batch's rows, sharding of each parameter, the number that rows must be a multiple of).

    Rows are cut over the devices. So are large parameters, along their longest axis that the devices divide (never the
    layers', which a scan walks): a model that fits in the memory of all devices together can be judged.
    """
    devices = jax.devices() if devices is None else devices
    shapes = jax.eval_shape(functools.partial(models.init, model), 0)
    if len(devices) == 1:
        return None, jax.tree.map(lambda _: SingleDeviceSharding(devices[0]), shapes), 1
    mesh = Mesh(np.array(devices), ("rows",))

    def of_parameter(path, x):
        first = 1 if "layers" in jax.tree_util.keystr(path) else 0
        fits = [axis for axis in range(first, x.ndim) if x.shape[axis] % len(devices) == 0]
        if x.size < SMALLEST or not fits:
            return NamedSharding(mesh, PartitionSpec())
        chosen = max(fits, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*("rows" if axis == chosen else None for axis in range(x.ndim))))

    return (
        NamedSharding(mesh, PartitionSpec("rows")),
        jax.tree_util.tree_map_with_path(of_parameter, shapes),
        len(devices),
    )
