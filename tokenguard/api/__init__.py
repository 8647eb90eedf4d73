"""The HTTP surface: Falcon resources, each a thin driver of a use case."""
