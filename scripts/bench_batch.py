#!/usr/bin/env python3
"""What a batch job of many small items takes, through the daemon and `latentd batch`: upload, running, results, memory.

    scripts/bench_batch.py [--program build/latentd] [--items 100000] [--max-tokens 1] [--model small|demo] [--dir DIR]

  small   random weights of one tiny layer: what is measured is everything but the model
  demo    the demo model; its own speed decides how fast items are finished

Prints one JSON line. `check` is the reading of the file by the command, which it does before it sends anything; `upload` is from the first
byte to the acknowledged job; memory is that of the daemon (resident, the most it had) beyond what it had with the model loaded. CPU times
say what a machine that does nothing else would do: the command and the daemon work at the same time.
--dir: where the store is, so that its disk counts. Needs Python alone.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / 'deploy' / 'demo-model'
SMALL = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, first_k_dense_replace=1,
             num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
             v_head_dim=16)


def make_small_model(folder: pathlib.Path):
    config = json.loads((DEMO_MODEL / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **SMALL}))
    for name in ('generation_config.json', 'tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return ['--model', str(folder), '--load-format', 'dummy']


def make_items(path: pathlib.Path, count: int, max_tokens: int):
    with path.open('w') as file:
        for index in range(count):
            body = {'prompt': f'Item {index}: say yes or no.', 'max_tokens': max_tokens, 'temperature': 0, 'ignore_eos': True}
            file.write(json.dumps({'custom_id': f'item-{index}', 'method': 'POST', 'url': '/v1/completions', 'body': body}) + '\n')


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


class Daemon:
    """`latentd serve` with a store for batch jobs."""

    def __init__(self, program, *flags):
        self.program, self.address, self.http = program, *(f'127.0.0.1:{free_port()}' for _ in range(2))
        self.log = tempfile.NamedTemporaryFile('w+', prefix='latentd-', suffix='.log')
        self.process = subprocess.Popen([program, 'serve', '--listen', self.address, '--http-listen', self.http, '--engine', 'cpu',
                                         '--log-level', 'warning', *flags], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        end = time.monotonic() + 60
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                sys.exit(f'the daemon does not serve:\n{pathlib.Path(self.log.name).read_text()[-2000:]}')
            time.sleep(0.05)

    def get(self, path) -> str:
        with urllib.request.urlopen(f'http://{self.http}{path}', timeout=30) as answer:
            return answer.read().decode()

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get('/readyz'))
        return False

    def memory(self, name) -> int:
        """VmRSS or VmHWM, in bytes."""
        status = pathlib.Path(f'/proc/{self.process.pid}/status').read_text()
        return int(re.search(rf'^{name}:\s+(\d+) kB', status, re.M).group(1)) * 1024

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        fields = pathlib.Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')

    def batch(self, *arguments, stdout=subprocess.PIPE, code=0) -> str:
        done = subprocess.run([self.program, 'batch', *map(str, arguments), '--target', self.address], stdin=subprocess.DEVNULL,
                              stdout=stdout, stderr=subprocess.PIPE, text=True)
        if done.returncode != code:
            sys.exit(f'latentd batch {arguments[0]}: exit code {done.returncode}\n{done.stderr}')
        return (done.stdout or '').strip()

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Cost:
    """What a command took: seconds, and seconds of CPU time, its own and the daemon's."""

    def __init__(self, daemon, call):
        own, theirs, started = self.own(), daemon.cpu(), time.monotonic()
        self.value = call()
        self.seconds, self.cpu, self.daemon_cpu = time.monotonic() - started, self.own() - own, daemon.cpu() - theirs

    @staticmethod
    def own() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime


def measure(daemon, file: pathlib.Path, items: int, out: pathlib.Path) -> dict:
    loaded = daemon.memory('VmRSS')
    # A file that is wrong at its end is read whole, and not sent.
    bad = file.with_suffix('.bad.jsonl')
    bad.write_bytes(file.read_bytes() + b'{}\n')
    check = Cost(daemon, lambda: daemon.batch('submit', bad, code=2))
    submit = Cost(daemon, lambda: daemon.batch('submit', file))
    name = submit.value
    upload_peak = daemon.memory('VmHWM') - loaded
    run = Cost(daemon, lambda: daemon.batch('watch', name))
    job = json.loads(daemon.batch('status', name, '--json'))
    lasted = time_of(job['end_time']) - time_of(job['start_time'])
    run_peak = daemon.memory('VmHWM') - loaded
    export = Cost(daemon, lambda: daemon.batch('export', name, out))
    upload = submit.seconds - check.seconds

    def microseconds(cpu):
        return round(1e6 * cpu / items, 1)
    return {
        'items': items, 'items_succeeded': int(job['counts']['succeeded']),
        'check_items_per_s': round(items / check.seconds), 'upload_items_per_s': round(items / upload),
        'finished_items_per_s': round(items / lasted), 'export_items_per_s': round(items / export.seconds),
        'cpu_us_per_item': {
            'check': microseconds(check.cpu), 'upload': microseconds(submit.cpu - check.cpu), 'upload_daemon': microseconds(submit.daemon_cpu),
            'run_daemon': microseconds(run.daemon_cpu), 'export': microseconds(export.cpu), 'export_daemon': microseconds(export.daemon_cpu),
        },
        'memory_growth_mb': {
            'upload': round(upload_peak / 1e6, 1), 'run': round(run_peak / 1e6, 1),
            'export': round((daemon.memory('VmHWM') - loaded) / 1e6, 1),
        },
    }


def time_of(text: str) -> float:
    """Seconds of a Timestamp in protobuf's JSON."""
    whole, _, fraction = text.rstrip('Z').partition('.')
    return time.mktime(time.strptime(whole, '%Y-%m-%dT%H:%M:%S')) + float('0.' + (fraction or '0'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--program', default=str(ROOT / 'build' / 'latentd'))
    parser.add_argument('--items', type=int, default=100_000)
    parser.add_argument('--max-tokens', type=int, default=1)
    parser.add_argument('--model', choices=['small', 'demo'], default='small')
    parser.add_argument('--dir')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='latentd-bench-batch-', dir=options.dir) as name:
        folder = pathlib.Path(name)
        make_items(folder / 'items.jsonl', options.items, options.max_tokens)
        if options.model == 'small':
            (folder / 'model').mkdir()
            model = make_small_model(folder / 'model')
        else:
            model = ['--model', str(DEMO_MODEL)]
        daemon = Daemon(options.program, '--batch-dir', str(folder / 'store'), '--kv-cache-memory', '16MiB', *model)
        try:
            result = measure(daemon, folder / 'items.jsonl', options.items, folder / 'out')
        finally:
            daemon.stop()
    print(json.dumps({'model': options.model, 'max_tokens': options.max_tokens, **result}))


if __name__ == '__main__':
    main()
