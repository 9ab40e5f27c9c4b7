"""Compare the methods on the quickstart world: rerunnable in pieces, goes on where it was broken off.

python jobs/compare.py                              all cells that are not done yet, then the page
python jobs/compare.py --minutes 30                 begin no cell after that; call it again to go on
python jobs/compare.py --page                       the page alone, from the raw results
"""

import argparse
import time
from pathlib import Path

from rayfuse.cli import errors_shown
from rayfuse.report.terminal import make_console

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=Path("jobs/compare.yaml"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.parquet"), help="raw results, kept")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of results.md and its plots")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"), help="data, signals, models; can be deleted")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/rayfuse"), help="where the world is, or is made")
    parser.add_argument("--minutes", type=float, help="begin no cell after this time")
    parser.add_argument("--at-once", type=int, default=2, help="cells at a time, one core each")
    parser.add_argument("--page", action="store_true", help="only write the page")
    a = parser.parse_args()
    with errors_shown():
        from rayfuse.compare.design import load_plan
        from rayfuse.compare.page import write_page

        plan = load_plan(a.plan)
        if not a.page:
            from rayfuse.compare.grid import compare

            until = None if a.minutes is None else time.time() + 60 * a.minutes
            compare(plan, a.cache.expanduser(), a.work, a.results, make_console(), at_once=a.at_once, until=until)
        write_page(plan, a.results, a.docs)
