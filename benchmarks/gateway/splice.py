"""The least that a proxy in Python does: what comes from either side goes to the other as it is.

Each caller has a connection to the provider to itself, and no byte is looked at.

Run: python -m benchmarks.gateway.splice PORT UPSTREAM_PORT
"""

import asyncio
import sys

import uvloop


class Side(asyncio.Protocol):
    """One side of a connection: hands on what it is sent."""

    def __init__(self, other=None):
        self.other = other
        self.transport = None

    def connection_made(self, transport):
        """Remember where to write."""
        self.transport = transport

    def data_received(self, data):
        """Hand on."""
        self.other.transport.write(data)

    def connection_lost(self, exc):
        """End the other side too."""
        if self.other is not None:
            self.other.transport.close()


class Caller(Side):
    """The caller's side, which keeps what it is sent until there is a connection to the provider."""

    def __init__(self, port):
        super().__init__()
        self._port = port
        self._early = []

    def connection_made(self, transport):
        """Connect to the provider."""
        super().connection_made(transport)
        self._connecting = asyncio.ensure_future(self._connect())

    def data_received(self, data):
        """Hand on, or keep for later."""
        if self.other is None:
            self._early.append(data)
        else:
            super().data_received(data)

    async def _connect(self):
        loop = asyncio.get_running_loop()
        _, self.other = await loop.create_connection(lambda: Side(self), "127.0.0.1", self._port)
        self.other.transport.writelines(self._early)


async def main(port, upstream_port):
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(lambda: Caller(upstream_port), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
