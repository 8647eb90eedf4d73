"""Where Redis is not one plain server: with a password, over TLS, in a cluster, watched by Sentinel."""

import time
from contextlib import ExitStack

import pytest
import trustme

from tests.house import grant
from tests.nodes import Node, until
from tests.redis_servers import RedisServer, cluster, command_of, free_port, shifted_clock
from tokenguard.errors import BackendDown
from tokenguard.limiter import Reservation

REALMS = ("north", "south", "east", "west", "tests")


def works(url, **settings):
    """Assert that two nodes share a bucket and a budget."""
    with Node(url, **settings) as a, Node(url, **settings) as b:
        a.limiter.settle(a.taken(100), 30)
        assert b.level() == 970
        b.set("user:alice", grant(50))
        assert a.level() == 20
        return a.backend.describe()


def test_password(redis):
    """With a password alone, and with the name and password of a user who may do just what is needed."""
    with redis.client() as client:
        client.acl_setuser(
            "guard", enabled=True, passwords=["+s3cret/@:"], keys=["tg:*"],
            commands=["+eval", "+evalsha", "+get", "+mget", "+set", "+del", "+time", "+hset", "+hdel", "+hgetall",
                      "+hmget", "+lpush", "+rpush", "+ltrim", "+lrange"],
        )  # fmt: skip
        client.config_set("requirepass", "s3cret")

    assert "s3cret" not in works(f"redis://:s3cret@127.0.0.1:{redis.port}", TOKENGUARD_REALM="one")
    works(f"redis://guard:s3cret%2F%40%3A@127.0.0.1:{redis.port}", TOKENGUARD_REALM="two")


def test_database_and_unix_socket(tmp_path):
    """A number after the slash, and a socket file."""
    with RedisServer("--unixsocket", tmp_path / "redis") as server:
        assert works(f"{server.url}/3").startswith(f"redis at 127.0.0.1:{server.port} database 3")
        works(f"unix://{tmp_path}/redis?db=4")
        with server.client() as client:
            assert set(client.info("keyspace")) == {"db3", "db4"}


def test_tls(tmp_path):
    """The certificate must be vouched for, and be the server's."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    port = free_port()
    options = [
        "--tls-port",
        port,
        "--tls-cert-file",
        tmp_path / "cert.pem",
        "--tls-key-file",
        tmp_path / "key.pem",
    ]
    with RedisServer(*options, "--tls-auth-clients", "no"):
        works(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/ca.pem")
        works(f"rediss://localhost:{port}?ssl_cert_reqs=none", TOKENGUARD_REALM="two")
        with Node(f"rediss://localhost:{port}") as node, pytest.raises(BackendDown, match="certificate"):
            node.reserve(1)


# --- cluster ----------------------------------------------------------------------------------------------------


def test_cluster_of_three_nodes():
    """Several realms spread over the nodes, and each is whole on one."""
    with cluster(3) as servers:
        url = f"redis+cluster://127.0.0.1:{servers[0].port},127.0.0.1:{servers[1].port}"
        for realm in REALMS:
            works(url, TOKENGUARD_REALM=realm)

        homes = {}
        for server in servers:
            with server.client() as client:
                for key in client.scan_iter():
                    homes.setdefault(key.split("{")[1].split("}")[0], set()).add(server.port)
        assert set(homes) == set(REALMS)
        assert all(len(ports) == 1 for ports in homes.values())
        assert len(set.union(*homes.values())) > 1


def test_slot_that_moves_to_another_node_is_followed():
    """A call that comes to the wrong node goes on to the right one: nobody is turned away."""
    with cluster(2) as servers, ExitStack() as stack:
        clients = {server.port: stack.enter_context(server.client()) for server in servers}
        ids = {port: client.execute_command("CLUSTER MYID") for port, client in clients.items()}
        node = stack.enter_context(Node(f"redis+cluster://127.0.0.1:{servers[0].port}", TOKENGUARD_REALM="tests"))
        node.taken(100)
        slot = clients[servers[0].port].execute_command("CLUSTER KEYSLOT", "tg:{tests}:epoch")
        old, new = sorted(
            clients, key=lambda port: not clients[port].execute_command("CLUSTER COUNTKEYSINSLOT", slot)
        )

        clients[new].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
        clients[old].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
        keys = clients[old].execute_command("CLUSTER GETKEYSINSLOT", slot, 100)
        clients[old].execute_command("MIGRATE", "127.0.0.1", new, "", 0, 5000, "KEYS", *keys)
        for port in (new, old):
            clients[port].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[new])

        node.taken(100)
        assert node.level() == 800
        assert node.backend.stats()["outages"] == 0


# --- sentinel ---------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path):
    """A primary, a replica whose clock is a minute behind, and a Sentinel that watches them."""
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer("--repl-diskless-sync-delay", 0))
        options = ["--replicaof", "127.0.0.1", primary.port]
        replica = stack.enter_context(RedisServer(*options, environ=shifted_clock(tmp_path, -60)))
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor group 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds group 300\nsentinel failover-timeout group 2000\n"
        )
        sentinel = stack.enter_context(Sentinel(config))
        with replica.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", "the replica does not follow")
        with sentinel.client() as client:
            until(lambda: client.sentinel_slaves("group"), "the sentinel does not see the replica")
        yield primary, replica, sentinel


class Sentinel(RedisServer):
    """A Sentinel; its configuration, which it rewrites, is its first argument."""

    def __init__(self, config):
        super().__init__("--sentinel")
        self._config = config

    def call(self, folder):  # noqa: ARG002 - it has its configuration
        return [command_of("redis-server"), str(self._config), "--port", str(self.port), "--sentinel"]


def test_failover_to_a_clock_that_is_behind(watched):
    """Sentinel names another primary: calls go there, levels are as they were, and the clock's step is counted."""
    primary, replica, sentinel = watched
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/group"
    with Node(url, {"user": grant(1000, 1)}) as node, primary.client() as client:
        assert "group" in node.backend.describe()
        node.set("user:bob", grant(70))
        node.taken(900)
        client.wait(1, 5000)

        primary.kill()
        until(lambda: isinstance(_tried(node), Reservation), "the new primary is not found")

        with replica.client() as now_primary:
            assert now_primary.info("replication")["role"] == "master"
            behind_s = time.time() - now_primary.time()[0]
        assert 59 <= behind_s <= 62
        assert 90 <= node.level() <= 120
        assert node.level("user:bob") == 70
        assert node.backend.stats()["clock_steps"] >= 1
        decision = node.reserve(400)
        assert 0 < decision.retry_after_us <= 1_000_000_000


def _tried(node):
    try:
        return node.reserve(1)
    except BackendDown:
        return None
