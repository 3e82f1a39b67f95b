"""Writes one self-contained HTML file on runs: `python -m experiments.report DIR... [--out=FILE.html]
[--figures=DIR] [--title=TEXT]`.

DIR is a run's working directory or a folder of them, finished or not. --figures writes PNG and SVG for papers
(needs matplotlib). Exit codes: 0, or 2 for a mistake in the command (one line says which).
"""

import argparse
import sys
from pathlib import Path

from absl import logging


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _arguments(argv):
    parser = _Parser(prog="python -m experiments.report", description="A report on runs.", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run's directory, or a folder of them")
    parser.add_argument("--out", help="the HTML file (report.html in the first DIR)")
    parser.add_argument("--figures", metavar="DIR", help="write PNG and SVG figures there too")
    parser.add_argument("--title", help="the heading (the first DIR's name)")
    return parser.parse_args(argv)


def run(args):
    """Reads the runs and writes what was asked for."""
    from experiments.report import page, read

    runs = read.find(args.folders)
    out = Path(args.out or Path(args.folders[0]) / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page.page(runs, args.title or Path(args.folders[0]).resolve().name), encoding="utf-8")
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}: {out}")
    if args.figures:
        from experiments.report import figures

        for path in figures.write(runs, Path(args.figures)):
            print(path)


def main(argv=None):
    """Entry point."""
    logging.set_verbosity(logging.FATAL)
    try:
        run(_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, ImportError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
