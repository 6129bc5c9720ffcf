"""A function in a process of its own, with a clock. It imports little: each process begins with it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial


def in_child(seconds: float, function: Callable[..., dict], *arguments) -> dict:
    """What a function returns, from a process that is ended, with all it started, when its seconds are over.

    Where it is ended or fails, that is ``{"reason": ...}``. Compilers have no clock of their own, and hang.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return {"reason": f"ended after {seconds:.0f} s"}
        found = here.recv()
        process.join(10)  # it may still write what it keeps
        return found
    except EOFError:
        process.join()
        return {"reason": f"its process ended with exit code {process.exitcode}"}
    finally:
        _end(process)
        here.close()


def _end(process) -> None:
    """The process and what it started: a compiler's workers outlive it otherwise. Its group has its own number."""
    for end in (partial(os.killpg, process.pid, signal.SIGKILL), process.kill):
        try:
            end()
        except ProcessLookupError:  # no group yet, or nobody left in it
            continue
    process.join()


def _child(there, function, arguments) -> None:
    os.setpgid(0, 0)
    try:
        found = function(*arguments)
    except RuntimeError as error:  # out of memory, mostly
        found = {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    there.send(found)
    there.close()
