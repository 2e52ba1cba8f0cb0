"""A server of SFTP on the loopback interface: one folder, for one user with a password."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko import SFTPAttributes, SFTPHandle, SFTPServer, SFTPServerInterface

USER, PASSWORD = "builder", "thePasswordOfThisTest"


class Users(paramiko.ServerInterface):
    """Lets the user in."""

    def check_auth_password(self, username: str, password: str) -> int:
        right = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


class Files(SFTPServerInterface):
    """The folder as it is."""

    root = Path()

    def _local(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def list_folder(self, path: str) -> Any:
        with _told() as told:
            return [
                SFTPAttributes.from_stat(item.stat(), item.name)
                for item in self._local(path).iterdir()
            ]
        return told[0]

    def stat(self, path: str) -> Any:
        with _told() as told:
            return SFTPAttributes.from_stat(self._local(path).stat())
        return told[0]

    lstat = stat

    def open(self, path: str, flags: int, attr: Any) -> Any:
        with _told() as told:
            mode = "rb" if not flags & (os.O_WRONLY | os.O_RDWR) else "wb"
            handle = SFTPHandle(flags)
            file = self._local(path).open(mode)
            handle.readfile = handle.writefile = file  # type: ignore[attr-defined]
            return handle
        return told[0]

    def remove(self, path: str) -> int:
        with _told() as told:
            self._local(path).unlink()
        return told[0]

    def posix_rename(self, oldpath: str, newpath: str) -> int:
        with _told() as told:
            self._local(oldpath).replace(self._local(newpath))
        return told[0]

    rename = posix_rename

    def mkdir(self, path: str, attr: Any) -> int:
        with _told() as told:
            self._local(path).mkdir()
        return told[0]


@contextmanager
def _told() -> Iterator[list[int]]:
    """How an error of the system is told in SFTP; the last of the list is the answer."""
    answer = [paramiko.SFTP_OK]
    try:
        yield answer
    except OSError as error:
        answer[0] = SFTPServer.convert_errno(error.errno or 0)


@contextmanager
def sftp_server(folder: Path) -> Iterator[str]:
    """Serve `folder`; gives the address, with user and password, to put a path behind."""
    listener = socket.create_server(("127.0.0.1", 0))
    key = paramiko.ECDSAKey.generate()
    files = type("FilesOfFolder", (Files,), {"root": folder})

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                transport = paramiko.Transport(connection)
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", SFTPServer, files)
                transport.start_server(server=Users())

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"ssh://{USER}:{PASSWORD}@127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
