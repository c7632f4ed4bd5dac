"""Put the article on the path, and offer both precisions to the tests."""

import os
import shutil
import sys
import threading
from pathlib import Path

# Most of a test is compilation, and no test measures speed: let LLVM not optimize. One
# thread each for BLAS, the workers are as many as the cores. Set before JAX and NumPy
# are imported, and only where the caller's environment says nothing else. Programs that
# the tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# What one process has compiled the others read from a folder, and so does the next run
# of the tests, which then takes half the time. Git ignores it, and it is emptied when
# it has grown large. The workers inherit its name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = Path(__file__).parent.parent / ".compiled"
    if len(list(compiled.glob("*"))) > 20_000:  # some 700 MB
        shutil.rmtree(compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax
import pytest

# XLA has settings that compile in two thirds of the time or less. It reads them when
# it first compiles, and stops at a flag that it does not know: name those it knows.
FASTER = {
    (0, 10): "--xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
    (0, 12): "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
}
if jax.__version_info__[:2] in FASTER:
    os.environ.setdefault("XLA_FLAGS", FASTER[jax.__version_info__[:2]])

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / room) for room in (".", "notebooks", "tests/measure")]

from render.memory import keep_memory  # noqa: E402

keep_memory()  # arrays of 65,536 steps come and go by the hundred


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def x64(request):
    """Run a test in float32 and again in float64."""
    with jax.enable_x64(request.param):
        yield request.param


def pytest_configure(config):
    """With `--dist loadfile`, start the files as they are named, not the one with the
    most tests first: those that take longest have few, and would begin last."""
    config.option.loadscopereorder = False


def pytest_sessionfinish():
    """Let the page's threads end, or not begin: they may be importing JAX just now."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()
            thread.join()
