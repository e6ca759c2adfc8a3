"""Which device holds what: the mesh of a run, and the one table that lays the axes of arrays on the axes of the mesh.

The mesh has four axes. Parameters and the optimizer's moments are cut over `fsdp` along their width, and over `tensor`
along heads, the inner width of the gated linear unit and the vocabulary; rows of a batch over `data` and `fsdp`, its
tokens over `sequence`. A layer's parameters are gathered over fsdp when the layer runs, forward and backward, and
their gradients come back cut. Models name the axes of their arrays; what the names mean is decided here alone.

Everything here is the identity on one device.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from linscale import config as configs
from linscale.config import ConfigError
from linscale.kernels.axes import Axes

NAMES = ("data", "fsdp", "sequence", "tensor")
HOST = "pinned_host"  # kind of the host's memory from which devices copy without the processor


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> the axes of the mesh it is cut over; None, and axes that are not here, stay whole."""

    batch: tuple[str, ...] = ("data", "fsdp")  # rows
    sequence: tuple[str, ...] = ("sequence",)  # tokens of a row
    width: tuple[str, ...] = ("fsdp",)  # d, of parameters; activations keep it whole
    heads: tuple[str, ...] = ("tensor",)  # heads, and head-major channels
    ffn: tuple[str, ...] = ("tensor",)
    vocabulary: tuple[str, ...] = ("tensor",)
    channels: tuple[str, ...] = ("tensor", "fsdp")  # head-major, of parameters that have no width beside them

    def spec(self, *axes: str | None) -> PartitionSpec:
        """One logical axis, or None, for each dimension. ValueError: unknown, or two that need one axis of the mesh."""
        cut = []
        for axis in axes:
            if axis is not None and axis not in (known := [field.name for field in dataclasses.fields(self)]):
                raise ValueError(f"{axis!r} is not a logical axis; it must be None or one of {', '.join(known)}.")
            cut.append(getattr(self, axis) if axis else ())
        used = [name for names in cut for name in names]
        if len(set(used)) < len(used):
            raise ValueError(f"the axes {axes} collide: they would be cut over {used}, each of which can cut one only.")
        return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in cut))


RULES = Rules()
# The same for the operators, which run on every device with its own part of their arrays.
AXES = Axes(RULES.batch, *RULES.sequence, *RULES.heads, *RULES.vocabulary)

# Axes of every parameter, by its path; those of layers have the layers' axis, which is never cut, in front.
PARAMETERS = {
    "embedding": ("vocabulary", "width"),
    "head": ("vocabulary", "width"),
    "tpe/coefficients": ("width", None),
    "final_norm/scale": ("width",),
    "mixer_norm/scale": ("width",),
    "ffn_norm/scale": ("width",),
    "mixer/query/kernel": ("width", "heads"),
    "mixer/key/kernel": ("width", "heads"),
    "mixer/value/kernel": ("width", "heads"),
    "mixer/forget/kernel": ("width", "heads"),
    "mixer/out/kernel": ("heads", "width"),
    "mixer/gate/down/kernel": ("width", None),
    "mixer/gate/up/kernel": (None, "channels"),
    "mixer/lower_bound": ("channels",),
    "mixer/theta": ("heads", None),
    "ffn/up/kernel": ("width", "ffn"),
    "ffn/gate/kernel": ("width", "ffn"),
    "ffn/down/kernel": ("ffn", "width"),
}


def sizes(mesh: configs.Mesh, devices: int) -> dict[str, int]:
    """Axis -> size, with -1 replaced by what is left of the devices. ConfigError: they do not make so many devices."""
    asked = {name: getattr(mesh, name) for name in NAMES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    written = " x ".join(f"{name} {size}" for name, size in asked.items())
    if -1 in asked.values():
        if devices % fixed:
            raise ConfigError(
                f"config.mesh is {written}, but {fixed} does not divide the {devices} devices; make the product of "
                "the fixed axes a divisor of them."
            )
        return {name: devices // fixed if size == -1 else size for name, size in asked.items()}
    if fixed != devices:
        raise ConfigError(
            f"config.mesh is {written}, which is {fixed} devices, but there are {devices}; set one axis to -1 to take "
            "the rest."
        )
    return asked


def make_mesh(mesh: configs.Mesh, devices: list | None = None) -> Mesh:
    """The mesh over these devices, all by default. ConfigError: the sizes do not match them."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes(mesh, len(devices)).values())
    return jax.make_mesh(shape, NAMES, axis_types=(AxisType.Auto,) * len(NAMES), devices=devices)


def check(config: configs.Config, devices: int) -> None:
    """ConfigError, before any compile, where an axis of the mesh does not divide what it cuts."""
    size = sizes(config.mesh, devices)
    m, t = config.model, config.train
    rows = size["data"] * size["fsdp"]
    if t.batch % (t.accumulation * rows):
        micro = "" if t.accumulation == 1 else f" times config.train.accumulation {t.accumulation}"
        raise ConfigError(
            f"config.train.batch is {t.batch}, but mesh.data {size['data']} times mesh.fsdp {size['fsdp']}{micro} is "
            f"{t.accumulation * rows}, which does not divide it; make batch a multiple."
        )
    cut = [
        ("train.sequence", t.sequence, "sequence", size["sequence"]),
        ("model.heads", m.heads, "tensor", size["tensor"]),
        ("model.ffn", m.ffn, "tensor", size["tensor"]),
        ("model.vocab_size", m.vocab_size, "tensor", size["tensor"]),
        ("model.width", m.width, "fsdp", size["fsdp"]),
    ]
    if m.arch != "llama":
        cut.append(("model.width", m.width, "fsdp times tensor", size["fsdp"] * size["tensor"]))
    for field, value, axis, by in cut:
        if value % by:
            raise ConfigError(
                f"config.{field} is {value}, which mesh.{axis} {by} does not divide; choose a divisor of it or a "
                f"multiple for {field}."
            )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x cut as its logical axes say, under the mesh in context (jax.set_mesh); x itself where there is none.

    A dimension that its axes of the mesh do not divide, as the one token of a decoding step, stays whole.
    """
    mesh = _ambient()
    if mesh is None:
        return x
    spec = RULES.spec(*axes)
    fits = [cut if length % _size(mesh, cut) == 0 else None for length, cut in zip(x.shape, spec)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fits))


def gather(params: Any) -> Any:
    """Parameters of a layer (or {"embedding": ...}), whole along fsdp, as they are used; gradients come back cut."""
    mesh = _ambient()
    if mesh is None or _size(mesh, "fsdp") == 1:
        return params

    def one(path, x):
        spec = _spec(path, x.ndim)
        return _gather(spec, _without_fsdp(spec), x)

    return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(cut, whole, x):
    return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(
    lambda cut, whole, x: (_gather(cut, whole, x), None),
    lambda cut, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, cut),),
)


def gathers() -> bool:
    """Whether `gather` does anything in this context."""
    mesh = _ambient()
    return mesh is not None and _size(mesh, "fsdp") > 1


def like_parameters(params: Any) -> Any:
    """A tree with the parameters' paths, as gradients, cut like them under the mesh in context."""
    if _ambient() is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(x, _spec(path, x.ndim)), params
    )


def shardings(mesh: Mesh, tree: Any, memory: str | None = None) -> Any:
    """NamedSharding of every array of a tree of parameters, of the optimizer's state, or of a whole training state.

    The optimizer's moments repeat the parameters' names in dicts and lie like them; all else is on every device.
    memory: kind of memory of what is named, as HOST; None is the devices' own.
    """

    def one(path, x):
        named = any(isinstance(key, jax.tree_util.DictKey) for key in path)
        return NamedSharding(mesh, _spec(path, x.ndim), memory_kind=memory) if named else replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def check_host_memory(config: configs.Config, device) -> None:
    """ConfigError, before any compile, where config.optimizer.offload asks for a memory that the device cannot reach."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.optimizer.offload and HOST not in kinds:
        raise ConfigError(
            f"config.optimizer.offload is True, but {device.device_kind} offers no memory of kind {HOST!r} (it has "
            f"{', '.join(kinds)}); set it to False, and a larger config.mesh.fsdp to save memory."
        )


def of_batch(mesh: Mesh) -> NamedSharding:
    """Of the arrays [rows, tokens] of a batch."""
    return NamedSharding(mesh, RULES.spec("batch", "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def describe(mesh: Mesh) -> str:
    """'TPU v5p', or '8 x TPU v5p (data 2, fsdp 4)'."""
    kind = mesh.devices.flat[0].device_kind
    cut = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind} ({cut})" if cut else kind


def host_rows(mesh: Mesh) -> tuple[int, int]:
    """(which share of the rows this process feeds, how many shares there are). Processes that hold tokens or copies of
    the same rows feed the same share."""
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    needs = {}  # process -> the blocks of rows that its devices hold
    for block, devices in enumerate(rows):
        for device in devices:
            needs.setdefault(device.process_index, set()).add(block)
    shares = sorted({tuple(sorted(blocks)) for blocks in needs.values()})
    if sum(map(len, shares)) != len(rows) or len(set(map(len, shares))) > 1:
        raise ConfigError(
            f"config.mesh is {dict(mesh.shape)}, whose rows do not fall evenly on the {len(needs)} processes; choose "
            "data and fsdp so that each process holds equally many rows, or all processes the same."
        )
    return shares.index(tuple(sorted(needs[jax.process_index()]))), len(shares)


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the devices. With several processes, each gives the rows of its share (`host_rows`)."""
    if jax.process_count() == 1:
        return jax.device_put(batch, of_batch(mesh))
    _, shares = host_rows(mesh)
    return {
        name: jax.make_array_from_process_local_data(of_batch(mesh), x, (x.shape[0] * shares, *x.shape[1:]))
        for name, x in batch.items()
    }


def _ambient():
    """The mesh in context, None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def _size(mesh, cut) -> int:
    """Devices along one axis of the mesh, several, or none."""
    names = (cut,) if isinstance(cut, str) else cut or ()
    return math.prod(mesh.shape[name] for name in names)


def _spec(path, ndim: int) -> PartitionSpec:
    """By the dict keys along the path to an array."""
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names[0] == "layers":
        names = names[2:]  # the kind of layers
    if (name := "/".join(names)) not in PARAMETERS:
        raise ValueError(f"the parameter {name!r} has no axes; add it to PARAMETERS of linscale/sharding.py.")
    axes = PARAMETERS[name]
    return RULES.spec(*(None,) * (ndim - len(axes)), *axes)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    kept = [tuple(n for n in ((cut,) if isinstance(cut, str) else cut or ()) if n != "fsdp") for cut in spec]
    return PartitionSpec(*(names or None for names in kept))
