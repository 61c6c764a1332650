"""Print a script by which a shell completes commands, options, suites and methods.

eval "$(epsbench completion bash)"                        in ~/.bashrc
epsbench completion zsh > ~/.zfunc/_epsbench              a folder of $fpath
epsbench completion tcsh > ~/.epsbench.csh                which ~/.tcshrc sources
"""

from __future__ import annotations

import argparse
import re

from harness.cli.errors import OK

PLACE = 160
SHELLS = ("bash", "zsh", "tcsh")
_FILES = ('compgen -f -- "$1"', "_files", "f")
_FOLDERS = ('compgen -d -- "$1"', "_files -/", "d")
# What each word of a metavar stands for, in the words of each shell.
WORDS = {
    "SUITE": (
        'compgen -G "suites/$1*.toml"; compgen -f -X "!*.toml" -- "$1"; compgen -d -- "$1"',
        "_files -g '*.toml'",
        "f:*.toml",
    ),
    "METHOD": ('compgen -W "{methods}" -- "$1"', "compadd {methods}", "({methods})"),
    "METHOD.py": ('compgen -f -X "!*.py" -- "$1"; compgen -d -- "$1"', "_files -g '*.py'", "f:*.py"),
    "FILE": _FILES,
    "BUNDLE": _FILES,
    "DIR": _FOLDERS,
    "FOLDER": _FOLDERS,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete them")


def run(options: argparse.Namespace) -> int:
    """Print the script; the exit code."""
    import shtab

    from harness import registry

    shell, methods = SHELLS.index(options.shell), " ".join(registry.index("method"))
    functions: dict[str, str] = {}
    for action in _actions(options.parser):
        ways = [WORDS[word][shell] for word in str(action.metavar).split("|") if word in WORDS]
        if ways:
            # Bash takes what a function with such a name prints for names of files.
            name = "_epsbench_files_" + re.sub(r"\W", "_", str(action.metavar))
            functions[name] = "; ".join(ways).format(methods=methods)
            way = ways[0].format(methods=methods) if options.shell == "tcsh" else name
            action.complete = {options.shell: way}  # type: ignore[attr-defined]
    preamble = "" if options.shell == "tcsh" else "\n".join(f"{k}() {{ {v}; }}" for k, v in functions.items())
    print(shtab.complete(options.parser, options.shell, preamble=preamble))
    return OK


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser, and of those of its commands."""
    commands = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return parser._actions + [one for a in commands for below in a.choices.values() for one in _actions(below)]
