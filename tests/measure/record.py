"""What all measurements share: where the article lies, two flags, and one way to keep
what was found: with its command, date, versions and device, whole or not at all. What
takes long is done piece by piece; a run that was stopped goes on where it was."""

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


def parser(what, name, quick=None):
    """A parser with the flags that measurements share; NAME.json in assets is the
    record. `quick` says what a rehearsal does, where there is a short one."""
    flags = argparse.ArgumentParser(prog=f"python tests/measure/{name}.py")
    flags.description = f"{what}. A rehearsal, which is a run with any flag that "
    flags.description += "changes what is measured, writes only to --output."
    if quick:
        flags.add_argument("--quick", action="store_true", help=f"rehearse: {quick}")
    file = ASSETS / f"{name}.json"
    output = f"where the record is kept (assets/{file.name})"
    flags.add_argument("--output", type=Path, metavar="FILE", help=output)
    flags.set_defaults(file=file)
    return flags


def positive(word):
    """A flag's whole number, one or more."""
    if not word.isdecimal() or int(word) < 1:
        allowed = "allowed: a whole number, one or more"
        raise argparse.ArgumentTypeError(f"{word!r}; {allowed}")
    return int(word)


def begin(flags, same=()):
    """Parse the flags; `same` names those that do not change what is measured.

    Returns them with `file`, the record, None for a rehearsal that has no --output, and
    with `command`, which the record says.
    """
    options = flags.parse_args()
    command = flags.prog
    output = options.output
    for name, value in vars(options).items():
        if name not in ("output", *same) and value != flags.get_default(name):
            command += f" --{name}" + f" {value}" * (value is not True)
    options.command = command
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        flags.error(f"--output {output}; allowed: a file, in a folder that exists")
    options.file = output or (options.file if command == flags.prog else None)
    return options


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
def changed(file, command, anew=False):
    """What a record holds, to be changed, or nothing if it is made anew. It is written
    whole, or not at all, and two processes may do so at once."""
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        everything = ({} if anew else read(file)) | made_with(command)
        yield everything
        new = file.with_suffix(".new")
        text = json.dumps(everything, indent=1, default=float, ensure_ascii=False)
        new.write_text(text + "\n", encoding="utf-8")
        os.replace(new, file)
    finally:
        os.close(folder)  # and with it the lock


def part(file):
    """Where the pieces of a record are until all of them are done."""
    return file.with_name(file.name + ".part")


def once(options, name, work, *arguments):
    """Do a piece of a measurement and return what it found. What a stopped run has done
    with the same command, versions and device is not done again."""
    log(name)
    if options.file is None:
        return work(*arguments)
    made = made_with(options.command)
    del made["date"]
    lines = []
    if part(options.file).exists():
        lines = part(options.file).read_text(encoding="utf-8").splitlines()
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # it was stopped as it wrote
            *piece, found = json.loads(line)
            if piece == [made, name]:
                return found
    text = json.dumps([made, name, work(*arguments)], default=float)
    with open(part(options.file), "a", encoding="utf-8") as stream:
        stream.write(f"\n{text}\n")  # after half a line begins a new one
    return json.loads(text)[-1]


def keep(options, **found):
    """Write a record anew; a rehearsal without --output keeps nothing."""
    if options.file is not None:
        with changed(options.file, options.command, anew=True) as everything:
            everything |= found
        part(options.file).unlink(missing_ok=True)


def keep_table(options, text):
    """Put a table beside the record, into NAME.md, between the two marks there."""
    if options.file is None:
        return
    file = options.file.with_suffix(".md")
    page = "<!-- table -->\n\n<!-- end -->\n"
    if file.exists():
        page = file.read_text(encoding="utf-8")
    marks = r"(?s)(<!-- table -->\n).*?(\n<!-- end -->)"
    page = re.sub(marks, lambda found: found[1] + text + found[2], page)
    file.write_text(page, encoding="utf-8")


def log(line):
    """Say on stderr how far it is."""
    print(line, file=sys.stderr, flush=True)
