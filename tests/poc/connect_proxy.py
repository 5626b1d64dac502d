"""A small HTTP proxy on loopback that knows the method CONNECT only, as the proxy of a hospital lets TLS out."""

from __future__ import annotations

import contextlib
import socket
import threading


class ConnectProxy:
    """It leads every CONNECT to one port of this machine, whatever host was asked for, and notes what was asked for.

    Args:
        target: port that it leads to.
        password: what it asks for in `Proxy-Authorization`, as it stands there; None lets everybody through.
    """

    def __init__(self, target: int, password: str | None = None) -> None:
        self.target, self.password = target, password
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """What a site's environment says."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                part = near.recv(4096)
                if not part:
                    return
                request += part
            head, _, rest = request.partition(b"\r\n\r\n")
            first, *headers = head.decode().split("\r\n")
            given = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in headers}
            if not first.startswith("CONNECT ") or (
                self.password is not None and given.get("proxy-authorization") != self.password
            ):
                self.refused.append(first)
                code = "407 Proxy Authentication Required" if first.startswith("CONNECT ") else "405 Method Not Allowed"
                near.sendall(f"HTTP/1.1 {code}\r\nContent-Length: 0\r\n\r\n".encode())
                return
            self.asked.append(first.split()[1])
            with socket.create_connection(("127.0.0.1", self.target)) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                far.sendall(rest)
                back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
                back.start()
                self._pass(near, far)
                back.join()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.bytes += len(data)
                other.sendall(data)
        for side in (one, other):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
