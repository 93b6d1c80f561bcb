#!/usr/bin/env python3
"""Writes README's table of configuration keys from `latentd serve --help`, so that it says what the program does.

    .venv/bin/python scripts/make_config_table.py [--check] [build/latentd]

--check changes nothing and exits 1 when the table is out of date.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN = '<!-- config table: scripts/make_config_table.py -->\n'
END = '<!-- end of config table -->\n'


def table(help_text: str) -> str:
    """One row for each option of the group Configuration: `  --flag,--alias UNIT=DEFAULT   Help. [RANGE]`."""
    rows = ['| key | default | meaning |', '|---|---|---|']
    group = help_text.partition('\nConfiguration:\n')[2]
    # Each help text begins in a column of its own, on the flag's line or the next.
    for option in re.findall(r'^  (--.*(?:\n {6,}.*)*)', group, re.M):
        flags, _, rest = option.partition(' ')
        value, meaning = re.split(r'\s{2,}|\n\s*|(?:(?<=\d)|(?<=true)|(?<=false)) (?=[A-Z])', rest, maxsplit=1)
        unit, _, default = value.partition('=')
        meaning = re.sub(r'\s+', ' ', meaning)
        bounds = re.search(r' \[(.*) \.\. (.*)\]$', meaning)
        if bounds:
            unit = '' if unit in ('duration', 'bytes') else ' ' + unit
            meaning = f'{meaning[:bounds.start()]} {bounds.group(1)} to {bounds.group(2)}{unit}.'
        elif ',' in unit:
            meaning += f' One of: {unit}.'
        rows.append(f'| `{flags.partition(",")[0][2:].replace("-", "_")}` | {f"`{default}`" if default else ""} | {meaning} |')
    return '\n'.join(rows) + '\n'


def main(arguments) -> int:
    check = '--check' in arguments
    program = next((a for a in arguments if not a.startswith('--')), ROOT / 'build' / 'latentd')
    help_text = subprocess.run([program, 'serve', '--help'], check=True, capture_output=True, text=True).stdout
    readme = ROOT / 'README.md'
    old = readme.read_text()
    head, _, rest = old.partition(BEGIN)
    new = head + BEGIN + table(help_text) + END + rest.partition(END)[2]
    if check:
        if new != old:
            print('README.md: the table of configuration keys is out of date; run scripts/make_config_table.py')
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
