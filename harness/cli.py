"""The command ``epsbench``: ls, check, plan, run, status, show, compare, pack, merge, report, track, bench,
claims, audit.

Only the verb that is asked for imports what it needs: ``ls`` and ``--help`` answer without torch. What a
user can get wrong is a :class:`UserError` (or an error of the room that found it) and is printed as one
message: what is wrong, where, what to write instead.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import __version__

if TYPE_CHECKING:
    from harness import launch, store
    from harness.cell import Cell
    from harness.suite import Suite

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
OWN_METHOD = "A method in a file of your own is named by --method FILE."
CODES = "exit codes: 0 all is well; 1 some runs or checks failed; 2 the request is wrong; 130 stopped"

# Exceptions of other rooms that say what a user should change. Looked up only where the room is loaded.
_USER_ERRORS = {
    "harness.registry": ("RegistryError",),
    "harness.suite": ("SuiteError",),
    "harness.store": ("StoreError",),
    "harness.data": ("DatasetError",),
    "harness.models": ("CrossExampleLayer",),
    "harness.track": ("TrackingError",),
}


class UserError(Exception):
    """A request cannot be met; the message says what is wrong, where, and what to write instead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given and not given[0].startswith("-") and given[0] not in _VERBS:
            raise UserError(f'there is no command "{given[0]}"; there are {", ".join(_VERBS)}.'
                            + _hint(given[0], _VERBS))  # fmt: skip
        if given[:1] == ["bench"]:
            return _bench(given[1:])
        if given[:1] == ["claims"]:
            return _claims(given[1:])
        if given[:1] == ["audit"]:
            return _audit(given[1:])
        if given[:1] == ["faults"]:
            return _faults(given[1:])
        options = _parser().parse_args(given)
        options.command = ["epsbench", *given]
        code: int = options.verb(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        if "no method is called" in message:
            print(OWN_METHOD, file=sys.stderr)
        return USER_ERROR


def _message(error: Exception) -> str | None:
    """What to tell the user, or None for an error that is ours and deserves its traceback."""
    if isinstance(error, UserError):
        return f"epsbench: {error}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"epsbench: {error.filename}: {error.strerror}"
    for module, names in _USER_ERRORS.items():
        loaded = sys.modules.get(module)
        kinds = tuple(kind for name in names if (kind := getattr(loaded, name, None)) is not None)
        if kinds and isinstance(error, kinds):
            return f"epsbench: {error}" if "\n" not in str(error) else str(error)
    return None


def _hint(word: str, candidates: Iterable[str]) -> str:
    from harness.registry import did_you_mean

    near = did_you_mean(word, candidates)
    return f' Did you mean "{near}"?' if near else ""


# Arguments ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="epsbench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train differentially private methods under one suite, record every run, compare them.",
        epilog=textwrap.dedent(f"""\
            a first look:
              epsbench ls                                what there is: methods, data sets, models, suites
              epsbench plan suites/smoke.toml            what would run, with which noise, for how long
              epsbench run suites/smoke.toml --report    run it and write its leaderboard
              epsbench show 3f2a                         all about the run whose id begins so

            epsbench COMMAND --help tells more, with examples.
            {CODES}
            """),
    )
    parser.add_argument("--version", action="version", version=f"epsbench {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str, examples: str) -> Any:
        made = verbs.add_parser(
            name,
            help=text.split(". ")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{textwrap.indent(textwrap.dedent(examples).strip(), '  ')}\n\n{CODES}",
        )
        made.set_defaults(verb=function)
        return made

    ls = verb("ls", _ls, "List methods, data sets, models and suites.", """
        epsbench ls
        epsbench ls methods                 with paper, family, parameters and defaults
        epsbench ls methods --method my.py  with those of a file of yours
        epsbench ls parts                   what a suite may give a method in the place of its own
        """)  # fmt: skip
    ls.add_argument(
        "what",
        nargs="?",
        choices=(*_KINDS, "suites", "parts"),
        metavar="methods|datasets|models|suites|parts",
    )
    _method_option(ls)

    check = verb("check", _check, "Check a suite for all errors at once, or what a method promises.", """
        epsbench check suites/core.toml    all that is wrong with it, each with its line
        epsbench check dp-sgd              sensitivity, ledger, microbatches, resuming, ...
        epsbench check my.py               the same for each method of a file of yours
        epsbench check methods/*.py        and of several files
        epsbench check dp-sgd --repeat 20  the statistical checks alone, with fresh seeds: any false alarm?
        epsbench check --tables            times and false alarms of what is recorded, into this checkout's manual
        """)  # fmt: skip
    check.add_argument("subjects", metavar="SUITE|METHOD|METHOD.py", nargs="*")
    check.add_argument("--repeat", type=int, metavar="N", help="the statistical checks of a method, N times")
    check.add_argument("--tables", action="store_true",
                       help="then print the tables of all recorded checks and write them into a text")  # fmt: skip
    check.add_argument("--docs", type=Path, metavar="FILE",
                       help="that text, with the markers of docs/verification.md, which it is by default")  # fmt: skip
    _results_option(check)
    _reduced_option(check)
    _method_option(check)

    plan = verb("plan", _plan, "Show what a run would do: ids, noise, epsilon, what is done, time left.", """
        epsbench plan suites/core.toml
        epsbench plan suites/core.toml --only dp-sgd eps=3
        """)  # fmt: skip
    _suite_options(plan)

    run = verb("run", _run, "Run what is missing of a suite: finished runs are kept, half-done go on.", """
        epsbench run suites/core.toml --report
        epsbench run suites/core.toml --only dp-sgd dp-adam eps=3    these two methods, at epsilon 3
        epsbench run suites/core.toml --only 3f2a                    the run whose id begins so
        epsbench run suites/smoke.toml --method my.py                with methods of a file of yours
        epsbench run suites/core.toml --retry                        crashed, oom and timeout once more
        epsbench run suites/fashion.toml --device cuda:0             the suite's runs, on a GPU
        epsbench run suites/fashion.toml --reduced                   its reduced profile, in minutes
        """)  # fmt: skip
    _suite_options(run)
    run.add_argument("--jobs", type=_positive, metavar="N",
                     help="runs at once (default: cores / threads of a run; one for each GPU)")  # fmt: skip
    run.add_argument(
        "--retry", action="store_true", help="run again what crashed, ran out of memory or of time"
    )
    run.add_argument(
        "--stale", action="store_true", help="run again what was made by other code than today's"
    )
    run.add_argument(
        "--report", action="store_true", help="write the leaderboard at the end and print its top"
    )
    run.add_argument("--no-track", action="store_true", help="do not send anything to MLflow")
    _reports_option(run)

    status = verb("status", _status, "Count what is done, failed, stale, running and missing.", """
        epsbench status                     every suite that has results
        epsbench status suites/core.toml    against what the suite asks for today
        """)  # fmt: skip
    status.add_argument("suite", nargs="?", metavar="SUITE", help="a TOML file, or its name under suites/")
    _reduced_option(status)
    _results_option(status)
    _method_option(status)

    show = verb("show", _show, "Show one record, and the command that makes it again.", """
        epsbench show 3f2a
        epsbench show 3f2a --json | jq .privacy
        """)  # fmt: skip
    show.add_argument(
        "id", metavar="ID", help="the first digits of a run's id; id.2 names its second attempt"
    )
    show.add_argument("--json", action="store_true", help="print the record as it is")
    _results_option(show)

    compare = verb("compare", _compare, "Compare two methods, or two results folders, paired by seed.", """
        epsbench compare dp-sgd dp-adam                       two methods, on every task and epsilon they share
        epsbench compare dp-sgd dp-adam --suite core --by task
        epsbench compare before/results after/results --threshold 0.01    fails where a cell lost over a point
        epsbench compare before after --metric examples_per_second --threshold 0.05
        """)  # fmt: skip
    compare.add_argument("a", metavar="A", help="a method's label, title or group; or a results folder")
    compare.add_argument("b", metavar="B", help="what is compared with it, of the same kind")
    compare.add_argument(
        "--metric", default="accuracy", choices=("accuracy", "examples_per_second", "peak_memory_mib"),
        help="what is compared (default: accuracy); the last two as ratios, within one device",
    )  # fmt: skip
    compare.add_argument(
        "--by", default="setting", choices=("setting", "method", "task", "epsilon", "suite", "all"),
        help="what a line is; more than a setting is the mean over settings, seed by seed",
    )  # fmt: skip
    compare.add_argument(
        "--threshold", type=float, default=0.0, metavar="X",
        help="a loss that is borne, as a fraction: 0.01 is one point of accuracy, or 1 %% of speed or memory",
    )  # fmt: skip
    compare.add_argument("--suite", metavar="NAME", help="only the records of this suite")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    compare.add_argument("--markdown", type=Path, metavar="FILE", help="write it as a page of Markdown")
    _results_option(compare)

    pack = verb("pack", _pack, "Pack records into one file that another laboratory can merge.", """
        epsbench pack core                  the records of a suite, as core.zip
        epsbench pack results -o all.zip    those of a folder
        """)  # fmt: skip
    pack.add_argument("subject", metavar="SUITE|DIR", help="a suite's name or TOML file, or a results folder")
    pack.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="where to write it (default: NAME.zip)"
    )
    _results_option(pack)

    merge = verb("merge", _merge, "Add the records of other results folders. Nothing is overwritten.", """
        epsbench merge ../other-machine/results
        epsbench merge a/results b/results --results all
        epsbench merge core.zip             a bundle of epsbench pack, which is checked first
        """)  # fmt: skip
    merge.add_argument(
        "sources", nargs="+", metavar="DIR|BUNDLE", type=Path,
        help="folders that hold <suite>/<id>/record.json, or bundles",
    )  # fmt: skip
    _results_option(merge)
    _method_option(merge)

    report = verb("report", _report, "Write leaderboards from records: HTML, Markdown, CSV and figures.", """
        epsbench report                     every suite that has results
        epsbench report suites/core.toml
        """)  # fmt: skip
    report.add_argument("suite", nargs="?", metavar="SUITE", help="a TOML file, or its name under suites/")
    _reduced_option(report)
    _results_option(report)
    _reports_option(report)
    _method_option(report)

    track = verb("track", _track, "Bring the records that MLflow lacks into MLflow.", """
        epsbench track                       what is not known to be there
        epsbench track --rebuild             compare with the store itself, and add or replace what differs
        MLFLOW_TRACKING_URI=http://host:5000 epsbench track
        """)  # fmt: skip
    track.add_argument(
        "--rebuild", action="store_true", help="ask the store itself, not the list of what was sent"
    )
    track.add_argument(
        "--uri", help="the tracking store (default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)"
    )
    _results_option(track)

    verb("bench", lambda options: OK, "Time engines side by side, and the share of a step outside them.", """
        epsbench bench
        epsbench bench --help
        """)  # fmt: skip
    verb("claims", lambda options: OK, "Recompute published privacy numbers from their settings.", """
        epsbench claims
        epsbench claims modelmix-cifar10
        """)  # fmt: skip
    verb("audit", lambda options: OK, "Bound a method's epsilon from below, by attacking it; record it.", """
        epsbench audit dp-sgd
        epsbench audit dp-sgd dp-adam --epsilon 1 8
        epsbench audit dp-sgd --membership            who was in the training data?
        """)  # fmt: skip
    verb("faults", lambda options: OK, "Plant faults that public code had; say which instrument catches each.", """
        epsbench faults
        """)  # fmt: skip
    return parser


_VERBS = (
    "ls",
    "check",
    "plan",
    "run",
    "status",
    "show",
    "compare",
    "pack",
    "merge",
    "report",
    "track",
    "bench",
    "claims",
    "audit",
    "faults",
)
_KINDS = {"methods": "method", "datasets": "dataset", "models": "model"}


def _suite_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE", help="a TOML file, or its name under suites/")
    parser.add_argument(
        "--only", nargs="+", action="extend", metavar="GLOB",
        help="an id's first digits, a method or its label, a task or data set, eps=3, seed=0; of one kind "
             "any may hold, of different kinds all must",
    )  # fmt: skip
    parser.add_argument("--device", metavar="cpu|cuda:N", help="run here whatever device the suite names")
    _reduced_option(parser)
    _results_option(parser)
    _method_option(parser)


def _reduced_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reduced", action="store_true",
        help="the reduced profile of the suite, its table [reduced]; its results are in a suite NAME-reduced",
    )  # fmt: skip


def _results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=_results_folder, default=Path("results"), metavar="DIR",
                        help="where the records are (default: results)")  # fmt: skip


def _results_folder(text: str) -> Path:
    """The results folder that is named; not that of a suite or of a run in one, where every command would go wrong."""
    from harness import store

    folder = Path(text)
    inside = store.suite_of(folder.absolute().parent if (folder / store.RECORD).is_file() else folder)
    if inside:
        results, suite = inside
        raise argparse.ArgumentTypeError(
            f"{text}: is inside a results folder, in its suite {suite}; write --results {shlex.quote(str(results))}"
        )
    return folder


def _reports_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reports", type=Path, default=Path("reports"), metavar="DIR",
                        help="where the reports go (default: reports)")  # fmt: skip


def _method_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", action="append", default=[], metavar="FILE",
                        help="a Python file with methods of your own; may be repeated")  # fmt: skip


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of runs; write 1 or more")
    return int(text)


def _add_files(files: Iterable[str]) -> None:
    from harness import registry

    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file; name a Python file with an @method function in it.")
        registry.add_file(file)


# Text -----------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), indent: str = "") -> str:
    """Columns aligned by their widest entry; the last is not padded."""
    lines = [header, *rows] if header else list(rows)
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        (indent + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def _wrap(text: str, indent: str) -> str:
    width = max(60, shutil.get_terminal_size((110, 24)).columns)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _epsilon(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4g}"


def _counts(words: Iterable[str]) -> str:
    """ "ok 3, diverged 1" in order of frequency."""
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return ", ".join(f"{word} {n}" for word, n in sorted(found.items(), key=lambda item: (-item[1], item[0])))


# ls and check ---------------------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    from harness import registry

    _add_files(options.method)
    if options.what == "parts":
        return _ls_parts()
    kinds = [options.what] if options.what else [*_KINDS, "suites"]
    for kind in kinds:
        if len(kinds) > 1:
            print(kind)
        if kind == "suites":
            print(_table(_suite_rows(), indent="  ") or "  none: no *.toml under suites/")
        else:
            _ls_entries(list(registry.index(_KINDS[kind]).values()), detail=len(kinds) == 1)
            for broken in registry.broken(_KINDS[kind]):
                print(f"  ! {broken}")
        if len(kinds) > 1:
            print()
    return OK


def _ls_parts() -> int:
    """The parts that a suite may give a method, slot by slot."""
    from harness import parts

    for slot in parts.SLOTS:
        print(f'{slot}: with = {{ {slot} = "NAME?OPTION=VALUE" }} under [[method]]')
        _ls_entries(list(parts.entries(slot).values()), detail=True)
        print()
    return OK


def _ls_entries(entries: Sequence[Any], detail: bool) -> None:
    names = [f"{e.name}:{e.argument.upper()}" if e.argument else e.name for e in entries]
    rows = [
        [name, str(e.meta.get("family") or ""), str(e.meta.get("paper") or ""), e.summary]
        for name, e in zip(names, entries, strict=True)
    ]
    used = [i for i in range(4) if any(row[i] for row in rows)]
    lines = _table([[row[i] for i in used] for row in rows], indent="  ").splitlines()
    for entry, line in zip(entries, lines, strict=True):
        print(line)
        if detail and entry.parameters:
            shown = (
                f"{name}: {p.type}" + ("" if p.required else f" = {p.default!r}")
                for name, p in entry.parameters.items()
            )
            print(_wrap(", ".join(shown), " " * 6))


_HEADERS = {
    "suite": "suite",
    "throughput": "bench",
    "claims": "claims",
}  # where a kind of file says what it is for


def _kind(file: Path) -> str:
    """The kind that a TOML file says it is; "suite" where it says nothing, or cannot be read."""
    try:
        return str(tomllib.loads(file.read_text("utf-8")).get("kind", "suite"))
    except (OSError, ValueError, RecursionError):
        return "suite"


def _suite_rows() -> list[list[str]]:
    rows = []
    for path in sorted(Path("suites").glob("*.toml")):
        try:
            tables = tomllib.loads(path.read_text())
            header = tables[_HEADERS[tables.get("kind", "suite")]]
            rows.append([str(path), str(header["question"])])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            rows.append([str(path), f"cannot be read: epsbench check {path}"])
    return rows


def _check(options: argparse.Namespace) -> int:
    if not options.subjects and not options.tables:
        raise UserError("name a suite, a method or a file of methods to check, or ask for --tables.")
    if options.docs and not options.tables:
        raise UserError(f"--docs {options.docs}: it is for --tables.")
    if options.repeat is not None and options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: it is a number of repetitions; write 1 or more.")
    subjects = [s for s in options.subjects if Path(s).name != "__init__.py"] or options.subjects
    codes = [OK]
    for subject in subjects:
        alone = len(subjects) == 1
        codes.append(_checked(argparse.Namespace(**vars(options), subject=subject, alone=alone)))
    if options.tables:
        codes.append(_check_tables(options))
    return max(codes)


def _check_tables(options: argparse.Namespace) -> int:
    from harness import checks
    from harness.verify import recorded

    _say_broken(checks.load(options.results / checks.FOLDER).broken)
    docs = options.docs or (recorded.DOCS if recorded.DOCS.is_file() else None)
    try:
        print(recorded.write_tables(options.results / checks.FOLDER, docs))
    except (OSError, ValueError) as error:
        raise UserError(f"{docs}: {error}") from error
    return OK


def _checked(options: argparse.Namespace) -> int:
    if options.subject.endswith(".toml") or _is_suite(options.subject):
        if options.repeat:
            raise UserError(f"--repeat: {options.subject} is a suite; it is for methods.")
        file = _find(options.subject)
        if _kind(file) == "claims":
            from harness.verify import claims

            held = claims.load(file)
            print(f"{file}: {len(held.claims)} claims for epsbench claims; nothing is wrong.")
            return OK
        from harness.bench import plan

        if plan.is_plan(file):
            timed = plan.load(file)
            print(f"{file}: {len(timed.workloads)} workloads for epsbench bench; nothing is wrong.")
            return OK
        suite = _load(options)
        cells = suite.cells()
        print(
            f"{suite.file}: {len(cells)} runs of {len({c.group for c in cells})} settings; nothing is wrong."
        )
        return OK
    if options.reduced:
        raise UserError(f"--reduced: {options.subject} is a method; it is for suites.")
    _add_files(options.method)
    if options.subject.endswith(".py"):
        _add_files([options.subject])
    else:
        from harness import registry

        registry.resolve("method", options.subject)
    from harness import checks
    from harness.verify import conformance, recorded

    methods = conformance.named(options.subject)
    if not methods:
        raise UserError(
            f"{options.subject}: holds no method; mark a function that returns a Method with @method."
        )
    code = OK
    for made, there in recorded.recorded(methods, options.results / checks.FOLDER, options.repeat or 0):
        shown = recorded.rows(made, failures_alone=not (options.alone and len(methods) == 1))
        if shown:
            print(_table(shown))
        print(recorded.summary(made) + (" (recorded before)" if there else ""), flush=True)
        code = FAILED if checks.failing(made) else code
    return code


def _is_suite(name: str) -> bool:
    """Whether a bare name is that of a suite under suites/ and of no method."""
    from harness import registry

    return (Path("suites") / f"{name}.toml").is_file() and name not in registry.index("method")


# Suites and their cells -----------------------------------------------------------------------------------


def _find(text: str) -> Path:
    """The file of a suite that is named by path, or by its name under suites/."""
    path = Path(text)
    if path.is_file():
        return path
    known = sorted(Path("suites").glob("*.toml"))
    for candidate in known:
        if candidate.stem == text:
            return candidate
    near = _hint(path.stem, [one.stem for one in known])
    there = ", ".join(map(str, known)) or "none under suites/"
    raise UserError(f"{text}: no such suite; there are {there}.{near}")


def _load(options: argparse.Namespace) -> Suite:
    named = _find(getattr(options, "suite", None) or options.subject)
    if _kind(named) == "claims":
        raise UserError(
            f"{named}: holds claims and trains nothing; epsbench claims --suite {named} recomputes it."
        )
    from harness.bench import plan

    if plan.is_plan(named):
        raise UserError(f"{named}: times engines and trains nothing; epsbench bench --suite {named} runs it.")
    from harness import suite

    return suite.load(named, options.method, reduced=options.reduced, present=options.verb is _check)


def _again(options: argparse.Namespace, verb: str) -> str:
    """The command that does something else with the same suite."""
    words = ["epsbench", verb, str(options.suite), *(["--reduced"] if options.reduced else [])]
    words += [word for file in options.method for word in ("--method", file)]
    words += [] if options.results == Path("results") else ["--results", str(options.results)]
    return shlex.join(words)


def _need_suite(options: argparse.Namespace) -> None:
    """Raise UserError where --reduced has no suite to be the profile of."""
    if options.reduced and options.suite is None:
        raise UserError("--reduced: the profile of which suite? Name it.")


def _cells(options: argparse.Namespace) -> tuple[Suite, list[Cell]]:
    """The suite and those of its cells that are asked for, on the device that is asked for."""
    suite = _load(options)
    cells = suite.cells()
    if options.device is not None:
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", options.device):
            raise UserError(f'--device {options.device}: no such kind of device; write "cpu" or "cuda:0".')
        cells = [cell.on(options.device) for cell in cells]
    return suite, _only(cells, options.only or []) if options.only else cells


def _only(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that match: any pattern of one kind, and every kind. Raises UserError where nothing does."""
    kinds: dict[str, set[str]] = {}
    for pattern in patterns:
        kind, ids = _match(cells, pattern)
        kinds[kind] = kinds.get(kind, set()) | ids
    kept = [cell for cell in cells if all(cell.id in ids for ids in kinds.values())]
    if not kept:
        raise UserError(
            f"--only {shlex.join(patterns)}: each matches some run, but no run matches all of them; patterns "
            "of one kind are alternatives, those of different kinds must all hold."
        )
    return kept


def _match(cells: Sequence[Cell], pattern: str) -> tuple[str, set[str]]:
    """The kind of a pattern and the ids of the cells it matches."""

    def fits(value: object) -> bool:
        return str(value) == pattern or fnmatch.fnmatchcase(str(value), pattern)

    setting = re.fullmatch(r"(eps|seed)=(.+)", pattern)
    if setting:
        key, wanted = setting.groups()
        values = {c.id: _epsilon(c.privacy["epsilon"]) if key == "eps" else str(c.seed) for c in cells}
        with contextlib.suppress(ValueError):
            wanted = _epsilon(float(wanted)) if key == "eps" else wanted
        found = {id for id, value in values.items() if value == wanted}
        if not found:
            there = ", ".join(dict.fromkeys(values.values()))
            raise UserError(
                f"--only {pattern}: the suite has {key} {there}; write {key}=VALUE with one of these."
            )
        return key, found
    tests: dict[str, Callable[[Cell], bool]] = {
        "method": lambda c: fits(c.method) or fits(c.label),
        "task": lambda c: fits(c.task["name"]) or fits(c.task["dataset"]),
        "id": lambda c: bool(re.fullmatch("[0-9a-f]{3,12}", pattern)) and c.id.startswith(pattern),
    }
    for kind, test in tests.items():
        found = {cell.id for cell in cells if test(cell)}
        if found:
            return kind, found
    methods = dict.fromkeys(name for c in cells for name in (c.method, c.label))
    tasks = dict.fromkeys(c.task["name"] for c in cells)
    raise UserError(
        f"--only {pattern}: matches no run. Methods: {', '.join(methods)}. Tasks: {', '.join(tasks)}. Also "
        f"an id's first digits (3 or more), eps=3, seed=0.{_hint(pattern, [*methods, *tasks])}"
    )


def _codes(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Today's code of each cell, by id; worked out once for each method and model."""
    from harness import run

    known: dict[str, dict[str, Any]] = {}
    codes: dict[str, dict[str, Any]] = {}
    for cell in cells:
        key = json.dumps([
            cell.method, cell.parameters, cell.changes, cell.task["architecture"]["name"], cell.method_file,
        ])  # fmt: skip
        if key not in known:
            known[key] = run.code_of(cell)
        codes[cell.id] = known[key]
    return codes


# plan and status ------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace) -> int:
    from harness import launch

    suite, cells = _cells(options)
    codes = _codes(cells)
    selection = launch.select(cells, options.results, suite.name, codes=codes)
    states = _states(selection)
    prepared = _prepared(cells)
    accountants = list(dict.fromkeys(name for one in prepared.values() for name in one.get("planned") or {}))
    rows = []
    for cell in cells:
        one = prepared[cell.group]
        planned = one.get("planned") or {}
        rows.append([
            cell.id, cell.label, cell.task["name"], _epsilon(cell.privacy["epsilon"]), str(cell.seed),
            _lengths(cell, "batch"), _lengths(cell, "steps"), _number(one.get("noise_multiplier")),
            *(_planned(planned, name) for name in accountants),
            states[cell.id] + (f" ({one['reason']})" if "reason" in one else ""),
        ])  # fmt: skip
    names = ["id", "method", "task", "eps", "seed", "batch", "steps", "sigma", *accountants, "state"]
    print(_table(rows, names))
    print(f"\n{len(cells)} runs of suite {suite.name}: {_counts(states.values())}")
    at_once = launch.slots(cells)
    print(_time_left([job.cell for job in selection.todo], options.results, at_once))
    return OK


def _lengths(cell: Cell, name: str) -> str:
    """The batch or the steps of a cell: of two stages both, in order."""
    both = [cell.schedule, *([cell.then["schedule"]] if cell.then else [])]
    return ", then ".join(str(schedule[name]) for schedule in both)


def _planned(planned: Mapping[str, float | None], accountant: str) -> str:
    """The planned epsilon by an accountant, in the words of a report; "-" where none was asked."""
    from harness.report import tables

    value = planned.get(accountant)
    if value is None and accountant in planned:
        return tables.ABSENT if any(one is not None for one in planned.values()) else tables.epsilon(math.inf)
    return _number(value)


def _states(selection: launch.Selection) -> dict[str, str]:
    """A word on each cell by id."""
    from harness import store

    states = {record["id"]: f"done, {record['status']}" for record in selection.done}
    states |= {record["id"]: f"stale, {record['status']}" for record in selection.stale}
    states |= {record["id"]: f"failed, {record['status']}" for record in selection.failed}
    for job in selection.todo:
        if not job.folder.exists():
            states[job.cell.id] = "missing"
        else:
            states[job.cell.id] = "running" if store.locked(job.folder) else "half done"
    return states


def _prepared(cells: Iterable[Cell]) -> dict[str, dict[str, Any]]:
    """Noise multiplier and planned epsilon by group, or the reason why there are none."""
    from harness import run

    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell.group not in found:
            try:
                found[cell.group] = run.prepare(cell)
            except ValueError as error:  # no noise reaches the target: the run would end as skipped
                found[cell.group] = {"reason": f"would be skipped: {error}"}
    return found


def _time_left(todo: Sequence[Cell], results: Path, at_once: int) -> str:
    """The time for what is to be run, from the pace of finished runs of the same kind on this device."""
    from harness import launch, measure, store

    if not todo:
        return "nothing is left to run"
    pace: dict[tuple[str, ...], list[float]] = {}
    for record in store.load(results):
        wall, cell = record["measured"].get("wall_seconds"), record["cell"]
        if record["status"] == "ok" and wall:
            kind, steps = _kind_of(cell)
            pace.setdefault((*kind, str(record["device"].get("fingerprint"))), []).append(wall / steps)
    prints: dict[tuple[str, int], str] = {}
    total, unknown = 0.0, 0
    for cell in todo:
        place = (str(cell.device.get("device") or "cpu"), int(cell.device.get("threads") or 1))
        if place not in prints:
            _need_device(place[0])
            prints[place] = measure.device_info(*place)["fingerprint"]
        kind, steps = _kind_of(cell.canonical())
        seconds = pace.get((*kind, prints[place]))
        if seconds:
            total += sorted(seconds)[len(seconds) // 2] * steps
        else:
            unknown += 1
    text = f"time for the {len(todo)} to run, {at_once} at once: "
    if unknown == len(todo):
        return text + "unknown, no run of these methods and tasks has finished on this device"
    text += launch.duration(total / at_once)
    return text + (
        f" and that of {unknown} runs of which none has finished on this device" if unknown else ""
    )


def _kind_of(cell: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """What a cell's pace depends on, and its steps. A run of two stages is of another kind for each proportion."""
    method, steps, then = cell["method"]["name"], cell["schedule"]["steps"], cell.get("then") or {}
    second = (then.get("schedule") or {}).get("steps", 0)
    kind = (str(then.get("name")), str(then.get("trains")), f"{second / steps:.3g}") if then else ()
    return (method, cell["task"]["name"], *kind), steps + second


def _need_device(spec: str) -> None:
    """Raise UserError where this machine lacks the device."""
    if not spec.startswith("cuda"):
        return
    import torch

    number, count = int(spec.partition(":")[2] or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"{spec}: this machine has {count} CUDA devices; write --device cpu"
                        + (f" or --device cuda:{count - 1}." if count else "."))  # fmt: skip


def _status(options: argparse.Namespace) -> int:
    from harness import launch, store

    _need_suite(options)
    if options.suite is None:
        _add_files(options.method)
        return _status_of_all(options.results)
    there = (Path("suites") / f"{options.suite}.toml").is_file()
    if re.fullmatch("[a-z0-9-]+", options.suite) and not there and not options.reduced:
        file, options.reduced = _suite_file(options.suite)
        if file is None and (options.results / options.suite).is_dir():
            print(f"{options.suite}: there is no such suite here, so only its records are counted")
            return _status_of_all(options.results, options.suite)
        options.suite = str(file or options.suite)
    suite = _load(options)
    cells = suite.cells()
    selection = launch.select(cells, options.results, suite.name, codes=_codes(cells))
    states = _states(selection)
    print(f"suite {suite.name}: {len(cells)} runs")
    advice = {
        "stale": f"{_again(options, 'run')} --stale", "failed": f"{_again(options, 'run')} --retry",
        "half done": _again(options, "run"), "missing": _again(options, "run"),
    }  # fmt: skip
    rows = []
    for state in ("done", "stale", "failed", "running", "half done", "missing"):
        words = [word.partition(", ")[2] for word in states.values() if word.partition(", ")[0] == state]
        if words:
            rows.append([state, str(len(words)), _counts(filter(None, words)), advice.get(state, "")])
    print(_table(rows, indent="  "))
    for record in selection.failed:
        print(f"  {record['id']}  {launch.describe(record['cell'])}: {record['status']}, {_first(record)}")
    known = {cell.id for cell in cells}
    extra = {record["id"] for record in store.load(options.results, suite.name)} - known
    if extra:
        print(f"  {len(extra)} more have records but are not in the suite as it is today")
    _say_broken(selection.broken)
    return FAILED if selection.failed else OK


def _status_of_all(results: Path, suite: str | None = None) -> int:
    from harness import store

    records = store.load(results, suite)
    codes = {id: code for id, code in _codes_of(records).items() if isinstance(code, Mapping)}
    current = store.current(records, codes)
    suites: dict[str, list[store.Record]] = {}
    for record in current:
        suites.setdefault(record["suite"], []).append(record)
    old = {name: [r["id"] for r in ones if r.get("stale")] for name, ones in suites.items()}
    lost = {name: sum(r["id"] not in codes for r in ones) for name, ones in suites.items()}
    rows = [
        [name, str(len(ones)), _counts(r["status"] for r in ones),
         f"{len(old[name])} stale" + (f", {lost[name]} whose code cannot be told" if lost[name] else "")]
        for name, ones in suites.items()
    ]  # fmt: skip
    print(
        _table(rows, ["suite", "runs", "", "code"])
        if rows
        else f"{results}: holds no records; epsbench run SUITE makes some"
    )
    for name, ids in old.items():
        if ids:
            more = f" and {len(ids) - 10} more; epsbench plan {name} lists all" if len(ids) > 10 else ""
            print(f"  stale in {name}: {', '.join(ids[:10])}{more}")
    _say_broken(records.broken)
    return FAILED if any(record["status"] in store.FAILED for record in current) else OK


def _first(record: store.Record) -> str:
    return (str(record.get("reason") or "no reason given").splitlines() or [""])[0][:200]


def _say_broken(broken: Sequence[store.Broken]) -> None:
    for one in broken:
        print(f"  ! quarantined: {one}")


# run ------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from harness import launch

    suite, cells = _cells(options)
    codes = _codes(cells)
    selection = launch.select(
        cells, options.results, suite.name, codes=codes, retry=options.retry, rerun_stale=options.stale
    )
    for spec in dict.fromkeys(str(job.cell.device.get("device") or "cpu") for job in selection.todo):
        _need_device(spec)
    at_once = launch.slots([job.cell for job in selection.todo], options.jobs)
    _say_selection(options, suite, cells, selection, at_once)
    on_terminal = sys.stdout.isatty() and bool(selection.todo)
    reporter: launch.Reporter = launch.Bar() if on_terminal else launch.Lines()
    tracker = None if options.no_track else _tracker(options.results, suite.name, selection, reporter)
    summary = launch.run(
        selection.todo,
        suite.name,
        at_once=options.jobs,
        codes=codes,
        reporter=reporter,
        watch=tracker.watch if tracker else None,
    )
    if tracker:
        tracker.close(5.0 if summary.interrupted else 60.0)
    if summary.interrupted:
        half = sum(job.folder.exists() for job in summary.left)
        print(
            f"\nstopped: {len(summary.outcomes)} runs finished, {half} half done, "
            f"{len(summary.left) - half} not begun. Nothing is lost; go on with\n"
            f"  {shlex.join(options.command)}"
        )
        return INTERRUPTED
    return _end(options, suite, cells, codes, summary)


def _say_selection(
    options: argparse.Namespace,
    suite: Suite,
    cells: Sequence[Cell],
    selection: launch.Selection,
    at_once: int,
) -> None:
    from harness import measure

    parts = [f"{len(selection.done)} are done"]
    if selection.stale:
        fate = "and run again" if options.stale else "and kept (--stale runs them again)"
        parts.append(f"{len(selection.stale)} are stale {fate}")
    if selection.failed:
        fate = "and run again" if options.retry else "(--retry runs them again)"
        parts.append(f"{len(selection.failed)} failed {fate}")
    todo = len(selection.todo)
    parts.append(f"{todo} to run, {min(at_once, todo)} at once" if todo else "nothing to run")
    print(f"suite {suite.name}: {len(cells)} runs; {'; '.join(parts)}", flush=True)
    if selection.stale and not options.stale:
        for record in selection.stale[:10]:
            print(f"  stale: {record['id']}, made by code {record['code'].get('hash')}")
        if len(selection.stale) > 10:
            print(f"  and {len(selection.stale) - 10} more: {_again(options, 'plan')}")
    _say_broken(selection.broken)
    threads = max((int(job.cell.device.get("threads") or 1) for job in selection.todo), default=1)
    if options.jobs and options.jobs * threads > measure.cores():
        print(
            f"  {options.jobs} runs of {threads} threads share {measure.cores()} cores: "
            "their throughput will suffer"
        )


def _tracker(results: Path, suite: str, selection: launch.Selection, reporter: launch.Reporter) -> Any:
    """What follows runs into MLflow; None where nothing is new, so that MLflow is not even imported."""
    from harness import track

    pending = track.pending(results, suites=[suite])
    if not selection.todo and not pending:
        return None
    tracker = track.Tracker(say=reporter.say)
    for folder in pending:
        tracker.watch(folder)
    return tracker


def _end(
    options: argparse.Namespace,
    suite: Suite,
    cells: Sequence[Cell],
    codes: Mapping[str, Mapping[str, Any]],
    summary: launch.Summary,
) -> int:
    """Say how it stands now, write the report where asked, and give the exit code."""
    from harness import launch

    now = launch.select(cells, options.results, suite.name, codes=codes)
    if summary.outcomes:
        ends = _counts(outcome.record["status"] for outcome in summary.outcomes)
        place = options.results / suite.name
        print(f"{len(summary.outcomes)} runs finished: {ends}; records are in {place}")
    for record in now.failed:
        print(f"  {record['id']}  {launch.describe(record['cell'])}: {record['status']}, {_first(record)}")
    if options.report:
        _write_report(options, suite, codes)
    return FAILED if now.failed else OK


# show, merge ----------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from harness import launch, store
    from harness.report import read, tables
    from harness.stages import told

    record, others = _one_record(options.results, options.id)
    if options.json:
        print(store.dumps({key: value for key, value in record.items() if key != "path"}), end="")
        return OK
    cell, privacy, measured = record["cell"], record["privacy"], record["measured"]
    code, device = record["code"], record["device"]
    target, task, pairs = cell["privacy"], cell["task"], _pairs
    rows = [["id", f"{record['id']}, group {record['group']}, suite {record['suite']}"]]

    def row(name: str, *parts: Any) -> None:
        rows.append([name, "; ".join(str(part) for part in parts if part not in (None, "")) or "-"])

    row("status", record["status"], record.get("reason"))
    row("record", record["path"])
    method, given = cell["method"], cell["method"].get("with") or {}
    own = {name: value for name, value in (method.get("parameters") or {}).items() if name not in given}
    stages = told(record)
    if not stages:
        row("method", f"{method['name']}({pairs(own, 6)})")
    if given:  # a parameter of the same name was for the part that this one replaces
        row("with", *(f"{slot}: {spec}" for slot, spec in given.items()))
    if not stages:
        row("parts", *(f"{slot} {_part(part)}" for slot, part in (method.get("parts") or {}).items()))
    for number, stage in enumerate(stages, 1):
        rows += _stage_rows(number, stage, given if number == 1 else {})
    row("card", *(record.get("card") or {}).values())
    row("task", task["name"], f"data {task.get('digest')}", f"evaluated on {task.get('evaluate')}")
    schedule = "of each stage" if stages else pairs(cell["schedule"], 8)
    row("schedule", schedule, cell["numerics"].get("dtype"), f"seed {cell['seed']}")
    if target.get("epsilon") is None:
        row("target", "no privacy")
    else:
        row("target", f"epsilon {_epsilon(target['epsilon'])}, delta {target['delta']}", target["relation"])
    row(
        "mechanism",
        "" if stages else privacy.get("sampling"),
        f"noise multiplier {_number(privacy.get('noise_multiplier'), 6)}",
        "sampling and sensitivity of each stage"
        if stages
        else f"sensitivity {pairs(privacy.get('sensitivity'))}",
        f"public data: {privacy.get('public_data') or '-'}",
    )
    seen = read.read([record])[0]
    spent = tables.by_accountant(seen.spent, seen.refused) or tables.epsilon(seen.epsilon)
    row("planned", tables.by_accountant(seen.planned, seen.refused))
    row("spent", spent, privacy.get("accountant") and f"{privacy['accountant']} ranks")
    if seen.refused:
        row("", tables.refusals(seen.refused))
    claim = privacy.get("claimed") or {}
    row("claimed", pairs({"epsilon": claim.get("epsilon")} if claim else None), claim.get("source"))
    rows += [["", line] for line in _assumptions(claim)]
    row("metrics", pairs(record["metrics"]), "after the last stage" if stages and record["metrics"] else None)
    speed = "of each stage" if stages else _speed(measured.get("examples_per_second") or {})
    row("speed", speed, f"{measured.get('jobs')} at once")
    if measured.get("wall_seconds") is not None:
        row("time", launch.duration(measured["wall_seconds"]), f"{measured.get('sessions') or 1} session(s)")
    row("memory", f"{_number(measured.get('peak_memory_mib'), 5)} MiB at the peak")
    row("device", device.get("name"), device.get("spec"), f"{device.get('threads')} threads")
    if not stages:
        row("diagnostics", pairs(record.get("diagnostics")))
    row(
        "code",
        code.get("hash"),
        f"commit {code.get('commit')}" + (" with changes" if code.get("dirty") else ""),
    )
    row("weights", record.get("weights_sha256"))
    row("ran", f"{record.get('started')} to {record.get('finished')}")
    print(launch.describe(cell))
    print(_table(rows, indent="  "))
    for other in others:
        print(f"  another attempt: {other['path']}: {other['status']}")
    print("\nto make it again:")
    for line in _recipe(record):
        print(f"  {line}")
    return OK


def _stage_rows(number: int, stage: Mapping[str, Any], given: Mapping[str, Any]) -> list[list[str]]:
    """The lines of one stage as `harness.stages.told` has it; what its record does not know is said to be unknown."""
    own = {name: value for name, value in (stage["parameters"] or {}).items() if name not in given}
    public = stage["public"]
    unknown = "not recorded" if stage["non_finite"] is None else "-"  # an older record, or a stage not begun

    def known(name: str, shown: Callable[[Any], str] = str) -> str:
        value = stage[name]
        return unknown if value is None or value == {} else shown(value)

    lines = [
        [f"{stage['method']}({_pairs(own, 6)})", f"trains {known('trains')}",
         f"on {stage['data']}, {'public' if public else 'private'} data"],
        [f"{slot} {_part(part)}" for slot, part in (stage["parts"] or {}).items()],
        [f"batch {known('batch')}, {known('steps')} steps, {known('epochs', _number)} epochs"],
        [f"sampling {known('sampling')}", "" if public else f"relation {known('relation')}",
         f"sensitivity {'none, the data are public' if public else known('sensitivity', _pairs)}",
         stage["sensitivity_note"]],
        [f"spent by its end {known('spent', _pairs)}", stage["accountant"] and f"{stage['accountant']} ranks"],
        [f"speed {known('examples_per_second', _speed)}",
         f"training {known('train_seconds', lambda one: _number(one) + ' s')}",
         f"engine {known('engine')}"],
        [f"{name} {known(name, lambda one: _shown(one, 4))}"
         for name in ("train_loss", "clipped_fraction", "non_finite")],
    ]  # fmt: skip
    texts = ["; ".join(str(part) for part in line if part not in (None, "")) for line in lines]
    return [["" if i else f"stage {number}", text] for i, text in enumerate(texts) if text]


def _speed(rate: Mapping[str, Any]) -> str:
    median, low, high = (_number(rate.get(key), 5) for key in ("median", "q1", "q3"))
    return f"{median} examples/s, quartiles {low} to {high}"


def _pairs(values: Mapping[str, Any] | None, digits: int = 4) -> str:
    return ", ".join(f"{k} {_shown(v, digits)}" for k, v in (values or {}).items()) or "-"


def _part(part: Any) -> str:
    """A part of a method as it would be written, with the fields that are set: ``SGD(lr=0.5)``."""
    if not isinstance(part, dict):
        return str(part)
    inner = ((name, _part(value)) for name, value in part.items() if name != "type" and value is not None)
    return f"{part.get('type', '')}({', '.join(f'{name}={value}' for name, value in inner)})"


def _assumptions(claim: Mapping[str, Any]) -> list[str]:
    """What a claim rests on, one line each: what holds, what fails and why, what a run cannot decide."""
    found = [one for one in claim.get("assumptions") or () if isinstance(one, dict)]
    if not found:
        return [f"fails: {text}" for text in claim.get("failed", ())]
    lines = []
    for one in found:
        holds = one.get("holds")
        word = ("holds" if holds else "fails") if isinstance(holds, bool) else "not checked"
        lines.append(f"{word}: {one.get('text')}" + (f" ({one['why']})" if one.get("why") else ""))
    return lines


def _shown(value: Any, digits: int) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return "-" if value is None else str(value)
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _one_record(results: Path, wanted: str) -> tuple[store.Record, list[store.Record]]:
    """The record that an id's first digits name, and the other attempts at the same cell."""
    from harness import store

    where, _, name = wanted.rpartition("/")
    prefix, _, attempt = name.partition(".")
    if not re.fullmatch(r"[0-9a-f]{1,12}", prefix) or (attempt and not attempt.isdigit()):
        raise UserError(
            f"{wanted}: not an id; write the first of its 12 hex digits (epsbench plan SUITE lists them)."
        )
    records = store.load(results)
    found = [r for r in records if r["id"].startswith(prefix) and where in ("", r["suite"])]
    names = {(record["suite"], record["id"]) for record in found}
    if not found:
        broken = [str(one) for one in records.broken if one.path.parent.name.startswith(prefix)]
        raise UserError(
            f"{wanted}: no record under {results} has this id; epsbench plan SUITE lists ids."
            + "".join(f"\nThere is a broken one: {text}" for text in broken)
        )
    if len(names) > 1:
        there = "\n".join(f"  {id}  ({suite})" for suite, id in sorted(names))
        ids = {id for _, id in names}
        rest = "write more digits" if len(ids) > 1 else "write SUITE/ID"
        raise UserError(f"{wanted}: {len(names)} records begin so; {rest}:\n{there}")
    chosen = store.current(found)[0]
    if attempt:
        numbered = [record for record in found if store.attempt_of(record) == int(attempt)]
        if not numbered:
            raise UserError(f"{wanted}: no such attempt; there are {len(found)}.")
        chosen = numbered[0]
    return chosen, [record for record in found if record["path"] != chosen["path"]]


def _recipe(record: store.Record) -> list[str]:
    """The commands that repeat a run, into a folder where it has no record yet."""
    from harness import registry
    from harness.report import read, recipe

    file, reduced = _suite_file(record["suite"])
    method = registry.index("method").get(record["cell"]["method"]["name"])
    return recipe.commands(
        read.read([record])[0], str(file or ""), reduced, method is not None and bool(method.module)
    )


def _suite_file(name: str) -> tuple[Path | None, bool]:
    """The file of a suite by the name in its records, and whether they are of its reduced profile.

    It is the one under suites/ or in the working directory that is called so, or whose suite is.
    """
    files = [
        Path("suites") / f"{name}.toml",
        *sorted(Path("suites").glob("*.toml")),
        *sorted(Path().glob("*.toml")),
    ]
    if files[0].is_file():
        return files[0], False
    for full, reduced in ((name, False), (name.removesuffix("-reduced"), True)):
        for file in files[1:]:
            with contextlib.suppress(
                OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError
            ):
                tables = tomllib.loads(file.read_text("utf-8"))
                called = tables["suite"].get("name", file.stem)
                if called == full and (not reduced or (full != name and "reduced" in tables)):
                    return file, reduced
    return None, False


def _compare(options: argparse.Namespace) -> int:
    from harness.report import compare

    places = [Path(one) for one in (options.a, options.b)]
    there = [place.is_dir() for place in places]
    if there[0] != there[1]:
        place, other = (options.a, options.b) if there[0] else (options.b, options.a)
        raise UserError(f"{place} is a folder and {other} is none; name two methods or two results folders.")
    how = {"metric": options.metric, "by": options.by, "threshold": options.threshold}
    try:
        if all(there):
            before, after = (_compared(*_results_in(place, options.suite)) for place in places)
            made = compare.folders(before, after, options.a, options.b, **how)
        else:
            records = _compared(options.results, options.suite)
            made = compare.methods(records, options.a, options.b, **how)
    except compare.CompareError as error:
        raise UserError(str(error)) from error
    print(made.terminal())
    for file, text in (
        (options.json, json.dumps(made.json(), indent=1) + "\n"),
        (options.markdown, made.markdown()),
    ):
        if file is not None:
            file.write_text(text, encoding="utf-8")
    return FAILED if made.regressions else OK


def _compared(results: Path, suite: str | None) -> list[store.Record]:
    """The record of each cell that counts; says which files could not be used."""
    from harness import store

    records = store.load(results, suite)
    _say_broken(records.broken)
    if not records:
        where = results / suite if suite else results
        raise UserError(f"{where}: holds no records to compare; epsbench run SUITE makes some.")
    return store.current(records)


def _results_in(folder: Path, suite: str | None = None) -> tuple[Path, str | None]:
    """The results folder and the suite that a folder is: one of suites, or a suite's own inside it."""
    from harness import store

    return store.suite_of(folder) or (folder, suite)


def _pack(options: argparse.Namespace) -> int:
    from harness import pack

    folder = Path(options.subject)
    if folder.is_dir():
        results, name = _results_in(folder)
    else:
        results, name = options.results, options.subject
        if not re.fullmatch(r"[a-z0-9-]+", name) or not (results / name).is_dir():
            name = _name_in(_find(options.subject))
    file = options.output or Path(f"{name or folder.absolute().name}.zip")
    made = pack.pack(results, file, name)
    for one in made.left_out:
        print(f"  left out: {one}")
    print(f"{len(made.records)} records in {made.path}\nSHA-256 {made.sha256}")
    return FAILED if made.left_out else OK


def _name_in(file: Path) -> str:
    """The name that a suite's file gives it; that of the file where it gives none."""
    try:
        return str(tomllib.loads(file.read_text("utf-8"))["suite"]["name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return file.stem


def _merge(options: argparse.Namespace) -> int:
    from harness import pack

    _add_files(options.method)
    result = pack.merge(options.sources, options.results)
    print(f"{len(result.added)} records added to {options.results}, {len(result.same)} were there already")
    for title, ones in (("conflict", result.conflicts), ("refused", result.refused)):
        for one in ones:
            print(f"  {title}: {one}")
    if result.added:
        _say_ineligible(result.added, options.results)
    return FAILED if result.conflicts or result.refused else OK


def _say_ineligible(added: Sequence[str], results: Path) -> None:
    """Which of the records that were added cannot be ranked, and why."""
    from harness import pack, store

    suites = sorted({where.partition("/")[0] for where in added})
    records = [record for suite in suites for record in store.load(results, suite)]
    new = {str(results / where / "record.json") for where in added}
    reasons = dict(pack.ineligible(records, _codes_of(r for r in records if r["path"] in new)))
    found: dict[str, list[str]] = {}
    for where in sorted(added):
        if where in reasons:
            found.setdefault(reasons[where], []).append(where)
    if found:
        print(f"{sum(map(len, found.values()))} of them cannot be ranked as they are:")
    for why, places in sorted(found.items()):
        more = f" and {len(places) - 5} more" if len(places) > 5 else ""
        print(f"  {store.Broken(Path(why), ', '.join(places[:5]))}{more}")


def _codes_of(records: Iterable[store.Record]) -> dict[str, Mapping[str, Any] | str]:
    """Today's code of each record's cell by id, or why it cannot be known."""
    from harness import store

    found: dict[str, Mapping[str, Any] | str] = {}
    known: dict[str, Mapping[str, Any] | str] = {}
    for record in records:
        try:
            cell = store.cell_of(record)
        except (KeyError, TypeError):
            found[record["id"]] = "its cell is not whole"
            continue
        # Where today's method makes other parts of the same parameters, its file has changed, and so the code.
        types = re.findall(r'"type": "(\w+)"', json.dumps([cell.parts, cell.then]))
        key = json.dumps([cell.method, types, cell.then.get("name"), cell.task.get("architecture")])
        if key not in known:
            try:
                known[key] = next(iter(_codes([cell]).values()))
            except Exception as error:  # a record from elsewhere may name anything, built by any code
                line = (str(error).splitlines() or [""])[0][:200]
                known[key] = f"its method cannot be built here: {line or type(error).__name__}"
        found[record["id"]] = known[key]
    return found


# report, track, bench -------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    from harness import store

    _need_suite(options)
    if options.suite is not None:
        suite = _load(options)
        _write_report(options, suite, None)
        return OK
    records = store.load(options.results)
    names = list(dict.fromkeys(record["suite"] for record in records))
    if not names:
        _say_broken(records.broken)
        raise UserError(f"{options.results}: holds no records to report; epsbench run SUITE makes some.")
    for name in names:
        file, options.reduced = _suite_file(name)
        if file:
            options.suite = str(file)
            _write_report(options, _load(options), None)
        else:
            print(
                f"{name}: there is no suites/{name}.toml, so its records are shown without question and"
                " published values"
            )
            records = store.load(options.results, name)
            _build(options, name, "", store.current(records), quarantine=records.broken)
    return OK


def _write_report(
    options: argparse.Namespace, suite: Suite, codes: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """The report of what the suite asks for today; `codes` (by id) are worked out where they are missing."""
    from harness import store
    from harness.suite import SuiteError

    found = store.load(options.results, suite.name)
    records: list[store.Record] = found
    left_out = ""
    try:
        cells = suite.cells()
    except SuiteError as error:  # data that is not here is no reason to hide what was measured elsewhere
        print(f"{suite.file}: taken as it is, without looking for stale records, because:\n{error}")
        cells = []
    if cells:
        wanted = {cell.id for cell in cells}
        missing = [cell for cell in cells if codes is None or cell.id not in codes]
        today = {**(codes or {}), **_codes(missing)}
        extra = {record["id"] for record in records} - wanted
        if extra:
            print(
                f"{len(extra)} runs have records but are not in the suite as it is today; they are left out"
            )
            ids = sorted(extra)
            of = "1 record of a run" if len(ids) == 1 else f"{len(ids)} records of runs"
            left_out = f"{of} that the suite does not ask for today: {', '.join(ids[:10])}"
            left_out += f" and {len(ids) - 10} more" if len(ids) > 10 else ""
        records = store.current([record for record in records if record["id"] in wanted], today)
    else:
        records = store.current(records)
    if not records and not left_out:
        _say_broken(found.broken)
        raise UserError(
            f"{options.results / suite.name}: holds no records to report; {_again(options, 'run')}"
        )
    _build(
        options,
        suite.name,
        suite.question,
        records,
        quarantine=found.broken,
        published=[row.model_dump() for row in suite.published],
        tuning=suite.tuning.model_dump(exclude_unset=True) if suite.tuning else None,
        reduced=suite.reduced,
        file=_from_here(Path(suite.file)),
        left_out=left_out,
    )


def _from_here(file: Path) -> str:
    """A path as it is from the working directory, where it lies within it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _build(
    options: argparse.Namespace,
    name: str,
    question: str,
    records: Iterable[store.Record],
    quarantine: Sequence[store.Broken],
    **more: Any,
) -> None:
    from harness import audits, checks, report
    from harness.report import sources

    _say_broken(quarantine)
    more["quarantine"] = [(str(one.path), one.reason) for one in quarantine]
    records = list(records)
    methods = [one["cell"]["method"] for one in records]
    more["sources"] = sources.describe(methods)
    more["audits"] = audits.latest(audits.load(options.results / audits.FOLDER))
    found = checks.load(options.results / checks.FOLDER)
    _say_broken(found.broken)
    named = {one["name"] for one in methods}
    more["checks"] = checks.latest(one for one in found if one["method"] in named)

    placed = [{**one, "path": str(Path(one["path"]).relative_to(options.results))} for one in records]
    made = report.build(name, question, placed, options.reports, results=options.results, **more)
    report.overview(options.reports, options.results)
    print(f"\n{made.top.rstrip()}\n\nleaderboard: {made.index}")


def _track(options: argparse.Namespace) -> int:
    from harness import track

    if not options.results.is_dir():
        raise UserError(f"{options.results}: no such folder; name one with --results DIR")
    waiting = track.pending(options.results, options.uri)
    if not waiting and not options.rebuild:
        print("MLflow has every record; --rebuild asks the store itself")
        return OK
    added = track.rebuild(options.results, options.uri)
    print(f"{added} records added to {track.resolve_uri(options.uri)}")
    return OK


def _claims(arguments: Sequence[str]) -> int:
    from harness.verify import claims

    return claims.main(arguments)


def _audit(arguments: Sequence[str]) -> int:
    from harness.verify import audit

    return audit.main(arguments)


def _faults(arguments: Sequence[str]) -> int:
    from harness.verify import faults

    return faults.main(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from harness import bench

    return bench.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
