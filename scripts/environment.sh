# Sourced by the scripts: where scripts/setup puts programs, and one small function.
# Run from the repository root.

export PATH="$PWD/.tools/bin:$PATH"

# at_least VERSION MINIMUM: true when VERSION >= MINIMUM, number by number ("1.85.0" >= "1.74").
at_least() {
  [ -n "$1" ] && [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -1)" = "$2" ]
}
