"""The demo model's held-out prompts: answered as right as the training measured."""

import asyncio
import os
import sys

import grpc

import client
from client import ROOT, pb, pb_grpc

sys.path.insert(0, str(ROOT / 'scripts' / 'demo_model'))
import evaluate  # noqa: E402

# All prompts that fit, or some hundred short ones. Those are of categories in which the training found no mistake, so
# its share of any part of them is known: all.
WHOLE = client.ENGINE == 'cuda' or os.environ.get('LATENTD_TEST_LONG')
SHORT = 12
TOLERANCE = 0.005


def test_as_many_answers_are_right_as_the_training_measured(daemon):
    if WHOLE:
        asked = evaluate.prompts()
    else:
        easy = [name for name, (_, share) in evaluate.trained().items() if share == 1 and not name.startswith('needle_')]
        asked = evaluate.prompts(SHORT, easy)
        assert len(asked) >= 100

    async def ask():
        async with grpc.aio.insecure_channel(daemon.address) as channel:
            return await evaluate.answers(pb, pb_grpc.InferenceServiceStub(channel), asked)

    given = asyncio.run(ask())
    share, expected = evaluate.shares(evaluate.score(asked, given))
    wrong = [(prompt.text[-80:], prompt.expected, text) for prompt, text in zip(asked, given) if text not in (prompt.expected, None)]
    assert abs(share - expected) <= TOLERANCE, (share, expected, wrong[:5])
