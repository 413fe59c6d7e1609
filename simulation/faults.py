"""The faults: each is a coroutine of the world's own loop, from the fault's beginning to its end.

A run first draws which kinds of faults it may have. So some runs have many of one kind, and others
a mix ("swarm testing": Groce et al., 2012). No fault takes away the last instance that works,
because no client can be served then.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pokebridge.errors import PokebridgeError
from pokebridge.model import MAX_VERSION, Feed, Mode
from simulation.client import HOME_URL, SimClient, SimShell
from simulation.instance import SimInstance
from simulation.network import Server, Trouble
from simulation.servers import Route
from simulation.workers import SimWorker
from simulation.world import Fault, World

_STALLED_AFTER_S = 5.0
"""About how long a hub waits before it kills a worker that hangs."""
_ONE_POKE_BYTES = 150
"""Room for a signal with one poke, and not for two."""
_POISON = (
    "hello",
    "[" * 2_000,
    '{"recipient":"urn:user:jos\u00e9"}',
    '{"recipient":"BOB","version":-1}',
    f'{{"recipient":"BOB","version":{MAX_VERSION}}}',
    '{"pokes":[{"recipient":7},{"recipient":"BOB"}]}',
    '{"type":"reboot","recipient":"BOB"}',
)


def _victim(world: World, *, well: bool = True) -> SimInstance | None:
    """An instance to harm, a ``well`` one or any; another one that is well is spared."""
    well_ones = world.well_instances
    if len(well_ones) < 2:
        return None
    spared = world.rng.choice(well_ones)
    candidates = well_ones if well else world.running
    return world.rng.choice([each for each in candidates if each is not spared])


def _worker(world: World) -> SimWorker | None:
    workers = [worker for each in world.well_instances for worker in each.serving_workers]
    return world.rng.choice(workers) if workers else None


def _client(world: World) -> SimClient | None:
    ready = [client for client in world.clients if client.core.ready and not client.trouble.active]
    return world.rng.choice(ready) if ready else None


# --- instances ------------------------------------------------------------------------------------


async def kill(world: World) -> None:
    """SIGKILL; a supervisor starts it again."""
    if victim := _victim(world, well=False):
        victim.kill()


async def lose_power(world: World) -> None:
    """A machine is gone, and its clients' connections are not closed."""
    if victim := _victim(world, well=False):
        victim.kill(machine=True)


async def pause(world: World) -> None:
    """SIGSTOP for a while; a long one costs it its subscriptions, as slow consumers are cut off."""
    victim = _victim(world)
    if victim is None:
        return
    world.trace.note(victim.name, "is stopped")
    victim.trouble.begin()
    victim.loop.pause()
    began_s = world.scheduler.now
    await world.nap(world.rng.uniform(0.5, 4 * world.config.lease_s))
    pause_s = world.scheduler.now - began_s
    if pause_s > 5.0 and world.rng.random() < 0.5:
        for link in world.broker.links_of(victim):
            link.break_off("too slow")
    world.trace.note(victim.name, "goes on")
    victim.loop.resume()
    victim.trouble.end()


async def pause_a_writer(world: World) -> None:
    """SIGSTOP for the instance that next writes the shard map, while the write is on its way."""
    world.pauses_next_writer = True


async def kill_after_commit(world: World) -> None:
    """SIGKILL for the instance that next commits a message, before it can poke."""
    world.kills_next_committer = True


async def restart(world: World) -> None:
    """SIGTERM: it drains, stops, and is started again."""
    if victim := _victim(world):
        world.trace.note(victim.name, "is to stop")
        victim.stop()


async def drain(world: World) -> None:
    """An operator drains an instance through another one, and then restarts it."""
    victim = _victim(world)
    if victim is None:
        return
    through = world.rng.choice(world.well_instances)
    world.trace.note(victim.name, f"is to drain, says {through.name}")
    await _ask(world, through, lambda: through.real.cluster.drain(victim.name))
    await world.nap(world.rng.uniform(5.0, 15.0))
    victim.stop()


def _other_mode(mode: Mode) -> Mode:
    return "fanout" if mode == "partitioned" else "partitioned"


async def migrate(world: World) -> None:
    """An operator migrates the cluster to the other mode."""
    well = world.well_instances
    if not well:
        return
    through = world.rng.choice(well)
    mode = _other_mode(through.real.cluster.view.shard_map.mode)
    world.trace.note(through.name, f"is to migrate the cluster to {mode}")
    await _ask(world, through, lambda: through.real.cluster.migrate(mode, force=True))


async def migrate_over_a_gap(world: World) -> None:
    """The mode changes just when subscriptions have failed, and nobody has noticed yet."""
    if world.running:
        victim = world.rng.choice(world.running)
        world.trace.note(victim.name, "loses its streams")
        for link in world.broker.links_of(victim):
            link.break_off("a broken stream", world.rng.uniform(0.0, 3.0))
    await migrate(world)


async def add_instance(world: World) -> None:
    """The cluster grows by one."""
    if len(world.names) < world.config.instances + 2:
        world.add_instance()


async def remove_instance(world: World) -> None:
    """The cluster shrinks by one, for good."""
    victim = _victim(world)
    if victim is not None and len(world.names) > 2:
        world.names.pop(victim.base, None)
        victim.stop()


async def _ask(world: World, through: SimInstance, call: Callable[[], Awaitable[None]]) -> bool:
    """Have an instance carry out what an operator asks. Returns whether it says that it has."""
    done: asyncio.Future[bool] = world.outside.create_future()

    async def carry_out() -> None:
        try:
            await call()
        except PokebridgeError as error:
            world.trace.note(through.name, f"can't: {error}")
            done.set_result(False)
        else:
            done.set_result(True)

    through.loop.deliver(0.0, lambda: through.loop.create_task(carry_out()))
    await asyncio.wait([done], timeout=20.0)
    return done.done() and done.result()


# --- workers --------------------------------------------------------------------------------------


async def kill_worker(world: World) -> None:
    """SIGKILL for a worker; its hub starts another one."""
    if worker := _worker(world):
        world.trace.note(worker.name, "is killed")
        worker.kill()


async def break_channel(world: World) -> None:
    """The channel between a hub and a worker breaks, as when one of them reads nothing."""
    if worker := _worker(world):
        world.trace.note(worker.name, "loses its channel")
        worker.break_channel()


async def stop_worker(world: World) -> None:
    """SIGSTOP for a worker, while its clients are poked often. Its hub kills it after a time."""
    worker = _worker(world)
    if worker is None:
        return
    world.trace.note(worker.name, "is stopped")
    worker.loop.pause()
    clients = [each for each in world.hearers if each.wire and each.wire.server_loop is worker.loop]
    for client in clients:
        client.trouble.begin()
    began_s = world.scheduler.now
    for _ in range(world.rng.randrange(60) if clients else 0):
        world.send_soon(world.rng.choice(clients).recipient)
        await world.nap(world.rng.uniform(0.01, 0.1))
    await world.nap(world.rng.uniform(0.5, 6.0))
    if world.scheduler.now - began_s > _STALLED_AFTER_S:
        worker.kill()
    elif not worker.loop.dead:
        world.trace.note(worker.name, "goes on")
        worker.loop.resume()
    for client in clients:
        client.trouble.end()


# --- servers --------------------------------------------------------------------------------------


async def restart_broker(world: World) -> None:
    """All connections break, and what was under way is lost."""
    broker = world.broker
    world.trace.note("broker", "goes down")
    broker.trouble.begin()
    broker.go_down()
    await world.nap(world.rng.choice((0.1, 1.0, 5.0)) * world.rng.uniform(0.5, 1.5))
    world.trace.note("broker", "comes up")
    broker.come_up()
    broker.trouble.end()


async def break_subscription(world: World) -> None:
    """One subscription fails alone: a stream ends, a consumer is slow, somebody deletes it."""
    if world.broker.subscriptions:
        link = world.rng.choice(world.broker.subscriptions)
        world.trace.note(link.peer.name, f"loses {link.selection}")
        link.break_off("a broken stream", world.rng.choice((0.0, 0.0, 1.0, 6.0)))


async def cut_from_broker(world: World) -> None:
    """A partition between an instance and the broker."""
    if victim := _victim(world):
        await _cut(world, victim, world.broker, victim.line, world.rng.uniform(0.3, 10.0))


async def deafen(world: World) -> None:
    """An instance loses its connection to the broker for long; its clients and its mailbox work."""
    if victim := _victim(world):
        await _cut(world, victim, world.broker, victim.line, world.rng.uniform(20.0, 45.0))


async def deny_subscriptions(world: World) -> None:
    """The broker refuses an instance some of the subscriptions, also after a restart."""
    victim = _victim(world)
    if victim is None or victim.base in world.denials:
        return
    everything = [*Feed, *range(world.config.shard_count)]
    denied = frozenset(each for each in everything if world.rng.random() < 0.3)
    world.trace.note(victim.name, f"may not subscribe to {sorted(map(str, denied))}")
    world.deny(victim.base, denied)
    await world.nap(world.rng.uniform(20.0, 45.0))
    world.trace.note(victim.name, "may subscribe to everything again")
    world.permit(victim.base)


async def lose_broker(world: World) -> None:
    """The broker is down for long, for all instances."""
    broker = world.broker
    world.trace.note("broker", "goes down for long")
    broker.trouble.begin()
    broker.go_down()
    await world.nap(world.rng.uniform(10.0, 40.0))
    world.trace.note("broker", "comes up")
    broker.come_up()
    broker.trouble.end()


async def break_route(world: World) -> None:
    """Two of the broker's servers lose each other, and report nothing."""
    servers = world.broker.servers
    if servers.routes:
        await _break(world, [world.rng.choice(servers.routes)])


async def lag_route(world: World) -> None:
    """A route between two of the broker's servers is slower than anybody expects."""
    servers = world.broker.servers
    if servers.routes:
        route, more_s = world.rng.choice(servers.routes), world.rng.uniform(0.5, 2.0)
        world.trace.note("broker", f"a route lags by {more_s:.3f} s")
        servers.lag(route, more_s)
        await world.nap(world.rng.uniform(1.0, 20.0))
        servers.catch_up(route, more_s)


async def demote_server(world: World) -> None:
    """A server is no longer the primary: it still accepts, and forwards to nobody.

    New connections go to the others. Existing ones stay until somebody asks for its role.
    """
    servers = world.broker.servers
    if not servers.routes:
        return
    demoted = world.rng.randrange(servers.count)
    world.trace.note("broker", f"server {demoted} is demoted")
    servers.lead_away_from(demoted)
    await _break(world, servers.routes_of(demoted))
    for instance in world.running:
        if servers.home_of(instance) == demoted:
            world.broker.disconnect(instance, "a replica")
    servers.lead_to_all()


async def _break(world: World, routes: Sequence[Route]) -> None:
    world.trace.note("broker", f"{len(routes)} routes break")
    world.broker.servers.break_off(routes)
    await world.nap(world.rng.choice((1.0, 5.0, 30.0)) * world.rng.uniform(0.3, 1.0))
    world.trace.note("broker", f"{len(routes)} routes heal")
    world.broker.servers.heal(routes)


async def limit_signals(world: World) -> None:
    """The broker refuses signals of more than one poke, and many pokes come together."""
    broker = world.broker
    broker.max_signal_bytes = _ONE_POKE_BYTES
    broker.tells_limit = world.rng.random() < 0.5
    broker.slow_s = 0.05  # so that pokes are gathered meanwhile
    for _ in range(world.rng.randint(1, 5)):
        through = world.route(HOME_URL)
        for client in world.clients:
            world.send_soon(client.recipient, through=through)
        await world.nap(world.rng.uniform(0.5, 8.0))
    broker.max_signal_bytes, broker.slow_s = None, 0.0


async def poison(world: World) -> None:
    """Another program publishes invalid signals, and writes an invalid entry into the outbox."""
    rng = world.rng
    for _ in range(rng.randint(1, 20)):
        recipient = rng.choice(world.clients).recipient
        shard = rng.choice([None, *range(world.config.shard_count)])
        world.publish_by_hand(rng.choice(_POISON).replace("BOB", recipient).encode(), shard)
        await world.nap(rng.uniform(0.0, 0.5))
    world.post.mailbox.spoil_outbox()


async def restore_mailbox(world: World) -> None:
    """The database goes back to where it was some seconds ago."""
    post = world.post
    if post.restoring:
        return
    post.restoring = True
    snapshot = post.mailbox.snapshot()
    await world.nap(world.rng.uniform(0.1, 10.0))
    post.trouble.begin()
    post.up = False
    await world.nap(world.rng.uniform(0.1, 2.0))
    world.trace.note("mailbox", "is restored")
    post.mailbox.restore(snapshot)
    world.oracle.on_restored(post.mailbox.newest())
    world.witnesses.restores += 1
    post.up, post.restoring = True, False
    post.trouble.end()


async def cut_from_store(world: World) -> None:
    """A partition between an instance and the coordination store; no client may notice."""
    if world.running:
        victim = world.rng.choice(world.running)
        world.trace.note(victim.name, "is cut off from the store")
        world.store.trouble.begin()
        world.store.cut(victim)
        await world.nap(world.rng.uniform(0.5, 5 * world.config.lease_s))
        world.store.heal(victim)
        world.store.trouble.end()


async def cut_from_mailbox(world: World) -> None:
    """A partition between an instance and the mailbox."""
    if victim := _victim(world):
        await _cut(world, victim, world.post, victim.trouble, world.rng.uniform(0.3, 10.0))


async def _cut(
    world: World, victim: SimInstance, server: Server, trouble: Trouble, cut_s: float
) -> None:
    world.trace.note(victim.name, f"is cut off from the {server.name}")
    trouble.begin()
    server.cut(victim)
    await world.nap(cut_s)
    world.trace.note(victim.name, f"reaches the {server.name} again")
    server.heal(victim)
    trouble.end()


async def stop_mailbox(world: World) -> None:
    """The database is down for a while."""
    await _go_down(world, world.post, world.rng.uniform(0.3, 6.0))


async def slow_mailbox(world: World) -> None:
    """The database is slow."""
    await _be_slow(world, world.post, world.rng.uniform(0.05, 0.5), world.rng.uniform(1.0, 8.0))


async def forgetful_mailbox(world: World) -> None:
    """The database commits, and its answer is lost."""
    await _be_forgetful(world, world.post, world.rng.uniform(1.0, 8.0))


async def forgetful_broker(world: World) -> None:
    """The broker takes all signals or half of them, and answers with an error."""
    await _be_forgetful(world, world.broker, world.rng.uniform(1.0, 8.0))


async def stop_store(world: World) -> None:
    """The coordination store is down; no client may notice."""
    store = world.store
    world.trace.note("store", "goes down")
    store.trouble.begin()
    store.up = False
    await world.nap(world.rng.uniform(0.5, 6 * world.config.lease_s))
    world.trace.note("store", "comes up")
    store.up = True
    store.trouble.end()


async def slow_store(world: World) -> None:
    """The coordination store is slow, up to seconds; no client may notice."""
    world.store.trouble.begin()
    world.store.slow_s = world.rng.choice((0.1, 0.5, 2.0))
    await world.nap(world.rng.uniform(2.0, 15.0))
    world.store.slow_s = 0.0
    world.store.trouble.end()


async def forgetful_store(world: World) -> None:
    """The coordination store writes, and its answer is lost; no client may notice."""
    world.store.trouble.begin()
    world.store.forgetful = 0.3
    await world.nap(world.rng.uniform(1.0, 10.0))
    world.store.forgetful = 0.0
    world.store.trouble.end()


async def wipe_store(world: World) -> None:
    """The coordination store loses all its data; no client may notice."""
    world.trace.note("store", "loses its data")
    world.store.trouble.happen()
    world.store.forget_everything()


async def _go_down(world: World, server: Server, down_s: float) -> None:
    server.trace.note(server.name, "goes down")
    server.trouble.begin()
    server.up = False
    await world.nap(down_s)
    server.trace.note(server.name, "comes up")
    server.up = True
    server.trouble.end()


async def _be_slow(world: World, server: Server, slow_s: float, while_s: float) -> None:
    server.trace.note(server.name, "is slow")
    server.trouble.begin()
    server.slow_s = slow_s
    await world.nap(while_s)
    server.slow_s = 0.0
    server.trouble.end()


async def _be_forgetful(world: World, server: Server, while_s: float) -> None:
    server.trace.note(server.name, "forgets to answer")
    server.trouble.begin()
    server.forgetful = 0.3
    await world.nap(while_s)
    server.forgetful = 0.0
    server.trouble.end()


# --- clients --------------------------------------------------------------------------------------


async def lose_socket(world: World) -> None:
    """A connection breaks, and both sides know."""
    if client := _client(world):
        client.lose_socket()


async def quiet_network(world: World) -> None:
    """A client's network goes quiet, and then is back."""
    client = _client(world)
    if client is None:
        return
    client.trouble.begin()
    client.network.quiet = True
    await world.nap(world.rng.choice((0.5, 5.0, 60.0)) * world.rng.random())
    client.network.come_back()
    client.trouble.end()


async def switch_network(world: World) -> None:
    """A phone goes from one network to another; the instance is not told."""
    if client := _client(world):
        client.network.change()
        client.lose_socket()
        client.wake()


async def sleep_and_wake(world: World) -> None:
    """A laptop's lid is closed for a while: its socket is dead when it wakes."""
    client = _client(world)
    if client is None:
        return
    client.trouble.begin()
    client.loop.pause()
    await world.nap(world.rng.choice((1.0, 20.0, 60.0)) * world.rng.random())
    client.loop.resume()
    if world.rng.random() < 0.5:
        client.network.change()
        client.lose_socket()
    client.wake()
    client.trouble.end()


async def slow_reader(world: World) -> None:
    """A client does not read for a while, and is sent many pokes."""
    client = _client(world)
    if client is None or client.wire is None:
        return
    wire = client.wire
    client.trouble.begin()
    wire.reads = False
    for _ in range(world.rng.randrange(60)):
        world.send_soon(client.recipient)
        await world.nap(world.rng.uniform(0.01, 0.3))
    wire.read_on()
    client.trouble.end()


async def no_tokens(world: World) -> None:
    """The token issuer does not answer a client for a while."""
    if client := _client(world):
        client.token_trouble = True
        await world.nap(world.rng.uniform(1.0, 60.0))
        client.token_trouble = False


async def disconnect(world: World) -> None:
    """An administrator closes all sessions of a recipient: its clients get new tokens."""
    await _end_sessions(world, revokes=False)


async def revoke(world: World) -> None:
    """An administrator revokes all tokens of a recipient: its clients get new ones."""
    await _end_sessions(world, revokes=True)


async def _end_sessions(world: World, *, revokes: bool) -> None:
    client = _client(world)
    if client is None or not world.well_instances:
        return
    through, recipient = world.rng.choice(world.well_instances), client.recipient
    what = "revoke the tokens of" if revokes else "disconnect"
    world.trace.note(through.name, f"is to {what} {recipient}")
    sessions = _sessions_of(world, recipient)
    ask = through.revoke if revokes else through.disconnect
    if await _ask(world, through, lambda: ask(recipient)):
        world.witnesses.disconnected(through, sessions, revoked=revokes)


def _sessions_of(world: World, recipient: str) -> Sequence[tuple[SimShell, object]]:
    """Who hears ``recipient`` and is ready, and their sessions."""
    return [(each, each.session) for each in world.hearers_of(recipient) if each.ready]


async def block_sockets(world: World) -> None:
    """Something between a client and the bridge blocks WebSockets, but not HTTP."""
    client = _client(world)
    if client is None:
        return
    client.network.middlebox = world.rng.choice(("refuse", "cut", "buffer"))
    world.trace.note(client.name, f"is behind what can only {client.network.middlebox} sockets")
    client.lose_socket()
    await world.nap(world.rng.uniform(5.0, 30.0))
    world.trace.note(client.name, "can use sockets again")
    client.network.middlebox = None
    if world.rng.random() < 0.5:
        client.wake()


async def listen(world: World) -> None:
    """A client begins to listen to a recipient, perhaps again, or stops."""
    client = _client(world)
    if client is None:
        return
    if client.listens and world.rng.random() < 0.5:
        leaving = world.rng.choice(client.listens)
        world.trace.note(leaving.name, "listens no more")
        leaving.leave()
    else:
        others = [each for each in world.everyone if each != client.recipient]
        world.listen(client, world.rng.choice(others))


async def come_and_go(world: World) -> None:
    """One client leaves for good, another comes."""
    if client := _client(world):
        client.leave()
        world.add_client(client.recipient)


ALL: Mapping[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill,
        lose_power,
        pause,
        pause_a_writer,
        kill_after_commit,
        restart,
        drain,
        migrate,
        migrate_over_a_gap,
        add_instance,
        remove_instance,
        kill_worker,
        break_channel,
        stop_worker,
        restart_broker,
        break_subscription,
        cut_from_broker,
        deafen,
        deny_subscriptions,
        lose_broker,
        break_route,
        lag_route,
        demote_server,
        limit_signals,
        poison,
        cut_from_store,
        cut_from_mailbox,
        stop_mailbox,
        slow_mailbox,
        forgetful_mailbox,
        restore_mailbox,
        forgetful_broker,
        stop_store,
        slow_store,
        forgetful_store,
        wipe_store,
        lose_socket,
        quiet_network,
        switch_network,
        sleep_and_wake,
        slow_reader,
        no_tokens,
        disconnect,
        revoke,
        block_sockets,
        listen,
        come_and_go,
    )
}
