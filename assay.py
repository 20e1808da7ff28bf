"""The command line: one Typer app made of each floor's commands; a command loads only the floor that it is on.

Exit codes: 0 accepted or done · 1 rejected · 2 malformed input or usage · 3 could not tell.
"""

import sys
from importlib import import_module

import typer
from rich.console import Console

from proof.errors import Conflict, Malformed, Rejected, Unavailable

FLOORS = {
    "prover.cli": ("model", "run", "commit", "open", "take", "demo", "demo-llm"),
    "verifier.offline": ("challenge", "verify"),
    "verifier.key_cli": ("key",),
    "verifier.cli": ("init", "work"),
    "verifier.protection_cli": ("protection", "equivocation"),
    "verifier.status_cli": ("status", "task"),
    "api.cli": ("serve", "openapi"),
}
REJECTED, MALFORMED, UNAVAILABLE = 1, 2, 3


def main() -> None:
    """Run a command; expected failures become one line on stderr and an exit code."""
    try:
        _app(sys.argv[1] if len(sys.argv) > 1 else "")()
    except Rejected as failure:
        _stop(failure, REJECTED)
    except (Malformed, Conflict) as failure:
        _stop(failure, MALFORMED)
    except Unavailable as failure:
        _stop(failure, UNAVAILABLE)


def _app(command: str) -> typer.Typer:
    """The app with the floor that has this command, or with all of them where none has it: help lists everything."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="Assay proves that a worker really ran the model it is paid for.",
    )
    needed = [floor for floor, commands in FLOORS.items() if command in commands] or list(FLOORS)
    for floor in needed:
        app.add_typer(import_module(floor).cli)
    return app


def _stop(failure: Exception, code: int) -> None:
    Console(stderr=True).print(f"assay: {failure}", markup=False, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
