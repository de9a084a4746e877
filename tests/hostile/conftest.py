"""The seed of long fuzz runs is shown before they begin."""

from tests.hostile.fuzzing import SEED


def pytest_report_header():
    return f"long fuzz tests: FUZZ_SEED={SEED} repeats this run's"
