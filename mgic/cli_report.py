"""The verb ``report``: the page of everything the records say."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from .cli_output import check_output, console

EXAMPLES = """  mgic report                                             results/ as report.html
  mgic report --results my/results --models '[mgic_resnet50]' --out page.html"""


def add_report(parser: ArgumentParser) -> None:
    """Add the flags of ``report``."""
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--models", type=list[str], default=None, help="networks whose hierarchies are drawn")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page")


def run_report(args: Namespace, given: Sequence[str]) -> int:
    """Run ``report``."""
    from .page import MODELS, build_page
    from .training.files import write_text

    check_output(args.out)
    out = console(stderr=True)
    out.print("building every network of the papers' tables, to count it: about a minute")
    write_text(args.out, build_page(args.results, MODELS if args.models is None else args.models))
    out.print(f"{args.out}: open it in any browser")
    return 0
