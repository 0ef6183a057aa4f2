"""Strategies: methods that answer by a conversation of several calls."""
