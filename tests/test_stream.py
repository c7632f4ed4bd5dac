"""Part 11: training on a stream, chunk by chunk."""

import functools
import json

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from flax import nnx
from oracle import error
from render.drawing import drawing

import annotated_s4d as s4d


def tiny(seed=0, **options):
    """A small model that answers at every sample."""
    options = dict(pooling="none") | options
    return s4d.S4DModel(1, 1, 4, 4, 1, rngs=nnx.Rngs(seed), **options)


def chunks(lengths=(7, 7, 7), batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        tuple(rng.standard_normal((2, batch, L, 1)).astype(np.float32)) for L in lengths
    ]


def parameters(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def by_hand(model, x, u, target):
    """The loss with the state given as a constant, by advance alone."""
    _, y = model.advance(x, u)
    return ((y - target) ** 2).mean()


def test_the_gradient_takes_the_state_as_a_constant():
    """Through two chunks: the second's gradient does not look into the first."""
    model, (one, two, _) = tiny(), chunks()

    @nnx.jit
    @nnx.grad
    def through(model):
        _, x = s4d.stream_loss(model, model.init_state(2), *one)
        return s4d.stream_loss(model, x, *two)[0]

    @nnx.jit
    @nnx.grad
    def whole(model):  # without the stop
        x, _ = model.advance(model.init_state(2), one[0])
        return by_hand(model, x, *two)

    x, _ = s4d.advance(model, model.init_state(2), one[0])
    constant = nnx.jit(nnx.grad(by_hand))(model, x, *two)
    pairs = zip(*map(jax.tree.leaves, (through(model), constant, whole(model))))
    apart = 0
    for a, b, c in pairs:
        assert jnp.abs(b).max() > 0  # the stop hides no parameter
        assert error(a, b) < 1e-4
        apart = max(apart, error(a, c))
    assert apart > 1e-2  # the whole gradient is another one


def test_no_gradient_reaches_the_state():
    model, (_, two, _) = tiny(), chunks()
    x, _ = s4d.advance(model, model.init_state(2), two[0])

    def loss(state):
        return s4d.stream_loss(model, dict(x, stack=state), *two)[0]

    assert all((g == 0).all() for g in jax.tree.leaves(jax.grad(loss)(x["stack"])))


def test_the_state_is_carried():
    """With frozen parameters the losses are those of advance, and of one long call."""
    model, data = tiny(), chunks((5, 1, 9, 9))
    frozen = nnx.Optimizer(model, optax.set_to_zero(), wrt=nnx.Param)
    x, losses = s4d.train_on_stream(model, frozen, iter(data))
    state = model.init_state(2)
    for (u, target), loss in zip(data, losses):
        state, y = s4d.advance(model, state, u)
        assert loss == pytest.approx(float(((y - target) ** 2).mean()), rel=1e-5)
    u, target = (np.concatenate(part, 1) for part in zip(*data))
    whole = np.square(s4d.call(model, u) - target)
    parts = np.split(whole, np.cumsum([5, 1, 9]), axis=1)
    assert losses == pytest.approx([float(p.mean()) for p in parts], rel=1e-4)
    for a, b in zip(jax.tree.leaves(x["stack"]), jax.tree.leaves(state["stack"])):
        assert error(a, b) < 1e-6


def test_a_stream_may_be_interrupted():
    """Training on three chunks, or on one and then on two from its state."""
    data, results = chunks(), []
    for cut in (3, 1):
        model = tiny()
        optimizer = s4d.make_optimizer(model, 3)
        x, first = s4d.train_on_stream(model, optimizer, data[:cut])
        x, rest = s4d.train_on_stream(model, optimizer, data[cut:], x)
        results.append((first + rest, parameters(model), jax.tree.leaves(x)))
    (a, p, x), (b, q, z) = results
    assert a == b and all((v == w).all() for v, w in zip(p + x, q + z))


def test_every_chunk_is_one_step():
    """The parameters after two chunks are those of two gradients by hand."""
    model, data = tiny(), chunks()[:2]
    mine = nnx.clone(model)
    descent = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    _, losses = s4d.train_on_stream(model, descent, data)
    x = mine.init_state(2)
    for (u, target), loss in zip(data, losses):
        value, grads = nnx.jit(nnx.value_and_grad(by_hand))(mine, x, u, target)
        assert loss == pytest.approx(float(value), rel=1e-5)
        x, _ = s4d.advance(mine, x, u)  # before the step
        params = nnx.state(mine, nnx.Param)
        nnx.update(mine, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    for a, b in zip(parameters(model), parameters(mine)):
        assert error(a, b) < 1e-4


def test_without_carry_every_chunk_starts_from_the_given_state():
    model, data = tiny(), chunks()
    frozen = nnx.Optimizer(model, optax.set_to_zero(), wrt=nnx.Param)
    x0, _ = s4d.advance(model, model.init_state(2), data[2][0])
    for x in (None, x0):
        _, losses = s4d.train_on_stream(model, frozen, data, x, carry=False)
        start = model.init_state(2) if x is None else x
        alone = [float(by_hand(model, start, *chunk)) for chunk in data]
        assert losses == pytest.approx(alone, rel=1e-5)


def test_echoes_are_echoes():
    u, echo = (np.concatenate(p, 1) for p in zip(*s4d.echoes(2**16, L=256, delay=300)))
    assert u.shape == echo.shape == (1, 2**16, 1)
    assert (echo[:, :300] == 0).all() and (echo[:, 300:] == u[:, :-300]).all()
    other, _ = (np.concatenate(p, 1) for p in zip(*s4d.echoes(2**16, L=1024)))
    assert error(other, u) < 1e-12  # the noise does not depend on the chunks
    assert 0.7 < u.var() < 1.4


def test_only_a_carried_state_can_hear_an_echo():
    """A delay of ten samples in chunks of eight."""
    shares = []
    for carry in (True, False):
        model = tiny(dt_min=0.05, dt_max=0.5)
        rng = np.random.default_rng(0)
        u = np.cumsum(rng.standard_normal((8, 3200, 1)), 1)
        u = (u - np.roll(u, 20, 1))[:, 20:3180] / 20**0.5  # smooth over 20 samples
        target = np.roll(u, 10, 1)
        data = [(u[:, i : i + 8], target[:, i : i + 8]) for i in range(16, 3160, 8)]
        optimizer = s4d.make_optimizer(model, len(data), lr=0.02)
        _, losses = s4d.train_on_stream(model, optimizer, data, carry=carry)
        shares.append(np.mean(losses[-50:]) / u.var())
    assert shares[0] < 0.5 * shares[1]


def test_refusals():
    model, ((u, target), *_) = tiny(), chunks()
    frozen = nnx.Optimizer(model, optax.set_to_zero(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"shape \(2, 7\); allowed: \(2, 7, 1\)"):
        s4d.train_on_stream(model, frozen, [(u, target[..., 0])])
    with pytest.raises(FloatingPointError, match="at chunk 2"):
        s4d.train_on_stream(model, frozen, [(u, target), (u, target * np.nan)])


# -- the exact gradient, by chunks ----------------------------------------------------


@functools.partial(nnx.jit, static_argnames="size")
@functools.partial(nnx.jit, static_argnames="size")
def answers(model, x, u, lengths, weights, size):
    """Answers, last state, and the gradient of a weighted sum for model and state."""

    def loss(model, stack):  # the state of the pooling counts, in integers
        state = x | {"stack": stack}
        if size is None:
            state, y = model.advance(state, u, lengths)
        else:
            state, y = s4d.advance_in_chunks(model, state, u, size, lengths)
        return (weights * y).sum(), (y, state)

    return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(model, x["stack"])


@pytest.mark.parametrize(
    "options", [{}, dict(pooling="mean", discretization="bilinear")]
)
def test_chunks_are_the_whole(options):
    """Outputs, state and gradient, from a state, for rows of different lengths."""
    model, rng = tiny(**options), np.random.default_rng(0)
    u, weights = rng.standard_normal((2, 3, 50, 1)).astype(np.float32)
    x, _ = s4d.advance(model, model.init_state(3), u[:, :9])
    arguments = x, u, jnp.array([50, 16, 3]), weights
    results = (answers(model, *arguments, size=size) for size in (16, None))
    for a, b in zip(*map(jax.tree.leaves, results)):
        assert jnp.abs(b).max() > 0 and error(a, b) < 1e-5


def test_chunks_in_double_precision():
    with jax.enable_x64(True):
        model = tiny()
        u, target = np.random.default_rng(0).standard_normal((2, 2, 30, 1))
        results = (s4d.exact_gradient(model, u, target, size=n) for n in (7, None))
        for a, b in zip(*map(jax.tree.leaves, results)):
            assert a.dtype == jnp.float64 and error(a, b) < 1e-10


def test_each_chunk_has_dropout_masks_of_its_own():
    """And the same ones when it is computed again: as a loop that forgets nothing."""
    (u, target), *_ = chunks((16,))

    @nnx.jit
    @nnx.value_and_grad
    def loop(model):
        x, ys = model.init_state(2), []
        for i in (0, 8):
            x, y = model.advance(x, u[:, i : i + 8])
            ys.append(y)
        return jnp.mean((jnp.concatenate(ys, 1) - target) ** 2)

    ours, theirs = tiny(dropout=0.5), tiny(dropout=0.5)
    for _ in range(2):  # the random stream goes on
        results = s4d.exact_gradient(ours, u, target, size=8), loop(theirs)
        for a, b in zip(*map(jax.tree.leaves, results)):
            assert error(a, b) < 1e-5
    ours, theirs = (nnx.state(m, nnx.RngCount) for m in (ours, theirs))
    assert jax.tree.leaves(ours) == jax.tree.leaves(theirs)


def test_memory_is_that_of_a_chunk():
    """What XLA plans for a gradient: of the whole length are a few numbers a sample."""
    graph, params = nnx.split(tiny())

    def planned(L, size):
        def gradient(params, u):
            return s4d.exact_gradient(nnx.merge(graph, params), u, u, size=size)

        program = jax.jit(gradient).lower(params, jnp.zeros((1, L, 1))).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long, whole = (
        planned(2**10, 2**8),
        planned(2**14, 2**8),
        planned(2**14, None),
    )
    assert long < short + 8 * 4 * 2**14  # a few numbers a sample, as the data
    assert long < whole / 4


def test_refusals_of_chunks():
    model, ((u, target), *_) = tiny(), chunks()
    for size in (0, 2.5):
        with pytest.raises(ValueError, match=f"size is {size}; allowed: positive"):
            s4d.advance_in_chunks(model, model.init_state(2), u, size)
    with pytest.raises(ValueError, match=r"u has shape \(2, 7\)"):
        s4d.advance_in_chunks(model, model.init_state(2), u[..., 0], 4)
    with pytest.raises(ValueError, match=r"shape \(2, 7\); allowed: \(2, 7, 1\)"):
        s4d.exact_gradient(model, u, target[..., 0], size=4)


# -- the picture of what it costs -----------------------------------------------------


def test_the_picture_needs_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(s4d, "__file__", str(tmp_path / "annotated_s4d.py"))
    with matplotlib.rc_context(s4d.LOOK):
        assert "no lengths.json here" in drawing(s4d.time_and_memory(), "caption")
        points = [
            dict(L=2**10, seconds=1, megabytes=2),
            dict(L=2**20, left_out="large"),
        ]
        recorded = {"ways": {"one": points, "none": points[1:]}}
        (tmp_path / "lengths.json").write_text(json.dumps(recorded))
        seconds, _ = s4d.time_and_memory().axes
    assert [line.get_xdata().tolist() for line in seconds.lines] == [[2**10], []]


def test_what_the_article_says_of_its_measurements():
    ways = s4d.measurements("lengths")["ways"]
    once, chunks, scan = (
        {point["L"]: point for point in ways[way] if "seconds" in point}
        for way in ("at once", "in chunks", "parallel scan")
    )
    assert max(once) == max(chunks) == 2**20 > max(scan)
    assert chunks[2**20]["megabytes"] < 1.2 * chunks[2**12]["megabytes"]
    for L, slower in ((2**14, True), (2**18, False), (2**20, False)):
        assert (chunks[L]["seconds"] > once[L]["seconds"]) == slower
    for short, long in zip((2**14, 2**16, 2**18), (2**16, 2**18, 2**20)):
        assert 3 < once[long]["megabytes"] / once[short]["megabytes"] < 5
