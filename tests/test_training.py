"""Part 11: data, optimizer, training loop."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.datasets
from flax import nnx

import annotated_s4d as s4d


def tiny(seed=0, **options):
    """A small classifier of 8 samples in 2 classes: is the mean above zero?"""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((64, 8, 1)).astype(np.float32)
    labels = (u.mean((1, 2)) > 0).astype(np.int32)
    model = s4d.S4DModel(1, 2, 8, 8, 1, rngs=nnx.Rngs(seed), **options)
    return model, (u, labels)


def test_the_split_is_fixed_disjoint_and_complete():
    parts = s4d.load_digits()
    assert [len(labels) for _, labels in parts] == [1257, 180, 360]
    images = np.concatenate([u for u, _ in parts])
    assert images.shape == (1797, 64, 1) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    digits = sklearn.datasets.load_digits()
    ours = sorted(map(bytes, (images[:, :, 0] * 8 + 8).astype(np.uint8)))
    assert ours == sorted(map(bytes, digits.data.astype(np.uint8)))
    again = s4d.load_digits()
    assert all(
        (a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(parts, again)
    )


def test_labels_single_out_the_ssm_parameters():
    model, _ = tiny()
    labels = s4d.parameter_labels(nnx.state(model, nnx.Param))
    ssm = {
        path[-1]
        for path, label in nnx.to_flat_state(labels)
        if label.get_value() == "ssm"
    }
    rest = {
        path[-1]
        for path, label in nnx.to_flat_state(labels)
        if label.get_value() == "rest"
    }
    assert ssm == {"log_dt", "log_A_real", "A_imag", "B"}
    assert rest == {"C", "D", "kernel", "bias", "scale"}


def test_each_label_gets_its_rate_and_decay():
    """With zero gradients only weight decay moves; with one rate 0, only the other."""
    model, _ = tiny()
    for rates, moving in [(dict(ssm_lr=0.0), "rest"), (dict(lr=0.0), "ssm")]:
        params = nnx.state(model, nnx.Param)
        optimizer = s4d.make_optimizer(model, 20, **rates)
        grads, update = (
            jax.tree.map(jnp.ones_like, params),
            jax.jit(optimizer.tx.update),
        )
        updates, state = update(grads, optimizer.tx.init(params), params)
        updates, _ = update(grads, state, params)  # the first rate is zero
        labels = s4d.parameter_labels(params)
        for label, change in zip(jax.tree.leaves(labels), jax.tree.leaves(updates)):
            assert (jnp.abs(change).max() > 0) == (label == moving)
    optimizer = s4d.make_optimizer(model, 20)
    params = nnx.state(model, nnx.Param)
    grads, state = jax.tree.map(jnp.zeros_like, params), optimizer.tx.init(params)
    update = jax.jit(optimizer.tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
    before = dict(nnx.to_flat_state(params))
    for path, change in nnx.to_flat_state(updates):  # what is zero has nowhere to decay
        decays = path[-1] not in s4d.SSM_PARAMETERS and before[path][...].any()
        assert (jnp.abs(change[...]).max() > 0) == decays, path


def test_batches_leave_nothing_out():
    u, labels = np.arange(10)[:, None, None], np.arange(10)
    got = [row for _, rows in s4d.batches((u, labels), 4, 8, seed=0) for row in rows]
    assert len(got) == 40
    assert sorted(got) == sorted(list(range(10)) * 4)
    assert got[:10] != got[10:20]
    again = [row for _, rows in s4d.batches((u, labels), 4, 8, seed=0) for row in rows]
    assert got == again


def all_orders_at_once(data, epochs, batch_size, seed, augment, whole):
    """The batches as they were drawn when the orders of all epochs were in memory."""
    rng, (u, labels) = np.random.default_rng(seed), data
    order = np.concatenate([rng.permutation(len(u)) for _ in range(epochs)])
    end = len(order) - batch_size + 1 if whole else len(order)
    for i in range(0, end, batch_size):
        rows = order[i : i + batch_size]
        yield augment(u[rows], rng), labels[rows]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("n, epochs, size", [(10, 4, 8), (7, 3, 7), (7, 3, 50)])
def test_an_order_at_a_time_gives_the_same_batches(n, epochs, size, whole):
    data = np.arange(1.0 * n)[:, None, None], np.arange(n)

    def noisy(inputs, rng):
        return inputs + rng.standard_normal(inputs.shape)

    got = s4d.batches(data, epochs, size, 3, noisy, whole=whole)
    wanted = all_orders_at_once(data, epochs, size, 3, noisy, whole)
    for ours, theirs in zip(got, wanted, strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs))


def test_nudges_move_half_of_the_images_by_a_pixel():
    rng, image = np.random.default_rng(0), np.full((8, 8), -1.0)
    image[3, 4] = 1.0
    moved = s4d.nudged(np.tile(image.reshape(1, 64, 1), (4000, 1, 1)), rng)
    assert moved.shape == (4000, 64, 1) and ((moved == 1).sum((1, 2)) == 1).all()
    rows, columns = np.divmod(moved[:, :, 0].argmax(1), 8)
    assert set(rows) == {2, 3, 4} and set(columns) == {3, 4, 5}
    assert ((rows == 3) & (columns == 4)).mean() == pytest.approx(5 / 9, abs=0.03)


def test_training_learns_and_reports(capsys):
    model, data = tiny()
    history = s4d.train(model, data, data, epochs=20, batch_size=16, lr=4e-2)
    steps, losses, validation, accuracy = zip(*history)
    assert len(history) == 20 and steps[-1] == 80
    assert validation[-1] < 0.5 * validation[0] and accuracy[-1] > 0.9
    assert (validation[-1], accuracy[-1]) == s4d.evaluate(model, data)
    assert capsys.readouterr().out.count("validation") == 10
    assert losses[-1] < losses[0]


def test_evaluate_is_the_cross_entropy_without_dropout():
    model, (u, labels) = tiny(dropout=0.5)
    model.train()
    loss, accuracy = s4d.evaluate(model, (u, labels))
    model.eval()
    scores = np.float64(model(u))
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    assert loss == pytest.approx(-log_p[np.arange(64), labels].mean(), rel=1e-5)
    assert accuracy == pytest.approx((scores.argmax(-1) == labels).mean())


def test_training_is_reproducible():
    runs = []
    for _ in range(2):
        model, data = tiny(dropout=0.1)
        s4d.train(model, data, data, epochs=5, batch_size=16, seed=3)
        runs.append(jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert all((a == b).all() for a, b in zip(*runs))


def test_every_step_has_its_own_dropout_mask():
    """The same batch and frozen parameters: the loss still changes at each step."""
    model, (u, labels) = tiny(dropout=0.5)
    model.train()
    optimizer = nnx.Optimizer(model, optax.set_to_zero(), wrt=nnx.Param)
    losses = {float(s4d.train_step(model, optimizer, u, labels)) for _ in range(4)}
    assert len(losses) == 4


def test_training_stops_at_nan():
    model, data = tiny()
    with pytest.raises(FloatingPointError, match=r"loss (nan|inf) at step \d+; before"):
        s4d.train(model, data, data, epochs=20, batch_size=16, lr=1e30)


BAD = {  # what is done to (inputs, labels), and what is said
    "labels from 1": (lambda u, y: (u, y + 1), "labels are no class: .*0 to 1"),
    "labels from -1": (lambda u, y: (u, y - 1), "32 of 64 labels are no class: .-1"),
    "floats": (lambda u, y: (u, y * 1.0), "labels are float64; allowed: integers"),
    "truth values": (lambda u, y: (u, y > 0), "labels are bool"),
    "too many": (lambda u, y: (u, np.r_[y, y]), r"\(128,\) for 64 inputs.*\(64,\)"),
    "too few": (lambda u, y: (u, y[:-1]), r"labels of shape \(63,\) for 64 inputs"),
    "two axes": (lambda u, y: (u, y[:, None]), r"labels of shape \(64, 1\)"),
    "none": (lambda u, y: (u[:0], y[:0]), "no inputs; allowed: one"),
    "infinity": (lambda u, y: (u / 0, y), "inputs hold NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("how", BAD)
def test_bad_sets_are_refused_before_the_first_step(how, monkeypatch):
    monkeypatch.setattr(s4d, "train_step", None)
    model, (u, labels) = tiny()
    labels = np.arange(64) % 2
    spoil, said = BAD[how]
    bad, good = spoil(u, labels), (u, labels)
    for name, sets in {"training": (bad, good), "validation": (good, bad)}.items():
        with pytest.raises(ValueError, match=f"{name} set: .*{said}"):
            s4d.train(model, *sets)


def test_labels_of_every_width_and_of_every_place():
    for kind in "bhilqBHILQ":
        s4d.require_labels("set", (np.zeros((3, 8, 1)), np.zeros(3, kind)), (2,))
    places = np.zeros((3, 8), np.int8)
    s4d.require_labels("set", (np.zeros((3, 8, 1)), places), (8, 2))
    with pytest.raises(ValueError, match=r"\(3, 8\) for 3 inputs.*\(3, 7\)"):
        s4d.require_labels("set", (np.zeros((3, 8, 1)), places), (7, 2))


@pytest.mark.parametrize("name", ["lr", "ssm_lr", "weight_decay"])
@pytest.mark.parametrize("rate", [-1e-3, np.nan, np.inf])
def test_rates_below_zero_are_refused(name, rate):
    with pytest.raises(ValueError, match=f"{name} is .*; allowed: 0 <= {name} < inf"):
        s4d.make_optimizer(None, 10, **{name: rate})


def test_evaluate_refuses():
    model, (u, labels) = tiny()
    for data, said in {
        "nothing": ((u[:0], labels[:0]), "0 inputs and 0 labels to evaluate"),
        "fewer": ((u, labels[:-1]), "64 inputs and 63 labels"),
        "others": ((u, labels + 1), "labels are no class: .*0 to 1"),
    }.values():
        with pytest.raises(ValueError, match=said):
            s4d.evaluate(model, data)


# -- files of weights -----------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A model and a file of its parameters, whose arrays `change` replaces."""
    model = tiny()[0]
    s4d.save_parameters(tmp_path / "good", model, [(1, 2.0, 3.0, 0.5)])
    arrays = dict(np.load(tmp_path / "good.npz"))

    def change(**changed):
        np.savez(tmp_path / "bad.npz", **arrays | changed)
        return tmp_path / "bad.npz"

    return model, arrays, change


def test_one_name_writes_and_reads(weights, tmp_path):
    model, *_ = weights
    for name in ("good", "good.npz"):
        assert s4d.load_parameters(tmp_path / name, model).tolist() == [[1, 2, 3, 0.5]]
        assert s4d.load_parameters(str(tmp_path / name), model).shape == (1, 4)
    (tmp_path / "good").write_bytes(b"another's")  # of a name that is not ours
    s4d.load_parameters(tmp_path / "good", model)
    moved = (tmp_path / "good.npz").rename(tmp_path / "moved")
    s4d.load_parameters(moved, model)
    assert {p.name for p in tmp_path.iterdir()} == {"good", "moved"}


@pytest.mark.parametrize("kind", ["i4", "c8", "?", "U1", "O"])
def test_weights_of_other_kinds_are_refused(kind, weights):
    model, arrays, change = weights
    file = change(**{"decoder/bias": np.zeros(2, kind)})
    with pytest.raises(ValueError, match=f"{file}.*save_parameters wrote for a model"):
        s4d.load_parameters(file, model)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_weights_that_are_not_finite_are_refused(value, weights):
    model, arrays, change = weights
    before = np.array(model.decoder.bias[...])
    file = change(**{"decoder/bias": np.array([0, value]), "decoder/kernel": 1.0})
    with pytest.raises(ValueError, match=f"{file} differs in"):
        s4d.load_parameters(file, model)
    file = change(**{"decoder/bias": np.array([0, value])})
    with pytest.raises(ValueError, match=f"{file}: decoder/bias is not finite.*give a"):
        s4d.load_parameters(file, model)
    assert (before == model.decoder.bias[...]).all()


@pytest.mark.parametrize("content", [b"", b"no zip", "cut", "flipped", "a .npy"])
def test_damaged_weights_are_refused_by_name(content, weights, tmp_path):
    model, *_ = weights
    file, raw = tmp_path / "x.npz", (tmp_path / "good.npz").read_bytes()
    if content == "a .npy":
        np.save(tmp_path / "x.npy", np.zeros(3))
        content = (tmp_path / "x.npy").read_bytes()
    at = raw.index(b"encoder/kernel.npy") + 120  # in what follows its name
    flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
    file.write_bytes({"cut": raw[:-50], "flipped": flipped}.get(content, content))
    with pytest.raises(ValueError, match=f"{file} is damaged, or no .npz.*: give a"):
        s4d.load_parameters(file, model)


def test_weights_that_cannot_be_read_or_written(weights, tmp_path):
    model, *_ = weights
    for name, said in {"no": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(OSError, match=f"cannot be read .{said}.*give a file that"):
            s4d.load_parameters(tmp_path / name, model)
    (tmp_path / "folder.npz").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in ("folder", "no/model", "long" * 99, "good/model"):
        with pytest.raises(OSError) as error:
            s4d.save_parameters(tmp_path / name, model, [])
        assert error.value.filename == str(tmp_path / f"{name}.npz")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """What ends a write in the middle leaves the old file, and nothing beside it."""
    file = tmp_path / "file"
    s4d.write_whole(file, b"old")

    cut = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, cut[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            s4d.write_whole(file, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, cut)
    assert error.value.filename == str(file)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"
    s4d.write_whole(file, b"new")
    assert file.read_bytes() == b"new"


# -- and what else is refused ---------------------------------------------------------


def test_training_refuses():
    model, (u, labels) = tiny()
    bad = u.copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        s4d.train(model, (bad, labels), (u, labels))
    with pytest.raises(ValueError, match="epochs is 0"):
        s4d.train(model, (u, labels), (u, labels), epochs=0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        s4d.train(model, (u, labels), (u, labels), batch_size=-1)
    with pytest.raises(ValueError, match="2 steps"):
        s4d.train(model, (u, labels), (u, labels), epochs=2, batch_size=64)
    with pytest.raises(TypeError, match="learning_rate"):
        s4d.train(model, (u, labels), (u, labels), learning_rate=1.0)
