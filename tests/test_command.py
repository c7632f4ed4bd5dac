"""The companion: the command line, its data, its checkpoints, several processes."""

import ast
import functools
import gzip
import http.server
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import numpy as np
import optax
import pytest
import scipy.ndimage
import training
from flax import nnx

import annotated_s4d as s4d

# 198 images to train, in batches of 12: an epoch is no whole number of batches, the
# last batch of all is half empty, eight devices divide neither. There is dropout.
SIZES = {"d-model": 4, "d-state": 4, "n-layers": 1, "epochs": 3, "batch-size": 12}
FIRST, SECOND, STEPS = 17, 34, 50  # the steps at which epochs end


def write_idx(path, array):
    """Write an IDX file as the format says, gzipped if its name says so."""
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder, train=220, test=22, side=6, end=".gz"):
    """Write four small files in the names and the format of MNIST."""
    folder.mkdir(exist_ok=True)
    rng, written = np.random.default_rng(0), []
    for name, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, side, side)).astype(np.uint8)
        labels = rng.integers(0, 10, n).astype(np.uint8)
        write_idx(folder / f"{name}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{end}", labels)
        written += [images, labels]
    return written


# -- options --------------------------------------------------------------------------


def refused(capsys, *arguments):
    """What the command says of arguments that it refuses, before it reads any data."""
    with pytest.raises(SystemExit) as left:
        training.command([str(argument) for argument in arguments])
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def no_data(monkeypatch):
    def touched(*_):
        raise AssertionError("data is touched")

    for name in ("load_digits", "load_mnist", "make_run"):
        monkeypatch.setattr(training, name, touched)


@pytest.mark.parametrize("flag", training.SETTINGS)
def test_numbers_out_of_range_are_refused_with_the_range(flag, capsys, no_data):
    kind, _, low, high, _ = training.SETTINGS[flag]
    for text in (low - 1, high + 1, "nan", "many", "inf"):
        said = refused(capsys, f"--{flag}={text}")
        assert f"--{flag}: '{text}'; allowed: " in said
        assert f"from {low} to {high}" in said
    if kind is int:
        assert "whole numbers" in refused(capsys, f"--{flag}=2.5")
    for text in (low, high):
        with pytest.raises(AssertionError, match="data is touched"):
            training.command([f"--{flag}={text}"])


def test_an_odd_state_is_refused(capsys, no_data):
    assert "even, from 2 to 4096" in refused(capsys, "--d-state=7")


def test_other_arguments_are_refused(capsys, no_data, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "16").mkdir()
    for arguments, sentence in {
        ("fly",): "unrecognized arguments: fly",
        ("--fly",): "unrecognized arguments: --fly",
        ("--dataset", "cats"): "invalid choice: 'cats'",
        ("--init", "hippo"): "invalid choice: 'hippo'",
        ("--augment", "flip"): "invalid choice: 'flip'",
        ("--data-dir", tmp_path): "--data-dir is for --dataset mnist",
        ("--dataset=mnist", "--data-dir", tmp_path / "no"): "no is no folder",
        ("--resume",): "--resume needs --checkpoint-dir",
        ("--checkpoint-dir", tmp_path / "file"): "file is a file",
        (
            "--checkpoint-dir",
            tmp_path / "full",
        ): "is not empty; allowed: a new",
        ("--metrics", tmp_path / "no" / "m"): "there is no such folder",
        ("--metrics", tmp_path / "file"): "exists; allowed: a new file",
        ("--coordinator", "localhost:1"): "belong together",
        ("--coordinator=localhost:1", "--num-processes=2", "--process-id=2"): (
            "--process-id is 2; allowed: 0 to 1"
        ),
        ("--num-processes=0",): "allowed: whole numbers, from 1",
    }.items():
        assert sentence in refused(capsys, *arguments)


def test_processes_from_the_environment(capsys, no_data, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    assert "belong together" in refused(capsys)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    assert "--process-id: 'two'; allowed" in refused(capsys)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    o = training.read_options([])
    assert (o.coordinator, o.num_processes, o.process_id) == ("localhost:1", 2, 1)


def test_what_goes_wrong_on_the_way_is_one_sentence(monkeypatch, capsys):
    for error, said in {
        FloatingPointError("loss nan at step 3; before 2.3"): "at step 3.*smaller --lr",
        OSError("no space left"): "no space left",
        KeyboardInterrupt(): "broken off",
    }.items():

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(training, "make_run", fail)
        assert re.search(said, training.command([]))


def test_more_than_the_images_in_a_batch_is_refused(tmp_path):
    write_mnist(tmp_path)
    arguments = ["--dataset=mnist", f"--data-dir={tmp_path}", "--batch-size=199"]
    said = training.command([*arguments])
    assert said == "--batch-size is 199; allowed: 1 to 198 images"


# -- data -----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_is_read_in_order(tmp_path, end):
    images, labels, test_images, test_labels = write_mnist(tmp_path, end=end)
    train, validation, test = training.load_mnist(tmp_path)
    assert [len(part[1]) for part in (train, validation, test)] == [198, 22, 22]
    ours = np.concatenate([train[0], validation[0]])
    assert ours.dtype == np.float32 and ours.shape == (220, 36, 1)
    assert (np.round(ours * 127.5 + 127.5) == images.reshape(220, 36, 1)).all()
    assert (np.concatenate([train[1], validation[1]]) == labels).all()
    assert ours.min() == -1 and ours.max() == 1
    assert (np.round(test[0] * 127.5 + 127.5) == test_images.reshape(22, 36, 1)).all()
    assert (test[1] == test_labels).all()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def flip_in_data(path):
    """Change a bit of the largest array. A .npz file has bytes that mean nothing."""
    raw = bytearray(path.read_bytes())
    with np.load(path) as saved:
        largest = max(saved.values(), key=lambda array: array.nbytes).tobytes()
    raw[raw.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "end, spoil, said",
    [
        ("", Path.unlink, "train-images-idx3-ubyte.gz is missing"),
        ("", cut, "train-images-idx3-ubyte is cut off or damaged"),
        (".gz", cut, "train-images-idx3-ubyte.gz is cut off or damaged"),
        (".gz", flip, "train-images-idx3-ubyte.gz is cut off or damaged"),
        ("", lambda path: path.write_bytes(b""), "idx3-ubyte is cut off or damaged"),
        ("", lambda path: write_idx(path, np.zeros((9, 4), "u1")), "idx3-ubyte is "),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, end, spoil, said):
    write_mnist(tmp_path, end=end)
    spoil(tmp_path / f"train-images-idx3-ubyte{end}")
    arguments = ["--dataset", "mnist", "--data-dir", str(tmp_path)]
    sentence = training.command(arguments)
    assert said in sentence and "\n" not in sentence
    assert str(tmp_path) in sentence and "leave out --data-dir" in sentence


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    _, labels, *_ = write_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    for wrong in (labels[1:], labels + np.uint8(1)):
        write_idx(path, wrong)
        with pytest.raises(ValueError, match="each with a label from 0 to 9"):
            training.load_mnist(tmp_path)
    write_idx(path, labels)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((22, 5, 5), np.uint8))
    with pytest.raises(ValueError, match="test images of another size"):
        training.load_mnist(tmp_path)


@pytest.fixture
def server(tmp_path):
    """The address of a server of the files in a folder, and that folder."""
    files = tmp_path / "served"
    write_mnist(files)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {})
    quiet.log_message = lambda *_: None
    handler = functools.partial(quiet, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/", files, served
        served.shutdown()


def test_mnist_is_fetched_once(server, tmp_path, monkeypatch):
    import hashlib

    url, files, served = server
    sums = [
        f"{path.name.removesuffix('-ubyte.gz')} "
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in files.iterdir()
    ]
    monkeypatch.setattr(training, "MNIST_SHA256", "\n".join(sums))
    folder = Path(training.fetch_mnist(url, tmp_path / "cache"))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in files.iterdir()
    }
    served.shutdown()
    shutil.rmtree(files)
    assert (
        Path(training.fetch_mnist(url, tmp_path / "cache")) == folder
    )  # no second time


def test_a_wrong_checksum_is_refused(server, tmp_path):
    url, *_ = server
    with pytest.raises(OSError, match="idx3-ubyte.gz has a wrong checksum.*--data-dir"):
        training.fetch_mnist(url, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gz"))


def test_no_network_is_one_sentence(tmp_path):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        with pytest.raises(OSError, match="cannot be fetched.*--data-dir") as error:
            training.fetch_mnist(url, tmp_path)
    assert "train-images-idx3-ubyte.gz" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_checksums_are_of_the_four_files():
    names, sums = zip(*map(str.split, training.MNIST_SHA256.strip().splitlines()))
    kinds = ("images-idx3", "labels-idx1")
    assert names == tuple(f"{a}-{b}" for a in ("train", "t10k") for b in kinds)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in sums)


# -- the hook at the top of the file --------------------------------------------------


@pytest.mark.parametrize(
    "name, file, argv, run, command",
    [
        ("__main__", "here", ["here"], True, False),
        ("__main__", "here", ["here", "train"], False, ["train"]),
        ("__main__", "here", ["pytest", "tests"], True, False),
        ("__main__", None, ["ipykernel_launcher.py", "-f", "x.json"], True, False),
        ("__main__", None, [""], True, False),
        ("annotated_s4d", "here", ["here", "train"], False, False),
    ],
)
def test_who_runs_what(name, file, argv, run, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "streamlit", raising=False)
    text = Path(s4d.__file__).read_text(encoding="utf-8")
    hook = re.search(r"^import functools$.*?^(?=import jax$)", text, re.M | re.S)[0]
    names = {"__name__": name} | ({"__file__": file} if file else {})
    exec(hook, names)
    assert (names["RUN"], names["COMMAND"] or False) == (run, command)


def test_the_command_has_moved():
    """The article says where, in one sentence, and does nothing."""
    words = [sys.executable, "-B", s4d.__file__, "train", "--epochs", "1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    moved = "the command line has moved: python notebooks/training.py --help"
    assert done.stderr.splitlines() == [moved]


def test_a_companion_without_its_article(tmp_path):
    (tmp_path / "notebooks").mkdir()
    script = shutil.copy(training.__file__, tmp_path / "notebooks")
    words = [sys.executable, "-B", script, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("annotated_s4d.py is missing; allowed: in the folder above")


def test_the_article_knows_no_companion():
    tree = ast.parse(Path(s4d.__file__).read_text(encoding="utf-8"))
    names = {
        alias.name
        for n in ast.walk(tree)
        if isinstance(n, ast.Import)
        for alias in n.names
    }
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "training" not in names and "argparse" not in names


def test_a_notebook_runs_every_cell_of_the_companion(monkeypatch):
    """The cells that work, as a kernel would run them; small models are small."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    shown = []
    namespace = {"__name__": "__main__", "show": shown.append}
    for cell in jupytext.read(training.__file__).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), namespace)
            namespace["show"] = shown.append
    assert [draw.__name__ for draw in shown] == ["digits_on_rubber"]
    assert namespace["same"] and not namespace["COMMAND"]
    assert namespace["digits_on_rubber"]().axes


def test_every_function_of_the_companion_says_what_it_does():
    for node in ast.parse(Path(training.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name


def test_under_streamlit_arguments_are_not_a_command(monkeypatch, tmp_path):
    """The page is shown, or a sentence, and the file goes no further."""

    class Stopped(Exception):
        pass

    class Served:
        class runtime:  # noqa: N801
            exists = staticmethod(lambda: True)

        @staticmethod
        def error(sentence):
            assert sentence == "The page needs the whole repository."

        @staticmethod
        def stop():
            raise Stopped

    monkeypatch.setitem(sys.modules, "streamlit", Served)
    monkeypatch.setattr(sys, "argv", ["here", "train"])
    text = Path(s4d.__file__).read_text(encoding="utf-8")
    hook = re.search(r"^import functools$.*?^(?=import jax$)", text, re.M | re.S)[0]
    names = {"__name__": "__main__", "__file__": str(tmp_path / "here")}
    with pytest.raises(Stopped):
        exec(hook, names)
    assert "COMMAND" not in names


# -- runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, for all runs of this file."""
    folder = tmp_path_factory.mktemp("runs")
    write_mnist(folder / "images")
    return folder


def arguments(place, name, **changed):
    """A command line with small sizes, whose checkpoints and metrics bear a name."""
    sizes = [f"--{flag}={value}" for flag, value in (SIZES | changed).items()]
    data = ["--dataset=mnist", "--data-dir", str(place / "images")]
    saved = ["--checkpoint-dir", str(place / name)]
    return [*data, *sizes, *saved, "--metrics", str(place / f"{name}.jsonl")]


def start(place, words, devices=1, folder=None):
    """Start the command. What it has compiled is kept for the next one."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, training.__file__, *words],
        cwd=folder or place,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, status=0):
    """Wait for a process; return what it said."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out + err


@pytest.fixture(scope="module")
def runs(place):
    """One run left alone, one on eight devices, two processes, all at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = [*arguments(place, "two"), f"--coordinator=127.0.0.1:{port}"]
    two = [*two, "--num-processes=2", "--process-id"]
    alone = start(place, [*arguments(place, "alone")])
    eight = start(place, [*arguments(place, "eight")], devices=8)
    pair = [start(place, [*two, str(i)]) for i in (0, 1)]
    started = {"alone": alone, "eight": eight, "first": pair[0], "second": pair[1]}
    yield {name: finish(process) for name, process in started.items()}


def saved(folder):
    """The last checkpoint of a run: all arrays, the place in the data."""
    step, file = training.checkpoints(folder)[0]
    assert step == STEPS
    arrays, place = training.load(file)
    return arrays, {k: v for k, v in place.items() if k not in ("seconds", "checksum")}


def same(folder, other):
    """Whether two runs ended with the same bits: everything but the clock."""
    (ours, our_place), (theirs, their_place) = saved(folder), saved(other)
    assert ours.keys() == theirs.keys() and our_place == their_place
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert array.tobytes() == theirs[name].tobytes(), name


def rows(place, name):
    return [json.loads(x) for x in (place / f"{name}.jsonl").read_text().splitlines()]


def curve(place, name):
    keys = "loss", "validation_loss", "validation_accuracy"
    return np.array([[row[key] for key in keys] for row in rows(place, name)])


def test_the_command_trains_and_does_nothing_else(runs, place):
    said = runs["alone"].splitlines()
    assert said[0] == f"{STEPS} steps on 1 devices in 1 processes"
    assert re.match(
        rf"epoch 1 of 3   step {FIRST}   loss 2\.\d+   validation ", said[1]
    )
    assert re.search(r"\d steps/s   [\d,]+ s left$", said[1])
    assert said[4].startswith("test: loss ") and len(said) == 5
    steps, files = zip(*training.checkpoints(place / "alone"))
    assert steps == (STEPS, SECOND, FIRST)
    assert {*(place / "alone").iterdir()} == {*files, place / "alone" / "model.npz"}
    assert not (place / "assets").exists()


def test_metrics_are_a_line_of_json_for_each_epoch(runs, place):
    got = rows(place, "alone")
    assert [row["epoch"] for row in got] == [1, 2, 3]
    assert [row["step"] for row in got] == [FIRST, SECOND, STEPS]
    assert 0 < got[0]["seconds"] < got[1]["seconds"] < got[2]["seconds"]
    arrays, where = saved(place / "alone")
    history = [tuple(row[key] for key in training.METRICS[1:-1]) for row in got]
    assert history == [tuple(row) for row in where["history"]]
    assert len(arrays["losses"]) == STEPS
    assert got[2]["loss"] == pytest.approx(arrays["losses"][-17:].mean(), rel=1e-12)


def test_the_trained_model_can_be_used(runs, place):
    model = s4d.digit_model(5, 4, 4, 1)
    history = s4d.load_parameters(place / "alone" / "model.npz", model)
    assert history.tolist() == [list(row.values())[1:5] for row in rows(place, "alone")]
    loss, accuracy = s4d.evaluate(model, training.load_mnist(place / "images")[2])
    said = re.search(r"test: loss ([\d.]+), accuracy ([\d.]+)%", runs["alone"])
    assert (loss, 100 * accuracy) == pytest.approx(
        (float(said[1]), float(said[2])), abs=0.006
    )


def test_eight_devices_give_the_curve_of_one(runs, place):
    assert "on 8 devices in 1 processes" in runs["eight"]
    assert np.abs(curve(place, "eight") - curve(place, "alone")).max() < 1e-5
    ours, theirs = (saved(place / name)[0]["losses"] for name in ("eight", "alone"))
    assert len(ours) == STEPS and np.abs(ours / theirs - 1).max() < 1e-5


def test_two_processes_train_together(runs, place):
    assert "on 2 devices in 2 processes" in runs["first"]
    assert "epoch" not in runs["second"]  # one of them speaks
    ours, theirs = (saved(place / name)[0] for name in ("two", "alone"))
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    # Sums in another order differ in the last digit. Where an image leaves all channels
    # nearly equal, LayerNorm magnifies that; Adam's moments see it, its steps hardly.
    for name in theirs:
        mine, other = ours[name].astype(float), theirs[name].astype(float)
        largest = np.abs(other).max()
        tol = 1e-2 * largest if ".opt_state." in name else 1e-5 * max(1, largest)
        assert np.abs(mine - other).max() <= tol, name


def test_rows_without_weight_change_nothing():
    """A step on 5 rows, and on the same with 3 rows of weight 0: equal parameters."""
    u = np.random.default_rng(0).standard_normal((8, 9)).astype(np.float32)
    labels, weights = np.arange(8), np.float32([1] * 5 + [0] * 3)
    results = []
    for batch in ((u[:5], labels[:5]), (u, labels, weights), (u, labels)):
        model = nnx.Linear(9, 10, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        loss = s4d.train_step(model, optimizer, *batch)
        results.append(np.append(model.kernel[...], loss))
    assert np.abs(results[0] - results[1]).max() < 1e-6
    assert np.abs(results[0] - results[2]).max() > 1e-3  # the check can fail


def test_killed_and_resumed_it_ends_with_the_same_bits(runs, place):
    """SIGKILL while a checkpoint is being written, or soon after, when one has been."""
    words = [*arguments(place, "killed")]
    run, folder = start(place, words), place / "killed"
    deadline = time.monotonic() + 200
    while not (any(folder.glob(f"{FIRST}-*")) and any(folder.glob(".*.part"))):
        if any(folder.glob(f"{SECOND}-*")):
            break
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    run.communicate()
    assert not any(folder.glob(f"{STEPS}-*"))
    said = finish(start(place, [*words, "--resume"]))
    assert re.search(f"going on after step ({FIRST}|{SECOND}) of {STEPS}", said)
    same(folder, place / "alone")
    assert (curve(place, "killed") == curve(place, "alone")).all()


def test_interrupted_and_spoilt_it_ends_with_the_same_bits(runs, place):
    """Ctrl-C in an epoch; the checkpoint that this made is then damaged."""
    run, folder = (
        start(place, [*arguments(place, "stopped")]),
        place / "stopped",
    )
    for line in run.stdout:
        if line.startswith("epoch 1"):
            run.send_signal(signal.SIGINT)
            break
    said = finish(run, status=130)
    step, again = re.search(
        r"stopped after step (\d+); go on with: (.*)", said
    ).groups()
    at, spoil = training.checkpoints(folder)[0]
    assert FIRST <= int(step) == at < STEPS
    if at == FIRST:  # Ctrl-C was quick
        later = folder / spoil.name.replace(f"{FIRST}-", f"{SECOND}-")
        spoil = Path(shutil.copy(spoil, later))
    flip_in_data(spoil)
    good = training.checkpoints(folder)[1][0]
    words = shlex.split(again)
    assert words[:2] == [sys.executable, training.__file__]
    assert words[-1] == "--resume"
    said = finish(start(place, words[2:], folder="/"))  # it works from any folder
    assert f"{spoil} is refused: it is damaged" in said
    assert f"going on after step {good} of {STEPS}" in said
    assert "Traceback" not in said
    assert [p.name.split("-")[1] for p in folder.glob("refused-*")] == [f"{at}"]
    same(folder, place / "alone")


def test_resuming_what_is_finished_only_tests(runs, place, capsys):
    folder = place / "finished"
    shutil.copytree(place / "alone", folder)
    lines = (place / "alone.jsonl").read_text().splitlines(keepends=True)
    (place / "finished.jsonl").write_text("".join(lines[:-1]))  # killed before the last
    assert training.command([*arguments(place, "finished"), "--resume"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"going on after step {STEPS} of {STEPS}"
    assert said[2] == runs["alone"].splitlines()[4] and len(said) == 3
    assert rows(place, "finished") == rows(place, "alone")
    same(folder, place / "alone")


# -- checkpoints that cannot be used --------------------------------------------------


@pytest.fixture(scope="module")
def made(runs, place):
    """A run and its config, as the command makes them."""
    words = [*arguments(place, "made")]
    return training.make_run(training.read_options(words))[:2]


def change(file, **changed):
    """Change arrays of a checkpoint, which stays a file that NumPy reads."""
    arrays = dict(np.load(file)) | changed
    np.savez(file, **{name: a for name, a in arrays.items() if a is not None})


def change_place(file, **changed):
    place = json.loads(bytes(np.load(file)["place"])) | changed
    place = {name: value for name, value in place.items() if value is not None}
    change(file, place=np.frombuffer(json.dumps(place).encode(), np.uint8))


SPOIL = {
    "flipped": flip,
    "cut": cut,
    "empty": lambda f: f.write_bytes(b""),
    "a folder": lambda f: [f.unlink(), f.mkdir()],
    "no place": lambda f: change(f, place=None),
    "no json": lambda f: change(f, place=np.zeros(9, np.uint8)),
    "other losses": lambda f: change(f, losses=np.zeros(STEPS)),
    "another place": lambda f: change_place(f, seconds=[1, 2, 3]),
    "no checksum": lambda f: change_place(f, checksum=None),
}


@pytest.fixture
def copied(place, tmp_path):
    """A copy of the folder of the run that was left alone."""
    return Path(shutil.copytree(place / "alone", tmp_path / "run"))


@pytest.mark.parametrize("how", SPOIL)
def test_the_last_good_checkpoint_is_used(how, made, copied):
    last = training.checkpoints(copied)[0][1]
    SPOIL[how](last)
    (copied / f".{last.name}.part").write_bytes(b"a write cut short")
    said, (run, config) = [], made
    where = training.resume(copied, run, config, said.append)
    assert where[0] == SECOND == len(run.losses) and len(run.history) == 2
    (step, good), (first, _) = training.checkpoints(copied)
    assert (step, first) == (SECOND, FIRST)
    reasons = "(it is damaged|it cannot be read|its checksum)"
    assert re.search(rf"/{last.name} is refused: {reasons}", said[0])
    arrays, (expected, _) = training.state_arrays(run), training.load(good)
    assert all((arrays[k] == expected[k]).all() for k in expected if k != "losses")
    assert len(list(copied.glob(f"refused-{last.stem}-*"))) == 1


@pytest.mark.parametrize(
    "name, value",
    dict(lr=0.5, images="others", jax="0.0", enable_x64="True", devices="8").items(),
)
def test_a_checkpoint_of_another_run_is_refused(name, value, made, copied):
    """Whatever has a say in the numbers; and nothing is moved or touched."""
    said, before, (run, config) = [], contents(copied), made
    with pytest.raises(ValueError, match="can be used .*allowed: the folder and"):
        training.resume(copied, run, config | {name: value}, said.append)
    theirs = config[name]
    assert f"of another run: {name} is {theirs} there and {value} here" in said[-1]
    assert contents(copied) == before


def contents(folder):
    """All that is in a folder, byte for byte."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_nothing_of_another_is_touched(place, copied, capsys):
    """A folder of this run's that is full of strangers, older and newer than it."""
    ours = training.checkpoints(copied)
    ours[0][1].unlink()  # the last: one epoch is left to do
    theirs = {}
    for step in (3, FIRST, SECOND, STEPS, 999):
        theirs[f"{step}-0123abcd.npz"] = ours[1][1]
        (copied / f"{step}").mkdir()
        theirs[f"{step}/array"] = ours[2][1]
        theirs[f"{step}.npz"] = theirs[f".{step}.part"] = ours[1][1]
    theirs |= {"model.npz": ours[2][1], "notes": ours[1][1], "50.part": ours[2][1]}
    for name, source in theirs.items():
        shutil.copy(source, copied / name)
    change_place(copied / "999-0123abcd.npz", config={"seed": 1})  # of another seed
    strange, before = set(theirs), contents(copied)
    words = arguments(copied.parent, copied.name, **{"data-dir": place / "images"})
    words = [word for word in words if word != str(copied.parent / "images")]
    words.remove("--data-dir")
    assert training.command([*words, "--resume"]) == 0
    after, said = contents(copied), capsys.readouterr().out
    assert {n: after[Path(n)] for n in strange} == {n: before[Path(n)] for n in strange}
    assert f"going on after step {SECOND}" in said
    (own,) = copied.glob("model-*.npz")
    assert f"model.npz is of another run and stays; this run's is {own}" in said
    assert own.read_bytes() == (place / "alone" / "model.npz").read_bytes()
    name = next(file.name for step, file in ours if step == STEPS)
    ended, whole = (training.load(f / name) for f in (copied, place / "alone"))
    assert all(a.tobytes() == whole[0][k].tobytes() for k, a in ended[0].items())


@pytest.mark.parametrize(
    "content", ["", "mine\n", '{"epoch": 1, "step": 17, "loss": 1}']
)
def test_metrics_of_another_are_not_touched(content, place, tmp_path):
    (tmp_path / "mine").write_text(content)
    for folder in ("mistyped", "alone"):
        words = arguments(place, folder)[:-1] + [str(tmp_path / "mine"), "--resume"]
        said = training.command([*words])
        assert (
            said
            == f"--metrics {tmp_path / 'mine'} is not of this run; allowed: "
            + ("a new file, or its own")
        )
        assert contents(tmp_path) == {Path("mine"): content.encode()}
    shutil.rmtree(place / "mistyped")


def test_config_holds_every_setting_that_has_a_say(made, place):
    _, config = made
    settings = {flag.replace("-", "_") for flag in training.SETTINGS}
    others = {"dataset", "augment", "init", "images"} | training.surroundings().keys()
    assert config.keys() == settings | others
    assert config["jax"] == jax.__version__ and config["devices"] == "1 of cpu"
    with jax.enable_x64(True):
        assert training.surroundings()["enable_x64"] == "True"


def test_nothing_to_go_on_with_is_a_beginning(made, tmp_path):
    said, (run, config) = [], made
    assert training.resume(tmp_path / "new", run, config, said.append) is None
    assert "starting at the beginning" in said[0]


def test_arrays_survive_the_way_there_and_back(made):
    """Every kind of state: parameters, moments, counts, keys; nothing is left out."""
    run, _ = made
    before = training.state_arrays(run)
    parts = run.model, run.optimizer
    assert len(before) == len(jax.tree.leaves(nnx.state(parts)))
    kinds = "dropout.rngs.count", "dropout.rngs.key", "log_dt", ".mu.", ".nu.", "step"
    assert all(any(kind in name for name in before) for kind in kinds), before.keys()
    changed = {k: a + np.ones((), a.dtype) for k, a in before.items()}
    training.put_arrays(run, changed)
    after = training.state_arrays(run)
    assert all((after[k] == changed[k]).all() for k in changed)
    training.put_arrays(run, before)
    forms = map(training.key_form, jax.tree.leaves(nnx.state(run.model)))
    assert {form for form in forms if form} == {"rbg"}


# -- several processes ----------------------------------------------------------------


def pair(place, *extra, name="pair", patience=60):
    """Start two processes, each with words of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [*arguments(place, name), f"--coordinator=127.0.0.1:{port}"]
    both += ["--num-processes=2", f"--patience={patience}"]
    return [
        start(place, [*both, f"--process-id={i}", *words])
        for i, words in enumerate(extra)
    ]


def test_processes_with_other_settings_are_refused(runs, place):
    """Both say so and end, before the first step."""
    for process, said in zip(
        pair(place, ["--seed=1"], ["--epochs=7"]),
        (
            "process 1 is of another run: epochs is 7 there and 3 here; "
            "seed is 0 there and 1 here; allowed: the same settings",
            "process 0 is of another run: epochs is 3 there and 7 here; ",
        ),
    ):
        (sentence,) = finish(process, status=1).splitlines()
        assert sentence.startswith(said)
    assert not (place / "pair").exists()


def test_a_partner_that_dies_or_never_comes(runs, place):
    """One dies in the first epoch, or never comes: the other ends with a sentence."""
    alone, *_ = pair(place, [], patience=2)
    for dead in (0, 1):
        both = pair(place, ["--epochs=60"], ["--epochs=60"], name=f"dead{dead}")
        for line in both[0].stdout:
            if line.startswith("epoch 1 "):
                break
        both[dead].kill()
        since = time.monotonic()
        said = finish(both[1 - dead], status=1)
        assert time.monotonic() - since < 30
        last = said.splitlines()[-1]
        assert last.startswith("another process has gone") and "--resume" in last
        assert "Traceback" not in said and "***" not in said
        both[dead].communicate()
    (said,) = finish(alone, status=1).splitlines()
    assert "did not meet at 127.0.0.1:" in said and "in 2 seconds; allowed" in said


@pytest.fixture
def two(monkeypatch):
    """This process is one of two; `two` holds what the other has, in turn."""
    others, gather = [], training.multihost_utils.process_allgather

    def with_the_other(mine):
        return np.stack([mine, others.pop(0) if others else mine])

    assert gather(np.array([1])).shape == (1, 1)
    monkeypatch.setattr(training.multihost_utils, "process_allgather", with_the_other)
    return others


def test_everyone_hears_what_the_others_have(two):
    text = b'{"seed": "one"}'
    two += [np.array(len(text)), np.frombuffer(text, np.uint8)]
    assert training.from_all({"a": "\u00e9"}) == [{"a": "\u00e9"}, {"seed": "one"}]
    text = b'{"seed": 17}'
    two += [np.array(len(text)), np.frombuffer(text, np.uint8)]
    with pytest.raises(ValueError, match="process 1 is of .*: seed is 17 there and 18"):
        training.require_same(seed=18)
    training.require_same(seed=18)


def test_a_folder_that_not_all_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "from_all", lambda mine: [mine, False])
    with pytest.raises(ValueError, match="process 1 does not see what .*new; all"):
        training.prepare_folder(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_addresses_where_processes_cannot_meet(capsys, no_data):
    rest = ["--num-processes=2", "--process-id=0"]
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        for address, said in {
            "localhost": "allowed: HOST:PORT",
            "localhost:": "allowed: HOST:PORT",
            ":1234": "allowed: HOST:PORT",
            "localhost:65536": "allowed: HOST:PORT",
            "localhost:http": "allowed: HOST:PORT, with a port from 1 to 65535",
            "no.such.host.invalid:1234": "this host is not known",
            f"localhost:{port}": f"port {port} cannot be used here (Address already",
        }.items():
            said = f"--coordinator {address}: " + said
            assert said in refused(capsys, f"--coordinator={address}", *rest)
    assert "'0'" in refused(capsys, "--patience=0")


# -- what goes wrong with paths, disks and signals ------------------------------------


@pytest.mark.parametrize("flag", ["checkpoint-dir", "metrics", "data-dir"])
def test_paths_that_are_not_of_this_machine(
    flag, capsys, no_data, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for path in (
        "gs://bucket/run",
        "s3:/bucket",
        "file:///tmp/x",
        "",
        "a\udcff",
        "a\nb",
    ):
        said = refused(capsys, "--dataset=mnist", f"--{flag}={path}")
        assert f"--{flag}: {path!r}; allowed: the path of something on this" in said
    assert "~nobody-here" in refused(capsys, f"--{flag}=~nobody-here/x")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, wanted in {"~/x": "x", "x": "x", "gs:x": "gs:x", "é ü": "é ü"}.items():
        assert training.local_path(path) == tmp_path / wanted


@pytest.mark.parametrize("word", ["--seed=--", "--seed=\udcff"])
def test_odd_values_are_one_sentence(word, capsys, no_data, monkeypatch):
    assert f"argument {word.split('=')[0]}: " in refused(capsys, word)


def test_go_on_with_names_all_that_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--check a --lr=1e-05 --seed 7 --init inv --data-dir . --dataset mnist"
    o = training.read_options([*words.split(), "--metrics", "a b"])
    python, script, *rest = shlex.split(o.again)
    assert (python, script) == (sys.executable, str(Path(training.__file__).absolute()))
    monkeypatch.chdir("/")
    again = training.read_options(rest)
    assert again.resume and not o.resume
    assert vars(again) | {"resume": False} == vars(o)


@pytest.mark.parametrize("folder", ["/proc/run", "file/run", "long" * 99, "a/" * 2500])
def test_folders_that_cannot_be_are_one_sentence(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        training, "make_run", lambda o: training.prepare_folder(o.checkpoint_dir)
    )
    said = training.command(["--checkpoint-dir", folder])
    assert folder.rstrip("/")[:300] in said and ": " in said and "\n" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_sentence(runs, place, capsys):
    """No file may be longer than this, as if there were no more room."""
    cut = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, cut[1]))
    try:
        said = training.command([*arguments(place, "full")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, cut)
    file = rf"{place}/full/{FIRST}-\w+.npz"
    assert re.fullmatch(f"{file}: File too large: make room .* with --resume", said)
    assert list((place / "full").iterdir()) == []
    assert "epoch" not in capsys.readouterr().out


def test_a_second_signal_while_a_checkpoint_is_written(made, tmp_path, monkeypatch):
    run, config = made
    training.save(tmp_path, run, config)
    before = contents(tmp_path)
    # To this thread: another one might get it, and this one hear of it too late. And as
    # on a terminal: in the background, a shell lets the signal be ignored.
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work():
        with training.stop_noted():
            training.save(tmp_path, run, config)
            assert contents(tmp_path) == before  # one signal is only noted
            training.save(tmp_path, run, config)
            raise AssertionError("not reached")

    try:
        assert training.outcome(work) == "broken off; what was saved stays"
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert contents(tmp_path) == before


def test_errors_say_what_to_do():
    for error, said in {
        PermissionError(13, "Permission denied", "/a"): (
            "/a: Permission denied: choose a place where you may read and write"
        ),
        OSError(28, "No space left on device"): "the terminal: No space left on .*room",
        MemoryError(): "there is not enough memory: try a smaller --batch-size",
        ValueError("one\ntwo"): "one",
        FloatingPointError("loss nan at step 3"): "loss nan at step 3: try a smaller",
    }.items():
        assert re.match(said, training.explained(error))


# -- pieces ---------------------------------------------------------------------------


def test_batches_go_on_where_they_were_left():
    u, labels = np.arange(22.0).reshape(22, 1, 1), np.arange(22)

    def noisy(inputs, rng):
        return inputs + rng.standard_normal(inputs.shape)

    def feed(seed, place=None):
        return s4d.batches((u, labels), 3, 4, seed, noisy, place, whole=False)

    whole, rng = list(feed(5)), np.random.default_rng(5)
    first = feed(rng)
    begun = [next(first) for _ in range(7)]
    left = 7, rng.bit_generator.state
    rest = list(feed(np.random.default_rng(5), left))
    assert len(whole) == 17 and len(whole[-1][1]) == 2  # 66 images, none left out
    for (a, b), (c, d) in zip(whole, begun + rest, strict=True):
        assert (a == c).all() and (b == d).all()


def test_nudges_of_other_sizes():
    rng, image = np.random.default_rng(0), np.full((28, 28), -1.0)
    image[3, 14] = 1.0
    moved = s4d.nudged(np.tile(image.reshape(1, -1, 1), (2000, 1, 1)), rng)
    places, counts = np.unique(moved[:, :, 0].argmax(1), return_counts=True)
    around = [28 * (3 + i) + 14 + j for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert places.tolist() == around and counts.argmax() == 4


def smooth(images, strength, seed=0):
    return training.pulled(images, np.random.default_rng(seed), strength)


def test_a_pull_is_what_the_formula_says():
    """Against SciPy image by image, the field summed wave by wave."""
    images = np.random.default_rng(1).normal(size=(3, 64, 1)).astype(np.float32)
    a = np.random.default_rng(0).normal(0, 0.05 * 8, (2, 3, 4, 4))
    x = (np.arange(8) + 0.5) / 8
    for i, out in enumerate(smooth(images, 0.05)):
        fields = sum(
            a[:, i, p, q, None, None]
            * np.cos(np.pi * p * x)[:, None]
            * np.cos(np.pi * q * x)
            for p in range(4)
            for q in range(4)
        )
        places = np.indices((8, 8)) + fields
        right = scipy.ndimage.map_coordinates(
            images[i].reshape(8, 8), places, order=1, cval=-1
        )
        assert np.abs(out.reshape(8, 8) - right).max() < 1e-5
    assert smooth(images, 0.05).dtype == np.float32


def test_pulls_are_smooth_different_and_reproducible():
    images = np.tile(np.linspace(-1, 1, 28), (50, 28)).reshape(50, 784, 1)
    assert np.allclose(smooth(images, 0.0), images)
    one, again, other = (smooth(images, 0.02, seed) for seed in (0, 0, 1))
    assert (one == again).all() and not np.allclose(one, other)
    assert np.ptp(one, 0).max() > 0.1  # each its own way
    assert one.min() >= -1 and one.max() <= 1
    # a slope of 2/27 a pixel shows the field itself, away from the border
    inner = (one - images).reshape(50, 28, 28)[:, 9:19, 9:19] / (2 / 27)
    waves = np.cos(np.pi * np.outer(np.arange(4), np.arange(9, 19) + 0.5) / 28)
    spread = (0.02 * 28) * np.sqrt(np.outer((waves**2).sum(0), (waves**2).sum(0)))
    assert np.abs(inner.std(0) / spread - 1).mean() < 0.15


@pytest.mark.parametrize("dataset, augment", [("digits", "nudge"), ("mnist", "pull")])
def test_each_dataset_has_its_augmentation(dataset, augment):
    read = training.read_options(["--dataset", dataset])
    assert read.augment == augment
    read = training.read_options(["--dataset", dataset, "--augment", "none"])
    assert read.augment == "none" and training.AUGMENTS["none"] is None


def test_augmentation_and_expand_reach_the_run(monkeypatch):
    part = np.zeros((40, 16, 1), np.float32), np.arange(40) % 10
    monkeypatch.setattr(training, "load_digits", lambda: [part] * 3)
    for augment, expand in {"none": 0, "pull": 1}.items():
        words = f"--augment {augment} --expand {expand} --d-model 4 --d-state 4"
        run, config, _ = training.make_run(training.read_options(words.split()))
        assert run.feed.keywords["augment"] is training.AUGMENTS[augment]
        assert config["augment"] == augment and config["expand"] == expand
        ffn = run.model.stack.blocks[0].ffn
        assert ffn is None if expand == 0 else ffn.up.out_features == 4


def test_evaluate_in_portions_is_evaluate():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(9, 10, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    u = np.random.default_rng(0).standard_normal((25, 9)).astype(np.float32)
    data, asked = (u, np.arange(25) % 10), []

    def ask(model, u):
        asked.append(len(u))
        return model(u)

    whole = s4d.evaluate(model, data)
    assert s4d.evaluate(model, data, ask, portion=10) == pytest.approx(whole, rel=1e-6)
    assert asked == [10, 10, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    before = signal.getsignal(number)
    acted = []
    signal.signal(number, lambda *_: acted.append(number))
    try:
        with training.stop_noted() as notes:
            os.kill(os.getpid(), number)
            assert (notes, acted) == ([number], [])
            assert training.stop_agreed(notes, False) and not training.stop_agreed(
                [], True
            )
            os.kill(os.getpid(), number)
            assert acted == [number]
        os.kill(os.getpid(), number)
        assert acted == [number] * 2 and notes == [number]
    finally:
        signal.signal(number, before)


def test_convolution_by_rows_is_the_convolution():
    u = jax.random.normal(jax.random.key(0), (4, 3, 50))
    K = jax.random.normal(jax.random.key(1), (3, 50))

    def total(conv, K):
        return jnp.sum(conv(u, K) ** 2)

    assert (s4d.convolve_rows(u, K) == s4d.causal_conv(u, K)).all()
    ours, theirs = (
        jax.grad(lambda K, f=f: total(f, K))(K)
        for f in (s4d.convolve_rows, s4d.causal_conv)
    )
    assert np.allclose(ours, theirs, rtol=1e-5)
