"""Commands in processes of their own that need no seconds for their imports.

``python -m tests.warm FD`` imports what the commands do, and waits on a socket. For each request it
forks a process, which is then a command like any other: with its own arguments, folder,
environment, standard streams and exit status. `start` is what the tests call. Whatever looks at
imports, terminals or the start of a process starts Python itself instead."""

import atexit
import functools
import gc
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = (  # the commands, and what they and their libraries import when it is needed
    "dact.cli.main",
    "dact.cli.stored",
    "dact.tuning.engine",
    "tests.killed",
    "alembic.command",
    "optuna.importance._fanova",
    "optuna.storages._rdb.models",
    "optuna.visualization.matplotlib",
    "pandas",
    "sklearn.ensemble",
    "tensorboard.plugins.hparams.summary_v2",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
)


class Process:
    """A process that `start` has started, with the methods of `subprocess.Popen` that the tests
    use."""

    def __init__(self, pid, status, stdin, stdout, stderr):
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode = None
        self._status = status

    def poll(self):
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.read())
            self._status.close()
        return self.returncode

    def wait(self, timeout=None):
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, text=None, timeout=None):
        """Do as `subprocess.Popen.communicate`."""
        said = {}

        def read(name, file):
            said[name] = file.read()

        files = {"stdout": self.stdout, "stderr": self.stderr}
        files = {name: file for name, file in files.items() if file is not None}
        readers = [threading.Thread(target=read, args=item, daemon=True) for item in files.items()]
        for reader in readers:
            reader.start()
        with self.stdin:
            self.stdin.write(text or "")
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader, file in zip(readers, files.values(), strict=True):
            reader.join(60)
            file.close()
        return said.get("stdout", ""), said.get("stderr", "")


def start(module, arguments, *, cwd, env, merged=False):
    """Start ``python -m MODULE ARGUMENTS``; with `merged`, errors go where its output goes."""
    ends = [os.pipe() for _ in range(4)]  # input, output, errors, and the exit status
    (input_end, text), (said, output_end), (complained, error_end), (exit_status, status_end) = ends
    given = [input_end, output_end, output_end if merged else error_end, status_end]
    request = {"module": module, "arguments": [*map(str, arguments)], "cwd": str(cwd), "env": env}
    connection = _server()
    socket.send_fds(connection, [json.dumps(request).encode()], given)
    pid = int(connection.recv(100))
    for end in {*given, error_end}:
        os.close(end)
    if merged:
        os.close(complained)
    errors = None if merged else open(complained)  # noqa: SIM115 - as subprocess leaves its pipes
    return Process(pid, open(exit_status), open(text, "w"), open(said), errors)


@functools.cache
def _server():
    """The socket to this process's server, which is started now and ends with this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.set_inheritable(theirs.fileno(), True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()
    atexit.register(process.kill)
    return ours


# ---------------------------------------------------------------------- the server


def serve(connection):
    """Fork a process for each request; return in the new process, with the request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever minds a command is not waited for
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 1_000_000, 4)
        if not message:
            os._exit(0)
        read, write = os.pipe()
        if os.fork():  # the server
            os.close(write)
            connection.send(os.read(read, 100))
            os.close(read)
            for fd in fds:
                os.close(fd)
            continue
        connection.close()  # whoever minds the command
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            for fd, target in zip(fds, (0, 1, 2), strict=False):
                os.dup2(fd, target)
            for fd in {*fds, read, write} - {0, 1, 2}:
                os.close(fd)
            return json.loads(message)
        os.write(write, str(pid).encode())
        os.close(write)
        for fd in {*fds[:3]} - {0, 1, 2}:
            os.close(fd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(fds[3], str(status).encode())
        os._exit(0)


def become(request):
    """Be the command that is asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv = [request["module"], *request["arguments"]]
    # By which Lightning and multiprocessing start more processes of the command.
    name = "dact.__main__" if request["module"] == "dact" else request["module"]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(name)
    if request["module"] == "dact":
        from dact.__main__ import main

        main()
    else:
        from tests import killed

        killed.run(*request["arguments"])


if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    # a collection in a forked process would copy the memory of everything that is imported
    gc.freeze()
    become(serve(socket.socket(fileno=int(sys.argv[1]))))
