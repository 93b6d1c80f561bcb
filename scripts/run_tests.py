"""All tests, one after the other, and one line of counts at the end. Called by scripts/test.

Steps: format, includes, proto (lint) · build, with the CUDA engine where there is its compiler, unit (ctest; what needs a
GPU is skipped by name where there is none) · e2e (pytest with real clients) · deploy (the Helm chart, alerts) · asan and tsan (the host's tests again, under
sanitizers) · fuzz (each target for some seconds). A failure does not stop the others.
A test is a GoogleTest or pytest case, or a check of another kind that counts as one.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORES = os.cpu_count() or 1


@dataclasses.dataclass
class Tally:
    passed: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: 'Tally'):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped


def run(command, log: pathlib.Path, env=None, tail=40, timeout=None) -> bool:
    """Runs `command` with its output in `log`; prints the log's end if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as out:
        try:
            code = subprocess.run([str(c) for c in command], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            out.write(f'\nstopped after {timeout} s\n')
            code = -1
    if code != 0:
        print(f'--- {" ".join(str(c) for c in command)}: exit code {code}; the end of {log}:')
        print('\n'.join(log.read_text(errors='replace').splitlines()[-tail:]), flush=True)
    return code == 0


def check(name: str, command, log: str) -> Tally:
    return Tally(passed=1) if run(command, ROOT / 'build' / 'log' / log) else Tally(failed=[name])


# ---- checks of the text ------------------------------------------------------------------------------


def step_format(_) -> Tally:
    return check('format', ['scripts/format', '--check'], 'format.log')


def step_includes(_) -> Tally:
    return check('includes', [sys.executable, 'scripts/check_includes.py'], 'includes.log')


def step_proto(_) -> Tally:
    if not shutil.which('buf'):
        return Tally(skipped=['proto: buf is missing'])
    return check('proto: buf lint', ['buf', 'lint', 'proto'], 'buf.log')


# ---- builds -----------------------------------------------------------------------------------------


def build(directory: str, *options: str, targets=()) -> bool:
    path = ROOT / directory
    started = time.monotonic()
    ok = run(['cmake', '-S', ROOT, '-B', path, '-G', 'Ninja', *options], path / 'log' / 'configure.log') and run(
        ['nice', 'cmake', '--build', path, '-j', CORES, *(['--target', *targets] if targets else [])], path / 'log' / 'build.log', tail=60)
    print(f'  {directory}: {"built" if ok else "NOT built"} in {time.monotonic() - started:.0f} s', flush=True)
    return ok


def step_build(_) -> Tally:
    if not build('build', '-DCMAKE_BUILD_TYPE=Release', '-DLATENTD_SANITIZE=', '-DLATENTD_FUZZ=OFF'):
        return Tally(failed=['build'])
    without_cuda = 'CUDA engine: not built' in (ROOT / 'build' / 'log' / 'configure.log').read_text()
    return Tally(passed=1, skipped=['build: the CUDA engine (no compiler for it)'] if without_cuda else [])


# ---- ctest --------------------------------------------------------------------------------------------


def gtest_tally(report: pathlib.Path) -> Tally:
    tally = Tally()
    for case in ET.parse(report).iter('testcase'):
        name = f'{case.get("classname")}.{case.get("name")}'
        if case.find('failure') is not None:
            tally.failed.append(name)
        elif case.find('skipped') is not None or case.get('status') == 'notrun':
            tally.skipped.append(name)
        else:
            tally.passed += 1
    return tally


def ctest(directory: str, label: str, *arguments: str, env=None) -> Tally:
    """Runs ctest in a build directory. Programs on GoogleTest are counted case by case."""
    path = ROOT / directory
    reports = path / 'reports'
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    junit = path / 'ctest.xml'
    junit.unlink(missing_ok=True)
    run(['ctest', '--test-dir', path, '-j', CORES, '--output-on-failure', '--output-junit', junit, '--no-tests=error', *arguments],
        path / 'log' / 'ctest.log', tail=80, env={'GTEST_OUTPUT': f'xml:{reports}/', **(env or {})})
    if not junit.exists():
        return Tally(failed=[f'{label}: ctest'])
    tally = Tally()
    for entry in ET.parse(junit).iter('testcase'):
        name = entry.get('name')
        report = reports / f'{name}.xml'
        # A program that crashed, or that a sanitizer ended, has no report or one without failures.
        one = gtest_tally(report) if report.exists() else Tally()
        if entry.get('status') == 'run':
            if not report.exists():
                one.passed = 1
        elif entry.find('skipped') is not None or entry.get('status') in ('notrun', 'disabled'):
            # "notrun" without a reason to skip is a program that could not be started.
            message = entry.find('skipped').get('message', '') if entry.find('skipped') is not None else ''
            if 'SKIP' in message.upper() or entry.get('status') == 'disabled':
                one = one if report.exists() else Tally(skipped=[name])
            else:
                one.failed.append(f'{name} ({message or "could not be run"})')
        elif not one.failed:
            one.failed.append(f'{name} (the program failed)')
        one.failed = [f'{label}: {f}' for f in one.failed]
        one.skipped = [f'{label}: {s}' for s in one.skipped]
        tally.add(one)
    return tally


def step_unit(_) -> Tally:
    return ctest('build', 'unit')


def sanitized(directory: str, kind: str, label: str, env) -> Tally:
    if not build(directory, '-DCMAKE_BUILD_TYPE=Release', f'-DLATENTD_SANITIZE={kind}', '-DLATENTD_BENCHMARKS=OFF'):
        return Tally(failed=[f'{label}: build'])
    # Goldens and speed say nothing new here and are slow under a sanitizer.
    return ctest(directory, label, '-LE', 'golden|speed', env=env)


ASAN = {
    'ASAN_OPTIONS': 'detect_stack_use_after_return=1:strict_string_checks=1',
    'UBSAN_OPTIONS': 'print_stacktrace=1',
    'LSAN_OPTIONS': f'suppressions={ROOT}/scripts/lsan.supp:print_suppressions=0',
}


def step_asan(options) -> Tally:
    tally = sanitized('build-asan', 'address', 'asan', ASAN)
    if options.full and (ROOT / 'build-asan' / 'latentd').exists():
        tally.add(e2e('build-asan/latentd', 'e2e-asan', False, ASAN))
    return tally


def step_tsan(_) -> Tally:
    return sanitized('build-tsan', 'thread', 'tsan', {
        'TSAN_OPTIONS': f'suppressions={ROOT}/scripts/tsan.supp:halt_on_error=1:second_deadlock_stack=1',
    })


def step_fuzz(options) -> Tally:
    if not shutil.which('clang++'):
        return Tally(skipped=['fuzz: clang is missing'])
    seconds = 600 if options.full else 10
    if not build('build-fuzz', '-DCMAKE_C_COMPILER=clang', '-DCMAKE_CXX_COMPILER=clang++', '-DCMAKE_BUILD_TYPE=Release',
                 '-DLATENTD_FUZZ=ON', '-DLATENTD_SANITIZE=address', f'-DLATENTD_FUZZ_SECONDS={seconds}', '-DLATENTD_BENCHMARKS=OFF',
                 targets=['latentd_fuzz_targets']):
        return Tally(failed=['fuzz: build'])
    return ctest('build-fuzz', 'fuzz', '-L', 'fuzz')


# ---- end to end ------------------------------------------------------------------------------------------


def pytest(folder: str, label: str, timeout: float, env=None) -> Tally:
    report = ROOT / 'build' / f'{label}.xml'
    report.unlink(missing_ok=True)
    run([sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', f'--junitxml={report}', folder],
        ROOT / 'build' / 'log' / f'{label}.log', tail=120, timeout=timeout, env={'PYTHONDONTWRITEBYTECODE': '1', **(env or {})})
    if not report.exists():
        return Tally(failed=[f'{label}: pytest'])
    tally = Tally()
    for case in ET.parse(report).iter('testcase'):
        name = f'{label}: {case.get("classname").removeprefix(folder.replace("/", ".") + ".")}::{case.get("name")}'
        skipped = case.find('skipped')
        if case.find('failure') is not None or case.find('error') is not None:
            tally.failed.append(name)
        elif skipped is not None:
            tally.skipped.append(f'{name}: {skipped.get("message")}')
        else:
            tally.passed += 1
    return tally


def e2e(binary: str, label: str, full: bool, env=None) -> Tally:
    """The tests of tests/e2e against one build of the program."""
    return pytest('tests/e2e', label, 2 * 3600 if full else 1500, env={'LATENTD_BINARY': str(ROOT / binary), **(env or {})})


def step_deploy(options) -> Tally:
    return pytest('tests/deploy', 'deploy', 600)


def step_e2e(options) -> Tally:
    if options.tools_process:
        options.tools_process.wait()
    return e2e('build/latentd', 'e2e', options.full)


STEPS = {
    'format': step_format,
    'includes': step_includes,
    'build': step_build,
    'unit': step_unit,
    'e2e': step_e2e,
    'proto': step_proto,  # after e2e, which waits for the tools
    'deploy': step_deploy,
    'asan': step_asan,
    'tsan': step_tsan,
    'fuzz': step_fuzz,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog='scripts/test', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('steps', nargs='*', metavar='step', help=f'run only these: {", ".join(STEPS)}')
    parser.add_argument('--full', action='store_true', help='the long forms: more random steps, 10 minutes a fuzz target, a soak; e2e under ASan')
    options = parser.parse_args()
    for step in options.steps:
        if step not in STEPS:
            parser.error(f"unknown step '{step}'; known are: {', '.join(STEPS)}")
    steps = options.steps or list(STEPS)
    if options.full:
        os.environ['LATENTD_TEST_LONG'] = '1'

    # The Go tools compile beside our own code; only e2e, proto and deploy need them.
    options.tools_process = None
    if {'e2e', 'proto', 'deploy'} & set(steps):
        options.tools_process = subprocess.Popen(['nice', 'scripts/setup', '--tools'], cwd=ROOT, stdin=subprocess.DEVNULL)

    total = Tally()
    for step in steps:
        started = time.monotonic()
        print(f'{step} ...', flush=True)
        tally = STEPS[step](options)
        print(f'{step}: {tally.passed} passed, {len(tally.failed)} failed, {len(tally.skipped)} skipped '
              f'in {time.monotonic() - started:.0f} s', flush=True)
        total.add(tally)
        if step == 'build' and tally.failed:
            break  # nothing to test
    if options.tools_process:
        options.tools_process.wait()

    for name in total.skipped:
        print(f'SKIPPED {name}')
    for name in total.failed:
        print(f'FAILED {name}')
    print(f'{total.passed} passed, {len(total.failed)} failed' + (f', {len(total.skipped)} skipped' if total.skipped else ''), flush=True)
    return 1 if total.failed else 0


if __name__ == '__main__':
    sys.exit(main())
