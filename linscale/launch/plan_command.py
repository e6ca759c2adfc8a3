"""`linscale plan`: does a config fit on a pod, what does it send, and how long must a step take at least."""

import argparse
import json
import sys
from pathlib import Path

from linscale.config import ConfigError
from linscale.launch import ahead, hardware
from linscale.training import recipes

HELP = """\
Compile the train step of a config for a pod that is not here, and say what it would need.

  linscale plan --config=configs/pods.py:hgrn2-7b-v5p128 --topology v5p:4x4x8
  linscale plan --config=configs/ladder.py:tnl-1b --topology v5e:4x4 --config.train.batch=512 --json plan.json
  linscale plan --config=configs/ladder.py:llama-3b --topology h100:32

Where the config does not fit, settings near to it are tried (--no-search: only the config itself). Exit codes: 0 it
fits, or a setting was found that does; 1 nothing tried fits; 2 the input is wrong.

TPU slices (v4, v5e, v5p, v6e, tpu7x) are compiled by libtpu, which needs no TPU: pip install 'linscale[tpu]'. For H100 and
H200 the program is partitioned as for the GPUs, which gives what is sent; memory beside the state is computed.

Every field of linscale/config.py can be set as --config.section.field=value.
"""
GIB = 2**30


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale plan", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE.py:RUNG", help="the recipe and its rung")
    parser.add_argument("--config.FIELD", dest="unused", metavar="VALUE", help="override a field")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="as v5p:4x4x8, v5e:16x16 or h100:16")
    parser.add_argument("--json", default="", metavar="FILE", help="write every number there")
    parser.add_argument("--no-search", action="store_true", help="do not look for a setting that fits")
    parser.add_argument("--tries", type=int, default=8, help="compiles at most, the first included (8)")
    options, rest = parser.parse_known_args(argv)
    topology = hardware.parse(options.topology)
    if options.tries < 1:
        raise ConfigError(f"--tries is {options.tries}; it must be at least 1.")
    if options.json and not Path(options.json).parent.is_dir():
        raise ConfigError(f"--json is {options.json!r}, whose folder does not exist; make it first.")
    # the data are not looked at, so a recipe need not say where they lie
    overrides = [("data.path", "unread"), *recipes.split(rest, "plan")]
    config = recipes.load_run(options.config, overrides)
    ahead.prepare()
    from linscale.launch import plan

    plans = plan.search(config, topology, 1 if options.no_search else options.tries, tell=_tell)
    print(text(plans))
    if options.json:
        Path(options.json).write_text(json.dumps(_as_json(plans), indent=1) + "\n")
    return 0 if plans[-1].fits else 1


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _as_json(plans: list) -> dict:
    from linscale.launch import plan

    first, last = plan.as_json(plans[0]), plan.as_json(plans[-1])
    return {
        "asked": first,
        "fits": plans[0].fits,
        "found": last if plans[-1].fits else None,
        "changes": plan.changes(plans[0], plans[-1]),
        "tried": [{"changes": plan.changes(plans[0], one), "peak": one.peak, "fits": one.fits} for one in plans],
    }


def text(plans: list) -> str:
    """The plan that was asked for, and where it does not fit what was tried and the one that does."""
    from linscale.launch import plan

    parts = [_one(plans[0])]
    if len(plans) > 1 or not plans[0].fits:
        parts.append("Tried:")
        for one in plans:
            changed = " ".join(f"{k}={v}" for k, v in plan.changes(plans[0], one).items()) or "as asked"
            verdict = "fits" if one.fits else "does not fit"
            parts.append(f"  {changed:60} {one.peak / GIB:8.1f} GiB  {verdict:12}  {one.seconds:5.0f} s")
    if not plans[0].fits and plans[-1].fits:
        options = " ".join(f"--config.{k}={v}" for k, v in plan.changes(plans[0], plans[-1]).items())
        parts += ["", f"The nearest setting found that fits: {options}", "", _one(plans[-1])]
    elif not plans[-1].fits:
        parts.append("Nothing tried fits; take more devices, a shorter sequence or a smaller model.")
    return "\n".join(parts)


def _one(plan) -> str:
    config, topology = plan.config, plan.topology
    mesh = ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    how = "compiled" if plan.compiled else "computed, not compiled"
    rows = [
        f"{config.name} on {topology.name}: {topology.devices} devices ({topology.chip.kind}), mesh {mesh}",
        f"{config.train.batch} sequences of {config.train.sequence:,} tokens a step ({config.tokens_per_step:,} tokens), "
        f"accumulation {config.train.accumulation}, remat {config.model.remat}",
        "",
        "memory of a device, GiB",
        _row("parameters", plan.parameters / GIB),
        _row("optimizer", plan.optimizer / GIB),
        _row("activations, gradients, gathered weights", plan.temporaries / GIB, f"({how})"),
        _row(
            "peak",
            plan.peak / GIB,
            f"of {plan.available / GIB:.2f}: {'fits' if plan.peak <= plan.available else 'DOES NOT FIT'}",
        ),
        "",
        f"operations of a step: {plan.model_flops:.4g} FLOPs of the model, {plan.hardware_flops:.4g} with what is computed again",
    ]
    if plan.bound is not None:
        bound = plan.bound
        rows += ["", "sent by a device in a step, GiB, and seconds at full links"]
        rows += [
            _row(f"{axis} axis", sent / GIB, f"{bound.by_axis[axis]:.3f} s") for axis, sent in sorted(plan.sent.items())
        ] or ["  nothing"]
        rows += [
            "",
            f"a step takes at least {bound.seconds:.3f} s, bound by {bound.by}: arithmetic {bound.compute:.3f} s, memory "
            f"{bound.memory:.3f} s ({'compiled' if plan.compiled else 'computed'}: {plan.moved / GIB:.0f} GiB), links {bound.links:.3f} s",
            f"MFU at most {100 * plan.mfu:.0f} %; {config.steps:,} steps ({config.steps * config.tokens_per_step:.3g} tokens) "
            f"take at least {plan.days:.3g} days",
        ]
    rows += plan.notes
    return "\n".join(rows) + "\n"


def _row(name: str, number: float, rest: str = "") -> str:
    return f"  {name:42}{number:10.2f}  {rest}".rstrip()
