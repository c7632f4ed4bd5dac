"""Appendix C: one sequence on several devices.

Devices must be there before JAX starts. So this file is also a script, which a test
starts with eight virtual ones.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))
import annotated_s4d as s4d  # noqa: E402


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("parts", [1, 5])
def test_parts_are_the_whole(parts, method, x64):
    """Devices played by vmap, against SciPy."""
    rng, L = np.random.default_rng(0), 240
    A = -np.exp(rng.normal(-1, 1, (3, 4))) + 1j * rng.normal(0, 20, (3, 4))
    B, C = rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4))
    u, dt = rng.normal(size=(2, 3, L)), np.array([1e-3, 1e-2, 1e-1])
    share = jax.jit(
        jax.vmap(
            functools.partial(s4d.share_of_time, method=method),
            in_axes=(None,) * 4 + (2,),
            out_axes=2,
            axis_name="time",
        )
    )
    system = [jnp.asarray(v) for v in (A, B, C, dt)]
    y = share(*system, jnp.asarray(u).reshape(2, 3, parts, -1)).reshape(u.shape)
    system = [np.asarray(v) for v in system]
    for ours, row in zip(y, np.asarray(jnp.asarray(u))):
        wanted = oracle.run(*system, row, method)[1]
        assert oracle.error(ours, wanted) < (1e-10 if x64 else 1e-5)


def test_eight_devices_give_what_one_gives():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# -- on eight devices -----------------------------------------------------------------


def model(kernel, n_layers, seed=0, **options):
    rngs = nnx.Rngs(seed)
    return s4d.S4DModel(3, 2, 4, 4, n_layers, kernel=kernel, rngs=rngs, **options)


@nnx.jit
@functools.partial(nnx.value_and_grad, has_aux=True, argnums=(0, 1))
def gradient(model, u, lengths):
    y = model(u, lengths)
    return (y**2).sum(), y


def outputs_and_gradients():
    """For a length that does not divide, and a row that ends early. The parameters pass
    from one model to the other."""
    L, options = 101, dict(n_layers=2, discretization="bilinear")
    u = jax.random.normal(jax.random.key(0), (2, L, 3))
    one, eight = model("s4d", **options), model("split", seed=1, **options)
    nnx.update(eight, nnx.state(one))
    assert type(eight.stack.blocks[0].ssm) is s4d.SplitS4D
    results = (gradient(m, u, jnp.array([L, 35])) for m in (eight, one))
    for a, b in zip(*map(jax.tree.leaves, results)):
        assert jnp.abs(b).max() > 0 and oracle.error(a, b) < 1e-5


def memory():
    """XLA plans far less for each device."""

    def planned(kernel):
        graph, state = nnx.split(model(kernel, 1, pooling="none"))
        answer = jax.jit(lambda state, u: nnx.merge(graph, state)(u))
        program = answer.lower(state, jnp.zeros((2, 2**14, 3))).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert planned("split") < planned("s4d") / 4


if __name__ == "__main__":
    assert jax.device_count() == 8
    outputs_and_gradients()
    memory()
