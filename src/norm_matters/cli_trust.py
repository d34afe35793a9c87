"""The command `trust`. Only typer is imported at the top: `--help` answers without torch."""

from pathlib import Path
from typing import Annotated

import typer

from norm_matters.progress import say


def trust(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.py...", help="files with networks of one's own")],
) -> None:
    """Vouch for model files as they are now, so that runs and configurations of others may name them.

    A file that you name yourself, with --model FILE.py, needs no more than that.
    """
    from norm_matters.models.trust import trust_file, trusted_list

    for file in files:
        say(f"{trust_file(file)}  {file}")
    say(f"noted in {trusted_list()}")
