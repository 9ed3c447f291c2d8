"""Loader workers and the signals that reach a whole process group."""

import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from cal_train.data.workers import loader_context

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs Linux")


class Slow(Dataset):
    """Rows that say which process read them."""

    def __len__(self):
        return 100

    def __getitem__(self, index):
        time.sleep(0.02)
        return index, os.getpid()


def loader(context):
    return iter(DataLoader(Slow(), batch_size=1, num_workers=2, multiprocessing_context=context))


def is_running(pid):
    try:
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def in_a_group_of_its_own(action):
    """Run ``action`` in a process that leads a group; return its exit code."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        try:
            action()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def signal_the_group_and_read_on(context, number):
    signal.signal(number, lambda *_: None)
    batches = loader(context)
    next(batches)
    os.kill(signaller(os.getpgrp(), number), 0)
    rest = [int(index) for index, _ in batches]
    assert rest == list(range(1, 100))


def signaller(group, number):
    """Let another process, which is no parent of the workers, signal the group."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(pid, 0)
    return os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_group_leaves_the_workers_at_work(number):
    assert in_a_group_of_its_own(lambda: signal_the_group_and_read_on(loader_context(2), number)) == 0


def test_without_the_context_sigterm_to_the_group_would_end_them():
    assert in_a_group_of_its_own(lambda: signal_the_group_and_read_on(None, signal.SIGTERM)) == 1


def test_a_signal_while_the_workers_start_reaches_only_the_parent():
    def start_often():
        seen = []
        signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        for _ in range(3):
            if (pid := os.fork()) == 0:
                parent = os.getppid()
                os.setpgid(0, 0)
                while os.getppid() == parent:
                    os.killpg(parent, signal.SIGTERM)
                    time.sleep(0.001)
                os._exit(0)
            assert len([next(loader(loader_context(2))) for _ in range(3)]) == 3
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert seen

    assert in_a_group_of_its_own(start_often) == 0


def test_workers_end_soon_after_a_parent_that_was_killed():
    read, write = os.pipe()

    def be_killed():
        pids = [int(pid) for _, (pid,) in zip(range(2), (row[1:] for row in loader(loader_context(2))), strict=False)]
        os.write(write, " ".join(map(str, pids)).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_group_of_its_own(be_killed) == -signal.SIGKILL
    workers = [int(pid) for pid in os.read(read, 100).split()]
    assert len(set(workers)) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_a_worker_ends_when_its_parent_terminates_it():
    batches = loader(loader_context(2))
    next(batches)
    worker = batches._workers[0]
    worker.terminate()  # as Python does with what is left at its exit
    worker.join(5)
    assert worker.exitcode == 0
