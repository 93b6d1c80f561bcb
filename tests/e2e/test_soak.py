"""A mix of clients, for 10 seconds; for 30 minutes with LATENTD_TEST_LONG=1. Nothing may be left behind."""

import asyncio
import os
import random
import time

import grpc

from client import Answer, Daemon, chat_request, golden, pb, pb_grpc

SECONDS = 1800 if os.environ.get('LATENTD_TEST_LONG') else 10
CLIENTS = 32


async def finished(stub, rng):
    """An answer to its end; it is always the same one."""
    request = chat_request('What is MLA?', serving=pb.Serving(cache_salt=rng.choice(['', 'a', 'b']), priority=rng.randint(-5, 5)))
    answer = Answer([event async for event in stub.StreamChat(request, timeout=120)])
    assert answer.content == golden('p00')[1]['text']


async def whole(stub, rng):
    request = chat_request('Say something.', temperature=1.5, limits=pb.Limits(max_tokens=rng.randint(1, 60), stop=['e', 'the ']))
    assert (await stub.Chat(request, timeout=120)).choices


async def cancelled(stub, rng):
    call = stub.StreamChat(chat_request('Count to 25.', limits=pb.Limits(max_tokens=2000, ignore_eos=True)), timeout=120)
    for _ in range(rng.randint(0, 20)):
        await call.read()
    call.cancel()


async def too_late(stub, rng):
    try:
        await stub.Chat(chat_request('Count to 25.', limits=pb.Limits(max_tokens=4000, ignore_eos=True)), timeout=rng.uniform(0.001, 0.5))
        raise AssertionError('4,000 tokens in half a second')
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def refused(stub, rng):
    try:
        await stub.Chat(chat_request('Hi', temperature=rng.uniform(3, 9)), timeout=120)
        raise AssertionError('it was not refused')
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


async def soak(daemon, seed):
    end = time.monotonic() + SECONDS
    resident = []

    async def client(index):
        rng = random.Random(seed + index)
        while time.monotonic() < end:
            async with grpc.aio.insecure_channel(daemon.address, options=[('grpc.use_local_subchannel_pool', 1)]) as channel:
                stub = pb_grpc.InferenceServiceStub(channel)
                for _ in range(rng.randint(1, 10)):
                    await rng.choice([finished, whole, cancelled, too_late, refused])(stub, rng)

    async def sampler():
        while time.monotonic() < end:
            await asyncio.sleep(SECONDS / 10)
            resident.append(await asyncio.to_thread(daemon.metric, 'process_resident_memory_bytes'))

    await asyncio.gather(sampler(), *(client(i) for i in range(CLIENTS)))
    return resident


def test_nothing_is_left_behind():
    seed = int(os.environ.get('LATENTD_SEED', random.randrange(1 << 30)))
    print(f'LATENTD_SEED={seed}')
    # A small cache: prefixes are evicted and sequences preempted all the time.
    with Daemon('--kv-cache-tokens', '8192', '--max-running', '24') as daemon:
        daemon.wait_ready()
        resident = asyncio.run(soak(daemon, seed))
        daemon.wait_idle(timeout=10)
        assert daemon.metric('latentd_requests_total', grpc_code='OK') > CLIENTS
        assert daemon.metric('latentd_requests_total', grpc_code='INTERNAL') == 0
        # After the first part memory is what it stays.
        assert resident[-1] < resident[len(resident) // 3] + (32 << 20), resident
        daemon.signal()
        assert daemon.wait(20) == 0, daemon.output()[-5000:]
