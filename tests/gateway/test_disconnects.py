"""What was disconnected and revoked: what is kept, repeated and refused."""

from pokebridge.gateway import disconnects
from pokebridge.gateway.disconnects import KEPT_S, Disconnects
from pokebridge.wire import Disconnect, decode_signal, encode_disconnect

BOB = "urn:user:bob"
NOW = 1_800_000_000.0


def at(seconds: float, lasts_s: float | None = None, recipient: str = BOB) -> Disconnect:
    """A disconnect so many seconds after NOW; one that ``lasts_s`` revokes."""
    at_ms = int((NOW + seconds) * 1000)
    return Disconnect(recipient, at_ms, None if lasts_s is None else at_ms + int(lasts_s * 1000))


def test_the_recent_ones_are_repeated_for_some_minutes_unless_somebody_has_done_it() -> None:
    """Each recipient's newest."""
    kept = Disconnects()
    assert kept.note(at(0), NOW)
    assert kept.note(at(1), NOW + 1)
    assert not kept.note(at(0), NOW + 1)
    (repeated,) = kept.to_repeat(NOW + 2, unless_heard_since_s=NOW + 2)
    assert repeated == at(1)._replace(is_repeated=True)
    assert not kept.note(repeated, NOW + 3)
    assert not kept.to_repeat(NOW + 4, unless_heard_since_s=NOW + 2)
    assert not kept.to_repeat(NOW + 1 + KEPT_S, unless_heard_since_s=NOW + KEPT_S)


def test_an_older_one_that_is_repeated_does_not_stand_for_the_newest() -> None:
    """Another instance repeats what it knows: the newest is still to be repeated."""
    kept = Disconnects()
    kept.note(at(5), NOW + 5)
    assert not kept.note(at(0)._replace(is_repeated=True), NOW + 9)
    (repeated,) = kept.to_repeat(NOW + 10, unless_heard_since_s=NOW + 8)
    assert repeated == at(5)._replace(is_repeated=True)


def test_no_more_are_kept_than_the_limit() -> None:
    """The oldest go."""
    kept = Disconnects()
    for number in range(disconnects.MAX_RECENT + 5):
        kept.note(at(0, recipient=f"u{number}"), NOW)
    recipients = [each.recipient for each in kept.to_repeat(NOW, unless_heard_since_s=NOW + 1)]
    assert len(recipients) == disconnects.MAX_RECENT
    assert recipients[0] == "u5"


def test_tokens_from_before_a_revocation_are_refused_until_it_ends() -> None:
    """A token that does not say when it was issued counts as old; others' tokens stay valid."""
    kept = Disconnects()
    kept.note(at(0.5, lasts_s=60), NOW)
    for issued_at in (NOW - 5, NOW, None, float("nan")):
        assert kept.refuses(BOB, issued_at, NOW + 1)
        assert not kept.refuses(BOB, issued_at, NOW + 61)
    assert not kept.refuses(BOB, NOW + 1, NOW + 1)
    assert not kept.refuses("urn:user:eve", None, NOW + 1)
    kept.note(at(-10, lasts_s=60), NOW)  # an older one, repeated late
    assert kept.refuses(BOB, NOW - 5, NOW + 1)
    kept.note(at(30), NOW + 30)  # closes sessions, and does not revoke
    assert not kept.refuses(BOB, NOW + 1, NOW + 31)


def test_what_has_run_out_is_forgotten() -> None:
    """So a long life costs no memory."""
    kept = Disconnects()
    for number in range(3000):
        kept.note(at(number, lasts_s=1, recipient=f"u{number}"), NOW + number)
    assert len(kept._revoked) < 1500


def test_the_signal_carries_all_of_it() -> None:
    """And the plain form stays as it was."""
    for wanted in (at(0), at(0, lasts_s=5), at(0)._replace(is_repeated=True)):
        assert decode_signal(encode_disconnect(**wanted._asdict())) == wanted
    assert encode_disconnect(BOB) == b'{"type":"disconnect","recipient":"urn:user:bob"}'
