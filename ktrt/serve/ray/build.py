"""The Ray Serve application: the two deployments with their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray import serve

from ktrt.serve.ray.arguments import read_arguments
from ktrt.serve.ray.replica import ModelReplica
from ktrt.serve.ray.router import Entrance, Router

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL, ROUTER = "model", "router"


def build(args: Mapping[str, Any]) -> Any:
    """Returns the application for ``serve.run`` or a deployment file's ``import_path``.

    ``args``: ``config``, a YAML file or a model's folder on every machine, or a mapping of its
    keys; ``overrides``, a mapping of keys that win over it; ``settings``, a mapping of
    ``ServeSettings``; ``model_options`` and ``router_options``, Ray's options of the two
    deployments. Keys come from the environment of each machine. ``ConfigError``: what is wrong.
    """
    config, settings = read_arguments(args)
    most = settings.max_concurrent or config.scheduler.max_num_seqs
    model = serve.deployment(
        ModelReplica,
        name=MODEL,
        # Ray holds what waits, so that it can go to the replica that is free first.
        max_ongoing_requests=most,
        max_queued_requests=max(1, settings.max_waiting),
        graceful_shutdown_timeout_s=settings.drain_seconds,
    ).options(**dict(args.get("model_options") or {}))
    router = serve.deployment(
        serve.ingress(Entrance())(Router),
        name=ROUTER,
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={"num_cpus": 0.5},
    ).options(**dict(args.get("router_options") or {}))
    kept = {name: value for name, value in args.items() if not name.endswith("_options")}
    return router.bind(kept, model.bind(kept))
