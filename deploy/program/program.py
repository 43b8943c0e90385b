"""What the executables run that need no Python: `metquay-proxy`, and `metquay-proxyw`, which opens no window.

`metquay-proxy.spec` says what they hold. Owns only what a program lacks that is started by a double click or by the
Task Scheduler: somewhere to print to, and time to read. Must not know a command or a setting.

Facts: PyInstaller starts a program for windows without standard streams, as pythonw does. GetConsoleProcessList counts
the programs that share a console: where there is one, the console was opened for it, and closes with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

LOG = Path("logs/proxy.log")
"""What is printed without a window, in the current directory."""
PREVIOUS = LOG.with_name("previous.log")
"""What was printed by the run before."""


def print_to_log() -> None:
    """Have what is printed appended to ``LOG``; where it can't be written, it is lost, and the program goes on."""
    with contextlib.suppress(OSError):  # there was no run before, or that one still has the file open
        LOG.replace(PREVIOUS)
    try:
        LOG.parent.mkdir(exist_ok=True)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    spare = log
    while spare < 2:  # noqa: PLR2004 - standard error
        spare = os.dup(log)  # takes the lowest number that is free
    for number in (1, 2):
        os.dup2(spare, number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", closefd=False))  # noqa: SIM115 - for as long as we run


def has_console_alone() -> bool:
    """Whether a double click opened a console for this program: it closes before anybody has read what is there."""
    if sys.platform != "win32":
        return False
    import ctypes  # noqa: PLC0415 - only Windows pays for loading it

    return ctypes.windll.kernel32.GetConsoleProcessList((ctypes.c_uint * 2)(), 2) == 1


def main() -> int:
    """Run what was asked for; return the exit code."""
    without_window = Path(sys.executable).stem == "metquay-proxyw"
    if without_window:
        print_to_log()
    from metquay_proxy.cli import main as run  # noqa: PLC0415 - prints as soon as it is loaded, where it can't be

    code = run()
    if code and not without_window and has_console_alone():
        input("Press Enter to close this window.")
    return code


if __name__ == "__main__":
    sys.exit(main())
