"""What a config would do on a pod: memory, communication, operations and the least time of its train step.

The step is the one that training runs, compiled ahead of time for devices that are not here (linscale.launch.ahead).
Bytes and seconds are those of one device and one optimizer step, all micro-batches included.
"""

import dataclasses
import time

import jax

from linscale import models, sharding
from linscale.config import Config, Model
from linscale.launch import ahead, communication, estimate, hardware, hlo, roofline, traffic
from linscale.launch import search as nearby
from linscale.scaling import flops


@dataclasses.dataclass(frozen=True)
class Plan:
    config: Config
    topology: hardware.Topology
    mesh: dict[str, int]
    parameters: int  # bytes on a device, float32
    optimizer: int  # bytes on a device: moments, the step and what else the state holds
    temporaries: int  # bytes: activations, gradients, gathered weights
    peak: int  # bytes, with batch and program
    model_flops: float  # a step, all devices, by linscale.scaling.flops
    hardware_flops: float  # the same with what is computed again
    sent: dict[str, float]  # bytes by mesh axes; empty where the program did not fit
    sent_by_kind: dict[str, float]
    moved: float  # bytes between a device and its memory
    bound: roofline.Bound | None
    compiled: bool  # temporaries, peak and moved are of the compiler; False: computed by linscale.launch.estimate
    seconds: float  # that this plan took
    notes: tuple[str, ...] = ()

    @property
    def available(self) -> int:
        return self.topology.chip.hbm

    @property
    def fits(self) -> bool:
        return self.peak <= self.available and self.bound is not None

    @property
    def mfu(self) -> float:
        """Of the model's own FLOPs, if a step took no longer than the bound."""
        return self.model_flops / (self.bound.seconds * self.topology.devices * self.topology.chip.peak)

    @property
    def days(self) -> float:
        """For all steps of the config, at the bound."""
        return self.config.steps * self.bound.seconds / 86_400


def make(config: Config, topology: hardware.Topology, devices: list, mesh_sizes: dict[str, int]) -> Plan:
    """Compiles the train step of `config` for `devices` and reads it. A program that does not fit gives a plan too."""
    began = time.perf_counter()
    tpu = topology.chip.maker == "tpu"
    program = ahead.program(config, devices)
    sizes = ahead.sizes(program)
    flops_ = config.tokens_per_step * flops.flops_per_token(config.model, config.train.sequence)
    notes, text, memory = [], None, None
    if tpu:
        try:
            compiled = program.lowered.compile()
            text, memory = compiled.as_text(), ahead.memory_of(compiled)
        except jax.errors.JaxRuntimeError as error:
            memory = ahead.overflow(error, sizes.state + sizes.batch)
            if memory is None:
                raise
    else:
        text = ahead.partitioned(program.lowered)
        temporaries = int(estimate.temporary_bytes(config, mesh_sizes, sizes.parameters))
        arguments = sizes.state + sizes.batch
        memory = ahead.Memory(arguments, temporaries, arguments + temporaries)

    if config.optimizer.offload:
        notes.append(
            f"the optimizer's moments, {2 * sizes.parameters / ahead.GIB:.2f} GiB a device, lie in the host's memory; the "
            "time in which they come and go every step is not in the bound"
        )
    hardware_flops = program.flops
    sent, kinds, moved, bound = {}, {}, 0.0, None
    if text is not None:
        module = hlo.parse(text)
        found = communication.collectives(module, mesh_sizes, scatters=not tpu)
        sent, kinds = communication.by_axis(found), communication.by_kind(found)
        moved = traffic.memory_bytes(module) if tpu else estimate.memory_traffic(config, mesh_sizes, sizes.parameters)
        places = roofline.places(topology, program.mesh.devices)
        bound = roofline.bound(topology, mesh_sizes, places, hardware_flops, moved, sent)
        if module.unknown_loops:
            notes.append(f"loops of unknown length, counted once: {', '.join(module.unknown_loops)}")
    return Plan(
        config=config,
        topology=topology,
        mesh=mesh_sizes,
        parameters=sizes.parameters,
        optimizer=sizes.state - sizes.parameters,
        temporaries=memory.temporaries,
        peak=memory.peak,
        model_flops=flops_,
        hardware_flops=hardware_flops,
        sent=sent,
        sent_by_kind=kinds,
        moved=moved,
        bound=bound,
        compiled=tpu,
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )


def as_json(plan: Plan) -> dict:
    """Raw numbers under the names of the fields; seconds and bytes of one device and step."""
    out = {
        field.name: getattr(plan, field.name)
        for field in dataclasses.fields(Plan)
        if field.name not in ("config", "topology", "bound")
    }
    out |= {
        "config": dataclasses.asdict(plan.config),
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "device_kind": plan.topology.chip.kind,
        "available": plan.available,
        "fits": plan.fits,
        "tokens_per_step": plan.config.tokens_per_step,
        "steps": plan.config.steps,
    }
    if plan.bound is not None:
        out["bound"] = dataclasses.asdict(plan.bound) | {"seconds": plan.bound.seconds, "by": plan.bound.by}
        out |= {"mfu_at_bound": plan.mfu, "days_at_bound": plan.days}
    return out


def search(config: Config, topology: hardware.Topology, tries: int, tell=lambda sentence: None) -> list[Plan]:
    """Plans in the order of the tries; the last one fits, or none does. ConfigError for what cannot work, before any
    compile."""
    config = dataclasses.replace(config, model=_decided(config.model, topology))
    mesh = sharding.sizes(config.mesh, topology.devices)
    sharding.check(config, topology.devices)
    devices = ahead.devices(topology)  # before jax begins
    sharding.check_host_memory(config, devices[0])
    models.validate(config.model)

    def attempt(config: Config, mesh: dict[str, int]) -> Plan:
        tell(
            f"compiling for {topology.name}: mesh {mesh}, accumulation {config.train.accumulation}, remat {config.model.remat}"
        )
        return make(config, topology, devices, mesh)

    def estimated(config: Config, mesh: dict[str, int]) -> float:
        parameters = flops.count_parameters(config.model).total
        each = 4 * parameters / (mesh["fsdp"] * mesh["tensor"])
        state = each if config.optimizer.offload else 3 * each
        return state + estimate.temporary_bytes(config, mesh, each)

    return nearby.nearest(config, mesh, attempt, estimated, topology.chip.hbm, tries)


def _decided(model: Model, topology: hardware.Topology) -> Model:
    """What "auto" becomes on those chips. The loop over layers stays one: its program is the same, and sooner compiled."""
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    remat = ("none" if topology.chip.maker == "tpu" else "dots") if model.remat == "auto" else model.remat
    return dataclasses.replace(model, dtype=dtype, remat=remat)


def changes(before: Plan, after: Plan) -> dict[str, object]:
    return nearby.changes(before.config, before.mesh, after.config, after.mesh)
