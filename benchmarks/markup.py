"""What the files of measurements have in common, and their Markdown; the rest is in fedmitr_flwr/bench/markup.py."""

import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from fedmitr_flwr.bench.markup import origin
from fedmitr_flwr.common.files import write_text
from fedmitr_flwr.common.fingerprint import fingerprint
from fedmitr_flwr.common.provenance import machine, versions
from fedmitr_flwr.config.text import PATHS
from fedmitr_flwr.runs.folder import RunFolder

Cell = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # what tells a row from others, and what makes the rest


def go_on(path: Path, cells: Iterable[Cell], **about: Any) -> None:
    """Make the rows that a study's file does not have yet, and write it after each."""
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    for key, make in cells:
        if any(row.items() >= key.items() for row in rows):
            continue
        rows.append(key | make())
        print(json.dumps(rows[-1]), flush=True)
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        made_by = {"fingerprint": fingerprint(), "versions": versions(), "machine": machine("cpu")}
        content = {"command": command, "scripts": scripts(), **about, **made_by, "rows": rows}
        write_text(path, json.dumps(content, indent=1) + "\n")


def sections(results: Path, section: Callable[[Mapping[str, Any]], list[str]], maker: str) -> str:
    """The Markdown of all files of a folder, in the order of their names; `maker` is the script that wrote them."""
    texts = []
    for path in sorted(results.glob("*.json")):
        try:
            texts.append("\n".join(section(json.loads(path.read_text(encoding="utf-8")))))
        except (LookupError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a file of benchmarks/{maker} ({error!r}); make it again") from error
    return "\n\n".join(texts) or "No measurements are committed yet."


def seeds(rows: Iterable[Mapping[str, Any]]) -> str:
    """Those of the rows, such as "0, 1, 2"."""
    return ", ".join(map(str, sorted({row["seed"] for row in rows})))


def provenance(content: Mapping[str, Any]) -> list[str]:
    """The last lines of a section: how its file was made, and where."""
    return [f"Command: `{content['command']}`", "", origin(content)]


def facts(uploads: RunFolder) -> dict[str, Any]:
    """What the result of a run says of code, machine and settings; of paths the last part, and none of its own."""
    result = uploads.read_result()
    config = result["config"]
    named = {key: PurePath(config[key]).name for key in PATHS if Path(config[key]).is_absolute()}
    result["config"] = {key: value for key, value in (config | named).items() if key != "out-dir"}
    return {key: result[key] for key in ("fingerprint", "versions", "machine", "config")}


def scripts() -> str:
    """12 hexadecimal characters over the modules of this folder that are in use."""
    files = {Path(getattr(module, "__file__", None) or "") for module in list(sys.modules.values())}
    own = sorted(path for path in files if path.parent == Path(__file__).parent)
    return hashlib.sha256(b"".join(path.read_bytes() for path in own)).hexdigest()[:12]
