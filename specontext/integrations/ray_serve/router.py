"""Ray Serve's way to ask which replica a request goes to."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from specontext.integrations.ray_serve.call import Call
from specontext.integrations.ray_serve.prefixes import PrefixTable


class PrefixRouter(RequestRouter):
    """The replica that knows the prompt's beginning, or one of two that are drawn, whichever has less to do.

    Ray's own `PrefixCacheAffinityRouter` is part of ray[llm], which brings vLLM's needs with it, and waits for another process in
    the event loop of all streams.
    """

    def initialize_state(self, routing: str = "prefix", **_: Any) -> None:
        self._by_prefix = routing == "prefix"
        self._table = PrefixTable()
        self._open: Counter[str] = Counter()  # calls from this process that are under way

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        self._table.keep(names)
        for gone in self._open.keys() - names:
            del self._open[gone]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are to be asked."""
        call = _call_of(pending_request)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if call is not None and call.replica in named:
            return [[named[call.replica]]]
        if not self._by_prefix or call is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        # What a replica last said of all its calls is unknown once it is old: a replica may write long answers meanwhile.
        said = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in named.items()}
        loads = {name: max(self._open[name], count) for name, count in said.items()}
        return [[named[name]] for name in self._table.order(call.marks, loads)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._open[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._open[replica_id.unique_id] = max(0, self._open[replica_id.unique_id] - 1)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        call = _call_of(pending_request)
        if call is not None:
            self._table.note(call.marks, replica_id.unique_id)


def _call_of(pending: PendingRequest | None) -> Call | None:
    found = pending.args[0] if pending is not None and pending.args else None
    return found if isinstance(found, Call) else None
