"""The command line: parse, call the library, print. One module per command."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import typer

from holdfast.errors import UserError

# Order is the order of `holdfast --help`.
COMMANDS = (
    "run",
    "plan",
    "init",
    "list",
    "report",
    "eval",
    "check",
    "diagnose",
    "restore",
    "landscape",
    "merge",
    "fisher",
    "models",
    "lab",
)

# Typer brings its own copy of click, or uses the installed one, depending on its version.
USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def build() -> typer.Typer:
    """The Typer app with every command."""
    app = typer.Typer(
        help="Fine-tune models without losing what they already know: measure forgetting, explain it, prevent it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback(invoke_without_command=True)
    def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show:
            import holdfast

            typer.echo(holdfast.__version__)
            raise typer.Exit

    for name in COMMANDS:
        if importlib.util.find_spec(f"holdfast.cli.{name}"):
            importlib.import_module(f"holdfast.cli.{name}").register(app)
    return app


def main(args: list[str] | None = None) -> int:
    """Run the command line. Exit codes: 0 done, 1 a gate failed, 2 the input is wrong, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes fork after tokenizing
    try:
        result = build()(args=args, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except UserError as error:
        return _fail(str(error))
    except typer.Abort:
        return 130
    except USAGE_ERROR as error:
        return _fail(error.format_message())
    except ChildProcessError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno is None:
            raise
        return _fail(f"{error.strerror}: {error.filename or 'while reading or writing'}")
    except KeyboardInterrupt:
        print("holdfast: interrupted; what was finished is saved, the same command continues.", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    print(f"holdfast: {message}", file=sys.stderr)
    return 2


def console() -> None:
    """Entry point of the ``holdfast`` command."""
    sys.exit(main())
