"""A group of ranks as processes: a daemon that leads them, agents of other nodes, and what can befall them."""

import contextlib
import os
import pathlib
import select
import signal
import socket
import subprocess
import tempfile
import threading
import time

import client

# Ranks compute on one thread each: there are more of them than cores.
RANK_FLAGS = ['--engine', 'cpu', '--threads', '1', '--kv-cache-memory', '64MiB']


def ranks_of(parent: int) -> dict[int, int]:
    """The `latentd rank` processes that `parent` started: rank -> pid."""
    found = {}
    for entry in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError, IndexError):
            stat = (entry / 'stat').read_text().rpartition(')')[2].split()
            words = (entry / 'cmdline').read_bytes().decode().split('\0')
            if int(stat[1]) == parent and stat[0] != 'Z' and words[1] == 'rank':
                found[int(next(w for w in words if w.startswith('--rank=')).removeprefix('--rank='))] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


class Agent:
    """A running `latentd node`, as another machine would run it. A context manager."""

    def __init__(self, leader: str, node: int, *flags):
        self.log = tempfile.NamedTemporaryFile('w+', prefix='latentd-node-', suffix='.log')
        command = [client.BINARY, 'node', '--model', client.DEMO_MODEL, *RANK_FLAGS, '--leader', leader, '--node', node, *flags]
        # A process group of its own, as on another machine.
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                                        start_new_session=True)

    def ranks(self):
        return ranks_of(self.process.pid)

    def output(self) -> str:
        return pathlib.Path(self.log.name).read_text(errors='replace')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Group(client.Daemon):
    """`latentd serve` with ranks on its own node, and, for num_nodes > 1, room for agents."""

    def __init__(self, world_size: int, *flags, num_nodes=1, port=None):
        self.cluster_port = port or client.free_port()
        self.shape = ['--world-size', world_size, '--num-nodes', num_nodes]
        self.world_size = world_size
        super().__init__(*RANK_FLAGS, *self.shape, '--cluster-listen', f'127.0.0.1:{self.cluster_port}', *flags)

    def agent(self, node: int, *flags, port=None) -> Agent:
        return Agent(f'127.0.0.1:{port or self.cluster_port}', node, *self.shape, *flags)

    def ranks(self) -> dict[int, int]:
        return ranks_of(self.process.pid)

    def wait_recovered(self, formings: int, timeout=client.TIMEOUT):
        """Until the group has been formed `formings` times and serves."""
        client.eventually(lambda: self.metric('latentd_group_formings_total') >= formings and self.metric('latentd_group_formed') == 1,
                          timeout, f'{formings} formings; the daemon said:\n{self.output()[-3000:]}')


class Proxy:
    """Forwards TCP connections to a port of this machine until it is told to swallow what it gets: a partition.

    Nothing is closed then and nothing answers, as when a cable is pulled.
    """

    def __init__(self, target: int):
        self.target, self.broken, self.done = target, threading.Event(), threading.Event()
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.port = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self):
        while not self.done.is_set():
            if not select.select([self.listener], [], [], 0.05)[0]:
                continue
            accepted, _ = self.listener.accept()
            self.threads.append(threading.Thread(target=self._forward, args=(accepted,)))
            self.threads[-1].start()

    def _forward(self, near):
        with near:
            try:
                far = socket.create_connection(('127.0.0.1', self.target))
            except OSError:
                return
            with far:
                other = {near: far, far: near}
                while not self.done.is_set():
                    readable = select.select([near, far], [], [], 0.05)[0]
                    if self.broken.is_set():
                        time.sleep(0.05)
                        continue
                    try:
                        for ready in readable:
                            data = ready.recv(1 << 16)
                            if not data:
                                return
                            other[ready].sendall(data)
                    except OSError:
                        return

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.done.set()
        for thread in self.threads:
            thread.join()
        self.listener.close()


def kill(pid: int, number=signal.SIGKILL):
    os.kill(pid, number)
