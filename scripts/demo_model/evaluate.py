#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How many of the demo model's held-out prompts a running latentd answers right, beside what the training measured.

    .venv/bin/python scripts/demo_model/evaluate.py 127.0.0.1:50051

951 prompts in 18 categories, greedy; an answer is right if it is the expected one to the letter. Exit code 1: the share
differs from metrics.json's by more than --tolerance percentage points. 11 prompts are longer than the 8,192 tokens of
the model's config.json, as the training asked them all the same; a server whose max_position_embeddings is 16,384
(YaRN's factor stays what it is) takes them too.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import data  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
METRICS = ROOT / 'deploy' / 'demo-model' / 'metrics.json'
# As train.py evaluated: its seed, and so many tokens more than the expected answer has.
SEED = 123
SPARE_TOKENS = 12

Prompt = collections.namedtuple('Prompt', 'category text expected')


def trained() -> dict:
    """What the training measured of the FP8 model: category -> (prompts, share answered right)."""
    tasks = json.loads(METRICS.read_text())['fp8_w8a8']['tasks']
    return {name: (task['n'], task['exact']) for name, task in tasks.items()}


def prompts(per_category=None, categories=None) -> list:
    """The evaluation set of the training, or the first `per_category` prompts of each of `categories`."""
    arguments = json.loads(METRICS.read_text())['args']
    whole = [Prompt(*entry[:3]) for entry in data.eval_set(SEED, arguments['eval_n'], per_long=arguments['eval_long'])]
    counts = collections.Counter(prompt.category for prompt in whole)
    assert counts == {name: n for name, (n, _) in trained().items()}, f'these are not the prompts of the training: {counts}'
    taken = collections.Counter()
    chosen = []
    for prompt in whole:
        taken[prompt.category] += 1
        if (categories is None or prompt.category in categories) and (per_category is None or taken[prompt.category] <= per_category):
            chosen.append(prompt)
    return chosen


async def answers(pb, stub, asked, concurrency=64, timeout=600) -> list:
    """The model's answers to `asked`, in their order; None where prompt and answer do not fit into max_model_len.

    `stub` is one of grpc.aio; `concurrency` streams at a time.
    """
    places = asyncio.Semaphore(concurrency)
    max_model_len = (await stub.GetModel(pb.GetModelRequest(), timeout=timeout)).model.max_model_len

    async def length(text):
        return len((await stub.Tokenize(pb.TokenizeRequest(text=text, parse_control_tokens=True), timeout=timeout)).token_ids)

    async def answer(prompt):
        async with places:
            max_tokens = await length(prompt.expected) + SPARE_TOKENS
            if await length(prompt.text) + max_tokens > max_model_len:
                return None
            request = pb.CompleteRequest(text=prompt.text, parse_control_tokens=True, sampling=pb.Sampling(temperature=0),
                                         limits=pb.Limits(max_tokens=max_tokens), outputs=pb.Outputs(skip_special_tokens=False))
            return ''.join([event.delta.content async for event in stub.StreamComplete(request, timeout=timeout)
                            if event.WhichOneof('event') == 'delta'])

    return await asyncio.gather(*(answer(prompt) for prompt in asked))


def score(asked, given) -> dict:
    """category -> (prompts, answered right), of those that were answered."""
    result = {}
    for prompt, text in zip(asked, given, strict=True):
        if text is None:
            continue
        n, right = result.get(prompt.category, (0, 0))
        result[prompt.category] = (n + 1, right + (text == prompt.expected))
    return result


def shares(scores) -> tuple:
    """The share of all answers that are right, and what the training's shares of the same categories make."""
    total = sum(n for n, _ in scores.values())
    reference = trained()
    return (sum(right for _, right in scores.values()) / total,
            sum(n * reference[name][1] for name, (n, _) in scores.items()) / total)


def load_stubs():
    import grpc_tools
    from grpc_tools import protoc
    included = pathlib.Path(grpc_tools.__file__).parent / '_proto'  # google/protobuf/*.proto
    with tempfile.TemporaryDirectory() as stubs:
        protoc.main(['protoc', f'-I{ROOT / "proto"}', f'-I{included}', f'--python_out={stubs}', f'--grpc_python_out={stubs}',
                     'latentd/v1/inference.proto'])
        sys.path.insert(0, stubs)
        from latentd.v1 import inference_pb2, inference_pb2_grpc
    return inference_pb2, inference_pb2_grpc


async def ask(address, asked, concurrency):
    import grpc
    pb, pb_grpc = load_stubs()
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            return await answers(pb, pb_grpc.InferenceServiceStub(channel), asked, concurrency)
        except grpc.aio.AioRpcError as error:
            sys.exit(f'{address}: {error.code().name}: {error.details()}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('address', help='host:port of a latentd that serves the demo model')
    parser.add_argument('--concurrency', type=int, default=64, help='streams at a time (default: 64)')
    parser.add_argument('--per-category', type=int, help='ask the first so many of each category (default: all)')
    parser.add_argument('--tolerance', type=float, default=0.5, help='percentage points, of the whole (default: 0.5)')
    parser.add_argument('--show', type=int, default=0, help='print so many wrong answers')
    options = parser.parse_args()

    asked = prompts(options.per_category)
    started = time.monotonic()
    given = asyncio.run(ask(options.address, asked, options.concurrency))
    seconds = time.monotonic() - started
    scores, reference = score(asked, given), trained()
    wrong = [(prompt, text) for prompt, text in zip(asked, given) if text not in (prompt.expected, None)]
    for prompt, text in wrong[:options.show]:
        print(f'{prompt.category}: {prompt.text[-200:]!r}\n  expected {prompt.expected!r}\n  answered {text!r}')
    print(f'{"category":12} {"prompts":>8} {"right":>7} {"training":>9}')
    for name, (n, right) in sorted(scores.items()):
        print(f'{name:12} {n:8} {right / n:7.1%} {reference[name][1]:9.1%}')
    share, expected = shares(scores)
    print(f'{"all":12} {sum(n for n, _ in scores.values()):8} {share:7.2%} {expected:9.2%}   {seconds:.1f} s')
    if None in given:
        print(f'{given.count(None)} prompts are left out: with their answers they are longer than max_model_len')
    return 0 if abs(share - expected) * 100 <= options.tolerance else 1


if __name__ == '__main__':
    sys.exit(main())
