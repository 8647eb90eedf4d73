"""The Redis server that the tests bring along is a real one."""


def test_redis_server_answers(redis_server):
    """It speaks the protocol on its socket file."""
    with redis_server.connect() as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(64) == b"+PONG\r\n"
