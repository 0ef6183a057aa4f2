"""Probes: what a model does with a picture, and how far it can be driven, looked at from outside."""
