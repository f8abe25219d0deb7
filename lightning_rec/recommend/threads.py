"""Small work on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Runs torch on the calling thread alone.

    A pass of one user through a user tower is dozens of products that each take microseconds. Shared among threads,
    each of them ends in a meeting of all threads, and on a busy machine such a meeting waits for the operating system:
    milliseconds each. The number of threads is set for the calling thread only (and for threads that begin meanwhile).

    Args:
        wanted: False leaves everything as it is.
    """
    before = torch.get_num_threads()
    if not wanted or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
