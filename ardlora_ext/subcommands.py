"""Command lines made of subcommands, each a module with two functions, imported only when it is asked for.

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def run(arguments: argparse.Namespace, command: str) -> int | None: ...   # command: the line that repeats this run

A module whose parser has `--config FILE` (`add_config`) takes its options from a YAML or JSON file too, as
transformers' and TRL's scripts do; what stands on the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ardlora_ext.config import AdapterConfig
from ardlora_ext.errors import InputError
from ardlora_ext.native.compiled import VERSION

_EXTRAS = ("accelerate", "datasets", "jinja2", "matplotlib", "rich", "tqdm", "trl")


class Command(NamedTuple):
    """One subcommand: its name, the module that runs it, and a line of help."""

    name: str
    module: str
    help: str


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults that are not already told in words, and keep an epilog as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, ()) or action.nargs == 0 or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def run(words: Sequence[str], prog: str, description: str, commands: Sequence[Command]) -> int:
    """Run a subcommand and return the exit code: its own or 0, 2 for bad input, 1 for a bad disk, 130 for Ctrl-C."""
    try:
        arguments = parse(words, prog, description, commands)
        module = importlib.import_module(arguments.module)
        code: int | None = module.run(arguments, shlex.join([*shlex.split(prog), *words]))
    except InputError as error:
        return fail(error, 2)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return fail(f"{words[0]} needs {error.name}: pip install 'ardlora_ext[train]'", 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except MemoryError:
        return fail(f"{words[0]} needs more memory than there is", 1)
    except (OSError, UnicodeError, RecursionError) as error:  # the disk, or what a file holds
        return fail(f"{words[0]}: {error}", 1)
    return code or 0


def fail(message: object, code: int) -> int:
    """Say what is wrong, and return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return code


def parse(words: Sequence[str], prog: str, description: str, commands: Sequence[Command]) -> argparse.Namespace:
    """Parse a command line; exits as argparse does where it is wrong.

    Raises:
        InputError: the file of `--config` cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, epilog=f"{prog} COMMAND --help tells the options of a command"
    )
    parser.add_argument("--version", action="version", version=f"ardlora_ext {VERSION}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in commands:
        title = command.help[0].upper() + command.help[1:] + "."
        sub = subparsers.add_parser(command.name, help=command.help, description=title, formatter_class=HelpFormatter)
        sub.set_defaults(module=command.module)
        if command.name in words[:1]:
            importlib.import_module(command.module).add_arguments(sub)
            _take_config(sub, words[1:])
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        subparsers.choices[arguments.command].error(_not_known(unknown, subparsers.choices[arguments.command]))
    return arguments


def _not_known(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """Name the words that a subcommand does not know, and what may be meant by the first option among them."""
    options = parser._option_string_actions
    option = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
    hint = ""
    if near := difflib.get_close_matches(option, options, n=1):
        hint = f"; did you mean {near[0]}?"
    elif option and "--training-arg" in options:
        hint = f"; what Trainer takes: --training-arg {option[2:].replace('-', '_')}=VALUE"
    return f"unrecognized arguments: {' '.join(words)}{hint}"


# --- options from a file ----------------------------------------------------------------------------------------------


def add_config(parser: argparse.ArgumentParser) -> None:
    """Let options come from a file as well."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="options by name in YAML or JSON; the command line wins over it"
    )


RANK = (
    "rank of plain LoRA with the parameters of the end; ard starts at 4 times it, adalora at 1.5 times, elalora keeps "
    "it as the mean"
)
GRANULARITY = f"what has a rank of its own (default: {AdapterConfig.granularity})"
FACTORING = f"whether the heads of a matrix share its factors or have their own (default: {AdapterConfig.factoring})"


def add_options(parser: argparse.ArgumentParser, kinds: Sequence[type], leave_out: Sequence[str] = ()) -> None:
    """Add a group of options for each dataclass, titled by its docstring, an option for each of its fields.

    The type of a field says what the option takes: `bool` nothing, `Literal` one of some words, a tuple several. Its
    metadata are `help`, other `names`, and whatever else `add_argument` understands.
    """
    for kind in kinds:
        group = parser.add_argument_group((kind.__doc__ or "").rstrip(".").lower())
        hints = get_type_hints(kind)
        for entry in fields(kind):
            if entry.name not in leave_out:
                keywords = {**_taken(hints[entry.name]), **entry.metadata}
                names = (f"--{entry.name.replace('_', '-')}", *keywords.pop("names"))
                group.add_argument(*names, dest=entry.name, default=entry.default, **keywords)


def _taken(hint: Any) -> dict[str, Any]:
    """Return what `add_argument` must know of a field's type."""
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is tuple:
        return {"nargs": "+"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    members = [_taken(member) for member in get_args(hint) if member is not type(None)]
    choices = [word for member in members for word in member.get("choices", ())]
    return {"choices": choices} if choices else members[0] if members else {} if hint is str else {"type": hint}


def _take_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Make the values of the file that `--config` names the defaults of `parser`."""
    options = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    if "config" not in options:
        return
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(words)[0].config
    if path is None:
        return
    del options["config"]
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; options: {', '.join(options)}"
            raise InputError(f"--config: {path} must hold options of {parser.prog.split()[-1]}, got {key!r}{hint}")
        if value is not None:
            parser.set_defaults(**{name: _converted(options[name], key, value)})
            options[name].required = False


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config must be a readable file, got {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--config: {path} must be YAML or JSON in UTF-8: {error}") from error
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml  # comes with transformers

            values = yaml.safe_load(text)
    except Exception as error:  # yaml's errors have no common base with json's
        raise InputError(f"--config: {path} must be YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--config: {path} must map option names to values, got {type(values).__name__}")
    return values


def _converted(action: argparse.Action, key: str, value: object) -> Any:
    """Return `value` as the command line would have read it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"--config: {key} must be true or false, got {value!r}")
        return value
    many = action.nargs in ("+", "*")
    items = value if many and isinstance(value, list) else [value]
    convert = action.type if callable(action.type) else str
    try:
        found = [convert(str(item)) for item in items]
        if any(isinstance(item, Path) and not _nameable(item) for item in found):
            raise ValueError
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(convert, "__name__", "value").lstrip("_")
        raise InputError(f"--config: {key} must be of type {kind}, got {value!r}") from error
    if action.choices is not None and any(item not in action.choices for item in found):
        raise InputError(f"--config: {key} must be one of {', '.join(map(str, action.choices))}, got {value!r}")
    return found if many else found[0]


def _nameable(path: Path) -> bool:
    """Tell whether a file can have this name; YAML can hold what a command line cannot."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeError:
        return False
