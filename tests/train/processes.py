"""Real processes for tests: trained together over gloo, stopped by signals, killed.

A fork server imports everything once, because each import takes seconds.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.preloaded"])

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@dataclass
class Processes:
    """The processes of one run; their output is in `folder`."""

    members: list[BaseProcess]
    folder: Path

    def wait(self, timeout=120):
        """Their exit codes. The test fails if a process does not end."""
        for member in self.members:
            member.join(timeout)
        hung = [member.name for member in self.members if member.is_alive()]
        self.kill()
        assert not hung, f"{hung} did not end\n{self.output()}"
        return [member.exitcode for member in self.members]

    def kill(self):
        for member in self.members:
            if member.is_alive():
                member.kill()
        for member in self.members:
            member.join()

    def output(self, rank=None):
        """The stdout and stderr of one process, or of all."""
        ranks = range(len(self.members)) if rank is None else [rank]
        return "".join((self.folder / f"{rank}.txt").read_text("utf-8") for rank in ranks)


def start(folder, function, *args, count=1, environment=None):
    """Start `count` processes that call `function(*args)`, a top-level function of a module."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = dict(environment or {})
    if count > 1:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        variables |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    members = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        member = CONTEXT.Process(
            target=_enter, args=(folder / f"{rank}.txt", variables | ranks, function, args)
        )
        member.start()
        members.append(member)
    return Processes(members, folder)


def run(folder, function, *args, timeout=120, **kwargs):
    """Start the processes and wait for them; all must succeed."""
    processes = start(folder, function, *args, **kwargs)
    codes = processes.wait(timeout)
    assert not any(codes), f"{codes}\n{processes.output()}"
    return processes


def _enter(path, variables, function, args):
    os.environ.update({"OMP_NUM_THREADS": "1", **variables})
    with path.open("w", encoding="utf-8", buffering=1) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        sys.stdout = sys.stderr = output
        try:
            function(*args)
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            output.flush()
            os._exit(1)


def owl2(*arguments):
    """Run the command line, as in a separate process."""
    from owl2.cli import main

    sys.argv = ["owl2", *arguments]
    main()


def _free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
