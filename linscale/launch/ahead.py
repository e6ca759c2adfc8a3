"""Compiling for devices that are not here: TPU slices by libtpu, and CPU devices as stand-ins for GPUs.

A program compiled for a TPU slice is the program that the slice would run: its memory is the compiler's own figure. For
GPUs no compiler comes without the GPU, so the program is partitioned for as many CPU devices; what it sends between
devices is read from that, and everything that the code of a device decides (temporary memory, traffic) is computed.
"""

import dataclasses
import functools
import math
import os
import re
import tempfile
from pathlib import Path

from linscale.config import ConfigError
from linscale.launch import hardware

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device as the compiler lays them out."""

    arguments: int  # state and batch
    temporaries: int  # activations, gradients and everything else that lives only inside the step
    peak: int  # all together, the outputs that take no argument's place included


def prepare() -> None:
    """To be called before jax is imported: the machine's own accelerators are left alone."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks no metadata server
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


def devices(topology: hardware.Topology) -> list:
    """The jax devices of a topology, in the order in which jax numbers them. ConfigError if it cannot be had."""
    import jax

    if topology.chip.maker != "tpu":
        try:
            jax.config.update("jax_num_cpu_devices", topology.devices)
        except RuntimeError as error:  # jax has begun
            if len(jax.devices("cpu")) < topology.devices:
                raise ConfigError(
                    f"--topology {topology.name!r} needs a fresh process, as jax has begun with {len(jax.devices())} devices."
                ) from error
        return jax.devices("cpu")[: topology.devices]

    from jax.experimental import topologies

    options = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as training runs
    if topology.chips < topology.chip.chips_per_host:
        options["chips_per_host_bounds"] = [*topology.shape, 1, 1][:3]
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except (ImportError, NotImplementedError) as error:
        raise ConfigError(
            f"--topology {topology.name!r} needs libtpu, TPU's compiler, which runs without a TPU: "
            f"pip install 'linscale[tpu]' ({error})."
        ) from error
    except Exception as error:  # jaxlib's own, which is no public class
        raise ConfigError(f"--topology {topology.name!r} is refused by libtpu: {error}") from error


def memory_of(compiled) -> Memory:
    """Of a compiled program."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    code = stats.generated_code_size_in_bytes
    return Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs + code,
    )


def overflow(error: Exception, arguments: int) -> Memory | None:
    """What the TPU compiler says of a program that does not fit; None if the error says something else."""
    text = str(error)
    if temporaries := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", text):
        size = _bytes(temporaries)
        return Memory(arguments, size, arguments + size)
    if used := re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+[KMGT]?) hbm", text):
        size = _bytes(used)
        return Memory(arguments, size - arguments, size)
    return None


def _bytes(found: re.Match) -> int:
    return int(float(found.group(1)) * _UNITS[found.group(2)])


@dataclasses.dataclass(frozen=True)
class Program:
    """The train step of a config for a mesh, as training lowers it."""

    mesh: object  # jax.sharding.Mesh
    state: object  # abstract TrainState with its shardings
    batch: dict
    lowered: object  # jax.stages.Lowered
    flops: float  # of its matrix products, all devices


def program(config, devices: list) -> Program:
    import jax

    from linscale import sharding
    from linscale.launch import operations
    from linscale.training import checkpoint, loop, step

    mesh = sharding.make_mesh(config.mesh, devices)
    state = checkpoint.abstract_state(config, mesh)
    batch = loop.abstract_batch(config, mesh, config.train.batch)
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(functools.partial(step.train_step, config))(state, batch)
    return Program(mesh, state, batch, loop.lower_step(config, state, mesh), operations.matrix_flops(jaxpr))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes on a device."""

    parameters: int
    state: int  # parameters, moments and the rest
    batch: int


def sizes(program: Program) -> Sizes:
    """Exact, from the shardings. What lies in the host's memory is not counted."""
    return Sizes(_local(program.state.params), _local(program.state), _local(program.batch))


def _local(tree) -> int:
    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.sharding.memory_kind in (None, "device")
    )


def partitioned(lowered) -> str:
    """The HLO of one device's program, as it leaves the partitioner and before a backend changes it."""
    with tempfile.TemporaryDirectory() as folder:
        lowered.compile(
            compiler_options={
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": "spmd-partitioning",
                "xla_dump_hlo_as_text": True,
            }
        )
        files = sorted(Path(folder).glob("*after_spmd-partitioning*.txt"))
        if not files:
            raise RuntimeError("this jax writes no module after its pass spmd-partitioning")
        return files[-1].read_text()
