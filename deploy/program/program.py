"""Entry point of the executables that need no Python: `metquay-proxy`, and `metquay-proxyw`, which opens no window.

`metquay-proxy.spec` says what they hold. Owns only what a program lacks that is started by a double click or by Task
Scheduler: somewhere to print to, and time to read. Must not know a command or a setting.

Facts: PyInstaller starts a program without a window without standard streams, as pythonw does, and shows an exception
that nobody catches in a dialog that somebody must close. GetConsoleProcessList counts the programs that share a
console: where there is one, the console was opened for it, and closes with it. Session 0 is that of services.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

LOG = Path("logs/proxy.log")
"""Where output goes without a window, in the current directory."""
PREVIOUS = LOG.with_name("previous.log")
"""What was ``LOG`` until it was too large."""
LARGEST = 4 << 20
"""Bytes of ``LOG`` from which on the next start begins a new one."""


def print_to_log() -> None:
    """Have all output appended to ``LOG``; where that can't be written, output is lost and the program goes on."""
    with contextlib.suppress(OSError):  # there is none, or another program has it open
        if LOG.stat().st_size >= LARGEST:
            LOG.replace(PREVIOUS)
    try:
        LOG.parent.mkdir(exist_ok=True)
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o600)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    while log < 2:  # noqa: PLR2004 - standard error
        log = os.dup(log)  # takes the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(log, number)
        setattr(sys, name, open(number, "w", buffering=1, encoding="utf-8", closefd=False))  # noqa: SIM115 - to the end


def window_will_close() -> bool:
    """Whether a double click opened a console for this program, which closes before anybody has read what is there."""
    if sys.platform != "win32" or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    import ctypes  # noqa: PLC0415 - only Windows pays for loading it

    kernel, session = ctypes.windll.kernel32, ctypes.c_uint()
    kernel.ProcessIdToSessionId(os.getpid(), ctypes.byref(session))
    return session.value != 0 and kernel.GetConsoleProcessList((ctypes.c_uint * 2)(), 2) == 1


def main() -> int:
    """Run what was asked for; return the exit code."""
    if Path(sys.executable).stem.casefold() == "metquay-proxyw":
        print_to_log()
        try:
            return run()
        except Exception:  # noqa: BLE001 - whatever it is, nobody may be there to close a dialog
            traceback.print_exc()
            return 1
    code = run()
    if code and window_will_close():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input("Press Enter to close this window.")
    return code


def run() -> int:
    """Run the command."""
    from metquay_proxy.cli import main  # noqa: PLC0415 - whose failure to load belongs into the log, too

    return main()


if __name__ == "__main__":
    sys.exit(main())
