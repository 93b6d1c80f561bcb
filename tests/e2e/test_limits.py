"""Many clients, rude clients, and clients that go away."""

import asyncio
import sys
import time

import grpc
import pytest

from client import ROOT, Answer, Daemon, TIMEOUT, chat_request, details, endless, error_of, eventually, golden, pb, pb_grpc

sys.path.insert(0, str(ROOT / 'scripts' / 'demo_model'))
import data  # noqa: E402
import evaluate  # noqa: E402


def test_a_cancelled_stream_frees_its_blocks(daemon):
    daemon.wait_idle()
    call = daemon.stub.StreamChat(endless(), timeout=TIMEOUT)
    for _ in range(5):
        next(call)
    assert daemon.metric('latentd_kv_cache_usage_ratio') > 0
    assert daemon.metric('latentd_requests_running') == 1
    cancelled = daemon.metric('latentd_client_cancelled_total')
    call.cancel()
    daemon.wait_idle(timeout=5)
    assert daemon.metric('latentd_client_cancelled_total') == cancelled + 1


def test_a_cancelled_unary_call_frees_its_blocks(daemon):
    daemon.wait_idle()
    call = daemon.stub.Chat.future(endless(), timeout=TIMEOUT)
    eventually(lambda: daemon.metric('latentd_requests_running') == 1)
    call.cancel()
    daemon.wait_idle(timeout=5)


@pytest.mark.parametrize('method', ['Chat', 'StreamChat'])
def test_a_deadline_frees_its_blocks(daemon, method):
    daemon.wait_idle()
    error = error_of(lambda: getattr(daemon.stub, method)(endless(), timeout=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    daemon.wait_idle(timeout=5)


def test_a_broken_connection_frees_its_blocks(daemon):
    daemon.wait_idle()
    channel = daemon.new_channel()
    call = pb_grpc.InferenceServiceStub(channel).StreamChat(endless(), timeout=TIMEOUT)
    next(call)
    channel.close()
    daemon.wait_idle(timeout=5)


def test_clients_that_never_read_cost_no_one_else(daemon):
    """Their answers are generated to the end, their blocks freed, and others are served meanwhile."""
    daemon.wait_idle()
    rude = [daemon.new_channel() for _ in range(8)]
    calls = [pb_grpc.InferenceServiceStub(channel).StreamChat(endless(max_tokens=1500), timeout=TIMEOUT) for channel in rude]
    eventually(lambda: daemon.metric('latentd_requests_running') == len(calls))
    _, expected = golden('p00')
    assert Answer(daemon.stub.StreamChat(chat_request('What is MLA?'), timeout=TIMEOUT)).content == expected['text']
    daemon.wait_idle()
    # What was generated waits for them, whole.
    answer = Answer(calls[0])
    assert answer.usage.completion_tokens == 1500
    for channel in rude:
        channel.close()
    daemon.wait_idle(timeout=5)


async def stream_many(address, requests):
    """All at once over one connection; the answers in order."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)

        async def one(request):
            return Answer([event async for event in stub.StreamChat(request, timeout=300)])

        return await asyncio.gather(*(one(r) for r in requests))


def test_a_thousand_streams_at_once(daemon):
    prompts = [('What is MLA?', 'p00'), ('How do I use latentd?', 'p02'), ('what is the capital of China?', 'p13')]
    requests = [chat_request(prompts[i % 3][0], limits=pb.Limits(max_tokens=12), outputs=pb.Outputs(token_ids=True)) for i in range(1000)]
    expected = [golden(name)[1]['tokens'][:12] for _, name in prompts]
    answers = asyncio.run(stream_many(daemon.address, requests))
    for i, answer in enumerate(answers):
        assert answer.token_ids == expected[i % 3]
    daemon.wait_idle(timeout=5)


def test_idle_then_a_burst(daemon):
    daemon.wait_idle()
    time.sleep(1.5)
    cpu = lambda: daemon.metric('process_cpu_seconds_total')
    try:
        before = cpu()
    except AssertionError:
        before = None
    time.sleep(1)
    if before is not None:
        assert cpu() - before < 0.2, 'an idle daemon does nothing'
    started = time.monotonic()
    answers = asyncio.run(stream_many(daemon.address, [chat_request('What is MLA?')] * 30))
    assert {a.content for a in answers} == {golden('p00')[1]['text']}
    assert time.monotonic() - started < 30


def test_a_full_queue_refuses_and_says_when_to_come_back():
    with Daemon('--max-running', '1', '--max-waiting', '2') as daemon:
        daemon.wait_ready()
        calls = [daemon.stub.StreamChat(endless(), timeout=TIMEOUT)]
        next(calls[0])
        calls += [daemon.stub.StreamChat(endless(), timeout=TIMEOUT) for _ in range(2)]
        eventually(lambda: daemon.metric('latentd_requests_waiting') == 2)
        error = error_of(lambda: daemon.stub.StreamChat(endless(), timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)['RetryInfo'].retry_delay.ToTimedelta().total_seconds() > 0
        assert details(error)['ErrorInfo'].reason
        assert daemon.metric('latentd_admission_rejections_total') >= 1
        for call in calls:
            call.cancel()
        daemon.wait_idle(timeout=5)
        assert Answer(daemon.stub.StreamChat(chat_request('What is MLA?'), timeout=TIMEOUT)).content == golden('p00')[1]['text']


def test_queue_timeout():
    from google.protobuf import duration_pb2
    with Daemon('--max-running', '1') as daemon:
        daemon.wait_ready()
        running = daemon.stub.StreamChat(endless(), timeout=TIMEOUT)
        next(running)
        request = chat_request('Hi', serving=pb.Serving(queue_timeout=duration_pb2.Duration(nanos=300_000_000)))
        error = error_of(lambda: daemon.stub.StreamChat(request, timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and 'waited' in error.details()
        running.cancel()
        daemon.wait_idle(timeout=5)


def test_a_cache_that_is_too_small_preempts_and_changes_nothing():
    """8 answers compete for 12 blocks; each is the one it gets alone."""
    # Texts to repeat: the model is sure of every token, whichever kernels compute it again.
    longest = sorted(evaluate.prompts(categories=['copy']), key=lambda prompt: -len(prompt.expected))[:8]
    requests = [chat_request(p.text.removeprefix(data.BOS + data.USER).removesuffix(data.ASSISTANT), outputs=pb.Outputs(token_ids=True))
                for p in longest]
    with Daemon('--kv-cache-tokens', '768') as daemon:
        daemon.wait_ready()
        alone = [Answer(daemon.stub.StreamChat(request, timeout=TIMEOUT)) for request in requests]
        assert [a.content for a in alone] == [p.expected for p in longest]
        together = asyncio.run(stream_many(daemon.address, requests))
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
        assert daemon.metric('latentd_preemptions_total') > 0
        daemon.wait_idle(timeout=5)
