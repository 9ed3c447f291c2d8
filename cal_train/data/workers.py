"""Loader processes that a signal to the whole process group leaves at work, and that end with the process they serve.

Ctrl-C, Kubernetes, Docker and ``scancel --full`` signal every process of a run. The training process then finishes its
step, for which it still needs batches; PyTorch's workers would be gone.
"""

import os
import signal
import sys
import threading
from multiprocessing.context import BaseContext, ForkContext, ForkProcess

HELD_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PARENT_POLL_S = 1.0


class LoaderProcess(ForkProcess):
    """A process that SIGINT does not reach, and SIGTERM only from its parent."""

    def start(self) -> None:
        """Fork with both signals blocked, so that there is no moment at which one could end the child."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        """Work, beside a thread that looks after signals."""
        threading.Thread(target=_heed_parent, args=(os.getppid(),), daemon=True).start()
        super().run()


class LoaderContext(ForkContext):
    """What a DataLoader takes as ``multiprocessing_context`` to start such processes."""

    Process = LoaderProcess  # pyright: ignore[reportAssignmentType] (typeshed wants the very class)


def loader_context(num_workers: int) -> BaseContext | None:
    """Return the context of a DataLoader with so many workers; None, its default, where it has none or cannot fork.

    Systems other than Linux have no way to tell who sent a signal.
    """
    return LoaderContext() if num_workers and sys.platform == "linux" else None


def _heed_parent(parent: int) -> None:
    """End this process when its parent says so (a DataLoader that shuts down, Python at its exit) or is gone."""
    while os.getppid() == parent:
        received = signal.sigtimedwait(HELD_SIGNALS, PARENT_POLL_S)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
    os._exit(1)
