# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training that survives
#
# *A companion to The Annotated S4D.*
#
# The training in Part 11 of the article takes a minute. Larger ones take hours, on
# machines that are switched off, lent to others or short of memory. They must survive
# that: a run that is broken off and resumed should end with the same parameters as one
# that was left alone, to the last bit.
#
# This page explains what that takes, in the order in which a run meets it: data, loop,
# devices, checkpoints, command. As a script it is the command itself:
#
# ```sh
# python notebooks/training.py --help
# ```
#
# In a notebook its cells can be run one by one. Everything about S4D comes from the
# article, `annotated_s4d.py`, which stands in the folder above.

# %%
import argparse
import contextlib
import ctypes
import errno
import filecmp
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

# %% [markdown]
# The folder above is put on the path. A notebook does not say where it stands, so the
# one above the folder of the moment is tried, too.

# %%
HERE = Path(globals().get("__file__", "notebooks/training.py")).absolute().parent
sys.path[:0] = [str(HERE.parent), str(Path.cwd().parent)]
if importlib.util.find_spec("annotated_s4d") is None:
    sys.exit("annotated_s4d.py is missing; allowed: in the folder above this file's")

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from flax import nnx
from jax.experimental import multihost_utils

from annotated_s4d import (
    INITS,
    batches,
    call,
    canvas,
    convolve_rows,
    digit_model,
    divided,
    evaluate,
    load_digits,
    make_optimizer,
    mesh,
    nudged,
    packed,
    placed,
    progress,
    require,
    save_parameters,
    show,
    steps_to_take,
    train_step,
    write_whole,
)

NOTEBOOK = "ipykernel" in sys.modules
RUN = __name__ == "__main__" and NOTEBOOK  # cells that work are for a notebook
COMMAND = __name__ == "__main__" and not NOTEBOOK

# %% [markdown]
# Work on large arrays uses and frees much memory, and the C library gives freed memory
# back to the system, to fetch it again, filled with zeros, a moment later. Where that
# library is glibc the command asks it to keep what it has, before JAX starts.

# %%
def keep_memory():
    """Let glibc keep freed memory for the next step. Does nothing elsewhere."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        # one arena, no array mapped apart, never trim, grow by 256 MB
        for option, value in ((-8, 1), (-4, 0), (-1, -1), (-2, 2**28)):
            library.mallopt(option, value)


# %% [markdown]
# ## Larger digits
#
# Beside the digits of the article's Part 11 the command knows MNIST: 70,000 digits of
# 28 by 28 pixels, so that a sequence has 784 samples. It comes as four files in a
# format named IDX: a header with the number of axes and their lengths, then the bytes.
# Files break on their way, so each is looked at as a whole before it is used.

# %%
def read_idx(folder, name, axes):
    """Read a file of bytes in the format IDX, gzipped or plain, with so many axes.

    Raises ValueError, which names the file, if it is missing or damaged.
    """
    places = [Path(folder) / f"{name}-ubyte{end}" for end in (".gz", "")]
    path = next((place for place in places if place.exists()), None)
    cure = "copy it there anew, or leave out --data-dir to have it fetched"
    require(path, f"{places[0]} is missing", cure)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        shape = np.frombuffer(raw, ">u4", axes, 4)
        array = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): {cure}") from None
    require(raw[:4] == bytes([0, 0, 8, axes]), f"{path} is no IDX file", cure)
    return array


# %% [markdown]
# A user may have the files. Else they are fetched once, into a folder for such things,
# by [Pooch](https://www.fatiando.org/pooch), which compares each with its *checksum*, a
# number computed from all its bytes.

# %%
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_SHA256 = """
train-images-idx3 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
"""


# %% [markdown]
# Whatever goes wrong there, the user is told which file it is and what to do.

# %%
def fetch_mnist(url=MNIST_URL, cache=None):
    """Fetch the files of MNIST that are not in the cache yet. Returns the folder."""
    import pooch

    sums = dict(line.split() for line in MNIST_SHA256.strip().splitlines())
    sums = {f"{name}-ubyte.gz": value for name, value in sums.items()}
    store = pooch.create(cache or pooch.os_cache("annotated_s4d"), url, registry=sums)
    for name in sums:
        try:
            store.fetch(name, progressbar=True)
        except (OSError, ValueError) as error:  # no network; another checksum
            broken = isinstance(error, ValueError)
            reason = "has a wrong checksum" if broken else "cannot be fetched"
            cure = "try again later, or get MNIST's four files and give --data-dir"
            raise OSError(f"{url}{name} {reason} ({error}): {cure}") from None
    return store.path


# %% [markdown]
# As before, a part of the training images is set aside to make choices: the last tenth.

# %%
def load_mnist(folder=None):
    """Return train, validation and test: pairs of images (n, L, 1) and labels (n,).

    Raises ValueError for files that are damaged, OSError if they cannot be fetched.
    """
    folder, sets = Path(folder or fetch_mnist()), []
    for name in ("train", "t10k"):
        images = read_idx(folder, f"{name}-images-idx3", 3)
        labels = read_idx(folder, f"{name}-labels-idx1", 1)
        most = labels.max(initial=0)
        given = f"images of shape {images.shape}, {len(labels)} labels up to {most}"
        fits = len(images) == len(labels) > 9 and most < 10
        fits = fits and images.shape[1] == images.shape[2] > 1
        allowed = "10 or more square images, each with a label from 0 to 9"
        require(fits, f"{folder}/{name}-*: {given}", allowed)
        u = images.reshape(len(images), -1, 1) / np.float32(127.5) - 1
        sets.append((u, labels.astype(np.int32)))
    (u, labels), test = sets
    require(u.shape[1] == test[0].shape[1], "test images of another size", "one size")
    n = len(u) - len(u) // 10
    return [(u[:n], labels[:n]), (u[n:], labels[n:]), test]


# %% [markdown]
# ## Digits on rubber
#
# The ten thousand images of the article's Part 13 are not many, and a nudge by one
# pixel of 28 makes few new ones. Hands differ in more: in slant, in width, in how far a
# loop is closed. Let us print each image on rubber and pull. Every point moves by a
# field of displacements that varies slowly over the image, and a slow field is a sum of
# few slow waves,
#
# $$
# d(x, y) = \sum_{p, q = 0}^{3} a_{pq} \cos(\pi p x) \cos(\pi q y) , \qquad
# 0 < x, y < 1 ,
# $$
#
# with random $a_{pq}$, one sum for each of the two directions. The wave that is
# constant moves the whole image, those with half a period turn it, slant it and
# stretch it, the faster ones bend it. (Simard, Steinkraus and Platt, 2003, who call it
# *elastic distortion*, smooth random noise instead.)

# %%
def pulled(images, rng, strength=0.02):
    """Distort square images (n, L, 1) smoothly, each its own way; black comes in.

    strength is the standard deviation of each wave's weight, in sides of the image.
    After Simard, Steinkraus and Platt (2003), section 2.
    """
    n, side = len(images), math.isqrt(images.shape[1])
    waves = np.cos(np.pi * np.outer((np.arange(side) + 0.5) / side, np.arange(4)))
    weights = rng.normal(0, strength * side, (2, n, 4, 4))
    fields = waves @ weights @ waves.T  # (2, n, side, side), in pixels
    rows, columns = np.indices((side, side))[:, None] + fields
    which = np.broadcast_to(np.arange(n)[:, None, None], rows.shape)
    stack, places = images.reshape(n, side, side), [which, rows, columns]
    moved = scipy.ndimage.map_coordinates(stack, places, order=1, cval=-1)
    return moved.reshape(images.shape)


# %% [markdown]
# A digit of the article's Part 11, enlarged, and what seven pulls make of it. At twice
# the strength, would you still read a six?

# %%
def digits_on_rubber(strength=0.02):
    """A digit (upper left), and what seven random pulls have made of it."""
    digit = np.pad(load_digits()[0][0][0].reshape(8, 8), 1, constant_values=-1)
    digit = scipy.ndimage.zoom(digit, 4, order=1)
    copies = np.tile(digit.reshape(1, -1, 1), (7, 1, 1))
    copies = pulled(copies, np.random.default_rng(0), strength)
    fig, axes = canvas(2, 4, 3.6)
    for ax, image in zip(axes.flat, [digit, *copies]):
        ax.imshow(image.reshape(40, 40), vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
    return fig


if RUN:
    show(digits_on_rubber)


# %% [markdown]
# ## A loop that can be looked at
#
# What a training consists of, besides its data, are the model, the optimizer, and the
# place in the data. They stand together in an object, so that one can look at it after
# any step. `spread` puts a batch where it will be used and `ask` fetches the scores;
# here they change nothing.

# %%
class TrainingRun:
    """A training that can be looked at after each step. Arguments as `train`; with
    whole=False the last batch may be smaller, else what fills no batch is left out."""

    spread, ask = staticmethod(lambda *batch: batch), staticmethod(call)

    def __init__(self, model, data, validation, *, epochs=40, batch_size=32, seed=0,
                 augment=None, whole=True, **rates):
        sizes = epochs, batch_size, whole
        self.steps = steps_to_take(model, data, validation, *sizes)
        self.model, self.validation, self.epochs = model, validation, epochs
        self.optimizer = make_optimizer(model, self.steps, **rates)
        self.rng = np.random.default_rng(seed)
        self.losses, self.history = [], []
        options = dict(seed=self.rng, augment=augment, whole=whole)
        self.feed = functools.partial(batches, data, epochs, batch_size, **options)


# %% [markdown]
# The loop is that of the article, Part 11, but it begins at any place and comes back
# after each step.

# %%
def run_training(run, place=None):
    """Take the steps that are left from a place. Yields True where an epoch ends.

    Raises FloatingPointError for a loss that is not finite.
    """
    run.model.train()
    update = nnx.cached_partial(train_step, run.model, run.optimizer)  # looked at once
    steps, epochs, losses = run.steps, run.epochs, run.losses
    with progress(steps, len(losses)) as move:
        for batch in run.feed(place=place):
            loss, step = float(update(*run.spread(*batch))), len(losses) + 1
            if not math.isfinite(loss):
                good = losses[-1] if losses else "none"
                raise FloatingPointError(f"loss {loss} at step {step}; before {good}")
            losses.append(loss)
            move(step, loss)
            ended = step * epochs // steps > len(run.history)
            if ended:
                recent = float(np.mean(losses[-steps // epochs :]))
                result = evaluate(run.model, run.validation, run.ask)
                run.history.append((step, recent, *result))
            yield ended


# %% [markdown]
# ## Several devices
#
# The article's Appendix C divides a batch among all devices of all processes, each with
# a copy of the model. A batch that does not divide is filled up with rows of zeros.
# They have weight 0 in the loss, so they change nothing. The last batch of all, which
# may be smaller, is treated in the same way, and so no image is left out.

# %%
class DeviceRun(TrainingRun):
    """A training on all devices of all processes, of which no row is left out."""

    def __init__(self, model, data, validation, batch_size, **options):
        options |= dict(batch_size=batch_size, whole=False)
        super().__init__(model, data, validation, **options)
        self.batch_size, self.seconds = batch_size, []
        for block in model.stack.blocks:
            block.ssm.convolve = convolve_rows
        put_arrays(self, state_arrays(self))  # a copy for each device

    def spread(self, u, labels):
        """A batch and its weights, divided among the devices."""
        parts = u, labels, np.ones(len(u), u.dtype)
        return [divided(part, self.batch_size) for part in parts]

    @staticmethod
    def ask(model, u):
        """The scores of all rows, in every process."""
        scores = call(model, divided(u))
        return multihost_utils.process_allgather(scores, tiled=True)[: len(u)]


# %% [markdown]
# ## What a checkpoint holds
#
# A run that is broken off and resumed should end with the same parameters as one that
# was left alone, to the last bit. Parameters alone do not suffice for that. Adam
# remembers past gradients. The dropout masks come from a random stream that has moved
# on. So does the stream that shuffles and nudges, and some images have been seen in
# this epoch and others have not. A checkpoint holds all of it. The arrays of model and
# optimizer, the random streams of dropout among them, are taken by name:

# %%
def key_form(array):
    """The form of random keys, which are not numbers by themselves; None of numbers."""
    keys = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(array) if keys else None


def state_arrays(run):
    """All arrays of model and optimizer by name, in NumPy."""
    state, named = nnx.state((run.model, run.optimizer)), {}
    for path, array in jax.tree.leaves_with_path(state):
        numbers = jax.random.key_data(array) if key_form(array) else array
        named[jax.tree_util.keystr(path, simple=True, separator=".")] = numbers
    return {name: np.asarray(numbers) for name, numbers in named.items()}


# %% [markdown]
# And put back by name, whatever number of devices there now is:

# %%
def put_arrays(run, arrays):
    """Put arrays by name into model and optimizer, a copy on each device."""

    def put(path, array):
        value = placed(arrays[jax.tree_util.keystr(path, simple=True, separator=".")])
        form = key_form(array)
        return jax.random.wrap_key_data(value, impl=form) if form else value

    parts = run.model, run.optimizer
    nnx.update(parts, jax.tree.map_with_path(put, nnx.state(parts)))


# %% [markdown]
# The rest is the *place*: the state of the generator that shuffles and nudges, and the
# history. A checksum over everything will tell whether what is read is what was
# written.

# %%
def checksum(arrays, place=None):
    """A SHA-256 sum of named arrays and of a place."""
    total = hashlib.sha256(json.dumps(place, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


# %% [markdown]
# So this is a checkpoint before it is written, and the way back from one:

# %%
def snapshot(run, config):
    """What a checkpoint holds: arrays by name, and the place as plain values."""
    arrays = state_arrays(run) | {"losses": np.array(run.losses)}
    place = dict(config=config, rng=run.rng.bit_generator.state,
                 history=run.history, seconds=run.seconds)
    place = json.loads(json.dumps(place))
    return arrays, place | {"checksum": checksum(arrays, place)}


def go_on(run, arrays, place):
    """Bring a run to where a snapshot was taken. Returns its place in the data."""
    put_arrays(run, arrays)
    run.losses[:], run.seconds[:] = arrays["losses"].tolist(), place["seconds"]
    run.history[:] = map(tuple, place["history"])
    return len(run.losses), place["rng"]


# %% [markdown]
# ## Whose it is
#
# The same bits come only from the same settings and images, and also from the same
# versions of the libraries, precision, devices, and even cores, for a sum that is
# divided in another way is rounded in another way. All of it stands in the checkpoint.
# First what the settings do not say:

# %%
LIBRARIES = "jax jaxlib flax optax numpy scipy".split()
MODES = """enable_x64 default_matmul_precision disable_most_optimizations
    default_prng_impl threefry_partitionable""".split()  # of JAX


def machine():
    """The processor of this process, its make and its cores."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    make = re.search(r"model name\s*: (.*)", text)
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    return f"{len(cores)} cores of {make[1] if make else platform.processor()}"


def surroundings():
    """What has a say in the last digits beside settings and data, as plain values."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    modes = {name: str(jax.config.values[f"jax_{name}"]) for name in MODES}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    devices = f"{jax.device_count()} of {jax.devices()[0].device_kind}"
    return versions | modes | {
        "devices": devices, "machines": from_all(machine()),
        "XLA_FLAGS": " ".join(flag for flag in flags if "device_count" not in flag)}


# %% [markdown]
# Several processes are one run, so what each of them has been told must be the same.
# They tell each other, in texts of JSON, which travel as arrays of one length.

# %%
def from_all(value):
    """The plain value that each process has, in a list, in every process."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    padded = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
    texts = multihost_utils.process_allgather(padded).reshape(-1, longest)
    return [json.loads(bytes(text)) for text in texts]


def differences(theirs, ours):
    """Say in which named values two differ; "" if in none."""
    return "; ".join(
        f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name))


def require_same(**ours):
    """Refuse named values that another process has otherwise."""
    for i, theirs in enumerate(from_all(ours)):
        odd = f"process {i} is of another run: {differences(theirs, ours)}"
        require(theirs == ours, odd, "the same settings, data and folder for all")


# %% [markdown]
# ## Writing and reading it
#
# A checkpoint is one file, written all or nothing, as the article's weights. Its name
# is the step and a sign of the run, eight digits that all these settings give. So runs
# in one folder cannot touch each other's: what bears another sign, or no such name at
# all, is somebody else's, and it is neither written over nor deleted. Of its own the
# run keeps the last three.

# %%
def sign(config):
    """Eight digits that stand for a run."""
    return checksum({}, config)[:8]


def checkpoints(folder):
    """All checkpoints in a folder, of whatever run: (step, file), last steps first."""
    files = Path(folder).glob("*-*.npz") if Path(folder).is_dir() else ()
    ours = [file for file in files if re.fullmatch(r"\d+-[0-9a-f]{8}", file.stem)]
    return sorted(((int(file.stem[:-9]), file) for file in ours), reverse=True)


def save(folder, run, config):
    """Write a checkpoint of a run, from the first process, and keep the last three."""
    if jax.process_index() > 0:
        return
    arrays, place = snapshot(run, config)
    arrays["place"] = np.frombuffer(json.dumps(place).encode(), np.uint8)
    step, ours = len(run.losses), f"-{sign(config)}.npz"
    write_whole(Path(folder) / f"{step}{ours}", packed(np.savez, **arrays))
    past = [file for at, file in checkpoints(folder) if at <= step]
    for file in [file for file in past if file.name.endswith(ours)][3:]:
        file.unlink()


def load(file):
    """Read a checkpoint: arrays by name, and the place."""
    with np.load(file) as saved:
        arrays = dict(saved)
    return arrays, json.loads(bytes(arrays.pop("place")))


# %% [markdown]
# Let us see it: a small run is broken off after 15 steps, and another one, made anew,
# goes on from the file.

# %%
def small_run():
    """A training of 40 steps, on 320 of the digits."""
    data, validation, _ = load_digits()
    part = [array[:320] for array in data]
    return DeviceRun(digit_model(0, 8, 8, 1), part, validation, 32, epochs=4)


def take(run, steps, place=None):
    """Take so many steps of a run."""
    for _ in itertools.islice(run_training(run, place), steps):
        pass


if RUN:
    alone, broken, resumed = small_run(), small_run(), small_run()
    take(alone, 40)
    take(broken, 15)
    with tempfile.TemporaryDirectory() as folder:
        save(folder, broken, {})
        ((step, file),) = checkpoints(folder)
        place = go_on(resumed, *load(file))
    take(resumed, 25, place)
    pairs = zip(state_arrays(alone).values(), state_arrays(resumed).values())
    same = all((a == b).all() for a, b in pairs) and alone.losses == resumed.losses
    print(f"broken off after step {step} and resumed, the same to the last bit: {same}")


# %% [markdown]
# A disk can spoil what was written well, and a user can name the wrong folder. So a
# checkpoint is refused, with the reason, if it is damaged or belongs to another run:

# %%
def refusal(arrays, place, run, config):
    """Say why a checkpoint cannot be used for a run; "" if it can."""
    rest = {name: value for name, value in place.items() if name != "checksum"}
    if checksum(arrays, rest) != place.get("checksum"):
        return "its checksum is wrong"
    odd = differences(place["config"], config)
    if not odd and arrays.keys() - {"losses"} != state_arrays(run).keys():
        odd = "its arrays are those of another model"
    return odd and f"it is of another run: {odd}"


# %% [markdown]
# Then the one before it is looked at.

# %%
def last_good(folder, run, config):
    """Return the last checkpoint that can be used, or None; why not, for later ones."""
    refused = {}
    for _, file in checkpoints(folder):
        try:
            saved = load(file)
            reason = refusal(*saved, run, config)
        except OSError as error:
            reason = f"it cannot be read ({error.strerror})"
        except Exception as error:  # whatever a damaged file makes a reader say
            reason = f"it is damaged ({type(error).__name__})"
        if not reason:
            return saved, refused
        refused[file] = reason
    return None, refused


# %% [markdown]
# What was refused and bears the sign of this run would be written over when the run
# comes by again. It is given another name when a good one is found, and not deleted:
# who knows what it is. Of several processes the first does it, when all have read.

# %%
def resume(folder, run, config, say):
    """Go on from the last good checkpoint. Returns the place in the data, or None."""
    (saved, refused), folder = last_good(folder, run, config), Path(folder)
    for file, reason in refused.items():
        say(f"checkpoint {file} is refused: {reason}")
    require_same(step=len(saved[0]["losses"]) if saved else "none to go on from")
    why = "".join(f" ({file.name}: {why})" for file, why in list(refused.items())[:1])
    cure = "the folder and the settings of one run, or a new folder"
    require(saved or not refused, f"no checkpoint in {folder} can be used{why}", cure)
    if not saved:
        return say(f"no checkpoint in {folder} yet: starting at the beginning")
    for file in refused if jax.process_index() == 0 else ():
        if file.stem.endswith(sign(config)):
            file.rename(folder / f"refused-{file.stem}-{time.time_ns()}.npz")
    place = go_on(run, *saved)
    say(f"going on after step {len(run.losses):,} of {run.steps:,}")
    return place


# %% [markdown]
# A folder that nobody can write to, or that one of the processes does not see, should
# be noticed before the first step and not after the first epoch. The first process puts
# a file there, whose name is the time, and all look for it.

# %%
def prepare_folder(folder):
    """Make a folder; raise unless it can be written to and all processes see it."""
    now = from_all(time.time_ns())[0]
    trial, first = folder / f".{now}.part", jax.process_index() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(trial, b"")
    from_all("it is written")
    seen = from_all(trial.exists())
    if first:
        trial.unlink()
    blind = seen.index(min(seen))
    given = f"process {blind} does not see what process 0 has put into {folder}"
    require(all(seen), given, "one folder that all processes see")


# %% [markdown]
# ## Stopping
#
# Ctrl-C may come in the middle of a step, when half of the parameters are new. So the
# signal is only noted, and the loop looks at the note after each step. A second one
# breaks off at once. Several processes must stop after the same step, else the others
# would wait for the one that has left. They ask each other when an epoch ends.

# %%
@contextlib.contextmanager
def stop_noted():
    """Collect signals to stop in a list, the first of each; the next one acts."""
    notes, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, _):
        notes.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield notes
    finally:
        for number in numbers:
            signal.signal(number, before[number])


# %%
def stop_agreed(notes, ended):
    """Whether to stop after this step. Every process gives the same answer."""
    if jax.process_count() == 1:
        return bool(notes)
    asked = np.array(bool(notes))
    return ended and bool(multihost_utils.process_allgather(asked).any())


# %% [markdown]
# ## The command
#
# Whoever mistypes a number should hear of it before any data is read. So each setting
# has a range.

# %%
SETTINGS = {  # flag: type, default, least, most, what it is
    "d-model": (int, 64, 1, 4096, "channels of the model"),
    "d-state": (int, 64, 2, 4096, "size of each channel's state, even"),
    "n-layers": (int, 3, 1, 100, "blocks"),
    "expand": (int, 2, 0, 64, "width of the FFN in channels' widths; 0: no FFN"),
    "epochs": (int, None, 1, 10**5, "passes through the images; 40, or 10 for mnist"),
    "batch-size": (int, 32, 1, 10**5, "images in a batch"),
    "lr": (float, 4e-3, 0, 1, "learning rate"),
    "ssm-lr": (float, 1e-3, 0, 1, "learning rate of A, B and dt"),
    "weight-decay": (float, 0.05, 0, 1, "weight decay, not of A, B and dt"),
    "dropout": (float, 0.1, 0, 0.99, "share of the numbers set to zero"),
    "seed": (int, 0, 0, 2**32 - 1, "of parameters, order, augmentation and dropout"),
}
AUGMENTS = {"none": None, "nudge": nudged, "pull": pulled}


# %% [markdown]
# `argparse` reads the numbers through this:

# %%
def within(kind, low, high, step=1):
    """Return a reader for argparse of the numbers in a range."""
    what = {int: "whole numbers", float: "numbers"}[kind] + ", even" * (step == 2)

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (kind is int and value % step):
            allowed = f"{what}, from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
        return value

    return read


# %% [markdown]
# And the paths through this. A shell does not expand the `~` of `--metrics=~/a`, and an
# address such as `gs://bucket/run` would become a folder here.

# %%
def local_path(text):
    """Read a path for argparse: that of something on this machine, absolute."""
    allowed = "the path of something on this machine, in UTF-8"
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text)
    if not text or scheme or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {allowed}")
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


# %% [markdown]
# Several processes have to know where they meet, how many they are, and which of them
# each one is. That may also stand in the environment, which is handy for starting many.

# %%
def add_process_flags(add):
    """Add the flags of several processes, whose defaults are in the environment."""
    env, whole = os.environ.get, functools.partial(within, int)
    add("--coordinator", metavar="HOST:PORT", default=env("JAX_COORDINATOR_ADDRESS"),
        help="where several processes meet (JAX_COORDINATOR_ADDRESS)")
    add("--num-processes", metavar="N", type=whole(1, 10**5),
        default=env("JAX_NUM_PROCESSES"), help="how many they are (JAX_NUM_PROCESSES)")
    add("--process-id", metavar="N", type=whole(0, 10**5),
        default=env("JAX_PROCESS_ID"), help="which one this is (JAX_PROCESS_ID)")
    add("--patience", metavar="SECONDS", type=whole(1, 10**5), default=300,
        help="how long they wait for each other at the start (300)")


# %% [markdown]
# These and all other flags:

# %%
def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "training.py", usage="%(prog)s [--help] [settings]", description=(
            "Train a classifier of handwritten digits that reads them pixel by pixel."))
    add = parser.add_argument
    add("--dataset", choices=("digits", "mnist"), default="digits", help="(digits)")
    path = dict(type=local_path, metavar="FOLDER")
    add("--data-dir", **path, help="MNIST's four files, else fetched")
    for flag, (kind, default, *ends, what) in SETTINGS.items():
        read = within(kind, *ends, step=2 if flag == "d-state" else 1)
        value = "" if default is None else f" ({default})"
        add(f"--{flag}", type=read, default=default, metavar="N", help=what + value)
    add("--augment", choices=AUGMENTS, help="change of images (nudge; mnist: pull)")
    add("--init", choices=INITS, default="legs", help="start of A, see Part 7 (legs)")
    add("--checkpoint-dir", **path, help="for checkpoints, one each epoch")
    add("--resume", action="store_true", help="go on from the last good checkpoint")
    path["metavar"] = "FILE"
    add("--metrics", **path, help="file for a line of JSON for each epoch")
    add_process_flags(add)
    return parser


# %% [markdown]
# Some flags depend on each other or on what is on the disk. Nothing is ever written
# over the results of another run.

# %%
def complaints(o):
    """Yield a sentence for whatever is wrong with options, and whether it is."""
    data, saved, metrics = o.data_dir, o.checkpoint_dir, o.metrics
    yield "--data-dir is for --dataset mnist", data and o.dataset != "mnist"
    yield f"--data-dir {data} is no folder", data and not data.is_dir()
    yield "--resume needs --checkpoint-dir", o.resume and not saved
    yield f"--checkpoint-dir {saved} is a file", saved and saved.is_file()
    full = saved and saved.is_dir() and any(saved.iterdir())
    yield (f"--checkpoint-dir {saved} is not empty; allowed: a new folder, or --resume "
           "to go on with the run in this one"), full and not o.resume
    there = metrics and metrics.parent.is_dir()
    yield f"--metrics {metrics}: there is no such folder", metrics and not there
    taken = metrics and metrics.exists() and not (o.resume and metrics.is_file())
    yield f"--metrics {metrics} exists; allowed: a new file, or --resume", taken
    missing = [o.coordinator, o.num_processes, o.process_id].count(None)
    apart = 0 < missing < 3
    yield "--coordinator, --num-processes and --process-id belong together", apart
    last = (o.num_processes or 1) - 1
    over = (o.process_id or 0) > last
    yield f"--process-id is {o.process_id}; allowed: 0 to {last}", over
    reason = o.coordinator and unfit(o.coordinator, o.process_id == 0)
    yield f"--coordinator {o.coordinator}: {reason}", reason


# %% [markdown]
# Where processes meet, the first of them listens. So its port must be free.

# %%
def unfit(address, listen):
    """Say why processes cannot meet at HOST:PORT, or why this one cannot listen; ""."""
    host, colon, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        return "allowed: HOST:PORT, with a port from 1 to 65535"
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
        if listen:
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            socket.create_server(
                ("", int(port)), family=family, dualstack_ipv6=both).close()
    except socket.gaierror as error:
        return f"this host is not known ({error.strerror})"
    except OSError as error:
        return f"port {port} cannot be used here ({os.strerror(error.errno)})"
    return ""


# %% [markdown]
# The command to go on with must work from any folder, so it names all that is set, in
# full.

# %%
def read_options(arguments):
    """Read a command line, or leave with a sentence about what is wrong with it."""
    parser = make_parser()
    o = parser.parse_args(arguments)
    for name, value in vars(o).items():
        if value == []:  # what older versions of argparse make of --seed=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    for sentence, wrong in complaints(o):
        if wrong:
            parser.error(sentence)
    given = {name: value for name, value in vars(o).items()
             if value != parser.get_default(name) and name != "resume"}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    script = str(Path(__file__).absolute())
    o.again = shlex.join([sys.executable, script, *words, "--resume"])
    epochs, augment = {"digits": (40, "nudge"), "mnist": (10, "pull")}[o.dataset]
    o.epochs, o.augment = o.epochs or epochs, o.augment or augment
    return o


# %% [markdown]
# A command line becomes a run. All settings that have a say in the result, a checksum
# of the images, and the surroundings stand in `config`, by which a checkpoint is
# recognized.

# %%
def make_run(o):
    """Return the run of these options, its config and the test data."""
    sets = load_digits() if o.dataset == "digits" else load_mnist(o.data_dir)
    n = len(sets[0][0])
    require(o.batch_size <= n, f"--batch-size is {o.batch_size}", f"1 to {n} images")
    flags = "dataset", "augment", "init", *SETTINGS
    names = [flag.replace("-", "_") for flag in flags]
    config = {name: getattr(o, name) for name in names}
    config["images"] = checksum({f"{i}": part for i, part in enumerate(sum(sets, ()))})
    config |= surroundings()
    require_same(**config, checkpoints=bool(o.checkpoint_dir), resume=o.resume)
    sizes = o.d_model, o.d_state, o.n_layers
    options = dict(dropout=o.dropout, init=o.init, expand=o.expand)
    model = digit_model(o.seed, *sizes, **options)
    rates = dict(lr=o.lr, ssm_lr=o.ssm_lr, weight_decay=o.weight_decay)
    settings = dict(epochs=o.epochs, seed=o.seed, augment=AUGMENTS[o.augment], **rates)
    return DeviceRun(model, *sets[:2], o.batch_size, **settings), config, sets[2]


# %% [markdown]
# After each epoch a line says how it went.

# %%
def report(run, say):
    """Say how the last epoch went, and how long the rest will take at its rate."""
    rows = [(0, 0), *zip(run.history, run.seconds)]
    (step, loss, validation, accuracy), seconds = rows[-1]
    before, then = rows[-2][0] and rows[-2][0][0], rows[-2][1]
    rate = (step - before) / (seconds - then)
    say(f"epoch {len(rows) - 1} of {run.epochs}   step {step:,}   loss {loss:.3f}   "
        f"validation {validation:.3f}, {accuracy:.2%}   {rate:.1f} steps/s   "
        f"{(run.steps - step) / rate:,.0f} s left")


# %% [markdown]
# The metrics are written as a whole, the epochs before a break included, all or
# nothing. So they are always complete, and without repetition. A file that is there
# already must be of this run: it begins with lines that we would write, too.

# %%
METRICS = "epoch step loss validation_loss validation_accuracy seconds".split()


def metric_lines(run):
    """A line of JSON for each epoch."""
    epochs = enumerate(zip(run.history, run.seconds), 1)
    rows = [(i, *row, seconds) for i, (row, seconds) in epochs]
    return [json.dumps(dict(zip(METRICS, row))) for row in rows]


def write_metrics(run, file):
    """Write the lines to a file, if there is one, and any line to write."""
    lines = "".join(f"{line}\n" for line in metric_lines(run))
    if file and lines and jax.process_index() == 0:
        write_whole(file, lines.encode())


def require_own_metrics(run, file):
    """Refuse a file of metrics that this run has not written, or cannot write."""
    trial = file.with_name(f".{time.time_ns()}.part")
    write_whole(trial, b"")
    trial.unlink()
    ours = metric_lines(run)
    theirs = file.read_text(errors="replace").splitlines() if file.exists() else ours
    more = [f'{{"epoch": {i}, ' for i in range(len(ours) + 1, len(theirs) + 1)]
    own = all(line.startswith(start) for line, start in zip(theirs, ours + more))
    fits = not file.exists() or (own and ours and theirs)
    require(fits, f"--metrics {file} is not of this run", "a new file, or its own")


# %% [markdown]
# Around the loop comes what an epoch's end asks for: a checkpoint, a report.
# The checkpoint is first, so that the metrics never know more than it.

# %%
def take_steps(run, config, place, o, say):
    """Take the steps that are left, but stop at a signal. Returns whether it came."""
    start = time.time() - (run.seconds[-1] if run.seconds else 0)
    with stop_noted() as notes:
        for ended in run_training(run, place):
            stop = stop_agreed(notes, ended)
            if ended:
                run.seconds.append(time.time() - start)
            if o.checkpoint_dir and (ended or stop):
                save(o.checkpoint_dir, run, config)
            if ended:
                report(run, say)
                write_metrics(run, o.metrics)
            if stop:
                return True
    return False


# %% [markdown]
# At the end the parameters go into `model.npz`, beside the checkpoints. If there is one
# of somebody else, they keep the name that only this run gives.

# %%
def leave_model(folder, run, config, say):
    """Write model.npz into the folder, or a file with the sign of the run."""
    own, usual = folder / f"model-{sign(config)}.npz", folder / "model.npz"
    save_parameters(own, run.model, run.history)
    if usual.exists() and not filecmp.cmp(own, usual, shallow=False):
        return say(f"{usual} is of another run and stays; this run's is {own}")
    own.replace(usual)


# %% [markdown]
# And the command itself: prepare, go on if there is something to go on with, take the
# steps, test.

# %%
def train_command(o):
    """Train as the options say. Returns an exit status."""
    first, count = jax.process_index() == 0, jax.process_count()
    say = functools.partial(print, flush=True) if first else lambda *_: None
    run, config, test = make_run(o)
    say(f"{run.steps:,} steps on {mesh().size} devices in {count} processes")
    if o.checkpoint_dir:
        prepare_folder(o.checkpoint_dir)
    place = resume(o.checkpoint_dir, run, config, say) if o.resume else None
    if o.metrics and first:
        require_own_metrics(run, o.metrics)
    write_metrics(run, o.metrics)  # those of a run that had no time to
    if take_steps(run, config, place, o, say):
        after = f"go on with: {o.again}" if o.checkpoint_dir else "nothing is saved"
        say(f"stopped after step {len(run.losses):,}; {after}")
        return 130
    loss, accuracy = evaluate(run.model, test, run.ask)
    say(f"test: loss {loss:.3f}, accuracy {accuracy:.2%}")
    if o.checkpoint_dir and first:
        leave_model(o.checkpoint_dir, run, config, say)
    return 0


# %% [markdown]
# What goes wrong on the way, a missing file, a full disk, a rate so large that the loss
# is lost, ends the command with one sentence that says what to do.

# %%
CURES = {
    "make room there, then go on with --resume": "ENOSPC EDQUOT EFBIG",
    "choose a place where you may read and write": "EACCES EPERM EROFS ENOENT",
    "choose a shorter name": "ENAMETOOLONG",
}
BROKEN_OFF = "broken off; what was saved stays"
LEFT = "what was saved stays; start all of them again, with --resume to go on"


def explained(error):
    """One sentence about what went wrong, and what to do."""
    said = f"{error}".strip().partition("\n")[0] or type(error).__name__
    if isinstance(error, FloatingPointError):
        return f"{said}: try a smaller --lr"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        return "there is not enough memory: try a smaller --batch-size, or model"
    if jax.process_count() > 1 and re.match("[A-Z_]+: ", said):  # so speaks the library
        return f"another process has gone: {LEFT}"
    if isinstance(error, OSError) and error.errno:
        place = error.filename or "the terminal"
        cures = [cure for cure, names in CURES.items()
                 if errno.errorcode.get(error.errno) in names.split()]
        return ": ".join([f"{place}", error.strerror, *cures])
    return said


def outcome(work):
    """What work() returns, or a sentence about what went wrong on the way."""
    try:
        return work()
    except (ArithmeticError, MemoryError, OSError, ValueError) as error:
        return explained(error)
    except jax.errors.JaxRuntimeError as error:
        return explained(error)
    except KeyboardInterrupt:
        return BROKEN_OFF


# %% [markdown]
# ## One of several
#
# When one of several processes dies, the others cannot go on, and JAX ends them where
# they stand, with a page of addresses. So a process that has partners does its work in
# a second one and only waits for it. If that one ends without having said how, a
# partner has gone. The second process in turn ends with the first, from which it reads
# and which never writes.

# %%
def work_as_partner(o, pipe):
    """Meet the other processes and train. Tells the pipe that they have met, then the
    exit status, or a sentence about what is wrong."""

    def tell(value):
        print(json.dumps(value), file=pipe, flush=True)

    def leave_alone():
        os.read(0, 1)  # returns when the process that waits has ended
        os._exit(1)

    threading.Thread(target=leave_alone, daemon=True).start()
    for name in ("stdout", "stderr"):  # what the libraries say goes nowhere
        number = getattr(sys, name).fileno()
        setattr(sys, name, open(os.dup(number), "w", errors="backslashreplace"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    jax.distributed.initialize(
        o.coordinator, o.num_processes, o.process_id, heartbeat_timeout_seconds=20,
        initialization_timeout=o.patience, shutdown_timeout_seconds=10)
    tell("met")
    result = outcome(lambda: train_command(o))
    sys.stdout.flush()
    tell(result)
    if result != BROKEN_OFF:
        with contextlib.suppress(Exception):  # of a partner that has gone
            jax.distributed.shutdown()  # waits until the others have said theirs, too
    os._exit(0)


# %% [markdown]
# The first process passes signals on. The second signal ends the work at once.

# %%
def wait_for_partner(o, arguments):
    """Let another process work. Returns its exit status, or a sentence."""
    here, there = os.pipe()
    words = [sys.executable, str(Path(__file__).absolute()), *arguments]
    work = subprocess.Popen(
        words, env=os.environ | {PARTNER: str(there)}, pass_fds=[there],
        stdin=subprocess.PIPE, process_group=0)
    os.close(there)
    told, signals = [], []

    def pass_on(number, _):
        signals.append(number)
        work.send_signal(number if told and len(signals) == 1 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    with open(here) as pipe:
        for line in pipe:
            told.append(json.loads(line))
    work.wait()
    if len(told) > 1:
        return told[1]
    if signals:
        return BROKEN_OFF
    if told:
        return f"another process has gone, or this one has failed: {LEFT}"
    return (f"{o.num_processes} processes did not meet at {o.coordinator} in "
            f"{o.patience} seconds; allowed: one for each --process-id, all with the "
            "same settings, or more --patience")


# %% [markdown]
# The last cell of this file calls the command.

# %%
PARTNER = "ANNOTATED_S4D_PARTNER"  # in the environment: where to tell how it goes


def command(arguments):
    """Run a command line. Returns an exit status, or a sentence about what is wrong."""

    def work():
        options, pipe = read_options(arguments), os.environ.pop(PARTNER, None)
        keep_memory()
        if options.coordinator and not pipe:
            return wait_for_partner(options, arguments)
        if pipe:
            return work_as_partner(options, open(int(pipe), "w"))
        return train_command(options)

    return outcome(work)


if COMMAND:
    sys.exit(command(sys.argv[1:]))
