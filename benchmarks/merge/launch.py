"""Run a command and print what it took, as JSON: `python -I -S launch.py LOG SECONDS COMMAND ...`.

A process of its own, and a small one: Linux counts the memory of the process that starts a command into the command's
peak, up to the moment of its start.
"""

import json
import os
import signal
import sys
import time


def main() -> None:
    """Run the command, with its output in a log; it is killed after so many seconds."""
    log, limit, *command = sys.argv[1:]
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    actions = [(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)]
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=actions)
    late = []

    def stop(*_: object) -> None:
        late.append(True)
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, float(limit))
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    signal.setitimer(signal.ITIMER_REAL, 0)
    found = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "code": os.waitstatus_to_exitcode(status),
        "late": bool(late),
    }
    sys.stdout.write(json.dumps(found))


main()
