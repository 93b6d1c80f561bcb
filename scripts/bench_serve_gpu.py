#!/usr/bin/env python3
"""What clients see of one H100 through gRPC: one rank's work of DeepSeek-V3, random weights, load from `latentd bench serve`.

    scripts/bench_serve_gpu.py [--program build/latentd] [streams] [mixed] [long:TOKENS ...]

  streams      64 streams of 800 tokens that get 300 more: time between two tokens (ITL), beside the engine's own step of 64
               sequences of that length without a server (`latentd bench engine`), and how long the GPU waits between steps
  mixed        ITL of 48 streams while prompts of 2,048 tokens arrive, two a second
  long:32000   time to the first token (TTFT) of one prompt of so many tokens, computed in chunks

Without a name: streams, mixed, long:32000. Each part prints one JSON line. Needs the GPU and Python alone.
"""

import argparse
import contextlib
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A checkpoint without weights: the configuration, and a tokenizer, which a daemon needs.
CHECKPOINT = tempfile.TemporaryDirectory(prefix='latentd-shard16-')
MODEL = ['--model', CHECKPOINT.name, '--load-format', 'dummy', '--engine', 'cuda']
# The middle of the streams' lives: 800 tokens of prompt and half of the 300 that follow.
PROMPT, OUTPUT = 800, 300
STREAMS = 64
MIXED_STREAMS, MIXED_PROMPT, MIXED_OUTPUT = 48, 128, 400
ARRIVING, ARRIVING_PROMPT, ARRIVING_RATE = 20, 2048, 2  # prompts, tokens of each, a second
START_SECONDS = 120


def make_checkpoint():
    folder = pathlib.Path(CHECKPOINT.name)
    shutil.copy(ROOT / 'deploy/configs/shard16.json', folder / 'config.json')
    for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
        shutil.copy(ROOT / 'deploy/demo-model' / name, folder)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Daemon:
    """`latentd serve` on free ports, with its metrics."""

    def __init__(self, program, *flags):
        self.program = program
        self.address, self.http = (f'127.0.0.1:{free_port()}' for _ in range(2))
        self.log = tempfile.NamedTemporaryFile('w+', prefix='latentd-', suffix='.log')
        started = time.monotonic()
        self.process = subprocess.Popen(
            [program, 'serve', *MODEL, '--listen', self.address, '--http-listen', self.http, '--log-level', 'warning', *flags],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() - started > START_SECONDS:
                self.process.kill()
                sys.exit(f'the daemon does not serve:\n{pathlib.Path(self.log.name).read_text()[-2000:]}')
            time.sleep(0.02)
        self.start_seconds = time.monotonic() - started

    def get(self, path) -> str:
        with urllib.request.urlopen(f'http://{self.http}{path}', timeout=10) as answer:
            return answer.read().decode()

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get('/readyz'))
        return False

    def sums(self) -> dict:
        """The sum and the count of each distribution of times."""
        return {m[1]: float(m[2]) for m in re.finditer(r'^(latentd_\w+_seconds_(?:sum|count)\S*) (\S+)$', self.get('/metrics'), re.M)}

    def load(self, **flags) -> subprocess.Popen:
        """Starts a client."""
        arguments = [part for name, value in flags.items() for part in (f'--{name.replace("_", "-")}', str(value))]
        return subprocess.Popen([self.program, 'bench', 'serve', '--target', self.address, '--quiet', *arguments], stdout=subprocess.PIPE, text=True)

    def stop(self):
        self.process.terminate()
        self.process.wait()


def report(client) -> dict:
    out, _ = client.communicate()
    if client.returncode != 0:
        sys.exit(f'latentd bench serve: exit code {client.returncode}\n{out[-2000:]}')
    return json.loads(out)


def times(summary) -> dict:
    return {name: round(summary[name], 2) for name in ('p50', 'p90', 'p99', 'max')}


def mean_ms(before, after, name, label='') -> float:
    """The mean of what was observed between two readings of sums()."""
    def change(part):
        return sum(value - before.get(key, 0) for key, value in after.items() if key.startswith(f'{name}_{part}') and label in key)
    return round(1000 * change('sum') / max(1, change('count')), 3)


def streams(daemon) -> dict:
    before = daemon.sums()
    result = report(daemon.load(concurrency=STREAMS, num_requests=STREAMS, prompt_tokens=PROMPT, output_tokens=OUTPUT))
    after = daemon.sums()
    return {'streams': STREAMS, 'prompt_tokens': PROMPT, 'output_tokens': OUTPUT, 'itl_ms': times(result['latency_ms']['itl']),
            'ttft_ms': times(result['latency_ms']['ttft']),
            'step_ms': mean_ms(before, after, 'latentd_step_seconds', 'kind="decode"'),
            'gpu_busy_ms': mean_ms(before, after, 'latentd_device_busy_seconds'),
            'gpu_idle_ms': mean_ms(before, after, 'latentd_device_idle_seconds'),
            'scheduler_ms': mean_ms(before, after, 'latentd_scheduler_seconds'),
            'completion_tokens_per_s': round(result['throughput']['completion_tokens_per_s'])}


def engine_step(program) -> dict:
    """The same step without a server."""
    done = subprocess.run([program, 'bench', 'engine', *MODEL, '--synthetic-context', '--no-profile', '--decode',
                           f'{STREAMS}:{PROMPT + OUTPUT // 2}'], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])['ms_per_step']


def mixed(daemon) -> dict:
    steady = daemon.load(concurrency=MIXED_STREAMS, num_requests=MIXED_STREAMS, prompt_tokens=MIXED_PROMPT, output_tokens=MIXED_OUTPUT, seed=1)
    time.sleep(2)  # until the streams' own prompts are computed
    prompts = report(daemon.load(request_rate=ARRIVING_RATE, arrivals='constant', num_requests=ARRIVING, prompt_tokens=ARRIVING_PROMPT,
                                 output_tokens=1, seed=2))
    result = report(steady)
    return {'streams': MIXED_STREAMS, 'itl_ms': times(result['latency_ms']['itl']), 'prompts': ARRIVING, 'prompts_per_s': ARRIVING_RATE,
            'prompt_tokens': ARRIVING_PROMPT, 'prompts_ttft_ms': times(prompts['latency_ms']['ttft'])}


def long(daemon, tokens) -> dict:
    result = report(daemon.load(concurrency=1, num_requests=1, prompt_tokens=tokens, output_tokens=16))
    return {'prompt_tokens': tokens, 'ttft_s': round(result['latency_ms']['ttft']['p50'] / 1000, 2),
            'prompt_tokens_per_s': round(tokens / result['latency_ms']['ttft']['p50'] * 1000),
            'itl_ms': round(result['latency_ms']['itl']['p50'], 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('parts', nargs='*', default=['streams', 'mixed', 'long:32000'])
    parser.add_argument('--program', default=str(ROOT / 'build/latentd'))
    parser.add_argument('--max-step-tokens', type=int, default=2048, help='of the daemon (default: 2048, as latentd serve)')
    options = parser.parse_args()
    make_checkpoint()
    for part in options.parts:
        if not re.fullmatch(r'streams|mixed|long:\d+', part):
            parser.error(f"unknown part '{part}'; known are: streams, mixed, long:TOKENS")

    def say(name, **fields):
        print(json.dumps({'name': name, **fields}), flush=True)

    if 'streams' in options.parts:
        say('engine alone', sequences=STREAMS, context=PROMPT + OUTPUT // 2, ms_per_step=engine_step(options.program))
    daemon = Daemon(options.program, '--max-step-tokens', str(options.max_step_tokens))
    try:
        say('start', seconds=round(daemon.start_seconds, 2), max_step_tokens=options.max_step_tokens)
        for part in options.parts:
            if part.startswith('long:'):
                say(part, **long(daemon, int(part.partition(':')[2])))
            else:
                say(part, **{'streams': streams, 'mixed': mixed}[part](daemon))
    finally:
        daemon.stop()
    return 0


if __name__ == '__main__':
    sys.exit(main())
