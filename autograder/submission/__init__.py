"""Talking to a submission: the wire, the worker that runs the notebook, the client that asks, the sandbox around."""
