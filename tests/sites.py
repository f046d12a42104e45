"""Nodes with images of their own, in one process or around real SuperNodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from local_grid import LocalGrid

from client_app.app import app as client_app


class Sites(LocalGrid):
    """Nodes that were started with these --node-configs."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        super().__init__(client_app, len(nodes))
        for client, told in enumerate(nodes):
            self.contexts[self.node(client)].node_config = told


def named(names: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Their --node-configs, as deploy/supernode.sh writes them."""
    return [{"client-name": name, "data-path": str(path)} for name, path in zip(names, folders, strict=True)]
