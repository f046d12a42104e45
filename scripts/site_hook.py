"""For MkDocs: pages and what they link to at their places in the repository, so that links hold here as on GitHub."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("*.md", "docs/**/*.md", "deploy/*.md")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#:\s]+)(#[^)]*)?\)")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def on_config(config: Any) -> Any:
    config.nav.append({"Decisions": [named(path) for path in sorted((ROOT / "docs" / "adr").glob("*.md"))]})
    return config


def on_files(files: Files, config: Any) -> Files:
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {(page.parent / link[1]).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    for path in [*pages, *sorted(linked.difference(pages))]:
        if path.is_file():
            files.append(File.generated(config, named(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A folder is no page: of a link to one, its words stay."""
    here = (ROOT / page.file.src_uri).parent
    return LINK.sub(lambda link: link[1][1:-1] if (here / link[2]).is_dir() else link[0], markdown)
