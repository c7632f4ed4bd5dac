# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A folded article
#
# *What the pages fold, small enough for a test.*

# %% tags=["hide"] jupyter={"source_hidden": true}
from matplotlib.figure import Figure

FIGURES = {}


def figure(**knobs):
    """Mark a function as a figure."""

    def register(draw):
        FIGURES[draw.__name__] = draw
        return draw

    return register


# %% [markdown]
# ## Part 1: Lines
#
# Lines are plain.
#
# ### ★ Steep lines
#
# How a *slope* of $s$ looks to the eye. This is the rest of its first paragraph.
#
# A second paragraph.


# %%
@figure(slope=(1, 9), ends=["plain", "marked"])
def line(slope=2, ends="plain"):
    """A line through the origin, as steep as its slope says."""
    fig = Figure((8, 3))
    fig.subplots().plot([0, 1], [0, slope], "o-" if ends == "marked" else "-")
    return fig


# %% [markdown]
# Still inside.
#
# ### ★ Words alone
#
# It has no figure and no rest

# %%
print("printed inside")

# %% [markdown]
# ### Outside
#
# *Exercise: what is two and two, and its square?*

# %% tags=["answer"] jupyter={"source_hidden": true, "outputs_hidden": true}
# It is $2 + 2$, as
# the first line says.
#
# And the *second* says its square.
four = 2 + 2  # a comment of the code
print("the answer is", four)

# %% tags=["answer"] jupyter={"source_hidden": true, "outputs_hidden": true}
# No code at all.


# %% tags=["answer"] jupyter={"source_hidden": true, "outputs_hidden": true}
# A picture:
@figure()
def answered():
    """The answer as a line."""
    return line(4)


# %% [markdown]
# ## Part 2: The end
#
# Nothing is folded here.
