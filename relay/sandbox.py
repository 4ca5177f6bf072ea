"""What the process gives up, and how it is called, before it serves anyone."""

import logging
from importlib import import_module

logger = logging.getLogger("relay.sandbox")

PROCESS_NAME = "firezone-relay"  # the kernel keeps 15 bytes


def enter() -> None:
    """Name the process and give up gaining privileges by exec, for good.

    Both are settings of the calling thread that threads inherit: call it before any
    thread is started. A system without them is served all the same, with a warning.
    """
    name_thread(PROCESS_NAME)
    _prctl("set_no_new_privs", 1)


def name_thread(name: str) -> None:
    """Call the calling thread *name*, as ``ps -L`` and ``top -H`` show it."""
    _prctl("set_name", name)


def _prctl(function: str, argument: object) -> None:
    try:
        # A C extension: on a kernel or libc it was not built for, anything can come of it.
        getattr(import_module("prctl"), function)(argument)
    except Exception as error:  # noqa: BLE001
        logger.warning("prctl %s: %s", function, error)
