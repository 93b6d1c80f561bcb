#!/usr/bin/env python3
"""Holds the dependency rule: proto <- server -> scheduler -> engine/{engine,step,status}.h, and inside the
engine cuda -> comm -> model, cpu -> comm -> model. A third-party package is met in one place. Also include
guards. Prints each offence as file:line: text, and exits 1 if there was one.
"""

import pathlib
import re
import subprocess
import sys

# Folder -> what of ours it may include (prefixes). The longest matching folder decides.
UPWARD = ['engine/engine.h', 'engine/group_member.h', 'engine/status.h', 'engine/step.h']
SHARED = ['engine/plan_check.h', 'engine/plan_split.h', 'engine/sampling.h', 'engine/trace_sink.h']  # by all engines
OURS = {
    'engine/': [*UPWARD, *SHARED, 'engine/local_group.h'],
    'engine/model/': ['engine/status.h', 'engine/step.h', 'engine/model/'],  # step.h: what a block of the cache is
    'engine/comm/': ['engine/status.h', 'engine/model/', 'engine/comm/'],
    'engine/cpu/': [*UPWARD, *SHARED, 'engine/model/', 'engine/comm/', 'engine/cpu/'],
    'engine/cuda/': [*UPWARD, *SHARED, 'engine/model/', 'engine/comm/', 'engine/cuda/'],
    'scheduler/': ['engine/engine.h', 'engine/step.h', 'engine/status.h', 'scheduler/'],
    # The text layer needs no other layer: it is tested, fuzzed and could be taken out alone.
    'server/text/': ['engine/status.h', 'engine/step.h', 'server/text/'],
    'server/': ['engine/', 'scheduler/', 'server/'],
}
TOP_LEVEL = ('engine/', 'scheduler/', 'server/', 'tests/', 'proto/')

# Third-party headers -> the folders that may include them.
PACKAGES = [
    (r'grpc(pp|\+\+)?/|google/(protobuf|rpc)/|latentd/v1/|grpc/health/', ['server/']),
    (r'yaml-cpp/', ['server/']),
    (r'CLI/', ['server/']),
    (r'sqlite3', ['server/batch/']),
    (r'nccl', ['engine/comm/']),
    (r'cuda|cublas', ['engine/cuda/', 'engine/comm/']),
    (r'flashinfer/|cutlass/|cute/|cub/|thrust/|deep_gemm/', ['engine/cuda/']),
    # The scheduler is C++ and absl alone.
    (r'spdlog/|nlohmann/', ['server/', 'engine/']),
    # No files and no clocks of its own in the scheduler.
    (r'filesystem|fstream', ['server/', 'engine/']),
]

INCLUDE = re.compile(r'\s*#\s*include\s*[<"]([^>"]+)[>"]')


def offences(path: str):
    text = pathlib.Path(path).read_text()
    folder = max((f for f in OURS if path.startswith(f)), key=len, default=None)
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        header = match.group(1)
        if header.startswith('../') or '/../' in header:
            yield f'{path}:{number}: includes are relative to the root: {header}'
        if path.startswith('tests/'):
            continue
        if header.startswith('tests/'):
            yield f'{path}:{number}: nothing includes tests: {header}'
        elif header.startswith(TOP_LEVEL) and not any(header.startswith(p) for p in OURS[folder]):
            yield f'{path}:{number}: {folder} may include of ours only {", ".join(OURS[folder])}, not {header}'
        for package, homes in PACKAGES:
            if re.match(package, header) and not any(path.startswith(h) for h in homes):
                yield f'{path}:{number}: {header} belongs into {" or ".join(homes)} alone'
    if path.endswith(('.h', '.cuh')):
        guard = 'LATENTD_' + re.sub(r'\W', '_', path.upper()) + '_'
        if f'#ifndef {guard}\n#define {guard}\n' not in text:
            yield f'{path}:1: the include guard is not {guard}'


def main():
    files = subprocess.run(['git', 'ls-files', '*.h', '*.cc', '*.cu', '*.cuh'], check=True, capture_output=True,
                           text=True).stdout.split()
    found = [o for f in files if pathlib.Path(f).exists() for o in offences(f)]
    print('\n'.join(found) if found else f'{len(files)} files keep the dependency rule')
    return 1 if found else 0


if __name__ == '__main__':
    sys.exit(main())
