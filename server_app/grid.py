"""A Flower grid that shows each reply as it arrives, and knows which client a node is."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from logging import getLogger
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmitr_flwr.common.errors import RunError, UploadError, printable
from fedmitr_flwr.common.progress import Progress
from fedmitr_flwr.config.limits import needed

from .records import addressed

log = getLogger("fedmitr")

STUMBLE = 300.0  # seconds for which a SuperLink may do nothing but fail
MOST_SAID = 10_000  # characters of an error's text that are kept
TRIES = 3  # how often a client is asked that only dead actors were handed
REFUSED, UNREADABLE = 2, 4  # Flower's codes (the ClientApp raised, no reply to be had) of the errors that are made here
_CONNECTION = {"grpc", "httpcore", "httpx", "sqlalchemy", "sqlite3"}  # whose errors are no client's fault
_DEAD_ACTOR = re.compile(r"ActorDiedError.*?actor_id: (\w+)", re.DOTALL)


class ObservedGrid(Grid):
    """Any Flower grid, with a hook on every reply.

    The hook sits in `pull_messages`, so it works whether a strategy calls `send_and_receive` (Flower up to 1.42) or
    drives `push_messages` and `pull_messages` itself (1.43).
    """

    def __init__(
        self,
        inner: Grid,
        on_reply: Callable[[Message, int], None] | None = None,
        clients: Mapping[int, int] | None = None,
        poll: float = 0.5,
        quorum: float = 0.0,
        on_asked: Callable[[], None] | None = None,
    ) -> None:
        """Wrap `inner`, Flower's own, and look for replies every `poll` seconds.

        `on_reply` is called with every reply that has content, and with the node that sent it. An UploadError makes an
        error of that client of the reply; what else it raises is logged and kept from the other replies. `on_asked` is
        called before each look, when all questions have been sent. `clients`, node id -> client, are for the log and
        for the order of replies; of the questions the share `quorum` must get good ones in `send_and_receive`.
        """
        self.inner, self.on_reply, self.poll, self.quorum = inner, on_reply, poll, quorum
        self.clients, self.on_asked = dict(clients or {}), on_asked
        self._asked: dict[str, int] = {}  # message id -> node; a lost node's reply names the SuperLink as its source
        self._killers: dict[str, str] = {}  # dead Ray actor -> of its questions known to have failed, the first asked
        self._in_hook = 0.0  # seconds
        self._stumbling: float | None = None  # since when the SuperLink does nothing but fail

    @property
    def sends_copies(self) -> bool:
        """Is what was sent no longer needed here? A simulation hands the very objects out, and asks with them again."""
        return type(self.inner).__name__ == "HttpGrid"

    def set_run(self, run: Any) -> None:
        self.inner.set_run(run)

    @property
    def run(self) -> Any:
        return self.inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self.inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self.inner.get_nodes()

    def name_of(self, node: int) -> str:
        return f"client {self.clients[node]}" if node in self.clients else f"node {node}"

    def node_of(self, reply: Message) -> int:
        """The node that was asked, also where the SuperLink answers for it."""
        return self._asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send each message by itself, so that one which Flower rejects is known by name."""
        sent: list[str] = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node in self.clients:
                message = addressed(message, self.clients[node])
            ids = [found for found in self.inner.push_messages([message]) if found]
            if not ids:
                log.warning("%s cannot be asked: Flower did not take the message", self.name_of(node))
            self._asked |= dict.fromkeys(ids, node)
            sent += ids
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Fetch replies one by one: no more than one is in memory before the hook has seen it, and freed it perhaps."""
        if self.on_asked:
            self.on_asked()
        replies: list[Message] = []
        for message_id in list(message_ids):
            replies += [self._shown(self._read(reply, message_id)) for reply in self._fetch(message_id)]
        return replies

    def _fetch(self, message_id: str) -> Iterable[Message]:
        """The reply to a message, none if there is none yet, or if the SuperLink stumbled over the question.

        Flower makes records of a client's bytes here, and bytes that are no records raise all kinds of errors.
        """
        try:
            replies = self.inner.pull_messages([message_id])
        except Exception as error:
            if not _is_of_the_connection(error):
                return [self._failure(message_id, UNREADABLE, f"its reply cannot be read ({type(error).__name__})")]
            now = time.monotonic()
            self._stumbling = self._stumbling or now
            if not _is_stumble(error) or now - self._stumbling > STUMBLE:
                raise
            log.warning("the SuperLink failed when it was asked for replies; it is asked again (%s)", first_line(error))
            return []
        self._stumbling = None
        return replies

    def _read(self, reply: Message, message_id: str) -> Message:
        """The reply, whose own words do not decide which question it answers; an error, if it says nothing."""
        if not reply.has_content() and not reply.has_error():
            return self._failure(message_id, UNREADABLE, "its reply is empty")
        reply.metadata.__dict__["_reply_to_message_id"] = message_id
        return reply

    def _failure(self, message_id: str, code: int, text: str) -> Message:
        """An error reply to a question that was asked here, as the SuperLink makes them."""
        question = Message(RecordDict(), self._asked.get(message_id, 0), "train")
        question.metadata.__dict__["_message_id"] = message_id
        return Message(Error(code, text), reply_to=question)

    def _shown(self, reply: Message) -> Message:
        """The reply after the hook has seen it: an error, if the hook refused it."""
        node = self.node_of(reply)
        if reply.has_error():
            log.warning("%s failed: %s", self.name_of(node), reason(reply))
            # Flower's strategies log the text themselves.
            said = printable((reply.error.reason or "")[:MOST_SAID])
            return self._failure(reply.metadata.reply_to_message_id, reply.error.code, said)
        if self.on_reply:
            started = time.monotonic()
            try:
                self.on_reply(reply, node)
            except UploadError as error:
                log.warning("refused: %s", error)
                reply = self._failure(reply.metadata.reply_to_message_id, REFUSED, str(error))
            except Exception:  # one reply's trouble must not cost the others
                log.exception("%s: its reply could not be taken", self.name_of(node))
            self._in_hook += time.monotonic() - started
        return reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Ask, and wait for all replies or for `timeout` seconds, in which the hook's own time does not count.

        Replies come back in the order of the clients, not of arrival, so that sums over them are the same in every
        run. A client which Ray gave to an actor that had died before, under another client, is asked again.
        """

        def rank(message: Message) -> tuple[int, int]:
            node = message.metadata.dst_node_id
            return self.clients.get(node, len(self.clients)), node

        questions = sorted(messages, key=rank)
        if not questions:
            return []
        asked = {found: number for number, one in enumerate(questions) for found in self.push_messages([one])}
        waiting = dict(asked)
        deadline = None if timeout is None else time.monotonic() + timeout
        self._in_hook = 0.0
        answers: dict[int, Message] = {}
        bereft: list[int] = []  # questions that a dead actor was handed
        tries = Counter(asked.values())
        with Progress.of_clients(len(questions)) as progress:
            while waiting and (deadline is None or time.monotonic() < deadline + self._in_hook):
                freed = False  # has an actor that lives become free?
                for reply in self.pull_messages(waiting):
                    number = waiting.pop(reply.metadata.reply_to_message_id, None)
                    if number is None:  # a second reply to one question; the hook has seen it
                        continue
                    progress.update(number not in answers)
                    answers[number] = reply
                    freed |= reply.has_content()
                    lost = asked.get(self._never_began(reply))
                    if lost is not None and tries[lost] < TRIES:
                        bereft.append(lost)
                if bereft and (freed or not waiting):  # only one: Flower's pool gives it to the actor freed last
                    tries[number := bereft.pop(0)] += 1
                    again = dict.fromkeys(self.push_messages([_again(questions[number])]), number)
                    asked |= again
                    waiting |= again
                if waiting:
                    time.sleep(self.poll)
        for number in sorted(set(waiting.values()) - set(answers)):
            log.warning("%s did not reply in time", self.name_of(questions[number].metadata.dst_node_id))
        good = sum(reply.has_content() for reply in answers.values())
        if self.quorum and good < needed(self.quorum, len(questions)):
            raise RunError(f"{good} of {len(questions)} clients replied well, fewer than flower.quorum = {self.quorum}")
        return [answers[number] for number in sorted(answers)]

    def _never_began(self, reply: Message) -> str:
        """The question that a dead Ray actor was handed, as this failure names it; "" if there is none.

        The actor took the client with it that it ran, which of all that fail is the one asked first; its failure need
        not be fetched first. Every other one was given to an actor that was dead.
        """
        found = _DEAD_ACTOR.search(reply.error.reason or "") if reply.has_error() else None
        if not found:
            return ""
        now = reply.metadata.reply_to_message_id
        before = self._killers.setdefault(found[1], now)
        if before == now:
            return ""
        self._killers[found[1]], never_began = sorted((before, now), key=list(self._asked).index)
        return never_began


def reason(reply: Message) -> str:
    """The first line of an error reply's reason, with its code."""
    return f"{first_line(reply.error.reason or 'no reason given')} (Flower's error code {reply.error.code})"


def first_line(said: object) -> str:
    """Of a text that came from outside, as much as fits a log."""
    return printable((str(said).strip().splitlines() or ["no reason given"])[0][:300])


def _is_of_the_connection(error: Exception) -> bool:
    """Did the way to the SuperLink fail, or its database, and not the reading of what a client sent?"""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(_CONNECTION)


def _is_stumble(error: Exception) -> bool:
    """Did the SuperLink fail (HTTP 5xx) before it gave a reply away?

    Its database is locked for seconds where a slow disk takes in large uploads, and Flower does not ask again. Behind
    `pull-messages` a reply counts as delivered: a failure there cannot be mended by asking.
    """
    response, request = getattr(error, "response", None), getattr(error, "_request", None)
    status, path = getattr(response, "status_code", 0), getattr(getattr(request, "url", None), "path", "")
    return bool(status >= 500 and path.endswith("/pull-messages"))


def _again(message: Message) -> Message:
    """The same question as a new message: Flower refuses one that was delivered before."""
    old = message.metadata
    return Message(message.content, old.dst_node_id, old.message_type, ttl=old.ttl, group_id=old.group_id)
