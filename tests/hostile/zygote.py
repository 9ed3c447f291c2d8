"""A server that runs verbs of the program in forked children with limits, and says what each child did.

It reads one request per line from standard input and writes one answer per line: both JSON. A child starts in about
10 ms, as everything is imported already (threads that imports start are idle, and hold no lock). It has a limit on its
memory and its time, an audit hook that notes every file that Python opens and every connection, and a watch of the
kernel on folders that nothing may open, which also sees files that are opened by libraries in other languages.
"""

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path

VERBS = ("check_data", "train", "score", "convert", "merge", "compose", "testing")
_IN_OPEN, _IN_ACCESS, _IN_NONBLOCK = 0x20, 0x1, 0o4000


def memory_kib(field):
    """Return a field of /proc/self/status in KiB: VmRSS, VmHWM (its highest value), VmSize."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def watch(folders):
    """Return a descriptor that becomes readable when a file in one of the folders is opened."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(_IN_NONBLOCK)
    for folder in folders:
        if libc.inotify_add_watch(descriptor, os.fsencode(folder), _IN_OPEN | _IN_ACCESS) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")
    return descriptor


def run_verb(request):
    """Run the verb in this process, which is a child; return the answer."""
    forbidden = watch(request["forbidden"])
    opened, connected = set(), set()
    is_recording = True

    def note(event, arguments):
        if not is_recording:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            opened.add(os.path.realpath(os.fsdecode(arguments[0])))
        elif event == "socket.connect":
            connected.add(repr(arguments[1]))

    before = memory_kib("VmRSS")
    limit = memory_kib("VmSize") * 1024 + request["max_memory"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + request["max_seconds"],) * 2)
    sys.addaudithook(note)
    crash = ""
    try:
        code = importlib.import_module("cal_train.cli.main").main(request["arguments"])
    except SystemExit as error:
        code = error.code
    except BaseException:
        code, crash = -1, traceback.format_exc()
    is_recording = False
    sys.stdout.flush()
    sys.stderr.flush()
    seen = bool(select.select([forbidden], [], [], 0)[0])
    return {
        "code": code,
        "crash": crash,
        "grown_mib": (memory_kib("VmHWM") - before) / 1024,
        "opened": sorted(opened),
        "connected": sorted(connected),
        "forbidden_was_opened": seen,
    }


def child(request, folder):
    """Run a request with standard output and error in files, and write its answer to a third."""
    os.chdir(folder)
    os.setsid()
    sys.stdin = open(os.devnull)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="strict")
    answer = run_verb(request)
    (folder / "answer").write_text(json.dumps(answer))


def serve(request, folder):
    """Fork a child for a request and wait for it; return its answer with what it printed."""
    started = time.monotonic()
    (folder / "answer").unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        try:
            child(request, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    is_late = False
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() - started > 6 * request["max_seconds"]:  # other processes share the machine
            is_late = True
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            break
        time.sleep(0.005)
    answer = {"code": -9, "crash": "the process was killed", "grown_mib": 0.0, "opened": [], "connected": []}
    if (folder / "answer").is_file():
        answer = json.loads((folder / "answer").read_text())
    printed = {name: (folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")}
    return answer | printed | {"is_late": is_late, "seconds": time.monotonic() - started}


def main():
    """Serve until standard input ends."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may stand between the answers
    for verb in VERBS:
        importlib.import_module("cal_train.testing" if verb == "testing" else f"cal_train.cli.{verb}")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line), folder)), file=answers, flush=True)
    os._exit(0)  # the interpreter would take seconds to take down what was imported


if __name__ == "__main__":
    main()
