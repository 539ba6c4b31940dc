"""The server under Ray Serve: replicas of one application, to which requests go by adapter.

Two deployments. ``model`` is the whole application of ``ktrt.serve.app`` over a model, one replica
per machine. ``router`` is in front: it reads the ``model`` of a request and passes the request on,
with the adapter as Ray's ``multiplexed_model_id``, so that an adapter's requests meet in one
replica's steps and prefix cache. The router has no model and loads no torch.

``docs/ray.md`` shows the deployment files; they name ``ktrt.serve.ray:build``.
"""

from ktrt.serve.ray.build import build

__all__ = ["build"]
