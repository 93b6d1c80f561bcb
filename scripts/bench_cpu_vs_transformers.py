#!/usr/bin/env python3
"""The CPU engine beside Hugging Face Transformers (fp32, sdpa, its own KV cache) on the same machine with the same
number of threads, taking turns. Prints one JSON line for each case: the median of both, the ratio, and for prefill
the share of the machine's own fp32 FMA peak, which the engine's benchmark program measures in the same run.

  ninja -C build cpu_engine_benchmark
  .venv/bin/pip install -r scripts/requirements-golden.txt
  .venv/bin/python scripts/bench_cpu_vs_transformers.py

FLOPs are those of the products that the engine computes (absorbed MLA; Transformers' expanded form needs fewer per
token in attention), 2 per multiply-add, counted once whatever instructions compute them.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What is asked of the engine: decode at least `times` Transformers' speed; prefill faster, and 60 % of the FMA peak.
CASES = [
    ({'run': 'decode', 'batch': 1, 'context': 16, 'tokens': 32}, 10),
    ({'run': 'decode', 'batch': 1, 'context': 1024, 'tokens': 32}, 15),
    ({'run': 'decode', 'batch': 8, 'context': 16, 'tokens': 32}, 10),
    ({'run': 'decode', 'batch': 32, 'context': 16, 'tokens': 32}, 15),
    ({'run': 'prefill', 'tokens': 256}, 1),
    ({'run': 'prefill', 'tokens': 1024}, 1),
]
PEAK_SHARE = 0.6


class Engine:
    """The benchmark program, asked one case at a time."""

    def __init__(self, program, model, threads):
        self.process = subprocess.Popen([program, model, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def run(self, command):
        time.sleep(0.1)  # until the other side's threads have stopped spinning
        self.process.stdin.write(json.dumps(command) + '\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'the benchmark program ended with {self.process.wait()}')
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Transformers:
    def __init__(self, model, threads):
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import DeepseekV3ForCausalLM
        from transformers.utils import logging
        sys.path.insert(0, str(ROOT / 'scripts/demo_model'))
        from model import dequant_state
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch = torch
        with tempfile.TemporaryDirectory() as folder:
            config = json.loads((pathlib.Path(model) / 'config.json').read_text())
            config.pop('quantization_config', None)
            pathlib.Path(folder, 'config.json').write_text(json.dumps(config))
            save_file(dequant_state(load_file(f'{model}/model.safetensors')), f'{folder}/model.safetensors',
                      metadata={'format': 'pt'})
            self.model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, command):
        torch = self.torch
        batch, tokens = command.get('batch', 1), command['tokens']
        vocabulary = self.model.config.vocab_size
        with torch.inference_mode():
            if command['run'] == 'prefill':
                ids = torch.randint(3, vocabulary, (batch, tokens))
                begin = time.perf_counter()
                self.model(ids, logits_to_keep=1)
                return batch * tokens / (time.perf_counter() - begin)
            out = self.model(torch.randint(3, vocabulary, (batch, command['context'])), logits_to_keep=1)
            begin = time.perf_counter()
            for _ in range(tokens):
                out = self.model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            return batch * tokens / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--program', default=str(ROOT / 'build/tests/engine/cpu/cpu_engine_benchmark'))
    parser.add_argument('--model', default=str(ROOT / 'deploy/demo-model'))
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()

    engine = Engine(args.program, args.model, args.threads)
    transformers = Transformers(args.model, args.threads)
    peak = engine.run({'run': 'peak'})
    print(json.dumps({'peak_gflops': round(peak['peak_gflops'], 1), 'kernels': peak['kernels'], 'threads': args.threads}))
    missed = 0
    for command, times in CASES:
        engine.run(command)
        transformers.run(command)  # both warm
        ours, theirs, gflops = [], [], []
        for _ in range(args.repeats):
            result = engine.run(command)
            ours.append(result['tokens_per_second'])
            gflops.append(result['gflops'])
            theirs.append(transformers.run(command))
        speed, reference = statistics.median(ours), statistics.median(theirs)
        line = {**command, 'tokens_per_second': round(speed, 1), 'transformers': round(reference, 1),
                'ratio': round(speed / reference, 2), 'wanted_ratio': times}
        met = speed >= times * reference
        if command['run'] == 'prefill':
            peak_gflops = max(peak['peak_gflops'], engine.run({'run': 'peak'})['peak_gflops'])
            share = statistics.median(gflops) / peak_gflops
            line |= {'gflops': round(statistics.median(gflops), 1), 'peak_gflops': round(peak_gflops, 1),
                     'share_of_peak': round(share, 3), 'wanted_share': PEAK_SHARE}
            met = met and share >= PEAK_SHARE
        missed += not met
        print(json.dumps({**line, 'met': met}), flush=True)
    engine.close()
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main())
