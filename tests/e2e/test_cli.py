"""`latentd chat` and `latentd bench serve` through pipes and a terminal, as a user meets them."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from client import BINARY, ROOT, TIMEOUT, golden, run


def answer_of(name):
    return golden(name)[1]['text']


def test_help_names_the_commands():
    done = run('--help')
    assert done.returncode == 0
    for command in ('serve', 'chat', 'batch', 'bench', 'check'):
        assert re.search(rf'^\s+{command}\b', done.stdout, re.M)
        assert run(command, '--help').returncode == 0


def test_version():
    done = run('--version')
    assert done.returncode == 0 and '0.1.0' in done.stdout


def test_the_readme_lists_every_configuration_key():
    done = subprocess.run([sys.executable, 'scripts/make_config_table.py', '--check', str(BINARY)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_unknown_command_is_a_usage_error():
    done = run('sing')
    assert done.returncode not in (0, -6, -11) and 'sing' in done.stdout + done.stderr


def test_each_node_has_its_command():
    refused = run('serve', '--world-size', 4, '--num-nodes', 2, '--node', 1, '--leader', '127.0.0.1:1')
    assert refused.returncode == 2 and 'node is 1; the daemon is on node 0' in refused.stderr
    refused = run('node', '--world-size', 4, '--num-nodes', 2)
    assert refused.returncode == 1 and 'node is 0' in refused.stderr


def test_chat_answers_a_message(daemon):
    done = run('chat', '--target', daemon.address, '--temperature', '0', 'What is MLA?')
    assert (done.returncode, done.stdout) == (0, answer_of('p00') + '\n'), done.stderr


def test_chat_reads_a_pipe(daemon):
    done = run('chat', '--target', daemon.address, '--temperature', '0', '--raw', input='What is MLA?')
    assert (done.returncode, done.stdout) == (0, answer_of('p00')), done.stderr


def test_chat_json_is_one_event_a_line(daemon):
    done = run('chat', '--target', daemon.address, '--temperature', '0', '--json', 'What is MLA?')
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert 'started' in events[0] and 'usage' in events[-1]
    assert ''.join(e.get('delta', {}).get('content', '') for e in events) == answer_of('p00')


def test_chat_tells_an_error_and_fails(daemon):
    done = run('chat', '--target', daemon.address, '--temperature', '7', 'Hi')
    assert done.returncode == 1 and 'INVALID_ARGUMENT' in done.stderr and 'sampling.temperature' in done.stderr
    assert run('chat', '--target', '127.0.0.1:1', 'Hi').returncode == 1


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.fd, tty = pty.openpty()
        # setsid makes it the terminal that Ctrl-C comes from; in Python that needs a fork, which gRPC does not bear.
        self.process = subprocess.Popen(['setsid', '--ctty', str(BINARY), *arguments], stdin=tty, stdout=tty, stderr=tty, cwd=ROOT,
                                        env={**os.environ, 'TERM': 'xterm', 'NO_COLOR': ''})
        os.close(tty)
        self.seen = ''

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, text):
        """Reads until `text` shows up, and returns all up to its end."""
        end = time.monotonic() + TIMEOUT
        while text not in self.seen:
            assert time.monotonic() < end, f'{text!r} did not come; seen: {self.seen!r}'
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    data = b''
                assert data, f'{text!r} did not come; seen: {self.seen!r}'
                self.seen += data.decode(errors='replace').replace('\r', '')
        before, found, self.seen = self.seen.partition(text)
        return before + found

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(daemon):
    it = Terminal('chat', '--target', daemon.address, '--temperature', '0')
    yield it
    it.close()


def test_a_conversation_on_a_terminal(terminal):
    terminal.type('I like the color gray.\n')
    terminal.expect('gray')  # the echo of what was typed
    terminal.expect('I will remember that you like gray.')
    terminal.type('Which color do I like?\n')
    terminal.expect('Your favorite color is gray.')
    terminal.type('/exit\n')
    assert terminal.process.wait(TIMEOUT) == 0


def test_reasoning_is_dimmed_on_a_terminal(terminal):
    terminal.type('What is 347 + 285?\n')
    terminal.expect('\x1b[2m')
    reasoning = terminal.expect('\x1b[0m')
    assert 'carry' in reasoning and '<think>' not in reasoning
    terminal.expect('632')
    terminal.type('\x04')
    assert terminal.process.wait(TIMEOUT) == 0


def test_ctrl_c_stops_the_answer_not_the_conversation(daemon):
    terminal = Terminal('chat', '--target', daemon.address, '--temperature', '0')
    try:
        terminal.type('Say exactly this: ' + 'ladder kite orange market zebra ' * 40 + '\n')
        terminal.expect('zebra \n')
        terminal.expect('ladder')
        terminal.type('\x03')
        daemon.wait_idle(timeout=10)
        terminal.type('what is the capital of China?\n')
        terminal.expect('Beijing')
        terminal.type('/exit\n')
        assert terminal.process.wait(TIMEOUT) == 0
    finally:
        terminal.close()


def test_bench_serve_reports(daemon, tmp_path):
    report = tmp_path / 'report.json'
    done = run('bench', 'serve', '--target', daemon.address, '--concurrency', '8', '--num-requests', '24', '--prompt-tokens', '32',
               '--output-tokens', '16', '--output', report)
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    data = json.loads(text)
    assert data
    for word in ('ttft', 'itl', 'e2e', 'p50', 'p90', 'p99'):
        assert word in text.lower(), f'{word} in the report'


def test_bench_serve_by_request_rate(daemon):
    done = run('bench', 'serve', '--target', daemon.address, '--request-rate', '20', '--num-requests', '20', '--prompt-tokens', '8:64',
               '--output-tokens', '4', '--quiet')
    assert done.returncode == 0 and json.loads(done.stdout), done.stderr


def test_bench_serve_fails_when_requests_fail():
    assert run('bench', 'serve', '--target', '127.0.0.1:1', '--num-requests', '2', '--quiet').returncode == 1
