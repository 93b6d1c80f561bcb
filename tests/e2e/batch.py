"""Batch jobs as a client sees them: uploads, results, and what must hold of them whatever befell the daemon."""

import hashlib
import json
import time

import client
from client import TIMEOUT, batch_pb2, eventually, pb

ENDED = (batch_pb2.JOB_STATE_COMPLETED, batch_pb2.JOB_STATE_FAILED, batch_pb2.JOB_STATE_EXPIRED, batch_pb2.JOB_STATE_CANCELLED)
WORDS = ('amber', 'birch', 'cedar', 'delta', 'ember', 'fjord', 'grove', 'heron', 'inlet', 'jade', 'kelp', 'linden')


def text_of(index: int) -> str:
    """A prompt that is another for every index."""
    return f'{WORDS[index % 12]} {WORDS[index // 12 % 12]} {index}'


def items_of(count: int, max_tokens=4):
    """Greedy items, by turns a chat and a completion."""
    sampling, limits = pb.Sampling(temperature=0), pb.Limits(max_tokens=max_tokens, ignore_eos=True)
    for index in range(count):
        if index % 2:
            request = pb.ChatRequest(messages=[client.user(text_of(index))], sampling=sampling, limits=limits)
            yield batch_pb2.BatchItem(custom_id=f'item-{index}', chat=request)
        else:
            request = pb.CompleteRequest(text=text_of(index), sampling=sampling, limits=limits)
            yield batch_pb2.BatchItem(custom_id=f'item-{index}', complete=request)


def openai_lines(count: int, **body) -> str:
    """The same as lines of OpenAI's format."""
    lines = []
    for index in range(count):
        fields = dict(max_tokens=4, temperature=0, ignore_eos=True) | body
        if index % 2:
            url, fields['messages'] = '/v1/chat/completions', [{'role': 'user', 'content': text_of(index)}]
        else:
            url, fields['prompt'] = '/v1/completions', text_of(index)
        lines.append(json.dumps({'custom_id': f'item-{index}', 'method': 'POST', 'url': url, 'body': fields}))
    return '\n'.join(lines) + '\n'


def chain_of(items) -> bytes:
    chain = b''
    for item in items:
        chain = hashlib.sha256(chain + hashlib.sha256(item.SerializeToString()).digest()).digest()
    return chain


def frames(request_id, items, first=0, spec=None, per_frame=50, commit=True, pause=0.0):
    """The messages of one attempt at an upload."""
    header = batch_pb2.CreateJobRequest.Header(request_id=request_id, spec=spec or batch_pb2.JobSpec(), first_item=first)
    yield batch_pb2.CreateJobRequest(header=header)
    for start in range(first, len(items), per_frame):
        yield batch_pb2.CreateJobRequest(items=batch_pb2.CreateJobRequest.Items(items=items[start:start + per_frame]))
        time.sleep(pause)
    if commit:
        last = batch_pb2.CreateJobRequest.Commit(item_count=len(items), sha256=chain_of(items))
        yield batch_pb2.CreateJobRequest(commit=last)


def create(daemon, request_id, items, **options):
    return daemon.batch.CreateJob(frames(request_id, list(items), **options), timeout=TIMEOUT).job


def get(daemon, name):
    return daemon.batch.GetJob(batch_pb2.GetJobRequest(name=name), timeout=TIMEOUT).job


def wait_ended(daemon, name, timeout=TIMEOUT):
    def ended():
        job = get(daemon, name)
        return job.state in ENDED and job
    return eventually(ended, timeout, f'{name} ended')


def results_of(daemon, name, cursor='', states=()):
    """The results after a cursor, and the cursor after them."""
    found = []
    for response in daemon.batch.StreamResults(batch_pb2.StreamResultsRequest(name=name, cursor=cursor, states=states), timeout=TIMEOUT):
        found += response.results
        cursor = response.cursor
    return found, cursor


def answer_of(result):
    """What an undisturbed run must give too: the answer, without ids and times."""
    kind = result.WhichOneof('outcome')
    if kind == 'error':
        return result.state, result.error.code, result.error.reason
    outcome = getattr(result, kind)
    return (result.state, kind, tuple(c.SerializeToString(deterministic=True) for c in outcome.choices), outcome.usage.prompt_tokens,
            outcome.usage.completion_tokens)


def answers(results):
    return {r.custom_id: answer_of(r) for r in results}


def check_counts(job):
    counts = job.counts
    assert counts.total == counts.succeeded + counts.failed + counts.running + counts.pending + counts.cancelled + counts.expired, job
    if job.state in ENDED:
        assert counts.running == counts.pending == 0, job


class Follower:
    """Reads a job's results again and again, over every end of the daemon: what was told once stays, and nothing comes twice."""

    def __init__(self, name):
        self.name, self.cursor, self.seen, self.revision = name, '', [], 0

    def check(self, daemon):
        """All that must hold now. Returns the job."""
        again, _ = results_of(daemon, self.name)
        assert [r.SerializeToString(deterministic=True) for r in again[:len(self.seen)]] == \
            [r.SerializeToString(deterministic=True) for r in self.seen], 'a result that was told is another now'
        new, self.cursor = results_of(daemon, self.name, self.cursor)
        self.seen += new
        assert len(self.seen) >= len(again)
        indices = [r.index for r in self.seen]
        assert len(set(indices)) == len(indices), 'a result came twice'
        job = get(daemon, self.name)
        check_counts(job)
        assert job.counts.succeeded + job.counts.failed + job.counts.cancelled + job.counts.expired >= len(self.seen)
        return job
