"""What notebooks/rebuild.ipynb is made of: the path of the article, to be filled in.

TASKS names the functions whose bodies are taken out, in the order of the article, and
says in a sentence what to write. Signature, decorators and docstring stay.
"""

import ast
import textwrap

import nbformat

from render.article import STARRED, at_headings, names, only_defines

BEGIN, END = "## Part 1:", "## Part 11:"  # the first part that is whole; the one after

ABOUT = """# Rebuild S4D

This is the path of *The Annotated S4D*, from a spring to a model, without the bodies
of twelve functions. Run it from the top, cell by cell; it needs JAX, Flax, SciPy,
Matplotlib and no other file. A cell that ends with `NotImplementedError` names a
function and says what to write: write it in the place of that line, run its cell, and
run the cell that asked once more. The checks beneath say whether yours is right: they
print how far two views of the same system are apart, and stop where that is too far.
Whoever is lost finds each body in the article, in the same place."""

TASKS = {
    "ssm_discretize": "for zoh take A_bar and B_bar out of the exponential of dt times "
    "the matrix with the rows (A, B) and (0, 0), for bilinear solve with I - dt/2 A",
    "ssm_recurrence": "let jax.lax.scan carry x = A_bar x + B_bar u_k through u, from "
    "x0 or zeros, and return all y_k = C x and the last x",
    "ssm_kernel": "return the K_l = C A_bar^l B_bar for l = 0 ... L-1: what the "
    "recurrence answers to the input 1, 0, 0, ...",
    "phi": "return expm1(z) / z, but where |z| is small the series 1 + z/2 + z^2/6 + "
    "...; jnp.where looks at both, so keep z = 0 out of the quotient",
    "vandermonde_kernel": "discretize, raise each A_bar to the powers 0 ... L-1, and "
    "return twice the real part of the sum of C B_bar A_bar^l over the modes",
    "causal_conv": "multiply sample l of u and of K by w^l with w = exp(i pi / 2L), "
    "convolve on the circle by FFT, turn back, and keep the real part",
    "mode_sum": "make two tables of powers, for the multiples g b and for the j below "
    "b, and add their products over the modes, the weights 2 W in one of the tables",
    "s4d_scan.combine": "return the pair (a, v) of the step that takes the first step "
    "and then the second, with a2 as a2.astype(v1.dtype) where it meets v1",
    "hippo_legs": "return A and B of LegS by the formulas above: B_n = sqrt(2n + 1), A "
    "with -B_n B_k below the diagonal, -(n + 1) on it and zeros above",
    "s4d_step": "discretize, take one step of the recurrence with pole_rest for what "
    "A_bar has lost by rounding, and return the new x and y = 2 Re of the sum of C x",
    "S4D.__call__": "admit u, convolve its channels, time last, with the kernels of "
    "its length, leave by self.leave, and return that masked after the rows' ends",
    "state_after": "let the old state fade for lengths[i] steps, and add B_bar times "
    "the sum of the samples of row i, each faded by the steps that come after it",
}


def functions(tree, before=""):
    """Yield each function in a tree, after those inside it, with its full name."""
    for node in ast.iter_child_nodes(tree):
        kinds = ast.FunctionDef, ast.ClassDef
        name = f"{before}.{node.name}".strip(".") if isinstance(node, kinds) else before
        yield from functions(node, name)
        if isinstance(node, ast.FunctionDef):
            yield name, node


def request(name, indent):
    """The lines that ask for a body."""
    call, said = " " * indent + "raise NotImplementedError(", f"{name}: {TASKS[name]}"
    *lines, last = textwrap.wrap(said, 80 - indent)
    inner = [" " * (indent + 4) + f'"{line} "' for line in lines]
    return [call, *inner, " " * (indent + 4) + f'"{last}"', " " * indent + ")"]


def without_bodies(source):
    """A cell, each of TASKS in it without its body."""
    lines = source.split("\n")
    for name, node in reversed(list(functions(ast.parse(source)))):
        if name in TASKS:
            words, first = ast.get_docstring(node), node.body[0]
            start = first.end_lineno if words else first.lineno - 1
            start += not lines[start]  # an empty line stays
            lines[start : node.end_lineno] = request(name, first.col_offset)
    return "\n".join(lines)


def cells_of_path(notebook):
    """The cells of the path, and of its starred sections those that define something.

    Returns pairs, a cell and the number of its starred section, None on the path. Of
    the opening only code is taken, and what explains it. A figure that is drawn later,
    by what comes after the path, is left out.
    """
    found, section, count, begun = [], None, 0, False
    for cell in notebook.cells:
        kept, of_code = [], cell.cell_type == "code"
        for piece in [] if of_code else at_headings(cell.source):
            if piece.startswith(END):
                return found
            if piece.startswith("#"):
                count += 1
                section = count if STARRED.match(piece) else None
            begun = begun or piece.startswith(("###", BEGIN))
            kept += [piece] if begun and section is None else []
        if not of_code:
            cell.source = "".join(kept).rstrip()
        promised = "@figure(later=True)" in cell.source
        works = of_code and not only_defines(cell.source)
        if cell.source and not promised and not (section and works):
            found.append((cell, section))
    raise ValueError(f"the article has no {END}")


def needed(cells):
    """None, and the numbers of starred sections that the path does not run without."""
    code = [(names(c.source), of) for c, of in cells if c.cell_type == "code"]
    kept, more = set(), {None}
    while more:
        kept |= more
        uses, binds = (
            set().union(*(n[i] for n, of in code if of in kept)) for i in (0, 1)
        )
        more = {of for n, of in code if of not in kept and n[1] & (uses - binds)}
    return kept


def rebuilt(notebook):
    """The notebook to be filled in, made of that of the article."""
    cells = cells_of_path(notebook)
    kept = needed(cells)
    notebook.cells = [cell for cell, section in cells if section in kept]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = without_bodies(cell.source)
    about = nbformat.v4.new_markdown_cell(ABOUT, id="about")
    notebook.cells.insert(0, about)
    return notebook
