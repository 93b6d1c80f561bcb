"""Starts and stops real `latentd` processes, and calls them as a client would."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import grpc
import grpc_tools
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get('LATENTD_BINARY', ROOT / 'build' / 'latentd'))
# What computes in the daemons of these tests: cpu, cuda, or auto as `latentd serve` chooses.
ENGINE = os.environ.get('LATENTD_E2E_ENGINE', 'auto')
ON_GPU = ENGINE == 'cuda' or (ENGINE == 'auto' and pathlib.Path('/dev/nvidiactl').exists())
DEMO_MODEL = ROOT / 'deploy' / 'demo-model'
# Longest time that anything here may take; a call without an end is a failure, not a hang.
TIMEOUT = 60


def _generate_stubs():
    """The stubs a client would make from proto/, in a folder that goes when the tests end."""
    out = tempfile.mkdtemp(prefix='latentd-stubs-')
    files = ('latentd/v1/inference.proto', 'latentd/v1/batch.proto', 'grpc/health/v1/health.proto')
    code = protoc.main([
        'protoc', f'-I{ROOT / "proto"}', f'-I{pathlib.Path(grpc_tools.__file__).parent / "_proto"}', f'--python_out={out}',
        f'--grpc_python_out={out}', *(str(ROOT / 'proto' / name) for name in files)
    ])
    assert code == 0, 'protoc failed'
    sys.path.insert(0, out)
    return out


_STUBS = _generate_stubs()
# grpc.health.v1 is generated too (the package's own health.proto has no List), beside the installed grpc package.
import grpc as _grpc_package  # noqa: E402

_grpc_package.__path__.append(str(pathlib.Path(_STUBS) / 'grpc'))
from grpc.health.v1 import health_pb2, health_pb2_grpc  # noqa: E402
from latentd.v1 import batch_pb2  # noqa: E402
from latentd.v1 import batch_pb2_grpc  # noqa: E402
from latentd.v1 import inference_pb2 as pb  # noqa: E402
from latentd.v1 import inference_pb2_grpc as pb_grpc  # noqa: E402

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = 'latentd.v1.InferenceService'


def remove_stubs():
    shutil.rmtree(_STUBS, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def eventually(condition, timeout=TIMEOUT, what=''):
    """Waits until `condition()` is true, and returns its value."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f'not within {timeout} s: {what or condition}'
        time.sleep(0.02)


class Daemon:
    """A running `latentd serve` on two free ports of 127.0.0.1, or on `address`. A context manager."""

    def __init__(self, *flags, model=DEMO_MODEL, address=None):
        self.address = address or f'127.0.0.1:{free_port()}'
        self.http = f'127.0.0.1:{free_port()}'
        self.log = tempfile.NamedTemporaryFile('w+', prefix='latentd-', suffix='.log')
        # A GPU's whole memory would be too much for two daemons at once; a later flag of the same name wins.
        command = [BINARY, 'serve', '--model', model, '--engine', ENGINE, '--listen', self.address, '--http-listen', self.http,
                   '--kv-cache-memory', '1GiB', *flags]
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.channel = self.new_channel()
        self.stub = pb_grpc.InferenceServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)
        self.batch = batch_pb2_grpc.BatchServiceStub(self.channel)

    def new_channel(self):
        # Own subchannels, and quick retries while the daemon is not listening yet.
        return grpc.insecure_channel(self.address, options=[
            ('grpc.use_local_subchannel_pool', 1), ('grpc.initial_reconnect_backoff_ms', 20),
            ('grpc.max_reconnect_backoff_ms', 100), ('grpc.max_receive_message_length', -1)])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def output(self) -> str:
        return pathlib.Path(self.log.name).read_text(errors='replace')

    def check(self, service='', timeout=TIMEOUT) -> int:
        return self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout, wait_for_ready=True).status

    def wait_listening(self):
        """Until the port is open; weights may still load."""
        def listening():
            assert self.process.poll() is None, self.output()
            with contextlib.suppress(OSError), socket.create_connection(tuple(self.address.split(':'))):
                return True
        eventually(listening)
        return self

    def wait_ready(self):
        self.wait_listening()

        def serving():
            assert self.process.poll() is None, self.output()
            with contextlib.suppress(grpc.RpcError):
                return self.check(timeout=1) == SERVING
        eventually(serving, what='serving')
        return self

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self, timeout=TIMEOUT) -> int:
        return self.process.wait(timeout)

    def get(self, path) -> str:
        with urllib.request.urlopen(f'http://{self.http}{path}', timeout=TIMEOUT) as answer:
            return answer.read().decode()

    def metric(self, name, **labels) -> float:
        """The sum of a metric's series that carry `labels`."""
        total, found = 0.0, False
        for line in self.get('/metrics').splitlines():
            match = re.fullmatch(rf'{name}(?:{{(.*)}})? (\S+)', line)
            if match and labels.items() <= dict(re.findall(r'(\w+)="([^"]*)"', match.group(1) or '')).items():
                total, found = total + float(match.group(2)), True
        assert found or labels, f'no metric {name}'
        return total

    def wait_idle(self, timeout=TIMEOUT):
        """Until nothing waits or runs and no block is in use."""
        eventually(lambda: self.metric('latentd_requests_running') == 0 and self.metric('latentd_requests_waiting') == 0 and
                   self.metric('latentd_kv_cache_usage_ratio') == 0, timeout, 'blocks free')


# ---- requests -------------------------------------------------------------------------------------------


def user(text):
    return pb.Message(role=pb.ROLE_USER, content=text)


def assistant(text):
    return pb.Message(role=pb.ROLE_ASSISTANT, content=text)


def chat_request(*messages, temperature=0.0, **fields):
    """Strings are user messages. Greedy unless said otherwise; None leaves the temperature unset."""
    request = pb.ChatRequest(messages=[user(m) if isinstance(m, str) else m for m in messages], **fields)
    if temperature is not None and not request.sampling.HasField('temperature'):
        request.sampling.temperature = temperature
    return request


def endless(text='Count to 25.', max_tokens=8000):
    """A request that goes on for thousands of tokens."""
    return chat_request(text, limits=pb.Limits(max_tokens=max_tokens, ignore_eos=True))


class Answer:
    """What a stream of GenerationEvents said; asserts their order."""

    def __init__(self, events):
        self.started = self.finished = self.usage = None
        self.content = self.reasoning = ''
        self.token_ids = []
        self.deltas = 0
        for event in events:
            kind = event.WhichOneof('event')
            assert self.usage is None, 'usage is the last event'
            if kind == 'started':
                assert self.started is None and self.deltas == 0
                self.started = event.started
                continue
            assert self.started is not None, 'started is the first event'
            if kind == 'delta':
                assert self.finished is None
                self.deltas += 1
                self.content += event.delta.content
                self.reasoning += event.delta.reasoning
                self.token_ids += event.delta.token_ids
            elif kind == 'finished':
                assert self.finished is None
                self.finished = event.finished
            else:
                self.usage = event.usage
        assert self.finished is not None and self.usage is not None, 'the stream ended early'


def error_of(call) -> grpc.RpcError:
    """Runs `call`, which must fail, and returns the error."""
    try:
        result = call()
        if hasattr(result, '__next__'):
            list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError('the call succeeded')


def details(error: grpc.RpcError) -> dict:
    """The google.rpc details of an error by their short type names."""
    known = {m.DESCRIPTOR.full_name: m for m in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)}
    for key, value in error.trailing_metadata() or ():
        if key == 'grpc-status-details-bin':
            found = {}
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0] and status.message == error.details()
            for detail in status.details:
                message = known[detail.TypeName()]()
                assert detail.Unpack(message) and detail.TypeName() not in found
                found[detail.TypeName().rpartition('.')[2]] = message
            return found
    return {}


def violations(error: grpc.RpcError) -> dict:
    return {v.field: v.description for v in details(error)['BadRequest'].field_violations}


# ---- goldens and checkpoints -----------------------------------------------------------------------------


def golden(name: str):
    """A prompt of tests/golden/model/ and its greedy answer by Transformers: (prompt, answer)."""
    folder = ROOT / 'tests' / 'golden' / 'model'
    prompts = {p['id']: p for p in json.loads((folder / 'prompts.json').read_text())}
    return prompts[name], json.loads((folder / 'fp8' / 'greedy.json').read_text())[name]


def dummy_model(folder: pathlib.Path, **changes) -> pathlib.Path:
    """A checkpoint for --load-format dummy: the demo model's config with changes, its tokenizer, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((DEMO_MODEL / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))
    for name in ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


# Some 200 million parameters: enough that loading takes a moment and can be observed. On a GPU more layers take it.
SLOW_TO_LOAD = dict(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=32, n_group=4, intermediate_size=2048,
                    num_hidden_layers=61 if ON_GPU else 5)


def run(*arguments, timeout=TIMEOUT, input=None) -> subprocess.CompletedProcess:
    """`latentd` with arguments, its output captured."""
    return subprocess.run([str(BINARY), *map(str, arguments)], capture_output=True, text=True, timeout=timeout, input=input,
                          stdin=subprocess.DEVNULL if input is None else None, cwd=ROOT)
