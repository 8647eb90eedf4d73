"""Providers' wires: how to read a request, an answer and its usage, and how to say no in their words."""
