"""Counts the results of each suite for owl2 and LLaVA, and compares their failures.

A test run with `-m peers` fails if owl2 has a failure that LLaVA does not have and that
docs/ecosystem.md does not list. There a line names a test in backticks, followed by its reason.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

ECOSYSTEM = Path(__file__).parents[2] / "docs" / "ecosystem.md"
NODE = re.compile(r"tests/peers/test_(\w+)\.py::(?:Test)?(Owl2|Llava)(\w*)::(.+)")


class Summary:
    """The results of all suites; a plugin of pytest."""

    def __init__(self):
        self.counts = defaultdict(Counter)  # by (suite, subject and variant)
        self.failures = defaultdict(set)  # names of tests by (suite, subject)

    def pytest_runtest_logreport(self, report):
        match = NODE.match(report.nodeid)
        if not match or (report.when != "call" and report.outcome == "passed"):
            return
        suite, subject, variant, test = match.groups()
        self.counts[suite, subject + variant][report.outcome] += 1
        if report.failed:
            self.failures[suite, subject].add(test)

    def unexpected(self):
        """Names of owl2's failures (with their suite) that are neither LLaVA's nor documented."""
        known = set(re.findall(r"`([\w.:\[\]-]+)`", ECOSYSTEM.read_text()))
        return sorted(
            f"{suite}::{test}"
            for (suite, subject), tests in self.failures.items()
            if subject == "Owl2"
            for test in tests - self.failures.get((suite, "Llava"), set())
            if not {f"{suite}::{test}", f"{suite}::{test.split('[')[0]}"} & known
        )

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("suites of other projects")
        terminalreporter.line(f"{'suite':<18}{'tests':<28}{'passed':>8}{'failed':>8}{'skipped':>8}")
        for (suite, tests), counts in sorted(self.counts.items()):
            columns = "".join(f"{counts[name]:>8}" for name in ("passed", "failed", "skipped"))
            terminalreporter.line(f"{suite:<18}{tests:<28}{columns}")
        for test in self.unexpected():
            terminalreporter.line(f"not a failure of LLaVA, not documented: {test}")

    def pytest_sessionfinish(self, session):
        if self.counts and session.exitstatus in (0, 1):
            session.exitstatus = int(bool(self.unexpected()))
