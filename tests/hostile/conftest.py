"""The corpus beside this file is plain modules; tests find them on the path, as they are no package."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hostile_world import build_world

import cal_train

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Outcome:
    """What a verb did: see `zygote.run_verb`."""

    code: int
    crash: str
    grown_mib: float
    opened: list[str]
    connected: list[str]
    stdout: str
    stderr: str
    is_late: bool
    seconds: float
    forbidden_was_opened: bool = False


class Attacker:
    """Runs verbs in children of one server, and checks of each what must hold for any input."""

    def __init__(self, folder):
        self.folder, self.world = folder, None
        environment = {
            **os.environ,
            **{name: str(folder / "caches") for name in ("HF_HOME", "TMPDIR", "XDG_CACHE_HOME")},
            **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"},
        }
        (folder / "caches").mkdir(parents=True)
        command = [sys.executable, "-P", str(Path(__file__).with_name("zygote.py")), str(folder)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def answer(self):
        """Return the server's next line."""
        line = self.server.stdout.readline()
        assert line, "the server of the hostile corpus ended"
        return line.strip()

    def __call__(self, *arguments, max_mib=400, max_seconds=30):
        """Return the outcome of a verb, having checked that it ended by itself, in bounds, and read nothing outside."""
        request = {
            "arguments": [str(argument) for argument in arguments],
            "forbidden": [str(self.world.outside)],
            "max_memory": (max_mib + 3000) * _MEBIBYTE,  # address space: libraries reserve far more than they use
            "max_seconds": max_seconds,
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        outcome = Outcome(**json.loads(self.answer()))
        assert not outcome.is_late, f"hangs: {arguments}\n{outcome.stderr[-2000:]}"
        assert not outcome.crash, f"{arguments}\n{outcome.crash[-3000:]}\n{outcome.stderr[-1000:]}"
        assert outcome.grown_mib <= max_mib, f"{outcome.grown_mib:.0f} MiB for {arguments}"
        assert not outcome.forbidden_was_opened, f"a file outside the roots was opened: {arguments}\n{outcome.stderr}"
        assert not outcome.connected, f"{arguments} connected to {outcome.connected}"
        foreign = [path for path in outcome.opened if not self._may_open(path)]
        assert not foreign, f"{arguments} opened {foreign}"
        for text in (outcome.stdout, outcome.stderr):
            assert self.world.secret not in text, f"{arguments} printed what stands outside the roots"
        return outcome

    def refused(self, *arguments, names, **limits):
        """Return the outcome of a verb that must end with 2 and one message that holds one of ``names``."""
        outcome = self(*arguments, **limits)
        assert outcome.code == 2, f"{arguments} ended with {outcome.code}\n{outcome.stderr[-2000:]}{outcome.stdout}"
        message = outcome.stderr[outcome.stderr.rfind("error:") :]
        assert message.startswith("error:") and any(str(name) in message for name in names), (names, message[-2000:])
        assert "Traceback" not in outcome.stderr, outcome.stderr[-3000:]
        return outcome

    def _may_open(self, path):
        package = Path(cal_train.__file__).parent
        installed = (package, package.with_name("cal_train.egg-info"))
        code = (Path(__file__).parent, *installed, sys.prefix, sys.base_prefix)
        roots = (*code, self.world.inside, self.folder)
        is_ours = any(Path(path).is_relative_to(os.path.realpath(root)) for root in roots)
        # what Python's and torch's own start-up looks at; environ, maps and mem are not among it
        is_system = path.startswith(("/usr/", "/etc/mime", "/sys/", "/dev/null", "/dev/urandom", "/dev/shm/"))
        return (
            is_ours
            or is_system
            or Path(path).name in ("cpuinfo", "meminfo", "stat", "status", "mounts", "cgroup", "statm")
        )


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The tiny model, data and run folders that the corpus makes hostile copies of; see `hostile_world`."""
    return build_world(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def attack(request, tmp_path_factory):
    """``attack(verb, *arguments)`` and ``attack.refused(verb, *arguments, names=...)``, see `Attacker`."""
    attacker = Attacker(tmp_path_factory.mktemp("server"))
    with attacker.server:  # its end closes the server's standard input, which ends the server
        attacker.world = request.getfixturevalue("world")  # made while the server imports
        assert attacker.answer() == "ready"
        yield attacker
