"""What all measurements share: where the article lies, two flags, and one way to keep
what was found: with its command, date, versions and device, whole or not at all."""

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ASSETS = ROOT / "assets"
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]


def parser(what, name):
    """The flags that every measurement has; NAME.json in assets is its record."""
    flags = argparse.ArgumentParser(description=what)
    quick = "a rehearsal: little of it, and nothing is written but to --output"
    flags.add_argument("--quick", action="store_true", help=quick)
    output = f"where the record is kept (assets/{name}.json)"
    flags.add_argument("--output", type=Path, metavar="FILE", help=output)
    return flags


def place(options, name):
    """The file of a record; None for a rehearsal."""
    return options.output or (None if options.quick else ASSETS / f"{name}.json")


def made_with(command):
    """Where numbers come from."""
    import flax
    import jax

    return dict(
        command=command,
        date=datetime.date.today().isoformat(),
        versions=dict(
            python=platform.python_version(), jax=jax.__version__, flax=flax.__version__
        ),
        device=f"{jax.devices()[0]}, {os.cpu_count()} cores",
    )


def read(file):
    """What a record holds so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@contextlib.contextmanager
def changed(file, command):
    """What a record holds, to be changed. It is written whole, or not at all, and two
    processes may do so at once."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        everything = read(file) | made_with(command)
        yield everything
        new = file.with_suffix(".new")
        text = json.dumps(everything, indent=1, default=float, ensure_ascii=False)
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, file)
    finally:
        os.close(folder)  # and with it the lock


def keep(file, command, **found):
    """Write a record anew; a rehearsal, whose file is None, keeps nothing."""
    if file is not None:
        with changed(file, command) as everything:
            everything |= found


def keep_table(name, text):
    """Put a table into NAME.md in assets, between the two marks there."""
    file = ASSETS / f"{name}.md"
    marks = r"(?s)(<!-- table -->\n).*?(\n<!-- end -->)"
    page = file.read_text(encoding="utf-8")
    page = re.sub(marks, lambda found: found[1] + text + found[2], page)
    file.write_text(page, encoding="utf-8")


def log(line):
    """Say on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)
