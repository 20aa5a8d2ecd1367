"""`python -m cil.report RUN_OR_FOLDER... [-o report.html]`: a page about one run, or a comparison of several."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cil.report import find_runs, write_comparison, write_report, write_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print where it is; 2 and one message if the input is no good."""
    parser = argparse.ArgumentParser(prog="python -m cil.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_OR_FOLDER", help="run folders, or folders of them")
    parser.add_argument("-o", "--output", type=Path, help="default: report.html in the (first) folder given")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write every figure as SVG and PDF there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table of the runs, means over seeds")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="the same for a paper (booktabs)")
    chosen = parser.parse_args(arguments)
    try:
        runs = find_runs(chosen.paths)
        if len(runs) == 1:
            page = write_report(runs[0], chosen.output, chosen.figures)
        else:
            page = write_comparison(runs, chosen.output or chosen.paths[0] / "report.html", chosen.figures)
        if chosen.csv or chosen.latex:
            write_tables(runs, chosen.csv, chosen.latex)
    except (ValueError, OSError) as error:
        print(f"cil.report: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
