import shutil
import subprocess
import sys
import pathlib

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import client  # noqa: E402


@pytest.fixture(scope='session', autouse=True)
def stubs():
    yield
    client.remove_stubs()


@pytest.fixture(scope='session')
def shared_daemon():
    """One daemon on the demo model with default limits, for tests that leave it as it was."""
    with client.Daemon() as daemon:
        yield daemon.wait_ready()
        # Whatever the tests did to it, it ends as it should.
        daemon.signal()
        assert daemon.wait() == 0, daemon.output()


@pytest.fixture
def daemon(shared_daemon):
    assert shared_daemon.process.poll() is None, f'the daemon died:\n{shared_daemon.output()[-5000:]}'
    yield shared_daemon
    assert shared_daemon.process.poll() is None, f'the daemon died:\n{shared_daemon.output()[-5000:]}'


@pytest.fixture
def tool():
    """Finds a client program that scripts/setup --tools installs, and runs it."""

    def run(name, *arguments, code=0, **options):
        program = shutil.which(name)
        if not program:
            pytest.skip(f'{name} is missing')
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=client.TIMEOUT, **options)
        if code is not None:
            assert done.returncode == code, f'{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
        return done

    return run
