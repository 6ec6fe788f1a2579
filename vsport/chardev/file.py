"""``file``: what the guest sends is written to a file; what it receives can come from another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from vsport.chardev.base import COMMON_OPTIONS, AlwaysConnected, Ends, LogFile, open_file
from vsport.document import DocumentError, Fields
from vsport.option_table import Option, on_off, text
from vsport.parcel import Delivery, Parcel

__all__ = ["File"]


class File(AlwaysConnected):
    """``--chardev file,path=PATH[,append=on|off][,input-path=PATH]``.

    A write that fails (disk full) ends the session; a second later the file is opened again, and never truncated twice.
    """

    kind = "file"
    summary = "writes to a file, reads from another"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "path": Option(text, None, "the file that the guest's bytes are written to", required=True),
        "append": Option(on_off, False, "keep what the file already has"),
        "input-path": Option(text, None, "a file that the guest is given to read, once"),
        **COMMON_OPTIONS,
    }
    eof_ends_session = False
    KEPT: ClassVar[Mapping[str, int]] = {"input": os.O_RDONLY}
    PASSING = os.O_WRONLY

    def __init__(
        self,
        id: str,
        *,
        path: str,
        append: bool = False,
        input_path: str | None = None,
        log: LogFile | None = None,
    ) -> None:
        super().__init__(id, log=log)
        self.path = path
        self.append = append
        self.input_path = input_path
        self._written = False

    def claims(self) -> list[str]:
        """Files that are appended to may be shared, and so may devices such as /dev/null."""
        shared = self.append or self.path.startswith("/dev/")
        return [*super().claims(), *([] if shared else [os.path.abspath(self.path)])]

    def _start(self) -> None:
        if self.input_path is not None and self._held("input") < 0:
            self._keep("input", open_file(self.input_path, os.O_RDONLY, "input file"))
        keep = os.O_APPEND if self.append or self._written else os.O_TRUNC
        output = open_file(self.path, os.O_WRONLY | os.O_CREAT | keep, "file")
        self._written = True
        self._connected(output)

    def _ends(self) -> Ends:
        return self._held("input"), self._passing

    def _stop(self) -> None:
        self._written = False

    def _give(self, parcel: Parcel) -> dict[str, Any]:
        return {"written": self._written}

    def _take(self, state: Fields, delivery: Delivery) -> None:
        self._written = state.boolean("written")
        if (self._held("input") < 0) is not (self.input_path is None):
            raise DocumentError(f"{state.where}: input-path= and the descriptor for it belong together")
