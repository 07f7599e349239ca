"""A `python` that is ready at once: what it is told to do is done by a fork of a process with the libraries imported.

A fresh interpreter takes seconds to import torch and transformers; tests that start many have most of their time there.
The packages of this repository are not among the imports: every fork makes its own. For what imports decide, and for
settings of the whole process (threads, the allocator), start `sys.executable` instead.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.makefile().read() or 1))
"""


@contextmanager
def ready_python() -> Iterator[Path]:
    """The path of an executable that takes `-m module`, `-c code` or a script, and their arguments."""
    with tempfile.TemporaryDirectory() as folder:
        address, python = os.path.join(folder, "socket"), Path(folder, "python")
        python.write_text(CLIENT.format(python=sys.executable, address=address))
        python.chmod(0o755)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.ready_python", address]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            try:
                yield python
            finally:
                server.kill()


def serve(address: str) -> list[str]:
    """In every fork: the words of its command, whose surroundings it has. The server itself does not return."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks that wait
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> list[str]:
    """Fork once more: one takes over the caller's surroundings, the other one tells the caller how that one ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asked = connection.makefile().read()
    child = os.fork()
    if child:
        for stream in (0, 1, 2, *streams):  # or a reader of the caller's would never see their end
            os.close(stream)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(status).encode())
        os._exit(0)
    connection.close()
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    (sys.executable, *words), folder, variables = json.loads(asked)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    paths = variables.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:2] = [path for path in paths if path]  # the server's: where it was started, and ROOT
    return words


def status_of(words: list[str]) -> int:
    """Do it; what the interpreter would say of an error is said."""
    try:
        _obey(words)
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _obey(words: list[str]) -> None:
    what, *sys.argv = words[1:] if words[0] == "-u" else words
    if what == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path.insert(0, "")
        code, sys.argv[0] = sys.argv[0], what
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv.insert(0, what)
        sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
        runpy.run_path(what, run_name="__main__")


def _import_libraries() -> None:
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.run  # noqa: F401
    from transformers import (  # noqa: F401 - which are imported when they are asked for
        AutoModelForCausalLM,
        AutoProcessor,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )


if __name__ == "__main__":
    _import_libraries()
    gc.freeze()  # what all forks share is not gone through, which would copy it
    found = status_of(serve(sys.argv[1]))
    atexit._run_exitfuncs()
    for printed in (sys.stdout, sys.stderr):
        printed.flush()
    os._exit(found)  # to take the libraries apart takes as long as to import them
