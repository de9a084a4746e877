"""Shows the seed of long fuzz runs in pytest's header."""

from tests.hostile.fuzzing import SEED


def pytest_report_header():
    return f"long fuzz tests: FUZZ_SEED={SEED} repeats this run's"
