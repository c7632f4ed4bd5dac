"""The benchmark in miniature, the recorder, and what Part 13 says about its record."""

import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import record
import speed as m
from flax import nnx
from oracle import error, noise

import annotated_s4d as s4d

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "assets" / "speed.md").read_text(encoding="utf-8")
RECORD = json.loads((ROOT / "assets" / "speed.json").read_text(encoding="utf-8"))


# -- the benchmark, tiny --------------------------------------------------------------


class Clock:
    """A clock that only moves when a form says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def form(self, *seconds):
        turns = iter([0, 0, *seconds])  # it warms up twice

        def run():
            self.now += next(turns)

        return run


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(m, "time", Clock())
    return m.time


def test_a_ratio_is_that_of_the_medians(clock):
    forms = {"ours": clock.form(2, 2, 90), "other": clock.form(6, 6, 6)}
    assert [row[3] for row in m.rows("work", forms, 3)] == ["disturbed"] * 2
    forms = {"ours": clock.form(2, 2, 2), "other": clock.form(5, 6, 6)}
    assert [row[3] for row in m.rows("work", forms, 3)] == ["1.0", "3.0"]


def test_a_disturbed_form_has_no_ratio(clock):
    forms = {"ours": clock.form(2, 2, 2), "other": clock.form(4, 6, 8)}
    assert [row[3] for row in m.rows("work", forms, 3)] == ["1.0", "disturbed"]


def test_the_plain_forms_compute_the_same():
    ours, plain = (
        s4d.S4DModel(1, 3, 4, 8, 2, init="lin", kernel=kernel, rngs=nnx.Rngs(0))
        for kernel in ("s4d", "plain")
    )
    u = jnp.asarray(noise(2, 30, 1))
    assert error(s4d.call(ours, u), s4d.call(plain, u)) < 1e-5
    system = m.system(3, 8)
    assert error(s4d.s4d_kernel(*system, 300), m.plain_kernel(*system, 300)) < 1e-5


@pytest.mark.parametrize("expand", [0, 2])
def test_torch_has_our_parameters_and_streams_what_it_reads(expand):
    if m.torch is None:  # no requirement of this project
        pytest.skip("PyTorch is not installed")
    ours = s4d.S4DModel(1, 3, 4, 8, 2, expand=expand, rngs=nnx.Rngs(0))
    count = sum(p.size for p in m.jax.tree.leaves(nnx.state(ours, nnx.Param)))
    theirs = sum(p.numel() for p in m.torch_model(1, 3, 4, 8, 2, expand).parameters())
    assert count - theirs == 2 * 2 * 4 * 8 // 2  # their B is fixed
    model = m.torch_model(1, 3, 4, 8, 2, expand)
    u = m.torch.tensor(np.array(noise(2, 9, 1)))
    means = model.decoder(model.body(u).mean(1)).detach()
    assert np.allclose(model.stream(u).mean(1), means, atol=1e-5)  # all is linear after


def test_parts_and_a_step_are_measured():
    rates = {"product": 1e9, "FFT": 1e9, "copying": 1e9}
    sizes = dict(H=4, N=8, L=16, batch=2)
    *parts, whole = m.parts(2, rates, **sizes)
    assert [row[1] for row in parts] == ["convolution", "linear", "GELU", "LayerNorm"]
    assert all(re.fullmatch(r"\d x \S+ ms ± \d+%", row[2]) for row in parts)
    assert [row[3].split()[1] for row in parts] == ["FFT", "product"] + ["copying"] * 2
    assert whole[1] == "all of it" and not whole[3]
    rows = list(m.training(2, 0, **sizes, layers=1))
    assert [row[1] for row in rows][:2] == ["ours", "plain JAX"]
    assert all(rate > 0 for rate in m.limits(1).values())


# -- the recorder ---------------------------------------------------------------------


def begun(monkeypatch, *words):
    """The options of a measurement with a flag of its own, of a place, and --quick."""
    monkeypatch.setattr(sys, "argv", ["trial.py", *map(str, words)])
    flags = record.parser("a trial", "trial", "little")
    flags.add_argument("--turns", type=record.positive, default=7)
    flags.add_argument("--folder")
    return record.begin(flags, same=["folder"])


def test_a_rehearsal_writes_only_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "ASSETS", tmp_path / "assets")
    for words in (["--quick"], ["--turns", 2]):
        options = begun(monkeypatch, *words)
        assert record.once(options, "one", lambda: 3) == 3
        record.keep(options, found=3)
        record.keep_table(options, "a table")
        assert not list(tmp_path.iterdir())
    for words in ([], ["--turns", 7], ["--folder", "x"]):
        options = begun(monkeypatch, *words)
        assert options.file == tmp_path / "assets" / "trial.json"
        assert options.command == "python tests/measure/trial.py"
    file = tmp_path / "other.json"
    options = begun(monkeypatch, "--quick", "--turns", 2, "--output", file)
    file.write_text(json.dumps(dict(of="another measurement")))
    record.keep(options, found=np.float32(3))
    record.keep_table(options, "a table")
    saved = json.loads(file.read_text())
    assert saved["found"] == 3 and "of" not in saved
    assert saved["command"] == "python tests/measure/trial.py --quick --turns 2"
    assert "a table" in (tmp_path / "other.md").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stopped_measurement_goes_on_where_it_was(monkeypatch, tmp_path):
    calls, file = [], tmp_path / "trial.json"

    def work(name):
        calls.append(name)
        return [name, 1 / 3]

    options = begun(monkeypatch, "--output", file)
    record.once(options, "a", work, "a")
    with open(record.part(file), "a") as stream:
        stream.write('[{"command": "it was stopped he')
    for name in ("a", "b", "b"):
        assert record.once(options, name, work, name) == [name, 1 / 3]
    assert calls == ["a", "b"] and not file.exists()
    another = begun(monkeypatch, "--turns", 2, "--output", file)
    record.once(another, "a", work, "a")  # other turns, other numbers
    assert calls == ["a", "b", "a"]
    record.keep(options, found=1)
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]
    record.once(options, "a", work, "a")  # it had ended, and is measured anew
    assert len(calls) == 4


@pytest.mark.parametrize(
    "flag, value",
    [("--turns", "0"), ("--turns", "x"), ("--output", "."), ("--output", "a/b")],
)
def test_a_flag_is_refused_before_anything_is_measured(
    flag, value, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        begun(monkeypatch, flag, value)
    said = capsys.readouterr().err
    assert value in said and "allowed" in said


def test_scripts_have_their_help_without_docstrings():
    """python -OO strips them."""
    for path in (ROOT / "tests" / "measure").glob("*.py"):
        assert "__doc__" not in path.read_text(encoding="utf-8"), path


# -- the record -----------------------------------------------------------------------


def times(what, form):
    """How many times as long as ours a form took."""
    (row,) = (r for r in RECORD["table"] if r[0].startswith(what) and r[1] == form)
    return float(row[3])


def test_table_and_record_are_one():
    table = re.search(r"(?s)<!-- table -->\n(.*?)\n<!-- end -->", PAGE)[1]
    said, _, *lines = table.splitlines()
    assert said == RECORD["said"]
    assert lines[2:] == [f"| {' | '.join(row)} |" for row in RECORD["table"]]


def test_the_gains_are_as_the_words_say():
    long, short = (times(f"kernel, L = {L}", "plain sum") for L in ("4,096", "1,024"))
    assert long > short > 10
    assert times("memory", "plain sum") > 20
    step = "training step, 32 x 784, 4 layers"
    (plain,) = (r[3] for r in RECORD["table"] if r[:2] == [step, "plain JAX"])
    assert 1 < float(plain) < short / 2
    parts = [r for r in RECORD["table"] if r[0].startswith("in a block")]
    took = {r[1]: np.prod([float(x) for x in r[2].split(" ms")[0].split(" x ")])
            for r in parts}  # fmt: skip
    assert took["linear"] == max(v for k, v in took.items() if k != "all of it")
