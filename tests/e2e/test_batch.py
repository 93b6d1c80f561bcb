"""Batch jobs through the daemon: `latentd batch`, grpcurl, and what befalls a job beside being run."""

import json
import pathlib
import signal
import subprocess

import grpc
import pytest

import batch
from client import BINARY, ROOT, TIMEOUT, Daemon, batch_pb2, chat_request, details, error_of, eventually, golden, run, violations

SERVICE = 'latentd.v1.BatchService'


@pytest.fixture(scope='module')
def batch_daemon(tmp_path_factory):
    with Daemon('--batch-dir', tmp_path_factory.mktemp('batch'), '--max-running', '32') as daemon:
        yield daemon.wait_ready()
        daemon.signal()
        assert daemon.wait() == 0, daemon.output()[-5000:]


@pytest.fixture
def daemon(batch_daemon):
    assert batch_daemon.process.poll() is None, batch_daemon.output()[-5000:]
    yield batch_daemon
    assert batch_daemon.process.poll() is None, batch_daemon.output()[-5000:]


def latentd_batch(daemon, *arguments, code=0, **options):
    done = run('batch', *arguments, '--target', daemon.address, **options)
    assert done.returncode == code, f'exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# ---- the command -----------------------------------------------------------------------------------------


def test_a_file_in_openais_format_there_and_back(daemon, tmp_path):
    file = tmp_path / 'in.jsonl'
    file.write_text(batch.openai_lines(60))
    done = latentd_batch(daemon, 'submit', file, '--watch', '--metadata', 'test=there-and-back')
    name = done.stdout.strip()
    assert 'completed: 60 of 60 items succeeded' in done.stderr
    latentd_batch(daemon, 'export', name, file)
    output = lines_of(tmp_path / 'in.output.jsonl')
    assert lines_of(tmp_path / 'in.errors.jsonl') == [] and not (tmp_path / 'in.cursor').exists()
    assert {line['custom_id'] for line in output} == {f'item-{i}' for i in range(60)} and len(output) == 60
    by_id = {line['custom_id']: line['response'] for line in output}
    for index in (0, 1, 58, 59):
        response = by_id[f'item-{index}']
        assert response['status_code'] == 200
        body, item = response['body'], list(batch.items_of(index + 1))[index]
        if index % 2:
            online = daemon.stub.Chat(item.chat, timeout=TIMEOUT)
            message = body['choices'][0]['message']
            assert (body['object'], message['role']) == ('chat.completion', 'assistant')
            said = online.choices[0].message
            assert (message['content'] or '', message.get('reasoning_content', '')) == (said.content, said.reasoning)
        else:
            online = daemon.stub.Complete(item.complete, timeout=TIMEOUT)
            assert (body['object'], body['choices'][0]['text']) == ('text_completion', online.choices[0].message.content)
        assert body['choices'][0]['finish_reason'] == 'length'
        assert body['usage']['prompt_tokens'] == online.usage.prompt_tokens and body['usage']['completion_tokens'] == 4
    listed = [json.loads(line) for line in latentd_batch(daemon, 'list', '--metadata', 'test=there-and-back', '--json').stdout.splitlines()]
    assert [job['name'] for job in listed] == [name]
    assert 'completed' in latentd_batch(daemon, 'status', name).stdout
    # The same command is the same job.
    assert latentd_batch(daemon, 'submit', file, '--metadata', 'test=there-and-back').stdout.strip() == name


def test_results_follow_a_job_and_go_on_from_their_cursor(daemon, tmp_path):
    cursor = tmp_path / 'cursor'
    lines = '\n'.join(json.dumps({'custom_id': f'c{i}', 'complete': {'text': batch.text_of(i), 'limits': {'max_tokens': 2}}})
                      for i in range(40)) + '\n'
    name = latentd_batch(daemon, 'submit', '-', input=lines).stdout.strip()
    results = [json.loads(line) for line in latentd_batch(daemon, 'results', name, '--follow', '--cursor-file', cursor).stdout.splitlines()]
    assert sorted(int(r.get('index', 0)) for r in results) == list(range(40))
    assert all(r['state'] == 'ITEM_STATE_SUCCEEDED' and r['attempts'] == 1 for r in results)
    assert latentd_batch(daemon, 'results', name, '--follow', '--cursor-file', cursor).stdout == ''
    latentd_batch(daemon, 'delete', name)
    assert 'JOB_NOT_FOUND' in latentd_batch(daemon, 'status', name, code=1).stderr


def test_items_that_fail_do_not_fail_the_job(daemon, tmp_path):
    file = tmp_path / 'in.jsonl'
    too_long = json.dumps({'custom_id': 'long', 'method': 'POST', 'url': '/v1/completions', 'body': {'prompt': 'word ' * 60000}})
    file.write_text(batch.openai_lines(3) + too_long + '\n')
    done = latentd_batch(daemon, 'submit', file, '--watch', code=3, timeout=TIMEOUT)
    assert 'completed: 3 of 4 items succeeded, 1 failed' in done.stderr
    latentd_batch(daemon, 'export', done.stdout.strip(), file, code=3)
    failed, = lines_of(tmp_path / 'in.errors.jsonl')
    assert failed['custom_id'] == 'long' and failed['response']['status_code'] == 400 and failed['response']['body']['error']['message']
    assert len(lines_of(tmp_path / 'in.output.jsonl')) == 3


def test_bad_lines_are_told_with_their_numbers(daemon, tmp_path):
    file = tmp_path / 'in.jsonl'
    # Found by the command: nothing is sent.
    file.write_text(batch.openai_lines(2) + 'x\n' + batch.openai_lines(1, stream=True))
    done = latentd_batch(daemon, 'submit', file, code=2)
    told = done.stderr.splitlines()
    assert told[0].startswith(f'{file}:3: is no JSON') and told[1] == f"{file}:4: body.stream: is true; an item of a batch job is answered as a whole"
    # Found by the server: all of them at once, and nothing is kept.
    lines = batch.openai_lines(4).splitlines()
    for index, field, value in ((1, 'temperature', 9), (3, 'top_p', 2)):
        line = json.loads(lines[index])
        line['body'][field] = value
        lines[index] = json.dumps(line)
    file.write_text('\n\n' + '\n'.join(lines) + '\n')
    done = latentd_batch(daemon, 'submit', file, '--request-id', 'bad-lines', code=2)
    told = done.stderr.splitlines()
    assert told[0].startswith(f'{file}:4: ') and 'temperature' in told[0] and told[1].startswith(f'{file}:6: ') and 'top_p' in told[1]
    gone = error_of(lambda: daemon.batch.GetUpload(batch_pb2.GetUploadRequest(request_id='bad-lines'), timeout=TIMEOUT))
    assert gone.code() == grpc.StatusCode.NOT_FOUND


def test_a_duplicate_is_refused_by_the_server_too(daemon):
    items = [*batch.items_of(3), *batch.items_of(1)]
    error = error_of(lambda: batch.create(daemon, 'duplicate', items))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT and list(violations(error)) == ['items[3].custom_id']


def test_an_unknown_model_is_refused(daemon, tmp_path):
    file = tmp_path / 'in.jsonl'
    file.write_text(batch.openai_lines(2))
    assert 'model' in latentd_batch(daemon, 'submit', file, '--model', 'another', code=1).stderr


def test_without_a_directory_there_are_no_batch_jobs(tmp_path):
    with Daemon() as daemon:
        daemon.wait_ready()
        error = error_of(lambda: daemon.batch.ListJobs(batch_pb2.ListJobsRequest(), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.FAILED_PRECONDITION and details(error)['ErrorInfo'].reason == 'BATCH_DISABLED'
        assert 'BATCH_DISABLED' in latentd_batch(daemon, 'list', code=1).stderr


def test_grpcurl_makes_and_reads_a_job(daemon, tool):
    frames = [{'header': {'requestId': 'grpcurl'}},
              {'items': {'items': [{'customId': 'a', 'chat': {'messages': [{'role': 'ROLE_USER', 'content': 'What is MLA?'}],
                                                              'sampling': {'temperature': 0}}}]}},
              {'commit': {'itemCount': 1}}]
    made = json.loads(tool('grpcurl', '-plaintext', '-d', '\n'.join(map(json.dumps, frames)), daemon.address, f'{SERVICE}/CreateJob').stdout)
    name = made['job']['name']
    call = ('grpcurl', '-plaintext', '-d', json.dumps({'name': name}), daemon.address)
    tool(*call, f'{SERVICE}/WatchJob')
    assert json.loads(tool(*call, f'{SERVICE}/GetJob').stdout)['job']['state'] == 'JOB_STATE_COMPLETED'
    result, = json.loads(tool(*call, f'{SERVICE}/StreamResults').stdout)['results']
    assert result['chat']['choices'][0]['message']['content'] == golden('p00')[1]['text']


# ---- what befalls a job ----------------------------------------------------------------------------------


def test_an_upload_whose_client_is_killed_goes_on(daemon, tmp_path):
    count = 30_000
    file = tmp_path / 'in.jsonl'
    file.write_text(batch.openai_lines(count))
    command = ['batch', 'submit', str(file), '--request-id', 'killed-client', '--target', daemon.address]

    def stored():
        try:
            return daemon.batch.GetUpload(batch_pb2.GetUploadRequest(request_id='killed-client'), timeout=TIMEOUT).item_count
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND
            return 0
    first = subprocess.Popen([str(BINARY), *command], cwd=ROOT)
    eventually(lambda: stored() > 0, what='some items are stored')
    first.kill()
    first.wait()
    before = stored()
    assert 0 < before
    name = run(*command).stdout.strip()
    assert stored() == count and batch.get(daemon, name).counts.total == count
    daemon.batch.CancelJob(batch_pb2.CancelJobRequest(name=name), timeout=TIMEOUT)
    assert latentd_batch(daemon, 'watch', name, code=5).stderr.rstrip().endswith('cancelled')


def test_cancelling_keeps_what_is_finished_and_retrying_runs_the_rest(daemon):
    items = list(batch.items_of(200, max_tokens=16))
    name = batch.create(daemon, 'cancelled', items).name
    eventually(lambda: batch.get(daemon, name).counts.succeeded > 0, what='a result')
    latentd_batch(daemon, 'cancel', name)
    done = latentd_batch(daemon, 'watch', name, code=5)
    assert ': cancelled: ' in done.stderr
    first, _ = batch.results_of(daemon, name)
    batch.check_counts(batch.get(daemon, name))
    finished = {r.custom_id for r in first if r.state == batch_pb2.ITEM_STATE_SUCCEEDED}
    assert finished and sorted(r.index for r in first) == list(range(200))
    retried = latentd_batch(daemon, 'retry', name, '--watch').stdout.strip()
    assert latentd_batch(daemon, 'retry', name).stdout.strip() == retried
    second, _ = batch.results_of(daemon, retried)
    assert batch.get(daemon, retried).retry_of == name
    assert {r.custom_id for r in second} == {i.custom_id for i in items} - finished
    assert all(r.state == batch_pb2.ITEM_STATE_SUCCEEDED for r in second)


def test_a_job_expires_and_keeps_what_is_finished(daemon, tmp_path):
    file = tmp_path / 'in.jsonl'
    file.write_text(batch.openai_lines(3000, max_tokens=400))
    done = latentd_batch(daemon, 'submit', file, '--completion-window', '2s', '--watch', code=4)
    name = done.stdout.strip()
    job = batch.get(daemon, name)
    batch.check_counts(job)
    assert job.state == batch_pb2.JOB_STATE_EXPIRED and job.counts.expired > 0
    latentd_batch(daemon, 'export', name, tmp_path / 'out', code=4)
    errors = lines_of(tmp_path / 'out.errors.jsonl')
    assert len(errors) == job.counts.expired and {e['error']['code'] for e in errors} == {'batch_expired'}
    assert len(lines_of(tmp_path / 'out.output.jsonl')) == job.counts.succeeded


def test_fail_fast_ends_the_job(daemon, tmp_path):
    lines = batch.openai_lines(1500, max_tokens=100).splitlines()
    lines[0] = json.dumps({'custom_id': 'long', 'method': 'POST', 'url': '/v1/completions', 'body': {'prompt': 'word ' * 60000}})
    file = tmp_path / 'in.jsonl'
    file.write_text('\n'.join(lines))
    done = latentd_batch(daemon, 'submit', file, '--fail-fast', '--watch', code=6)
    job = batch.get(daemon, done.stdout.strip())
    assert job.state == batch_pb2.JOB_STATE_FAILED and job.state_reason and job.counts.failed == 1 and job.counts.cancelled > 0


def test_online_requests_are_answered_beside_a_job(daemon):
    name = batch.create(daemon, 'beside', list(batch.items_of(200, max_tokens=60))).name
    eventually(lambda: batch.get(daemon, name).counts.running > 0, what='items run')
    answer = daemon.stub.Chat(chat_request('What is MLA?'), timeout=TIMEOUT)
    assert answer.choices[0].message.content == golden('p00')[1]['text']
    assert batch.get(daemon, name).state == batch_pb2.JOB_STATE_IN_PROGRESS
    daemon.batch.CancelJob(batch_pb2.CancelJobRequest(name=name), timeout=TIMEOUT)
    batch.wait_ended(daemon, name)


# ---- over the daemon's own end ---------------------------------------------------------------------------


ITEMS = 200


@pytest.fixture(scope='module')
def undisturbed(batch_daemon):
    """The answers that so many items must have."""
    name = batch.create(batch_daemon, 'undisturbed', list(batch.items_of(ITEMS, max_tokens=24))).name
    job = batch.wait_ended(batch_daemon, name)
    assert job.counts.succeeded == ITEMS
    return batch.answers(batch.results_of(batch_daemon, name)[0])


def some_but_not_all(daemon, name, total):
    def condition():
        counts = batch.get(daemon, name).counts
        assert counts.succeeded < total, 'the job ended too early for this test'
        return counts.succeeded > 0
    eventually(condition, what='some items have succeeded')


def test_a_daemon_that_is_killed_goes_on_with_its_jobs(tmp_path, undisturbed):
    """And so do those who watch them and read their results."""
    with Daemon('--batch-dir', tmp_path, '--max-running', '16') as first:
        first.wait_ready()
        name = batch.create(first, 'job', list(batch.items_of(ITEMS, max_tokens=24))).name
        watching = subprocess.Popen([str(BINARY), 'batch', 'watch', name, '--target', first.address], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        reading = subprocess.Popen([str(BINARY), 'batch', 'export', name, str(tmp_path / 'out'), '--follow', '--target', first.address],
                                   cwd=ROOT, stderr=subprocess.PIPE, text=True)
        some_but_not_all(first, name, ITEMS)
        follower = batch.Follower(name)
        follower.check(first)
        first.signal(signal.SIGKILL)
        first.wait()
        with Daemon('--batch-dir', tmp_path, '--max-running', '16', address=first.address) as second:
            second.wait_ready()
            assert watching.wait(TIMEOUT) == 0, watching.stderr.read()
            assert reading.wait(TIMEOUT) == 0, reading.stderr.read()
            watching.stderr.close()
            reading.stderr.close()
            job = follower.check(second)
            assert job.state == batch_pb2.JOB_STATE_COMPLETED and job.recoveries == 1 and len(follower.seen) == ITEMS
            assert batch.answers(follower.seen) == undisturbed
            assert {line['custom_id'] for line in lines_of(tmp_path / 'out.output.jsonl')} == undisturbed.keys()
            assert len(lines_of(tmp_path / 'out.output.jsonl')) == ITEMS


def test_a_drain_gives_items_back(tmp_path, undisturbed):
    """An item may be begun once here: what a drain took it from does not count."""
    with Daemon('--batch-dir', tmp_path, '--max-running', '16') as first:
        first.wait_ready()
        name = batch.create(first, 'job', list(batch.items_of(ITEMS, max_tokens=24)), spec=batch_pb2.JobSpec(max_attempts_per_item=1)).name
        some_but_not_all(first, name, ITEMS)
        first.signal()
        assert first.wait(20) == 0, first.output()[-3000:]
    with Daemon('--batch-dir', tmp_path) as second:
        second.wait_ready()
        job = batch.wait_ended(second, name)
        assert job.state == batch_pb2.JOB_STATE_COMPLETED and job.counts.succeeded == ITEMS, job
        assert batch.answers(batch.results_of(second, name)[0]) == undisturbed


def test_a_directory_is_for_one_daemon(tmp_path):
    with Daemon('--batch-dir', tmp_path) as first:
        first.wait_ready()
        with Daemon('--batch-dir', tmp_path) as second:
            assert second.wait() != 0
        assert first.process.poll() is None
