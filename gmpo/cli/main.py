"""The `gmpo` command.

Nothing heavy is imported before a command runs, so that help, version and typos are answered at
once.
"""

import argparse
import importlib
import re
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

import gmpo
from gmpo.option import advice

COMMANDS = {  # name -> what it does; the module of that name in this package has `run(arguments)`
    "train": "train a model: gmpo train --config run.yaml [--option value ...]",
    "serve": "start a vLLM server that a trainer can give weights to: gmpo serve MODEL",
    "env": "print the versions and devices that a bug report needs",
}
USER_ERRORS = (ValueError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `gmpo`.

    Returns:
        The exit status: 0; 2 for what the user can fix, which one message on standard error tells;
        130 for Ctrl-C.

    Raises:
        Exception: Whatever else goes wrong, with its traceback; so do errors of the user's own code
            (a reward function), and everything under `gmpo --debug`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    position = next(
        (i for i, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments)
    )
    parser = top_level_parser()
    options = parser.parse_args(arguments[:position])
    if position == len(arguments):
        parser.print_help()
        return 0
    command = arguments[position]
    if command not in COMMANDS:
        hint = advice(command, COMMANDS) or f" There are: {', '.join(COMMANDS)}."
        return complain(f"gmpo has no command {command!r}.{hint}")
    rest = arguments[position + 1 :]
    if {"-h", "--help"} & set(rest):
        print(command_help(command))
        return 0

    try:
        if command == "train":
            refuse_unknown_flags(rest)
        importlib.import_module(f"gmpo.cli.{command}").run(rest)
    except (*USER_ERRORS, RuntimeError) as error:
        for_users = isinstance(error, USER_ERRORS) or getattr(error, "tells_what_to_do", False)
        if options.debug or not for_users or needs_traceback(error):
            raise
        lines = [f"gmpo {command}: {in_our_words(str(error))}", *notes_of(error)]
        return complain(
            "\n".join([*lines, f"(gmpo --debug {command} ... shows where this comes from)"])
        )
    except KeyboardInterrupt as error:
        if options.debug:
            raise
        lines = [f"gmpo {command}: interrupted.", *notes_of(error)]
        return complain("\n".join(lines), status=130)
    return 0


def top_level_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<8}{about}" for name, about in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gmpo",
        usage="gmpo [--debug] COMMAND [--option value ...]",
        description=(
            "Train language models by Geometric-Mean Policy Optimization (arXiv:2507.20673)."
        ),
        epilog=f"commands:\n{commands}\n\ngmpo COMMAND --help tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gmpo {gmpo.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def command_help(command: str) -> str:
    """Return what `gmpo COMMAND --help` prints."""
    if command == "train":
        return importlib.import_module("gmpo.cli.help").train_help()
    module = importlib.import_module(f"gmpo.cli.{command}")
    if hasattr(module, "parser"):
        return module.parser().format_help().rstrip()
    about = COMMANDS[command]
    return f"usage: gmpo {command}\n\n{about[0].upper()}{about[1:]}."


def refuse_unknown_flags(arguments: Sequence[str]) -> None:
    """Raise a ValueError for a flag that doesn't exist, before anything heavy is imported."""
    names = importlib.import_module("gmpo.cli.help").option_names()
    options = importlib.import_module("gmpo.cli.options")
    for argument in arguments:
        if argument.startswith("--") and options.plain_name(argument) not in names:
            raise ValueError(options.unknown_option(argument, names))


def notes_of(error: BaseException) -> list[str]:
    """Return the notes of an error in the words of the command line."""
    return [in_our_words(note) for note in getattr(error, "__notes__", ())]


def in_our_words(text: str) -> str:
    """Return `text` with flags in the place of what Python users write.

    Example:
        "train(resume_from_checkpoint=True) goes on" -> "--resume latest goes on"
    """
    text = re.sub(r"(?:trainer\.)?train\((resume_from_checkpoint=True)\)", r"\1", text)
    text = text.replace("resume_from_checkpoint=True", "--resume latest")
    return text.replace("resume_from_checkpoint=", "--resume ")


def complain(message: str, *, status: int = 2) -> int:
    print(message, file=sys.stderr)
    return status


def needs_traceback(error: BaseException) -> bool:
    """Return True if a message alone would hide where `error` comes from.

    So it is for the user's own code, and for errors of other packages once the training runs:
    those can't be told from defects.  What gmpo itself raises, and what goes wrong before the
    training, is told by its message.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if any(is_user_code(frame.filename) for frame in frames):
        return True
    training = any(
        frame.name == "train" and frame.filename.endswith("trainer.py") for frame in frames
    )
    return training and not is_within(frames[-1].filename, package_folder())


def is_user_code(file: str) -> bool:
    """Return True if `file` belongs neither to gmpo nor to an installed package nor to Python."""
    if file.startswith("<"):
        return False
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(is_within(file, folder) for folder in (package_folder(), *folders))


def is_within(file: str, folder: str) -> bool:
    return Path(folder).resolve() in Path(file).resolve().parents


def package_folder() -> str:
    return str(Path(__file__).parent.parent)
