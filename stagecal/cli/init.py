"""`stagecal init DIR`: a self-contained site in a directory: configuration, archive, store of raw data, everything."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stagecal.cli.common import BAD_ARGUMENT, DONE, FORBIDDEN, CommandError, parser


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    made = parser(
        program, "Make a self-contained site in a directory, to try and to test.", "stagecal init ~/stagecal-site"
    )
    made.add_argument("directory", metavar="DIR", help="a directory that does not exist or is empty")
    made.add_argument(
        "--no-data",
        action="store_true",
        help="make neither the CASA worker environment nor raw data now, but at their first use",
    )
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Make the site and say how to go on."""
    from stagecal.embedded import make_data, make_site

    if not options.directory:
        raise CommandError(BAD_ARGUMENT, "the name of the directory is empty")
    directory = Path(options.directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CommandError(FORBIDDEN, f"{directory} is there and not empty: name another directory")
    config = make_site(directory)
    if not options.no_data:
        make_data(config, progress=sys.stderr)
    print(f"The site is in {directory}")
    print(f"  export STAGECAL_CONFIG={config}")
    print("  stagecal watch &")
    print('  trigger-calms 2017.1.01347.S "Pi Person" pi@example.org 12345 uid://A001/X12a3/X80e')
    print(f"  python3 -m http.server --bind 127.0.0.1 --directory {directory / 'www'} 8000   # serves what is staged")
    return DONE
