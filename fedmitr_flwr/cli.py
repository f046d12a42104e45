"""The command line: `fedmitr run` in one process without Flower, `fedmitr fuse` on saved uploads."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__
from .common.errors import ConfigError, Failed, UserError, printable
from .common.process import NO_HOME, begin, homeless
from .config import Config
from .config.limits import nearest
from .config.presets import named_file
from .config.text import located, option_hint, parse_assignment, read_settings
from .config.unread import unread_line

if TYPE_CHECKING:  # torch takes seconds to import, and `fedmitr --help` needs none of it
    from .runs.folder import RunFolder

INTERRUPTED = 130  # the exit status after Ctrl-C: 128 and the number of SIGINT

_EXAMPLES = """examples:
  fedmitr demo
  fedmitr run method=fedavg partition.clients=3 --name first
  fedmitr run -c fashion_mnist seed=1
  fedmitr simulate -c digits --clients 3
  fedmitr init photographs --model deit_tiny_patch16_224 -o photographs.toml
  fedmitr config --search head
  fedmitr fuse ~/fedmitr-runs/first --method fedmitr relabel.mode=drop
  fedmitr central ~/fedmitr-runs/first
  fedmitr report ~/fedmitr-runs/first
  fedmitr compare ~/fedmitr-runs/first ~/fedmitr-runs/second
  fedmitr predict ~/fedmitr-runs/first image.png folder/
  fedmitr export ~/fedmitr-runs/first --onnx model.onnx
  fedmitr diagnose ~/fedmitr-runs/first
  fedmitr bench smoke
"""


class Once(argparse.Action):
    """An option that is given twice is refused: one of the two would be left out in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, found: argparse.Namespace, value: object, option: str | None = None
    ) -> None:
        if getattr(found, self.dest) is not None:
            parser.error(f"{option} is given twice; put the settings into one file")
        setattr(found, self.dest, value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other bad input."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> tuple[_Parser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    parser = _Parser(
        prog="fedmitr",
        description="One-shot federated learning with vision transformers, in one process or in Flower.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedmitr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add = partial(commands.add_parser, allow_abbrev=False)
    init = add("init", help="write a settings file for a folder of images, with all that they need")
    run = add("run", help="local training and server phase in this process")
    simulate = add("simulate", help="the same in Flower, on simulated clients or at a SuperLink")
    demo = add("demo", help="simulate on digits, four classes at each client: no network, some minutes on two cores")
    fuse = add("fuse", help="the server phase again, on a run's saved uploads")
    merge = add("merge", help="fuse files of weights that were trained elsewhere")
    central = add("central", help="one model on all of a run's images, to compare")
    bench = add("bench", help="a grid of runs from one file, with tables and figures")
    report = add("report", help="one page, report.html, of a run")
    compare = add("compare", help="runs, and all fusions of them, side by side")
    predict = add("predict", help="the classes of image files, by the model of a run")
    export = add("export", help="the model of a run as ONNX")
    config = add("config", help="list the settings, with defaults and choices")
    diagnose = add("diagnose", help="what the paper claims of gradients, measured on a run's uploads and images")
    add("methods", help="list the methods")
    runs = add("list", help="the runs, newest first: what they are and how good")
    runs.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="of runs (default: ~/fedmitr-runs)")
    init.add_argument("folder", type=Path, metavar="FOLDER", help="of images, as data.path")
    init.add_argument("--model", metavar="NAME", help="a timm ViT, pretrained unless model.weights says otherwise")
    init.add_argument("-o", "--out", type=Path, default=Path("fedmitr.toml"), metavar="FILE", help="(fedmitr.toml)")
    config.add_argument("words", nargs="*", metavar="KEY | SECTION", help="such as local.lr, or distill")
    config.add_argument("--search", metavar="TEXT", help="in keys and descriptions")
    config.add_argument("--schema", action="store_true", help="all as a JSON schema, for editors of TOML files")
    config.add_argument("--diff", nargs=2, type=Path, metavar="RUN", help="what two run folders have otherwise")
    run.add_argument("--name", help="of the run folder (default: method, seed and time)")
    for command in (fuse, central, report, predict, export, diagnose):
        command.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders; compare.html goes to the first"
    )
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, and folders of them")
    predict.add_argument("--top", type=int, default=1, metavar="N", help="so many classes, best first (default: 1)")
    export.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="to write; needs the extra onnx")
    fuse.add_argument("--method", required=True, metavar="NAME", help="see `fedmitr methods`")
    merge.add_argument("settings", nargs="*", metavar="FILE | key=value", help="safetensors files; settings")
    merge.add_argument("--model", required=True, metavar="NAME", help="timm's, of all files")
    merge.add_argument(
        "--kwargs", default="", help="what else timm is to be told, such as 'num_heads=3 | qk_norm=True'"
    )
    merge.add_argument("--method", default="fedmitr", metavar="NAME", help="see `fedmitr methods`")
    merge.add_argument("--sizes", metavar="N,N,...", help="training images of each file's model (default: all alike)")
    merge.add_argument("--start", type=Path, metavar="FILE", help="what all were trained from, for wudi, ties, ...")
    merge.add_argument("--test", type=Path, metavar="DIR", help="images to say how good the result is, as data.path")
    merge.add_argument("--out", type=Path, default=Path("merged"), metavar="DIR", help="of the model (default: merged)")
    bench.add_argument("file", nargs="?", type=Path, metavar="FILE", help="such as smoke (a preset), or a path")
    bench.add_argument("settings", nargs="*", metavar="key=value", help="settings, or axes: grid.seed=[100]; they win")
    bench.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: ~/fedmitr-runs/bench-<name>)")
    bench.add_argument("--table", type=Path, metavar="PATH", help="run nothing; a bench's folder or its results.jsonl")
    bench.add_argument("--known", type=Path, metavar="PATH", help="results whose cells are not run again; as --table")
    bench.add_argument("--any-code", action="store_true", help="keep what other versions of the code have made")
    bench.add_argument("--verbose", action="store_true", help="let every run tell what it does")
    for command in (simulate, demo):
        command.add_argument("--clients", type=int, metavar="K", help="simulated clients (default: partition.clients)")
        command.add_argument("--client-gpus", type=float, default=0.0, metavar="G", help="share of a GPU per client")
        command.add_argument("--flwr-home", type=Path, metavar="DIR", help="of Flower (default: ~/fedmitr-runs/.flwr)")
        command.add_argument("--offline", action="store_true", help="never ask the Hugging Face hub")
    simulate.add_argument("--superlink", metavar="NAME", help="a connection of Flower's config.toml, for real clients")
    demo.add_argument("settings", nargs="*", metavar="key=value", help="settings; they win over the preset's")
    demo.set_defaults(config=Path("demo"), superlink=None)
    for command in (init, run, simulate, fuse):
        command.add_argument(
            "-c",
            "--config",
            type=Path,
            action=Once,
            metavar="FILE",
            help="settings in TOML, or a preset such as digits",
        )
        command.add_argument("settings", nargs="*", metavar="key=value", help="settings; they win over the file's")
    return parser, commands.choices


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words; `key=value` may stand before, between and behind the options."""
    parser, commands = _parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        from .config.completion import complete
        from .runs.folder import HOME

        complete(parser, commands, HOME)
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if words[0] == "help":  # `fedmitr help run` is `fedmitr run --help`
        words = [*words[1:2], "--help"]
    if not words[0].startswith("-") and words[0] not in commands:
        raise ConfigError(f"there is no command {words[0]!r}{nearest(words[0], commands) or '; see fedmitr --help'}")
    arguments, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or "settings" not in arguments]:
        hint = option_hint(unknown[0], words[words.index(unknown[0]) + 1 :], Config().to_flat())
        if hint and "settings" in arguments:
            raise ConfigError(f"unknown argument {unknown[0]!r}{hint}")
        near = nearest(unknown[0].partition("=")[0], commands[words[0]]._option_string_actions)
        raise ConfigError(f"unknown argument {unknown[0]!r}{near or '; see fedmitr --help'}")
    if "settings" in arguments:
        arguments.settings += rest
    return arguments


def _overrides(arguments: argparse.Namespace, base: Config) -> dict[str, object]:
    """The file's settings under those of the command line, checked on top of `base`."""
    if arguments.config:
        arguments.config = named_file(arguments.config)
    together = read_settings(arguments.config, arguments.settings, base.to_flat())
    try:
        Config.from_flat(together, base)
    except ConfigError as error:
        if not arguments.config:
            raise
        raise ConfigError(f"{error} (with the settings of {arguments.config})") from error
    return together


def _run(arguments: argparse.Namespace) -> None:
    config = Config.from_flat(_overrides(arguments, Config()))
    from . import pipeline

    _report(lambda: pipeline.run(config, arguments.name))


def _simulate(arguments: argparse.Namespace) -> None:
    if arguments.clients is not None:
        assigned = dict(parse_assignment(word, Config().to_flat()) for word in arguments.settings)
        said = assigned.get("partition.clients", arguments.clients)
        if said != arguments.clients:
            raise ConfigError(f"--clients {arguments.clients} and partition.clients={said}; give one of them")
        arguments.settings.append(f"partition.clients={arguments.clients}")
    config = Config.from_flat(_overrides(arguments, Config()))
    from .flower.checks import require_connection
    from .flower.simulate import Options, simulate

    if arguments.superlink is not None:
        require_connection(arguments.superlink)
    given = {key: getattr(arguments, key) for key in ("superlink", "client_gpus", "flwr_home", "offline")}
    simulate(config, Options(**{key: value for key, value in given.items() if value is not None}))


def _fuse(arguments: argparse.Namespace) -> None:
    from . import methods, pipeline
    from .runs.folder import RunFolder

    run = RunFolder.open(arguments.run)
    method = str(located({"method": arguments.method}, Path.cwd())["method"])
    overrides = _overrides(arguments, run.config)
    config = Config.from_flat({**overrides, "method": method}, run.config)
    if without_effect := unread_line(config, methods.unread(config), overrides):
        logging.getLogger("fedmitr").warning("%s", without_effect)
    _report(lambda: pipeline.fuse(run, method, overrides))


def _init(arguments: argparse.Namespace) -> None:
    model = {} if arguments.model is None else {"model.name": arguments.model, "model.weights": "timm"}
    settings = model | _overrides(arguments, Config.from_flat(model))
    from .api.command import init

    print(init(arguments.folder, settings, arguments.out))


def _config(arguments: argparse.Namespace) -> None:
    from .config.described import difference, settings_like

    if arguments.schema:
        from .config.schema import schema

        print(json.dumps(schema(), indent=1, ensure_ascii=False))
        return
    if arguments.diff is None:
        print(*settings_like(arguments.words, arguments.search), sep="\n")
        return
    from .runs.folder import RunFolder

    print(*difference(*(RunFolder.open(path).config for path in arguments.diff)), sep="\n")


def _merge(arguments: argparse.Namespace) -> None:
    from .api.command import merge

    given = {key: getattr(arguments, key) for key in ("method", "kwargs", "sizes", "start", "test", "out")}
    print(f"\n{merge(arguments.settings, arguments.model, **given)}")


def _central(arguments: argparse.Namespace) -> None:
    from .central import train_centrally
    from .runs.folder import RunFolder

    _report(lambda: train_centrally(RunFolder.open(arguments.run)))


def _bench(arguments: argparse.Namespace) -> int:
    from .bench.command import bench

    words = dict(parse_assignment(word, Config().to_flat()) for word in arguments.settings)
    chosen = arguments.file, words, arguments.out, arguments.table
    return bench(*chosen, known=arguments.known, any_code=arguments.any_code, verbose=arguments.verbose)


def _report_page(arguments: argparse.Namespace) -> None:
    from .report.page import write_page

    print(write_page(arguments.run))


def _compare(arguments: argparse.Namespace) -> None:
    from .report.compare import compare

    print("{}\n\n{}".format(*compare(arguments.runs)))


def _predict(arguments: argparse.Namespace) -> None:
    from .publish.predict import predictions
    from .runs.folder import RunFolder

    for line in predictions(RunFolder.open(arguments.run), arguments.images, arguments.top):
        print(line)


def _export(arguments: argparse.Namespace) -> None:
    from .publish.export import export
    from .runs.folder import RunFolder

    print(export(RunFolder.open(arguments.run), arguments.onnx))


def _diagnose(arguments: argparse.Namespace) -> None:
    from .diagnostics.diagnose import diagnose
    from .diagnostics.table import as_text
    from .report.page import write_page
    from .runs.folder import RunFolder

    found = diagnose(RunFolder.open(arguments.run))
    print(f"\n{as_text(found)}\n\nreport: {write_page(arguments.run)}")


def _methods(_: argparse.Namespace) -> None:
    from .config.described import methods

    for name, summary in methods().items():
        print(f"{name:15} {summary}")


def _list(arguments: argparse.Namespace) -> None:
    from .report.listing import listed

    print(*listed(arguments.folder), sep="\n")


def _report(work: Callable[[], "RunFolder"]) -> None:
    """Do the work, which gives a run folder, and show it."""
    from .common.progress import on_screen
    from .runs.result import ending

    with on_screen():
        folder = work()
    print(ending(folder.read_result(), folder.path))


class _MadeFolder(logging.Handler):
    """Remembers the run folder that the log names, for the line that an interrupted run ends with."""

    path = ""

    def emit(self, record: logging.LogRecord) -> None:
        said, _, path = record.getMessage().partition("run folder: ")
        self.path = path if path and not said else self.path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0, 1 where Flower or cells of a bench failed, 2 after bad input (one line on stderr), 130 after
    Ctrl-C, or 141 where its output is closed, as behind `| head`.
    """
    begin(logging.getLogger("fedmitr"))
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("fedmitr").setLevel(logging.INFO)
    made = _MadeFolder()
    logging.getLogger("fedmitr").addHandler(made)
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        **{"init": _init, "run": _run, "simulate": _simulate, "demo": _simulate, "fuse": _fuse, "merge": _merge},
        **{"central": _central, "bench": _bench, "report": _report_page, "compare": _compare},
        **{"diagnose": _diagnose, "predict": _predict, "export": _export},
        **{"config": _config, "methods": _methods, "list": _list},
    }
    command = ""
    try:
        arguments = _parse(argv)
        command = arguments.command
        status = commands[command](arguments) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print("fedmitr: error:", printable(" ".join(str(error).split())), file=sys.stderr)
        return 2
    except Failed as error:
        print("fedmitr: error:", printable(" ".join(str(error).split())), file=sys.stderr)
        return error.status
    except RuntimeError as error:
        if not homeless(error):
            raise
        print("fedmitr: error:", NO_HOME, file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        goes_on = {"bench": "; the same command goes on where it was"}
        goes_on |= {"run": f"; go on with: fedmitr run ... resume-from={made.path}"} if made.path else {}
        print(
            f"fedmitr: interrupted{printable(f'; {error}' if str(error) else goes_on.get(command, ''))}",
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it ends
        return 141
    finally:
        logging.getLogger("fedmitr").removeHandler(made)
