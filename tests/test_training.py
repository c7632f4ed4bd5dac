"""Part 11: data, optimizer, training loop."""

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
    for path, change in nnx.to_flat_state(updates):
        decays = path[-1] not in s4d.SSM_PARAMETERS and path[-1] not in ("bias",)
        assert (jnp.abs(change[...]).max() > 0) == decays, path


def test_batches_leave_nothing_out():
    u, labels = np.arange(10)[:, None, None], np.arange(10)
    got = [row for _, rows in s4d.batches((u, labels), 4, 8, seed=0) for row in rows]
    assert len(got) == 40
    assert sorted(got) == sorted(list(range(10)) * 4)
    assert got[:10] != got[10:20]
    again = [row for _, rows in s4d.batches((u, labels), 4, 8, seed=0) for row in rows]
    assert got == again


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
    history = s4d.train(model, data, data, epochs=20, batch_size=16, lr=1e-2)
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
