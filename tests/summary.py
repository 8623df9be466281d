#!/usr/bin/env python3
"""Runs `cargo test … -- --show-output` and ends with what passed, failed and was skipped.

libtest hides what passing tests print, so a test that skips looks like one that passed. This prints the
usual lines as they come, leaves out the output of passing tests, and lists each "SKIPPED: why" at the end.
The exit status is cargo's.
"""

import re
import subprocess
import sys

BINARY = re.compile(r"\s+(?:Running|Doc-tests) (?:unittests |tests/)?(\S+)")
SECTION = re.compile(r"^---- (\S+) stdout ----$")
RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored")
SKIPPED = re.compile(r"SKIPPED:? *(.*)")


def main() -> int:
    command = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    binary, test, in_successes = "", "", False
    passed = failed = ignored = 0
    skipped = {}
    for line in iter(command.stdout.readline, b""):
        line = line.decode(errors="replace").rstrip("\n")
        if started := BINARY.match(line):
            binary, test, in_successes = started[1], "", False
        if line in ("successes:", "failures:"):
            in_successes = line == "successes:"
        if section := SECTION.match(line):
            test = section[1]
        if why := SKIPPED.search(line):
            skipped.setdefault(f"{binary} {test}".strip(), why[1])
        if result := RESULT.match(line):
            in_successes = False
            counts = [int(count) for count in result.groups()]
            passed, failed, ignored = passed + counts[0], failed + counts[1], ignored + counts[2]
        if not in_successes:
            print(line, flush=True)
    status = command.wait()
    print(f"\nskipped tests: {len(skipped) or 'none'}")
    for name, why in skipped.items():
        print(f"  {name}: {why}")
    if ignored:
        print(f"ignored tests: {ignored}")
    print(f"\n{passed - len(skipped)} passed, {failed} failed, {len(skipped) + ignored} skipped")
    return status


if __name__ == "__main__":
    sys.exit(main())
