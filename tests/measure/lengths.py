"""Time and memory of one gradient against the length of its sequence.

    python tests/measure/lengths.py          write assets/lengths.json, for Appendix C
    python tests/measure/lengths.py --quick  up to 2^14 samples; writes nothing

Three ways, for a model of two blocks with 16 channels and a state of 64: at once by
convolution, by chunks of 4,096 samples that the gradient computes once more, and by the
parallel scan. Each point runs in a process of its own. Its time is the median of some
runs after the first. Its memory is the highest that the process holds while it runs
(getrusage, ru_maxrss) minus what it held before, when the program was compiled and the
data were there. A point for which XLA plans more than the limit is not run and recorded
as left out. Last, what XLA plans for each device when a sequence is divided among
several, with virtual devices: compiled only, as they would share these cores.
"""

import argparse
import ctypes
import functools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import record  # it puts the article on the path

MEGABYTE = 2**20
SIZES = dict(d_model=16, d_state=64, n_layers=2)
WAYS = {"at once": "s4d", "in chunks": "s4d", "parallel scan": "scan"}
CHUNK = 4096


def load():
    """Import the article, and name a layer that runs by parallel scan."""
    import annotated_s4d as s4d

    class ScanS4D(s4d.S4D):
        def __call__(self, u, lengths=None):
            A, B, C, dt = self.system()
            discrete = *s4d.s4d_discretize(A, B, dt, self.method), C
            rest = s4d.pole_rest(A, dt, discrete[0], self.method)
            y, _ = s4d.s4d_scan(*discrete, u.swapaxes(1, 2), A_rest=rest)
            return self.mixer(y.swapaxes(1, 2) + self.D[...] * u)

    s4d.LAYERS["scan"] = ScanS4D
    return s4d


def compiled(s4d, kernel, L, size):
    """The gradient of a model for L samples. Returns the program and its arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    options = dict(SIZES, pooling="none", kernel=kernel, rngs=nnx.Rngs(0))
    graph, params = nnx.split(s4d.S4DModel(1, 1, **options))
    u, target = jax.random.normal(jax.random.key(0), (2, 1, L, 1)) + 0

    def gradient(params, u, target):
        model = nnx.merge(graph, params)
        return s4d.exact_gradient(model, u, target, size=size)

    arguments = jax.block_until_ready((params, jnp.array(u), jnp.array(target)))
    return jax.jit(gradient).lower(*arguments).compile(), arguments


def held(peak=False):
    """Bytes that this process holds, or at most held since `forget_peak`."""
    if peak:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def forget_peak():
    """Let ru_maxrss begin anew from what is in use now (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed goes back
    Path("/proc/self/clear_refs").write_text("5")


def measure_point(way, L, limit, turns):
    """Measure one point in this process."""
    s4d = load()
    import jax
    import numpy as np
    from render.memory import keep_memory

    keep_memory()  # as the script does
    size = min(CHUNK, L) if way == "in chunks" else None
    program, arguments = compiled(s4d, WAYS[way], L, size)
    planned = program.memory_analysis().temp_size_in_bytes
    point = dict(L=L, planned_megabytes=planned / MEGABYTE)
    if planned > limit * 2**30:
        return point | dict(left_out=f"XLA plans more than {limit} GB")
    forget_peak()
    before, times = held(), []
    for turn in range(turns + 1):
        start = time.perf_counter()
        loss, _ = jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
        if turn == 0:
            point["megabytes"] = (held(peak=True) - before) / MEGABYTE
            turns_left = turns if times[0] < 2 else 3
        if turn == turns_left:
            break
    low, middle, high = np.quantile(times[1:], [0.25, 0.5, 0.75])
    assert np.isfinite(loss)
    return point | dict(seconds=middle, spread=(high - low) / middle)


def measure_devices(L):
    """What XLA plans for each device, for a whole and for a divided sequence."""
    s4d = load()
    import jax

    plans = {}
    for kernel in ("s4d", "split"):
        program, _ = compiled(s4d, kernel, L, None)
        plans[kernel] = program.memory_analysis().temp_size_in_bytes / MEGABYTE
    return dict(L=L, devices=jax.device_count(), planned_megabytes=plans)


def in_a_process(devices=1, **job):
    """Run a job of this file in a process of its own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    words = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    what = "time and memory of one gradient against the length of its sequence"
    flags = record.parser(what, "lengths", "up to 2^14 samples")
    number = dict(type=record.positive)
    flags.add_argument("--limit", **number, default=8, help="gigabytes (8)")
    flags.add_argument("--turns", **number, default=7, help="timed runs (7; long: 3)")
    flags.add_argument("--job", help=argparse.SUPPRESS)
    options = record.begin(flags)
    if options.job:
        job = json.loads(options.job)
        work = measure_point if "way" in job else measure_devices
        return print(json.dumps(work(**job), default=float))
    rest = dict(limit=options.limit, turns=options.turns)
    ways = {way: [] for way in WAYS}
    longest = 14 if options.quick else 20  # log2 of it
    for power in range(10, longest + 1, 2):
        for way, rows in ways.items():  # they take turns
            job = functools.partial(in_a_process, way=way, L=2**power, **rest)
            rows.append(record.once(options, f"{way}, 2^{power}", job))
            print(way, rows[-1], flush=True)
    divided = []
    for devices in (1, 2, 4, 8):
        job = functools.partial(in_a_process, devices, L=2 ** min(16, longest))
        divided.append(record.once(options, f"{devices} devices", job))
    print(*divided, sep="\n")
    result = dict(
        seed=0,
        model=SIZES,
        chunk=CHUNK,
        limit_gigabytes=options.limit,
        ways=ways,
        divided=divided,
    )
    record.keep(options, **result)


if __name__ == "__main__":
    main()
