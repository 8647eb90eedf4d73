"""The fast lane: the exchange driven straight from the bytes of a connection, without ASGI and Falcon between."""
