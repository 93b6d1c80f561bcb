"""Start, health, drain, stop, and starts that are refused."""

import json
import pathlib
import shutil
import signal
import struct
import time

import grpc
import pytest

from client import (DEMO_MODEL, ENGINE, NOT_SERVING, ROOT, SERVICE, SERVING, SLOW_TO_LOAD, TIMEOUT, Answer, Daemon, chat_request, details,
                     dummy_model, endless, error_of, eventually, health_pb2, pb, run)


def test_health(daemon):
    for service in ('', SERVICE, 'grpc.health.v1.Health', 'liveness'):
        if service != 'grpc.health.v1.Health':
            assert daemon.check(service) == SERVING
    assert error_of(lambda: daemon.check('nothing')).code() == grpc.StatusCode.NOT_FOUND
    statuses = daemon.health.List(health_pb2.HealthListRequest(), timeout=TIMEOUT).statuses
    assert {name: s.status for name, s in statuses.items()}.items() >= {'': SERVING, SERVICE: SERVING, 'liveness': SERVING}.items()
    watch = daemon.health.Watch(health_pb2.HealthCheckRequest(service='nothing'), timeout=TIMEOUT)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    for path in ('/healthz', '/livez', '/readyz'):
        assert daemon.get(path)


def test_health_while_loading(tmp_path):
    with Daemon('--load-format', 'dummy', model=dummy_model(tmp_path, **SLOW_TO_LOAD)) as daemon:
        daemon.wait_listening()
        watch = daemon.health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert daemon.check() == NOT_SERVING
        assert daemon.check(SERVICE) == NOT_SERVING
        assert daemon.check('liveness') == SERVING
        error = error_of(lambda: daemon.stub.Chat(chat_request('Hi'), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert details(error)['RetryInfo'].retry_delay.ToTimedelta().total_seconds() > 0
        assert not daemon.stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT).models
        assert next(watch).status == NOT_SERVING
        assert next(watch).status == SERVING
        answer = Answer(daemon.stub.StreamChat(chat_request('Hi', limits=pb.Limits(max_tokens=4, ignore_eos=True)), timeout=TIMEOUT))
        assert answer.usage.completion_tokens == 4
        daemon.signal()
        assert next(watch).status == NOT_SERVING
        assert daemon.wait() == 0


def test_a_term_signal_while_loading_ends_it_at_once(tmp_path):
    with Daemon('--load-format', 'dummy', model=dummy_model(tmp_path, **SLOW_TO_LOAD)) as daemon:
        daemon.wait_listening()
        assert daemon.check() == NOT_SERVING
        daemon.signal()
        assert daemon.wait(10) == 0, daemon.output()


def test_drain():
    """After SIGTERM: not ready, running streams finish, new calls are refused, then exit code 0."""
    with Daemon() as daemon:
        daemon.wait_ready()
        watch = daemon.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=TIMEOUT)
        assert next(watch).status == SERVING
        running = [daemon.stub.StreamChat(endless(max_tokens=600), timeout=TIMEOUT) for _ in range(3)]
        first = [next(call) for call in running]
        daemon.signal()
        assert next(watch).status == NOT_SERVING
        error = error_of(lambda: daemon.stub.StreamChat(chat_request('Hi'), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert 'RetryInfo' in details(error)
        for event, call in zip(first, running):
            answer = Answer([event, *call])
            assert answer.usage.completion_tokens == 600 and answer.finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert daemon.wait(20) == 0, daemon.output()


def test_a_drain_is_bounded():
    with Daemon('--drain-timeout', '1s') as daemon:
        daemon.wait_ready()
        call = daemon.stub.StreamChat(endless(), timeout=TIMEOUT)
        next(call)
        started = time.monotonic()
        daemon.signal()
        error = error_of(lambda: call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        daemon.wait(10)
        assert 0.9 < time.monotonic() - started < 8


def test_a_drain_does_not_wait_for_a_client_that_never_reads():
    with Daemon('--drain-timeout', '2s') as daemon:
        daemon.wait_ready()
        call = daemon.stub.StreamChat(endless(), timeout=TIMEOUT)
        eventually(lambda: daemon.metric('latentd_requests_running') == 1)
        daemon.signal()
        daemon.wait(15)
        del call


def test_a_second_signal_ends_it():
    with Daemon() as daemon:
        daemon.wait_ready()
        call = daemon.stub.StreamChat(endless(), timeout=TIMEOUT)
        next(call)
        daemon.signal()
        eventually(lambda: daemon.check() == NOT_SERVING)
        started = time.monotonic()
        daemon.signal(signal.SIGINT)
        daemon.wait(10)
        assert time.monotonic() - started < 5
        assert error_of(lambda: call).code() == grpc.StatusCode.UNAVAILABLE


def test_dummy_weights_on_a_small_config(tmp_path):
    model = dummy_model(tmp_path / 'tiny', num_hidden_layers=2, n_routed_experts=8, hidden_size=128, num_nextn_predict_layers=0)
    with Daemon('--load-format', 'dummy', '--served-model-name', 'tiny-random', model=model) as daemon:
        daemon.wait_ready()
        served = daemon.stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).model
        assert served.name == 'tiny-random' and not served.weights_hash
        request = chat_request('Hi', limits=pb.Limits(max_tokens=8, ignore_eos=True), outputs=pb.Outputs(token_ids=True))
        answers = [Answer(daemon.stub.StreamChat(request, timeout=TIMEOUT)).token_ids for _ in range(2)]
        assert len(answers[0]) == 8 and answers[0] == answers[1]


# ---- starts that are refused --------------------------------------------------------------------------------


def refused(*flags, model=DEMO_MODEL):
    """Starts a daemon that must not come up; what it says."""
    done = run('serve', '--model', model, '--engine', ENGINE, '--listen', '127.0.0.1:0', '--http-listen', '127.0.0.1:0', *flags)
    assert done.returncode not in (0, -6, -11), done.stderr
    return done.stdout + done.stderr


def test_a_port_in_use(daemon):
    done = run('serve', '--model', DEMO_MODEL, '--listen', daemon.address, '--http-listen', '')
    assert done.returncode > 0
    assert daemon.address in done.stdout + done.stderr
    done = run('serve', '--model', DEMO_MODEL, '--listen', '127.0.0.1:0', '--http-listen', daemon.http)
    assert done.returncode > 0
    assert daemon.http in done.stdout + done.stderr


def test_the_cuda_engine_without_a_gpu():
    """The program starts where there is no driver, and says what is missing only when it is asked for it."""
    if pathlib.Path('/dev/nvidiactl').exists():
        pytest.skip('there is a GPU')
    said = refused('--engine', 'cuda')
    assert 'cuda' in said.lower()
    done = run('bench', 'engine', '--model', DEMO_MODEL, '--engine', 'cuda', '--decode', '1:10')
    assert done.returncode == 1 and 'cuda' in done.stderr.lower() and not done.stdout, done.stderr
    done = run('bench', 'engine', '--model', DEMO_MODEL, '--decode', '2:10', '--steps', '3')
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line['name'] for line in lines] == ['start', 'decode 2:10'] and lines[0]['engine'] == 'cpu'


def test_an_unknown_key_names_the_nearest(tmp_path):
    config = tmp_path / 'latentd.yaml'
    config.write_text('model: deploy/demo-model\nmax_runing: 8\n')
    said = refused('--config', config)
    assert 'max_runing' in said and 'max_running' in said and str(config) in said
    assert '--max-running' in refused('--max-runing', '8')


@pytest.mark.parametrize('key, value', [('max_running', '0'), ('max_running', 'many'), ('kv_cache_memory', '-1GiB'), ('load_format', 'pickle'),
                                        ('drain_timeout', 'soon'), ('prefix_caching', 'perhaps')])
def test_a_bad_value_is_named(tmp_path, key, value):
    config = tmp_path / 'latentd.yaml'
    config.write_text(f'{key}: {value}\n')
    for said in (refused('--config', config), refused(f'--{key.replace("_", "-")}={value}')):
        assert key in said.replace('-', '_') and value in said


def test_an_address_that_is_none():
    done = run('serve', '--listen', 'nowhere')
    assert done.returncode > 0 and 'listen' in done.stderr and 'nowhere' in done.stderr


def test_a_config_file_and_flags(tmp_path):
    """The file's values hold, a flag wins over them."""
    config = tmp_path / 'latentd.yaml'
    config.write_text('served_model_name: from-file\nmax_model_len: 1000\n')
    with Daemon('--config', config, '--max-model-len', '512') as daemon:
        model = daemon.wait_ready().stub.GetModel(pb.GetModelRequest(), timeout=TIMEOUT).model
        assert model.name == 'from-file' and model.max_model_len == 512


def copy_of_the_demo_model(folder, **config):
    shutil.copytree(DEMO_MODEL, folder)
    changed = json.loads((folder / 'config.json').read_text())
    for key, value in config.items():
        changed.pop(key) if value is ... else changed.update({key: value})
    (folder / 'config.json').write_text(json.dumps(changed))
    return folder


def edit_tensors(file, change):
    """Writes a safetensors file again after `change` of its tensors: name -> {dtype, shape, data}."""
    data = file.read_bytes()
    (size,) = struct.unpack('<Q', data[:8])
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    metadata = header.pop('__metadata__', {})
    tensors = {name: {**t, 'data': body[slice(*t['data_offsets'])]} for name, t in header.items()}
    change(tensors)
    header, begin = {'__metadata__': metadata}, 0
    for name, t in tensors.items():
        header[name] = {'dtype': t['dtype'], 'shape': t['shape'], 'data_offsets': [begin, begin + len(t['data'])]}
        begin += len(t['data'])
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    file.write_bytes(struct.pack('<Q', len(text)) + text + b''.join(t['data'] for t in tensors.values()))


NORM = 'model.layers.2.input_layernorm.weight'


@pytest.mark.parametrize('kind, named', [
    ('missing folder', 'no-such-folder'),
    ('no config', 'config.json'),
    ('bad json', 'config.json'),
    ('other architecture', 'model_type'),
    ('unsupported value', 'hidden_act'),
    ('wrong type', 'hidden_size'),
    ('no tokenizer', 'tokenizer.json'),
    ('no weights', 'safetensors'),
    ('truncated weights', 'model.safetensors'),
    ('missing tensor', NORM),
    ('surplus tensor', 'model.layers.2.surplus.weight'),
    ('wrong shape', NORM),
])
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, kind, named):
    folder = tmp_path / 'model'
    config = {'other architecture': {'model_type': 'llama', 'architectures': ['LlamaForCausalLM']}, 'unsupported value': {'hidden_act': 'gelu'},
              'wrong type': {'hidden_size': 'large'}}.get(kind, {})
    copy_of_the_demo_model(folder, **config)
    weights = folder / 'model.safetensors'
    if kind == 'missing folder':
        folder = tmp_path / 'no-such-folder'
    elif kind == 'no config':
        (folder / 'config.json').unlink()
    elif kind == 'bad json':
        (folder / 'config.json').write_text('{"model_type": ')
    elif kind == 'no tokenizer':
        (folder / 'tokenizer.json').unlink()
    elif kind == 'no weights':
        weights.unlink()
    elif kind == 'truncated weights':
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == 'missing tensor':
        edit_tensors(weights, lambda t: t.pop(NORM))
    elif kind == 'surplus tensor':
        edit_tensors(weights, lambda t: t.update({'model.layers.2.surplus.weight': t[NORM]}))
    elif kind == 'wrong shape':
        edit_tensors(weights, lambda t: t[NORM].update(shape=[16, 16]))
    assert named in refused(model=folder)
    if kind != 'no tokenizer':
        done = run('check', '--model', folder)
        assert done.returncode > 0 and named in done.stdout + done.stderr


def test_a_model_too_large_for_the_memory_is_refused(tmp_path):
    said = refused('--load-format', 'dummy', model=dummy_model(tmp_path, num_hidden_layers=1000, hidden_size=8192, n_routed_experts=256))
    assert 'memory' in said.lower() or 'does not fit on the GPU: weights take' in said


def test_check_the_demo_model():
    done = run('check', '--model', DEMO_MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'weights' in done.stdout.lower() and 'kv' in done.stdout.lower()


@pytest.mark.parametrize('config', sorted((ROOT / 'deploy' / 'configs').glob('*.json')), ids=lambda p: p.stem)
def test_check_the_example_configs(config):
    """A config.json alone: is it supported, what would it need."""
    done = run('check', '--model', config, '--load-format', 'dummy')
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'weights' in done.stdout and 'memory' in done.stdout
