"""Bytes by mesh axis, read from compiled programs (tests/launch/programs.py) whose communication is known."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linscale.launch import communication, hlo

MESH = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
B = 4096  # bytes of a device's argument
# program -> what a device sends, by the formulas of communication.py with the trips of the loops around
SENT = {
    "gather": {"fsdp": B},
    "scatter": {"sequence": B / 2},
    "reduce": {"tensor": B},
    "reduce_over_two": {"fsdp+tensor": 2 * B * 3 / 4},
    "exchange": {"sequence": B / 2},
    "rotate": {"sequence": B},
    "in_a_loop": {"fsdp": 3 * B, "tensor": 15 * B},
    "backwards": {"tensor": 14 * B},
    "counted": {"fsdp": 6 * B},
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    script = Path(__file__).with_name("programs.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, env=os.environ, timeout=120)
    return {file.stem: file.read_text() for file in folder.glob("*.hlo")}


@pytest.mark.parametrize("stated", (True, False), ids=("trips stated", "trips from conditions"))
def test_known_communication(programs, stated):
    assert set(programs) == set(SENT)
    for name, text in programs.items():
        if not stated:  # as TPU programs come
            text = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)
        module = hlo.parse(text)
        assert module.unknown_loops == (), name
        assert communication.by_axis(communication.collectives(module, MESH)) == SENT[name], name


def test_what_kernels_say_of_themselves_over_several_lines_is_read_over(programs):
    """As splash attention's compiled programs have it, inside and outside of loops."""
    said = 'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata='
    for name, text in programs.items():
        assert ", metadata=" in text
        module = hlo.parse(text.replace("metadata=", said))
        assert communication.by_axis(communication.collectives(module, MESH)) == SENT[name], name


def test_a_loop_of_unknown_length_is_named(programs):
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", programs["counted"])
    module = hlo.parse(text.replace("direction=LT", "direction=NE"))
    assert len(module.unknown_loops) == 1 and module.unknown_loops[0].startswith("while")


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ("v5e:2x4", "v5p:2x2x2"))
def test_known_communication_of_tpu_programs(topology):
    """The same programs by the TPU compiler, which does not state trip counts."""
    import programs
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(topology, "tpu").devices
    shape = tuple(MESH.values())
    mesh = Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), tuple(MESH))
    for program in programs.PROGRAMS:
        module = hlo.parse(programs.text(program, mesh))
        assert module.unknown_loops == (), program
        expected = SENT[program.__name__] if program.__name__ != "scatter" else {"sequence": B}  # a vector: all-reduce
        assert communication.by_axis(communication.collectives(module, MESH)) == expected, program


def line(opcode: str, attributes: str) -> hlo.Instruction:
    text = f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n  ROOT %y = f32[4]{{0}} {opcode}(%x), {attributes}\n}}\n"
    return hlo.parse(text).computations["main"].root


@pytest.mark.parametrize(
    "text, groups",
    [
        ("{{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("{}", [(0, 1, 2, 3)]),
        ("[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("[4,2]<=[2,2,2]T(2,1,0)", [(0, 4), (2, 6), (1, 5), (3, 7)]),
        ("[1,8]<=[8]", [tuple(range(8))]),
        ("mesh['a'=2,'b'=2] {'b'}", [(0, 1), (2, 3)]),
        ("mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [(0, 2), (1, 3)]),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [(0, 3), (1, 2)]),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("mesh['a'=4,'b'=2] {'a':(2)2}", [(0, 2), (1, 3), (4, 6), (5, 7)]),
    ],
)
def test_groups(text, groups):
    one = line("all-reduce", f"channel_id=1, replica_groups={text}, use_global_device_ids=true, to_apply=%add")
    assert communication.replica_groups(one, 4) == groups


def test_groups_written_in_another_way_are_an_error():
    with pytest.raises(ValueError, match="is written in a way that is not known here"):
        communication.replica_groups(line("all-reduce", "replica_groups=everyone, to_apply=%add"), 4)


def test_those_who_keep_their_own_send_nothing():
    one = line("collective-permute", "channel_id=1, source_target_pairs={{0,0},{1,2},{2,1},{3,3}}")
    assert communication.pairs(one) == [(1, 2), (2, 1)]


def test_shapes():
    (one, two) = hlo.arrays("(bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)})")
    assert (one.bytes, one.space, two.bytes, two.space) == (256, 1, 4, 0)
    assert [array.bytes for array in hlo.arrays("(pred[3], s4[5,2], f8e4m3fn[7], u32[2]{0}, token[])")] == [
        3,
        5,
        7,
        8,
        0,
    ]


def test_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing\n")
