"""Real processes for tests: trained together over gloo, stopped by signals, killed.

They come from a server that has imported everything once, or each would take seconds to begin.
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
    """Some processes of one run; what each said is in `folder`."""

    members: list[BaseProcess]
    folder: Path

    def wait(self, timeout=120):
        """Their exit codes; those that hang are ended, and the test fails."""
        for member in self.members:
            member.join(timeout)
        hung = [member.name for member in self.members if member.is_alive()]
        self.kill()
        assert not hung, f"{hung} hang\n{self.said()}"
        return [member.exitcode for member in self.members]

    def kill(self):
        for member in self.members:
            if member.is_alive():
                member.kill()
        for member in self.members:
            member.join()

    def said(self, rank=None):
        """What one of them, or all, wrote to stdout and stderr."""
        ranks = range(len(self.members)) if rank is None else [rank]
        return "".join((self.folder / f"{rank}.txt").read_text("utf-8") for rank in ranks)


def start(folder, function, *args, count=1, environment=None):
    """`count` processes that each call `function(*args)`, which their modules must have by name."""
    folder.mkdir(parents=True, exist_ok=True)
    together = {} if count == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    members = []
    for rank in range(count):
        variables = together | (environment or {})
        if count > 1:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            variables |= {name: str(number) for name, number in numbers.items()}
            variables |= {"LOCAL_WORLD_SIZE": str(count)}
        member = CONTEXT.Process(
            target=_enter, args=(folder / f"{rank}.txt", variables, function, args)
        )
        member.start()
        members.append(member)
    return Processes(members, folder)


def run(folder, function, *args, timeout=120, **kwargs):
    """The same, and wait for them: all must end well."""
    processes = start(folder, function, *args, **kwargs)
    codes = processes.wait(timeout)
    assert not any(codes), f"{codes}\n{processes.said()}"
    return processes


def _enter(path, variables, function, args):
    os.environ.update({"OMP_NUM_THREADS": "1", **variables})
    with path.open("w", encoding="utf-8", buffering=1) as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout = sys.stderr = said
        try:
            function(*args)
        except SystemExit:
            raise
        except BaseException:
            traceback.print_exc()
            said.flush()
            os._exit(1)


def owl2(*arguments):
    """The command, as in a process of its own."""
    from owl2.cli import main

    sys.argv = ["owl2", *arguments]
    main()


def _free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
