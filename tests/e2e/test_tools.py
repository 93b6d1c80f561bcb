"""The clients that operators use: grpcurl, grpc-health-probe, ghz, promtool, and Python's own reflection client."""

import json

from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from client import SERVICE, TIMEOUT, Daemon, DEMO_MODEL, eventually, golden


def test_reflection_describes_the_service(daemon):
    database = ProtoReflectionDescriptorDatabase(daemon.channel)
    assert {SERVICE, 'latentd.v1.BatchService', 'grpc.health.v1.Health'} <= set(database.get_services())
    file = database.FindFileContainingSymbol(SERVICE)
    assert file.name == 'latentd/v1/inference.proto'
    assert 'StreamChat' in [m.name for m in file.service[0].method]


def test_grpcurl_lists_describes_and_calls(daemon, tool):
    services = tool('grpcurl', '-plaintext', daemon.address, 'list').stdout.split()
    assert {SERVICE, 'grpc.health.v1.Health'} <= set(services)
    described = tool('grpcurl', '-plaintext', daemon.address, 'describe', f'{SERVICE}.StreamChat').stdout
    assert 'stream .latentd.v1.GenerationEvent' in described
    request = {'messages': [{'role': 'ROLE_USER', 'content': 'What is MLA?'}], 'sampling': {'temperature': 0}}
    out = tool('grpcurl', '-plaintext', '-d', json.dumps(request), daemon.address, f'{SERVICE}/StreamChat').stdout
    events, decoder = [], json.JSONDecoder()
    while out.strip():
        event, end = decoder.raw_decode(out.lstrip())
        events.append(event)
        out = out.lstrip()[end:]
    assert ''.join(e.get('delta', {}).get('content', '') for e in events) == golden('p00')[1]['text']
    assert 'usage' in events[-1]


def test_grpcurl_shows_the_error_details(daemon, tool):
    request = {'messages': [{'role': 'ROLE_USER', 'content': 'Hi'}], 'sampling': {'temperature': 9}}
    done = tool('grpcurl', '-plaintext', '-d', json.dumps(request), daemon.address, f'{SERVICE}/Chat', code=None)
    assert done.returncode != 0
    assert 'InvalidArgument' in done.stderr and 'sampling.temperature' in done.stderr and 'google.rpc.BadRequest' in done.stderr


def test_grpc_health_probe(daemon, tool):
    for service in ('', SERVICE, 'liveness'):
        assert 'SERVING' in tool('grpc-health-probe', f'-addr={daemon.address}', f'-service={service}').stderr
    tool('grpc-health-probe', f'-addr={daemon.address}', '-service=nothing', code=3)
    tool('grpc-health-probe', '-addr=127.0.0.1:1', '-connect-timeout=500ms', code=2)


def test_ghz_load(daemon, tool, tmp_path):
    request = {'messages': [{'role': 'ROLE_USER', 'content': 'What is MLA?'}], 'limits': {'max_tokens': 8}}
    report = json.loads(tool('ghz', '--insecure', '--call', f'{SERVICE}.StreamChat',
                             '-d', json.dumps(request), '-n', '200', '-c', '20', '-O', 'json', daemon.address).stdout)
    assert report['count'] == 200 and report['statusCodeDistribution'] == {'OK': 200}


def test_grpcurl_runs_a_batch_job(tmp_path, tool):
    """As README says it, and what promtool and /metrics make of it."""
    upload = """{"header": {"request_id": "monday", "spec": {"completion_window": "3600s"}}}
      {"items": {"items": [{"custom_id": "a", "chat": {"messages": [{"role": "ROLE_USER", "content": "What is MLA?"}]}},
                           {"custom_id": "b", "complete": {"text": "MLA is"}}]}}
      {"commit": {"item_count": 2}}"""
    with Daemon('--batch-dir', tmp_path / 'batch') as daemon:
        daemon.wait_ready()

        def call(method, data):
            return tool('grpcurl', '-plaintext', '-d', data, daemon.address, f'latentd.v1.BatchService/{method}').stdout

        name = json.loads(call('CreateJob', upload))['job']['name']
        out = call('StreamResults', json.dumps({'name': name, 'follow': True}))
        assert out.count('ITEM_STATE_SUCCEEDED') == 2
        job = json.loads(call('GetJob', json.dumps({'name': name})))['job']
        assert job['state'] == 'JOB_STATE_COMPLETED' and job['counts']['succeeded'] == '2'
        done = tool('promtool', 'check', 'metrics', input=daemon.get('/metrics'))
        assert not done.stdout and not done.stderr, done.stdout + done.stderr
        eventually(lambda: daemon.metric('latentd_batch_items_total', state='succeeded') == 2)
        eventually(lambda: daemon.metric('latentd_batch_jobs', state='completed') == 1)
        assert daemon.metric('latentd_batch_commit_seconds_count') >= 4
        assert daemon.metric('latentd_batch_items_pending') == 0 and daemon.metric('latentd_batch_store_failed') == 0


def test_promtool_finds_nothing_wrong_with_the_metrics(daemon, tool):
    done = tool('promtool', 'check', 'metrics', input=daemon.get('/metrics'))
    assert not done.stdout and not done.stderr, done.stdout + done.stderr


def test_metrics_count_what_happened():
    from client import Answer, chat_request, pb
    with Daemon() as daemon:
        daemon.wait_ready()
        for _ in range(3):
            answer = Answer(daemon.stub.StreamChat(chat_request('What is MLA?', limits=pb.Limits(max_tokens=10)), timeout=TIMEOUT))
        daemon.wait_idle()
        assert daemon.metric('latentd_generation_tokens_total') == 30
        assert daemon.metric('latentd_prompt_tokens_total') == 3 * answer.usage.prompt_tokens
        assert daemon.metric('latentd_requests_total', grpc_code='OK') == 3
        assert daemon.metric('latentd_time_to_first_token_seconds_count') == 3
        assert daemon.metric('latentd_inter_token_latency_seconds_count') == 27
        assert daemon.metric('latentd_request_prompt_tokens_sum') == 3 * answer.usage.prompt_tokens
        assert daemon.metric('latentd_ready') == 1 and daemon.metric('latentd_state', state='serving') == 1
        assert daemon.metric('latentd_build_info') == 1


def test_json_logs_have_a_line_for_each_request():
    from client import Answer, chat_request, pb
    with Daemon('--log-format', 'json') as daemon:
        daemon.wait_ready()
        Answer(daemon.stub.StreamChat(chat_request('What is MLA?', serving=pb.Serving(request_id='find-me')), timeout=TIMEOUT))
        daemon.signal()
        assert daemon.wait() == 0
        records = [json.loads(line) for line in daemon.output().splitlines()]
        assert len([r for r in records if r.get('id') == 'find-me']) == 1
        assert 'What is MLA?' not in daemon.output(), 'what clients say is not logged'


def test_a_served_directory_is_left_as_it_was(daemon):
    del daemon
    assert sorted(p.name for p in DEMO_MODEL.iterdir()) == [
        'config.json', 'generation_config.json', 'metrics.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']
