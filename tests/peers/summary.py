"""Counts the results of each suite for owl2's model types and LLaVA, and compares their failures.

A test run with `-m peers` fails if owl2 has a failure that LLaVA does not have and that
docs/ecosystem.md does not list. There a line names a test in backticks, with its suite and if
necessary its class, followed by its reason.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

ECOSYSTEM = Path(__file__).parents[2] / "docs" / "ecosystem.md"
NODE = re.compile(r"tests/peers/test_(\w+)\.py::(?:Test)?((?:Owl2|DocOwl|Llava)\w*)::(.+)")


def _names(suite, tests, test):
    return {f"{suite}::{test}", f"{suite}::{tests}::{test}"}


class Summary:
    """The results of all suites; a plugin of pytest."""

    def __init__(self):
        # By suite and test class, the outcome of each test; a test fails with one of its subtests.
        self.outcomes = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        match = NODE.match(report.nodeid)
        if not match or (report.when != "call" and report.outcome == "passed"):
            return
        suite, tests, test = match.groups()
        if self.outcomes[suite, tests].get(test) != "failed":
            self.outcomes[suite, tests][test] = report.outcome

    def failures(self, of_llava):
        """Suite, class and name of failed tests: of LLaVA, or of owl2's model types."""
        return {
            (suite, tests, test)
            for (suite, tests), outcomes in self.outcomes.items()
            for test, outcome in outcomes.items()
            if tests.startswith("Llava") == of_llava and outcome == "failed"
        }

    def unexpected(self):
        """Failures of owl2 that are neither LLaVA's nor documented."""
        known = set(re.findall(r"`([\w.:\[\]-]+)`", ECOSYSTEM.read_text()))
        of_llava = {(suite, test) for suite, _, test in self.failures(True)}
        return sorted(
            f"{suite}::{tests}::{test}"
            for suite, tests, test in self.failures(False)
            if (suite, test) not in of_llava
            and known.isdisjoint(
                _names(suite, tests, test) | _names(suite, tests, test.split("[")[0])
            )
        )

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("suites of other projects")
        terminalreporter.line(f"{'suite':<18}{'tests':<28}{'passed':>8}{'failed':>8}{'skipped':>8}")
        for (suite, tests), outcomes in sorted(self.outcomes.items()):
            counts = Counter(outcomes.values())
            columns = "".join(f"{counts[name]:>8}" for name in ("passed", "failed", "skipped"))
            terminalreporter.line(f"{suite:<18}{tests:<28}{columns}")
        for test in self.unexpected():
            terminalreporter.line(f"not a failure of LLaVA, not documented: {test}")

    def pytest_sessionfinish(self, session):
        if self.outcomes and session.exitstatus in (0, 1):
            session.exitstatus = int(bool(self.unexpected()))
