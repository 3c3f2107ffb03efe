"""`python -m registry.cli.child PARENT NICENESS COMMAND...`: becomes COMMAND, which dies when PARENT does (Linux).

A program of its own rather than `preexec_fn`, which may deadlock in a process that has threads. The kernel keeps the
death signal over exec, so COMMAND carries it from its first instruction on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, niceness, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before we asked the kernel to tell us
        sys.exit(1)
    os.nice(int(niceness))
    os.execvp(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main(sys.argv[1:])
