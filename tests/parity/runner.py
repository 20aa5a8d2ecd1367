"""`python -m tests.parity FILE.npz ...` compares this project with golden arrays, through its public classes.

One line per case, `case PASS|FAIL|SKIP max_abs max_rel`, then a count; what missed goes to standard error.
Exit code 0: no case failed. 1: a miss or an unknown case. 2: a file that cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.parity import ops_cam_search, ops_crd_dot, ops_feature, ops_logit  # noqa: F401 - they enter operations
from tests.parity.case import Case, Check, Comparison, read_cases
from tests.parity.distillation import check_operation
from tests.parity.networks import check_dkt, check_dytox, check_merge
from tests.parity.numbers import check_herding, check_metrics, check_schedule

CHECKS: dict[str, Check] = {
    "dkt": check_dkt,
    "dytox": check_dytox,
    "herding": check_herding,
    "merge": check_merge,
    "metrics": check_metrics,
    "schedule": check_schedule,
}


def check(case: Case) -> Comparison:
    """Everything that can be compared in a case; whatever goes wrong is a miss."""
    comparison = Comparison()
    component = case.name.split("/")[0]
    known = check_operation if "hp/op" in case else CHECKS.get(component)
    if known is None:
        comparison.misses.append(f"{component!r} is unknown; known: {', '.join(CHECKS)}, or any case with hp/op")
        return comparison
    try:
        known(case, comparison)
    except Exception as error:  # a case that cannot be computed is a miss of that case, the others still count
        comparison.misses.append(f"{type(error).__name__}: {error}")
    if "hp/expect" in case and str(case["hp/expect"]) == "optional":  # said, but not required
        comparison.excused, comparison.misses = [*comparison.excused, *comparison.misses], []
    if not comparison.num_compared and not comparison.misses and not comparison.excused:
        comparison.misses.append("nothing to compare")
    return comparison


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.npz")
    num_passed = num_failed = 0
    for path in parser.parse_args(arguments).files:
        try:
            cases = read_cases(path)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        for case in cases:
            comparison = check(case)
            status = "FAIL" if comparison.misses else "PASS"
            print(f"{case.name} {status} {comparison.max_abs:.3g} {comparison.max_rel:.3g}", flush=True)
            unread = sorted(case.arrays.keys() - case.read)
            if unread and not comparison.misses:
                comparison.excused.append(f"not compared: {', '.join(unread)}")
            for note in [*comparison.misses, *comparison.excused]:
                print(f"  {case.name}: {note}", file=sys.stderr)
            num_failed += status == "FAIL"
            num_passed += status == "PASS"
    print(f"{num_passed + num_failed} cases: {num_passed} passed, {num_failed} failed")
    return 1 if num_failed else 0
