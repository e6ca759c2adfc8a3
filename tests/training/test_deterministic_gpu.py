"""train.deterministic on a GPU: two processes that compile for themselves reach the same bits.

python -m pytest -m gpu tests/training/test_deterministic_gpu.py
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from linscale import sharding
from linscale.config import ARCHITECTURES, Config, Mesh, Model, Optimizer, Train
from linscale.training import checkpoint, loop

STEPS, B, T, VOCAB = 8, 8, 1024, 512


def trained(arch: str, dtype: str) -> dict:
    """Losses of a few steps on packed random documents, and a digest of every array of the state after them."""
    config = Config(
        model=Model(arch=arch, layers=2, width=256, heads=2, ffn=512, vocab_size=VOCAB, dtype=dtype, softmax_every=2),
        train=Train(batch=B, sequence=T, steps=STEPS, accumulation=2, deterministic=True),
        optimizer=Optimizer(learning_rate=1e-2, warmup_tokens=0),
        mesh=Mesh(data=1),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    train_step, _, init = loop.compile_programs(config, checkpoint.abstract_state(config, mesh), mesh)
    state, losses, random = init(), [], np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = random.integers(0, VOCAB, (B, T + 1), np.int32)
        segment_ids = 1 + np.cumsum(random.random((B, T)) < 0.01, axis=1, dtype=np.int32)
        batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segment_ids": segment_ids}
        state, measured = train_step(state, sharding.put(batch | {"weights": np.ones((B, T), np.float32)}, mesh))
        losses.append(float(measured["loss"]))
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
    digests = {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in leaves}
    return {"backend": jax.default_backend(), "losses": losses, "digests": digests}


def in_a_process(arch: str, dtype: str) -> dict:
    root = str(Path(__file__).parents[2])
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    env |= {"PYTHONPATH": os.pathsep.join((root, env.get("PYTHONPATH", "")))}
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the process of the test may hold the device, too
    done = subprocess.run([sys.executable, __file__, arch, dtype], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_two_processes_reach_the_same_bits(arch, dtype):
    one, other = in_a_process(arch, dtype), in_a_process(arch, dtype)
    assert one["backend"] == "gpu" and one["losses"][-1] != one["losses"][0]
    assert one["losses"] == other["losses"]
    assert [name for name, digest in one["digests"].items() if other["digests"][name] != digest] == []


if __name__ == "__main__":
    print(json.dumps(trained(*sys.argv[1:])))
