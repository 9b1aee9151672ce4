"""A WebSocket by hand: the bytes that go over the wire, and what they say."""

import asyncio
import contextlib
import json
import secrets
from html import escape


class Wire:
    """Speak WebSocket over a bare TCP connection, and keep each frame's bytes."""

    def __init__(self) -> None:
        self.rows = []

    async def open(self, server, cookie: tuple[str, str], path: str = "/ws") -> "Wire":
        self.streams = await asyncio.open_connection("127.0.0.1", server.port)
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            f"Cookie: {'='.join(cookie)}\r\n\r\n"
        )
        self.streams[1].write(request.encode())
        answer = await self.streams[0].readuntil(b"\r\n\r\n")
        self.rows.append(("→ server", request.encode(), "asks for a WebSocket"))
        self.rows.append(("← server", answer, "agrees"))
        return self

    def send(self, event: dict) -> None:
        """Send a text frame. A client has to mask its payload: XOR with four bytes."""
        payload, mask = json.dumps(event).encode(), secrets.token_bytes(4)
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        size = len(payload)
        short = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
        frame = b"\x81" + short + mask + masked
        self.rows.append(("→ server", frame, payload.decode()))
        self.streams[1].write(frame)

    async def read(self) -> dict:
        """Read a frame. A server does not mask what it sends."""
        reader = self.streams[0]
        start = await asyncio.wait_for(reader.readexactly(2), 5)
        size = start[1]
        if size == 126:
            start += await reader.readexactly(2)
            size = int.from_bytes(start[2:])
        payload = await reader.readexactly(size)
        self.rows.append(("← server", start + payload, payload.decode()))
        return json.loads(payload)

    async def close(self) -> None:
        self.streams[1].close()
        with contextlib.suppress(ConnectionError):
            await self.streams[1].wait_closed()

    def _repr_html_(self) -> str:
        """Show a row for each frame; its first bytes stay on one line."""
        style = "text-align:left;white-space:nowrap"
        code = f"{style};font-family:monospace"  # JupyterLab wraps what is in <code>
        rows = [
            f'<tr><td style="{style}">{way}</td><td>{len(data)}</td>'
            f'<td style="{code}">{data[:10].hex(" ")}{" …" * (len(data) > 10)}</td>'
            '<td style="text-align:left;overflow-wrap:anywhere">'
            f"{escape(meaning)}</td></tr>"
            for way, data, meaning in self.rows
        ]
        names = "", "bytes", "the first ten", "what they say"
        titles = "".join(f'<th style="{style}">{name}</th>' for name in names)
        return f"<table><tr>{titles}</tr>{''.join(rows)}</table>"
