"""How the C library keeps memory. These settings are of the whole process."""

import ctypes


def set_allocator(*settings):
    """Set options of glibc's allocator, numbers and values. Does nothing elsewhere.

    Returns a function that gives unused memory back to the system.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda _: None
    for option, value in settings:
        mallopt(option, value)
    return trim


def keep_memory():
    """Let glibc keep freed memory for the next step. Call it before JAX computes.

    Work on large arrays uses and frees much memory, and the C library gives freed
    memory back to the system, to fetch it again, page by page and filled with zeros, a
    moment later. A thread that has begun keeps its own place, so ask before JAX starts
    any.
    """
    # one arena, no array mapped apart, never trim, grow by 256 MB
    set_allocator((-8, 1), (-4, 0), (-1, -1), (-2, 2**28))
