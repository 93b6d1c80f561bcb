"""The daemon is killed at random moments of a job's life: nothing that was acknowledged is lost, nothing is told twice, and the results
are those of a run that nothing disturbed. 10 kills; 200 with LATENTD_TEST_LONG=1.
"""

import contextlib
import os
import random
import signal
import time

import grpc

import batch
from client import TIMEOUT, Daemon, batch_pb2

ITEMS = 2000
ROUNDS = 20 if os.environ.get('LATENTD_TEST_LONG') else 1
# Of a round: 10 in all.
UPLOAD_KILLS, RUNNING_KILLS, END_KILLS, CANCEL_KILLS = 3, 4, 1, 2
PATIENCE = 5 * TIMEOUT  # for all items of a job: sanitizers make them slow
SPEC = batch_pb2.JobSpec(max_attempts_per_item=100)


class Mortal:
    """A daemon that is killed and comes back on the same store."""

    def __init__(self, folder):
        self.folder, self.kills = folder, 0
        self.start()

    def start(self):
        self.daemon = Daemon('--batch-dir', self.folder, '--max-running', '64')
        self.daemon.wait_listening()

    def kill(self):
        self.daemon.process.kill()
        self.daemon.wait()
        self.daemon.channel.close()
        self.kills += 1
        self.start()
        self.daemon.wait_ready()

    def close(self):
        self.daemon.signal(signal.SIGKILL)
        self.daemon.wait()
        self.daemon.channel.close()


def stored(mortal, request_id):
    """How many items the server says that it has: from then on they must be there."""
    try:
        return mortal.daemon.batch.GetUpload(batch_pb2.GetUploadRequest(request_id=request_id), timeout=TIMEOUT)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
        return batch_pb2.GetUploadResponse()


def upload(mortal, rng, request_id, items, kills):
    """Uploads, with so many kills amid it; the job. The last one may fall on the commit."""
    told = 0
    for left in range(kills, -1, -1):
        now = stored(mortal, request_id)
        assert now.item_count >= told, 'stored items are lost'
        assert now.sha256 == batch.chain_of(items[:now.item_count])
        told = now.item_count
        whole = left <= 1  # else the commit is never sent
        messages = batch.frames(request_id, items, first=told, spec=SPEC, commit=whole, pause=0 if whole else 0.01)
        call = mortal.daemon.batch.CreateJob.future(messages, timeout=TIMEOUT)
        if left == 0:
            return call.result().job
        end = time.monotonic() + rng.uniform(0, 0.4)
        while time.monotonic() < end and not call.done():
            told = max(told, stored(mortal, request_id).item_count)
            time.sleep(0.005)
        committed = call.done() and call.exception() is None and call.result().job.name
        mortal.kill()
        with contextlib.suppress(grpc.RpcError):
            committed = call.result().job.name
        if committed:
            assert batch.get(mortal.daemon, committed).counts.total == len(items), 'a job that was acknowledged is lost'


def killed_job(mortal, rng, request_id, items, expected):
    """A job that is killed while it is uploaded, while it runs and at its end."""
    job = upload(mortal, rng, request_id, items, UPLOAD_KILLS)
    follower = batch.Follower(job.name)
    for _ in range(RUNNING_KILLS):
        time.sleep(rng.uniform(0, 0.6))
        follower.check(mortal.daemon)
        mortal.kill()
        follower.check(mortal.daemon)
    for _ in range(END_KILLS):
        before_end = rng.randrange(0, 40)

        def near_end():
            counts = batch.get(mortal.daemon, job.name).counts
            return counts.succeeded + counts.failed >= len(items) - before_end
        end = time.monotonic() + PATIENCE
        while not near_end():
            assert time.monotonic() < end, 'the job makes no progress'
        time.sleep(rng.uniform(0, 0.02))
        mortal.kill()
        follower.check(mortal.daemon)
    job = batch.wait_ended(mortal.daemon, job.name, PATIENCE)
    follower.check(mortal.daemon)
    assert job.state == batch_pb2.JOB_STATE_COMPLETED and job.counts.succeeded == len(items), job
    assert sorted(r.index for r in follower.seen) == list(range(len(items)))
    assert batch.answers(follower.seen) == expected


def cancelled_job(mortal, rng, request_id, items, expected):
    """A job that is cancelled, and killed while what it has not run is being marked."""
    job = batch.create(mortal.daemon, request_id, items, spec=SPEC, per_frame=500)
    follower = batch.Follower(job.name)
    time.sleep(rng.uniform(0, 0.3))
    follower.check(mortal.daemon)
    mortal.daemon.batch.CancelJob(batch_pb2.CancelJobRequest(name=job.name), timeout=TIMEOUT)
    for _ in range(CANCEL_KILLS):
        time.sleep(rng.uniform(0, 0.03))
        mortal.kill()
        job = follower.check(mortal.daemon)
        assert job.state in (batch_pb2.JOB_STATE_CANCELLING, batch_pb2.JOB_STATE_CANCELLED), 'the cancelling is lost'
    job = batch.wait_ended(mortal.daemon, job.name, PATIENCE)
    follower.check(mortal.daemon)
    assert job.state == batch_pb2.JOB_STATE_CANCELLED
    assert sorted(r.index for r in follower.seen) == list(range(len(items)))
    finished = [r for r in follower.seen if r.state == batch_pb2.ITEM_STATE_SUCCEEDED]
    assert job.counts.succeeded == len(finished) and job.counts.cancelled == len(items) - len(finished)
    assert batch.answers(finished).items() <= expected.items()


def test_kills_lose_nothing_and_tell_nothing_twice(tmp_path):
    seed = int(os.environ.get('LATENTD_SEED', random.randrange(1 << 30)))
    print(f'LATENTD_SEED={seed}')
    items = list(batch.items_of(ITEMS))
    with Daemon('--batch-dir', tmp_path / 'undisturbed', '--max-running', '64') as daemon:
        daemon.wait_ready()
        name = batch.create(daemon, 'undisturbed', items, per_frame=500).name
        batch.wait_ended(daemon, name, PATIENCE)
        expected = batch.answers(batch.results_of(daemon, name)[0])
    assert len(expected) == ITEMS and {a[0] for a in expected.values()} == {batch_pb2.ITEM_STATE_SUCCEEDED}

    rng = random.Random(seed)
    mortal = Mortal(tmp_path / 'killed')
    try:
        mortal.daemon.wait_ready()
        for number in range(ROUNDS):
            killed_job(mortal, rng, f'killed-{number}', items, expected)
            cancelled_job(mortal, rng, f'cancelled-{number}', items, expected)
        assert mortal.kills == ROUNDS * (UPLOAD_KILLS + RUNNING_KILLS + END_KILLS + CANCEL_KILLS)
    finally:
        print(mortal.daemon.output()[-3000:])
        mortal.close()
